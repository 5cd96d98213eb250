"""Workers as actors of a Ray cluster.

An actor is a worker like any other, with its event loop in a thread for its whole life. Ray kills
the actors that a driver owns when it ends, in whatever way. So that a worker still publishes what
is answered, workers are detached; the driver owns one actor, a `Beacon`, whose death tells them
that they must end. An actor that serves a model itself
asks for as many GPUs as that takes, and Ray shows it these alone.
"""

from __future__ import annotations

import asyncio
import os
import platform
import queue
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError, EngineError
from prefab.factory.extras import missing_package
from prefab.factory.paths import IMPORT_ROOT
from prefab.pipelines.config.loader import ResolvedPipeline, make_engines
from prefab.pipelines.run.runner import in_event_loop
from prefab.pipelines.scale.launchers import WorkerEvent
from prefab.pipelines.scale.worker import Worker, WorkerSetup, end_without_driver

POLL_S = 1.0  # how long an actor waits for an event before it tells that there is none
END_S = 30.0  # for an actor that ends: its servers are stopped
WORKERS = 10_000  # that wait for one beacon at most
WATCH_S = 0.5  # until a beacon that could not be reached is asked again
CONNECT_S = 10.0  # for a cluster to take a connection; Ray itself tries for minutes


class Beacon:
    """An actor that lives as long as its driver, on the same machine."""

    async def wait(self) -> None:
        """Never end."""
        await asyncio.Event().wait()


class ActorWorker:
    """What runs in an actor's process. Ray calls its methods from several threads."""

    def __init__(self, setup: dict[str, Any], node: str) -> None:
        """`node` names the machine, among those that might share a disk."""
        made = WorkerSetup(**setup)
        made = replace(made, local=str(Path(made.local) / node))
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._worker: Worker | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, args=(made,), daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self, setup: WorkerSetup) -> None:
        async def work() -> None:
            self._worker = Worker(setup, self._events.put)
            self._loop = asyncio.get_running_loop()
            self._ready.set()
            await self._worker.main()

        try:
            in_event_loop(work())
        finally:
            self._events.put(None)

    def poll(self) -> list[dict[str, Any] | None]:
        """The next events; None is the last one. Waits for a moment for the first."""
        found: list[dict[str, Any] | None] = []
        with suppress(queue.Empty):
            found.append(self._events.get(timeout=POLL_S))
            while True:
                found.append(self._events.get_nowait())
        return found

    def send(self, message: dict[str, Any]) -> None:
        """Hand a message to the worker."""
        if self._loop is not None and self._worker is not None:
            with suppress(RuntimeError):  # its loop has ended
                self._loop.call_soon_threadsafe(self._worker.inbox.put_nowait, message)

    def end_without_driver(self) -> None:
        """End this process: what is answered is published first."""
        if self._loop is not None and self._worker is not None:
            end_without_driver(self._worker, self._loop)
        self._thread.join()
        os._exit(0)


def gpus_of(loaded: ResolvedPipeline) -> int:
    """How many GPUs a worker takes: those of the servers that it starts itself."""
    total = 0
    for name, engine in make_engines(loaded).items():
        config = loaded.config.engines[name]
        if engine.owns_server or config.get("engine") == "hf":
            total += int(config.get("tensor_parallel") or 1)
    return total


def room_for(gpus: int) -> int:
    """For how many workers of so many GPUs there is room in the cluster now; at least one."""
    import ray

    resources = ray.cluster_resources()
    room = resources.get("CPU", 0.0)
    if gpus:
        room = min(room, resources.get("GPU", 0.0) / gpus)
    return max(1, int(room))


