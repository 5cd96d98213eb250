"""`ledger.sqlite`: its schema, its one writer thread, and reads that never hold a transaction
open.

Append-only. SQLite in WAL mode with `synchronous=FULL`: a commit that returned survives a power
cut. Rows are told apart by a unique index, never by their row id, so that two processes can write
the same facts and one of them is kept. Statements carry many rows each: every step of a statement
releases Python's global interpreter lock, and taking it back beside a busy event loop can cost five
milliseconds.
"""

from __future__ import annotations

import os
import queue
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import orjson

from prefab.factory.errors import RequestRefused, StoreError
from prefab.factory.ledger import claims
from prefab.factory.ledger.checksums import VERIFY, add_row, damaged, intact, next_id, row_crc
from prefab.factory.ledger.migrations import CLAIMS_AND_FORGETTING, SCHEMA, migrate, record
from prefab.factory.types import Completion
from prefab.factory.uses import Use, columns_of

T = TypeVar("T")
FILE = "ledger.sqlite"
APPLICATION = 0x50464142  # "PFAB", so that another program's database is not taken for a ledger
# another process's commit takes milliseconds; its checkpoint of a large WAL takes seconds
BUSY_TIMEOUT_MS = 60_000
# per connection; the index of a million calls is 30 MB, and the system caches files as well
CACHE_KIB = 16_384
MAX_NAMES = 50_000  # names kept in memory, 5 MB
STEPS = (256, 32, 4, 1)  # rows a statement: few distinct texts, so that all stay prepared

TABLES = (
    """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS names (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS runs (id INTEGER PRIMARY KEY, name TEXT NOT NULL, version INTEGER NOT NULL,
    digest TEXT NOT NULL, config TEXT NOT NULL, texts TEXT NOT NULL, at REAL NOT NULL,
    crc INTEGER NOT NULL, UNIQUE (name, version), UNIQUE (name, digest));
CREATE TABLE IF NOT EXISTS starts (id INTEGER PRIMARY KEY, run INTEGER NOT NULL, at REAL NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS prompts (id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, digest TEXT NOT NULL UNIQUE,
    messages TEXT NOT NULL, tags TEXT NOT NULL, grp TEXT, split TEXT NOT NULL, rubric TEXT, crc INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS prompts_of ON prompts (prompt);
CREATE TABLE IF NOT EXISTS rubrics (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, rubric TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS splits (grp TEXT PRIMARY KEY, split TEXT NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (id INTEGER PRIMARY KEY, key BLOB NOT NULL, model INTEGER NOT NULL,
    finish TEXT NOT NULL, exactness TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    limit_tokens INTEGER NOT NULL, at REAL NOT NULL, label_logps TEXT, text TEXT NOT NULL,
    attempt INTEGER NOT NULL DEFAULT 0, replica INTEGER, crc INTEGER NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS calls_key ON calls (key, limit_tokens, attempt);
CREATE TABLE IF NOT EXISTS requests (id INTEGER PRIMARY KEY, request BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS uses (id INTEGER PRIMARY KEY, run INTEGER NOT NULL, prompt INTEGER NOT NULL,
    role INTEGER NOT NULL, sample INTEGER NOT NULL, other INTEGER NOT NULL, round INTEGER NOT NULL,
    principle INTEGER NOT NULL, judge INTEGER NOT NULL, ord INTEGER NOT NULL, repeat INTEGER NOT NULL,
    key BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS uses_once ON uses
    (run, prompt, role, sample, other, round, principle, judge, ord, repeat, key);
CREATE TABLE IF NOT EXISTS failures (id INTEGER PRIMARY KEY, run INTEGER NOT NULL, key BLOB NOT NULL,
    error TEXT NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL DEFAULT 'transport', crc INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS failures_refused ON failures (key) WHERE kind = 'refused';
CREATE TABLE IF NOT EXISTS human_labels (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, value TEXT NOT NULL,
    at REAL NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS imports (id INTEGER PRIMARY KEY, run INTEGER NOT NULL, prompt TEXT NOT NULL,
    value TEXT NOT NULL, crc INTEGER NOT NULL, UNIQUE (run, prompt));
CREATE TABLE IF NOT EXISTS evals (id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, value TEXT NOT NULL,
    at REAL NOT NULL, crc INTEGER NOT NULL);
"""
    + CLAIMS_AND_FORGETTING
)
CALL_COLUMNS = (
    "id, key, model, finish, exactness, prompt_tokens, completion_tokens, limit_tokens, at, "
    "label_logps, text, attempt, replica, crc"
)
# the rows of `calls` that do not count, unless their forgetting is undone
FORGOTTEN = (
    "SELECT call FROM forgotten WHERE forget NOT IN "
    "(SELECT undoes FROM forgets WHERE undoes IS NOT NULL)"
)
USE_COLUMNS = "run, prompt, role, sample, other, round, principle, judge, ord, repeat, key"

