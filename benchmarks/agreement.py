"""Every coefficient of agreement with 2,000-resample intervals, and Dawid-Skene, over a million
items by five judges.

    python -m benchmarks.agreement        (10 seconds; with the peers 5 minutes and 2 GB)

Three categories, 10% of the ratings missing at random. Ours, in a process of its own, five times,
from the array of floats: grouping into patterns, `panel_coefficients` (17 coefficients with
analytic errors and the bootstrap over items), Dawid-Skene until no posterior moves by more than
1e-10. With `--peers PYTHON` (an environment with `krippendorff` and `crowd-kit`, or one of them)
the same table goes through those: alpha, a resample of it, Dawid-Skene. What the rest of the
machine did meanwhile stands beside each figure (`foreign_cores`)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common

OURS = """
import json, sys, time
import numpy as np
from prefab.judges.stats import agreement, aggregate
from prefab.judges.stats.rating_table import group
ratings = np.load(sys.argv[1])
agreement.panel_coefficients(ratings[:1000], resamples=10)
started = time.perf_counter()
table = group(ratings)
grouped = time.perf_counter()
plain = agreement.panel_coefficients(table, resamples=0)
values = time.perf_counter()
found = agreement.panel_coefficients(table, resamples=2000, seed=0)
drawn = time.perf_counter()
fit = aggregate.dawid_skene(table, tolerance=1e-10)
fitted = time.perf_counter()
posterior = aggregate.dawid_skene(ratings, tolerance=1e-10).posterior
each = time.perf_counter()
defined = {name: [e.value, e.se, e.low, e.high, e.boot_low, e.boot_high] for name, e in found.items() if e.value is not None}
print("RESULT " + json.dumps({
    "total_s": fitted - started, "group_s": grouped - started, "values_s": values - grouped, "bootstrap_s": drawn - values,
    "dawid_skene_s": fitted - drawn, "dawid_skene_with_a_posterior_an_item_s": each - fitted, "patterns": len(table.times),
    "iterations": fit.iterations, "converged": fit.converged, "estimates": defined,
    "undefined": {name: e.undefined for name, e in found.items() if e.undefined}}))
"""
PEERS = {
    "krippendorff": """
import json, sys, time
import krippendorff, numpy as np
data = np.ascontiguousarray(np.load(sys.argv[1]).T)
started = time.perf_counter()
value = krippendorff.alpha(reliability_data=data, level_of_measurement="nominal")
once, rng = time.perf_counter() - started, np.random.default_rng(0)
started = time.perf_counter()
for _ in range(10):
    krippendorff.alpha(reliability_data=data[:, rng.integers(0, data.shape[1], data.shape[1])], level_of_measurement="nominal")
print("RESULT " + json.dumps({"alpha": value, "once_s": once, "resample_s": (time.perf_counter() - started) / 10}))
""",
    "crowd-kit": """
import json, sys, time
import numpy as np, pandas as pd
from crowdkit.aggregation import DawidSkene
ratings = np.load(sys.argv[1])
items, judges = np.nonzero(~np.isnan(ratings))
frame = pd.DataFrame({"task": items, "worker": judges, "label": ratings[items, judges].astype(int)})
started = time.perf_counter()
fit = DawidSkene(n_iter=100, tol=1e-5).fit(frame)
print("RESULT " + json.dumps({"dawid_skene_s": time.perf_counter() - started, "iterations": len(fit.loss_history_)}))
""",
}


MODULES = {"krippendorff": "krippendorff", "crowd-kit": "crowdkit"}


def table(n: int, judges: int, seed: int = 0) -> np.ndarray:
    """Ratings 0, 1, 2 by judges who are right on 60% to 90%, 10% missing. Shapes: n x judges."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, size=(n, 1), p=[0.4, 0.2, 0.4])
    right = rng.random((n, judges)) < np.linspace(0.9, 0.6, judges)
    ratings = np.where(right, truth, rng.integers(0, 3, size=(n, judges))).astype(float)
    ratings[rng.random(ratings.shape) < 0.1] = np.nan
    return ratings


def ours(file: Path, rounds: int) -> list[dict[str, Any]]:
    """Each round in a process of its own, once the machine is quiet."""
    found = []
    for _ in range(rounds):
        quiet = common.wait_quiet(10)
        found.append(
            {
                **common.watched([sys.executable, "-c", OURS, str(file)], 120, common.HERE.parent),
                "quiet": quiet,
            }
        )
    return found


def peers(python: str, file: Path) -> dict[str, Any]:
    """Each peer that the environment has, once."""
    return {
        name: common.watched([python, "-c", code, str(file)], 900, common.HERE.parent)
        for name, code in PEERS.items()
        if not subprocess.run(
            [python, "-c", f"import {MODULES[name]}"], capture_output=True
        ).returncode
    }


def main() -> None:
    """Measure, print a table, write agreement.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peers", metavar="PYTHON", help="an environment with krippendorff and crowd-kit"
    )
    parser.add_argument(
        "--quick", action="store_true", help="20,000 items, once: does it run? Figures mean nothing"
    )
    options = parser.parse_args()
    n, rounds = (20_000, 1) if options.quick else (options.items, options.rounds)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ratings.npy"
        np.save(file, table(n, 5))
        found = ours(file, rounds)
        others = peers(options.peers, file) if options.peers else {}
    errors = [run["error"] for run in [*found, *others.values()] if "error" in run]
    names = ("total_s", "group_s", "values_s", "bootstrap_s", "dawid_skene_s", "peak_rss_mb")
    middle = {name: common.median(run.get(name) for run in found) for name in names}
    common.table(
        ["", "s"], [[name, value if value is not None else "-"] for name, value in middle.items()]
    )
    for name, run in others.items():
        print(
            name,
            json.dumps(
                {k: v for k, v in run.items() if k.endswith(("_s", "rss_mb")) or k == "iterations"}
            ),
        )
    print(*errors, sep="\n")
    common.write(
        "agreement",
        options.quick,
        minutes=(time.monotonic() - started) / 60,
        items=n,
        judges=5,
        median=middle,
        runs=[
            {k: v for k, v in run.items() if k not in ("estimates", "undefined")} for run in found
        ],
        estimates=found[0].get("estimates"),
        undefined=found[0].get("undefined"),
        peers=others,
        errors=errors,
    )


if __name__ == "__main__":
    try:
        main()
    except subprocess.SubprocessError as error:
        sys.exit(str(error))
