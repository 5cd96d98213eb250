"""Long work for pages, each in a `prefab` command of its own: the server stays small, and what a
page shows is what the command prints.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import orjson

MOST = 3  # commands at a time
KEPT = 32  # results


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
        self.out.close()
        self.err.close()
        self.process = None


class Jobs:
    """The commands of one server, by name."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def get(self, name: str, words: list[str] | None = None, wait: bool = False) -> Job | None:
        """The job of this name, begun with these words where there is none; None where too many
        are running, or there is none and no words. `wait`: until it has ended.
        """
        job = self._get(name, words)
        if wait and job and job.process is not None:
            job.process.wait()
            with self._lock:
                job.look()
        return job

    def _get(self, name: str, words: list[str] | None) -> Job | None:
        with self._lock:
            for job in self._jobs.values():
                job.look()
            if name in self._jobs or words is None:
                return self._jobs.get(name)
            if sum(job.running for job in self._jobs.values()) >= MOST:
                return None
            for old in list(self._jobs):
                if len(self._jobs) >= KEPT and not self._jobs[old].running:
                    del self._jobs[old]
            out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (closed by look)
            job = Job(words, out=out, err=err)
            job.process = subprocess.Popen(
                [sys.executable, "-m", "prefab.pipelines.cli.main", *words],
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
    """The text in a file of this name in a folder that is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path
