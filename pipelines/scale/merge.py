"""An ordinary store made of one in shards: one ledger of all segments, and the catalogue's rows."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection

from prefab.factory.console import Progress
from prefab.factory.errors import StoreError
from prefab.factory.ledger import db, segments
from prefab.factory.ledger.checksums import row_crc
from prefab.factory.object_store import files_at
from prefab.factory.store import store
from prefab.factory.store.shared import SharedFolder
from prefab.pipelines.scale.driver import exclusive
from prefab.pipelines.store.catalogue import add_starts, update_copy
from prefab.pipelines.store.fill import fill, take_rows

OWN = {"human_labels": "digest, value, at", "evals": "digest, value, at"}  # of the catalogue


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The number of calls, and the damaged segments that were left out."""

    calls: int
    damaged: list[str]


def merge(folder: Path, to: Path, quiet: bool = True) -> MergeReport:
    """Make an ordinary store of all shards of the one in `folder`, in the folder `to`.

    Raises: StoreError where there is a ledger already, the shards are worked on, or something is
        damaged.
    """
    shared = SharedFolder(folder)
    if shared.copy_of:
        shared = SharedFolder(folder, files_at(shared.copy_of))
    if (to / db.FILE).exists():
        raise StoreError(f"{to}: there is a ledger already. Name a new folder")
    with exclusive(shared):
        update_copy(shared)
        if held := fill(folder).held:
            raise StoreError(held)
        to.mkdir(parents=True, exist_ok=True)
        part = to / f"{db.FILE}.merging"  # so that a ledger is whole where there is one
        part.unlink(missing_ok=True)
        report = _merge_ledgers(shared, part, quiet)
        part.rename(to / db.FILE)
        same = store.read_frame(folder, "SELECT count(DISTINCT call) FROM calls").item()
        waiting = any(state.waiting for state in shared.states())
        if same == report.calls and not waiting and not report.damaged:
            take_rows(to, folder.resolve() / store.FILE)
        fill(to)
    return report


def _merge_ledgers(shared: SharedFolder, file: Path, quiet: bool) -> MergeReport:
    """Write all segments into one new ledger."""
    restored = segments.RestoreReport()
    with (
        closing(db.create(file)) as con,
        db.translate_errors(file),
        Progress("merge", shared.shards, quiet, "shards") as progress,
    ):
        con.execute("PRAGMA synchronous=OFF")  # the file has another name until it is whole
        for shard in range(shared.shards):
            for tables in segments.segments_of(shared.segments(shard), restored):
                con.execute("BEGIN IMMEDIATE")
                segments.insert_segment(con, tables, restored)
                con.execute("COMMIT")
            progress.advance(1)
        con.execute("BEGIN IMMEDIATE")
        add_starts(con, shared)
        _copy_own(con, shared.folder / db.FILE)
        con.execute("COMMIT")
        con.execute("PRAGMA synchronous=FULL")
        con.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return MergeReport(restored.rows.get("calls", 0), restored.damaged)


def _copy_own(con: Connection, catalogue: Path) -> None:
    """Labels and evaluations of the catalogue's own ledger, after those of the shards."""
    with closing(db.connect(catalogue, readonly=True)) as own:
        for table, columns in OWN.items():
            for values in own.execute(f"SELECT {columns} FROM {table} ORDER BY id"):
                con.execute(f"DELETE FROM {table} WHERE digest = ?", values[:1])
                last = con.execute(f"SELECT coalesce(max(id), 0) FROM {table}").fetchone()[0]
                row = (last + 1, *values)
                con.execute(f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?)", (*row, row_crc(row)))