_passed: Counter[str] = Counter()


def kill_point(name: str) -> None:
    """For the kill test: end this process by SIGKILL when `PREFAB_KILL_AT` is `name`, or `name:N`
    at the N-th call.

    Names: before_commit and after_commit (of a transaction with answers), mid_fill, end.
    """
    wanted = os.environ.get("PREFAB_KILL_AT")
    if not wanted:
        return
    _passed[name] += 1
    if wanted in (name, f"{name}:{_passed[name]}"):
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def translate_errors(file: Path) -> Iterator[None]:
    """Turn SQLite's errors into a `StoreError` that says what happened to which file and how to
    mend it.
    """
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter: of SQLite's own message
        raise StoreError(_story(file, error)) from error


def _story(file: Path, error: Exception) -> str:
    text = str(error)
    if "full" in text:
        return f"{file}: the disk is full. What was committed is safe: free some space, then run the same command again"
    if "locked" in text or "busy" in text:
        return f"{file}: another program has held the ledger for {BUSY_TIMEOUT_MS // 1000} s. End it, then run again"
    if "malformed" in text or "not a database" in text or "corrupt" in text:
        return f"{file}: damaged ({text}). {VERIFY}"
    if "unable to open" in text or "readonly" in text:
        return f"{file}: cannot be opened for writing ({text}). Check that the folder exists and is yours to write"
    return f"{file}: {text}. {VERIFY}"


def connect(file: Path, readonly: bool = False) -> sqlite3.Connection:
    """A connection that begins no transaction by itself. A ledger of an older schema is migrated.

    Raises: StoreError when the file is damaged, no ledger, of a newer schema, or cannot be
    migrated.
    """
    with translate_errors(file):
        if readonly and not file.exists():
            raise StoreError(f"{file}: there is no ledger here. `prefab run` makes one")
        con = sqlite3.connect(
            read_address(file) if readonly else file,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=64,
            uri=readonly,
        )
        con.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        con.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
        application = con.execute("PRAGMA application_id").fetchone()[0]
        schema = con.execute("PRAGMA user_version").fetchone()[0]
        # a new file, which gets our mark and our tables in one transaction, has neither
        new = not readonly and application == schema == 0 and not _tables(con)
        if schema > SCHEMA or (application != APPLICATION and not new):
            con.close()
            raise StoreError(
                f"{file}: not a ledger that this version of Prefab can read "
                f"(application {application:#x}, schema {schema}; expected {APPLICATION:#x}, {SCHEMA}). "
                "It is a file of another program or of a newer version of Prefab, or it is damaged: "
                "`prefab store verify` tells which"
            )
        if application == APPLICATION and schema < SCHEMA:
            con.close()
            migrate(file, schema)
            return connect(file, readonly)
        if readonly:
            con.execute("PRAGMA query_only=1")
    return con


def read_address(file: Path) -> str:
    """Where SQLite opens a ledger for reading. In a folder that cannot be written it cannot make
    its files beside it, and it needs none where nobody writes: all is in the one file.
    """
    address = file.resolve().as_uri()
    log = file.with_name(file.name + "-wal")
    if os.access(file.parent, os.W_OK) or (log.exists() and log.stat().st_size):
        return address
    return f"{address}?mode=ro&immutable=1"


def _tables(con: sqlite3.Connection) -> bool:
    return bool(con.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])


