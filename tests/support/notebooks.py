"""Run the cells of a notebook in order, as Jupyter would, without Jupyter.

`python -m tests.support.notebooks NOTEBOOK.ipynb` runs it in the current folder; with `--write` the
outputs are stored in the file.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(cells: list[str]) -> list[str]:
    """What each cell prints, and the value of its last expression."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for source in cells:
        tree = ast.parse(source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(tree, "<cell>", "exec"), scope)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), scope)
                if value is not None:
                    print(repr(value))
        outputs.append(out.getvalue())
    return outputs


def main(path: Path, write: bool) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(
        zip(cells, run(["".join(cell["source"]) for cell in cells]), strict=True), 1
    ):
        lines = text.splitlines(keepends=True)
        stream = {"name": "stdout", "output_type": "stream", "text": lines}
        cell.update(execution_count=number, outputs=[stream] if lines else [])
    if write:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--write" in sys.argv)
