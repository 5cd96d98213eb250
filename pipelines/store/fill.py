"""Filling the preference store from the ledger: catching up in bounded batches, or making it anew.

Plain tables (calls, prompts, failures, labels, evaluations) are read by rowid past a watermark. For
the derived ones the new uses say which prompts of which runs must be derived; those go into the
table `work` in the transaction that moves the watermark, and leave it in the transaction that
inserts their rows. So a kill at any moment costs one batch, no row is twice or missing, and memory
does not grow with the store. Batches are bounded by bytes as well as by rows. What is longer than
the store takes, or cannot be read, becomes a row of `failures` or an unscored one.
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from prefab.factory.console import warn
from prefab.factory.errors import ConfigError, StoreError, failure_kind, reason_of
from prefab.factory.keys import digest
from prefab.factory.ledger import db
from prefab.factory.ledger import records as recorded
from prefab.factory.spec.constitution import (
    constitution_digest,
    parse_constitution,
    principle_digest,
)
from prefab.factory.store import store
from prefab.factory.store.shared import is_shared
from prefab.factory.types import LONGEST_TEXT, Completion, Constitution
from prefab.factory.uses import ScoreUse, UseColumns, use_of
from prefab.pipelines.store import catalogue, derive, imports
from prefab.pipelines.store.calibrations import CALIBRATION, Learned
from prefab.pipelines.store.derive import Row
from prefab.pipelines.store.recalibrate import RECALIBRATE, recalibrate
from prefab.pipelines.store.verdicts import RecordedUse, Rules

if TYPE_CHECKING:
    import duckdb
    import polars

T = TypeVar("T")
SOURCES = (  # the ledger's tables that are shown in the store
    "runs",
    "starts",
    "prompts",
    "rubrics",
    "calls",
    "uses",
    "failures",
    "human_labels",
    "imports",
    "evals",
)
FIRST_BATCH = 64  # prompts; later batches are as large as `USES_PAGE` allows
PAGE = 20_000  # rows of a plain table a batch
USES_PAGE = 8_192  # uses a batch of derivation
BATCH_BYTES = 16 << 20  # of texts that are in memory together, and in one transaction
LONGEST_BYTES = (
    4 * LONGEST_TEXT
)  # a longer text is not read: it has more than LONGEST_TEXT characters
TOO_LONG = Completion("-" * (LONGEST_TEXT + 1), "stop")  # stands for an answer that is not read
PATIENCE_S = 2.0  # of a query while another command has the store open
ROW_IDS = "row_ids"  # the mark of a store in shards whose preferences have row ids
CONSTITUTION = "constitution"  # the name under which a run's texts hold it


@dataclass(slots=True)
class FillReport:
    """What a filling did. `behind` counts ledger rows not yet in the store, with `held` saying
    why.
    """

    rows: dict[str, int] = field(default_factory=dict)
    behind: int = 0
    held: str = ""
    rebuilt: str = ""
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, table: str, n: int) -> None:
        """Count inserted rows."""
        self.rows[table] = self.rows.get(table, 0) + n


def fill(folder: str | Path, row_ids: bool = False) -> FillReport:
    """Bring the store up to the ledger. Made anew when absent, of other versions, or not filled
    from this ledger.

    `row_ids`: the preferences are to have row ids. Those of a store in shards have none until they
    were asked for once.

    When another program holds the file nothing is changed, and the report says how far behind the
    store is.
    Raises: StoreError when there is no ledger, or either file is damaged.
    """
    folder, began = Path(folder), time.monotonic()
    report = FillReport()
    row_ids = row_ids or bool(store.read_marks(folder).get(ROW_IDS))
    if is_shared(folder) and os.access(folder, os.W_OK):
        catalogue.update_ledger(folder)
    ledger = db.connect(folder / db.FILE, readonly=True)
    try:
        with db.translate_errors(folder / db.FILE):
            if _is_current(folder, ledger, row_ids):
                return report
            if not os.access(folder, os.W_OK):
                if row_ids:
                    refuse_without_row_ids(folder)
                return _as_it_lies(folder, ledger, report)
            store.with_memory(folder, lambda memory: _fill(folder, ledger, report, memory, row_ids))
    except store.HeldError as error:
        report.held = str(error)
        report.behind = _behind(folder, ledger)
    finally:
        ledger.close()
    report.seconds = time.monotonic() - began
    return report


def refuse_without_row_ids(folder: Path) -> None:
    """Raises: StoreError for a store in shards that cannot be written and whose preferences have no
    row ids.
    """
    if not is_shared(folder) or os.access(folder, os.W_OK):
        return
    if not store.read_marks(folder).get(ROW_IDS):
        raise StoreError(
            f"{folder} cannot be written, and `prefab view` needs to copy the preferences there once. "
            f"Make an ordinary store: prefab store merge {shlex.quote(str(folder))} NEW"
        )


def state_of(folder: Path) -> tuple[bool, str]:
    """Whether the store holds everything that the ledger does, with row ids of the preferences,
    without opening the store, and what the ledger holds as a digest.

    Raises: StoreError when there is no ledger, or it is damaged or of a newer version.
    """
    file = folder / db.FILE
    with closing(db.connect(file, readonly=True)) as ledger, db.translate_errors(file):
        return _is_current(folder, ledger, row_ids=True), _ledger_state(ledger)


def _as_it_lies(folder: Path, ledger: sqlite3.Connection, report: FillReport) -> FillReport:
    """Of a store that cannot be written: how far it is behind, which is told.

    Raises: StoreError when there is nothing that can be read without filling it.
    """
    other = f"{folder} cannot be written. Copy it to a folder that can (`prefab store backup`)"
    if not (folder / store.FILE).exists():
        raise StoreError(f"{folder / store.FILE} is missing, and {other}")
    made_by = store.read_frame(folder, "SELECT name, value FROM meta").rows()
    if {name: orjson.loads(value) for name, value in made_by} != versions(ledger):
        raise StoreError(f"{folder / store.FILE}: made by another version, and {other}")
    report.behind = _behind(folder, ledger)
    if report.behind:
        warn(f"the store is {report.behind:,} ledger rows behind, and {other}")
    return report


def _fill(
    folder: Path, ledger: sqlite3.Connection, report: FillReport, memory_mb: int, row_ids: bool
) -> None:
    """Catch up, with this much memory. Damaged files are set aside and made anew, which is told."""
    try:
        _make_current(folder, ledger, report, memory_mb, row_ids)
    except store.DamagedError as error:
        _set_aside(folder, error)
        report.rebuilt = error.what
        report.rows.clear()
        _make_current(folder, ledger, report, memory_mb, row_ids)


def _set_aside(folder: Path, error: store.DamagedError) -> None:
    """Rename the damaged files, and say so: the next filling makes the store anew. A catalogue of
    shards holds nothing but views, and goes.
    """
    if isinstance(error, store.DamagedRowsError):
        store.delete(folder)
        warn(f"{error.what}. The catalogue is made anew")
        return
    kept = store.set_aside(folder)
    where = f"; the damaged file is kept as {kept[0].name}" if kept else ""
    warn(f"{error.what}. It is made anew from the ledger and nothing is lost{where}")


def _make_current(
    folder: Path, ledger: sqlite3.Connection, report: FillReport, memory_mb: int, row_ids: bool
) -> None:
    with store.opened(folder, memory_mb) as con:
        reason = _why_rebuild(con, ledger)
        if not reason:
            marks = _catch_up(con, folder, ledger, report, row_ids)
    if reason:
        report.rebuilt = reason
        store.delete(folder)
        with store.opened(folder, memory_mb) as con:
            marks = _catch_up(con, folder, ledger, report, row_ids)
    if memory_mb > store.MEMORY_MB:
        marks["memory_mb"] = memory_mb
    store.write_marks(folder, marks)


def rebuild(folder: str | Path) -> FillReport:
    """Delete `prefab.duckdb` and build it again from the ledger. The rows are the same, as sets.

    Args:
        folder: The store.

    Raises:
        HeldError: Another program has the store open.
        StoreError: There is no ledger.
    """
    folder = Path(folder)
    db.connect(folder / db.FILE, readonly=True).close()
    try:
        store.check_header(folder / store.FILE)
    except store.DamagedError:
        pass  # that is what a rebuild is for
    else:
        with suppress(store.DamagedError, store.MemoryLimitError, store.NewerError):
            if (folder / store.FILE).exists():
                with store.opened(folder):
                    pass  # nobody else has it
    store.delete(folder)
    return fill(folder)


def take_rows(folder: Path, catalogue_file: Path) -> None:
    """Make the store of a ledger by copying all rows of a catalogue that shows the same ledger,
    in which no prompt waits for calls.

    Args:
        folder: The folder of the ledger, without a store.
        catalogue_file: The DuckDB file of the catalogue.

    Raises:
        StoreError: There is not enough memory or disk.
    """
    with closing(db.connect(folder / db.FILE, readonly=True)) as ledger:
        store.with_memory(folder, lambda memory: _take_rows(folder, ledger, catalogue_file, memory))


def _take_rows(
    folder: Path, ledger: sqlite3.Connection, catalogue_file: Path, memory_mb: int
) -> None:
    store.delete(folder)
    name = str(catalogue_file).replace("'", "''")
    with store.opened(folder, memory_mb) as con:
        con.execute(f"ATTACH '{name}' AS catalogue (READ_ONLY)")
        for table in store.TABLES:
            con.execute(f"INSERT INTO {table} SELECT * FROM catalogue.{table}")
        store.set_meta(con, versions(ledger))
        for source in SOURCES:
            store.set_watermark(con, source, _last(ledger, source))
        con.execute("DETACH catalogue")


def query(
    folder: str | Path, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()
) -> polars.DataFrame:
    """Query a store with SQL (DuckDB), after new answers in the ledger were added to it.

    Waits a moment while another command holds the store.

    Args:
        folder: The store.
        sql: One SELECT statement; it can read only the tables and views of the store.
        parameters: Values for `?` in the statement.

    Returns:
        The rows as a polars DataFrame.

    Raises:
        HeldError: Another program has the store open, so that it cannot be brought up to date.
        ConfigError: The statement is wrong.
    """
    return read_filled(Path(folder), lambda read: read(sql, parameters))


def read_filled(folder: Path, work: Callable[[store.Read], T]) -> T:
    """The result of `work(read)`, whose queries all see the same state of the store, brought up to
    the ledger first. `work` is called again where DuckDB needs more memory.

    Raises: HeldError as `query`.
    """
    deadline, repaired = time.monotonic() + PATIENCE_S, False
    while True:
        try:
            report = fill(folder)
            if report.held:
                behind = (
                    f". The store is {report.behind:,} ledger rows behind" if report.behind else ""
                )
                raise store.HeldError(f"{report.held}{behind}")
            return store.read_store(folder, work)
        except store.HeldError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        except store.DamagedError as error:
            if repaired:
                raise
            repaired = True
            _set_aside(folder, error)


def versions(ledger: sqlite3.Connection) -> dict[str, Any]:
    """What a store is made by: when any of it differs, the store is made anew."""
    name = ledger.execute("SELECT value FROM meta WHERE name = 'ledger'").fetchone()[0]
    found = {"schema": store.schema_version(), "ledger": name, **derive.VERSIONS}
    if forgets := _last(ledger, "forgets"):
        found["forgets"] = forgets
    if shards := catalogue.state_of_shards(ledger):
        found["shards"] = shards
    return found


def _why_rebuild(con: duckdb.DuckDBPyConnection, ledger: sqlite3.Connection) -> str:
    """Why an open store cannot be caught up; empty where it can, as one without rows."""
    meta, now = store.get_meta(con), versions(ledger)
    changed = sorted(name for name in {*meta, *now} if meta.get(name) != now.get(name))
    if meta and changed:
        return f"made by another {', '.join(changed)}"
    if any(_last(ledger, source) < store.watermark(con, source) for source in ("calls", "uses")):
        return "the ledger is older than the store"
    return ""


def _behind(folder: Path, ledger: sqlite3.Connection) -> int:
    """Rows past the marks that the last filling left beside the store (the store itself cannot be
    read).
    """
    marks = store.read_marks(folder)
    return sum(max(0, _last(ledger, source) - marks.get(source, 0)) for source in ("calls", "uses"))


def _is_current(folder: Path, ledger: sqlite3.Connection, row_ids: bool = False) -> bool:
    """Whether nothing changed since the last filling: neither the ledger, nor the store's file, nor
    the versions. Asked before the store is opened, which takes longer than most queries.
    """
    try:
        marks = store.read_marks(folder)
        same = bool(marks.get("state") == [_ledger_state(ledger), _file_state(folder)])
        return same and (bool(marks.get(ROW_IDS)) or not row_ids or not is_shared(folder))
    except OSError:  # no store
        return False


def _ledger_state(ledger: sqlite3.Connection) -> str:
    """A digest of the versions and of each table's last id: a ledger's tables only grow."""
    return digest(versions(ledger), [_last(ledger, table) for table in SOURCES])


def _file_state(folder: Path) -> list[int]:
    stat = (folder / store.FILE).stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns]


def _last(ledger: sqlite3.Connection, table: str) -> int:
    return int(ledger.execute(f"SELECT coalesce(max(id), 0) FROM {table}").fetchone()[0])


def _catch_up(
    con: duckdb.DuckDBPyConnection,
    folder: Path,
    ledger: sqlite3.Connection,
    report: FillReport,
    row_ids: bool,
) -> dict[str, Any]:
    """Add what is new in the ledger to an open store. What is to be left beside it for the next
    filling.
    """
    state = _ledger_state(ledger)  # first: rows that come later are not taken for copied ones
    if not store.get_meta(con):
        with store.transaction(con):  # else a catalogue without some views would count as made
            store.set_meta(con, versions(ledger))
            if is_shared(folder):
                catalogue.bring_rows(con, folder)
    if row_ids and not catalogue.has_row_ids(con):
        catalogue.copy_preferences(con)
    names = Names(ledger)
    uses = _find_work(con, ledger)
    records = recorded.runs(
        ledger
    )  # after the uses: each of those belongs to a run that is among these
    # each run adds a constitution, so only those that are not in the store yet are read
    shown = dict(con.execute("SELECT run, constitution FROM runs").fetchall())
    read = {r.id: _constitution(r, report) for r in records if not shown.get(r.id)}
    _runs(con, records, read, shown)
    _copy_prompts(con, ledger, report)
    _copy_calls(con, ledger, names, report)
    imports.copy(con, ledger, report)
    before = _calibrations(con)
    _copy_rest(con, ledger, report)
    learned = _calibrations(con)
    todo = con.execute("SELECT DISTINCT run FROM work WHERE state <> 'open'").fetchall()
    rules = {}
    for r in (r for r in records if (r.id,) in todo):
        constitution = read[r.id] if r.id in read else _constitution(r, report)
        rules[r.id] = derive.rules(r, constitution, learned.get(r.id))
    for run, of_run in rules.items():
        report.add("preferences", recalibrate(con, names, of_run, before.get(run)))
    _derive_work(con, ledger, names, rules, report)
    db.kill_point("end")
    con.execute("CHECKPOINT")
    marks: dict[str, Any] = {"calls": store.watermark(con, "calls"), "uses": uses}
    if row_ids and is_shared(folder):
        marks[ROW_IDS] = True
    if not report.notes:  # they are told at each filling
        marks["state"] = [state, _file_state(folder)]
    return marks


class Names:
    """The ledger's names by their small integers, a bounded number of them in memory."""

    def __init__(self, ledger: sqlite3.Connection) -> None:
        self._ledger = ledger
        self._names: dict[int, str] = {}

    def __call__(self, ids: Iterable[int]) -> dict[int, str]:
        """The names of `ids` (at least)."""
        wanted = set(ids)
        new = list(wanted - self._names.keys())
        if len(self._names) + len(new) > db.MAX_NAMES:
            self._names, new = {}, list(wanted)
        self._names.update(db.names_of(self._ledger, new))
        return self._names


