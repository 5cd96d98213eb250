"""`prefab.duckdb`, the preference store: opening it, its versions, inserting into it, asking it.

It is open only while it is being filled or read, because one program that holds a DuckDB file for
writing keeps every other one out. What fills it is `pipelines/store/fill.py`; its tables are
`schema.sql`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import orjson

from prefab.factory.arrow import arrow_array
from prefab.factory.errors import ConfigError, StoreError
from prefab.factory.keys import digest
from prefab.factory.store.shared import VIEWED, SharedFolder, is_shared

if TYPE_CHECKING:
    import duckdb
    import polars

T = TypeVar("T")
FILE = "prefab.duckdb"
WAL = FILE + ".wal"
MARKS = (
    "prefab.marks"  # how far the last filling came, readable while another program holds the store
)
SCHEMA = Path(__file__).with_name("schema.sql")
# MB that DuckDB may take at first. They hold every batch of answers of usual length. DuckDB reads
# and writes 2,048 values of a column at once, so answers of 100 kB each need 600 MB: see
# `with_memory`.
MEMORY_MB = 144
FEW_ROWS = 32  # up to here rows are inserted as lists: 0.1 ms more than one Arrow batch
# the automatic checkpoint at 16 MiB halves the speed, one at 2 GB costs 340 MB a million rows
SETTINGS = {
    "checkpoint_threshold": "64MB",
    "preserve_insertion_order": False,
}
# A query reads the store and no other file: without these, `COPY (SELECT 1) TO
# 'store/ledger.sqlite'` destroys the ledger through a read-only connection. (`temp_directory` is
# left to DuckDB, which takes prefab.duckdb.tmp: it may not be set here.)
GUARD = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}
DERIVED = (
    *("samples", "critiques", "scores", "steps", "rankings", "verdicts", "preferences"),
    "strengths",
)
TABLES = (
    "runs",
    "models",
    "constitutions",
    "principles",
    "prompts",
    *DERIVED,
    "calls",
    "failures",
    "human_labels",
    "evals",
    "marks",
)


class HeldError(StoreError):
    """Another program has the DuckDB file open."""


class DamagedError(StoreError):
    """The DuckDB file, or its write-ahead log, is damaged. `what` says which and how."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"{what}. `prefab store rebuild` makes it anew from the ledger; nothing is lost"
        )


class DamagedRowsError(DamagedError):
    """A file of a shard's rows, in a store in shards, is damaged or missing."""

    def __init__(self, file: str) -> None:
        self.what = f"{file}: damaged or missing"
        StoreError.__init__(
            self,
            f"{self.what}. Remove it: the same `prefab run` makes the rows of its shard anew, and asks "
            "nothing",
        )


class NewerError(StoreError):
    """A newer version of DuckDB wrote the file."""


class MemoryLimitError(StoreError):
    """DuckDB needs more memory than it was given."""


def schema_version() -> str:
    """The schema's version is its text: a change of columns or views makes the store anew."""
    return digest(SCHEMA.read_text(encoding="utf-8"))


@contextmanager
def opened(folder: Path, memory_mb: int = MEMORY_MB) -> Iterator[duckdb.DuckDBPyConnection]:
    """The store, open for writing and closed at the end; made empty, with its tables, where absent.

    Raises: HeldError when another program has it open, DamagedError when it is damaged,
    MemoryLimitError when `memory_mb` are too little.
    """
    _close_kept(folder)
    con = _connect(folder, False, memory_mb)
    try:
        with translate_errors(folder / FILE):
            if not _has_tables(con):
                con.execute(f"BEGIN; {SCHEMA.read_text(encoding='utf-8')}; COMMIT")
            yield con
    finally:
        con.close()


def _has_tables(con: duckdb.DuckDBPyConnection) -> bool:
    """Whether the store's tables are there. A table that cannot be created tells it in 1 ms; the
    list of all tables takes DuckDB 15 ms in each file that was just opened.
    """
    import duckdb

    con.execute("BEGIN")
    try:
        con.execute("CREATE TABLE meta (name VARCHAR)")
        return False
    except duckdb.CatalogException:
        return True
    finally:
        con.execute("ROLLBACK")


def with_memory(folder: Path, work: Callable[[int], T]) -> T:
    """The result of `work(megabytes)`. It is called with the memory that the store needed before,
    and again with twice as much while it raises MemoryLimitError.

    Raises: StoreError when it needs more than the machine has.
    """
    memory = int(read_marks(folder).get("memory_mb", MEMORY_MB))
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    while True:
        try:
            return work(memory)
        except MemoryLimitError as error:
            memory *= 2
            if memory > most:
                raise StoreError(
                    f"{folder / FILE}: its texts need more memory than this machine has "
                    f"({most:,} MB). Everything is in the ledger: use a machine with more memory"
                ) from error
            write_marks(folder, {**read_marks(folder), "memory_mb": memory})


