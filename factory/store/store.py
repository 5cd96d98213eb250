"""`prefab.duckdb`, the preference store: opening it, its versions, inserting into it, asking it.

It is open only while it is being filled or read, because one program that holds a DuckDB file for
writing keeps every other one out. What fills it is `pipelines/store/fill.py`; its tables are
`schema.sql`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from prefab.factory.errors import ConfigError, StoreError
from prefab.factory.keys import digest

if TYPE_CHECKING:
    import duckdb
    import polars

FILE = "prefab.duckdb"
SCHEMA = Path(__file__).with_name("schema.sql")
# 144 MB hold every batch; the automatic checkpoint at 16 MiB halves the speed, one at 2 GB costs
# 340 MB a million rows.
SETTINGS = {
    "memory_limit": "144MB",
    "threads": 1,
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
    "lock_configuration": True,
}
DERIVED = ("samples", "critiques", "scores", "rankings", "verdicts", "preferences", "strengths")
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


def schema_version() -> str:
    """The schema's version is its text: a change of columns or views makes the store anew."""
    return digest(SCHEMA.read_text(encoding="utf-8"))


@contextmanager
def opened(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """The store, open for writing and closed at the end; made empty, with its tables, where absent.

    Raises: HeldError when another program has it open, StoreError when it is damaged.
    """
    con = _connect(folder, read_only=False)
    try:
        if con.execute(
            "SELECT count(*) FROM duckdb_tables() WHERE table_name = 'meta'"
        ).fetchall() == [(0,)]:
            con.execute(f"BEGIN; {SCHEMA.read_text(encoding='utf-8')}; COMMIT")
        with _told(folder / FILE):
            yield con
    finally:
        con.close()


def read_frame(
    folder: Path, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()
) -> polars.DataFrame:
    """The rows of a query over the store as it lies, read-only (`prefab.pipelines.store.fill.query`
    catches up first). Of named parameters (`$name`) those are taken that the query names.

    Raises: StoreError when there is no store or it is held, ConfigError when the query is wrong or
    no single SELECT.
    """
    import duckdb

    if not (Path(folder) / FILE).exists():
        raise StoreError(
            f"{Path(folder) / FILE}: no store here yet. `prefab store rebuild` makes it from the ledger"
        )
    con = _connect(Path(folder), read_only=True)
    try:
        _refuse_all_but_select(con, sql)
        if isinstance(parameters, Mapping):
            named = {name for one in con.extract_statements(sql) for name in one.named_parameters}
            parameters = {name: parameters[name] for name in named}
        result = con.sql(sql, params=parameters) if parameters else con.sql(sql)
        frame: polars.DataFrame = result.pl()
        return frame
    except duckdb.PermissionException as error:
        raise ConfigError(
            f"{str(error).splitlines()[0]}. A query reads the tables of the store only. {READ_ONLY}"
        ) from error
    except duckdb.Error as error:
        raise ConfigError(f"{error}") from error
    finally:
        con.close()


# What a SELECT may not hold: since DuckDB 2.0 a WITH clause takes COPY, INSERT, UPDATE and DELETE,
# and the guard lets a query write the store's own files. The function would run such a statement
# from a text.
_WRITES = re.compile(
    r'"type":"(\w+)_QUERY_NODE"|"function_name":"(json_execute_serialized_sql)"', re.IGNORECASE
)
_EXPLAIN = re.compile(
    r"\s*EXPLAIN\b(\s+ANALYZE\b)?(\s*\(\s*(ANALYZE|FORMAT)\b[^)]*\))?", re.IGNORECASE
)
READ_ONLY = 'Write one SELECT, DESCRIBE, SHOW or SUMMARIZE; for a file, use `prefab sql "SELECT ..." --json > FILE`'


def _refuse_all_but_select(con: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Let one SELECT pass, and what DuckDB takes for one (DESCRIBE, SHOW, SUMMARIZE), or the
    EXPLAIN of one.

    Raises: ConfigError for any other statement, for several and for none, duckdb.Error for a wrong
    one.
    """
    import duckdb

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


def _connect(folder: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
    import duckdb

    file = Path(folder) / FILE
    with _told(file):
        if read_only:
            return duckdb.connect(str(file), read_only=True, config={**SETTINGS, **GUARD})
        con = duckdb.connect(str(file), config={**SETTINGS, "temp_directory": f"{file}.tmp"})
        con.execute("SET enable_progress_bar=false")
        return con


@contextmanager
def _told(file: Path) -> Iterator[None]:
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        text = str(error)
        if (
            "lock" in text and isinstance(error, duckdb.IOException)
        ) or "different configuration" in text:
            holder = re.search(r"PID (\d+)", text)
            who = f"process {holder.group(1)}" if holder else "another program"
            raise HeldError(f"{file}: {who} has it open. Close it there, then try again") from error
        if "No space left" in text or "disk is full" in text.lower():
            raise StoreError(
                f"{file}: the disk is full. The ledger is safe: free some space, then run the same "
                "command again"
            ) from error
        if isinstance(
            error,
            (
                duckdb.IOException,
                duckdb.SerializationException,
                duckdb.FatalException,
                duckdb.InternalException,
            ),
        ):
            raise StoreError(
                f"{file}: damaged or unreadable ({text.splitlines()[0][:200]}). `prefab store rebuild` "
                "makes it anew from the ledger; nothing is lost"
            ) from error
        raise


def delete(folder: Path) -> None:
    """Remove the store's files; they can be made again from the ledger."""
    for name in (FILE, FILE + ".wal"):
        (Path(folder) / name).unlink(missing_ok=True)


def insert(con: duckdb.DuckDBPyConnection, table: str, rows: Sequence[Sequence[Any]]) -> None:
    """Append rows, given in the order of the table's columns, as one Arrow batch."""
    if not rows:
        return
    import pyarrow as pa

    schema = con.sql(f"SELECT * FROM {table} LIMIT 0").to_arrow_table().schema
    columns = zip(zip(*rows, strict=True), schema.types, strict=True)
    batch = pa.table([pa.array(column, kind) for column, kind in columns], schema=schema)
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
    rows = con.execute("SELECT max(id) FROM watermarks WHERE source = ?", [source]).fetchall()
    return rows[0][0] or 0


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