def create(file: Path) -> sqlite3.Connection:
    """Open for writing, making file and tables where absent.

    Raises: StoreError, also where the file system has no shared memory (a network share): WAL needs
    it.
    """
    con = connect(file)
    with translate_errors(file):
        if con.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise StoreError(
                f"{file}: this file system cannot share memory between programs (a network share?), "
                "which the ledger needs. Put the store on a local disk"
            )
        con.execute("PRAGMA synchronous=FULL")
        con.execute("BEGIN IMMEDIATE")
        for statement in TABLES.split(";")[:-1]:
            con.execute(statement)
        con.execute("INSERT OR IGNORE INTO meta VALUES ('ledger', lower(hex(randomblob(16))))")
        con.execute(f"PRAGMA application_id={APPLICATION}")
        record(con, SCHEMA)
        con.execute("COMMIT")
    return con


def select_in(
    con: sqlite3.Connection, sql: str, values: Sequence[Any]
) -> Iterator[list[tuple[Any, ...]]]:
    """Run `sql`, which ends in `IN`, over `values` in lists of few lengths; a list of rows for
    each.
    """
    for start, count in _steps(len(values)):
        yield con.execute(
            f"{sql} ({','.join('?' * count)})", values[start : start + count]
        ).fetchall()


def _steps(total: int) -> Iterator[tuple[int, int]]:
    start = 0
    for count in STEPS:
        while total - start >= count:
            yield start, count
            start += count


