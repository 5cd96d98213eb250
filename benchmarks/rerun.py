"""Running a pipeline again over a million answered calls, and the memory of asking and of filling
DuckDB.

    python -m benchmarks.rerun        (about 10 minutes and 6 GB of disk)

1. A run asks 1,000,000 calls of the mock server (label reads by its batch endpoint), durably, and
   fills DuckDB: memory of that process at 10,000 calls and its peak until the last one was asked.
2. The same command again, in a new process: seconds, and how many calls the server was asked
(none).
3. The DuckDB file is deleted and made again, in a new process: seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import common

REBUILD = """
import json, sys, time
from prefab.pipelines.store import fill
started = time.perf_counter()
report = fill.rebuild(sys.argv[1])
print("RESULT " + json.dumps({"seconds": time.perf_counter() - started, "rows": report.rows}))
"""
CALLS_PER_JUDGMENT = 64 / 56  # of `peers/prefab_run.py`: 8 drafts, then 28 pairs in both orders


def asked(url: str, folder: Path, calls: int, timeout_s: float) -> dict[str, Any]:
    """One run of the pipeline in its own process, with its memory by calls asked so far."""
    common.get(url + "/reset", b"")
    n = round(calls / CALLS_PER_JUDGMENT)
    command = [
        sys.executable,
        str(common.PEERS / "prefab_run.py"),
        "--base-url",
        url + "/v1",
        "-n",
        str(n),
        "--variant",
        "batch",
        "--store",
        str(folder),
    ]
    series, done = [], threading.Event()
    watcher = threading.Thread(target=_watch, args=(url, str(folder), series, done), daemon=True)
    watcher.start()
    run = common.watched(command, timeout_s, cwd=folder)
    done.set()
    watcher.join()
    return {**run, "server": common.get(url + "/stats"), "series": series}


def _watch(url: str, folder: str, series: list, done: threading.Event) -> None:
    """Every half a second: calls asked so far, and the resident MiB of the process that asks
    them."""
    import psutil

    process = None
    while not done.wait(0.5):
        try:
            process = process or next(
                p for p in psutil.process_iter(["cmdline"]) if _is_run(p, folder)
            )
            series.append(
                (common.get(url + "/stats")["calls"], round(process.memory_info().rss / 2**20, 1))
            )
        except (StopIteration, psutil.Error, OSError):
            continue


def _is_run(process: Any, folder: str) -> bool:
    command = process.info["cmdline"] or []
    return folder in command and any(part.endswith("prefab_run.py") for part in command)


def growth(series: list[tuple[int, float]], low: int) -> dict[str, float] | None:
    """MiB at the first sight of `low` calls or more, the peak while calls were still being asked,
    the difference."""
    total = max((calls for calls, _ in series), default=0)
    early = [mb for calls, mb in series if calls >= low]
    asking = [mb for calls, mb in series if low <= calls < total]
    if not early or not asking:
        return None
    return {"at_low": early[0], "peak_while_asking": max(asking), "grew_mb": max(asking) - early[0]}


def files_mb(folder: Path) -> dict[str, float]:
    """Sizes of the store's files, MiB."""
    return {
        p.name: round(p.stat().st_size / 2**20, 1)
        for p in sorted((folder / "store").iterdir())
        if p.is_file()
    }


def measure(folder: Path, calls: int, low: int, python: str, port: int) -> dict[str, Any]:
    """All three steps in `folder`."""
    with common.mock(python, port, 0) as url:
        first = asked(url, folder, calls, 1500)
        again = asked(url, folder, calls, 600)
    (folder / "store" / "prefab.duckdb").unlink(missing_ok=True)
    rebuilt = common.watched(
        [sys.executable, "-c", REBUILD, str(folder / "store")], 900, cwd=common.HERE.parent
    )
    return {
        "calls": first["server"]["calls"],
        "first_s": first.get("work_s"),
        "first_peak_mb": first["peak_rss_mb"],
        "memory": growth(first["series"], low),
        "rerun_s": again.get("work_s"),
        "rerun_wall_s": again["wall_s"],
        "rerun_asked": again["server"]["calls"],
        "rerun_peak_mb": again["peak_rss_mb"],
        "rebuild_s": rebuilt.get("seconds"),
        "rebuild_peak_mb": rebuilt["peak_rss_mb"],
        "rebuilt_rows": rebuilt.get("rows"),
        "files_mb": files_mb(folder),
        "series": first["series"][::20],
        "errors": [r["error"] for r in (first, again, rebuilt) if "error" in r],
    }


def main() -> None:
    """Measure, print a table, write rerun.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--port", type=int, default=8398)
    parser.add_argument(
        "--folder", help="where the store goes (default: the system's temporary folder)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="20,000 calls: does it run? Figures mean nothing"
    )
    options = parser.parse_args()
    calls, low = (20_000, 1_000) if options.quick else (options.calls, 10_000)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(Path(folder), calls, low, sys.executable, options.port)
    memory = found["memory"] or {}
    rows = [
        ["calls", found["calls"], f">= {calls}"],
        ["first run, s", found["first_s"], ""],
        ["rerun, s", found["rerun_s"], "< 90"],
        ["asked by the rerun", found["rerun_asked"], "0"],
        [f"memory grown from {low:,} calls on, MiB", memory.get("grew_mb"), "< 100"],
        ["DuckDB made again, s", found["rebuild_s"], ""],
        ["its peak memory, MiB", found["rebuild_peak_mb"], "< 400"],
    ]
    common.table(["", "measured", "wanted"], [[a, "-" if b is None else b, c] for a, b, c in rows])
    print(json.dumps(found["files_mb"]), *found["errors"], sep="\n")
    common.write("rerun", options.quick, minutes=(time.monotonic() - started) / 60, **found)


if __name__ == "__main__":
    try:
        main()
    except subprocess.SubprocessError as error:
        sys.exit(str(error))
