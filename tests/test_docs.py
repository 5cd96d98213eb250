"""Every command and every Python example in the README and in docs/ runs; every command is
documented; links lead to files.

A block fenced ```sh or ```python is run, in the order of the page, in an empty folder
(CONTRIBUTING.md: at the top of the repository; an example: in a copy of its folder). Python blocks
with no ```sh block between them share one process. Of a block fenced ```console each command's
words and configuration are checked, and a slow test runs it in a project with a scripted engine,
unless NOT_RUN_BECAUSE has the reason why not. Signatures in the reference are fenced ```py; so is a
block of another package's Python, which a test with that package runs (PY_BLOCKS). The words of
commands in blocks fenced ```text are checked, and blocks fenced ```yaml as parts of a
configuration."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import click
import jsonschema
import pytest
import yaml
from typer import main as typer_main

import prefab
from prefab.factory.spec import yamlio
from prefab.factory.spec.layouts import LAYOUTS
from prefab.pipelines.cli.main import app
from prefab.pipelines.config.schema import _override
from prefab.pipelines.evaluation.policy import PolicyEvalConfig
from prefab.pipelines.evaluation.weak_to_strong import WeakToStrongConfig
from prefab.pipelines.training import stages
from prefab.pipelines.training.online import OnlineConfig
from prefab.pipelines.training.sweep import SweepConfig
from prefab.trainers.registry import STAGES
from tests.support.family_server import family_server
from tests.support.fork_server import ForkServer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *(page for folder in (DOCS, EXAMPLES) for page in sorted(folder.rglob("*.md"))),
]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)
WITH_COMMANDS = [page for page in PAGES if BLOCK.search(page.read_text())]
# Pages without commands, and pages whose commands all need a model or a GPU.
NOT_RUN = {
    *(
        "commands",
        "configuration",
        "design",
        "exports",
        "index",
        "judge-server",
        "log",
        "microworld",
        "models",
    ),
    *("panels", "ppo", "reference", "reliability", "store-schema", "training", "verifiers"),
    "view",
}


def test_every_page_has_commands_that_run_or_is_listed():
    assert {page.stem for page in PAGES} - {page.stem for page in WITH_COMMANDS} == NOT_RUN


# Pages with blocks fenced ```py, and what checks them.
PY_BLOCKS = {
    "reference": "tests/test_docs.py",
    "panels": "tests/pipelines/store/test_export_layouts.py",  # Argilla
}


def test_each_block_of_python_is_run_or_has_its_test():
    assert {page.stem for page in PAGES if "\n```py\n" in page.read_text()} == PY_BLOCKS.keys()
    assert all((ROOT / path).exists() for path in PY_BLOCKS.values())


TRAINS = "prefab.train("
# Pages of more commands than an ordinary test runs (3 seconds of CPU time and more).
LONG = (
    "checks",
    "data",
    "edit-a-constitution",
    "labels-to-policy",
    "large-batches",
    "runs",
    "scale",
    "store",
)
LONG_EXAMPLES = ("code-review",)


def script(page: str, trains: bool) -> str:
    """A page's blocks as one shell script, with or without those that train a model."""
    parts = []
    wanted = [block for block in BLOCK.findall(page) if trains or TRAINS not in block[1]]
    for language, blocks in groupby(wanted, key=lambda block: block[0]):
        code = "\n".join(block for _, block in blocks)
        if language == "python":
            code = f"python - <<'END_OF_PYTHON'\n{code}\nEND_OF_PYTHON"
        parts.append(code)
    return "\n".join(parts)


def is_long(page: Path) -> bool:
    return page.stem in LONG or page.parent.name in LONG_EXAMPLES


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if is_long(page) else [])
        for page in WITH_COMMANDS
    ],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_examples_run(page, tmp_path, forks):
    """All but those that train."""
    run_page(page, tmp_path, forks, trains=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in WITH_COMMANDS if TRAINS in page.read_text()], ids=lambda p: p.stem
)
def test_examples_that_train_run(page, tmp_path, training_forks):
    run_page(page, tmp_path, training_forks, trains=True)


