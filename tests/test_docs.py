"""Every command and every Python example in the README and in docs/ runs; every command is
documented; links lead to files.

A block fenced ```sh or ```python is run, in the order of the page, in an empty folder
(CONTRIBUTING.md: at the top of the repository). Python blocks with no ```sh block between them
share one process. What needs a server or a GPU is fenced ```console, or ```py."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
from itertools import groupby
from pathlib import Path

import click
import pytest
from typer.main import get_command

import prefab
from prefab.factory.spec.layouts import LAYOUTS
from prefab.pipelines.cli.main import app
from tests.support.family_server import family_server

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.M | re.S)
WITH_COMMANDS = [page for page in PAGES if BLOCK.search(page.read_text())]
# Pages without commands, and pages whose commands all need a model or a GPU.
NOT_RUN = {
    *("design", "exports", "log", "microworld", "models", "panels", "ppo", "reference", "training"),
    "reliability",
    "verifiers",
    "view",
}


def test_every_page_has_commands_that_run_or_is_listed():
    assert {page.stem for page in PAGES} - {page.stem for page in WITH_COMMANDS} == NOT_RUN


def script(page: str) -> str:
    """A page's blocks as one shell script."""
    parts = []
    for language, blocks in groupby(BLOCK.findall(page), key=lambda block: block[0]):
        code = "\n".join(block for _, block in blocks)
        if language == "python":
            code = f"python - <<'END_OF_PYTHON'\n{code}\nEND_OF_PYTHON"
        parts.append(code)
    return "\n".join(parts)


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, forks):
    done = subprocess.run(
        ["bash", "-c", "set -ex\n" + forks.shell() + script(page.read_text())],
        cwd=ROOT if page.name == "CONTRIBUTING.md" else tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_command_is_in_the_readme():
    readme = PAGES[0].read_text()
    assert not [name for name in get_command(app).commands if f"`prefab {name}" not in readme]


def commands(command: click.Command, name: str) -> list[str]:
    """The full names of a command's subcommands, or its own where it has none."""
    inner = getattr(command, "commands", {})
    return [c for word, sub in inner.items() for c in commands(sub, f"{name} {word}")] or [name]


def test_every_command_has_a_python_function():
    table = re.findall(r"^\| (`prefab .*) \| (.*) \|$", (DOCS / "python.md").read_text(), re.M)
    documented = [name for row, _ in table for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(documented) == sorted(commands(get_command(app), "prefab"))
    functions = {name for _, row in table for name in re.findall(r"`(\w+)`", row)}
    assert functions == set(prefab.__all__)


@pytest.mark.parametrize("name", prefab.__all__)
def test_public_functions_describe_each_parameter(name):
    function = getattr(prefab, name)
    described = set(re.findall(r"^ {4}(\w+): ", inspect.getdoc(function) or "", re.M))
    assert not inspect.signature(function).parameters.keys() - described


def test_the_reference_is_up_to_date():
    render = runpy.run_path(str(DOCS / "reference.py"))["render"]
    assert (DOCS / "reference.md").read_text() == render(), "run `make reference`"


def test_links_lead_somewhere():
    lost = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / link).exists():
                lost.append(f"{page.name}: {link}")
    assert not lost


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
