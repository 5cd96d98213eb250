"""Verifying, recovering and backing up `ledger.sqlite`.

These functions open the file by themselves and for reading only: a damaged ledger must not be
migrated or written.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from prefab.factory.errors import StoreError
from prefab.factory.keys import key_of
from prefab.factory.ledger import db
from prefab.factory.ledger.checksums import CHECKED, row_crc
from prefab.factory.ledger.migrations import SCHEMA

PAGE = 1000  # rows read at once
FARTHEST = 1 << 40  # no table has a higher id
TRIES = 10_000  # unreadable ids of a table that are tried one by one
INTEGRITY_LINES = 20
COPIED = (*CHECKED, "requests")
Row = tuple[Any, ...]


@dataclass(slots=True)
class TableReport:
    """The rows of a table: `intact` ones, `damaged` ones (their checksum is wrong), and how many
    ids are `unreadable` because SQLite cannot read their page.
    """

    intact: int = 0
    damaged: int = 0
    unreadable: int = 0


@dataclass(slots=True)
class LedgerReport:
    """What is damaged in a ledger. `integrity` holds the messages of SQLite's own check."""

    file: str
    integrity: list[str] = field(default_factory=list)
    tables: dict[str, TableReport] = field(default_factory=dict)
    unverified: str = ""  # why rows have no checksum

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.integrity and not any(
            table.damaged or table.unreadable for table in self.tables.values()
        )

    def rows(self) -> list[tuple[str, int, int, int]]:
        """Name, intact, damaged and unreadable rows of each table."""
        return [(name, t.intact, t.damaged, t.unreadable) for name, t in self.tables.items()]


def verify_ledger(file: Path, keep: Callable[[str, Row], None] | None = None) -> LedgerReport:
    """Check the file's structure (SQLite's integrity check) and the checksum of each row.

    Args:
        file: The ledger.
        keep: Called with the table and the values of each intact row, its checksum included.

    Raises:
        StoreError: There is no file, or it is not a ledger.
    """
    report = LedgerReport(str(file))
    with closing(_open(file)) as con:
        try:
            rows = con.execute(f"PRAGMA integrity_check({INTEGRITY_LINES})").fetchall()
            report.integrity = [text for (text,) in rows if text != "ok"]
            existing = {row[0] for row in con.execute("SELECT name FROM sqlite_schema")}
        except sqlite3.DatabaseError as error:
            report.integrity.append(str(error))
            existing = set(COPIED)
        with suppress(sqlite3.DatabaseError):
            schema = con.execute("PRAGMA user_version").fetchone()[0]
            if schema < SCHEMA:
                report.unverified = f"a ledger of schema {schema} has no checksums in its rows"
        for table in COPIED:
            if table in existing:
                report.tables[table] = _verify_table(con, table, keep, not report.unverified)
    return report


def _open(file: Path) -> sqlite3.Connection:
    if not file.is_file():
        raise StoreError(f"{file}: there is no ledger here. `prefab run` makes one")
    address = db.read_address(file)
    address += "" if "?" in address else "?mode=ro"
    con = sqlite3.connect(address, uri=True, isolation_level=None)
    con.text_factory = lambda text: text.decode("utf-8", "replace")  # the checksum tells
    con.execute(f"PRAGMA busy_timeout={db.BUSY_TIMEOUT_MS}")
    with suppress(sqlite3.DatabaseError):
        application = con.execute("PRAGMA application_id").fetchone()[0]
        ours = {"calls", "uses", "requests"} & {
            row[0] for row in con.execute("SELECT name FROM sqlite_schema")
        }
        if application != db.APPLICATION and not ours:
            con.close()
            raise StoreError(f"{file}: a SQLite file of another program, not a ledger")
    return con


def _verify_table(
    con: sqlite3.Connection,
    table: str,
    keep: Callable[[str, Row], None] | None,
    checksums: bool,
) -> TableReport:
    report = TableReport()
    for row in _rows(con, table, report):
        if not checksums or _is_intact(con, table, row):
            report.intact += 1
            if keep is not None:
                keep(table, row)
        else:
            report.damaged += 1
    return report


def _is_intact(con: sqlite3.Connection, table: str, row: Row) -> bool:
    """A request is checked by the key of its call; a request without a readable call passes."""
    if table != "requests":
        return bool(row_crc(row[:-1]) == row[-1])
    try:
        call = con.execute("SELECT key FROM calls WHERE id = ?", (row[0],)).fetchone()
    except sqlite3.DatabaseError:
        return True
    return call is None or bool(isinstance(row[1], bytes) and key_of(row[1]) == call[0])


def _rows(con: sqlite3.Connection, table: str, report: TableReport) -> Iterator[Row]:
    """Every row of a table that can be read. Where a page cannot, the rows behind it are reached
    from the other end and by their ids.
    """
    at = "grp" if table == "splits" else "id"
    # NOT INDEXED: the rows themselves, not the copies of their values in an index
    sql = f"SELECT * FROM {table} NOT INDEXED WHERE {at} > ? ORDER BY {at} LIMIT {PAGE}"
    last: Any = "" if table == "splits" else -1
    while True:
        try:
            page = con.execute(sql, (last,)).fetchall()
        except sqlite3.DatabaseError:
            break
        yield from page
        if len(page) < PAGE:
            return
        if page[-1][0] <= last:
            break  # ids out of order, in a damaged page
        last = page[-1][0]
    if table == "splits":
        report.unreadable += 1
        return
    yield from _by_id(con, table, last, report)