def run_page(page: Path, tmp_path: Path, forks: ForkServer, trains: bool) -> None:
    """Run the blocks of a page, in an empty folder or where it says."""
    if EXAMPLES in page.parents:
        shutil.copytree(page.parent, tmp_path, dirs_exist_ok=True)
    done = subprocess.run(
        ["bash", "-c", "set -ex\n" + forks.shell() + script(page.read_text(), trains)],
        cwd=ROOT if page.name == "CONTRIBUTING.md" else tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
# In the order of the pages: one command may need what an earlier one of its page wrote.
CONSOLE_COMMANDS = list(
    dict.fromkeys(
        shlex.join(shlex.split(command, comments=True))
        for page in PAGES
        for block in CONSOLE.findall(page.read_text())
        for command in re.findall(r"^\$ (.*)$", block.replace("\\\n", " "), re.M)
    )
)
# The beginnings of the commands in ```console blocks that no test runs as they stand.
NOT_RUN_BECAUSE = {
    "make ": "minutes, or the environment itself",
    ". .venv/bin/activate": "the environment itself",
    "pre-commit install": "not installed, and it would write into .git",
    "python -m benchmarks.policies": "trains models for hours",
    "python -m pytest": "the tests themselves",
    "export OPENAI_API_KEY": "a secret",
    "accelerate launch": "trains; tests/trainers/test_accelerate.py runs the same command line",
    "prefab demo": "minutes; tests/pipelines/cli/test_demo.py runs it",
    "prefab train ": "trains a model for minutes; below it makes one small step",
    "prefab sweep ": "trains models for minutes; likewise",
    "prefab eval policy": "samples from trained models; likewise",
    "prefab eval weak-to-strong": "trains models for minutes; likewise",
    "prefab serve ": "starts vLLM; tests/factory/engines/test_kept_server.py does",
    "prefab run best-of-n --set name=by-reward": "after `prefab train reward`; below",
    "prefab run pipeline.yaml --set 'engines.local={engine: openai, model: gpt-5-mini": "below",
    "prefab watch": "waits for edits; tests/pipelines/run/test_watch.py makes some",
    "prefab view store": "serves until it is ended; tests/pipelines/view/test_browser.py starts it",
    "prefab sql 'SELECT value FROM evals": "after `prefab train online`",
    "prefab judge serve": "serves until it is ended; tests/pipelines/training/test_judge_server.py starts it",
}
ALSO_RUN = ("prefab view store --bundle",)
# What is written after commands that would start vLLM with their own settings.
SCRIPTED = " --set 'engines.local={engine: scripted}'"
SHORT = f"{SCRIPTED} --set prompts.limit=4 --set budget.unscored=1.0"
WITH = {
    "prefab run demo --set name=two-judges": f"{SHORT} --set 'engines.weak={{engine: scripted}}'",
    "prefab run pipeline.yaml --set 'engines.local={engine: openai": "",
    "prefab run": SHORT,
    "prefab test constitution.yaml": f"{SCRIPTED} || test $? = 1",  # 1: a test of it fails
}


def as_run(command: str) -> str:
    return command + next((text for start, text in WITH.items() if command.startswith(start)), "")


def is_run(command: str) -> bool:
    return command.startswith(ALSO_RUN) or not command.startswith(tuple(NOT_RUN_BECAUSE))


def test_no_reason_is_left_over():
    assert not [
        start
        for start in (*NOT_RUN_BECAUSE, *WITH)
        if not any(command.startswith(start) for command in CONSOLE_COMMANDS)
    ]


def test_the_tests_that_reasons_name_exist():
    for reason in NOT_RUN_BECAUSE.values():
        for path in re.findall(r"tests/[\w/.]+\.py", reason):
            assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_console_commands_run_on_a_scripted_project(tmp_path, forks):
    commands = [as_run(command) for command in CONSOLE_COMMANDS if is_run(command)]
    assert len(commands) >= 20
    project = (
        "prefab init shop\ncd shop\nln -s $PYTHONPATH/constitutions\n"
        "prefab run pipeline.yaml --set 'engines.local={engine: scripted}' --set prompts.limit=8\n"
    )
    # each edit of a file changes it, into one that has no mistake
    ends = "! cmp -s mine.yaml constitutions/microworld.yaml\nprefab check mine.yaml\n"
    with family_server(vary=True) as server:
        lines = [c.replace("http://localhost:8000", server.url) for c in commands]
        lines = [f"rm -rf out\n{c}" if " export out" in c else c for c in lines]
        done = subprocess.run(
            ["bash", "-c", "\n".join(["set -ex", forks.shell(), project, *lines, ends])],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# What is written after commands that train, so that each makes one small step.
ONE_STEP = " --set max_steps=1 --set batch_size=4 --set threads=1"
RL = ("steps=1", "batch_size=8", "micro_batch=8", "max_new_tokens=8", "eval_prompts=2", "threads=1")
RL_STEP = "".join(f" --set {text}" for text in RL)
# vLLM of the demo is not started: the same model answers in the process of the training.
ROUND = "revise=null, prompts.limit=6, policy.samples=2, budget.unscored=1.0"
ONLINE = (
    f""" --set 'sets=[{ROUND}, "engines.local={{engine: hf, model: prefab-tiny}}"]' --set rounds=1"""
    " --set source.margin=0"
)
EVAL = " --set prompts.limit=2 --set samples=1 --set max_new_tokens=8"
TRAINS_WITH = {
    "prefab train dpo": f"{ONE_STEP} --set data.sources.0.margin=0",
    "prefab train online online --set method=ppo": ONLINE
    + "".join(f" --set train.{text}" for text in RL)
    + " --set reward.max_steps=1 --set reward.threads=1",
    "prefab train online": f"{ONLINE} --set train.max_steps=1 --set train.threads=1",
    "prefab train ppo": RL_STEP,
    "prefab train grpo": RL_STEP,
    "prefab train": ONE_STEP,
    "prefab sweep": " --set 'betas=[0.1]' --set 'seeds=[0]' "
    f"--set 'sets=[{', '.join(RL)}, eval_every=1]'",
    "prefab eval policy": EVAL,
    "prefab eval weak-to-strong": f"{EVAL} --set 'seeds=[0]' --set train.max_steps=1",
    "prefab run best-of-n --set name=by-reward": SHORT,
}
NOT_TRAINED = ("sampler=vllm",)  # vLLM with the policy's own weights
# Stores and models that the pages have from the demo, from other pages or from the reader.
BEFORE = (
    "prefab init shop",
    "cd shop",
    "sed -i 's/local: {.*}/local: {engine: scripted}/' pipeline.yaml",
    "sed 's/engine: scripted/engine: scripted, model: other/' pipeline.yaml > other.yaml",
    'printf \'{"prompt": "%s?", "split": "test"}\\n\' One Two >> prompts.jsonl',
    "prefab run pipeline.yaml",
    "prefab run demo --set name=two-judges --set revise=null --set critic=null --set policy.samples=2 "
    "--set prompts.limit=12 --set 'engines={local: {engine: hf, model: prefab-tiny}, "
    "weak: {engine: hf, model: prefab-nano}}' --set 'panel.judges=[{name: nano, kind: pairwise, "
    "engine: weak}, {name: tiny, kind: pairwise}]'",
    *(
        f"prefab run {name}{SHORT} --set prompts.limit=12"
        for name in ("demo", "process", "best-of-n")
    ),
    f"prefab train sft sft{ONE_STEP}",
    f"prefab train reward reward --set members=3{ONE_STEP}",
    f"prefab train process process{ONE_STEP}",
)


def trained_small(command: str) -> str:
    """A command of one small step with `prefab-tiny`, into an empty folder; "" if it trains not."""
    text = next((text for start, text in TRAINS_WITH.items() if command.startswith(start)), "")
    if not text or any(part in command for part in NOT_TRAINED):
        return ""
    words = command.split()
    (out,) = re.findall(r"\bout=(\S+)", command) or [f"trained/{words[2 + (words[1] != 'sweep')]}"]
    return f"rm -rf {out}; {command.replace('Qwen/Qwen3-8B', 'prefab-tiny')}{text}"


@pytest.mark.slow
def test_console_commands_that_train_make_a_small_step(tmp_path, training_forks):
    """All are run, whatever fails."""
    train = [small for command in CONSOLE_COMMANDS if (small := trained_small(command))]
    assert len(train) >= 20
    lines = [f"{line} || echo {shlex.quote('FAILED ' + line)}" for line in (*BEFORE, *train)]
    done = subprocess.run(
        ["bash", "-c", "\n".join([training_forks.shell(), *lines])],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"},
    )
    failed = re.findall(r"^(?:.*\n){0,6}FAILED .*$", done.stdout, re.M)
    assert not failed and not done.returncode, "\n\n".join(failed)


@pytest.mark.parametrize("command", CONSOLE_COMMANDS)
def test_a_console_command_has_words_and_fields_that_exist(command):
    program, *words = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words) <= set(targets)
    if program == "accelerate":
        words = words[words.index("prefab.pipelines.cli.main") + 1 :]
        assert (ROOT / shlex.split(command)[3]).exists()
    elif program != "prefab":
        return
    name = words[0] + (f" {words[1]}" if words[0] in ("train", "eval") else "")
    inner: click.Command = typer_main.get_command(app)
    while hasattr(inner, "commands"):
        inner = inner.commands[words.pop(0)]
    given = inner.make_context("prefab", words).params
    models = {f"train {stage}": found.config for stage, found in STAGES.items()} | {
        "train online": OnlineConfig,
        "sweep": SweepConfig,
        "eval policy": PolicyEvalConfig,
        "eval weak-to-strong": WeakToStrongConfig,
    }
    if name in models and str(given["config"]) != "CONFIG.yaml":
        file = given["config"]
        document = stages.document(file, ()) if file else yamlio.Document("--set", "", {})
        for text in given["sets"]:
            _override(document, text)
        yamlio.validate(document, models[name])


TEXT_COMMANDS = list(
    dict.fromkeys(
        shlex.join(shlex.split(command, comments=True))
        for page in PAGES
        for block in re.findall(r"^```text\n(.*?)^```$", page.read_text(), re.M | re.S)
        for command in re.findall(r"^(prefab .*)$", block.replace("\\\n", " "), re.M)
    )
)


def test_commands_in_blocks_of_text_have_words_and_fields_that_exist():
    """These name files that a reader has, or a hub; docs/commands.md has those of each --help."""
    assert len(TEXT_COMMANDS) > 50
    for command in TEXT_COMMANDS:
        test_a_console_command_has_words_and_fields_that_exist(command)


def schemas() -> list[jsonschema.Draft202012Validator]:
    """Validators of the files that examples in YAML are parts of, without required fields."""
    found = [
        json.loads((ROOT / path).read_text())
        for path in ("pipelines/pipeline.schema.json", "constitutions/constitution.schema.json")
    ]
    found += [STAGES[stage].config.model_json_schema() for stage in ("sft", "ppo")]
    left_out = ("required", "anyOf")
    return [
        jsonschema.Draft202012Validator({k: v for k, v in one.items() if k not in left_out})
        for one in found
    ]


def test_examples_in_yaml_are_valid_parts_of_a_file():
    blocks = [
        (page.name, block)
        for page in PAGES
        for block in re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), re.M | re.S)
    ]
    assert len(blocks) >= 10
    known = schemas()
    for page, block in blocks:
        value = yaml.safe_load(block)
        fitting = [one for one in known if value.keys() <= one.schema["properties"].keys()]
        assert fitting, f"{page}: no file has all of {', '.join(value)}"
        fitting[0].validate(value)


