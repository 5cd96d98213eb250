"""A ledger's rows as Parquet files in another folder, from which another machine restores them.

A segment holds the new rows of each table since the last one: a file a table, and at last a
manifest with the files' checksums. What has a manifest is whole. How far a ledger is published, and
which segments it already holds, is kept in the ledger itself. Names are written out, so that the
segments of several ledgers can be put together; a row that is there already is not inserted again.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from prefab.factory.arrow import arrow_array
from prefab.factory.console import warn
from prefab.factory.errors import StoreError
from prefab.factory.ledger import db
from prefab.factory.ledger.checksums import add_row, next_id, row_crc
from prefab.factory.shared_files import SharedFiles

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
PAGE = 20_000  # rows of a table in a segment: 200 MB of requests in memory while it is written
PUBLISHED = "published"  # the name under which `meta` holds what is published


@dataclass(frozen=True, slots=True)
class SegmentTable:
    """A table as it is published: its columns with their Arrow types, and the query that gives a
    row id and these columns after a row id (`?`), at most so many (`?`).
    """

    columns: tuple[tuple[str, str], ...]
    select: str


def _plain(table: str, columns: Sequence[tuple[str, str]]) -> SegmentTable:
    names = ", ".join(name for name, _ in columns)
    select = f"SELECT id, {names} FROM {table} WHERE id > ? ORDER BY id LIMIT ?"
    return SegmentTable(tuple(columns), select)


_CALL = (
    *(("key", "binary"), ("model", "string"), ("finish", "string"), ("exactness", "string")),
    *(("prompt_tokens", "int32"), ("completion_tokens", "int32"), ("limit_tokens", "int32")),
    *(("at", "double"), ("label_logps", "string"), ("text", "string"), ("attempt", "int32")),
    *(("replica", "string"), ("request", "binary")),
)
_USE = (
    *(("run", "int32"), ("prompt", "string"), ("role", "string"), ("sample", "int32")),
    *(("other", "int32"), ("round", "int32"), ("principle", "string"), ("judge", "string")),
    *(("ord", "string"), ("repeat", "int32"), ("key", "binary")),
)
TABLES = {
    "rubrics": _plain("rubrics", [("digest", "string"), ("rubric", "string")]),
    "prompts": _plain(
        "prompts",
        [
            *(("prompt", "string"), ("digest", "string"), ("messages", "string")),
            *(("tags", "string"), ("grp", "string"), ("split", "string"), ("rubric", "string")),
        ],
    ),
    "calls": SegmentTable(
        _CALL,
        "SELECT c.id, c.key, m.name, finish, exactness, prompt_tokens, completion_tokens, "
        "limit_tokens, at, label_logps, text, attempt, r.name, q.request FROM calls c "
        "JOIN names m ON m.id = c.model JOIN requests q ON q.id = c.id "
        "LEFT JOIN names r ON r.id = c.replica WHERE c.id > ? ORDER BY c.id LIMIT ?",
    ),
    "uses": SegmentTable(
        _USE,
        "SELECT u.id, run, p.name, r.name, sample, other, round, i.name, j.name, o.name, repeat, "
        "key FROM uses u JOIN names p ON p.id = u.prompt JOIN names r ON r.id = u.role "
        "JOIN names i ON i.id = u.principle JOIN names j ON j.id = u.judge "
        "JOIN names o ON o.id = u.ord WHERE u.id > ? ORDER BY u.id LIMIT ?",
    ),
    "failures": _plain(
        "failures",
        [
            *(("run", "int32"), ("key", "binary"), ("error", "string"), ("at", "double")),
            ("kind", "string"),
        ],
    ),
    "evals": _plain("evals", [("digest", "string"), ("value", "string"), ("at", "double")]),
    "forgets": SegmentTable(  # the time of a forgetting names it
        (("reason", "string"), ("filter", "string"), ("undoes_at", "double"), ("at", "double")),
        "SELECT f.id, f.reason, f.filter, u.at, f.at FROM forgets f "
        "LEFT JOIN forgets u ON u.id = f.undoes WHERE f.id > ? ORDER BY f.id LIMIT ?",
    ),
    "forgotten": SegmentTable(
        (("at", "double"), ("key", "binary"), ("limit_tokens", "int32"), ("attempt", "int32")),
        "SELECT n.id, f.at, c.key, c.limit_tokens, c.attempt FROM forgotten n "
        "JOIN calls c ON c.id = n.call JOIN forgets f ON f.id = n.forget "
        "WHERE n.id > ? ORDER BY n.id LIMIT ?",
    ),
}


def _schema(table: SegmentTable) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([(name, pa.type_for_alias(kind)) for name, kind in table.columns])


@dataclass(slots=True)
class PublishedState:
    """How far a ledger is published: by table the last row, the segments that it holds (its own
    and those it was restored from), and the number of the last one.
    """

    marks: dict[str, int] = field(default_factory=dict)
    segments: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, con: sqlite3.Connection) -> PublishedState:
        """As the ledger has it."""
        row = con.execute("SELECT value FROM meta WHERE name = ?", (PUBLISHED,)).fetchone()
        if row is None:
            return cls()
        value = orjson.loads(row[0])
        return cls(value["marks"], value["segments"])

    def keep(self, con: sqlite3.Connection) -> None:
        """Write it into the ledger, inside an open transaction."""
        value = orjson.dumps({"marks": self.marks, "segments": self.segments}).decode()
        con.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (PUBLISHED, value))

    @property
    def next_number(self) -> int:
        """The number of the next segment: after all that this ledger holds."""
        return 1 + max((int(name.partition("-")[0]) for name in self.segments), default=0)


class Publisher:
    """Publishes one ledger's new rows. Any thread may publish; one at a time does."""

    def __init__(self, ledger: Path, files: SharedFiles) -> None:
        """`ledger` is the file, `files` where the segments go."""
        self.ledger, self.files = ledger, files
        self.token = uuid.uuid4().hex[:6]  # so that no two publishers give a segment one name
        self.bytes = self.rows = 0
        self.seconds = 0.0
        self._lock = threading.Lock()

    def publish(self) -> None:
        """Publish all rows since the last time. Raises: StoreError, OSError."""
        began = time.monotonic()
        with self._lock, db.translate_errors(self.ledger), closing(db.connect(self.ledger)) as con:
            while self._publish_page(con):
                pass
        self.seconds += time.monotonic() - began

    def _publish_page(self, con: sqlite3.Connection) -> bool:
        """Publish one segment. Returns: whether there may be more rows."""
        state = PublishedState.of(con)
        con.execute("BEGIN")  # one state of the ledger: no use without its prompt
        try:
            found = {
                name: con.execute(table.select, (state.marks.get(name, 0), PAGE)).fetchall()
                for name, table in TABLES.items()
            }
        finally:
            con.execute("COMMIT")
        found = {name: rows for name, rows in found.items() if rows}
        if not found:
            return False
        name = f"{state.next_number:06d}-{self.token}"
        files = {table: self._write(name, table, rows) for table, rows in found.items()}
        manifest = {"format": FORMAT, "tables": files}
        self.files.write(f"{name}.json", orjson.dumps(manifest))
        db.kill_point("published")
        state.marks |= {table: rows[-1][0] for table, rows in found.items()}
        state.segments.append(name)
        con.execute("BEGIN IMMEDIATE")
        state.keep(con)
        con.execute("COMMIT")
        return any(len(rows) == PAGE for rows in found.values())

    def _write(self, name: str, table: str, rows: list[tuple[Any, ...]]) -> dict[str, Any]:
        """Write a table's rows. Returns: what the manifest says of the file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema(TABLES[table])
        columns = list(zip(*rows, strict=True))[1:]
        typed = zip(columns, schema.types, strict=True)
        arrays = [arrow_array(column, kind) for column, kind in typed]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(arrays, schema=schema), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        file = f"{name}-{table}.parquet"
        self.files.write(file, data)
        self.bytes += len(data)
        self.rows += len(rows)
        return {
            "file": file,
            "rows": len(rows),
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


@dataclass(slots=True)
class RestoreReport:
    """What a restore inserted: `rows` by table. `damaged` has the segments that were left out,
    each with the reason; their questions are asked again.
    """

    rows: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def restore(ledger: Path, files: SharedFiles) -> RestoreReport:
    """Bring a ledger up to the segments that are published, made where absent. Its own rows that
    are not published yet are published first.

    Raises: StoreError when the ledger cannot be written, or a manifest is of a newer version.
    """
    report = RestoreReport()
    names = published(files)
    if ledger.exists() and names:
        with closing(db.connect(ledger)) as con:
            known = PublishedState.of(con).segments
        if set(names) - set(known):
            Publisher(ledger, files).publish()
            names = published(files)
    if not names:
        return report
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with closing(db.create(ledger)) as con, db.translate_errors(ledger):
        state = PublishedState.of(con)
        for name in names:
            if name not in state.segments:
                _restore_segment(con, files, name, state, report)
    return report


def published(files: SharedFiles) -> list[str]:
    """The segments that are published, in their order."""
    return [name.removesuffix(".json") for name in files.names() if name.endswith(".json")]


def _restore_segment(
    con: sqlite3.Connection,
    files: SharedFiles,
    name: str,
    state: PublishedState,
    report: RestoreReport,
) -> None:
    """Insert the rows of one segment, and record that the ledger holds it."""
    try:
        tables = _read_segment(files, name)
    except (OSError, ValueError) as error:
        warn(
            f"{files.address}/{name}: damaged ({error}). It is left out, and its questions are asked again"
        )
        report.damaged.append(f"{name}: {error}")
        return
    con.execute("BEGIN IMMEDIATE")
    try:
        insert_segment(con, tables, report)
        state.segments.append(name)
        for table in TABLES:
            state.marks[table] = next_id(con, table) - 1
        state.keep(con)
        con.execute("COMMIT")
    except BaseException:
        con.execute("ROLLBACK")
        raise


def segments_of(files: SharedFiles, report: RestoreReport) -> Iterator[dict[str, pa.Table]]:
    """The segments that are published in their order; damaged ones are told and left out."""
    for name in published(files):
        try:
            tables = _read_segment(files, name)
        except (OSError, ValueError) as error:
            warn(f"{files.address}/{name}: damaged ({error}). It is left out")
            report.damaged.append(f"{name}: {error}")
            continue
        yield tables


def _read_segment(files: SharedFiles, name: str) -> dict[str, pa.Table]:
    """The tables of a segment, their checksums checked.

    Raises: StoreError when a newer version wrote it; OSError or ValueError when it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = orjson.loads(files.read(f"{name}.json"))
    if manifest["format"] > FORMAT:
        raise StoreError(
            f"{files.address}/{name}.json: written by a newer version of Prefab (format "
            f"{manifest['format']}; this one reads up to {FORMAT}). Use the same version everywhere"
        )
    tables = {}
    for table, told in manifest["tables"].items():
        data = files.read(told["file"])
        if hashlib.sha256(data).hexdigest() != told["sha256"]:
            raise ValueError(f"the checksum of {told['file']} is wrong")
        tables[table] = pq.read_table(pa.BufferReader(data))
    return tables


