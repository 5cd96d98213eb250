"""Prefab against its peers on the same mock server: judgments a second as the server saw them, CPU
and memory.

    python -m benchmarks.clients        (about 12 minutes; `make peers-venvs` makes the peers'
    environments before)

Every client judges pairs of about 2.8 kB with 64 in flight, in turn, round after round, so that
what else the machine does meets all of them. `prefab` renders templates, digests, asks, commits to
the ledger with fsync, and fills DuckDB; the raw loops keep nothing. CPU a judgment is the slope
between two sizes, so that start-up counts for nobody."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

PREFAB = "prefab run"
CLIENTS = [  # label, environment ("" is this one), script, variant, judgments at 0 ms and at 50 ms
    (PREFAB, "", "prefab_run", "", 20000, 10000),
    ("prefab run, batch endpoint", "", "prefab_run", "batch", 20000, 10000),
    ("aiohttp", "core", "raw_aiohttp", "", 20000, 10000),
    ("aiohttp, uvloop, orjson", "core", "raw_aiohttp", "uvloop", 20000, 10000),
    ("aiohttp, batch endpoint", "core", "raw_aiohttp", "batch", 40000, 10000),
    ("bare protocol", "core", "raw_proto", "", 40000, 10000),
    ("distilabel 1.5.3", "distilabel", "distilabel_judge", "", 2000, 2000),
    ("distilabel 1.5.3, batches of 256", "distilabel", "distilabel_judge", "256", 2000, 2000),
]


def once(client: tuple, n: int, url: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run of one client: what it says, what the server saw, what it cost."""
    _, environment, script, variant, *_ = client
    python = f"{options.venvs}/{environment}/bin/python" if environment else sys.executable
    command = [
        python,
        str(common.PEERS / f"{script}.py"),
        "--base-url",
        url + "/v1",
        "-n",
        str(n),
        "-c",
        str(options.in_flight),
        "--variant",
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = [] if environment else ["--store", folder]
        if (
            store
        ):  # the peers are given their answers: Prefab's drafts are asked before it is measured
            common.watched([*command, "drafts", *store], timeout_s=240, cwd=Path(folder))
        if not options.quick:
            common.wait_quiet()
        common.get(url + "/reset", b"")
        run = common.watched([*command, variant, *store], timeout_s=240, cwd=Path(folder))
        return {**run, "server": common.get(url + "/stats")}


def good(run: dict[str, Any]) -> bool:
    """Whether a run did what it was asked: every judgment made and readable."""
    return run["rc"] == 0 and run.get("ok", 0) == run.get("n", -1) > 0


def summary(label: str, latency_ms: float, runs: list[dict], small: list[dict]) -> dict[str, Any]:
    """Medians over the good runs."""
    runs_ok, small_ok = [r for r in runs if good(r)], [r for r in small if good(r)]
    speeds = sorted(r["server"]["judgments"] / r["server"]["window_s"] for r in runs_ok)
    out = {
        "client": label,
        "latency_ms": latency_ms,
        "good_runs": len(runs_ok),
        "of": len(runs),
        "per_s": common.median(speeds),
        "per_s_range": [speeds[0], speeds[-1]] if speeds else None,
        "per_s_whole_work": common.median(r["n"] / r["work_s"] for r in runs_ok),
        "peak_rss_mb": common.median(r["peak_rss_mb"] for r in runs_ok),
        "peak_pss_mb": common.median(r["peak_pss_mb"] for r in runs_ok),
        "foreign_cores": max((r["foreign_cores"] for r in runs_ok), default=None),
        "error": next((r["error"] for r in runs if "error" in r), None),
    }
    if runs_ok:
        out["cpu_ms_whole"] = 1e3 * common.median(r["cpu_s"] / r["n"] for r in runs_ok)
    if runs_ok and small_ok:
        n, cpu = runs_ok[0]["n"], common.median(r["cpu_s"] for r in runs_ok)
        out["cpu_ms"] = 1e3 * (cpu - small_ok[0]["cpu_s"]) / (n - small_ok[0]["n"])
    return out


def targets(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """What was aimed for and what came: name, goal, measured, met."""
    by = {(r["client"], r["latency_ms"]): r for r in rows}

    def ratio(name: str, latency: float, field: str = "per_s", ours: str = PREFAB) -> float | None:
        a, b = by.get((ours, latency), {}).get(field), by.get((name, latency), {}).get(field)
        return a / b if a and b else None

    batched = "prefab run, batch endpoint"
    goals = [
        ("0 ms, of plain aiohttp", ">=", 0.5, ratio("aiohttp", 0)),
        (
            "0 ms with the batch endpoint, of plain aiohttp",
            ">=",
            1.0,
            ratio("aiohttp", 0, ours=batched),
        ),
        ("0 ms, times distilabel", ">=", 15, ratio("distilabel 1.5.3", 0)),
        ("50 ms, of plain aiohttp", ">=", 0.95, ratio("aiohttp", 50)),
        ("CPU a judgment, of distilabel", "<=", 1 / 12, ratio("distilabel 1.5.3", 0, "cpu_ms")),
        ("peak memory, of distilabel", "<=", 0.5, ratio("distilabel 1.5.3", 0, "peak_rss_mb")),
    ]
    return [
        [
            name,
            f"{sign} {goal:.3g}",
            value,
            value is not None and (value - goal) * (1 if sign == ">=" else -1) >= 0,
        ]
        for name, sign, goal, value in goals
    ]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venvs", type=Path, default=Path("peers-venvs"))
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 50])
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=8399)
    parser.add_argument("--quick", action="store_true", help="does it run? Figures mean nothing")
    options = parser.parse_args()
    options.venvs = options.venvs.resolve()
    return options


def main() -> None:
    """Measure, print a table, write clients.json."""
    options = arguments()
    clients = [c for c in CLIENTS if not c[1] or (options.venvs / c[1]).exists()]
    for name in sorted({c[1] for c in CLIENTS} - {c[1] for c in clients}):
        print(f"left out, no environment {options.venvs / name}: `make peers-venvs` makes it")
    rounds, divide = (1, 20) if options.quick else (options.rounds, 1)
    python = str(options.venvs / "core/bin/python")
    rows, raw = [], []
    for latency_ms in options.latency:
        runs: dict[str, list] = {c[0]: [] for c in clients}
        small: dict[str, list] = {c[0]: [] for c in clients}
        with common.mock(python, options.port, latency_ms) as url:
            for turn in range(rounds):
                for client in clients:
                    n = client[4 if latency_ms == 0 else 5] // divide
                    runs[client[0]].append(once(client, n, url, options))
                    if turn == 0:
                        small[client[0]].append(once(client, n // 4, url, options))
        rows += [summary(c[0], latency_ms, runs[c[0]], small[c[0]]) for c in clients]
        raw.append({"latency_ms": latency_ms, "runs": runs, "small": small})
    columns = [
        "client",
        "latency_ms",
        "per_s",
        "per_s_whole_work",
        "cpu_ms",
        "peak_rss_mb",
        "good_runs",
    ]
    common.table(
        columns, [[r.get(c) if r.get(c) is not None else "-" for c in columns] for r in rows]
    )
    met = targets(rows)
    print()
    common.table(
        ["goal", "wanted", "measured", "met"],
        [[a, b, "-" if c is None else c, str(d)] for a, b, c, d in met],
    )
    for row in rows:
        if row["error"]:
            print(f"{row['client']}: {row['error'][-400:]}")
    common.write("clients", options.quick, table=rows, goals=met, raw=raw)


if __name__ == "__main__":
    main()
