"""The notebooks of examples/: they parse, name what exists, and run from top to bottom."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefab

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_calls_functions_that_exist_and_has_small_outputs(notebook):
    called = set()
    for number, cell in enumerate(code(notebook), 1):
        assert cell["execution_count"] == number
        assert len(json.dumps(cell["outputs"])) < 3000
        assert not [out for out in cell["outputs"] if out["output_type"] == "error"]
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "prefab":
                called.add(node.attr)
    assert {"run", "query"} <= called <= set(prefab.__all__)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.notebooks", notebook],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        text=True,
        capture_output=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