def insert_segment(
    con: sqlite3.Connection, tables: dict[str, pa.Table], report: RestoreReport
) -> None:
    """Insert the rows of a segment that are not there yet, inside an open transaction."""
    names = db.Names()
    for table in TABLES:
        if table in tables:
            rows = list(zip(*tables[table].to_pydict().values(), strict=True))
            before = next_id(con, table)
            _INSERT[table](con, rows, names)
            added = next_id(con, table) - before
            report.rows[table] = report.rows.get(table, 0) + added


Rows = list[tuple[Any, ...]]
Insert = Callable[[sqlite3.Connection, Rows, db.Names], None]


def _insert_new(table: str) -> Insert:
    """Insert rows of a table with a unique column, or without any."""

    def insert(con: sqlite3.Connection, rows: Rows, _: db.Names) -> None:
        flat: list[Any] = []
        for place, values in enumerate(rows, next_id(con, table)):
            row = (place, *values)
            flat += row
            flat.append(row_crc(row))
        width = len(rows[0]) + 2
        db.insert_rows(con, f"INSERT OR IGNORE INTO {table}", width, flat)

    return insert


def _insert_prompts(con: sqlite3.Connection, rows: Rows, names: db.Names) -> None:
    """Prompts, and the splits that they stand for."""
    _insert_new("prompts")(con, rows, names)
    for prompt, _, _, _, group, split, _ in rows:
        place = f"prompt {prompt}" if group is None else f"group {group}"
        crc = row_crc((place, split))
        con.execute("INSERT OR IGNORE INTO splits VALUES (?, ?, ?)", (place, split, crc))


