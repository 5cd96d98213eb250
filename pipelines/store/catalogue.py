"""The catalogue of a store in shards: `prefab.duckdb` with the runs, labels and evaluations as
tables, and views of the shards' files.

It is filled as any store is, from a `ledger.sqlite` of its own, which has the runs of the shared
folder, and what people and audits add. When a shard has new rows, it is made anew.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from prefab.factory.console import warn
from prefab.factory.keys import canonical, digest
from prefab.factory.ledger import db
from prefab.factory.ledger.checksums import row_crc
from prefab.factory.ledger.records import add_object
from prefab.factory.store.shared import COPIED, VIEWED, SharedFolder, is_shared
from prefab.pipelines.store.calibrations import CALIBRATION

if TYPE_CHECKING:
    import duckdb

ID_OF = {"models": "model", "evals": "eval"}  # of what several shards have, one row is shown


def add_runs(con: sqlite3.Connection, shared: SharedFolder) -> None:
    """Write into a ledger, inside an open transaction, the runs with the numbers that they have in
    all shards.
    """
    for run in shared.runs():
        name, version, config, texts = run["name"], run["version"], run["config"], run["texts"]
        values = (name, version, digest(name, config, texts))
        row = (run["id"], *values, canonical(config).decode(), canonical(texts).decode(), run["at"])
        places = ", ".join("?" * (len(row) + 1))
        con.execute(f"INSERT OR IGNORE INTO runs VALUES ({places})", (*row, row_crc(row)))


def update_ledger(folder: Path) -> None:
    """Bring the catalogue's own ledger up to the runs of the shared folder; made where absent."""
    shared, file = SharedFolder(folder), folder / db.FILE
    starts = shared.starts()
    if file.exists():
        with closing(db.connect(file, readonly=True)) as con:
            if con.execute("SELECT count(*) FROM starts").fetchone()[0] >= len(starts):
                return
    db.write(file, partial(add_starts, shared=shared))


def add_starts(con: sqlite3.Connection, shared: SharedFolder) -> None:
    """As `add_runs`, with the starts of the runs."""
    add_runs(con, shared)
    for place, (run, at) in enumerate(shared.starts(), 1):
        row = (place, run, at)
        con.execute("INSERT OR IGNORE INTO starts VALUES (?, ?, ?, ?)", (*row, row_crc(row)))


def add_head(con: sqlite3.Connection, shared: SharedFolder) -> None:
    """Write into a ledger, inside an open transaction, the calibrations and labels that all shards
    have.
    """
    for table, values in shared.read_head().items():
        for value in values:
            add_object(con, table, orjson.loads(value))


def update_copy(shared: SharedFolder) -> None:
    """Copy from an object store what the catalogue needs; nothing where there is none."""
    if not shared.is_remote:
        return
    shared.update_copy()
    update_ledger(shared.folder)
    db.write(shared.folder / db.FILE, partial(add_head, shared=shared))


def state_of_shards(ledger: sqlite3.Connection) -> str:
    """What the shards beside this ledger have published, as a digest; empty where there are
    none.
    """
    folder = Path(ledger.execute("PRAGMA database_list").fetchone()[2]).parent
    if not is_shared(folder):
        return ""
    return digest(str(folder), SharedFolder(folder).states_digest())


def bring_rows(con: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Put views of the shards' files in the place of the catalogue's large tables, and copy the
    rows of the others. A shard whose files are missing or damaged is left out, which is told.
    """
    files = _files_of_rows(folder)
    for table in VIEWED:
        if files[table]:
            con.execute(f"DROP TABLE {table}")
            con.execute(f"CREATE VIEW {table} AS SELECT * FROM {_rows_of(files[table])}")
    for table in COPIED:
        if files[table]:
            once = f"DISTINCT ON ({ID_OF[table]})" if table in ID_OF else ""
            # calibrations are of the catalogue's own ledger, from which shards have them
            ours = f"WHERE name <> '{CALIBRATION}'" if table == "evals" else ""
            con.execute(f"INSERT INTO {table} SELECT {once} * FROM {_rows_of(files[table])} {ours}")


def has_row_ids(con: duckdb.DuckDBPyConnection) -> bool:
    """Whether the preferences are a table, whose rows have ids."""
    tables = "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'preferences'"
    return bool(con.execute(tables).fetchall() == [(1,)])


def copy_preferences(con: duckdb.DuckDBPyConnection) -> None:
    """Make a table of the view of the preferences, for pages and searches that need row ids. It
    takes 2 CPU s a million.
    """
    con.execute("CREATE TABLE copied AS SELECT * FROM preferences")
    con.execute("DROP VIEW preferences")
    con.execute("ALTER TABLE copied RENAME TO preferences")


def _files_of_rows(folder: Path) -> dict[str, list[str]]:
    """By table, the files of all shards' rows."""
    shared = SharedFolder(folder.resolve())  # views name whole paths
    files: dict[str, list[str]] = {table: [] for table in (*VIEWED, *COPIED)}
    for state in shared.states():
        found = shared.rows_files(state)
        if state.tables and not found:
            warn(
                f"shard {state.shard}: its rows in {folder / 'tables'} are missing or damaged. It is "
                "left out; the same `prefab run` makes them anew, and asks nothing"
            )
        for table, path in found.items():
            files[table].append(str(path))
    return files


def _rows_of(files: list[str]) -> str:
    names = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
    return f"read_parquet([{names}])"
