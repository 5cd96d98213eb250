"""A small project, the server it asks, and `prefab` commands as processes that can be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prefab.factory.ledger import db
from prefab.factory.store import store
from tests.torture import server

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IN_FLIGHT = 8
# What two runs of one command may differ in.
TIMES = {
    "runs": ("started_at", "last_start"),
    "calls": ("answered_at",),
    "failures": ("failed_at",),
    "evals": ("evaluated_at",),
}
CONSTITUTION = {
    "id": "small",
    "title": "Small",
    "licence": "CC0-1.0",
    "principles": [
        {
            "id": "better",
            "title": "Better",
            "compare": "Which answer is better?",
            "critique": "Name a fault.",
            "revise": "Mend the fault.",
            "criterion": "The answer has a fault.",
        }
    ],
}


@dataclass
class Ended:
    """How a command ended. Code None: it was killed because it ran out of time."""

    code: int | None
    out: str
    err: str
    seconds: float
    cpu_s: float
    peak_mb: int

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def last(self) -> str:
        lines = [line for line in self.err.strip().splitlines() if line.strip()]
        return " | ".join(lines[-2:])[:300]


@dataclass
class Lab:
    """A folder with a project, a running server, and a process that forks commands."""

    folder: Path
    port: int
    zygote: subprocess.Popen[str]
    questions: frozenset[str] = frozenset()
    rows: dict[str, list[str]] = field(default_factory=dict)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def start(self, *args: Any, timeout_s: float = 60, **job: Any) -> int:
        """Start a command; its process id. `end` must follow."""
        what = {"args": list(map(str, args)), "cwd": str(self.folder), "timeout_s": timeout_s}
        files = {"out": str(self.folder / "out.txt"), "err": str(self.folder / "err.txt")}
        assert self.zygote.stdin and self.zygote.stdout
        self.zygote.stdin.write(json.dumps({**what, **files, **job}) + "\n")
        self.zygote.stdin.flush()
        return int(self.zygote.stdout.readline())

    def end(self) -> Ended:
        assert self.zygote.stdout
        found = json.loads(self.zygote.stdout.readline())
        texts = [(self.folder / f"{n}.txt").read_text(errors="replace") for n in ("out", "err")]
        return Ended(out=texts[0], err=texts[1], **found)

    def prefab(self, *args: Any, **job: Any) -> Ended:
        """A command, to its end."""
        self.start(*args, **job)
        return self.end()

    def kill(self, pid: int) -> None:
        """Kill a command, unless it has ended already."""
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A request to the server's own paths."""
        data = json.dumps(body).encode() if body is not None else None
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as response:
            found: dict[str, Any] = json.load(response)
            return found

    def control(self, *rules: dict[str, Any]) -> None:
        """Set the server's faults and clear its log."""
        self.ask("/_control", {"rules": list(rules)})

    def log(self, killed: bool = True) -> list[str]:
        """The questions of the pipeline that were asked, in order, without the probes. `killed`:
        a command may have been, and what it sent not be counted yet."""
        end = time.monotonic() + 10
        while (found := self.ask("/_log"))["others"] > 0 and killed:
            if time.monotonic() > end:
                raise AssertionError(f"{found['others']} connections are still open")
            time.sleep(0.003)
        return [name for name in found["log"] if not self.questions or name in self.questions]

    def reset(self) -> None:
        """No store, and an empty log."""
        shutil.rmtree(self.store, ignore_errors=True)
        self.control()

    def undisturbed(self) -> Ended:
        """A run that nothing disturbs: what all others are compared with."""
        self.reset()
        self.questions = frozenset()
        ended = self.prefab("run", "pipeline.yaml", "-q")
        assert ended.code == 0, ended.err
        self.questions = frozenset(committed(self.store))
        self.rows = rows(self.store)
        assert self.questions and not duplicates(self.rows)
        return ended

    def differences(self, ignore: tuple[str, ...] = ("evals",)) -> str:
        """Where the store is not that of the undisturbed run; "" if nowhere. Evaluations are left
        out: a run records what its probe of the model found, if it had something to ask."""
        now = rows(self.store)
        wrong = [t for t in self.rows if t not in ignore and now[t] != self.rows[t]]
        twice = [t for t in duplicates(now) if t not in ignore]
        return ", ".join([f"{t} differs" for t in wrong] + [f"{t} has rows twice" for t in twice])


