"""The commands as people meet them: in a process of their own where it matters, with exit codes,
JSON and no traceback."""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from prefab import run
from prefab.factory.console import fail
from prefab.factory.errors import BudgetError
from prefab.factory.store.store import read_frame as store_read
from prefab.pipelines.cli.main import app, main
from prefab.pipelines.cli.project import check_paths
from prefab.pipelines.store.fill import query as ask
from tests.support import project
from tests.support.json_output import check

ROOT = Path(__file__).resolve().parents[3]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def prefab(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "prefab.pipelines.cli.main", *words],
        cwd=cwd,
        env=ENV,
        text=True,
        capture_output=True,
        timeout=300,
    )


def inside(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Run the command in this process, which is quicker; exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["prefab", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr()
    check(words, out.out)
    return int(ended.value.code or 0), out.out, out.err


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    value = project.pipeline(folder, prompts=4)
    run(value, engines=project.engine())
    project.write(folder, value)
    return folder


def test_help_loads_nothing_heavy():
    code = (
        "import sys, prefab.pipelines.cli.main; heavy = {'torch', 'transformers', 'vllm', "
        "'duckdb', 'polars', 'aiohttp', 'numpy',"
        " 'pyarrow', 'pydantic'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENV, cwd=ROOT).returncode == 0
    told = CliRunner().invoke(app, ["--help"])
    for name in (
        "demo",
        "init",
        "check",
        "plan",
        "run",
        "export",
        "sql",
        "store",
        "serve",
        "doctor",
    ):
        assert name in told.output


def test_init_check_plan(tmp_path, monkeypatch, capsys):
    code, out, err = inside(monkeypatch, capsys, "init", str(tmp_path / "mine"))
    assert code == 0 and "constitution.yaml" in out and "next: cd" in err
    code, out, err = inside(monkeypatch, capsys, "check", str(tmp_path / "mine"))
    assert code == 0, err
    assert out.count("ok ") == 6
    value = yaml.safe_load((tmp_path / "mine" / "pipeline.yaml").read_text())
    assert value["recipe"] == "rlaif"
    code, _, err = inside(monkeypatch, capsys, "init", str(tmp_path / "mine"))
    assert code == 2 and "not empty" in err


@pytest.mark.parametrize("marker", ["ledger.sqlite", "shards.json", "prefab-export.json"])
def test_check_leaves_out_what_prefab_made(tmp_path, marker):
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "Why?"}\n')
    made = tmp_path / "results" / "prompts"
    made.mkdir(parents=True)
    (made / "0.jsonl").write_text("[1]\n")
    assert check_paths([tmp_path])[1]
    (made.parent / marker).touch()
    assert not check_paths([tmp_path])[1]
    assert check_paths([made])[1]  # a folder that is named is checked


def test_check_tells_all_problems_at_once_with_their_places(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.yaml").write_text(
        "id: bad\ntitle: Bad\nlicence: CC0-1.0\nprinciples:\n  - {id: x, weigth: 2}\n"
    )
    (tmp_path / "pairwise.jinja").write_text("{% block user %}{{ answr_a }}{% endblock %}")
    (tmp_path / "p.yaml").write_text(
        "recipe: rlaif\nname: x\nprompts: {source: nowhere.jsonl}\nenginess: {}\n"
    )
    code, _, err = inside(monkeypatch, capsys, "check", str(tmp_path))
    assert code == 2 and "Traceback" not in err
    for words in (
        "bad.yaml:5",
        "weigth",
        "pairwise.jinja:1",
        "answr_a",
        "p.yaml:4",
        "enginess",
        "nowhere.jsonl",
    ):
        assert words in err, words
    code, out, _ = inside(monkeypatch, capsys, "check", str(tmp_path), "--json")
    assert code == 2 and len(json.loads(out)["problems"]) >= 4


@pytest.mark.slow
def test_plan_run_export_sql_and_store_as_json(made, tmp_path, monkeypatch, capsys):
    pipeline, store = str(made / "pipeline.yaml"), str(made / "store")
    code, out, _ = inside(monkeypatch, capsys, "plan", pipeline, "--json")
    assert code == 0 and json.loads(out)["ask"] == 0 and json.loads(out)["reused"] == 4 * 15
    code, out, _ = inside(monkeypatch, capsys, "run", pipeline, "--json")
    assert code == 0 and (json.loads(out)["asked"], json.loads(out)["reused"]) == (0, 60)
    code, out, _ = inside(
        monkeypatch, capsys, "export", str(tmp_path / "out"), "--store", store, "--json"
    )
    assert code == 0 and sum(json.loads(out)["counts"]["preference"].values()) == 12
    code, out, _ = inside(
        monkeypatch, capsys, "sql", "SELECT count(*) AS n FROM verdicts", "--store", store, "--json"
    )
    assert code == 0 and json.loads(out) == [{"n": 48}]
    code, out, _ = inside(monkeypatch, capsys, "store", "info", "--store", store, "--json")
    assert code == 0 and json.loads(out)["tables"]["preferences"] == 12
    code, out, _ = inside(monkeypatch, capsys, "store", "rebuild", "--store", store, "--json")
    assert code == 0 and json.loads(out)["rows"]["preferences"] == 12


def test_every_command_ends_by_naming_the_next(made, tmp_path, monkeypatch, capsys):
    pipeline, store = str(made / "pipeline.yaml"), str(made / "store")
    for words in (
        ("plan", pipeline),
        ("run", pipeline),
        ("export", str(tmp_path / "out"), "--store", store),
        ("store", "info", "--store", store),
        ("doctor", "--store", store),
    ):
        code, _out, err = inside(monkeypatch, capsys, *words)
        assert code == 0 and "next: " in err, (words, err)


@pytest.mark.slow
def test_the_next_command_can_be_pasted_where_paths_have_spaces(
    made, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(made, tmp_path / "my project", symlinks=True)
    store, pipeline, out = folder / "store", folder / "pipeline.yaml", tmp_path / "my out"
    for words in (
        ("plan", pipeline, "--set", f"store={store}", "--set", "prompts={source: p.jsonl}"),
        ("export", "--store", store, out),
        ("store", "info", "--store", store),
        ("store", "rebuild", "--store", store),
        ("audit", "data", "--store", store),
        ("agreement", "--store", store, "--resamples", "0"),
        ("init", tmp_path / "another one"),
    ):
        shutil.copyfile(folder / "prompts.jsonl", folder / "p.jsonl")
        _code, _out, err = inside(monkeypatch, capsys, *map(str, words))
        told = next(line for line in reversed(err.splitlines()) if line.startswith("next: "))
        pasted = shlex.split(told.removeprefix("next: "))
        assert any(str(path) in word for path in (folder, out, tmp_path) for word in pasted), told
        if words[0] == "plan":
            assert pasted == ["prefab", "run", *map(str, words[1:])]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run", "nowhere.yaml"), "no such file"),
        (("run", "{pipeline}", "--reask", "prase"), "no answer is unscored for 'prase'"),
        (("run", "best-of"), 'best-of: neither a file nor a preset; did you mean "best-of-n"?'),
        (("train", "dpo", "zzzz"), "zzzz: neither a file nor a preset; known: dpo, grpo, kto"),
        (("run", "{pipeline}", "--set", "policy.sampels=2"), "samples"),
        (("run", "{pipeline}", "--set", "panel.judges.0.engine=remote"), "no engine is named"),
        (("sql", "SELEKT 1", "--store", "{store}"), "syntax error"),
        (("sql", "SELECT 1", "--store", "elsewhere"), "no store here"),
        (
            ("export", "out", "--store", "{store}", "--format", "sharegpt"),
            "parquet, text, torchtune, trl",
        ),
    ],
)
def test_mistakes_are_told_without_a_traceback(made, tmp_path, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    names = {"pipeline": made / "pipeline.yaml", "store": made / "store"}
    code, _, err = inside(monkeypatch, capsys, *(word.format(**names) for word in words))
    assert code == 2 and told in err and "Traceback" not in err, err


@pytest.fixture(scope="module")
def queried(made, tmp_path_factory):
    """A copy of the store; the rows of its summary, the bytes of its ledger, its files' names."""
    store = shutil.copytree(made / "store", tmp_path_factory.mktemp("queried") / "store")
    rows = ask(store, "SELECT * FROM summary").rows()
    names = sorted(path.name for path in store.iterdir())
    return store, rows, (store / "ledger.sqlite").read_bytes(), names


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("COPY (SELECT 1 AS x) TO '{ledger}'", "COPY"),
        (
            "COPY (SELECT 1 AS x) TO '{store}/prefab.duckdb' (FORMAT csv, USE_TMP_FILE false)",
            "COPY",
        ),
        (
            "WITH a AS (COPY (SELECT 1 AS x) TO '{store}/prefab.duckdb' (FORMAT csv, USE_TMP_FILE "
            "false)) FROM a",
            "COPY",
        ),
        ("FROM json_execute_serialized_sql('{{}}')", "json_execute_serialized_sql"),
        ("EXPLAIN ANALYZE COPY (SELECT 1 AS x) TO '{ledger}'", "explained"),
        ("EXPLAIN (ANALYZE) COPY (SELECT 1 AS x) TO '{ledger}'", "explained"),
        ("explain /* */ analyze COPY (SELECT 1 AS x) TO '{ledger}'", "explained"),
        (
            "EXPLAIN ANALYZE WITH a AS (COPY (SELECT 1 AS x) TO '{store}/prefab.duckdb' "
            "(USE_TMP_FILE false)) FROM a",
            "COPY",
        ),
        ("EXPLAIN ANALYZE INSERT INTO meta VALUES ('a', 'b')", "explained"),
        ("ATTACH '{store}/other.duckdb' AS other", "ATTACH"),
        ("INSTALL httpfs", "LOAD"),
        ("LOAD httpfs", "LOAD"),
        ("SET enable_external_access=true", "SET"),
        ("PRAGMA database_list", "PRAGMA"),
        ("EXPORT DATABASE '{store}/all'", "EXPORT"),
        ("INSERT INTO meta VALUES ('a', 'b')", "INSERT"),
        ("DELETE FROM runs", "DELETE"),
        ("WITH a AS (DELETE FROM runs RETURNING *) FROM a", "DELETE"),
        ("SELECT * FROM read_text('/etc/hostname')", "/etc/hostname"),
        ("SELECT * FROM '/etc/hostname'", ""),
        ("SELECT 1; DELETE FROM runs", "2 statements"),
        ("", "0 statements"),
        ("PIVOT runs ON name", "PIVOT t ON c IN"),
    ],
)
def test_sql_reads_the_store_and_nothing_else(queried, monkeypatch, capsys, query, told):
    store, rows, ledger, names = queried
    query = query.format(ledger=store / "ledger.sqlite", store=store)
    code, out, err = inside(monkeypatch, capsys, "sql", query, "--store", str(store), "--json")
    assert code == 2 and told in err and "Traceback" not in err, err
    assert told == "" or (
        len(json.loads(out)["problems"]) == 1 and "\n" not in json.loads(out)["problems"][0]
    )
    assert (store / "ledger.sqlite").read_bytes() == ledger and sorted(
        path.name for path in store.iterdir()
    ) == names
    assert store_read(store, "SELECT * FROM summary").rows() == rows


