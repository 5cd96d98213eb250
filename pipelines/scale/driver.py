"""Gives shards to workers, holds the budget over all of them, and records what is done.

Only the driver writes the states of shards. A worker that ends in the middle of a shard is
replaced, and the shard is given to another one, which restores what was published; a shard that
ends its worker `retries` times is set aside and named.
"""

from __future__ import annotations

import queue
import re
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefab.factory.console import Progress, warn
from prefab.factory.errors import ConfigError, EngineError, StoreError
from prefab.factory.ledger import db
from prefab.factory.object_store import files_at, is_address
from prefab.factory.store.shared import ShardState, SharedFolder
from prefab.factory.store.store import HeldError
from prefab.pipelines.config.loader import ResolvedPipeline, deciding, models, resolve_pipeline
from prefab.pipelines.run.context import BUDGET_FROM
from prefab.pipelines.run.interrupts import Interrupted, heeded, name_of
from prefab.pipelines.run.runner import RunResult, fill_store, in_event_loop
from prefab.pipelines.scale.dividing import (
    ASKED,
    DRAIN_S,
    MOVE_S,
    Busy,
    Divided,
    Pace,
    is_worth_dividing,
    is_worth_sharing,
)
from prefab.pipelines.scale.launchers import Launcher, LocalLauncher, WorkerEvent
from prefab.pipelines.scale.lease import Lease
from prefab.pipelines.scale.results import sum_counts
from prefab.pipelines.scale.sharding import Part, ShardedPrompts, shard_prompts
from prefab.pipelines.scale.worker import WorkerSetup, kept_engines
from prefab.pipelines.store.calibrate import calibrate_ended
from prefab.pipelines.store.calibrations import CALIBRATION
from prefab.pipelines.store.catalogue import update_copy, update_ledger

DRIVER = "driver.lease"  # the file of whoever drives the shared folder
CALLS_A_SHARD = 1_000_000
WAIT_S = 30.0  # after which it is told that a worker does not start
LOOK_S = 5.0  # between two looks at how many workers there is room for
LOOK_AT = 256  # shards that wait, among which the next one is chosen
SEGMENT_BYTES = 130  # that a call takes once published, with short texts (benchmarks/scale.py)
SHARDS_A_WORKER = 8  # so that the last ones end at nearly the same time
CALLS_WORTH_A_SHARD = 25_000  # 5 CPU s; a shard takes 0.4 CPU s by itself (benchmarks/scale.py)


@dataclass(slots=True)
class Scaled:
    """A run over many shards: what is known of it before anything is asked."""

    loaded: ResolvedPipeline
    shared: SharedFolder
    prompts: ShardedPrompts
    setup: WorkerSetup
    workers: int
    retries: int


def run_on(on: str, source: str | Path, sets: Iterable[str] = (), quiet: bool = True) -> RunResult:
    """Make the preference data of a pipeline where `on` says: `local:N`, N processes of this
    machine (without N, as many as `scale.workers` says, or two); `ray` or `ray:ADDRESS`, a cluster.

    Raises: ConfigError for any other place; else as `run_local` and `run_ray`.
    """
    place, _, rest = on.partition(":")
    if place == "ray":
        return run_ray(source, sets, rest, quiet)
    if place != "local" or (rest and not re.fullmatch("[1-9][0-9]{0,3}", rest)):
        raise ConfigError(f"--on {on}: write local:N, such as local:4, or ray, or ray:ADDRESS")
    return run_local(source, sets, int(rest) if rest else None, quiet)


