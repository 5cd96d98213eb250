"""The ledger: every model call is recorded once and reused.

`ask_many` returns answers that are on disk: those that were there, and those that the engine gives
now. What arrives within one turn of the event loop is looked up together and its uses are written
together, so a question already answered costs microseconds. The promise: no committed answer is
ever asked again, and a crash repeats at most what was in flight or not yet committed (each bounded
by the engine's `max_in_flight`).

What each call was asked for is recorded beside it (`prefab.factory.uses`); the store is derived
from that.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from prefab.factory.console import warn
from prefab.factory.errors import RequestRefused, StoreError, TransportError
from prefab.factory.keys import key_of, request_bytes
from prefab.factory.ledger import db, records
from prefab.factory.ledger.checksums import VERIFY
from prefab.factory.ledger.db import POLL_S, AnswerRow, Claim, Commit, Failure, Writer
from prefab.factory.ledger.records import Run
from prefab.factory.telemetry import observed_call, observers
from prefab.factory.types import Completion, Engine, Prompt, Request
from prefab.factory.uses import Use

STORE_FILE, MARKS_FILE = "prefab.duckdb", "prefab.marks"
CANARY = "model canary"  # the evaluation with a model's first fingerprint


@dataclass(slots=True)
class LedgerStats:
    """Counts since the ledger was opened. Engines answered `asked`, with these tokens; `reused`
    needed no engine; `refused` were not asked, because a server had refused them for good; for
    `damaged` ones the answer in the ledger was damaged, so that they were asked again.
    """

    asked: int = 0
    reused: int = 0
    failed: int = 0
    refused: int = 0
    damaged: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0


def _quarantined(con: sqlite3.Connection, replica: str, since: float) -> int:
    """Forget, inside an open transaction, the answers of a server since a time; how many."""
    rows = con.execute(
        "SELECT c.id FROM calls c JOIN names n ON n.id = c.replica WHERE n.name = ? AND c.at >= ? "
        f"AND c.id NOT IN ({db.FORGOTTEN})",
        [replica, since],
    ).fetchall()
    if rows:
        filters = {"replica": replica, "since": since}
        db.forget_calls(con, "quarantine", filters, [row[0] for row in rows])
    return len(rows)


class _Batch:
    """One `ask_many`: done when each question is answered and its uses are committed."""

    __slots__ = ("asks", "bodies", "future", "keys", "results", "waiting", "window")

    def __init__(
        self,
        asks: Sequence[tuple[Request, Use]],
        window: _Window,
        future: asyncio.Future[list[Any]],
    ) -> None:
        self.asks, self.window, self.future = asks, window, future
        self.bodies = [request_bytes(request) for request, _ in asks]
        self.keys = [key_of(body) for body in self.bodies]
        self.results: list[Any] = [None] * len(asks)
        self.waiting = 1  # for the uses

    def settle(self, count: int = 1) -> None:
        self.waiting -= count
        if self.waiting == 0 and not self.future.done():
            self.future.set_result(self.results)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(slots=True)
class _Flight:
    """One question that is being asked and recorded, and the places in batches that wait for it.

    No batch owns it: cancelling one of them changes nothing for the others.
    """

    key: bytes
    body: bytes
    request: Request
    window: _Window
    waiters: list[tuple[_Batch, int]]

    def land(self, result: Any) -> None:
        for batch, i in self.waiters:
            batch.results[i] = result
            batch.settle()

    def fail(self, error: BaseException) -> None:
        for batch, _ in self.waiters:
            batch.fail(error)


@dataclass(slots=True, eq=False)
class _Window:
    """The questions of one engine: at most `max_in_flight` asked, and as many answered but not yet
    on disk.
    """

    engine: Engine
    queue: deque[_Flight] = field(default_factory=deque)
    workers: set[asyncio.Task[None]] = field(default_factory=set)
    active: int = 0
    uncommitted: int = 0


class Ledger:
    """An open `ledger.sqlite`. One event loop asks; one thread writes. The module's docstring
    says what is promised.
    """

    def __init__(self, folder: Path, retry_refused: bool = False) -> None:
        self.folder, self.retry_refused = Path(folder), retry_refused
        self.file = self.folder / db.FILE
        self.stats = LedgerStats()
        self._sharing = threading.Lock()  # between a look at `_shared` and the flights that follow
        self._shared = False
        self._flights: dict[bytes, _Flight] = {}
        self._elsewhere: dict[bytes, _Flight] = {}  # that other processes ask
        self._polling: asyncio.Task[None] | None = None
        self._writer = Writer(self.file, self._committed, self._share)
        self._writer.meet()
        self._reader = db.connect(self.file, readonly=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._windows: dict[int, _Window] = {}
        self._arrived: list[_Batch] = []
        self._waiting: set[_Batch] = (
            set()
        )  # every batch whose future somebody awaits, wherever it is
        self._outbox: list[Any] = []
        self._engines: list[Engine] = []  # probed before the first question
        self._unprobed = False
        self._probing: asyncio.Task[None] | None = None
        self._closed = False
        self._context = copy_context()  # of the stage that the calls belong to

    @classmethod
    def open(cls, folder: Path, retry_refused: bool = False) -> Ledger:
        """Open the store at `folder`, made where absent. `retry_refused` asks again what a server
        has refused for good.

        Raises: StoreError when the ledger is damaged, or missing beside a DuckDB file that was
        filled from it.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{folder}: cannot make the store's folder ({error.strerror})"
            ) from error
        if not (folder / db.FILE).exists() and (folder / STORE_FILE).exists():
            raise StoreError(
                f"{folder / db.FILE} is missing beside {STORE_FILE}. It holds every answer: "
                f"restore it from a copy, or delete {folder / STORE_FILE} to begin anew"
            )
        if not (folder / db.FILE).exists() and (folder / MARKS_FILE).exists():
            warn(
                f"{folder}: there was a store here ({MARKS_FILE} is left of it), and {db.FILE} is "
                "gone: everything is asked anew. Stop now if you can restore it from a copy"
            )
        return cls(folder, retry_refused)

    def begin_run(
        self,
        name: str,
        config: dict[str, Any],
        texts: dict[str, str],
        deciding: records.Deciding | None = None,
    ) -> Run:
        """The run of this configuration: resumed where name, configuration and texts are known,
        else a new version. `deciding`: see `records.begin_run`.
        """
        return self._writer.run(lambda con: records.begin_run(con, name, config, texts, deciding))

    @property
    def queued(self) -> int:
        """How many questions wait for a place."""
        return sum(len(window.queue) for window in list(self._windows.values()))

    def add_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Record prompts and their splits, a thousand a transaction.

        The first split recorded for a group (or, without one, for a text) stands.
        Raises: ConfigError naming prompt, group and both splits where a prompt's own split
        contradicts it.
        """
        rest = iter(prompts)
        while some := list(islice(rest, 1000)):
            self._writer.run(partial(records.add_prompts, prompts=some))

    def add_import(
        self, name: str, config: dict[str, Any], prompts: Sequence[tuple[Prompt, dict[str, Any]]]
    ) -> Run:
        """Record a file of preferences in one transaction (see `records.add_import`): all of it or
        nothing.
        """
        return self._writer.run(lambda con: records.add_import(con, name, config, prompts))

    def add_answers(self, run: int, answers: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        """Record answers that no model call gave as those of a run (see `records.add_answers`)."""
        self._writer.run(lambda con: records.add_answers(con, run, answers))

    def add_human_label(self, label: dict[str, Any]) -> None:
        """Record a person's label: a JSON object with prompt, a, b (texts or sample ids), winner,
        annotator, note.
        """
        self._writer.run(lambda con: records.add_object(con, "human_labels", label))

    def add_eval(self, result: dict[str, Any]) -> None:
        """Record an evaluation: a JSON object with name, subject and metrics."""
        self._writer.run(lambda con: records.add_object(con, "evals", result))

    def probe_first(self, engines: Iterable[Engine]) -> None:
        """Probe these engines (see `Engine.probe`) before the first question that has no answer
        yet. What they find is recorded as an evaluation `model probe`, and a model's first
        fingerprint as `model canary`.
        """
        self._engines = list(engines)
        for engine in self._engines:
            engine.quarantine = self.quarantine
        self._unprobed = bool(self._engines)

    def quarantine(self, replica: str, since: float) -> int:
        """Set aside what a server answered since a time (seconds since 1970): these answers no
        longer count, and their questions are asked again (by the next run: this one has used them).

        Returns:
            How many answers it were.
        """
        if self._outbox:
            self._send()
        return self._writer.run(partial(_quarantined, replica=replica, since=since))

    def lookup(self, keys: Sequence[bytes]) -> dict[bytes, Completion]:
        """The committed answers to these keys."""
        with db.translate_errors(self.file):
            return db.lookup(self._reader, keys)

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, Completion]:
        """As `lookup`, with a warning at the first damaged answer."""
        with db.translate_errors(self.file):
            found = db.find_answers(self._reader, keys)
        if lost := set(found.damaged.values()) - found.answers.keys():
            if not self.stats.damaged:
                warn(f"{self.file}: damaged answers are asked again. {VERIFY}")
            self.stats.damaged += len(lost)
        return found.answers

    def note(self, use: Use, call: bytes = b"") -> None:
        """Record a use that asks nothing (role `identical`), or a use of the answer that stands
        under the key `call`; on disk at the latest when the ledger is closed.
        """
        self._check()
        self._writer.put([([(use, call)], ())])

    async def ask(self, request: Request, use: Use, engine: Engine) -> Completion:
        """One question. Raises: TransportError, once that is recorded, when no answer came after
        all retries.
        """
        (result,) = await self.ask_many([(request, use)], engine)
        if isinstance(result, TransportError):
            raise result
        return result

    async def ask_many(
        self, asks: Sequence[tuple[Request, Use]], engine: Engine
    ) -> list[Completion | TransportError]:
        """Answers in the order of `asks`, all of them on disk; a question that got none gives its
        `TransportError`.

        Raises: StoreError when the ledger cannot write any more or is damaged; EngineError when the
        engine failed for good; ValueError for a text that cannot be asked (a lone surrogate).
        """
        self._check()
        if not asks:
            return []
        self._loop = asyncio.get_running_loop()
        window = self._windows.get(id(engine))
        if window is None:
            window = self._windows[id(engine)] = _Window(engine)
        batch = _Batch(asks, window, self._loop.create_future())
        if not self._arrived:
            self._loop.call_soon(self._look_up)
        self._arrived.append(batch)
        self._waiting.add(batch)
        try:
            return await batch.future
        finally:
            self._waiting.discard(batch)

    def _check(self) -> None:
        if self._writer.broken:
            raise self._writer.broken
        if self._closed:
            raise StoreError(f"{self.file}: the ledger is closed")

    def _look_up(self) -> None:
        """Once a turn of the event loop: one look-up and one write of uses for all that arrived in
        it.
        """
        batches, self._arrived = self._arrived, []
        try:
            wanted = {key for batch in batches for key in batch.keys} - self._flights.keys()
            found = self._find(list(wanted))
            refused = {} if self.retry_refused else self._refusals(wanted - found.keys())
        except (
            Exception
        ) as error:  # in a callback of the loop: it reaches nobody but through the futures
            for batch in batches:
                batch.fail(self._told(error))
            return
        try:
            uses: list[tuple[Use, bytes]] = []
            for batch in batches:
                uses += [(use, key) for (_, use), key in zip(batch.asks, batch.keys, strict=True)]
            self._post((uses, batches))  # before any answer to them
            with self._sharing:
                flights: list[_Flight] | None = [] if self._shared else None
                for batch in batches:
                    self._dispatch(batch, found, refused, flights)
            if flights:
                self._post(Claim(flights))
        except Exception as error:
            self._stop(self._told(error))

    def _share(self, shared: bool) -> list[bytes]:
        """On the writer's thread: whether questions are to be claimed from now on. Gives the keys
        in flight.
        """
        with self._sharing:
            self._shared = shared
            return [key for key in list(self._flights) if key not in self._elsewhere]

    def _claimed(self, claim: Claim) -> None:
        """Ask what is ours, land what was answered meanwhile, wait for what others ask."""
        flights: list[_Flight] = claim.flights
        for flight in flights:
            if self._flights.get(flight.key) is not flight:
                continue
            self._elsewhere.pop(flight.key, None)
            answer = claim.found.get(flight.key)
            limit = flight.window.engine.max_model_len or 0
            if answer is not None and not (answer.finish == "context" and limit > answer.limit):
                self._flights.pop(flight.key)
                self.stats.reused += 1
                flight.land(answer)
            elif flight.key in claim.mine:
                flight.window.queue.append(flight)
            else:
                self._elsewhere[flight.key] = flight
        if self._elsewhere and (self._polling is None or self._polling.done()):
            self._polling = asyncio.get_running_loop().create_task(self._poll())

    async def _poll(self) -> None:
        """Look again for what other processes ask, when the ledger changed or a second is over: it
        was answered, or they failed or died.
        """
        version, asked = -1, 0.0
        while self._elsewhere and not self._closed:
            await asyncio.sleep(POLL_S)
            with db.translate_errors(self.file):
                now = self._reader.execute("PRAGMA data_version").fetchone()[0]
            if now != version or time.monotonic() - asked > 1:
                version, asked = now, time.monotonic()
                self._post(Claim(list(self._elsewhere.values())))

    def _refusals(self, keys: set[bytes]) -> dict[bytes, str]:
        with db.translate_errors(self.file):
            return db.refusals(self._reader, list(keys))

    def _dispatch(
        self,
        batch: _Batch,
        found: dict[bytes, Completion],
        refused: dict[bytes, str],
        unclaimed: list[_Flight] | None,
    ) -> None:
        """Queue the questions of a batch that are not answered, or add them to `unclaimed` where
        the ledger is shared.
        """
        limit = batch.window.engine.max_model_len or 0
        for i, key in enumerate(batch.keys):
            answer = found.get(key)
            if answer is not None and not (answer.finish == "context" and limit > answer.limit):
                batch.results[i] = answer
                self.stats.reused += 1
                continue
            if key in refused:
                batch.results[i] = RequestRefused(refused[key])
                self.stats.refused += 1
                continue
            batch.waiting += 1
            flight = self._flights.get(key)
            if flight is not None:
                self.stats.reused += 1
                flight.waiters.append((batch, i))
                continue
            flight = _Flight(key, batch.bodies[i], batch.asks[i][0], batch.window, [(batch, i)])
            self._flights[key] = flight
            (batch.window.queue if unclaimed is None else unclaimed).append(flight)
        self._staff(batch.window)

    def _staff(self, window: _Window) -> None:
        """Start workers while there is work: one task for each place in the window, not one for
        each question.

        None while a full window waits for the disk: a crash must not repeat more than promised.
        """
        most = window.engine.max_in_flight
        for _ in range(
            min(len(window.queue), most - window.active) if window.uncommitted < most else 0
        ):
            window.active += 1
            worker = asyncio.get_running_loop().create_task(self._work(window))
            window.workers.add(worker)
            worker.add_done_callback(window.workers.discard)

    async def _work(self, window: _Window) -> None:
        try:
            while window.queue and window.uncommitted < window.engine.max_in_flight:
                await self._fly(window.queue.popleft())
        except Exception as error:  # nobody awaits this task
            self._stop(self._told(error))
        finally:
            window.active -= 1

    async def _fly(self, flight: _Flight) -> None:
        self.stats.in_flight += 1
        try:
            if self._unprobed:
                await self._probe()
            completion = _clean(await self._asked(flight))
            self._post(AnswerRow(flight.key, flight.body, flight.request.model, completion, flight))
            flight.window.uncommitted += 1
        except TransportError as error:
            first, i = flight.waiters[0]
            self._post(Failure(first.asks[i][1].run, flight.key, error, flight))
            flight.window.uncommitted += 1
        except asyncio.CancelledError:
            self._flights.pop(flight.key, None)
            flight.fail(StoreError(f"{self.file}: closed before this was answered"))
            raise
        except Exception as error:  # for good: whoever asked learns it, and stops the run
            self._flights.pop(flight.key, None)
            flight.fail(error)
        finally:
            self.stats.in_flight -= 1

    async def _asked(self, flight: _Flight) -> Completion:
        """What the engine answers. Raises: as the engine."""
        engine = flight.window.engine
        if not observers:
            return await engine.complete(flight.key, flight.request)
        batch, i = flight.waiters[0]
        use = batch.asks[i][1]
        return await observed_call(engine, flight.key, flight.request, use, self._context)

    async def _probe(self) -> None:
        """Probe the engines, once for all questions that wait. Raises: as `Engine.probe`."""
        if self._probing is None or (self._probing.done() and self._unprobed):
            self._probing = asyncio.get_running_loop().create_task(self._probe_all())
        await asyncio.shield(self._probing)

    async def _probe_all(self) -> None:
        for engine in self._engines:
            engine.known_fingerprint = db.first_metrics(self._reader, CANARY, engine.identity)
        await asyncio.gather(*(engine.probe() for engine in self._engines))
        self._unprobed = False

    def _record_probes(self) -> None:
        for engine in self._engines:
            if engine.findings and self._writer.broken is None:
                found = {"name": "model probe", "subject": engine.identity}
                self.add_eval({**found, "metrics": dict(engine.findings)})
            if engine.fingerprint and not engine.known_fingerprint and self._writer.broken is None:
                found = {"name": CANARY, "subject": engine.identity}
                self.add_eval({**found, "metrics": dict(engine.fingerprint)})

    def _post(self, item: Any) -> None:
        """Hand to the writer at the end of this turn of the event loop: waking the thread for each
        item would cost more.
        """
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._send)
        self._outbox.append(item)

    def _send(self) -> None:
        items, self._outbox = self._outbox, []
        self._writer.put(items)

    def _committed(self, commit: Commit, error: StoreError | None) -> None:
        """On the writer's thread, after a commit."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                self._loop.call_soon_threadsafe(self._deliver, commit, error)

    def _deliver(self, commit: Commit, error: StoreError | None) -> None:
        """Deliver what is on disk; when the commit failed, fail everything that waits."""
        try:
            rows: list[AnswerRow | Failure] = [*commit.answers, *commit.failures]
            for item in rows:
                self._flights.pop(item.key, None)
                item.flight.window.uncommitted -= 1
            if error is None:
                self._land(commit)
            else:
                self._stop(error)
        except Exception as bug:
            self._stop(self._told(bug))

    def _land(self, commit: Commit) -> None:
        for answer in commit.answers:
            self.stats.asked += 1
            self.stats.prompt_tokens += answer.completion.prompt_tokens
            self.stats.completion_tokens += answer.completion.completion_tokens
            answer.flight.land(answer.completion)
        for failure in commit.failures:
            self.stats.failed += 1
            failure.flight.land(failure.error)
        for claim in commit.claims:
            self._claimed(claim)
        for _, batches in commit.uses:
            for batch in batches:
                batch.settle()
        for window in self._windows.values():
            self._staff(window)

    def _told(self, error: Exception) -> StoreError:
        """The error as one that names the ledger."""
        if isinstance(error, StoreError):
            return error
        told = StoreError(f"{self.file}: {type(error).__name__}: {error}")
        told.__cause__ = error
        return told

    def _stop(self, error: StoreError) -> None:
        """Fail everything that waits with `error`. Questions in flight are still recorded when
        answered.
        """
        for window in self._windows.values():
            window.queue.clear()
        self._flights.clear()
        for batch in self._waiting:
            batch.fail(error)

    def drop_queued(self, error: Exception) -> None:
        """Fail, in the event loop, all questions that wait for a place, and those that another
        process asks. What is in flight is still recorded.
        """
        waiting = list(self._elsewhere.values())
        self._elsewhere.clear()
        for window in self._windows.values():
            waiting += window.queue
            window.queue.clear()
        for flight in waiting:
            self._flights.pop(flight.key, None)
            flight.fail(error)

    async def close(self, drain: bool = True) -> None:
        """Wait for questions already asked (`drain`), drop the others, write, and shorten the WAL.

        Raises: StoreError if the last commit or the checkpoint failed.
        """
        if self._closed:
            return
        self._closed = True
        self.drop_queued(StoreError(f"{self.file}: closed before this was asked"))
        for window in self._windows.values():
            workers = list(window.workers)
            for worker in workers if not drain else ():
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        for task in (self._probing, self._polling):
            if task is not None:
                task.cancel()
        self._send()
        self._record_probes()
        if self.stats.damaged:
            warn(f"{self.file}: {self.stats.damaged:,} damaged answers were asked again")
        self._reader.close()
        try:
            await asyncio.to_thread(self._writer.close)
        finally:
            self._stop(StoreError(f"{self.file}: closed before this was answered"))
        db.kill_point("end")
        if self._writer.broken:
            raise self._writer.broken


def _clean(completion: Completion) -> Completion:
    """A lone surrogate (half an emoji, cut off by a server) cannot be stored as text: it becomes
    U+FFFD.
    """
    text = completion.text
    if text.isascii():
        return completion
    whole = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return completion if whole == text else replace(completion, text=whole)