def _constitution(record: recorded.RunRecord, report: FillReport) -> Constitution | None:
    """A run's constitution. One that this version cannot read is noted; other runs are shown all
    the same.
    """
    text, name = (
        record.texts.get(CONSTITUTION),
        f"constitution of run {record.name}@{record.version}",
    )
    try:
        return parse_constitution(text, name) if text else None
    except ConfigError as error:
        report.notes.append(f"{name} cannot be read, so its principles weigh alike: {error}")
        return None


def _runs(
    con: duckdb.DuckDBPyConnection,
    records: Sequence[recorded.RunRecord],
    read: Mapping[int, Constitution | None],
    shown: Mapping[int, str | None],
) -> None:
    """Write the table of runs whole, and the constitutions that were `read` with their principles.
    `shown`: by run, the constitution of those that the store has already.
    """
    latest = {
        record.name: record.id for record in sorted(records, key=lambda record: record.last_start)
    }
    known = {
        constitution_digest(c): (c, record) for record in records if (c := read.get(record.id))
    }
    rows = []
    for r in records:
        c = read.get(r.id)
        rows.append(
            (
                r.id,
                r.name,
                r.version,
                latest[r.name] == r.id,
                r.config.get("recipe"),
                constitution_digest(c) if c else shown.get(r.id),
                orjson.dumps(r.config).decode(),
                r.last_start,
                r.at,
            )
        )
    with store.transaction(con):
        con.execute("DELETE FROM runs")
        _delete(con, ("constitutions", "principles"), "constitution", list(known))
        store.insert(con, "runs", rows)
        store.insert(
            con,
            "constitutions",
            [
                (name, c.id, c.title, c.licence, c.selection, record.texts[CONSTITUTION])
                for name, (c, record) in known.items()
            ],
        )
        store.insert(
            con,
            "principles",
            [
                (
                    name,
                    p.id,
                    i,
                    principle_digest(p),
                    p.title,
                    p.compare,
                    p.critique,
                    p.revise,
                    p.criterion,
                    p.weight,
                    list(p.tags),
                    p.enabled,
                )
                for name, (c, _) in known.items()
                for i, p in enumerate(c.principles)
            ],
        )