def _insert_calls(con: sqlite3.Connection, rows: Rows, names: db.Names) -> None:
    """Calls with their requests; the first answer under a key, limit and attempt stands."""
    sql = "SELECT key, limit_tokens, attempt FROM calls WHERE key IN"
    known = {row for some in db.select_in(con, sql, [row[0] for row in rows]) for row in some}
    ids = names.ids(con, {name for row in rows for name in (row[1], row[11]) if name is not None})
    calls: list[Any] = []
    requests: list[Any] = []
    place = next_id(con, "calls")
    for key, model, *answer, limit, at, logps, text, attempt, replica, request in rows:
        if (key, limit, attempt) in known:
            continue
        known.add((key, limit, attempt))
        server = None if replica is None else ids[replica]
        row = (place, key, ids[model], *answer, limit, at, logps, text, attempt, server)
        calls += row
        calls.append(row_crc(row))
        requests += (place, request)
        place += 1
    db.insert_rows(con, "INSERT INTO calls", 14, calls)
    db.insert_rows(con, "INSERT INTO requests", 2, requests)


def _insert_uses(con: sqlite3.Connection, rows: Rows, names: db.Names) -> None:
    ids = names.ids(con, {row[place] for row in rows for place in (1, 2, 6, 7, 8)})
    flat: list[Any] = []
    for place, row in enumerate(rows, next_id(con, "uses")):
        run, prompt, role, sample, other, round, principle, judge, order, repeat, key = row
        at = (ids[prompt], ids[role], sample, other, round, ids[principle], ids[judge], ids[order])
        values = (place, run, *at, repeat, key)
        flat += values
        flat.append(row_crc(values))
    db.insert_rows(con, "INSERT OR IGNORE INTO uses", 13, flat)


