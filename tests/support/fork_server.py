"""Run Python programs in forks of a process that has imported what `prefab` imports, or also what
trainings import.

A program then costs its own work, and not the seconds of imports. `ForkServer` takes the words that
follow `python` on a command line: `-m MODULE`, `-c CODE`, `-` or a script. A shell does the same by
the functions of `ForkServer.shell`. What differs from processes of their own: all programs of a
server share the seed of hashes, and most modules are imported before they begin.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = "prefab.pipelines.cli.main"  # is imported, and is not run a second time as a module
PREFAB = (
    *("aiohttp", "duckdb", "jinja2", "numpy", "polars", "pyarrow.parquet", "uvloop", "yaml"),
    *("prefab", COMMAND, "prefab.pipelines.cli.project"),
    *("prefab.factory.engines.openai", "prefab.factory.engines.scripted"),
    *("prefab.judges.kinds.pairwise", "prefab.pipelines.quality.agreement"),
    *("prefab.pipelines.run.plan", "prefab.pipelines.run.rlaif", "prefab.pipelines.run.runner"),
    *("prefab.pipelines.store.export", "prefab.pipelines.store.fill"),
)
TRAINING = (
    *PREFAB,
    *("torch", "accelerate", "datasets", "trl", "transformers.models.llama.modeling_llama"),
    *("prefab.pipelines.training.online", "prefab.trainers.registry", "prefab.trainers.model_card"),
    *("prefab.trainers.offline.loop", "prefab.trainers.rl.grpo", "prefab.trainers.rl.ppo"),
)
# Other packages alone: coverage sees only what is imported after it has begun, and pytest rewrites
# assertions only in what is imported after itself.
OTHERS = (
    *("aiohttp", "duckdb", "jinja2", "numpy", "pandas", "polars", "pyarrow.parquet", "uvloop"),
    *("pydantic", "rich.table", "scipy.optimize", "scipy.stats", "sympy", "typer", "yaml"),
    *("torch", "accelerate", "datasets", "transformers.models.llama.modeling_llama", "trl"),
    *("tokenizers", "torch._dynamo"),
)
KINDS = {"prefab": PREFAB, "training": TRAINING, "tests": OTHERS}


class Forked:
    """A running program, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, connection: socket.socket, stdout: Any = None, stderr: Any = None) -> None:
        self._connection, self._lines = connection, connection.makefile("r")
        self.stdout, self._stderr = stdout, stderr
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self, timeout: float = 0) -> int | None:
        """The exit status, negative after a signal; None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(self._lines.readline()))
            self._lines.close()
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        """The exit status. Raises: TimeoutError, after a kill, when it takes longer."""
        code = self.poll(timeout)
        if code is None:
            self.kill()
            raise TimeoutError(f"process {self.pid} took longer than {timeout} s")
        return code

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for its end; the rest of its stdout, and its stderr."""
        self.wait(timeout)
        self._stderr.seek(0)
        with self.stdout, self._stderr:
            return self.stdout.read(), self._stderr.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A client of the process that forks, which listens at an address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def start(
        self, words: Sequence[object], *, cwd: Path = ROOT, env: dict[str, str] | None = None
    ) -> Forked:
        """Start a program that reads nothing, and writes less to stdout than a pipe holds.

        Args:
            words: the words after `python`.
            cwd: its folder.
            env: its whole environment; left out: that of this process.
        """
        reading, writing = os.pipe()
        stderr = capture()
        with open(os.devnull) as empty, open(writing, "w") as stdout:
            files = [file.fileno() for file in (empty, stdout, stderr)]
            connection = ask(self.address, job_of(words, cwd, env), files)
        return Forked(connection, open(reading, encoding="utf-8"), stderr)

    def run(
        self,
        words: Sequence[object],
        *,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, with its output as text."""
        job = job_of(words, cwd, env)
        with open(os.devnull) as empty, capture() as out, capture() as err:
            files = [file.fileno() for file in (empty, out, err)]
            code = Forked(ask(self.address, job, files)).wait(timeout)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
        return subprocess.CompletedProcess(job["words"], code, *texts)

    def python(self) -> str:
        """A command that takes the words after `python`, and has the program's input and output."""
        return shlex.join([sys.executable, "-IS", __file__, self.address])

    def shell(self) -> str:
        """Functions for a shell script: `python` and `prefab`."""
        return f'python() {{ {self.python()} "$@"; }}\nprefab() {{ python -m {COMMAND} "$@"; }}\n'


def job_of(words: Sequence[object], cwd: Path, env: dict[str, str] | None) -> dict[str, Any]:
    """What the server is asked to do."""
    return {"words": [*map(str, words)], "cwd": str(cwd), "env": dict(env or os.environ)}


def capture() -> Any:
    """A file for output, read as text."""
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace")


def ask(address: str, job: dict[str, Any], files: Sequence[int]) -> socket.socket:
    """Send a job and its open files; the connection answers with two lines, process id and exit
    status, and the program is killed when the connection closes before.
    """
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"\0"], list(files))
    connection.sendall(json.dumps(job).encode() + b"\n")
    return connection


