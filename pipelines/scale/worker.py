"""A worker: does one shard after another with the same engines, in one event loop.

As a process (`python -m prefab.pipelines.scale.worker`) it reads messages from stdin and writes
events to stdout, a JSON object a line. When stdin ends, whoever gave it work is gone: it asks
nothing more, keeps what is answered within two seconds, publishes it and ends.
"""

from __future__ import annotations

import asyncio
import io
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from prefab.factory.engines.lifecycle import KeptEngine
from prefab.factory.errors import ConfigError, EngineError, PrefabError
from prefab.factory.logs import logging_by_environment
from prefab.factory.object_store import files_at
from prefab.factory.shared_files import LocalFiles
from prefab.factory.store.shared import MARKER, SharedFolder, read_json
from prefab.factory.tracing import tracing_by_environment
from prefab.factory.types import Engine
from prefab.pipelines.config.loader import (
    ResolvedPipeline,
    make_engines,
    models,
    resolve_pipeline,
)
from prefab.pipelines.run.runner import in_event_loop
from prefab.pipelines.scale.shard import ShardJob, ShardRun
from prefab.pipelines.scale.sharding import prompts_of

END_S = 1.5  # after which a worker whose driver is gone waits for no answer
PUBLISH_S = 30.0  # that it then has to publish
TICK_S = 0.5  # between two events that tell how far a shard is
Emit = Callable[[dict[str, Any]], None]
WITH_ADDRESS = ("url", "urls", "base_url")


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What every worker of a run is told at its start. `workers` share the servers with addresses:
    each asks its part of `max_in_flight`. `id` is that of the shared folder.
    """

    source: str | dict[str, Any]
    sets: list[str]
    folder: str  # the working directory, from which the paths are seen
    shared: str
    id: str
    local: str
    prompts: str  # the folder of the shards' prompts in the shared folder
    publish_s: float
    workers: int


def kept_engines(loaded: ResolvedPipeline, workers: int = 1) -> dict[str, Engine]:
    """The engines of a pipeline, which stay started from shard to shard."""
    made: dict[str, Engine] = {}
    for name, engine in make_engines(loaded).items():
        made[name] = KeptEngine(getattr(engine, "engine", engine))
        config = loaded.config.engines[name]
        if any(config.get(field) for field in WITH_ADDRESS):
            made[name].max_in_flight = max(1, engine.max_in_flight // workers)
    return made


async def end_engines(engines: Mapping[str, Engine]) -> None:
    """Stop what `kept_engines` made."""
    for engine in engines.values():
        await engine.end()  # type: ignore[attr-defined]  # all are KeptEngine


class Worker:
    """The work of one worker. `emit` is called with each event."""

    def __init__(self, setup: WorkerSetup, emit: Emit) -> None:
        self.setup, self.emit = setup, emit
        self.inbox: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.run: ShardRun | None = None
        self._engines: dict[str, Engine] = {}
        self._job: asyncio.Task[None] | None = None

    async def main(self) -> None:
        """Work until told to end: `{"do": {...}}` is a `ShardJob`, `{"stop": true}` drains the one
        in work (with `"divided": true` others go on with it), and `{"end": true}` or None drains it
        and ends.
        """
        try:
            os.chdir(self.setup.folder)
            shared = self._shared()
            loaded = resolve_pipeline(self.setup.source, self.setup.sets)
            self._engines = kept_engines(loaded, self.setup.workers)
            place = f"{os.uname().nodename} {self.setup.local}"
            self.emit({"event": "ready", "place": place, "models": models(self._engines)})
            while (message := await self.inbox.get()) is not None:
                if "do" in message:
                    # made here, so that a message to stop that follows at once is for this job
                    job, local = ShardJob(**message["do"]), Path(self.setup.local)
                    self.run = ShardRun(loaded, shared, local, job)
                    self._job = asyncio.create_task(self._do(self.run, message["models"]))
                elif "end" in message:
                    break
                elif self.run is not None:
                    self.run.stop(message.get("divided", False))
        except (PrefabError, OSError) as error:
            self._failed(None, error)
        finally:
            if self._job is not None:
                if self.run is not None:
                    self.run.stop()  # what is in flight is still kept
                await asyncio.gather(self._job, return_exceptions=True)
            await end_engines(self._engines)

    def _shared(self) -> SharedFolder:
        """The shared folder, seen to be the driver's. Raises: ConfigError."""
        files = files_at(self.setup.shared)
        known = read_json(files, MARKER)
        if known is None or known["id"] != self.setup.id:
            raise ConfigError(
                f"{files.address} on {os.uname().nodename} is not the folder that the driver sees: "
                "scale.shared must be a folder that all machines share"
            )
        if isinstance(files, LocalFiles):
            return SharedFolder(files.folder)
        return SharedFolder(Path(self.setup.local), files)

    async def _do(self, run: ShardRun, known: dict[str, str]) -> None:
        job, files = run.job, run.shared.files
        ticking = asyncio.create_task(self._tick(run))
        try:
            self._check_models(known)
            local = Path(self.setup.local)
            prompts = await asyncio.to_thread(
                prompts_of, files, self.setup.prompts, job.part, local
            )
            result = await run.run(self._engines, prompts, self.setup.publish_s)
            self.emit({"event": "done", **result})
        except (PrefabError, OSError) as error:
            self._failed(job.shard, error)
        except Exception as error:  # else the driver would wait for this shard for ever
            traceback.print_exc()
            self._failed(job.shard, error)
        finally:
            ticking.cancel()

    def _check_models(self, known: dict[str, str]) -> None:
        """See that this machine would ask the run's models. One at an address is what the run
        began with; the model of a server of our own may differ with the machine (its dtype).

        Raises: EngineError.
        """
        for name, engine in self._engines.items():
            wanted = known[f"model {name}"]
            if engine.identity == wanted:
                continue
            if engine.owns_server:
                raise EngineError(
                    f"engines.{name} on {os.uname().nodename} is {engine.identity}, and the run "
                    f"began with {wanted}. Set engines.{name}.dtype, so that it does not depend on "
                    "the machine, and see that the model's files are the same everywhere"
                )
            engine.identity = wanted

    async def _tick(self, run: ShardRun) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.emit({"event": "progress", "shard": run.job.shard, "counts": run.counts()})

    def _failed(self, shard: int | None, error: Exception) -> None:
        fatal = isinstance(error, ConfigError)
        name, known = type(error).__name__, isinstance(error, PrefabError | OSError)
        told = {"event": "failed", "shard": shard, "error": name, "fatal": fatal}
        self.emit({**told, "message": str(error) if known else f"{name}: {error}"})


