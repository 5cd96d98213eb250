"""Every command in the README and in docs/ runs; the README names every command; links lead to
files.

A block fenced ```sh is run, line by line in one shell, in an empty folder (CONTRIBUTING.md: at the
top of the repository); what needs a model or a GPU is ```console."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prefab.pipelines.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)
WITH_COMMANDS = [page for page in PAGES if BLOCK.search(page.read_text())]
# Pages without commands, and pages whose commands all need a model or a GPU.
NOT_RUN = {"design", "log", "microworld", "panels", "ppo", "training"}


def test_every_page_has_commands_that_run_or_is_listed():
    assert {page.stem for page in PAGES} - {page.stem for page in WITH_COMMANDS} == NOT_RUN


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.stem)
def test_commands_run(page, tmp_path):
    blocks = BLOCK.findall(page.read_text())
    prefab = f'prefab() {{ {shlex.quote(sys.executable)} -m prefab.pipelines.cli.main "$@"; }}\n'
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "set -ex\n" + prefab + "\n".join(blocks)],
        cwd=ROOT if page.name == "CONTRIBUTING.md" else tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_every_command_is_in_the_readme():
    from typer.main import get_command

    readme = PAGES[0].read_text()
    assert not [name for name in get_command(app).commands if f"`prefab {name}" not in readme]


def test_links_lead_somewhere():
    lost = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / link).exists():
                lost.append(f"{page.name}: {link}")
    assert not lost


def test_no_figure_is_left_open():
    assert not [page.name for page in PAGES if "@@" in page.read_text()]