class RayLauncher:
    """Workers as actors. `gpus` is what each of them takes."""

    def __init__(self, setup: WorkerSetup, gpus: int) -> None:
        self.setup, self.gpus = setup, gpus
        self.events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        self.actors: dict[int, Any] = {}
        self._threads: dict[int, threading.Thread] = {}
        self._name = f"prefab-{setup.id}-{uuid.uuid4().hex[:8]}"
        self._beacon = self._make_beacon()

    @staticmethod
    def _make_beacon() -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        beacon = ray.remote(Beacon)
        options = {"num_cpus": 0, "max_concurrency": WORKERS, "scheduling_strategy": here}
        return beacon.options(**options).remote()

    def capacity(self) -> int:
        """For how many workers there is room in the cluster, as it is now; at least one."""
        return room_for(self.gpus)

    def waiting(self) -> str:
        """What a worker that does not start waits for."""
        what = f"a free CPU and {self.gpus} free GPUs" if self.gpus else "a free CPU"
        return f"no machine of the cluster has {what} for another worker"

    def start(self) -> int:
        """Ask Ray for an actor. Returns: its number."""
        import ray

        worker = len(self.actors) + 1
        actor_class = ray.remote(RayActor)
        options = {
            "num_cpus": 1,
            "num_gpus": self.gpus,
            "max_restarts": 0,
            "max_concurrency": 4,
            "lifetime": "detached",
            "name": f"{self._name}-{worker}",
        }
        actor = actor_class.options(**options).remote(asdict(self.setup), self._beacon)
        self.actors[worker] = actor
        thread = threading.Thread(target=self._read, args=(worker, actor), daemon=True)
        self._threads[worker] = thread
        thread.start()
        return worker

    def _read(self, worker: int, actor: Any) -> None:
        import ray

        why = "it ended"
        try:
            going = True
            while going:
                for data in ray.get(actor.poll.remote()):
                    if data is None:
                        going = False
                    else:
                        self.events.put(WorkerEvent(worker, data["event"], data))
        except ray.exceptions.RayError as error:
            why = str(error).strip().splitlines()[0]
        self.events.put(WorkerEvent(worker, "gone", {"why": why}))

    def send(self, worker: int, message: dict[str, Any]) -> None:
        """Give a message to a worker; nothing where it has ended."""
        self.actors[worker].send.remote(message)

    def kill(self, worker: int) -> None:
        """End a worker at once."""
        import ray

        ray.kill(self.actors[worker])

    def close(self) -> None:
        """End all workers; those that do not end by themselves are killed."""
        for worker in self.actors:
            self.send(worker, {"end": True})
        for worker, thread in self._threads.items():
            thread.join(END_S)
            with suppress(Exception):  # it has ended
                self.kill(worker)


class RayActor(ActorWorker):
    """The actor: a worker whose ledgers are in a folder of the node's own."""

    def __init__(self, setup: dict[str, Any], beacon: Any) -> None:
        """`setup` is the driver's `WorkerSetup`, and `beacon` its `Beacon`."""
        import ray

        super().__init__(setup, ray.get_runtime_context().get_node_id()[:8])
        threading.Thread(target=self._watch, args=(beacon,), daemon=True).start()

    def _watch(self, beacon: Any) -> None:
        """End when the beacon does; one that cannot be reached for a moment is not dead."""
        import ray

        while True:
            try:
                ray.get(beacon.wait.remote())
            except ray.exceptions.ActorUnavailableError:
                time.sleep(WATCH_S)
            except ray.exceptions.RayError:
                break
        self.end_without_driver()


def check_address(address: str) -> None:
    """Raises: EngineError where an address is HOST:PORT and nothing takes a connection there."""
    found = re.fullmatch(r"(.+):(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"no Ray cluster at {address}: {error}") from error


@contextmanager
def connected(address: str, quiet: bool) -> Iterator[None]:
    """While connected to a cluster: that of the address, else the one that runs here or that
    RAY_ADDRESS names, else one of this machine that is started now.

    Raises: ConfigError where Ray is not installed, or the cluster has another version of it;
        EngineError where there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise missing_package("ray", "--on ray") from None
    if address.startswith("ray://"):
        raise ConfigError(
            f"--on ray:{address}: ray:// is for interactive use. Run prefab on a machine of the "
            "cluster (`--on ray`), or submit it as a job (`ray job submit -- prefab run ...`)"
        )
    check_address(address)
    paths = os.pathsep.join(filter(None, (str(IMPORT_ROOT), os.environ.get("PYTHONPATH"))))
    mine = not ray.is_initialized()
    try:
        if mine:
            ray.init(
                address=address or None,
                namespace="prefab",  # else Ray prints advice about it among the output
                runtime_env={"env_vars": {"PYTHONPATH": paths}},
                log_to_driver=not quiet,
                logging_level="ERROR",
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        told = str(error).strip().splitlines()[0]
        if "ersion mismatch" in str(error):
            raise ConfigError(
                f"the cluster runs another version of Ray or of Python than this machine "
                f"(Ray {ray.__version__}, Python {platform.python_version()}): {error}"
            ) from error
        raise EngineError(f"no Ray cluster at {address or 'this machine'}: {told}") from error
    try:
        yield
    finally:
        if mine:
            ray.shutdown()
