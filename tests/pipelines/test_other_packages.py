"""An engine, a recipe and an export format that another installed package brings, each used by the
command line and from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from tests.support import project

ROOT = Path(__file__).resolve().parents[2]
COMMAND = ("-m", "prefab.pipelines.cli.main")
ENTRY_POINTS = """
[prefab.engines]
numbered = otherpackage.engine:NumberedEngine

[prefab.recipes]
ends = otherpackage.recipe:ends

[prefab.exports]
winners = otherpackage.export:WINNERS
"""
ENGINE = '''
import re
from math import log
from typing import Literal

from pydantic import BaseModel, ConfigDict
from prefab.factory.types import Completion, Engine


class NumberedConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")
    engine: Literal["numbered"] = "numbered"
    sure: float = 0.9


class NumberedEngine(Engine):
    """Numbers its drafts, and prefers the lower number."""

    Config = NumberedConfig
    identity, max_in_flight = "name:numbered", 4

    def __init__(self, config, name):
        self.sure = config.sure

    async def complete(self, key, request):
        if not request.labels:
            return Completion(f"draft {request.repeat[0]}", "stop", None, "exact", 3, 2)
        first, second = re.findall(r"draft (\\d)", request.messages[-1].content)[-2:]
        rest = (0.99 - self.sure) / (len(request.labels) - 1)
        best = "A" if first < second else "B"
        masses = {label: self.sure if label == best else rest for label in request.labels}
        logps = {label: log(mass) for label, mass in masses.items()}
        return Completion(best, "length", logps, "exact", 9, 1)
'''
RECIPE = '''
from prefab.pipelines.run import cai, rlaif


async def ends(prompt, ctx):
    """Compare the first draft with the last one."""
    drafts = await cai.sample(prompt, ctx)
    await rlaif.compare(prompt, [drafts[0], drafts[-1]], ctx)
'''
EXPORT = '''
class Winners:
    """One dataset: the chosen answer of each decided pair, with its split."""

    by_split = False

    def datasets(self, source):
        sql = "SELECT prompt, chosen, p_chosen FROM preferences WHERE run = ? AND chosen IS NOT NULL"
        return {"winners": source.query(sql, [source.record["run"]])}


WINNERS = Winners()
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """The environment of a process in which the other package is installed."""
    site = tmp_path_factory.mktemp("site")
    package, info = site / "otherpackage", site / "otherpackage-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: otherpackage\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    (package / "__init__.py").touch()
    for name, text in (("engine", ENGINE), ("recipe", RECIPE), ("export", EXPORT)):
        (package / f"{name}.py").write_text(text)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "NO_COLOR": "1"}


def pipeline_file(folder: Path, **changes) -> Path:
    value = project.pipeline(
        folder,
        prompts=3,
        recipe="ends",
        engines={"local": {"engine": "numbered", "sure": 0.8}},
        policy={"engine": "local", "samples": 4, "temperature": 1.0, "max_tokens": 8},
        export={"format": "winners"},
    )
    return project.write(folder, {**value, **changes})


def python(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=environment, text=True, capture_output=True, timeout=120
    )


def prefab(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return python(environment, *COMMAND, *map(str, words))


@pytest.mark.slow
def test_by_the_command_line(installed, tmp_path):
    file, out = pipeline_file(tmp_path), tmp_path / "out"
    done = prefab(installed, "check", file)
    assert done.returncode == 0, done.stdout + done.stderr
    done = prefab(installed, "run", file, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["state"] == "done", done.stderr
    done = prefab(installed, "export", file, out)
    assert done.returncode == 0, done.stderr
    rows = pl.read_parquet(out / "winners" / "*.parquet").sort("prompt")
    # one pair a prompt, of the first draft and the last; the first one is preferred
    assert rows["prompt"].to_list() == ["p0", "p1", "p2"] and rows["chosen"].to_list() == [0] * 3
    assert (rows["p_chosen"] > 0.75).all()


FROM_PYTHON = """
import sys
import prefab

file, out = sys.argv[1:]
result = prefab.run(file)
report = prefab.export(result.store, out, format="winners")
print(result.state, report.rows())
"""


def test_from_python(installed, tmp_path):
    file = pipeline_file(tmp_path)
    done = python(installed, "-c", FROM_PYTHON, str(file), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("done [('winners', ") and "3)]" in done.stdout


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engines": {"local": {"engine": "numbred"}}}, "numbered"),
        ({"engines": {"local": {"engine": "numbered", "sur": 0.8}}}, "sure"),
        ({"recipe": "end"}, "ends"),
        ({"export": {"format": "winner"}}, "winners"),
    ],
)
def test_mistakes_name_what_the_other_package_has(installed, forks, tmp_path, changes, told):
    words = [*COMMAND, "check", pipeline_file(tmp_path, **changes)]
    done = forks.run(words, env=installed)
    assert done.returncode == 2 and f'did you mean "{told}"' in done.stdout + done.stderr


def test_without_the_package_its_names_are_mistakes(forks, tmp_path):
    alone = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = forks.run([*COMMAND, "check", pipeline_file(tmp_path)], env=alone)
    for name in ("numbered", "ends", "winners"):
        assert name in done.stdout + done.stderr
    assert done.returncode == 2