def read_marks(folder: Path) -> dict[str, Any]:
    """What the last filling left beside the store; nothing where it cannot be read."""
    try:
        marks = orjson.loads((folder / MARKS).read_bytes())
    except (OSError, ValueError):
        return {}
    return marks if isinstance(marks, dict) else {}


def write_marks(folder: Path, marks: Mapping[str, Any]) -> None:
    """Write what the next command reads before it opens the store. Where that fails (a full disk),
    the next command opens the store.
    """
    with suppress(OSError):
        (folder / MARKS).write_bytes(orjson.dumps(marks))


def read_frame(
    folder: Path, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()
) -> polars.DataFrame:
    """The rows of a query over the store as it lies, read-only (`prefab.pipelines.store.fill.query`
    catches up first). Of named parameters (`$name`) those are taken that the query names.

    Raises: StoreError when there is no store or it is held, ConfigError when the query is wrong or
    no single SELECT.
    """
    return read_store(Path(folder), lambda read: read(sql, parameters))


class Read(Protocol):
    """Runs a query over an open store, as `read_frame`."""

    def __call__(
        self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = (), /
    ) -> polars.DataFrame:
        """The rows of a query."""


def read_store(folder: Path, work: Callable[[Read], T]) -> T:
    """The result of `work(read)`, whose queries all see the same state of the store as it lies. It
    is called again with more memory while DuckDB needs more.

    Raises: StoreError when there is no store or it is held.
    """
    if not (folder / FILE).exists():
        raise StoreError(
            f"{folder / FILE}: no store here yet. `prefab store rebuild` makes it from the ledger"
        )

    def within(memory_mb: int) -> T:
        con, well = _reading(folder, memory_mb), False
        try:
            result = work(_OpenStore(con, folder))
            well = True
            return result
        finally:
            con.close()
            if not well:
                _close_kept(folder)

    return with_memory(folder, within)


# by folder: the connection that reads within a block of `one_connection`, and its memory in MB
_KEPT: ContextVar[dict[Path, tuple[duckdb.DuckDBPyConnection, int]] | None] = ContextVar(
    "kept", default=None
)


@contextmanager
def one_connection() -> Iterator[None]:
    """Within the block (or the function, as a decorator) a store that is read stays open: DuckDB
    takes longer to open a file than to answer most queries. What opens the store for writing closes
    it, and the next read opens it again.
    """
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set({})
    try:
        yield
    finally:
        for folder in list(_KEPT.get() or ()):
            _close_kept(folder)
        _KEPT.reset(token)


def _reading(folder: Path, memory_mb: int) -> duckdb.DuckDBPyConnection:
    """A connection with views of its own: of the database that the block has open with this memory,
    or outside a block of one that is opened for it.
    """
    kept, place = _KEPT.get(), Path(folder).resolve()
    if kept is None:
        return _connect(folder, True, memory_mb)
    if kept.get(place, (None, 0))[1] != memory_mb:
        _close_kept(folder)
        kept[place] = _connect(folder, True, memory_mb), memory_mb
    return kept[place][0].cursor()


def _close_kept(folder: Path) -> None:
    if found := (_KEPT.get() or {}).pop(Path(folder).resolve(), None):
        found[0].close()


class _OpenStore:
    """`Read` over an open connection."""

    def __init__(self, con: duckdb.DuckDBPyConnection, folder: Path) -> None:
        self.con, self.folder = con, folder
        self.in_shard = False

    def __call__(
        self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()
    ) -> polars.DataFrame:
        import duckdb

        con = self.con
        try:
            _refuse_all_but_select(con, sql)
            if isinstance(parameters, Mapping):
                statements = con.extract_statements(sql)
                named = {name for one in statements for name in one.named_parameters}
                parameters = {name: parameters[name] for name in named}
            with translate_errors(self.folder / FILE):
                result = con.sql(sql, params=parameters) if parameters else con.sql(sql)
                frame: polars.DataFrame = result.pl()
            return frame.drop("rowid", strict=False) if self.in_shard else frame
        except duckdb.PermissionException as error:
            told = str(error).splitlines()[0]
            raise ConfigError(
                f"{told}. A query reads the tables of the store only. {READ_ONLY}"
            ) from error
        except duckdb.Error as error:
            raise ConfigError(f"{error}") from error

    def each_shard(self, together: int) -> Iterator[None]:
        """As the function `each_shard`."""
        if not is_shared(self.folder):
            yield
            return
        shared = SharedFolder(self.folder)
        found = [files for state in shared.states() if (files := shared.rows_files(state))]
        try:
            for first in range(0, len(found), together):
                some = found[first : first + together]
                for table in VIEWED:
                    paths = [files[table].resolve() for files in some if table in files]
                    self.con.execute(_view_of_shards(table, paths, row_ids=together == 1))
                self.in_shard = together == 1
                yield
        finally:
            self.in_shard = False
            for table in VIEWED:
                self.con.execute(f"DROP VIEW IF EXISTS temp.{table}")


