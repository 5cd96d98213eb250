"""A kind of judge that another package brings, and that no code outside the judges knows kinds."""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from prefab.judges.registry import JUDGES
from tests.support.syntax import parse

ROOT = Path(__file__).resolve().parents[2]


def test_another_packages_judge_runs_is_audited_evaluated_and_rewards(tmp_path):
    info = tmp_path / "installed" / "toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[prefab.judges]\ntoy = tests.support.toy_judge:ToyJudge\n"
    )
    (tmp_path / "project").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.toy_judge_driver", str(tmp_path / "project")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(info.parent), str(ROOT)])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    good, bad = found.pop("rewards")
    assert good > 0.8 and bad < -0.6
    assert found.pop("audited") > 0 and found.pop("audit asked") > 0
    assert found.pop("in the schema") == [True, False]
    # 4 prompts of 3 answers under 2 principles: a score each, and 3 pairs a prompt
    assert found == {"state": "done", "scores": 24, "preferences": 12, "right": 1.0}


@cache
def class_names() -> set[str]:
    """The names of all judges' classes and of their configurations."""
    classes = {name for judge in JUDGES.values() for name in (judge, judge.Config)}
    return {cls.__name__ for cls in classes}


def named_kinds(source: str) -> list[int]:
    """Lines that compare something's `kind` with a kind of judge, or ask for a judge's class."""
    lines = []
    for node in ast.walk(parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            about = any(isinstance(s, ast.Attribute) and s.attr == "kind" for s in sides)
            named = {c.value for s in sides for c in ast.walk(s) if isinstance(c, ast.Constant)}
            if about and named & set(JUDGES.builtin):
                lines.append(node.lineno)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            names = {ast.unparse(n).split(".")[-1] for n in ast.walk(node.args[1])}
            if names & class_names():
                lines.append(node.lineno)
    return lines


def test_kinds_of_judges_are_told_apart_in_judges_alone():
    assert named_kinds('if judge.kind == "human": pass') == [1]
    assert named_kinds("isinstance(judge, pairwise.PairwiseConfig)") == [1]
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("factory", "pipelines")  # a trainer's kinds are those of rewards
        for path in (ROOT / folder).rglob("*.py")
        for line in named_kinds(path.read_text())
    }
    assert not found
