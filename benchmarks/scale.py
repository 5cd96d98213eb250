"""A run over shards beside the same run in one process: CPU seconds a call, bytes a call, and the
catalogue of many shards.

    python -m benchmarks.scale        (5 to 6 minutes on two idle cores)

The engine is the scripted one, in the workers' processes, so that what is measured is Prefab.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from prefab.factory.paths import IMPORT_ROOT
from prefab.factory.store.shared import ShardState, SharedFolder, name_of
from prefab.pipelines.store.catalogue import update_ledger

RUN = "from prefab.pipelines.cli.main import main; main()"
CONSTITUTION = """
id: bench
title: Bench
licence: CC0-1.0
selection: all
principles:
  - {id: kind, title: Kind, compare: "Which answer is kinder?", critique: Name what is unkind.,
     revise: Make it kind., criterion: The answer is unkind.}
  - {id: brief, title: Brief, compare: "Which answer is briefer?", critique: Name what is long.,
     revise: Make it brief., criterion: The answer is long.}
"""


def pipeline(folder: Path, prompts: int) -> Path:
    """A pipeline of 4 samples a prompt, and 6 pairs in 2 orders under 2 principles: 28 calls."""
    folder.mkdir(parents=True)
    (folder / "bench.yaml").write_text(CONSTITUTION)
    rows = [
        {"prompt": f"Question {i}: what is to be done about {i * 7919}?"} for i in range(prompts)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    value = {
        "recipe": "rlaif",
        "name": "bench",
        "store": str(folder / "store"),
        "constitution": "bench.yaml",
        "prompts": {"source": "prompts.jsonl"},
        "engines": {"local": {"engine": "scripted"}},
        "policy": {"engine": "local", "samples": 4, "max_tokens": 64},
        "panel": {"judges": [{"name": "judge", "kind": "pairwise"}]},
        "budget": {"unscored": 1.0},
        "scale": {"local": str(folder / "local"), "publish_s": 5.0},
    }
    (folder / "pipeline.yaml").write_text(json.dumps(value))
    return folder / "pipeline.yaml"


def command(*words: str) -> dict[str, Any]:
    """Run a command of Prefab in a process of its own. Gives its output, the seconds, and the CPU
    seconds and greatest memory of all its processes.
    """
    return ended(start(*words))


class Started(NamedTuple):
    """A command that runs: its process, its output, and when it began."""

    pid: int
    out: int
    began: float
    words: tuple[str, ...]


def start(*words: str) -> Started:
    """Start a command of Prefab in a process of its own."""
    began = time.perf_counter()
    read, write = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", RUN, *words, "--json"],
        {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)},
        file_actions=[(os.POSIX_SPAWN_DUP2, write, 1), (os.POSIX_SPAWN_CLOSE, read)],
    )
    os.close(write)
    return Started(pid, read, began, words)


def ended(one: Started) -> dict[str, Any]:
    """Wait for the end of a command. Gives what `command` gives."""
    with open(one.out) as out:
        told = out.read()
    _, status, used = os.wait4(one.pid, 0)
    if status:
        raise SystemExit(f"prefab {' '.join(one.words)} ended with {status}: {told}")
    return {
        "told": json.loads(told),
        "seconds": round(time.perf_counter() - one.began, 2),
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "memory_mb": used.ru_maxrss >> 10,
    }


def timed(file: Path, *options: str) -> dict[str, Any]:
    """Run a pipeline. Gives its calls, the seconds, and the CPU seconds of all its processes."""
    found = command("run", str(file), "--quiet", *options)
    return {"calls": found.pop("told")["asked"], **found}


def floor(folder: Path, prompts: int) -> dict[str, Any]:
    """Run two pipelines of half the prompts at once, each in one process and a store of its own:
    what two cores of this machine can do.
    """
    files = [pipeline(folder / str(half), prompts // 2) for half in range(2)]
    both = [ended(one) for one in [start("run", str(file), "--quiet") for file in files]]
    return {
        "calls": sum(one["told"]["asked"] for one in both),
        "seconds": max(one["seconds"] for one in both),
        "cpu_s": round(sum(one["cpu_s"] for one in both), 2),
    }


def catalogue(folder: Path, store: Path, shards: int) -> dict[str, Any]:
    """Measure a catalogue of so many shards, each with the rows of one shard under other names of
    prompts and preferences: the first query, each further one, and `prefab agreement`.
    """
    import duckdb

    whole = next(state for state in SharedFolder(store).states() if state.tables)
    shared = SharedFolder.create(folder, shards)
    shutil.copytree(store / "runs", folder / "runs")
    shared.start_run(1)
    con = duckdb.connect(config={"threads": 1})
    for table, (name, _) in whole.tables.items():
        (folder / "tables" / table).mkdir(parents=True)
        con.execute(f"CREATE TABLE {table} AS FROM '{store / 'tables' / table / name}'")
    for shard in range(shards):
        tables = {}
        for table in whole.tables:
            to = folder / "tables" / table / f"{name_of(shard)}-copy.parquet"
            names = {name for name, *_ in con.execute(f"DESCRIBE {table}").fetchall()}
            other = ", ".join(
                f"{name} || '-{shard}' AS {name}" for name in names & {"prompt", "preference"}
            )
            rows = f"SELECT * {f'REPLACE ({other})' if other else ''} FROM {table}"
            con.execute(f"COPY ({rows}) TO '{to}' (FORMAT parquet, COMPRESSION zstd)")
            tables[table] = (to.name, to.stat().st_size)
        shared.write_state(ShardState(shard, whole.runs, tables))
    con.close()
    update_ledger(folder)
    found: dict[str, Any] = {"shards": shards}
    for what in ("the first query", "another query"):
        one = command("sql", "SELECT count(*) AS n FROM verdicts", "--store", str(folder))
        found["verdicts"] = one.pop("told")[0]["n"]
        found[what] = one
    found["agreement"] = command("agreement", "--store", str(folder))
    del found["agreement"]["told"]
    return found


def write_agreement(store: Path) -> None:
    """Measure `prefab agreement` of a store that exists, and record it with what it counted."""
    measured = command("agreement", "--store", str(store))
    told = measured.pop("told")
    counted = {name: told[name] for name in ("prompts", "comparisons", "items")}
    counted["verdicts"] = sum(row["verdicts"] for row in told["judges"])
    print(counted, measured)
    common.write("scale_agreement", False, **counted, **measured)


def bytes_of(folder: Path) -> int:
    """The size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=1024, help="of the catalogue")
    parser.add_argument("--quick", action="store_true", help="400 prompts, 128 shards")
    parser.add_argument(
        "--agreement", type=Path, metavar="STORE", help="only `prefab agreement` of this store"
    )
    args = parser.parse_args()
    if args.agreement:
        write_agreement(args.agreement)
        return
    if args.quick:
        args.prompts, args.shards = 400, 128
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        found: dict[str, Any] = {"prompts": args.prompts}
        for what, options in (
            ("one process", ()),
            ("one worker", ("--on", "local:1")),
            ("two workers", ("--on", "local:2")),
        ):
            file = pipeline(base / what.replace(" ", "-"), args.prompts)
            found[what] = timed(file, *options)
            print(what, found[what], flush=True)
            found[what]["the same command again"] = timed(file, *options)
        found["two single runs at once"] = best = floor(base / "floor", args.prompts)
        print("two single runs at once", best, flush=True)
        single, sharded, two = (found[x] for x in ("one process", "one worker", "two workers"))
        found["CPU of one worker / one process"] = round(sharded["cpu_s"] / single["cpu_s"], 3)
        found["calls a second of two workers / one process"] = round(
            single["seconds"] / two["seconds"], 3
        )
        found["... of two single runs at once / one process"] = round(
            single["seconds"] / best["seconds"], 3
        )
        store = base / "two-workers" / "store"
        calls = found["two workers"]["calls"]
        found["bytes a call"] = {
            "segments": round(bytes_of(store / "segments") / calls, 1),
            "rows": round(bytes_of(store / "tables") / calls, 1),
            "a ledger": round(bytes_of(base / "two-workers" / "local") / calls, 1),
        }
        found["catalogue"] = catalogue(base / "catalogue", store, args.shards)
    print(json.dumps(found, indent=2))
    common.write("scale", args.quick, **found)


if __name__ == "__main__":
    main()