def _view_of_shards(table: str, files: Sequence[Path], row_ids: bool) -> str:
    """A statement that lets the name of a table stand for its rows in these files; without a file,
    for no rows. `row_ids`: with their numbers in the one file as `rowid`.
    """
    names = ", ".join("'" + str(file).replace("'", "''") + "'" for file in files)
    rows = f"read_parquet([{names}])" if files else f"{Path(FILE).stem}.main.{table} WHERE false"
    ids = (", file_row_number AS rowid" if files else ", 0::BIGINT AS rowid") if row_ids else ""
    return f"CREATE OR REPLACE TEMP VIEW {table} AS SELECT *{ids} FROM {rows}"


def each_shard(read: Read, together: int = 1) -> Iterator[None]:
    """Once for each shard of a store in shards, or for so many `together`: their rows alone are
    then in the tables, those of one shard with row ids, which views of many files do not have. Once
    for a store that is not in shards.
    """
    return read.each_shard(together) if isinstance(read, _OpenStore) else iter((None,))


# What a SELECT may not hold: since DuckDB 2.0 a WITH clause takes COPY, INSERT, UPDATE and DELETE,
# and the guard lets a query write the store's own files. The function would run such a statement
# from a text.
_WRITES = re.compile(
    r'"type":"(\w+)_QUERY_NODE"|"function_name":"(json_execute_serialized_sql)"', re.IGNORECASE
)
_EXPLAIN = re.compile(
    r"\s*EXPLAIN\b(\s+ANALYZE\b)?(\s*\(\s*(ANALYZE|FORMAT)\b[^)]*\))?", re.IGNORECASE
)
# the parser takes 10 kB of memory for each level of parentheses
LONGEST_QUERY, MOST_PARENTHESES = 100_000, 5_000
READ_ONLY = 'Write one SELECT, DESCRIBE, SHOW or SUMMARIZE; for a file, use `prefab sql "SELECT ..." --json > FILE`'


# queries that were let through before, which depends on their text alone
_PASSED: set[str] = set()
MOST_PASSED, LONGEST_PASSED = 500, 10_000