def insert_rows(con: sqlite3.Connection, into: str, width: int, flat: list[Any]) -> None:
    """`INSERT ... VALUES` of the rows that `flat` holds one after another, many rows a
    statement.
    """
    row = f"({','.join('?' * width)})"
    for start, count in _steps(len(flat) // width):
        con.execute(
            f"{into} VALUES {','.join([row] * count)}",
            flat[start * width : (start + count) * width],
        )


@dataclass(slots=True)
class FoundAnswers:
    """The answers to some keys that count, and the rows that do not: damaged ones (their ids and
    keys), and whether any is forgotten.
    """

    answers: dict[bytes, Completion] = field(default_factory=dict)
    damaged: dict[int, bytes] = field(default_factory=dict)
    forgotten: bool = False


def first_metrics(con: sqlite3.Connection, name: str, subject: str) -> dict[str, Any]:
    """The metrics of the first evaluation with this name and subject; empty where there is none."""
    row = con.execute(
        "SELECT value FROM evals WHERE json_extract(value, '$.name') = ? "
        "AND json_extract(value, '$.subject') = ? ORDER BY id LIMIT 1",
        [name, subject],
    ).fetchone()
    found: dict[str, Any] = orjson.loads(row[0])["metrics"] if row else {}
    return found


def lookup(con: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, Completion]:
    """The answers that are recorded, undamaged and not forgotten. Where a prompt was too long for
    one server: an answer of another one, else the largest limit that was met.
    """
    return find_answers(con, keys).answers


def find_answers(con: sqlite3.Connection, keys: Sequence[bytes]) -> FoundAnswers:
    """As `lookup`, with what was left out."""
    found = FoundAnswers()
    answers = found.answers
    any_forgotten = con.execute("SELECT EXISTS (SELECT 1 FROM forgotten)").fetchone()[0]
    for rows in _answer_rows(con, keys):
        if any_forgotten and (gone := _forgotten(con, [row[0] for row in rows])):
            found.forgotten = True
            rows = [row for row in rows if row[0] not in gone]
        rows.sort(key=_ATTEMPT)  # the first answer that counts stands
        for row in rows:
            if row_crc(row[:-1]) != row[-1]:
                found.damaged[row[0]] = row[1]
                continue
            _, key, _, finish, exactness, prompt, new, limit, _, logps, text, _, _, _ = row
            before = answers.get(key)
            if before is None or (
                before.finish == "context" and (finish != "context" or limit > before.limit)
            ):
                answers[key] = Completion(
                    text, finish, logps and _logps(logps), exactness, prompt, new, limit
                )
    return found


_ATTEMPT = itemgetter(11)  # of CALL_COLUMNS


def _answer_rows(con: sqlite3.Connection, keys: Sequence[bytes]) -> Iterator[list[tuple[Any, ...]]]:
    sql = f"SELECT {CALL_COLUMNS} FROM calls WHERE key IN"
    try:
        yield from list(select_in(con, sql, keys))
    except sqlite3.OperationalError as error:
        if "decode" not in str(error):
            raise
        con.text_factory = lambda text: text.decode("utf-8", "replace")  # the checksum tells
        try:
            yield from list(select_in(con, sql, keys))
        finally:
            con.text_factory = str


def _forgotten(con: sqlite3.Connection, calls: Sequence[int]) -> set[int]:
    """Those of these rows of `calls` that are forgotten, by a forgetting that is not undone."""
    sql = f"{FORGOTTEN} AND call IN"
    return {call for rows in select_in(con, sql, calls) for (call,) in rows}


def counted_calls(con: sqlite3.Connection, after: int, limit: int) -> list[tuple[Any, ...]]:
    """The next rows of `calls` after an id that count: id, key, model, finish, exactness, the two
    numbers of tokens, limit and time. Neither forgotten ones do, nor those of a question to which
    an earlier answer counts again.
    """
    earlier = (
        "SELECT 1 FROM calls e WHERE e.key = c.key AND e.limit_tokens = c.limit_tokens "
        f"AND e.attempt < c.attempt AND e.id NOT IN ({FORGOTTEN})"
    )
    return con.execute(
        "SELECT id, key, model, finish, exactness, prompt_tokens, completion_tokens, limit_tokens, at "
        f"FROM calls c WHERE id > ? AND id NOT IN ({FORGOTTEN}) "
        f"AND (attempt = 0 OR NOT EXISTS ({earlier})) ORDER BY id LIMIT ?",
        (after, limit),
    ).fetchall()


def damaged_calls(con: sqlite3.Connection) -> list[int]:
    """The ids of the damaged rows of `calls`, after a check of the indexes by which answers and
    uses are found. It reads the whole ledger.

    Raises: StoreError when an index does not agree with its table.
    """
    for table in ("calls", "uses"):
        found = con.execute(f"PRAGMA integrity_check({table})").fetchone()[0]
        if found != "ok":
            raise damaged(con, f"the table {table} ({found})")
    con.text_factory = lambda text: text.decode("utf-8", "replace")
    try:
        rows = con.execute(f"SELECT {CALL_COLUMNS} FROM calls")
        return [row[0] for row in rows if row_crc(row[:-1]) != row[-1]]
    finally:
        con.text_factory = str


def damaged_answers(count: int) -> str:
    """What to tell of answers whose checksum is wrong."""
    return (
        f"{count:,} damaged {'answer counts' if count == 1 else 'answers count'} as not answered; "
        f"`prefab run` asks again. {VERIFY}"
    )


def refusals(con: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, str]:
    """Those of the keys whose request a server refused for good, with its words. A damaged row
    counts as none.
    """
    sql = (
        "SELECT id, run, key, error, at, kind, crc FROM failures WHERE kind = 'refused' AND key IN"
    )
    return {
        row[2]: row[3]
        for rows in select_in(con, sql, keys)
        for row in rows
        if row_crc(row[:-1]) == row[-1]
    }


def _logps(text: str) -> dict[str, float]:
    # JSON has no infinity; a label of probability 0 is a fact all the same
    return {
        label: float("-inf") if logp is None else float(logp)
        for label, logp in orjson.loads(text).items()
    }


def names_of(con: sqlite3.Connection, ids: Sequence[int]) -> dict[int, str]:
    """Names by their ids. Raises: StoreError when one is damaged."""
    rows = select_in(con, "SELECT id, name, crc FROM names WHERE id IN", ids)
    return {row[0]: row[1] for some in rows for row in intact(con, "names", some)}


def uses_of(con: sqlite3.Connection, run: int, prompts: Sequence[int]) -> Iterator[tuple[Any, ...]]:
    """The uses of these prompts in a run: id and `USE_COLUMNS`. Raises: StoreError when one is
    damaged.
    """
    sql = f"SELECT id, {USE_COLUMNS}, crc FROM uses WHERE run = {int(run)} AND prompt IN"
    for rows in select_in(con, sql, prompts):
        yield from intact(con, "uses", rows)


class Names:
    """Small integers for names that repeat (prompts' ids, principles, judges), so that a use is 50
    bytes.
    """

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def ids(self, con: sqlite3.Connection, names: set[str]) -> dict[str, int]:
        """The ids of `names` (at least), given out inside the open transaction of `con`."""
        new = [name for name in names if name not in self._ids]
        if len(self._ids) + len(new) > MAX_NAMES:
            self._ids, new = {}, list(names)
        if new:
            for rows in select_in(con, "SELECT name, id FROM names WHERE name IN", new):
                self._ids.update(rows)
            self._add(con, [name for name in new if name not in self._ids])
        return self._ids

    def _add(self, con: sqlite3.Connection, new: list[str]) -> None:
        flat: list[Any] = []
        for place, name in enumerate(new, next_id(con, "names") if new else 0):
            flat += (place, name, row_crc((place, name)))
            self._ids[name] = place
        insert_rows(con, "INSERT INTO names", 3, flat)

    def forget(self) -> None:
        """After a rollback: ids that were given out in it are void."""
        self._ids = {}


@dataclass(slots=True)
class AnswerRow:
    """A completion to be written. When another process was first, `completion` becomes that
    process's.
    """

    key: bytes
    request: bytes
    model: str
    completion: Completion
    flight: Any


@dataclass(slots=True)
class Failure:
    """A question that got no answer, to be recorded."""

    run: int
    key: bytes
    error: Exception
    flight: Any


@dataclass(slots=True)
class Claim:
    """Questions to be claimed before they are asked (`claims`), with what waits for them. After the
    commit: the answers that were there by then, and the keys that are ours to ask.
    """

    flights: list[Any]
    found: dict[bytes, Completion] = field(default_factory=dict)
    mine: set[bytes] = field(default_factory=set)


@dataclass(slots=True)
class Commit:
    """What one transaction holds, in order of arrival. `uses` are (use, key, ...) lists with what
    waits for them.
    """

    uses: list[tuple[list[tuple[Use, bytes]], Any]] = field(default_factory=list)
    answers: list[AnswerRow] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)