@pytest.mark.parametrize(
    "query",
    [
        "FROM runs",
        "SHOW TABLES",
        "DESCRIBE runs",
        "SUMMARIZE runs",
        "VALUES (1);",
        "EXPLAIN SELECT 1",
        "explain analyze SELECT count(*) FROM runs",
        "EXPLAIN (FORMAT json) SELECT 1",
        "EXPLAIN (SELECT 1)",
        "WITH a AS (SELECT 1 AS x) FROM a -- one; statement",
        "PIVOT runs ON version IN (1) USING count(*)",
        'SELECT \'"type":"COPY_QUERY_NODE"\' AS x',
        "SELECT config->>'$.name' FROM runs",
    ],
)
def test_sql_takes_what_only_reads(made, monkeypatch, capsys, query):
    code, out, err = inside(
        monkeypatch, capsys, "sql", query, "--store", str(made / "store"), "--json"
    )
    assert code == 0 and json.loads(out), err


def test_an_empty_prompts_file_and_a_server_that_is_not_there(tmp_path, monkeypatch, capsys):
    value = project.pipeline(
        tmp_path,
        engines={
            "local": {
                "engine": "openai",
                "model": "m",
                "api_key_env": None,
                "base_url": "http://127.0.0.1:9/v1",
                "retries": 1,
            }
        },
    )
    path = project.write(tmp_path, value)
    code, _, err = inside(monkeypatch, capsys, "run", str(path))
    assert code == 1 and "127.0.0.1:9" in err and "Traceback" not in err, err
    (tmp_path / "prompts.jsonl").write_text("\n")
    code, _, err = inside(monkeypatch, capsys, "run", str(path))
    assert code == 2 and "holds no prompts" in err


