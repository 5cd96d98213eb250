"""Do PPO, RLOO and GRPO end where theory says? Worlds of a few answers, several betas and starts,
each method's own optimum.

`python -m benchmarks.exact_optimum` runs what benchmarks/results/exact_optimum.json does not have
yet; every run is a real one: a Llama of a few thousand weights through the trainers that `prefab
train` uses, at their default settings but for sizes and learning rates."""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from tests.support.exact_optimum import BATCH, GOAL, GROUP, LEARNING_RATE, METHODS, STEPS, run_one

RESULT = Path(__file__).parent / "results" / "exact_optimum.json"
BETAS, STARTS, LENGTHS = (0.5, 1.0, 2.0), (1, 2, 3), (1, 2)
# A run that has not arrived is made again with so many times the steps at that part of the learning
# rate, and its row tells where the first one ended (`first`). A policy this small can come to read
# two states alike, and then leaves slowly.
PATIENCE = 3


def main() -> None:
    """Run the grid, saving after every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=METHODS, help="one method")
    only = parser.parse_args().only
    settings = {"goal": GOAL, "batch": BATCH, "group": GROUP, "learning_rate": LEARNING_RATE}
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    rows = [
        r for r in found.get("rows", ()) if all(found.get(k) == v for k, v in settings.items())
    ]  # otherwise: made anew
    have = {(r["method"], r["length"], r["beta"], r["start"]): r for r in rows}
    with tempfile.TemporaryDirectory() as folder:
        for start, beta, length, method in product(
            STARTS, BETAS, LENGTHS, [only] if only else METHODS
        ):
            for patience in (1, PATIENCE):
                row = have.get((method, length, beta, start))
                if row and (
                    row["tv_end"] <= GOAL or row["steps"] >= patience * STEPS[method][length]
                ):
                    continue
                made = run_one(
                    Path(folder),
                    method,
                    length,
                    beta,
                    start,
                    patience * STEPS[method][length],
                    LEARNING_RATE / patience,
                )
                if row:
                    rows.remove(row)
                    made["first"] = {k: row[k] for k in ("steps", "learning_rate", "tv_end")}
                rows.append(made)
                have[method, length, beta, start] = made
                print({k: v for k, v in made.items() if k != "tv_to_other_optima"}, flush=True)
                RESULT.write_text(
                    json.dumps(
                        {
                            "command": "python -m benchmarks.exact_optimum",
                            **settings,
                            "patience": PATIENCE,
                            "summary": summary(rows),
                            "rows": rows,
                        },
                        indent=1,
                    )
                    + "\n"
                )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By method and length: runs, the largest total variation at their ends, and how many are
    within the goal."""
    found: dict[str, Any] = {}
    for method, length in product(METHODS, LENGTHS):
        ends = [r["tv_end"] for r in rows if r["method"] == method and r["length"] == length]
        if ends:
            found[f"{method}, {length} token{'s' * (length > 1)}"] = {
                "runs": len(ends),
                "largest": max(ends),
                "within": sum(e <= GOAL for e in ends),
            }
    return found


if __name__ == "__main__":
    main()