def test_every_command_is_in_the_readme():
    readme = PAGES[0].read_text()
    assert not [
        name for name in typer_main.get_command(app).commands if f"`prefab {name}" not in readme
    ]


def commands(command: click.Command, name: str) -> list[str]:
    """The full names of a command's subcommands, or its own where it has none."""
    inner = getattr(command, "commands", {})
    return [c for word, sub in inner.items() for c in commands(sub, f"{name} {word}")] or [name]


def test_every_command_has_a_python_function():
    table = re.findall(r"^\| (`prefab .*) \| (.*) \|$", (DOCS / "python.md").read_text(), re.M)
    documented = [name for row, _ in table for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(documented) == sorted(commands(typer_main.get_command(app), "prefab"))
    functions = {name for _, row in table for name in re.findall(r"`(\w+)`", row)}
    assert functions == set(prefab.__all__)


@pytest.mark.parametrize("name", prefab.__all__)
def test_public_functions_describe_each_parameter(name):
    function = getattr(prefab, name)
    described = set(re.findall(r"^ {4}(\w+): ", inspect.getdoc(function) or "", re.M))
    assert not inspect.signature(function).parameters.keys() - described


@pytest.fixture(scope="module")
def reference():
    """docs/reference.py, and the pages that it writes."""
    module = runpy.run_path(str(DOCS / "reference.py"))
    return module, module["render"]()


@pytest.mark.parametrize(
    "name",
    ["reference.md", "commands.md", "configuration.md", "store-schema.md", "output.schema.json"],
)
def test_a_page_of_the_reference_is_up_to_date(name, reference):
    _, pages = reference
    assert (DOCS / name).read_text() == pages[name], "run `make reference`"
    assert not re.findall(r"^.*\| \?\.? \|$", pages[name], re.M), "without a meaning"


def test_each_meaning_of_a_column_is_that_of_a_column_that_exists(reference):
    rows = re.findall(r"^## (\w+)|^\| `(\w+)` \| [A-Z]", reference[1]["store-schema.md"], re.M)
    table, there = "", set()
    for heading, column in rows:
        table = heading or table
        there |= {column, f"{table}.{column}"}
    assert not yaml.safe_load((DOCS / "columns.yaml").read_text()).keys() - there


def test_each_meaning_of_a_field_is_that_of_a_field_without_a_description(reference):
    there = set()
    for sections in reference[0]["configurations"]().values():
        for config in sections.values():
            bare = [key for key, field in config.model_fields.items() if not field.description]
            there |= {*bare, *(f"{config.__name__}.{key}" for key in bare)}
    assert not yaml.safe_load((DOCS / "fields.yaml").read_text()).keys() - there


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    bare = re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", bare, re.M):
        words = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower())
        found.append(re.sub(r" +", "-", words.strip()))
    return set(found)