def _refuse_all_but_select(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Let one SELECT pass, and what DuckDB takes for one (DESCRIBE, SHOW, SUMMARIZE), or the
    EXPLAIN of one.

    Raises: ConfigError for any other statement, for several and for none, duckdb.Error for a wrong
    one.
    """
    import duckdb

    if sql in _PASSED:
        return
    if len(sql) > LONGEST_QUERY or sql.count("(") > MOST_PARENTHESES:
        raise ConfigError(
            f"a query has at most {LONGEST_QUERY:,} characters and {MOST_PARENTHESES:,} parentheses"
        )
    statements = con.extract_statements(sql)
    if len(statements) != 1:
        raise ConfigError(
            f"there are {len(statements)} statements in this query, and it takes one. {READ_ONLY}"
        )
    kind = statements[0].type
    if kind == duckdb.StatementType.MULTI:
        raise ConfigError(
            "a PIVOT must name its values, such as PIVOT t ON c IN ('a', 'b'). The store is read-only"
        )
    explained = kind == duckdb.StatementType.EXPLAIN
    if not explained and kind != duckdb.StatementType.SELECT:
        raise ConfigError(
            f"a statement of the kind {kind.name} is refused: the store is read-only. {READ_ONLY}"
        )
    body = _EXPLAIN.sub("", sql, count=1) if explained else sql
    tree = con.execute("SELECT json_serialize_sql(?::VARCHAR)", [body]).fetchall()[0][0]
    if tree.startswith('{"error":true'):
        raise ConfigError(
            f"only a SELECT can be {'explained' if explained else 'asked'} here: the store is read-only. "
            f"{READ_ONLY}"
        )
    if found := _WRITES.search(tree):
        raise ConfigError(
            f"{found[1] or found[2]} within a SELECT is refused: the store is read-only. {READ_ONLY}"
        )
    if len(_PASSED) < MOST_PASSED and len(sql) < LONGEST_PASSED:
        _PASSED.add(sql)


def read_only(folder: Path, memory_mb: int, threads: int) -> duckdb.DuckDBPyConnection:
    """A connection that only reads the store, for a program that asks many questions.

    Raises: HeldError, DamagedError, NewerError or MemoryLimitError.
    """
    return _connect(folder, True, memory_mb, threads)


def _connect(
    folder: Path, read_only: bool, memory_mb: int, threads: int = 1
) -> duckdb.DuckDBPyConnection:
    import duckdb

    file = Path(folder) / FILE
    check_header(file)
    settings: dict[str, Any] = {**SETTINGS, "memory_limit": f"{memory_mb}MB", "threads": threads}
    with translate_errors(file):
        guard: dict[str, Any] = {**GUARD}
        if shared := is_shared(file.parent):  # the files of its shards can be read, and no others
            del guard["enable_external_access"]
        more = guard if read_only else {"temp_directory": f"{file}.tmp"}
        con = duckdb.connect(str(file), read_only=read_only, config={**settings, **more})
        # this process may read the store already: its connections share one configuration
        if con.execute("SELECT current_setting('lock_configuration')").fetchall() == [(False,)]:
            con.execute("SET enable_progress_bar=false")
            if read_only and shared:
                tables = str(file.parent.resolve() / "tables").replace("'", "''")
                con.execute(f"SET allowed_directories=['{tables}/']")
                con.execute("SET enable_external_access=false")
            if read_only:
                con.execute("SET lock_configuration=true")
        return con


HEADERS = 3 * 4096  # bytes of a DuckDB file's headers: shorter, it was cut off while it was made
MAGIC = slice(8, 12)  # where the word DUCK stands


def check_header(file: Path) -> None:
    """See that a file is DuckDB's before DuckDB opens it: given a file of SQLite, DuckDB fetches an
    extension from the network.

    Raises: DamagedError for a file that was never finished, StoreError for one of another program.
    """
    try:
        with open(file, "rb") as opened_file:
            head = opened_file.read(HEADERS)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{file}: cannot be read ({error.strerror})") from error
    if head[MAGIC] != b"DUCK" and head.strip(b"\0"):
        what = "a SQLite database" if head.startswith(b"SQLite format 3") else "of another program"
        raise StoreError(
            f"{file} is no DuckDB file: it is {what}. Move it to another place; the store is then "
            "made from the ledger"
        )
    if len(head) < HEADERS or head[MAGIC] != b"DUCK":
        raise DamagedError(f"{file} was not finished when it was made")


_MEMORY = re.compile(r"Out of Memory|failed to (pin|allocate)|could not allocate", re.IGNORECASE)
_CORRUPT = re.compile("Corrupt (database|WAL) file|Failure while replaying WAL")
_ROWS = re.compile(r"/[^'\"]+/tables/\w+/[^'\"]+\.parquet")
_NO_SPACE = re.compile(r"No space left|disk is full|File too large|Disk quota", re.IGNORECASE)
_NOT_WRITABLE = re.compile(r"Permission denied|Read-only file system|not permitted", re.IGNORECASE)
_SYSTEM = re.compile(
    r"Too many open files|Cannot open file|Could not (open|create|write|sync|remove|move)|"
    r"Failed to (create|open|write|delete)|Input/output error",
    re.IGNORECASE,
)


@contextmanager
def translate_errors(file: Path) -> Iterator[None]:
    """Turn DuckDB's errors into StoreErrors that say what happened and how to mend it; those of a
    statement stay.
    """
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        told = _told(file, error)
        if told is None:
            raise
        raise told from error


def _told(file: Path, error: duckdb.Error) -> StoreError | None:
    """The error as one that a user can mend; None for an error of the statement."""
    import duckdb

    text = str(error)
    first = text.splitlines()[0][:300]
    if told := _of_the_system(file, error, text):
        return told
    if found := _ROWS.search(first):
        return DamagedRowsError(found[0])
    damaging = (
        duckdb.IOException,
        duckdb.SerializationException,
        duckdb.FatalException,
        duckdb.InternalException,
    )
    if isinstance(error, damaging) or _CORRUPT.search(first):
        return DamagedError(f"{file}: damaged ({first})")
    return None


def _of_the_system(file: Path, error: duckdb.Error, text: str) -> StoreError | None:
    """What another program, the memory, the disk or the version of DuckDB has to do with an
    error.
    """
    import duckdb

    first = text.splitlines()[0][:300]
    if isinstance(error, duckdb.OutOfMemoryException) or _MEMORY.search(first):
        return MemoryLimitError(f"{file}: {first}")
    if _NO_SPACE.search(text):
        return StoreError(
            f"{file}: the disk is full. The ledger is safe: free some space, then run the same "
            "command again"
        )
    if (
        "lock" in text and isinstance(error, duckdb.IOException)
    ) or "different configuration" in text:
        holder = re.search(r"PID (\d+)", text)
        who = f"process {holder.group(1)}" if holder else "another program"
        return HeldError(f"{file}: {who} has it open. Close it there, then try again")
    if _NOT_WRITABLE.search(text):
        return StoreError(f"{file}: cannot be written ({first})")
    if "version number" in text or "newer version" in text or "storage version" in text:
        return NewerError(
            f"{file}: a newer version of DuckDB wrote it ({first}). Update DuckDB, or make it anew "
            "from the ledger with `prefab store rebuild`"
        )
    if isinstance(error, duckdb.IOException) and _SYSTEM.search(first):
        return StoreError(f"{file}: {first}")
    return None


def set_aside(folder: Path) -> list[Path]:
    """Give the store's files other names, so that it is made anew. Files that hold nothing yet, or
    no more than a header, are removed.

    Returns: The new names.
    """
    kept = []
    number = next(n for n in range(1, 10**6) if not (folder / f"{FILE}.damaged-{n}").exists())
    for name in (FILE, WAL):
        path = folder / name
        if path.exists() and path.stat().st_size >= HEADERS:
            kept.append(path.rename(folder / name.replace(FILE, f"{FILE}.damaged-{number}")))
        else:
            path.unlink(missing_ok=True)
    return kept


def delete(folder: Path) -> None:
    """Remove the store's files; they can be made again from the ledger."""
    _close_kept(folder)
    for name in (FILE, WAL):
        (Path(folder) / name).unlink(missing_ok=True)


_VALUES: dict[str, str] = {}  # by table: the columns of a few rows, as lists of their types


def insert(con: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Sequence[Any]]) -> None:
    """Append rows, given in the order of the table's columns: as one Arrow batch, or, where they
    are few, as lists: Arrow takes 0.1 s to import.
    """
    if not rows:
        return
    if len(rows) <= FEW_ROWS:
        if table not in _VALUES:
            types = con.sql(f"SELECT * FROM {table} LIMIT 0").types
            _VALUES[table] = ", ".join(f"unnest(?::{kind}[])" for kind in types)
        lists = [*map(list, zip(*rows, strict=True))]
        con.execute(f"INSERT INTO {table} SELECT {_VALUES[table]}", lists)
        return
    import pyarrow as pa

    schema = con.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table().schema
    columns = zip(zip(*rows, strict=True), schema.types, strict=True)
    batch = pa.table([arrow_array(column, kind) for column, kind in columns], schema=schema)
    con.register("batch", batch)
    con.execute(f"INSERT INTO {table} SELECT * FROM batch")
    con.unregister("batch")