def main() -> None:
    """Work for the process at the other end of stdin and stdout."""
    for number in (signal.SIGINT, signal.SIGHUP):  # of a terminal: the driver says what to do
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not be taken for an event
    events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(out, events), daemon=True)
    writer.start()
    # unbuffered: a thread that waits in a buffer's lock cannot be ended
    messages = io.FileIO(0, closefd=False)
    setup = WorkerSetup(**orjson.loads(messages.readline()))

    async def work() -> None:
        worker = Worker(setup, events.put)
        loop = asyncio.get_running_loop()
        threading.Thread(target=_read, args=(messages, worker, loop), daemon=True).start()
        await worker.main()

    with logging_by_environment(), tracing_by_environment():
        in_event_loop(work())
    events.put(None)
    writer.join(END_S)


def _write(out: Any, events: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    try:
        while (event := events.get()) is not None:
            out.write(orjson.dumps(event, default=str) + b"\n")
            out.flush()
    except OSError:  # nobody reads any more: the end of stdin says so too
        pass


def _read(messages: io.FileIO, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
    """Hand over the messages of stdin. At its end the driver has ended, or was killed."""
    for line in messages:
        loop.call_soon_threadsafe(worker.inbox.put_nowait, orjson.loads(line))
    end_without_driver(worker, loop)


def end_without_driver(worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
    """Let a worker ask nothing more, and end its process soon: what is answered is published."""

    def end() -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(time.sleep, PUBLISH_S)  # so that nothing is tried again
        with suppress(PrefabError, OSError):
            if worker.run is not None:
                worker.run.publish()
        os._exit(1)

    for seconds, what in ((END_S, end), (END_S + PUBLISH_S, partial(os._exit, 1))):
        timer = threading.Timer(seconds, what)
        timer.daemon = True
        timer.start()
    with suppress(RuntimeError):  # its loop has ended
        loop.call_soon_threadsafe(worker.inbox.put_nowait, None)


def setup_line(setup: WorkerSetup) -> bytes:
    """The first line that a worker's process reads."""
    return orjson.dumps(asdict(setup)) + b"\n"


if __name__ == "__main__":
    main()