POLL_S = 0.25  # how soon a newcomer is seen by a writer that has nothing to write
BEAT_S = 10.0


class Writer:
    """The one thread that writes. A transaction takes whatever has arrived; `landed` is called
    after each commit.

    `landed(commit, error)` is called on this thread, with the error when the commit failed; from
    then on nothing more is written: a ledger that cannot write must not go on as if it could.
    """

    def __init__(
        self,
        file: Path,
        landed: Callable[[Commit, StoreError | None], None],
        share: Callable[[bool], list[bytes]],
    ) -> None:
        """`share(whether)` is called on the thread when others come or the last one has gone; it
        gives the keys in flight.
        """
        self.file = file
        self.broken: StoreError | None = None
        self._con = create(file)
        self._share, self._shared = share, False
        self._version, self._beaten = -1, 0.0
        with translate_errors(file):
            self._con.execute("BEGIN IMMEDIATE")
            self.owner = self._acknowledged = claims.join(self._con)
            self._con.execute("COMMIT")
        self._names = Names()
        self._landed = landed
        self._arrivals: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="ledger-writer", daemon=True)
        self._thread.start()

    def put(self, items: list[Any]) -> None:
        """Hand over what is to be written together: `Answer`s, `Failure`s and (uses, waiters)."""
        self._arrivals.put(items)

    def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in a transaction of its own and wait for it. Raises what it raised, after a
        rollback.
        """
        result: Future[T] = Future()
        self._arrivals.put([(work, result)])
        return result.result()

    def meet(self) -> None:
        """Wait until every other process on this ledger has seen this one."""
        until = time.monotonic() + claims.ACKNOWLEDGED_WITHIN_S
        with translate_errors(self.file), closing(connect(self.file, readonly=True)) as con:
            while time.monotonic() < until:
                seen = claims.others(con, self.owner)
                if all(seen_up_to >= self.owner for _, seen_up_to in seen):
                    return
                time.sleep(0.02)

    def _greet(self) -> None:
        """See who else works on this ledger: claim what is in flight before a newcomer is
        acknowledged, and be heard of.
        """
        version = self._con.execute("PRAGMA data_version").fetchone()[0]
        due = self._shared and time.monotonic() - self._beaten > BEAT_S
        if version == self._version and not due:
            return
        self._version = version
        there = [owner for owner, _ in claims.others(self._con, self.owner)]
        newest = max([*there, self._acknowledged])
        if not due and bool(there) == self._shared and newest == self._acknowledged:
            return
        self._shared = bool(there)
        keys = self._share(self._shared)
        with self._transaction():
            if there and newest != self._acknowledged:
                claims.claim(self._con, self.owner, keys)
            claims.beat(self._con, self.owner, newest)
        self._acknowledged, self._beaten = newest, time.monotonic()

    def close(self) -> None:
        """Write what has arrived, checkpoint the WAL, end the thread. Raises: StoreError if that
        failed.
        """
        if not self._thread.is_alive():
            return
        self._arrivals.put([None])
        self._thread.join()
        try:
            if self.broken is None:
                with translate_errors(self.file):
                    with self._transaction():
                        claims.leave(self._con, self.owner)
                    # a reader only keeps the WAL from being truncated
                    self._con.execute("PRAGMA busy_timeout=2000")
                    self._con.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            self._con.close()

    def _work(self) -> None:
        going = True
        while going:
            items = self._next()
            while not self._arrivals.empty():
                items += self._arrivals.get()
            commit = Commit()
            for item in items:
                if item is None:
                    going = False
                elif isinstance(item, AnswerRow):
                    commit.answers.append(item)
                elif isinstance(item, Failure):
                    commit.failures.append(item)
                elif isinstance(item, Claim):
                    commit.claims.append(item)
                elif isinstance(item[1], Future):
                    self._together(commit)  # the work sees all that arrived before it
                    commit = Commit()
                    self._alone(*item)
                else:
                    commit.uses.append(item)
            self._together(commit)

    def _next(self) -> list[Any]:
        """What arrives next; meanwhile newcomers are greeted."""
        while True:
            try:
                if self.broken is None:
                    with translate_errors(self.file):
                        self._greet()
            except StoreError as error:
                self.broken = error
            try:
                return list(self._arrivals.get(timeout=POLL_S))
            except queue.Empty:
                continue

    def _alone(self, work: Callable[[sqlite3.Connection], T], result: Future[T]) -> None:
        try:
            if self.broken:
                raise self.broken
            with translate_errors(self.file), self._transaction():
                value = work(self._con)
            result.set_result(value)
        except BaseException as error:
            result.set_exception(error)

    def _together(self, commit: Commit) -> None:
        if not (commit.uses or commit.answers or commit.failures or commit.claims):
            return
        if self.broken is None:
            try:
                with translate_errors(self.file), self._transaction(bool(commit.answers)):
                    self._insert_uses([pair for uses, _ in commit.uses for pair in uses])
                    self._insert_answers(commit.answers)
                    self._insert_failures(commit.failures)
                    self._settle_claims(commit)
            except StoreError as error:
                self.broken = error
            except Exception as error:  # a bug, or an answer that cannot be stored
                self.broken = StoreError(f"{self.file}: {type(error).__name__}: {error}")
                self.broken.__cause__ = error
        self._landed(commit, self.broken)

    def _settle_claims(self, commit: Commit) -> None:
        if self._shared:
            keys = [answer.key for answer in commit.answers]
            keys += [failure.key for failure in commit.failures]
            claims.release(self._con, self.owner, keys)
        for one in commit.claims:
            keys = [flight.key for flight in one.flights]
            one.found = lookup(self._con, keys)
            one.mine = claims.claim(self._con, self.owner, keys)

    @contextmanager
    def _transaction(self, killable: bool = False) -> Iterator[None]:
        self._con.execute("BEGIN IMMEDIATE")
        try:
            yield
            if killable:
                kill_point("before_commit")
            self._con.execute("COMMIT")
        except BaseException:
            self._names.forget()
            if self._con.in_transaction:
                self._con.execute("ROLLBACK")
            raise
        if killable:
            kill_point("after_commit")

    def _insert_uses(self, uses: list[tuple[Use, bytes]]) -> None:
        if not uses:
            return
        rows = [(use.run, use.prompt, columns_of(use), key) for use, key in uses]
        names = {
            name
            for _, prompt, c, _ in rows
            for name in (prompt, c.role, c.principle, c.judge, c.order)
        }
        ids = self._names.ids(self._con, names)
        flat: list[Any] = []
        for place, (run, prompt, c, key) in enumerate(rows, next_id(self._con, "uses")):
            named = (ids[c.principle], ids[c.judge], ids[c.order])
            at = (ids[prompt], ids[c.role], c.sample, c.other, c.round, *named, c.repeat)
            row = (place, run, *at, key)
            flat += row
            flat.append(row_crc(row))
        insert_rows(self._con, "INSERT OR IGNORE INTO uses", 13, flat)

    def _insert_answers(self, answers: list[AnswerRow]) -> None:
        """Insert the answers that are not there yet. Where another process committed first, its
        answer replaces ours.
        """
        if not answers:
            return
        found = find_answers(self._con, [answer.key for answer in answers])
        ids = self._names.ids(self._con, self._named(answers))
        attempts = self._attempts(answers, found)
        place, now = next_id(self._con, "calls"), time.time()
        calls: list[Any] = []
        requests: list[Any] = []
        for answer in answers:
            mine, first = answer.completion, found.answers.get(answer.key)
            same_limit = first is not None and (mine.finish, mine.limit) == ("context", first.limit)
            if first is not None and (first.finish != "context" or same_limit):
                answer.completion = first
                continue
            limit = int(mine.limit) if mine.finish == "context" else 0
            row = (
                place,
                answer.key,
                ids[answer.model],
                mine.finish,
                mine.exactness,
                int(mine.prompt_tokens),
                int(mine.completion_tokens),
                limit,
                now,
                _logps_text(mine),
                mine.text,
                attempts.get((answer.key, limit), 0),
                ids[mine.replica] if mine.replica else None,
            )
            calls += row
            calls.append(row_crc(row))
            requests += (place, answer.request)
            place += 1
        insert_rows(self._con, "INSERT INTO calls", 14, calls)
        insert_rows(self._con, "INSERT INTO requests", 2, requests)

    @staticmethod
    def _named(answers: list[AnswerRow]) -> set[str]:
        replicas = {answer.completion.replica for answer in answers}
        return {answer.model for answer in answers} | (replicas - {""})

    def _attempts(
        self, answers: list[AnswerRow], found: FoundAnswers
    ) -> dict[tuple[bytes, int], int]:
        """By key and limit, the number of an answer to a question that was answered before. Damaged
        rows are marked as forgotten, so that the new answer takes their place everywhere.
        """
        if found.damaged:
            forget_calls(self._con, "damaged", {}, list(found.damaged))
        elif not found.forgotten:
            return {}
        sql = "SELECT key, limit_tokens, attempt FROM calls WHERE key IN"
        attempts: dict[tuple[bytes, int], int] = {}
        for rows in select_in(self._con, sql, [answer.key for answer in answers]):
            for key, limit, attempt in rows:
                attempts[key, limit] = max(attempts.get((key, limit), 0), attempt + 1)
        return attempts

    def _insert_failures(self, failures: Iterable[Failure]) -> None:
        now = time.time()
        for f in failures:
            add_row(self._con, "failures", f.run, f.key, str(f.error), now, _kind(f.error))


def forget_calls(
    con: sqlite3.Connection, reason: str, filters: dict[str, Any], calls: Sequence[int]
) -> int:
    """Record, inside an open transaction, that these rows of `calls` no longer count: their
    questions are asked again. The rows stay.

    Returns:
        The id of the forgetting, which a row that undoes it names.
    """
    forget = add_row(con, "forgets", reason, orjson.dumps(filters).decode(), None, time.time())
    assert forget is not None
    flat: list[Any] = []
    for place, call in enumerate(calls, next_id(con, "forgotten")):
        flat += (place, forget, call, row_crc((place, forget, call)))
    insert_rows(con, "INSERT INTO forgotten", 4, flat)
    return forget


def undo_forget(con: sqlite3.Connection, forget: int) -> None:
    """Record, inside an open transaction, that a forgetting is undone: its answers count again."""
    add_row(con, "forgets", "undo", "{}", forget, time.time())


def write(file: Path, work: Callable[[sqlite3.Connection], T]) -> T:
    """Do `work` in a transaction of its own, without a writer thread. Raises: what it raised, after
    a rollback; StoreError.
    """
    con = create(file)
    try:
        with translate_errors(file):
            con.execute("BEGIN IMMEDIATE")
            result = work(con)
            con.execute("COMMIT")
            return result
    finally:
        con.close()  # rolls back what is not committed


def _logps_text(completion: Completion) -> str | None:
    logps = completion.label_logps
    return None if logps is None else orjson.dumps(dict(logps)).decode()


def _kind(error: Exception) -> str:
    return "refused" if isinstance(error, RequestRefused) else "transport"
