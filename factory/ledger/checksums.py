"""A checksum in each row of `ledger.sqlite`, so that a changed bit is noticed when the row is read.

The column `crc` is last in each table of `CHECKED` and holds the CRC-32 of all other values of the
row in the table's order, its id included. A row of `requests` has none: it is checked by the key of
its call, which is a digest of it.
"""

from __future__ import annotations

import marshal
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from zlib import crc32

from prefab.factory.errors import StoreError

CHECKED = (
    "names",
    "runs",
    "starts",
    "prompts",
    "rubrics",
    "splits",
    "calls",
    "uses",
    "failures",
    "human_labels",
    "imports",
    "evals",
    "forgets",
    "forgotten",
)


def row_crc(values: Iterable[Any]) -> int:
    """The checksum of a row without its column `crc`. The values are as SQLite gives them back:
    None, int, float, str or bytes.

    They are made bytes by `marshal` in its format 2, which is the same in all versions of Python
    that Prefab runs on (a test has known values) and takes a third of the time of `str` and `join`.
    """
    return crc32(marshal.dumps(tuple(values), 2))


def add_row(con: sqlite3.Connection, table: str, *values: Any, ignore: bool = False) -> int | None:
    """Insert a row with the next id and its checksum, inside an open transaction. `ignore`: a row
    that is there already stays.

    Returns:
        The row's id; None when it was there already.
    """
    place = next_id(con, table)
    row = (place, *values)
    added = con.execute(
        f"INSERT {'OR IGNORE ' if ignore else ''}INTO {table} VALUES (?{',?' * len(row)})",
        (*row, row_crc(row)),
    )
    return place if added.rowcount else None


def next_id(con: sqlite3.Connection, table: str) -> int:
    """The id after the last one of a table."""
    return int(con.execute(f"SELECT coalesce(max(id), 0) + 1 FROM {table}").fetchone()[0])


def intact(
    con: sqlite3.Connection, table: str, rows: Iterable[Sequence[Any]]
) -> Iterator[tuple[Any, ...]]:
    """Rows of a table, which were read with all columns in its order, without their checksums.

    Raises: StoreError when the checksum of one is wrong.
    """
    for row in rows:
        if row_crc(row[:-1]) != row[-1]:
            raise damaged(con, f"row {row[0]} of the table {table}")
        yield tuple(row[:-1])


def damaged(con: sqlite3.Connection, what: str) -> StoreError:
    """The error that names what is damaged in the ledger, and the command that repairs it."""
    file = con.execute("PRAGMA database_list").fetchone()[2]
    return StoreError(f"{file}: {what} is damaged. {VERIFY}")


VERIFY = (
    "`prefab store verify` says what is damaged, and with --recover NEW copies all that is intact "
    "to a new file"
)
