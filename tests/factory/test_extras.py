"""A missing package is told in the words of how Prefab was installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

import pytest

from prefab.factory.extras import EXTRA_OF, NOT_SET_UP, install_command

ROOT = Path(__file__).resolve().parents[2]
WHEEL = "https://wheels.example/prefab_rlaif-0.2.0-py3-none-any.whl"


class Installed(Distribution):
    def __init__(self, direct: dict[str, Any], installer: str = "pip") -> None:
        self.files_by_name = {"direct_url.json": json.dumps(direct), "INSTALLER": installer}

    def read_text(self, filename: str) -> str | None:
        return self.files_by_name.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


CLONE = {"url": "file:" + "//" + "/src/prefab", "dir_info": {"editable": True}}
GIT = {"url": "https://git.example/prefab", "vcs_info": {"vcs": "git", "commit_id": "0"}}


@pytest.mark.parametrize(
    ("direct", "installer", "prefix", "command"),
    [
        (CLONE, "pip", "/src/prefab/.venv", "`make setup` in /src/prefab"),
        (CLONE, "pip", "/people/me/env", "`pip install -e '/src/prefab[train]'`"),
        ({"url": WHEEL}, "pip", "/env", f"`pip install 'prefab-rlaif[train] @ {WHEEL}'`"),
        ({"url": WHEEL}, "uv", "/env", f"`uv pip install 'prefab-rlaif[train] @ {WHEEL}'`"),
        ({}, "pip", "/env", "`pip install 'prefab-rlaif[train]'`"),
        (
            GIT,
            "pip",
            "/people/me/.local/share/pipx/venvs/prefab-rlaif",
            "`pipx install --force 'prefab-rlaif[train] @ git+https://git.example/prefab'`",
        ),
        (
            {"url": WHEEL},
            "uv",
            "/people/me/.local/share/pipx/.cache/1210d379a6fde62",
            f"`pipx run --spec 'prefab-rlaif[train] @ {WHEEL}' prefab`",
        ),
        (
            {},
            "uv",
            "/people/me/.local/share/uv/tools/prefab-rlaif",
            "`uv tool install --force 'prefab-rlaif[train]'`",
        ),
        (
            {"url": WHEEL},
            "uv",
            "/scratch/cache/archive-v0/x1",  # UV_CACHE_DIR
            f"`uvx --from 'prefab-rlaif[train] @ {WHEEL}' prefab`",
        ),
    ],
)
def test_the_command_fits_the_installation(
    direct: dict[str, Any], installer: str, prefix: str, command: str
) -> None:
    assert install_command("train", Installed(direct, installer), prefix) == command


def test_set_up_is_advised_only_for_what_it_installs() -> None:
    listed = (ROOT / "requirements.txt").read_text().lower().splitlines()
    brought = {
        extra: any(line.startswith(module.replace("_", "-")) for line in listed)
        for module, extra in EXTRA_OF.items()
    }
    assert {extra for extra, there in brought.items() if not there} == set(NOT_SET_UP)
    for extra in NOT_SET_UP:
        command = install_command(extra, Installed(CLONE, "pip"), "/src/prefab/.venv")
        assert command == f"`/src/prefab/.venv/bin/python -m pip install -e '/src/prefab[{extra}]'`"


def test_each_extra_brings_the_packages_that_are_said_to_be_in_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    extras["hub"].append("fsspec")  # huggingface_hub brings it
    extras["train"].append("tokenizers")  # transformers brings it
    for module, extra in EXTRA_OF.items():
        assert any(wanted.startswith(module) for wanted in extras[extra]), module


FILES = "data.sources=[{files: pairs.jsonl}]"
# What stands for an environment without the extras: importing any of their packages fails.
WITHOUT = """
import sys
from prefab.factory.extras import EXTRA_OF
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRA_OF:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from prefab.pipelines.cli import main
for words in COMMANDS:
    sys.argv = ["prefab", *words]
    try:
        main.main()
    except SystemExit as end:
        print(words, end.code, file=sys.stderr)
"""


def test_each_command_that_needs_an_extra_says_which(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/ledger.sqlite").touch()
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "So.", "completion": "Because."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    commands = [
        ["audit", "data"],
        ["view", "store"],
        ["train", "dpo", "dpo", "--set", FILES, "--set", "out=dpo"],
        ["train", "sft", "sft", "--set", FILES, "--set", "out=sft"],
        ["eval", "policy", "--set", "policies={base: prefab-tiny}"],
        ["sweep", "sweep"],
        ["serve", "prefab-tiny"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.replace("COMMANDS", repr(commands))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for words in commands:
        before, found, _ = done.stderr.partition(f"{words} 2")
        line = before.splitlines()[-1]
        assert found and " needs " in line and install_command("X").split("X")[0] in line, line
