"""Schemas of `ledger.sqlite` by number, and how an older file becomes one of the newest schema.

A ledger is never changed in place. Its rows are copied to a new file, the copy is migrated and
checked, and then takes the old file's name; the old file stays beside it. A crash at any moment
leaves one whole ledger under the name: the old one or the new one.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prefab.factory.console import warn
from prefab.factory.errors import StoreError
from prefab.factory.ledger.checksums import CHECKED, VERIFY, row_crc

WAIT_MS = 2_000  # for a program that is just closing the ledger


@dataclass(frozen=True, slots=True)
class Migration:
    """One step from the schema before to `schema`. `apply` runs inside an open transaction."""

    schema: int
    what: str
    apply: Callable[[sqlite3.Connection], None]


def _rubrics_and_imports(con: sqlite3.Connection) -> None:
    """Schema 1 grew in place: a ledger may lack any of these, or have them all."""
    if "rubric" not in {row[1] for row in con.execute("PRAGMA table_info(prompts)")}:
        con.execute("ALTER TABLE prompts ADD COLUMN rubric TEXT")
    con.execute(
        "CREATE TABLE IF NOT EXISTS rubrics (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, "
        "rubric TEXT NOT NULL)"
    )
    con.execute(
        "CREATE TABLE IF NOT EXISTS imports (id INTEGER PRIMARY KEY, run INTEGER NOT NULL, "
        "prompt TEXT NOT NULL, value TEXT NOT NULL, UNIQUE (run, prompt))"
    )


def _kinds_of_failures(con: sqlite3.Connection) -> None:
    """Refusals are told apart from other failures, and found by key."""
    con.execute("ALTER TABLE failures ADD COLUMN kind TEXT NOT NULL DEFAULT 'transport'")
    con.execute("CREATE INDEX failures_refused ON failures (key) WHERE kind = 'refused'")


# Claims: which process asks which question (see `claims`). They describe only processes that live
# now, and have no checksum. Forgetting: which answers no longer count, and why (see `forget`).
CLAIMS_AND_FORGETTING = """
CREATE TABLE IF NOT EXISTS owners (id INTEGER PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL,
    started TEXT NOT NULL, beat REAL NOT NULL, acknowledged INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS claims (key BLOB PRIMARY KEY, owner INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS forgets (id INTEGER PRIMARY KEY, reason TEXT NOT NULL, filter TEXT NOT NULL,
    undoes INTEGER, at REAL NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS forgotten (id INTEGER PRIMARY KEY, forget INTEGER NOT NULL,
    call INTEGER NOT NULL, crc INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS forgotten_call ON forgotten (call);
"""


def _checksums(con: sqlite3.Connection) -> None:
    """A checksum in each row, the server that gave an answer, several answers to one question of
    which all but one are forgotten, claims.
    """
    for statement in CLAIMS_AND_FORGETTING.split(";")[:-1]:
        con.execute(statement)
    con.execute("ALTER TABLE calls ADD COLUMN attempt INTEGER NOT NULL DEFAULT 0")
    con.execute("ALTER TABLE calls ADD COLUMN replica INTEGER")
    con.execute("DROP INDEX IF EXISTS calls_key")
    con.execute("CREATE UNIQUE INDEX calls_key ON calls (key, limit_tokens, attempt)")
    con.create_function("row_crc", -1, lambda *row: row_crc(row), deterministic=True)
    for table in CHECKED:
        columns = [row[1] for row in con.execute(f"PRAGMA table_info({table})")]
        if "crc" not in columns:
            con.execute(f"ALTER TABLE {table} ADD COLUMN crc INTEGER NOT NULL DEFAULT 0")
            con.execute(f"UPDATE {table} SET crc = row_crc({', '.join(columns)})")


MIGRATIONS = (
    Migration(2, "rubrics of prompts, and imported preferences", _rubrics_and_imports),
    Migration(3, "kinds of failures", _kinds_of_failures),
    Migration(4, "checksums, servers of answers, claims, forgetting", _checksums),
)
SCHEMA = MIGRATIONS[-1].schema


def migrate(file: Path, schema: int) -> None:
    """Bring the ledger at `file` from `schema` to the newest one; the old file stays beside it.

    Raises:
        StoreError: Another program has the ledger open, there is no room for the copy, or the copy
            is not what it should be. The ledger is then as it was.
    """
    copy = file.with_name(f"{file.name}.migrating")
    kept = file.with_name(f"{file.stem}.schema-{schema}{file.suffix}")
    before = file.stat().st_ino
    old = sqlite3.connect(file, isolation_level=None)
    try:
        _lock(old, file)
        if file.stat().st_ino != before or _schema(old) != schema:
            return  # another program has migrated it meanwhile
        _remove(copy)
        _copy(old, copy, schema)
        _remove(kept)
        os.link(file, kept)
        os.replace(copy, file)
        _sync(file.parent)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(
            f"{file}: could not be brought from schema {schema} to {SCHEMA} ({error}). It is as it "
            f"was. The copy needs {file.stat().st_size / 1e6:,.0f} MB of free disk space and a "
            f"folder that is yours to write. Where the ledger is damaged: {VERIFY}"
        ) from error
    finally:
        old.close()
        _remove(copy)
    warn(f"{file}: brought from schema {schema} to {SCHEMA}. The old file is kept as {kept.name}")


def record(con: sqlite3.Connection, schema: int) -> None:
    """Write down, inside an open transaction, that the ledger has this schema from now on."""
    con.execute(
        "CREATE TABLE IF NOT EXISTS migrations (schema INTEGER PRIMARY KEY, at REAL NOT NULL)"
    )
    con.execute("INSERT OR IGNORE INTO migrations VALUES (?, ?)", (schema, time.time()))
    con.execute(f"PRAGMA user_version={schema}")


def _lock(con: sqlite3.Connection, file: Path) -> None:
    """Keep every other program from the ledger. Leaving WAL needs that nobody else has it open."""
    con.execute(f"PRAGMA busy_timeout={WAIT_MS}")
    try:
        con.execute("PRAGMA journal_mode=DELETE")
        con.execute("PRAGMA locking_mode=EXCLUSIVE")  # the lock outlives the transaction
        con.execute("BEGIN EXCLUSIVE")
        con.execute("COMMIT")
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            raise
        raise StoreError(
            f"{file}: its schema is of an older version of Prefab, and another program has it "
            "open. End that program, then run the same command again"
        ) from error


def _copy(old: sqlite3.Connection, copy: Path, schema: int) -> None:
    """A checked copy with every later migration applied."""
    new = sqlite3.connect(copy, isolation_level=None)
    try:
        new.execute("PRAGMA synchronous=FULL")
        old.backup(new)
        new.execute("BEGIN")
        for migration in MIGRATIONS:
            if migration.schema > schema:
                migration.apply(new)
                record(new, migration.schema)
        new.execute("COMMIT")
        _check(old, new)
    finally:
        new.close()


def _check(old: sqlite3.Connection, new: sqlite3.Connection) -> None:
    """Raises: StoreError when the copy is damaged or has lost rows."""
    found = new.execute("PRAGMA integrity_check").fetchone()[0]
    lost = [name for name, n in _counts(old).items() if _counts(new).get(name) != n]
    if found != "ok" or lost:
        raise StoreError(f"the copy of the ledger is not whole ({found}; {', '.join(lost)})")


def _counts(con: sqlite3.Connection) -> dict[str, int]:
    tables = [row[0] for row in con.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
    return {
        name: con.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]
        for name in tables
        if name != "migrations"
    }


def _schema(con: sqlite3.Connection) -> int:
    return int(con.execute("PRAGMA user_version").fetchone()[0])


def _remove(file: Path) -> None:
    for name in (file, file.with_name(f"{file.name}-journal")):
        name.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make a rename durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