def run_local(
    source: str | Path | dict[str, Any],
    sets: Iterable[str] = (),
    workers: int | None = None,
    quiet: bool = True,
) -> RunResult:
    """Make the preference data of a pipeline with several processes of this machine. The same call
    continues a run that was interrupted.

    Args:
        source: As for `prefab.run`.
        sets: Overrides of fields.
        workers: The number of processes; left out, `scale.workers` of the pipeline, or two.
        quiet: Do not show progress.

    Returns:
        As `prefab.run`; the store is in shards (docs/scale.md).

    Raises:
        ConfigError: A mistake in the pipeline.
        EngineError: No worker can start its engines.
        StoreError: The store is damaged, or another driver works on it.
    """
    scaled = prepare(source, sets, workers, quiet)
    with exclusive(scaled.shared):
        texts = models(kept_engines(scaled.loaded))
        return Driver(scaled, LocalLauncher(scaled.setup), quiet).run(texts)


def run_ray(
    source: str | Path | dict[str, Any],
    sets: Iterable[str] = (),
    address: str = "",
    quiet: bool = True,
) -> RunResult:
    """As `run_local`, with actors of a Ray cluster as workers: as many as `scale.workers` says, or
    as there is room for.

    Args:
        source: As for `prefab.run`; the machines of the cluster read the same files.
        sets: Overrides of fields.
        address: HOST:PORT of the cluster; empty: the one that runs on this machine.
        quiet: Do not show progress.

    Returns:
        As `run_local`.

    Raises:
        ConfigError: A mistake in the pipeline; Ray is not installed, or the cluster runs another
            version.
        EngineError: There is no cluster.
    """
    from prefab.pipelines.scale.on_ray import RayLauncher, connected, gpus_of, room_for

    with connected(address, quiet):
        scaled = prepare(source, sets, None, quiet, lambda loaded: room_for(gpus_of(loaded)))
        launcher = RayLauncher(scaled.setup, gpus_of(scaled.loaded))
        with exclusive(scaled.shared):
            texts = models(kept_engines(scaled.loaded))
            return Driver(scaled, launcher, quiet).run(texts)


def prepare(
    source: str | Path | dict[str, Any],
    sets: Iterable[str],
    workers: int | None,
    quiet: bool,
    room: Callable[[ResolvedPipeline], int] = lambda loaded: 2,
) -> Scaled:
    """Read the pipeline, make the shared folder where there is none, and divide the prompts.
    `room` gives the number of workers where neither `workers` nor `scale.workers` does.
    """
    sets = list(sets)
    loaded = resolve_pipeline(source, sets)
    config = loaded.config
    scale = config.scale_settings()
    workers = workers or scale.workers or room(loaded)
    shared = _shared_folder(loaded, scale.shards or number_of_shards(loaded, workers))
    address = shared.files.address
    if scale.shards and scale.shards != shared.shards:
        raise ConfigError(
            f"scale.shards: {address} has {shared.shards:,} shards, and their number cannot change. "
            "Leave it out, or name a new folder with scale.shared"
        )
    prompts = shard_prompts(loaded, shared, quiet)
    local = scale.local or str(Path(tempfile.gettempdir()) / f"prefab-{shared.id}")
    setup = WorkerSetup(
        source=source if isinstance(source, dict) else str(source),
        sets=sets,
        folder=str(Path.cwd()),
        shared=address,
        id=shared.id,
        local=str(Path(local).absolute()),
        prompts=prompts.folder,
        publish_s=scale.publish_s,
        workers=workers,
    )
    return Scaled(loaded, shared, prompts, setup, workers, scale.retries)


def _shared_folder(loaded: ResolvedPipeline, shards: int) -> SharedFolder:
    """The shared folder, made where there is none. Raises: ConfigError, StoreError."""
    store, name = loaded.config.store, loaded.config.scale_settings().shared
    if is_address(store):
        raise ConfigError(
            f"store: {store} is an address, and must be the path of a folder of this machine. Set "
            f"scale.shared={store}"
        )
    if name is None or not is_address(name):
        return SharedFolder.create(Path(name or store).absolute(), shards)
    return SharedFolder.create(Path(store).absolute(), shards, files_at(name))


