"""The next commands that are printed: each names its store, is quoted, and runs; and the main
tables at 80 and 120 columns, as they stand in `tables/`.

`python -m pytest tests/pipelines/cli/test_next_commands.py --new-snapshots` writes these anew.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shlex
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import click
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from prefab import run
from prefab.factory import console
from prefab.pipelines.cli.main import app
from prefab.pipelines.store.fill import query
from tests.support import project

CLI = Path(__file__).resolve().parents[3] / "pipelines/cli"
SNAPSHOTS = Path(__file__).parent / "tables"
COMMANDS = get_command(app)
# They wait, or take minutes: their words are parsed.
NOT_STARTED = {"view", "serve", "demo", "train", "sweep"}


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that words name, and the words that are left."""
    found: click.Command = COMMANDS
    while words and words[0] in getattr(found, "commands", ()):  # typer has a click of its own
        found, words = found.commands[words[0]], words[1:]
    return found, words


def hints() -> list[tuple[str, ast.Call]]:
    """Every call that prints a next command, with its place."""
    found = []
    for file in sorted(CLI.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if named and node.func.id in ("hint", "hint_command"):
                found.append((f"{file.name}:{node.lineno}", node))
    return found


def test_a_next_command_of_a_store_names_it_and_texts_are_quoted():
    bad = []
    for place, call in hints():
        literal = [a.value for a in call.args if isinstance(a, ast.Constant)]
        if call.func.id == "hint_command":
            command, _ = command_of([str(word) for word in literal])
            options = {name for p in command.params for name in p.opts}
            starred = any(isinstance(a, ast.Starred) for a in call.args)
            exempt = (
                starred or "--help" in literal or place.startswith("data_check")
            )  # no store yet
            if "--store" in options and "--store" not in literal and not exempt:
                bad.append(f"{place}: names no store")
        for part in ast.walk(call):  # a value within a text must be quoted for a shell
            if call.func.id == "hint" and isinstance(part, ast.FormattedValue):
                name = ast.unparse(part.value)
                if name != "again" and not name.startswith("shlex."):
                    bad.append(f"{place}: {name} is not quoted")
    assert len(hints()) > 40 and bad == []


def example(node: ast.expr) -> list[str]:
    """What a next command's argument could be: its own text, with a word in place of each value."""
    if isinstance(node, ast.Starred):
        return []
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else "1" for p in node.values]
        return ["".join(map(str, parts))]
    return ["1"]


def test_every_next_command_has_the_words_of_a_command():
    """Also those that are printed after hours of training."""
    seen = set()
    for place, call in hints():
        words = [word for argument in call.args for word in example(argument)]
        if call.func.id == "hint":
            *_, last = words[0].split("&&")
            program, *words = [*shlex.split(last, comments=True), ""]
            words = words[:-1] if program == "prefab" else []
        if not words or isinstance(call.args[0], ast.Starred):
            continue  # the command itself is a value
        command, rest = command_of(words)
        known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        assert not hasattr(command, "commands"), f"{place}: {words}"
        unknown = [w for w in rest if w.startswith("--") and w not in {*known, "--help"}]
        assert not unknown, f"{place}: {unknown}"
        seen.add(command.name)
    assert {"ppo", "policy", "serve", "report", "diff", "why", "verify", "sft"} <= seen


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with a finished run, whose folder has a space in its name."""
    folder = tmp_path_factory.mktemp("next") / "my project"
    folder.mkdir()
    value = project.pipeline(folder, prompts=4)
    constitution = {
        **project.CONSTITUTION,
        "tests": [{"prompt": "Hi?", "a": "draft 0", "b": "draft 1", "prefer": "a"}],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(constitution, sort_keys=False))
    run(value, engines=project.engine())
    project.write(folder, value)
    pairs = [
        {"prompt": f"Why {i}?", "chosen": f"As {i}.", "rejected": f"No {i}."} for i in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    text = (folder / "small.yaml").read_text()
    (folder / "copy.yaml").write_text(text)
    (folder / "other.yaml").write_text(text.replace("answer is kinder?", "answer is nicer?"))
    for copy in ("forgetful", "damaged"):
        shutil.copytree(folder / "store", folder / copy)
    with closing(sqlite3.connect(folder / "damaged/ledger.sqlite")) as con:
        con.execute("UPDATE calls SET text = text || 'x' WHERE id = 3")
        con.commit()
    return folder


@pytest.fixture
def inside(made, monkeypatch):
    """Within the project's folder."""
    monkeypatch.chdir(made)
    return made


def call(*words: str) -> tuple[int, str, str, list[str]]:
    """Exit code, stdout, stderr, and the next commands that were printed."""
    done = CliRunner().invoke(app, list(words))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr, re.findall("next: (.+)", done.stderr)