def _copy_prompts(
    con: duckdb.DuckDBPyConnection, ledger: sqlite3.Connection, report: FillReport
) -> None:
    """New prompts, and new forms of known ones in place of the old."""
    while page := _page(recorded.prompt_rows(ledger, store.watermark(con, "prompts"), PAGE // 4)):
        latest = {row[1]: row[1:] for row in page}
        rows, left_out = _readable(latest.values(), "prompt", _prompt)
        with store.transaction(con):
            _delete(con, ("prompts",), "prompt", list(latest))
            store.insert(con, "prompts", rows)
            store.insert(con, "failures", left_out)
            store.set_watermark(con, "prompts", page[-1][0])
        report.add("prompts", len(rows))


def _page(rows: Iterable[Row]) -> list[Row]:
    """The first of the rows: as many as have BATCH_BYTES of text."""
    page, size = [], 0
    for row in rows:
        page.append(row)
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        if size > BATCH_BYTES:
            break
    return page


def _readable(
    rows: Iterable[Row], what: str, row_of: Callable[[Row], Row]
) -> tuple[list[Row], list[Row]]:
    """The rows of the store that `row_of` makes, and rows of `failures` for those that it cannot
    read or that are longer than the store takes.

    Args:
        rows: Of the ledger; the first column is what names a row.
        what: What a row is.
        row_of: A row of the store from one of the ledger.
    """
    made: list[Row] = []
    left_out: list[Row] = []
    for row in rows:
        reason = ""
        size = max(len(value) for value in row if isinstance(value, str))
        if size > LONGEST_TEXT:
            reason = f"{size:,} characters are more than {LONGEST_TEXT:,}"
        else:
            try:
                made.append(row_of(row))
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                reason = f"it cannot be read ({error})"
        if reason:
            left_out.append(
                (
                    None,
                    None,
                    "left_out",
                    f"{what}: {reason_of(reason)}",
                    f"{what} {row[0]} is left out of the store: {reason}",
                    None,
                )
            )
    return made, left_out


def _prompt(row: Row) -> Row:
    prompt, messages, tags, *rest = row
    return prompt, orjson.loads(messages)[-1][1], messages, orjson.loads(tags), *rest


def _copy_calls(
    con: duckdb.DuckDBPyConnection, ledger: sqlite3.Connection, names: Names, report: FillReport
) -> None:
    """New calls, without damaged ones. One that a wider server answered replaces the "too long"
    that stood under its key.
    """
    lost = _damaged_calls(con, ledger, report)
    while page := db.counted_calls(ledger, store.watermark(con, "calls"), PAGE):
        models = names({row[2] for row in page if row[0] not in lost})
        rows = [(key.hex(), models[model], *rest) for i, key, model, *rest in page if i not in lost]
        best = _best(rows)
        with store.transaction(con):
            short = _too_long(con, best)
            best = {
                call: row
                for call, row in best.items()
                if row[2] != "context" or row[6] > short.get(call, -1)
            }
            _delete(con, ("calls",), "call", [call for call in short if call in best])
            store.insert(con, "calls", list(best.values()))
            _models(con, {row[1] for row in rows})
            store.set_watermark(con, "calls", page[-1][0])
        report.add("calls", len(best))


def _best(rows: Iterable[Row]) -> dict[str, Row]:
    """By call, an answer, or else the largest limit that was met."""
    best: dict[str, Row] = {}
    for row in rows:
        before = best.get(row[0])
        if before is None or row[2] != "context" or (before[2] == "context" and row[6] > before[6]):
            best[row[0]] = row
    return best


def _damaged_calls(
    con: duckdb.DuckDBPyConnection, ledger: sqlite3.Connection, report: FillReport
) -> set[int]:
    """Where the whole of a ledger that was opened before is copied: its damaged calls, noted.

    Raises: StoreError when more than single calls is damaged.
    """
    if store.watermark(con, "calls") or _last(ledger, "starts") < 2:
        return set()
    if lost := set(db.damaged_calls(ledger)):
        report.notes.append(db.damaged_answers(len(lost)))
    return lost


def _too_long(con: duckdb.DuckDBPyConnection, calls: Iterable[str]) -> dict[str, int]:
    """Those of `calls` that stand as "too long" in the store, with their limits."""
    if con.execute("SELECT count(*) FROM calls WHERE finish = 'context'").fetchall()[0][0] == 0:
        return {}
    return dict(
        con.execute(
            "SELECT call, limit_tokens FROM calls WHERE finish = 'context' AND call IN "
            "(SELECT unnest(?))",
            [list(calls)],
        ).fetchall()
    )


def _models(con: duckdb.DuckDBPyConnection, models: set[str]) -> None:
    known = {row[0] for row in con.execute("SELECT model FROM models").fetchall()}
    rows = [(model, *model.partition(":")[::2]) for model in sorted(models - known)]
    store.insert(con, "models", rows)


def _copy_rest(
    con: duckdb.DuckDBPyConnection, ledger: sqlite3.Connection, report: FillReport
) -> None:
    """Failures, human labels, evaluations: appended as they are."""
    sources: dict[str, tuple[str, str, Callable[[Row], Row]]] = {
        "failures": ("failure", "hex(key), run, error, at, kind", _failure),
        "human_labels": ("label", "digest, value, at", _label),
    }
    for table, (what, columns, row_of) in sources.items():
        sql = f"SELECT id, {columns} FROM {table} WHERE id > ? ORDER BY id LIMIT ?"
        while page := _page(ledger.execute(sql, (store.watermark(con, table), PAGE))):
            rows, left_out = _readable((row[1:] for row in page), what, row_of)
            with store.transaction(con):
                store.insert(con, table, rows)
                store.insert(con, "failures", left_out)
                store.set_watermark(con, table, page[-1][0])
            report.add(table, len(page))
    _copy_evals(con, ledger, report)


def _copy_evals(
    con: duckdb.DuckDBPyConnection, ledger: sqlite3.Connection, report: FillReport
) -> None:
    """Evaluations, one at a time: an audit of a million pairs brings megabytes of marks, which
    become rows.
    """
    sql = "SELECT id, digest, value, at FROM evals WHERE id > ? ORDER BY id LIMIT 1"
    while page := ledger.execute(sql, (store.watermark(con, "evals"),)).fetchall():
        rowid, name, text, at = page[0]
        value = orjson.loads(text)
        marks = value.pop("marks", None)
        kept = text if marks is None else orjson.dumps(value).decode()
        with store.transaction(con):
            store.insert(con, "evals", [(name, _text(value.get("name")), kept, at)])
            if marks is not None:
                con.execute("DELETE FROM marks WHERE run = ?", [value["run"]])
                store.insert(con, "marks", list(_marks(value, marks)))
            if value.get("name") == CALIBRATION:
                of_run = "SELECT DISTINCT run, prompt FROM uses WHERE run = ?"
                pairs = ledger.execute(of_run, (value["run"],)).fetchall()
                _put_to_work(con, pairs, (), RECALIBRATE)
            store.set_watermark(con, "evals", rowid)
        report.add("evals", 1)


def _calibrations(con: duckdb.DuckDBPyConnection) -> dict[int, Learned]:
    """By run, what was learned last of how its readings become a probability."""
    rows = con.execute("SELECT value FROM evals WHERE name = ? ORDER BY rowid", [CALIBRATION])
    values = [orjson.loads(text) for (text,) in rows.fetchall()]
    return {value["run"]: Learned.from_data(value) for value in values}


def _marks(audit: dict[str, Any], marks: dict[str, str]) -> Iterator[Row]:
    """An audit's marks as rows; each rule's are lines of a preference's id and a detail."""
    for rule, lines in marks.items():
        of_prompt = audit["rules"][rule]["of_prompt"]
        for line in lines.splitlines():
            preference, _, detail = line.partition(" ")
            yield audit["run"], preference, rule, detail, of_prompt


def _failure(row: Row) -> Row:
    key, run, error, at, kind = row
    return run, key.lower(), failure_kind(error, kind == "refused"), reason_of(error), error, at


def _label(row: Row) -> Row:
    value = orjson.loads(row[1])
    return (
        row[0],
        *(_text(value.get(name)) for name in ("prompt", "winner", "annotator")),
        row[1],
        row[2],
    )


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()


def _find_work(con: duckdb.DuckDBPyConnection, ledger: sqlite3.Connection) -> int:
    """Put the prompts that have new uses into `work`, and those back to it that waited while calls
    have arrived.
    """
    calls, last = _last(ledger, "calls"), _last(ledger, "uses")
    with store.transaction(con):
        con.execute("UPDATE work SET state = 'todo' WHERE state = ?", [RECALIBRATE])  # of a kill
        if calls > store.watermark(con, "calls when waiting"):
            con.execute("UPDATE work SET state = 'todo' WHERE state = 'open'")
        store.set_watermark(con, "calls when waiting", calls)
    mark = store.watermark(con, "uses")
    known = {
        row[0] for row in con.execute("SELECT run FROM runs").fetchall()
    }  # others have no rows to be replaced
    while mark < last:
        top = min(mark + 10 * PAGE, last)
        pairs = ledger.execute(
            "SELECT DISTINCT run, prompt FROM uses WHERE id > ? AND id <= ?", (mark, top)
        ).fetchall()
        fresh = {run for run, _ in pairs} - known
        with store.transaction(con):
            _put_to_work(con, pairs, fresh)
            store.set_watermark(con, "uses", top)
        mark = top
    return last


def _put_to_work(
    con: duckdb.DuckDBPyConnection,
    pairs: Iterable[tuple[int, int]],
    fresh: Collection[int],
    state: str = "todo",
) -> None:
    """Put prompts of runs into `work` in this state, each once, those that waited as `todo`. Those
    of `fresh` runs have no rows yet.
    """
    store.insert(con, "work", [(run, prompt, "new", run in fresh) for run, prompt in pairs])
    con.execute(
        "UPDATE work SET state = 'todo' WHERE state = 'open' AND "
        "(run, prompt) IN (SELECT (run, prompt) FROM work WHERE state = 'new')"
    )
    con.execute(
        "DELETE FROM work WHERE state = 'new' AND "
        "(run, prompt) IN (SELECT (run, prompt) FROM work WHERE state <> 'new')"
    )
    con.execute("UPDATE work SET state = ? WHERE state = 'new'", [state])


def _derive_work(
    con: duckdb.DuckDBPyConnection,
    ledger: sqlite3.Connection,
    names: Names,
    rules: Mapping[int, Rules],
    report: FillReport,
) -> None:
    """Derive what `work` holds, a batch a transaction: old rows out, new rows in, the work done or
    left open.
    """
    size = FIRST_BATCH
    while pairs := con.execute(
        "SELECT run, prompt, fresh FROM work WHERE state = 'todo' ORDER BY run, prompt LIMIT ?",
        [size],
    ).fetchall():
        prompts = names({prompt for _, prompt, _ in pairs})
        uses = _uses(ledger, names, [pair[:2] for pair in pairs])
        sizes = _text_sizes(ledger, {one.key for some in uses.values() for one in some})
        for batch in _batches(pairs, uses, sizes):
            of_batch = {pair[:2]: uses[pair[:2]] for pair in batch if pair[:2] in uses}
            rows, waiting = _derive_batch(ledger, prompts, of_batch, rules, sizes, report)
            stale = [(run, prompts[prompt]) for run, prompt, fresh in batch if not fresh]
            _replace(con, [pair[:2] for pair in batch], stale, rows, waiting)
            for table in store.DERIVED:
                report.add(table, len(rows[table]))
        per_pair = max(1, sum(map(len, uses.values())) // len(pairs))
        size = max(1, min(USES_PAGE // per_pair, PAGE, size * 8))


def _text_sizes(ledger: sqlite3.Connection, keys: Collection[bytes]) -> dict[bytes, int]:
    """Bytes of the answers to these keys. A text that is longer than LONGEST_BYTES is not read."""
    sizes: dict[bytes, int] = {}
    before = ledger.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_BYTES)
    try:
        for rows in db.select_in(
            ledger, "SELECT key, length(CAST(text AS BLOB)) FROM calls WHERE key IN", list(keys)
        ):
            for key, size in rows:
                sizes[key] = max(sizes.get(key, 0), size)
    except sqlite3.DataError:  # one is longer; asking for each takes five times as long
        for rows in db.select_in(ledger, "SELECT id, key FROM calls WHERE key IN", list(keys)):
            for rowid, key in rows:
                with ledger.blobopen("calls", "text", rowid, readonly=True) as text:
                    sizes[key] = max(sizes.get(key, 0), len(text))
    finally:
        ledger.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)
    return sizes


def _batches(
    pairs: Sequence[Row],
    uses: Mapping[tuple[int, int], Sequence[RecordedUse]],
    sizes: Mapping[bytes, int],
) -> Iterator[list[Row]]:
    """The pairs in their order, in batches whose answers have at most BATCH_BYTES (or one pair)."""
    batch: list[Row] = []
    total = 0
    for pair in pairs:
        keys = {one.key for one in uses.get(pair[:2], ())}
        size = sum(n for key in keys if (n := sizes.get(key, 0)) <= LONGEST_BYTES)
        if batch and total + size > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(pair)
        total += size
    if batch:
        yield batch


def _answers(
    ledger: sqlite3.Connection,
    keys: set[bytes],
    sizes: Mapping[bytes, int],
    report: FillReport,
) -> dict[bytes, Completion]:
    """The answers to these keys. Damaged ones are noted and left out; one that is too long is not
    read.
    """
    too_long = {key for key in keys if sizes.get(key, 0) > LONGEST_BYTES}
    found = db.find_answers(ledger, list(keys - too_long))
    told = db.damaged_answers(len(found.damaged))
    if found.damaged and told not in report.notes:
        report.notes.append(told)
    return found.answers | dict.fromkeys(too_long, TOO_LONG)


def _derive_batch(
    ledger: sqlite3.Connection,
    prompts: Mapping[int, str],
    uses: Mapping[tuple[int, int], Sequence[RecordedUse]],
    rules: Mapping[int, Rules],
    sizes: Mapping[bytes, int],
    report: FillReport,
) -> tuple[dict[str, list[Row]], list[Row]]:
    """The rows of some prompts of some runs, by table, and what goes back to `work` as open."""
    recorded_uses = [recorded for some in uses.values() for recorded in some]
    answers = _answers(ledger, {one.key for one in recorded_uses if one.key}, sizes, report)
    named = {one.use.rubric for one in recorded_uses if isinstance(one.use, ScoreUse)} - {""}
    rubrics = recorded.rubrics(ledger, sorted(named))
    rows: dict[str, list[Row]] = {table: [] for table in store.DERIVED}
    waiting: list[Row] = []
    for (run, prompt), some in sorted(uses.items()):
        if run not in rules:
            continue
        derived = derive.derive(prompts[prompt], some, answers, rules[run], rubrics)
        for table in store.DERIVED:
            rows[table] += getattr(derived, table)
        if derived.open:
            waiting.append((run, prompt, "open", False))
    return rows, waiting


def _replace(
    con: duckdb.DuckDBPyConnection,
    pairs: Sequence[Row],
    stale: Sequence[Row],
    rows: Mapping[str, Sequence[Row]],
    waiting: Sequence[Row],
) -> None:
    with store.transaction(con):
        for table in store.DERIVED if stale else ():
            called = " AND call IS NOT NULL" if table == "samples" else ""  # else not derived
            con.execute(
                f"DELETE FROM {table} WHERE (run, prompt) IN (SELECT (unnest(?), unnest(?))){called}",
                list(map(list, zip(*stale, strict=True))),
            )
        for table, some in rows.items():
            store.insert(con, table, some)
        db.kill_point("mid_fill")
        con.execute(
            "DELETE FROM work WHERE (run, prompt) IN (SELECT (unnest(?), unnest(?)))",
            list(map(list, zip(*pairs, strict=True))),
        )
        store.insert(con, "work", waiting)


def _delete(
    con: duckdb.DuckDBPyConnection, tables: Iterable[str], column: str, values: list[Any]
) -> None:
    for table in tables if values else ():
        con.execute(f"DELETE FROM {table} WHERE {column} IN (SELECT unnest(?))", [values])


def _uses(
    ledger: sqlite3.Connection, names: Names, pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], list[RecordedUse]]:
    """All uses of these prompts in these runs, whatever has arrived by now."""
    found: dict[tuple[int, int], list[RecordedUse]] = {}
    for run in {run for run, _ in pairs}:
        rows = list(db.uses_of(ledger, run, [prompt for other, prompt in pairs if other == run]))
        spelt = names({name for row in rows for name in (row[2], row[3], *row[7:10])})
        for rowid, _, prompt, role, sample, other, round, *named, repeat, key in rows:
            at = (spelt[role], sample, other, round, *(spelt[name] for name in named), repeat)
            use = use_of(run, spelt[prompt], UseColumns(*at))
            found.setdefault((run, prompt), []).append(RecordedUse(rowid, use, key))
    return found