def serve(address: str, kind: str) -> None:
    """Fork for each connection, until stdin closes. The first one waits for the imports."""
    import gc
    import importlib

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    ready = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        readable = select.select([listener, 0], [], [])[0]
        while True:  # collect those that ended
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break
        if 0 in readable:
            gc.unfreeze()  # else DuckDB's types outlive the interpreter, and it prints a list of them
            return
        connection, _ = listener.accept()
        if not ready:
            ready = True
            gc.disable()
            for name in KINDS[kind]:
                importlib.import_module(name)
            gc.enable()
            gc.freeze()  # a collection in a fork leaves these objects' pages shared
        if os.fork() == 0:
            listener.close()
            supervise(connection)
            os._exit(0)
        connection.close()


def supervise(connection: socket.socket) -> None:
    """In a fork: start the program in one more, and say how it ends."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    job = json.loads(connection.makefile("r").readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        os._exit(program(job, files))
    for file in (0, 1, *files):
        os.close(file)
    connection.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(OSError):
        connection.sendall(f"{status}\n".encode())


def program(job: dict[str, Any], files: list[int]) -> int:
    """In the program's process: run it as `python` would; the exit status."""
    import atexit
    import threading
    import traceback

    code = 0
    try:
        begin(job, files)
        execute(job["words"])
    except SystemExit as error:
        if isinstance(error.code, int | None):
            code = error.code or 0
        else:
            print(error.code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        threading._shutdown()
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


def begin(job: dict[str, Any], files: list[int]) -> None:
    """Folder, environment and streams of the program."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path[0:0] = [p for p in job["env"].get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(  # noqa: SIM115
        2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False
    )
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, f"__{name}__", getattr(sys, name))


def execute(words: list[str]) -> None:
    """The program that the words after `python` name."""
    import runpy
    import types

    first, *more = words[words[:1] == ["-u"] :]  # pytest-xdist's -u: it writes no text to stdout
    if first == "-m" and more[0] == COMMAND:
        sys.argv = ["prefab", *more[1:]]
        sys.modules[COMMAND].main()
    elif first == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = more
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    elif first in ("-c", "-"):
        sys.path.insert(0, "")
        source = more.pop(0) if first == "-c" else sys.stdin.read()
        sys.argv = [first, *more]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(source, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.path.insert(0, str(Path(first).parent))
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


@contextlib.contextmanager
def fork_server(kind: str, of: str = "") -> Iterator[ForkServer]:
    """A server for the time of the block. Programs that run at its end go on to theirs. `of`: the
    address of a server whose fork this one is.
    """
    with tempfile.TemporaryDirectory(prefix="prefab-forks-") as folder:
        address = str(Path(folder) / kind)
        python = shlex.split(ForkServer(of).python()) if of else [sys.executable]
        command = [*python, "-m", "tests.support.fork_server", "serve", address, kind]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stdout.readline()
            yield ForkServer(address)
            process.communicate()


def client(address: str, words: list[str]) -> int:
    """Run a program in the place of this process; the exit status."""
    job = {"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}
    connection = ask(address, job, (0, 1, 2))
    _, status = connection.makefile("r").read().split()
    return os.waitstatus_to_exitcode(int(status))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        code = client(sys.argv[1], sys.argv[2:])
        sys.exit(code if code >= 0 else 128 - code)