def _insert_forgets(con: sqlite3.Connection, rows: Rows, _: db.Names) -> None:
    for reason, filters, undoes_at, at in rows:
        if _forget_at(con, at) is None:
            add_row(con, "forgets", reason, filters, _forget_at(con, undoes_at), at)


def _insert_forgotten(con: sqlite3.Connection, rows: Rows, _: db.Names) -> None:
    for at, key, limit, attempt in rows:
        call = con.execute(
            "SELECT id FROM calls WHERE key = ? AND limit_tokens = ? AND attempt = ?",
            (key, limit, attempt),
        ).fetchone()
        row = (_forget_at(con, at), call[0] if call else None)
        sql = "SELECT 1 FROM forgotten WHERE forget = ? AND call = ?"
        if None not in row and not con.execute(sql, row).fetchone():
            add_row(con, "forgotten", *row)


def _forget_at(con: sqlite3.Connection, at: float | None) -> int | None:
    row = con.execute("SELECT id FROM forgets WHERE at = ?", (at,)).fetchone()
    return row[0] if row else None


_INSERT: dict[str, Insert] = {
    "rubrics": _insert_new("rubrics"),
    "prompts": _insert_prompts,
    "calls": _insert_calls,
    "uses": _insert_uses,
    "failures": _insert_new("failures"),
    "evals": _insert_new("evals"),
    "forgets": _insert_forgets,
    "forgotten": _insert_forgotten,
}
