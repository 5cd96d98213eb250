"""How workers are started: as processes of this machine. A launcher gives their events in one
queue, so that the driver need not know where they are.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol

import orjson

from prefab.factory.paths import IMPORT_ROOT
from prefab.pipelines.scale.worker import WorkerSetup, setup_line

END_S = 30.0  # for a worker that ends: its servers are stopped


@dataclass(frozen=True, slots=True)
class WorkerEvent:
    """What a worker tells: `ready`, `progress`, `done`, `failed`, or `gone` when it has ended."""

    worker: int
    event: str
    data: dict[str, Any]


class Launcher(Protocol):
    """Starts workers and carries messages to them."""

    events: queue.SimpleQueue[WorkerEvent]

    def start(self) -> int:
        """Start a worker. Returns: its number."""

    def send(self, worker: int, message: dict[str, Any]) -> None:
        """Give a message to a worker; nothing where it has ended."""

    def kill(self, worker: int) -> None:
        """End a worker at once."""

    def capacity(self) -> int:
        """For how many workers there is room now; 0: as many as were asked for."""

    def waiting(self) -> str:
        """What a worker that does not start waits for."""

    def close(self) -> None:
        """End all workers, in order."""


class LocalLauncher:
    """Workers as processes of this machine."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        self.events: queue.SimpleQueue[WorkerEvent] = queue.SimpleQueue()
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> int:
        """Start a process. Returns: its number."""
        paths = filter(None, (str(IMPORT_ROOT), os.environ.get("PYTHONPATH")))
        process = subprocess.Popen(
            [sys.executable, "-m", "prefab.pipelines.scale.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C of the terminal is for the driver alone
        )
        worker = len(self.processes) + 1
        self.processes[worker] = process
        self._write(process, setup_line(self.setup))
        threading.Thread(target=self._read, args=(worker, process), daemon=True).start()
        return worker

    def _read(self, worker: int, process: subprocess.Popen[bytes]) -> None:
        for line in _stream(process.stdout):
            data = orjson.loads(line)
            self.events.put(WorkerEvent(worker, data["event"], data))
        code = process.wait()
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        self.events.put(WorkerEvent(worker, "gone", {"why": why}))

    def send(self, worker: int, message: dict[str, Any]) -> None:
        """Give a message to a worker; nothing where it has ended."""
        self._write(self.processes[worker], orjson.dumps(message) + b"\n")

    @staticmethod
    def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
        try:
            stdin = _stream(process.stdin)
            stdin.write(data)
            stdin.flush()
        except OSError:
            pass  # it has ended, which `_read` tells

    def kill(self, worker: int) -> None:
        """End a worker at once."""
        self.processes[worker].kill()

    def capacity(self) -> int:
        """As many as were asked for."""
        return 0

    def waiting(self) -> str:
        """What a process that does not start waits for."""
        return "a worker is still starting"

    def close(self) -> None:
        """End all workers; those that do not end by themselves are killed."""
        for worker in self.processes:
            self.send(worker, {"end": True})
        for process in self.processes.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with suppress(BrokenPipeError):  # what one that has ended did not read
                _stream(process.stdin).close()


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # they are pipes
    return stream