def test_links_lead_somewhere():
    """Each leads to a file, and to a heading of it; pages of the site lead only to one another."""
    lost = []
    for page in PAGES:
        bare = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", bare):
            target = page.parent / link if link else page
            inside = DOCS not in page.parents or DOCS in target.resolve().parents
            if not (target.exists() and inside):
                lost.append(f"{page.name}: {link}")
            elif anchor and anchor not in anchors(target.read_text()):
                lost.append(f"{page.name}: {link}#{anchor}")
    assert not lost


def nav_files(nav: list[object]) -> list[str]:
    """The files that a navigation names."""
    files = []
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            files += nav_files(value) if isinstance(value, list) else [value]
    return files


def test_the_navigation_of_the_site_has_each_page_once():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(nav_files(site["nav"])) == sorted(pages)


ZENSICAL = Path(sys.executable).with_name("zensical")


@pytest.mark.skipif(not ZENSICAL.exists(), reason="no Zensical: `make docs` installs it")
def test_the_site_builds_without_warnings_and_loads_nothing_from_elsewhere(tmp_path):
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [ZENSICAL, "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    pages = {page.name: page.read_text() for page in (tmp_path / "site").rglob("*.html")}
    assert len(pages) > len(list(DOCS.rglob("*.md")))  # and 404.html
    loads = r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\" >]+)"
    assert not {name: found for name, text in pages.items() if (found := re.findall(loads, text))}


def test_paths_of_the_repository_that_pages_name_exist():
    """In backticks: `benchmarks/results/leash.json`, `SECURITY.md`."""
    top = "benchmarks|constitutions|docs|examples|factory|judges|pipelines|prompts|tests|trainers"
    for page in PAGES:
        for path in re.findall(rf"`((?:{top})/[\w./-]*|[A-Z]+\.md)`", page.read_text()):
            assert "NAME" in path or (ROOT / path).exists(), f"{page.name}: {path}"


def test_no_figure_is_left_open():
    assert not [page.name for page in PAGES if "@@" in page.read_text()]


def test_the_table_of_layouts_names_each_in_the_order_in_which_they_are_tried():
    named = re.findall(r"^\| `([\w-]+)` \| .* \| .* \| .*\|$", (DOCS / "data.md").read_text(), re.M)
    assert [name for name in named if name != "hh-rlhf"] == list(
        dict.fromkeys(layout.name for layout in LAYOUTS)
    )


def test_the_readmes_command_for_a_hosted_api_runs_with_a_model_that_takes_other_fields(
    tmp_path, forks
):
    command = re.search(r"^\$ (prefab run .*model: gpt-.*)$", PAGES[0].read_text(), re.M)[1]
    with family_server(gpt5=True, refuses=("top_p",), vary=True) as server:
        done = subprocess.run(
            [
                "bash",
                "-ec",
                f"{forks.shell()}prefab init shop\ncd shop\n{command} --set engines.local.base_url={server.url}/v1 "
                "--set policy.samples=2\nprefab sql 'SELECT DISTINCT exactness FROM verdicts'",
            ],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            env={**os.environ, "OPENAI_API_KEY": "k", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        )
    assert done.returncode == 0 and "hard" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