def _by_id(con: sqlite3.Connection, table: str, last: int, report: TableReport) -> Iterator[Row]:
    """The rows after `last`, some of which are on unreadable pages: by halving ranges of ids."""
    spans, tries = [(last + 1, _highest(con, table, last))], 0
    sql = f"SELECT * FROM {table} NOT INDEXED WHERE id BETWEEN ? AND ? ORDER BY id"
    while spans:
        low, high = spans.pop()
        try:
            for start in range(low, high + 1, PAGE):
                low = start
                yield from con.execute(sql, (start, min(high, start + PAGE - 1))).fetchall()
        except sqlite3.DatabaseError:
            tries += 1
            if low == high or tries > TRIES:
                report.unreadable += high - low + 1
                continue
            end = min(high, low + PAGE - 1)
            middle = (low + end) // 2
            spans += [(end + 1, high)] if end < high else []
            spans += [(middle + 1, end), (low, middle)] if low < end else [(low, low)]


def _highest(con: sqlite3.Connection, table: str, last: int) -> int:
    """The highest id of a table; where its last page cannot be read, a higher one that a search in
    doubling steps finds.
    """
    step = 0
    while last + step < FARTHEST:
        with suppress(sqlite3.DatabaseError):
            sql = f"SELECT max(id) FROM {table} NOT INDEXED WHERE id > ?"
            found = con.execute(sql, (last + step,)).fetchone()[0]
            return last + step if found is None else int(found)
        step = step * 2 or 1
    return last + PAGE


def recover_ledger(file: Path, new: Path) -> LedgerReport:
    """Copy every intact row of a damaged ledger to a new one.

    A use whose names are lost is left out; `prefab run` records it again without asking. The name
    of a lost model is taken from a request.

    Args:
        file: The damaged ledger, which stays as it is.
        new: The new ledger.

    Raises:
        StoreError: `new` exists, or there is no ledger to read.
    """
    if new.exists():
        raise StoreError(f"{new} exists already. Name a folder without a ledger")
    new.parent.mkdir(parents=True, exist_ok=True)
    con = db.create(new)
    try:
        with db.translate_errors(new):
            con.execute("BEGIN")
            report = verify_ledger(file, lambda table, row: _insert(con, table, row))
            if report.unverified:
                raise StoreError(f"{file}: {report.unverified}. Run any command on it first")
            _restore_names(con)
            con.execute("COMMIT")
            con.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except BaseException:
        con.close()
        for name in (new, new.with_name(new.name + "-wal"), new.with_name(new.name + "-shm")):
            name.unlink(missing_ok=True)
        raise
    con.close()
    return report


def _insert(con: sqlite3.Connection, table: str, row: Row) -> None:
    con.execute(f"INSERT OR IGNORE INTO {table} VALUES (?{',?' * (len(row) - 1)})", row)


_NAMES_OF_USES = ("prompt", "role", "principle", "judge", "ord")


def _restore_names(con: sqlite3.Connection) -> None:
    """Names that a row needs: those of models from a request, those of servers as unknown; uses
    without their names go, and requests without their answers, whose ids are given out again.
    """
    sql = "SELECT DISTINCT {0} FROM calls WHERE {0} NOT IN (SELECT id FROM names)"
    for (name,) in con.execute(sql.format("model")).fetchall():
        row = con.execute(
            "SELECT r.request FROM calls c JOIN requests r ON r.id = c.id WHERE c.model = ?",
            (name,),
        ).fetchone()
        model = orjson.loads(row[0])["model"] if row else f"unknown model {name}"
        _insert(con, "names", (name, model, row_crc((name, model))))
    for (name,) in con.execute(sql.format("replica")).fetchall():
        if name is not None:
            server = f"unknown server {name}"
            _insert(con, "names", (name, server, row_crc((name, server))))
    lost = " OR ".join(f"{column} NOT IN (SELECT id FROM names)" for column in _NAMES_OF_USES)
    con.execute(f"DELETE FROM uses WHERE {lost}")
    con.execute("DELETE FROM requests WHERE id NOT IN (SELECT id FROM calls)")


def back_up_ledger(file: Path, to: Path) -> LedgerReport:
    """Copy a ledger, also while a run writes to it, and verify the copy. What was committed when
    the copy began is in it, whether or not it is still in the WAL.

    Args:
        file: The ledger.
        to: The copy.

    Raises:
        StoreError: `to` exists, the disk is full, or the copy is damaged.
    """
    if to.exists():
        raise StoreError(f"{to} exists already. Name a folder without a ledger")
    to.parent.mkdir(parents=True, exist_ok=True)
    copy = to.with_name(f"{to.name}.partial")
    copy.unlink(missing_ok=True)
    try:
        new = closing(sqlite3.connect(copy, isolation_level=None))
        with db.translate_errors(to), closing(_open(file)) as con, new as target:
            con.backup(target)
            target.execute("PRAGMA journal_mode=DELETE")
        report = verify_ledger(copy)
        report.file = str(to)
        if report.whole:
            with copy.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(copy, to)
    finally:
        copy.unlink(missing_ok=True)
    if not report.whole:
        raise StoreError(
            f"{file}: damaged, so that no copy is kept. `prefab store verify {file.parent} "
            "--recover NEW` copies what is intact"
        )
    return report
