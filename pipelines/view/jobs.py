"""Long work for pages, each in a process of its own, most of them `prefab` commands: the server
stays small, and what a page shows is what the command prints.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import orjson

from prefab.factory.keys import digest

MOST = 3  # commands at a time
KEPT = 32  # results in memory, and as many in files


@dataclass(slots=True)
class Job:
    """A command that runs or has ended. `result` is its JSON, `error` the last line that it wrote
    where it failed.
    """

    words: list[str]
    process: subprocess.Popen[bytes] | None = None
    out: IO[bytes] | None = None
    err: IO[bytes] | None = None
    began: float = field(default_factory=time.monotonic)
    result: Any = None
    error: str = ""
    file: Path | None = None

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process is not None

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def look(self) -> None:
        """Take the result of a process that has ended."""
        if self.process is None or self.process.poll() is None or not self.out or not self.err:
            return
        self.out.seek(0)
        self.err.seek(0)
        text, told = self.out.read(), self.err.read().decode(errors="replace").strip()
        try:
            self.result = orjson.loads(text)
        except ValueError:
            self.result = None
        if isinstance(self.result, dict) and "problems" in self.result and "exit" in self.result:
            self.error, self.result = "; ".join(self.result["problems"]), None
        elif self.result is None:
            self.error = (
                told.splitlines()[-1] if told else f"it ended with {self.process.returncode}"
            )
        elif self.file:
            _keep(self.file, text)
        self.out.close()
        self.err.close()
        self.process = None


def _keep(file: Path, text: bytes) -> None:
    """Write a result to a file, and remove the oldest of its folder. Without a place to write it is
    computed again by the next server.
    """
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        made = file.with_suffix(f".{os.getpid()}")
        made.write_bytes(text)
        os.replace(made, file)
        for old in sorted(file.parent.iterdir(), key=lambda path: -path.stat().st_mtime)[KEPT:]:
            old.unlink()


class Jobs:
    """The commands of one server, by name. Results that are to outlive the server are files of
    `folder`.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def get(
        self, name: str, words: list[str] | None = None, wait: bool = False, keep: bool = False
    ) -> Job | None:
        """The job of this name.

        Args:
            name: The name. It says all that the result depends on.
            words: Of a `prefab` command, or -m and a module with its arguments, which is begun
                where there is no job of the name.
            wait: Wait until it has ended.
            keep: Also write the result to a file, which another server finds.

        Returns: None where too many are running, or there is none and no words.
        """
        job = self._get(name, words, keep)
        if wait and job and job.process is not None:
            job.process.wait()
            with self._lock:
                job.look()
        return job

    def _get(self, name: str, words: list[str] | None, keep: bool) -> Job | None:
        with self._lock:
            for job in self._jobs.values():
                job.look()
            if name in self._jobs or words is None:
                return self._jobs.get(name)
            file = self.folder / f"{digest(name)}.json" if keep and self.folder else None
            if file and file.exists():
                self._jobs[name] = Job(words, result=orjson.loads(file.read_bytes()))
                return self._jobs[name]
            if sum(job.running for job in self._jobs.values()) >= MOST:
                return None
            for old in list(self._jobs):
                if len(self._jobs) >= KEPT and not self._jobs[old].running:
                    del self._jobs[old]
            out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (closed by look)
            job = Job(words, out=out, err=err, file=file)
            command = [] if words[0] == "-m" else ["-m", "prefab.pipelines.cli.main"]
            job.process = subprocess.Popen(
                [sys.executable, *command, *words],
                stdin=subprocess.DEVNULL,
                stdout=job.out,
                stderr=job.err,
            )
            self._jobs[name] = job
            return job

    def forget(self, name: str) -> None:
        """Let a command of this name run again."""
        with self._lock:
            job = self._jobs.get(name)
            if job and not job.running:
                del self._jobs[name]

    def drop(self, job: Job) -> None:
        """Let go of a result that was used. It is still in its file, where it is kept."""
        with self._lock:
            self._jobs = {name: one for name, one in self._jobs.items() if one is not job}

    def end(self) -> None:
        """Stop what is running."""
        with self._lock:
            for job in self._jobs.values():
                if job.process is not None:
                    job.process.terminate()
            for job in self._jobs.values():
                if job.process is not None:
                    job.process.wait()


def written(folder: Path, text: str, name: str) -> Path:
    """The file of this name in a folder that is made, with the text. A file that is there stays:
    the name says the text, and a job may be reading it while a page asks again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        part = folder / f".{uuid4().hex}"
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    return path