def get_meta(con: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """What made this store: versions of schema, parsers and aggregation, and which ledger."""
    return {
        name: orjson.loads(value)
        for name, value in con.execute("SELECT name, value FROM meta").fetchall()
    }


def set_meta(con: duckdb.DuckDBPyConnection, values: dict[str, Any]) -> None:
    """Record what makes this store."""
    con.execute("DELETE FROM meta")
    insert(con, "meta", [(name, orjson.dumps(value).decode()) for name, value in values.items()])


def watermark(con: duckdb.DuckDBPyConnection, source: str) -> int:
    """The last rowid of the ledger's table `source` that is in the store."""
    rows = con.execute("SELECT id FROM watermarks WHERE source = ?", [source]).fetchall()
    return rows[0][0] if rows else 0


def set_watermark(con: duckdb.DuckDBPyConnection, source: str, rowid: int) -> None:
    """Set a watermark, in the transaction that inserts the rows up to it."""
    con.execute("DELETE FROM watermarks WHERE source = ?", [source])
    con.execute("INSERT INTO watermarks VALUES (?, ?)", [source, rowid])


@contextmanager
def transaction(con: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Commit what is done inside, or none of it."""
    con.execute("BEGIN")
    try:
        yield
    except BaseException:
        con.execute("ROLLBACK")
        raise
    con.execute("COMMIT")