def write_project(folder: Path, port: int, prompts: int, samples: int, **engine: Any) -> None:
    """A pipeline of `prompts` questions against the server."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(CONSTITUTION, sort_keys=False))
    asked = [{"id": f"p{i}", "prompt": f"Question {i}: what about {i}?"} for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    local = {
        "engine": "openai",
        "base_url": f"http://127.0.0.1:{port}/v1",
        "api_key_env": None,
        "model": "mock",
        "max_in_flight": IN_FLIGHT,
        **engine,
    }
    pipeline = {
        "recipe": "rlaif",
        "name": "small",
        "store": "store",
        "constitution": "small.yaml",
        "prompts": {"source": "prompts.jsonl"},
        "engines": {"local": local},
        "policy": {"engine": "local", "samples": samples, "temperature": 1.0, "max_tokens": 64},
        "panel": {"judges": [{"name": "judge", "kind": "pairwise"}], "orders": "both"},
        "pairs": "all",
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))


def build_shim(folder: Path) -> Path | None:
    """The library that records operations on files; None where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        return None
    library = folder / "shim.so"
    words = [
        compiler,
        "-O1",
        "-shared",
        "-fPIC",
        "-w",
        "-o",
        library,
        HERE / "shim.c",
        "-ldl",
        "-lpthread",
    ]
    subprocess.run(words, check=True)
    return library


@contextmanager
def lab(prompts: int = 6, samples: int = 2, shim: bool = False, **engine: Any) -> Iterator[Lab]:
    """A project in a folder in memory, its server and its zygote, all gone at the end."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base, prefix="prefab-torture-") as name:
        folder = Path(name)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
            "POLARS_MAX_THREADS": "1",
            "PREFAB_CACHE": str(folder / "cache"),
        }
        server_process = _python("tests.torture.server", environment)
        library = build_shim(folder) if shim else None
        if library:
            environment["LD_PRELOAD"] = str(library)
        zygote = _python("tests.torture.zygote", environment)
        try:
            assert server_process.stdout
            port = int(server_process.stdout.readline())
            write_project(folder / "project", port, prompts, samples, **engine)
            yield Lab(folder / "project", port, zygote)
        finally:
            for process in (zygote, server_process):
                assert process.stdin
                process.stdin.close()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _python(module: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    words = [sys.executable, "-m", module]
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)


def committed(folder: Path) -> dict[str, int]:
    """The digests of the questions that have an answer on disk, with how many rows; read by SQLite
    alone from a copy, so that looking changes nothing."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        for file in (db.FILE, f"{db.FILE}-wal"):
            if (folder / file).exists():
                shutil.copy(folder / file, Path(name) / file)
        if not (Path(name) / db.FILE).exists():
            return {}
        con = sqlite3.connect(Path(name) / db.FILE)
        try:
            sql = "SELECT c.key, r.request FROM calls c LEFT JOIN requests r ON r.id = c.id"
            found: dict[str, int] = {}
            for key, request in con.execute(sql):
                name_ = digest_of(key, request)
                found[name_] = found.get(name_, 0) + 1
            return found
        except sqlite3.Error as error:
            if "no such table" not in str(error):
                raise
            return {}
        finally:
            con.close()


def digest_of(key: bytes, request: bytes) -> str:
    """The server's name of a question of the ledger."""
    asked = json.loads(request)
    sampling = asked["sampling"]
    seed = int.from_bytes(key[:4], "big") >> 1 if sampling["temperature"] > 0 else None
    reads = bool(asked["labels"])
    return server.digest(asked["messages"], seed, sampling["max_tokens"], reads)


def rows(folder: Path) -> dict[str, list[str]]:
    """Every table of the store as a sorted list, without times."""
    import duckdb

    with duckdb.connect(str(folder / store.FILE), read_only=True) as con:
        found = {}
        for table in store.TABLES:
            excluded = f" EXCLUDE ({', '.join(TIMES[table])})" if table in TIMES else ""
            sql = f"SELECT *{excluded} FROM {table}"
            found[table] = sorted(map(repr, con.execute(sql).fetchall()))
    return found


def duplicates(found: dict[str, list[str]]) -> list[str]:
    return [table for table, lines in found.items() if len(lines) != len(set(lines))]


def wait_for(what: Callable[[], bool], most_s: float) -> None:
    """Wait until something is so, or the time is over."""
    end = time.monotonic() + most_s
    while not what() and time.monotonic() < end:
        time.sleep(0.002)
