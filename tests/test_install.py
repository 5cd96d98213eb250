"""The wheel, installed into an empty folder: one import name with its data files, which works in a
project that has folders of the same names as Prefab's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import project

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("constitutions", "factory", "judges", "pipelines", "prompts", "trainers")
FILES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "--no-cache-dir")


def call(*words: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed."""
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1", **environment},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that a wheel of this source was installed into."""
    root = tmp_path_factory.mktemp("install")
    source = root / "source"
    for name in ("prefab", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=LEFT_OUT)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    build = (*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root)
    call(*build, source, cwd=root, PYTHONPATH="")
    (wheel,) = root.glob("*.whl")
    install = (*PIP, "install", "--no-compile", "--no-deps", "--target", root / "site")
    call(*install, wheel, cwd=root, PYTHONPATH="")
    return root / "site"


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert (ROOT / "CHANGELOG.md").read_text().split("## ")[1].split("\n")[0] == version


def test_each_environment_variable_is_documented():
    names = set()
    for folder in ("factory", "judges", "pipelines", "trainers"):
        for path in (ROOT / folder).rglob("*.py"):
            names |= set(re.findall(r'"(PREFAB_[A-Z_]+)"', path.read_text()))
    internal = {"PREFAB_KILL_AT", "PREFAB_SERVER_KEY", "PREFAB_SERVER_USED"}
    documented = set(
        re.findall(r"^\| `(PREFAB_[A-Z_]+)`", (ROOT / "docs/runs.md").read_text(), re.M)
    )
    assert names - internal == documented


@pytest.mark.slow
def test_the_image_runs_the_check(tmp_path):
    if (
        not shutil.which("docker")
        or subprocess.run(["docker", "info"], capture_output=True).returncode
    ):
        pytest.skip("no Docker engine")
    call("docker", "build", "-t", "prefab-test", ROOT, cwd=tmp_path)
    call("docker", "run", "--rm", "prefab-test", "check", "/src/constitutions", cwd=tmp_path)


def test_it_adds_one_name_with_every_file(installed):
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"prefab", "bin"} and os.listdir(installed / "bin") == ["prefab"]
    there = {
        path.relative_to(installed / "prefab").as_posix()
        for path in (installed / "prefab").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there == wanted | {"__init__.py", "py.typed"}
    assert "pipelines/pipeline.schema.json" in there and "factory/store/schema.sql" in there


@pytest.fixture
def own_project(tmp_path) -> Path:
    """A user's project with packages of its own called like Prefab's folders, and a pipeline."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'the user'\n")
    project.write(tmp_path, project.pipeline(tmp_path, prompts=2))
    return tmp_path


SCRIPT = """
import factory, judges, pipelines, trainers
from prefab import run

assert {m.OWNER for m in (factory, judges, pipelines, trainers)} == {"the user"}
print(run.__code__.co_filename, run("pipeline.yaml").preferences.height)
"""


@pytest.mark.slow
def test_python_and_the_command_in_a_project_with_folders_of_the_same_names(installed, own_project):
    (own_project / "script.py").write_text(SCRIPT)
    words = call(sys.executable, "script.py", cwd=own_project, PYTHONPATH=str(installed)).split()
    assert words[0].startswith(str(installed)) and words[1] == "6"  # 3 pairs of each prompt
    again = call(
        installed / "bin/prefab",
        "run",
        "pipeline.yaml",
        "--json",
        cwd=own_project,
        PYTHONPATH=str(installed),
    )
    assert '"asked": 0' in again  # the script's answers are found


@pytest.mark.slow
def test_the_bundled_files_pass_the_check(installed, tmp_path):
    bundled = [
        *sorted((installed / "prefab/pipelines/presets").glob("*.yaml")),
        *sorted((installed / "prefab/constitutions").glob("*.yaml")),
    ]
    assert len(bundled) > 3
    prefab = installed / "bin/prefab"
    told = call(prefab, "check", *bundled, cwd=tmp_path, PYTHONPATH=str(installed))
    assert told
    call(prefab, "init", "mine", cwd=tmp_path, PYTHONPATH=str(installed))
    call(prefab, "check", "pipeline.yaml", cwd=tmp_path / "mine", PYTHONPATH=str(installed))


@pytest.mark.parametrize("driver,passes", [("570.86.15", False), ("580.65.06", True), ("", True)])
def test_set_up_refuses_a_driver_that_is_too_old_before_it_installs(tmp_path, driver, passes):
    for name in ("setup.sh", "pyproject.toml", "requirements-gpu.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    # the next check, whether Python can make environments, stops a set-up that comes so far
    scripts = {
        "nvidia-smi": f"echo {driver}",
        "python3": 'case "$2" in *ensurepip*) exit 1;; *sys.version_info*) exit 0;; *) echo 3.12.1;; esac',
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["sh", "setup.sh", "venv"],
        cwd=tmp_path,
        env={"PATH": f"{tools}:/usr/bin:/bin"},
        text=True,
        capture_output=True,
    )
    told = "needs NVIDIA driver 580 or newer (CUDA 13), and there is 570.86.15"
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    assert ("has no venv module" if passes else told) in done.stderr