# The commands that are typed, by those that they lead to.
TYPED = (
    ("check small.yaml", "plan|init"),
    ("check pairs.jsonl", "import-preferences pairs.jsonl"),
    ("check prompts.jsonl", "plan rlaif-2023 --set prompts.source=prompts.jsonl"),
    ("plan pipeline.yaml", "run pipeline.yaml"),
    ("preview pipeline.yaml", "plan pipeline.yaml"),
    ("run pipeline.yaml", "export --store"),
    ("agreement --store store --resamples 0", "agreement --store store --run small@1 --principle"),
    ("agreement --store store --resamples 0 --principle kind", "export --store store"),
    ("label --store store --annotator ann --queue q.jsonl --limit 2", "label --store store --anno"),
    ("label --store store --annotator ann --export argilla a.json --limit 2", "label --store"),
    ("audit data --store store", "export --store store --run small@1"),
    ("calibrate --store store --source none", "agreement --store store --run small@1"),
    ("principles --store store", "diff CONSTITUTION.yaml --store store --run small@1"),
    ("constitution log --store store", "constitution show"),
    ("import-preferences pairs.jsonl --store store", "export --store store --run pairs@1"),
    ("store rebuild --store store", "store info --store store"),
    ("report small --store store --out page.html", "view store"),
    ("why PREFERENCE --store store", "test CONSTITUTION.yaml --add"),
    ("diff small.yaml other.yaml --store store", "why"),
    ("induce pipeline.yaml --pairs pairs.jsonl --candidates small.yaml", "induce --help"),
    ("store verify damaged", "store verify damaged --recover damaged-recovered"),
    ("store verify damaged --recover whole", "run PIPELINE.yaml --set store=whole"),
    ("store backup store copy", "store info --store copy"),
    ("store forget --store forgetful --role sample", "run PIPELINE.yaml"),
)
PLACEHOLDERS = {"CONSTITUTION.yaml": "copy.yaml", "PIPELINE.yaml": "pipeline.yaml"}


@pytest.mark.parametrize(("typed", "leads_to"), TYPED, ids=[typed for typed, _ in TYPED])
def test_each_next_command_runs(inside, typed, leads_to):
    for old in ("q.jsonl", "a.json"):
        Path(old).unlink(missing_ok=True)
    if "PREFERENCE" in typed:
        typed = typed.replace(
            "PREFERENCE", query("store", "SELECT max(preference) FROM preferences").item()
        )
    code, _, err, found = call(*shlex.split(typed))
    assert code in (0, 1) and found, err
    assert any(re.match(f"prefab ({leads_to})", one) for one in found), found
    for one in found:
        words = shlex.split(one, comments=True)[1:]
        words = [PLACEHOLDERS.get(word, word) for word in words]
        command, rest = command_of(words)
        if words[0] in NOT_STARTED:
            command.make_context(words[0], rest)
            continue
        code, _, err, _ = call(*words)
        missing = "no model" in err or "vllm" in err  # a preset's own server is not here
        assert code in (0, 1) or missing, f"{one}\n{err}"


# --- tables ---

TABLES = {
    "agreement": "agreement --store store --run small --resamples 0 --examples 1",
    "audit-data": "audit data --store store --run small --examples 0",
    "plan": "plan pipeline.yaml",
    "principles": "principles small --store store",
    "runs": "sql --store store 'SELECT name, version, recipe FROM runs WHERE name = $$small$$'",
    "summary": "sql --store store 'SELECT * FROM summary WHERE run = 1'",
}


@pytest.fixture
def width(request, monkeypatch):
    """A line of so many columns, for the consoles that are made within the test."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    console._console.cache_clear()
    yield request.param
    console._console.cache_clear()


@pytest.mark.parametrize("width", [80, 120], indirect=True)
@pytest.mark.parametrize("name", TABLES)
def test_tables_fit_and_are_as_they_were(inside, width, name, request):
    code, out, err, _ = call(*shlex.split(TABLES[name]))
    assert code in (0, 1), err
    lines = [re.sub(r"\b[0-9a-f]{8,64}\b", "DIGEST", line) for line in out.splitlines()]
    of_tables = [line for line in lines if "  " in line.strip()]  # not sentences
    assert max(map(len, of_tables)) <= width
    file = SNAPSHOTS / f"{name}-{width}.txt"
    if request.config.getoption("--new-snapshots"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    assert file.read_text() == "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", [n for n in TABLES if not n.startswith(("runs", "summary"))])
def test_intervals_hold_their_values_and_no_share_is_impossible(inside, name):
    """Estimates are three columns of CSV. An agreement is from -1 to 1, and so is a lean or a
    difference; all others are shares.
    """
    _, out, _, _ = call(*shlex.split(TABLES[name]), "--format", "csv")
    for rows in out.split("\n\n"):
        for row in csv.DictReader(io.StringIO(rows)):
            for column in row:
                if not row.get(f"{column} low"):
                    continue
                low, value, high = (row[f"{column}{end}"] for end in (" low", "", " high"))
                numbers = [float(x) for x in (low, value, high) if re.fullmatch(r"-?[\d.e-]+", x)]
                assert numbers == sorted(numbers), row
                assert all(-1 <= x <= 1 for x in numbers), (column, row)