def number_of_shards(loaded: ResolvedPipeline, workers: int, n_prompts: int | None = None) -> int:
    """The number of shards of a new store: one a worker at least; more where each has
    `CALLS_WORTH_A_SHARD` calls, up to `SHARDS_A_WORKER` a worker; and no more than `CALLS_A_SHARD`
    calls in each. A prompt's calls are its samples, and each pair in both orders under each
    principle.
    """
    config = loaded.config
    samples = config.policy.samples
    principles = max(1, len(loaded.constitution.principles))
    a_prompt = samples * (1 + principles * loaded.revises)
    a_prompt += samples * (samples - 1) * principles * len(loaded.judges)
    n_prompts = sum(1 for _ in loaded.prompts) if n_prompts is None else n_prompts
    calls = n_prompts * a_prompt
    wanted = max(workers, min(SHARDS_A_WORKER * workers, calls // CALLS_WORTH_A_SHARD))
    return max(1, min(n_prompts, max(wanted, -(-calls // CALLS_A_SHARD))))


@contextmanager
def exclusive(shared: SharedFolder) -> Iterator[None]:
    """While this process drives the shared folder. Raises: StoreError where another one does."""
    lease = Lease(shared.files, DRIVER)
    if owner := lease.take():
        raise StoreError(
            f"{shared.files.address}: {owner} drives a run here. Stop it, or wait for it"
        )
    try:
        yield
    finally:
        lease.give_back()


def is_done(scaled: Scaled, state: ShardState, run: int) -> bool:
    """Whether all questions of a shard in a run are answered and its rows are there."""
    if not scaled.prompts.counts[state.shard]:
        return True
    ended = state.runs.get(str(run), {})
    same = ended.get("prompts") == scaled.prompts.digests[state.shard]
    whole = scaled.shared.has_rows(state)
    return ended.get("state") == "done" and same and whole and not ended.get("again")


def record_result(scaled: Scaled, shard: int, run: int, data: dict[str, Any]) -> ShardState:
    """Record what a `ShardRun` gave. Returns: the shard's new state."""
    shared = scaled.shared
    old = shared.state(shard)
    tables = {table: (name, size) for table, (name, size) in data["tables"].items()}
    state = ShardState(shard, old.runs, tables, data["head"], data["waiting"])
    if counts := data["counts"]:
        state.runs[str(run)] = {
            "state": data["state"],
            # calls that failed are made again, and people may have given their labels
            "again": counts["failed"] > counts["refused"] or counts["awaited"] > 0,
            "prompts": scaled.prompts.digests[shard],
            "counts": counts,
        }
    shared.write_state(state)
    shared.drop_rows(shard, [tables, old.tables])
    return state


class Driver:
    """One run over all shards. `launcher` starts the workers."""

    def __init__(
        self,
        scaled: Scaled,
        launcher: Launcher,
        quiet: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.scaled, self.launcher, self.quiet = scaled, launcher, quiet
        self.run_id = 0
        self.models: dict[str, str] = {}
        self.states: dict[int, ShardState] = {}
        self.pending: list[Part] = []
        self.idle: list[int] = []
        self.busy: dict[int, Busy] = {}
        self.starting: set[int] = set()
        self.places: dict[int, str] = {}  # by worker, where its ledgers are
        self.slow: set[int] = set()  # workers that took more than twice the usual time
        self.killed: set[int] = set()  # workers that did not stop in time
        self.divided: dict[int, Divided] = {}  # by shard
        self.lost: dict[Part, Pace] = {}  # parts that wait, whose worker was lost
        self.is_worth_dividing, self.is_worth_sharing = is_worth_dividing, is_worth_sharing
        self.speeds: list[float] = []  # of shards that ended, in prompts a second
        self.failures: dict[int, list[str]] = {}  # by shard, why its workers ended
        self.counts: dict[int, dict[str, Any]] = {}  # of the shards that ended now
        self.reason, self.signal, self.told = "", 0, 0
        self.derive = False
        # whether workers join and leave as the launcher has room for them
        self.grows = not scaled.loaded.config.scale_settings().workers and launcher.capacity() > 0
        self._began = self._asked_at = self._looked = clock()
        self._told_waiting = self._was_ready = False
        self._starts_failed = 0  # since a worker was ready
        self._answered = False  # whether any worker has got an answer

    def run(self, models: dict[str, str]) -> RunResult:
        """All shards of the run that are not done. `models`: the engines' identities, as texts."""
        loaded, shared = self.scaled.loaded, self.scaled.shared
        self.models = models
        texts = {**loaded.texts, **models}
        record = shared.begin_run(loaded.config.name, loaded.resolved, texts, deciding)
        shared.start_run(record["id"])
        self.run_id = record["id"]
        self.states = dict(enumerate(shared.states_of(range(shared.shards))))
        update_copy(shared)
        self._publish_head()
        try:
            self._work(
                shard
                for shard in self.states
                if not is_done(self.scaled, self.states[shard], self.run_id)
            )
            result = self._result(record)
            if result.state == "done":
                self._check_shares(result)
            if result.state == "done":
                self._finish(result)
        finally:
            self.launcher.close()
        update_copy(shared)
        fill_store(shared.folder, self.quiet)
        result.seconds = self.clock() - self._began
        return result

    def _publish_head(self) -> None:
        """Publish the calibrations that were learned, and the labels of people who are judges."""
        shared, evals, labels = self.scaled.shared, list[str](), list[str]()
        update_ledger(shared.folder)
        file = shared.folder / db.FILE
        with closing(db.connect(file, readonly=True)) as con, db.translate_errors(file):
            of_name = "SELECT value FROM evals WHERE json_extract(value, '$.name') = ? ORDER BY id"
            evals = [value for (value,) in con.execute(of_name, (CALIBRATION,))]
            if any(judge.shows == "people" for judge in self.scaled.loaded.judges):
                labels = [v for (v,) in con.execute("SELECT value FROM human_labels ORDER BY id")]
        shared.write_head(evals, labels)

    def _finish(self, result: RunResult) -> None:
        """Learn the calibration of a run that is done, and make the rows of those shards anew that
        do not have it yet.
        """
        folder = self.scaled.shared.folder
        if result.outcomes.get("a") or result.outcomes.get("b"):
            update_copy(self.scaled.shared)
            with suppress(HeldError):  # another program holds the store: the next run does it
                learned = in_event_loop(calibrate_ended(folder, f"{result.name}@{result.version}"))
                result.p_chosen = learned.sentence()
        self._publish_head()
        head = self.scaled.shared.head_digest()
        self.derive = True
        self._work(s for s, state in self.states.items() if state.tables and state.head != head)

    def _work(self, shards: Iterable[int]) -> None:
        """Give these shards to workers until all are done or the run is to stop."""
        # the largest shard last: it is the first to be taken
        by_size = sorted(shards, key=lambda shard: self.scaled.prompts.counts[shard])
        self.pending = [Part(shard) for shard in by_size]
        if not self.pending:
            return
        total = sum(self.scaled.prompts.counts)
        name = self.scaled.loaded.config.name
        with self._interruptible(), Progress(name, total, self.quiet, "prompts") as progress:
            while self.busy or (self.pending and not self.reason):
                self._staff()
                self._hand_out()
                self._divide()
                self._receive()
                self._heed()
                self._check_budget()
                self._show(progress)

    def _staff(self) -> None:
        """Start workers for the shards that wait."""
        now = self.clock()
        if self.grows and now > self._looked + LOOK_S:
            self._looked = now
            self.scaled.workers = max(self.launcher.capacity(), 1)
        if self.starting and not self._told_waiting and now > self._asked_at + WAIT_S:
            self._told_waiting = True
            warn(f"waiting: {self.launcher.waiting()}")
        there = len(self.idle) + len(self.busy) + len(self.starting)
        wanted = min(self.scaled.workers, len(self.pending) + len(self.busy))
        for _ in range(0 if self.reason else wanted - there):
            self.starting.add(self.launcher.start())
            self._asked_at, self._told_waiting = now, False

    def _hand_out(self) -> None:
        while self.pending and not self.reason:
            found = ((worker, self.next_part(worker)) for worker in self._free_workers())
            worker, part = next((pair for pair in found if pair[1] is not None), (0, None))
            if part is None:
                return
            self.pending.remove(part)
            left = self._left_to_share(part)
            if left and self.scaled.shared.place(part.name) != self.places[worker]:
                self._share(part, left)
                continue
            self.idle.remove(worker)
            self.scaled.shared.write_place(part.name, self.places[worker])
            self.busy[worker] = Busy(part, self.clock())
            digest = self.scaled.prompts.digests[part.shard]
            job = asdict(part) | {"run": self.run_id, "derive": self.derive, "digest": digest}
            self.launcher.send(worker, {"do": job, "models": self.models})
            if left:  # first it publishes what the lost worker had not, whose ledger is here
                self.launcher.send(worker, {"stop": True, "divided": True})

    def _left_to_share(self, part: Part) -> int:
        """How many prompts are left of a part whose worker was lost, where it is to be divided
        before it is given out again because several workers have, or soon have, nothing else to
        do; else 0.
        """
        if (pace := self.lost.pop(part, None)) is None:
            return 0
        workers = self._soon_free() - len(self.pending)
        makes_rows = part.is_whole and bool(self.divided[part.shard].parts)
        if workers < 2 or self.derive or makes_rows:
            return 0
        return pace.left if self.is_worth_sharing(pace, self._usual(pace), workers) else 0

    def _free_workers(self) -> list[int]:
        """The idle workers, the last one first; a slow one only where there are no others."""
        fast = [worker for worker in reversed(self.idle) if worker not in self.slow]
        others = (self.busy.keys() | self.starting) - self.slow
        return fast or ([] if others else self.idle[-1:])

    def next_part(self, worker: int) -> Part | None:
        """The largest part that waits: of those whose ledger is where this worker is, else of
        those whose ledger is with no other worker.

        Returns:
            None while workers start that may be where the ledgers of all these are. A ledger has
            what its worker had not published when it ended.
        """
        shared, here = self.scaled.shared, self.places[worker]
        places = {part: shared.place(part.name) for part in self.pending[-LOOK_AT:]}
        if mine := [part for part, place in places.items() if place == here]:
            return mine[-1]
        if self.starting and self.clock() < self._asked_at + MOVE_S:
            return next((part for part in reversed(places) if not places[part]), None)
        there = {self.places[other] for other in self._living() & self.places.keys()}
        free = [part for part, place in places.items() if place not in there]
        return (free or self.pending)[-1]

    def _living(self) -> set[int]:
        return {*self.idle, *self.busy, *self.starting}

    def _divide(self) -> None:
        """Where a worker is idle and no shard waits: stop the part in work that would take longest,
        so that idle workers go on with it. A worker that does not stop is killed.
        """
        now = self.clock()
        helpers = sum(worker not in self.slow for worker in self.idle)
        if (
            self._wait_for_stopped(now)
            or not helpers
            or not self.busy
            or self.pending
            or self.reason
            or self.derive
        ):
            return
        asking = [worker for worker, busy in self.busy.items() if busy.counts]
        if not asking:  # the others start engines, or restore their shards
            return
        worker = max(asking, key=lambda worker: self._pace(worker).left_s)
        pace = self._pace(worker)
        usual = self._usual(pace)
        is_slow = pace.per_s < usual / 2
        if self.is_worth_dividing(pace, usual, helpers + (not is_slow)):
            self.busy[worker].stopped = now
            if is_slow:
                self.slow.add(worker)
            self.launcher.send(worker, {"stop": True, "divided": True})

    def _wait_for_stopped(self, now: float) -> bool:
        """Whether a worker was told to stop and works yet; after `DRAIN_S` it is killed."""
        stopped = [worker for worker, busy in self.busy.items() if busy.stopped is not None]
        for worker in stopped:
            if now > (self.busy[worker].stopped or 0.0) + DRAIN_S and worker not in self.killed:
                self.killed.add(worker)
                self.launcher.kill(worker)
        return bool(stopped)

    def _pace(self, worker: int) -> Pace:
        busy = self.busy[worker]
        return busy.pace(self.clock(), self.scaled.prompts.counts[busy.part.shard])

    def _usual(self, pace: Pace) -> float:
        """The usual speed in prompts a second; before a shard has ended, that of this worker."""
        return statistics.median(self.speeds) if self.speeds else pace.per_s

    def _soon_free(self) -> int:
        """How many workers of the usual speed are idle, or will be within `MOVE_S`."""
        ending = (w for w in self.busy if self._pace(w).left_s < MOVE_S)
        return sum(worker not in self.slow for worker in [*self.idle, *ending])

    def _go_on(self, busy: Busy) -> None:
        """Give out again what a worker was told to stop."""
        part = busy.part
        left = busy.pace(self.clock(), self.scaled.prompts.counts[part.shard]).left
        self._share(part, left)

    def _share(self, part: Part, left: int) -> None:
        """Give out a part of which so many prompts are left: a part of it for each worker that is
        free.
        """
        parts = part.split(max(1, min(self._soon_free(), left)))
        divided = self.divided.setdefault(part.shard, Divided())
        if len(parts) > 1 or not part.is_whole:
            divided.open += len(parts) - (not part.is_whole)
        self.pending += parts

    def _receive(self) -> None:
        """Take in what workers told, waiting for a moment for the first of it."""
        wait = 0.2
        try:
            while True:
                self._take(self.launcher.events.get(timeout=wait))
                wait = 0.0
        except queue.Empty:
            pass

    def _take(self, event: WorkerEvent) -> None:
        handlers: dict[str, Callable[[int, dict[str, Any]], None]] = {
            "ready": self._ready,
            "progress": self._progress,
            "done": self._done,
            "failed": self._failed,
            "gone": self._gone,
        }
        handlers[event.event](event.worker, event.data)

    def _ready(self, worker: int, data: dict[str, Any]) -> None:
        self.starting.discard(worker)
        self.places[worker] = data["place"]
        self.idle.append(worker)
        self._was_ready, self._starts_failed = True, 0

    def _progress(self, worker: int, data: dict[str, Any]) -> None:
        if worker in self.busy:
            busy = self.busy[worker]
            if data["counts"] and not busy.counts:
                busy.began = self.clock()
            busy.counts = data["counts"]
            self._answered |= bool(data["counts"].get("asked"))

    def _done(self, worker: int, data: dict[str, Any]) -> None:
        busy = self.busy.pop(worker)
        part, counts = busy.part, data["counts"]
        self._answered = True
        self.idle.append(worker)
        if data["rows"]:
            self.states[part.shard] = record_result(self.scaled, part.shard, self.run_id, data)
        if self.derive:
            return
        self._count(part, counts, whole=data["rows"])
        if data["state"] == "stopped" and not self.reason:
            self._go_on(busy)
        elif not part.is_whole:
            divided = self.divided[part.shard]
            divided.open -= 1
            if not divided.open and part.shard not in self._set_aside():
                self.pending.append(Part(part.shard))
        elif counts["asked"] and part.shard not in self.divided:
            self.speeds.append(counts["prompts"] / max(self.clock() - busy.began, 1e-3))

    def _count(self, part: Part, counts: dict[str, Any], whole: bool) -> None:
        """Take in the counts of a part that ended. What was asked before the shard was divided, or
        by a worker that was lost, was asked in this run, too.
        """
        divided = self.divided.get(part.shard, Divided())
        if not part.is_whole:
            divided.parts.append(counts)
            return
        before = divided.asked()
        for name in ASKED:
            counts[name] += before[name]
        # what a lost worker had not published is asked again, and not reused
        counts["reused"] = max(0, counts["reused"] - before["asked"])
        if whole:
            self.counts[part.shard] = counts
        else:
            self.divided[part.shard] = Divided(counts)

    def _failed(self, worker: int, data: dict[str, Any]) -> None:
        """A worker could not do its shard, or could not begin. It is replaced.

        Raises: EngineError when a shard is set aside before any engine has answered.
        """
        if data["fatal"]:
            raise ConfigError(data["message"])
        if worker in self.starting:
            self._not_started(worker, data["message"], fatal=not self._was_ready)
        self._lost(worker, data["message"])
        self.launcher.kill(worker)
        if data["error"] == "EngineError" and not self._answered and self._set_aside():
            raise EngineError(f"{data['message']}. No shard has an answer, so the run ends")

    def _gone(self, worker: int, data: dict[str, Any]) -> None:
        if worker in self.starting:
            self._not_started(worker, f"a worker ended before it was ready ({data['why']})")
        self._lost(worker, f"its process ended ({data['why']})")

    def _not_started(self, worker: int, why: str, fatal: bool = False) -> None:
        """A worker could not begin: its machine may be going. Raises: EngineError when that happens
        again and again.
        """
        self.starting.discard(worker)
        self._starts_failed += 1
        if fatal or self._starts_failed >= self.scaled.retries:
            raise EngineError(why)
        warn(f"{why}; another one is started")

    def _lost(self, worker: int, why: str) -> None:
        if worker in self.idle:
            self.idle.remove(worker)
        if worker not in self.busy:
            return
        busy = self.busy.pop(worker)
        shard = busy.part.shard
        self.lost[busy.part] = busy.pace(self.clock(), self.scaled.prompts.counts[shard])
        self.divided.setdefault(shard, Divided()).lost.append(busy.counts)
        if busy.stopped is not None:  # it was ended, or died, while others waited for it
            self.pending.append(busy.part)
            return
        reasons = self.failures.setdefault(shard, [])
        reasons.append(why)
        warn(f"shard {shard}: its worker was lost: {why}")
        if len(reasons) < self.scaled.retries:
            self.pending.append(busy.part)
        else:
            self.pending = [part for part in self.pending if part.shard != shard]
            warn(f"shard {shard} is set aside after {len(reasons)} workers were lost")

    def _set_aside(self) -> list[int]:
        """The shards that are not given out again."""
        return sorted(s for s, why in self.failures.items() if len(why) >= self.scaled.retries)

    def _check_budget(self) -> None:
        """Stop all workers when a budget is passed, summed over what is done and in work."""
        if self.reason:
            return
        budget = self.scaled.loaded.config.budget
        total = self.totals()
        answers = total["answers"]
        for name, limit in (("unscored", budget.unscored), ("failed", budget.failed)):
            if limit is not None and answers >= BUDGET_FROM and total[name] > limit * answers:
                self._stop(_passed(name, total[name], answers, limit))
        for name, of, cap in (
            ("calls", "asked", budget.calls),
            ("tokens", "tokens", budget.tokens),
        ):
            if cap is not None and total[of] >= cap:
                self._stop(
                    f"{total[of]:,} {name} were used: the cap budget.{name} of {cap:,} is reached"
                )

    def totals(self) -> dict[str, int]:
        """What was done in all shards together, since this run of the driver began."""
        total = dict.fromkeys(("prompts", "asked", "reused", "tokens", "answers", "unscored"), 0)
        total["failed"] = 0
        for counts in [busy.counts for busy in self.busy.values()]:
            for name in total:
                total[name] += counts.get(name, 0)
        for shard, divided in self.divided.items():
            if shard not in self.counts:
                before = divided.asked()
                total["asked"] += before["asked"]
                total["tokens"] += before["prompt_tokens"] + before["completion_tokens"]
        for ended in self.counts.values():
            total["prompts"] += ended["prompts"]
            total["asked"] += ended["asked"]
            total["reused"] += ended["reused"]
            total["tokens"] += ended["prompt_tokens"] + ended["completion_tokens"]
            total["answers"] += ended["asked"] + ended["reused"] + ended["failed"]
            total["unscored"] += sum(ended["unscored"].values())
            total["failed"] += ended["failed"]
        return total

    def _check_shares(self, result: RunResult) -> None:
        """See at the end of a run that no share of its budget is passed, over all answers."""
        budget = self.scaled.loaded.config.budget
        answers = result.asked + result.reused + result.failed
        n_unscored = sum(result.unscored.values())
        for name, n, limit in (
            ("unscored", n_unscored, budget.unscored),
            ("failed", result.failed, budget.failed),
        ):
            if limit is not None and n > limit * answers:
                result.state = "budget"
                result.reason = _passed(name, n, answers, limit)

    def _stop(self, reason: str, number: int = 0) -> None:
        """Let the workers finish what is in flight, and take no new shard."""
        self.reason, self.signal = reason, number
        for worker in self.busy:
            self.launcher.send(worker, {"stop": True})

    def _heed(self) -> None:
        """Stop when a signal came."""
        if self.told and not self.signal:
            if not self.quiet:
                warn("stopping: workers finish what is in flight (Ctrl-C again does not wait)")
            self._stop(f"stopped by {name_of(self.told)}", self.told)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Ctrl-C drains; a second one ends the workers at once."""

        def told(number: int, _: Any) -> None:
            if self.told:
                for worker in [*self.busy, *self.idle, *self.starting]:
                    self.launcher.kill(worker)
                raise Interrupted(number, "what is published is kept")
            self.told = number  # a handler may come in the middle of a message to a worker

        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, told) for number in heeded()} if main else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _show(self, progress: Progress) -> None:
        total = self.totals()
        done = sum(
            self.scaled.prompts.counts[shard]
            for shard in self.states
            if shard not in self.counts and self._was_done(shard)
        )
        seconds = self.clock() - self._began
        rate = {"calls/s": round(total["asked"] / seconds)} if total["asked"] else {}
        failed = {"failed": total["failed"]} if total["failed"] else {}
        facts: dict[str, Any] = {
            "calls": total["asked"],
            **rate,
            "reused": total["reused"],
            **failed,
        }
        progress.advance(done + total["prompts"] - progress.done, **facts, workers=len(self.busy))

    def _was_done(self, shard: int) -> bool:
        working = [busy.part for busy in self.busy.values()]
        known = {part.shard for part in [*working, *self.pending]}
        return shard not in known | self.failures.keys() | self.divided.keys()

    def _result(self, record: dict[str, Any]) -> RunResult:
        """The sum of all shards: those that ended now as they were, those of before as reused."""
        shared = self.scaled.shared
        ended: list[dict[str, Any]] = []
        for shard, state in self.states.items():
            run = state.runs.get(str(self.run_id))
            if shard in self.counts:
                ended.append(self.counts[shard])
            elif shard in self.divided and (counted := self.divided[shard].counts()):
                ended += counted
            elif run is not None:
                counts = dict(run["counts"])
                counts["reused"] += counts["asked"]
                ended.append({**counts, "asked": 0, "prompt_tokens": 0, "completion_tokens": 0})
        result = sum_counts(ended, record, shared.folder)
        result.malformed = self.scaled.prompts.malformed
        result.seconds = self.clock() - self._began
        if self.signal:
            result.state, result.reason, result.signal = "stopped", self.reason, self.signal
        elif self.reason:
            result.state, result.reason = "budget", self.reason
        elif aside := self._set_aside():
            names = ", ".join(map(str, aside[:10]))
            last = self.failures[aside[0]][-1]
            raise EngineError(
                f"{len(aside):,} of {shared.shards:,} shards were set aside ({names}), each after "
                f"{self.scaled.retries} workers were lost; of shard {aside[0]} the last one: {last}. "
                "All other shards are done; the same command tries these again"
            )
        return result


def _passed(name: str, n: int, answers: int, limit: float) -> str:
    what = {"unscored": "are unscored", "failed": "failed"}[name]
    return f"{n:,} of {answers:,} answers {what}: more than the budget.{name} of {limit:.1%} allows"