def test_a_passed_budget_is_exit_1(tmp_path, monkeypatch, capsys):
    path = project.write(tmp_path, project.pipeline(tmp_path, prompts=40, budget={"calls": 50}))
    code, _, err = inside(monkeypatch, capsys, "run", str(path))
    assert code == 1 and "budget.calls" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["unscored", "failed", "calls", "tokens"])
def test_the_hint_after_a_passed_budget_names_that_budget(capsys, name):
    fail(BudgetError(f"9 of 90 answers failed in transport: more than budget.{name} allows"))
    assert f"raise budget.{name} with --set" in capsys.readouterr().err


def answers(ledger: Path) -> int:
    """How many calls are on disk."""
    try:
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as con:
            return con.execute("SELECT count(*) FROM calls").fetchone()[0]
    except sqlite3.Error:
        return 0


@pytest.mark.slow
def test_ctrl_c_drains_says_how_to_go_on_and_exits_130(tmp_path):
    value = project.pipeline(tmp_path, prompts=400)
    value["engines"]["local"] |= {"delay_s": 0.2, "max_in_flight": 8}
    path = project.write(tmp_path, value)
    process = subprocess.Popen(
        [sys.executable, "-m", "prefab.pipelines.cli.main", "run", str(path)],
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while answers(tmp_path / "store" / "ledger.sqlite") < 20 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "next: prefab run" in err
    value["engines"]["local"] |= {"delay_s": 0.0}
    value["prompts"]["limit"] = 5
    again = run(value)
    assert again.state == "done" and again.reused > 0


def test_usage_errors_are_exit_2():
    told = prefab("rnu")
    assert told.returncode == 2 and "rnu" in told.stderr and "Traceback" not in told.stderr


def test_the_commands_that_are_proposed_can_be_pasted():
    """Those that are written out in the source: a shell reads each of them."""
    calls = [
        node
        for path in (ROOT / "pipelines").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "hint"
    ]
    texts = [
        node.value
        for call in calls
        for node in ast.walk(call)
        if isinstance(node, ast.Constant) and str(node.value).startswith("prefab ")
    ]
    assert len(texts) > 3
    for text in {text for text in texts if text.count('"') % 2 == 0}:
        done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
        assert done.returncode == 0, f"{text}: {done.stderr}"
