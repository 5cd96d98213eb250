"""`prefab export` of a large run: seconds and the peak memory of the process.

    python -m benchmarks.export        (about 10 minutes and 6 GB of disk)

The store is made up: its tables are filled by SQL, with four answers of about 500 characters and
two decided pairs a prompt. Each size is exported in a process of its own. With `--shards N` it is a
store in shards, as `prefab run --on` makes it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

EXPORT = """
import json, sys, time
import prefab
started = time.perf_counter()
report = prefab.export(sys.argv[1], sys.argv[2], format=sys.argv[3])
found = {"seconds": time.perf_counter() - started, "rows": report.counts, "files": report.files}
print("RESULT " + json.dumps(found))
"""
SAMPLES, PAIRS = 4, 2
# by table, the rows of the prompts from $first up to $last; a text is 15 hashes of 32 characters
# and the number that makes it differ from others
ROWS = {
    "prompts": """
        SELECT md5(i::VARCHAR), 'Question ' || i, '[["user","Question ' || i || '"]]', [], NULL,
            CASE WHEN i % 20 = 0 THEN 'test' WHEN i % 20 = 1 THEN 'val' ELSE 'train' END, NULL
        FROM range($first, $last) t(i)""",
    "samples": """
        SELECT md5(i || '-' || k), 1, md5(i::VARCHAR), k, -1, 0, '',
            repeat(md5(k || '-' || i), 15) || i, 'stop', NULL, md5(i || 'call' || k), '', NULL
        FROM range($first, $last) t(i), range($samples) u(k)""",
    "preferences": """
        SELECT md5(i || '+' || k), 1, md5(i::VARCHAR), k, k + 1, 'a', k, k + 1, 0.8, 0.8, 0.0, 1, 1,
            'exact', false, NULL, 0.8, NULL
        FROM range($first, $last) t(i), range($pairs) u(k)""",
}


def insert(con: Any, first: int, last: int) -> None:
    """Insert the rows of these prompts into the tables of a store."""
    values = {"first": first, "last": last, "samples": SAMPLES, "pairs": PAIRS}
    con.execute("SET preserve_insertion_order=true")
    for table, sql in ROWS.items():
        used = {name: value for name, value in values.items() if f"${name}" in sql}
        con.execute(f"INSERT INTO {table} {sql}", used)


def make_shards(folder: Path, prompts: int, shards: int) -> None:
    """The same store in so many shards."""
    import duckdb

    from prefab.factory.store.shared import ShardState, SharedFolder, name_of
    from prefab.factory.store.store import SCHEMA
    from prefab.pipelines.store.catalogue import update_ledger

    shared = SharedFolder.create(folder, shards)
    config = {"recipe": "rlaif", "policy": {}}
    shared.begin_run("made-up", config, {}, lambda config: config)
    shared.start_run(1)
    con = duckdb.connect(config={"threads": 1})
    con.execute(SCHEMA.read_text(encoding="utf-8"))
    for shard in range(shards):
        insert(con, shard * prompts // shards, (shard + 1) * prompts // shards)
        tables = {}
        for table in ROWS:
            path = folder / "tables" / table / f"{name_of(shard)}-made.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            con.execute(f"COPY {table} TO '{path}' (FORMAT parquet, COMPRESSION zstd)")
            con.execute(f"DELETE FROM {table}")
            tables[table] = (path.name, path.stat().st_size)
        shared.write_state(ShardState(shard, {"1": {"state": "done"}}, tables))
    con.close()
    update_ledger(folder)


def make_store(folder: Path, prompts: int) -> None:
    """A store at `folder` with one run of so many prompts."""
    from prefab.factory.ledger import db
    from prefab.factory.ledger.ledger import Ledger
    from prefab.factory.store import store
    from prefab.pipelines.store import fill

    async def begin() -> None:
        ledger = Ledger.open(folder)
        ledger.begin_run("made-up", {"recipe": "rlaif", "policy": {}}, {})
        await ledger.close()

    asyncio.run(begin())
    fill.fill(folder)
    with store.opened(folder, 2048) as con:
        insert(con, 0, prompts)
        con.execute("CHECKPOINT")
    ledger = db.connect(folder / db.FILE, readonly=True)
    state = [fill._ledger_state(ledger), fill._file_state(folder)]
    ledger.close()
    store.write_marks(folder, {**store.read_marks(folder), "state": state})


def measure(folder: Path, prompts: int, format: str) -> dict[str, Any]:
    """One export in a process of its own."""
    out = folder / f"out-{format}"
    command = [sys.executable, "-c", EXPORT, str(folder / "store"), str(out), format]
    run = common.watched(command, 7200, cwd=common.HERE.parent)
    size = sum(path.stat().st_size for path in out.glob("*/*")) if out.exists() else 0
    shutil.rmtree(out, ignore_errors=True)
    found = {name: run.get(name) for name in ("seconds", "cpu_s", "peak_rss_mb", "rows", "error")}
    return {"prompts": prompts, "format": format, "mb": size / 2**20, **found}


def main() -> None:
    """Measure, print a table, write export.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--formats", nargs="+", default=["trl", "parquet"])
    parser.add_argument("--shards", type=int, default=0, help="of the store; 0: none")
    parser.add_argument("--quick", action="store_true", help="1,000 prompts: does it run?")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    name = "export_shards" if options.shards else "export"
    for prompts in [1_000] if options.quick else options.prompts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if options.shards:
                make_shards(folder / "store", prompts, options.shards)
            else:
                make_store(folder / "store", prompts)
            for format in options.formats:
                found.append({"shards": options.shards, **measure(folder, prompts, format)})
                common.write(name, options.quick, table=found)  # each takes minutes
    columns = ["prompts", "shards", "format", "seconds", "cpu_s", "peak_rss_mb", "mb", "error"]
    common.table(
        columns, [[row[c] if row[c] is not None else "-" for c in columns] for row in found]
    )
    print(json.dumps({row["format"]: row["rows"] for row in found}))


if __name__ == "__main__":
    main()
