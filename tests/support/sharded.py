"""Runs over shards with workers in threads of this process: no process is started."""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefab.factory.store import store
from prefab.pipelines.config.loader import models
from prefab.pipelines.scale.driver import Driver, prepare
from prefab.pipelines.scale.launchers import WorkerEvent
from prefab.pipelines.scale.worker import Worker, kept_engines
from prefab.pipelines.store.fill import read_filled

# of a table's columns, those that tell when something was done
WHEN = {
    "calls": ["answered_at"],
    "runs": ["started_at", "last_start"],
    "evals": ["eval", "value", "evaluated_at"],
    "failures": ["failed_at"],
}


class ThreadLauncher:
    """Workers as threads. `lose` has the shards at whose beginning a worker is lost, once each;
    `sets` the overrides of single workers. So many workers are ready `together`.
    """

    def __init__(
        self,
        setup: Any,
        lose: tuple[int, ...] = (),
        sets: dict[int, list[str]] | None = None,
        together: int = 0,
    ) -> None:
        self.setup, self.lose, self.sets, self.together = setup, list(lose), sets or {}, together
        self.ready: list[WorkerEvent] = []
        self.events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        self.workers: dict[int, tuple[Worker, asyncio.AbstractEventLoop, threading.Thread]] = {}
        self.given: list[int] = []  # shards, in the order in which they were given out

    def start(self) -> int:
        number, ready = len(self.workers) + 1, threading.Event()

        def emit(data: dict[str, Any]) -> None:
            event = WorkerEvent(number, data["event"], data)
            if data["event"] == "ready" and len(self.ready) < self.together:
                self.ready.append(event)
                for one in self.ready if len(self.ready) == self.together else ():
                    self.events.put(one)
            else:
                self.events.put(event)

        async def work() -> None:
            sets = self.setup.sets + self.sets.get(number, [])
            worker = Worker(replace(self.setup, sets=sets), emit)
            self.workers[number] = (worker, asyncio.get_running_loop(), thread)
            ready.set()
            await worker.main()

        thread = threading.Thread(target=lambda: asyncio.run(work()), daemon=True)
        thread.start()
        ready.wait()
        return number

    def send(self, worker: int, message: dict[str, Any]) -> None:
        if "do" in message:
            shard = message["do"]["shard"]
            self.given.append(shard)
            if shard in self.lose:
                self.lose.remove(shard)
                self.events.put(WorkerEvent(worker, "gone", {"why": "the test"}))
                return
        one, loop, _ = self.workers[worker]
        loop.call_soon_threadsafe(one.inbox.put_nowait, message)

    def kill(self, worker: int) -> None:
        one, loop, _ = self.workers[worker]
        loop.call_soon_threadsafe(one.inbox.put_nowait, None)

    def capacity(self) -> int:
        return 0

    def waiting(self) -> str:
        return "a thread"

    def close(self) -> None:
        for _, loop, thread in self.workers.values():
            if thread.is_alive():
                worker = next(w for w, _, t in self.workers.values() if t is thread)
                loop.call_soon_threadsafe(worker.inbox.put_nowait, {"end": True})
        for _, _, thread in self.workers.values():
            thread.join()


def run_sharded(
    value: dict[str, Any], workers: int = 2, lose: tuple[int, ...] = (), sets: tuple[str, ...] = ()
) -> tuple[Any, ThreadLauncher]:
    """The result of a run over shards, and its launcher."""
    scaled = prepare(value, sets, workers, True)
    launcher = ThreadLauncher(scaled.setup, lose)
    return Driver(scaled, launcher).run(models(kept_engines(scaled.loaded))), launcher


Rows = dict[str, list[Any]]


def rows(folder: Path) -> Rows:
    """By table, the rows of a store without what tells when they were made, sorted."""

    def of_tables(read: store.Read) -> Rows:
        found = {}
        for table in (*store.TABLES, "pairs", "readings", "unscored"):
            left_out = ", ".join(WHEN.get(table, []))
            columns = f"* EXCLUDE ({left_out})" if left_out else "*"
            found[table] = sorted(read(f"SELECT {columns} FROM {table}").rows(), key=repr)
        return found

    return read_filled(folder, of_tables)


def same_rows(ours: Rows, other: Path, but: tuple[str, ...] = ()) -> None:
    """See that a store holds these rows in every table but some."""
    theirs = rows(other)
    for table in ours.keys() - set(but):
        assert ours[table] == theirs[table], table


def published_calls(folder: Path) -> int:
    """How many calls the segments of a shared folder have."""
    manifests = [json.loads(path.read_bytes()) for path in folder.glob("segments/*/[0-9]*.json")]
    return sum(one["tables"].get("calls", {"rows": 0})["rows"] for one in manifests)
