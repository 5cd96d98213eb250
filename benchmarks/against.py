"""This version's CPU seconds against those of another checkout of Prefab, in turns.

    git worktree add --detach /tmp/base COMMIT
    python -m benchmarks.against /tmp/base        (about 4 minutes)

Both versions run `peers/prefab_run.py` against one mock server, each on stores of its own: a rerun
over calls that are all answered (a small one, which is what every run costs, and a large one), and
a run that asks. They take turns round after round, and the first of a round changes, so that what
else the machine does meets both alike. Seconds are of user and system, of the process and its
children; the ratio of each round is this version's seconds divided by the other's.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

LIMIT_S = 7_200  # of one run; only CPU seconds are compared
CASES = ("rerun, fixed cost", "rerun", "clients")


class Side:
    """One checkout, with the stores that it made."""

    def __init__(self, root: Path, name: str, folder: Path, url: str) -> None:
        self.name, self.folder, self.url = name, folder / name, url
        self.script = root / "benchmarks" / "peers" / "prefab_run.py"

    def run(self, store: str, judgments: int) -> dict[str, Any]:
        """One run in a process of its own. Raises: SystemExit where it failed."""
        folder = self.folder / store
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(self.script), "--base-url", self.url + "/v1"]
        command += ["-n", str(judgments), "--variant", "batch", "--store", str(folder)]
        run = common.watched(command, LIMIT_S, cwd=folder)
        if run["rc"] or run.get("ok") != run.get("n"):
            raise SystemExit(f"{self.name}: {run.get('error', run)}")
        return run

    def measure(self, case: str, options: argparse.Namespace) -> float:
        """CPU seconds of one case.

        Raises: SystemExit where a rerun asked something, or a new run did not.
        """
        common.get(self.url + "/reset", b"")
        if case == "clients":
            shutil.rmtree(self.folder / "new", ignore_errors=True)
            run = self.run("new", options.judgments)
        else:
            small = case != "rerun"
            run = self.run("small" if small else "large", 56 if small else options.answered)
        asked = common.get(self.url + "/stats")["calls"]
        if (asked > 0) != (case == "clients"):
            raise SystemExit(f"{self.name}, {case}: {asked} calls were asked")
        return float(run["cpu_s"])


def summary(case: str, base: list[float], now: list[float]) -> dict[str, Any]:
    """Medians of both, and the ratio of the rounds: median, smallest, largest."""
    ratios = sorted(b / a for a, b in zip(base, now, strict=True))
    return {
        "case": case,
        "base_s": statistics.median(base),
        "now_s": statistics.median(now),
        "ratio": statistics.median(ratios),
        "smallest": ratios[0],
        "largest": ratios[-1],
        "ratio_of_least": min(now) / min(base),
    }


def main() -> None:
    """Measure, print a table, write against.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="the folder of the other checkout")
    parser.add_argument("--answered", type=int, default=56_000, help="judgments of the rerun")
    parser.add_argument(
        "--judgments", type=int, default=11_200, help="judgments of a run that asks"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--port", type=int, default=8397)
    parser.add_argument("--quick", action="store_true", help="does it run? Figures mean nothing")
    options = parser.parse_args()
    if options.quick:
        options.answered, options.judgments, options.rounds = 560, 560, 1
    seconds: dict[str, dict[str, list[float]]] = {case: {} for case in options.cases}
    with (
        tempfile.TemporaryDirectory() as name,
        common.mock(sys.executable, options.port, 0) as url,
    ):
        roots = {"base": options.base.resolve(), "now": common.HERE.parent}
        sides = [Side(root, side, Path(name), url) for side, root in roots.items()]
        for side in sides:
            side.run("small", 56)
            if "rerun" in options.cases:
                side.run("large", options.answered)
        for _ in range(options.rounds):
            sides.reverse()
            for case in options.cases:
                for side in sides:
                    cpu_s = side.measure(case, options)
                    seconds[case].setdefault(side.name, []).append(cpu_s)
                    print(f"{case}: {side.name} {cpu_s:.2f} s", file=sys.stderr, flush=True)
    found = [summary(case, by["base"], by["now"]) for case, by in seconds.items()]
    columns = list(found[0])
    common.table(columns, [[row[column] for column in columns] for row in found])
    common.write("against", options.quick, table=found, seconds=seconds)


if __name__ == "__main__":
    main()
