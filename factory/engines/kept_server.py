"""A vLLM server that stays up between commands (`prefab serve --keep`).

A keeper process of its own starts the server, writes down where it is, and ends it when told to, or
when nothing was asked for a while. The record is a file in the cache folder that only this user can
read: address, key, model and settings. An engine with the same model and settings uses the server
instead of starting one.

The keeper holds a lock on the record for as long as it lives. A record without a lock belongs to a
dead keeper, and whoever finds it removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefab.factory.engines.http import HttpConfig
from prefab.factory.engines.vllm_process import default_dtype
from prefab.factory.errors import EngineError
from prefab.factory.keys import digest
from prefab.factory.paths import IMPORT_ROOT, cache_folder
from prefab.factory.redaction import add_secret

KEEPER = "prefab.factory.engines.server_keeper"
STOP_S = 40.0  # vLLM ends within 8 s, else it is killed
# fields of `VllmConfig` on which an answer depends; another size of the cache gives the same ones
SETTINGS = (
    "dtype",
    "revision",
    "adapter",
    "quantization",
    "max_model_len",
    "tensor_parallel",
    "args",
    "env",
)
MARK = "kept-server "  # begins the line that tells the starting command how it ended


@dataclass(slots=True)
class KeptServer:
    """A server that is kept. `key` opens it; `pid` is the keeper's; times are in seconds, `started`
    since 1970.
    """

    model: str
    identity: str
    settings: dict[str, Any]
    port: int
    key: str = field(repr=False)
    pid: int
    idle_s: float
    started: float
    log: str
    file: Path = Path()

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def unused_s(self) -> float:
        """Seconds since it last answered; 0 while it answers."""
        return max(0.0, time.time() - last_use(self.file))

    def why_dead(self) -> str | None:
        """Why it cannot answer any more; None while it is kept."""
        if _is_kept(self.file):
            return None
        return f"the kept server of {self.model} has ended (its log: {self.log})"

    def data(self) -> dict[str, Any]:
        """As plain data, without the key."""
        names = ("model", "identity", "settings", "pid", "idle_s", "started", "log")
        shown = {name: getattr(self, name) for name in names}
        return {"url": self.url, **shown, "unused_s": round(self.unused_s, 1)}


def folder() -> Path:
    """Where the records are."""
    return cache_folder() / "servers"


def settings_of(config: HttpConfig) -> dict[str, Any]:
    """The settings of a server on which its answers depend, from a `VllmConfig`."""
    settings = config.model_dump(include={*SETTINGS})
    return settings | ({"dtype": default_dtype()} if settings["dtype"] == "auto" else {})


def record_file(identity: str, settings: dict[str, Any]) -> Path:
    """The record of a server with this model and these settings."""
    return folder() / f"{digest(identity, json.dumps(settings, sort_keys=True))[:16]}.json"


def find(identity: str, config: HttpConfig) -> KeptServer | None:
    """The kept server of this model with these settings."""
    if not folder().is_dir():
        return None
    settings = settings_of(config)
    found = _read(record_file(identity, settings))
    if found is None or (found.identity, found.settings) != (identity, settings):
        return None
    return found


def kept_servers() -> list[KeptServer]:
    """All servers that are kept, by their model. Records of dead keepers are removed."""
    found = [_read(file) for file in sorted(folder().glob("*.json"))]
    return sorted((one for one in found if one), key=lambda one: (one.model, one.started))


def why_not_used(model: str | None, identity: str, config: HttpConfig) -> str:
    """How a kept server of this name differs from what is needed; empty where none is kept."""
    wanted = settings_of(config)
    for one in kept_servers():
        if one.model != model:
            continue
        names = [name for name, value in wanted.items() if one.settings.get(name) != value]
        what = f"has another {', '.join(names)}" if names else "was started with other files"
        if names or one.identity != identity:
            return f"the kept server of {one.model} is not used: it {what}"
    return ""


def keep(config: HttpConfig, idle_s: float, progress: Callable[[str], None]) -> KeptServer:
    """Start a server that stays up, and wait until it answers.

    Args:
        config: The engine's configuration, a `VllmConfig`.
        idle_s: Seconds without a question after which it is ended.
        progress: Gets a line every few seconds while it loads.

    Raises:
        EngineError: It does not start; there is one with this model and these settings already.
    """
    order = json.dumps({"config": config.model_dump(mode="json"), "idle_s": idle_s})
    paths = filter(None, (str(IMPORT_ROOT), os.environ.get("PYTHONPATH")))
    child = subprocess.Popen(
        [sys.executable, "-m", KEEPER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,
    )
    assert child.stdin is not None and child.stdout is not None
    said = []
    try:
        with child.stdin:
            child.stdin.write(order)
        for line in child.stdout:
            if line.startswith(MARK):
                outcome = json.loads(line.removeprefix(MARK))
                if "error" in outcome:
                    raise EngineError(outcome["error"])
                kept = _read(Path(outcome["file"]))
                if kept is not None:
                    return kept
                break
            said.append(line.rstrip("\n"))
            progress(said[-1])
    except BaseException:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(STOP_S)
        raise
    raise EngineError("\n".join(["the server could not be kept", *said[-8:]]))


def stop(server: KeptServer) -> None:
    """End a kept server and wait until it has ended.

    Raises: EngineError when it has not ended after a while.
    """
    with suppress(ProcessLookupError):
        os.kill(server.pid, signal.SIGTERM)
    give_up = time.monotonic() + STOP_S
    while _is_kept(server.file):
        if time.monotonic() > give_up:
            raise EngineError(f"the kept server of {server.model} (pid {server.pid}) does not end")
        time.sleep(0.1)


def _read(file: Path) -> KeptServer | None:
    """A record whose keeper lives; that of a dead one is removed.

    Threat: a record that another user planted would send every prompt to that user's server.
    """
    if not _is_kept(file):
        return None
    try:
        found = file.lstat()
        if file.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return None
        record = json.loads(file.read_text(encoding="utf-8"))
        kept = KeptServer(**record, file=file)
    except (OSError, ValueError, TypeError):  # its keeper is writing it: the server is not ready
        return None
    add_secret(kept.key)
    return kept


def _is_kept(file: Path) -> bool:
    """Whether a living keeper holds this record. A record that none holds is removed."""
    try:
        handle = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        _remove(file)
        return False
    finally:
        os.close(handle)


def _remove(file: Path) -> None:
    file.unlink(missing_ok=True)
    use_file(file).unlink(missing_ok=True)


def use_file(file: Path) -> Path:
    """The file whose time of change is the server's last use."""
    return file.with_suffix(".used")


def last_use(file: Path) -> float:
    """When the server of a record last answered, in seconds since 1970; 0 where that is unknown."""
    try:
        return use_file(file).stat().st_mtime
    except OSError:
        return 0.0


@contextmanager
def held(file: Path, model: str) -> Iterator[int]:
    """Hold the lock of a record, as a file to write; the record is removed at the end.

    Raises: EngineError when another keeper holds it.
    """
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for _ in range(20):  # whoever looks whether it is held holds it for a moment
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(handle), file.lstat()):
                break
        except OSError:
            time.sleep(0.1)
        os.close(handle)
    else:
        raise EngineError(
            f"a server of {model} with these settings is kept already: `prefab serve --status`"
        )
    try:
        os.fchmod(handle, 0o600)
        os.ftruncate(handle, 0)
        yield handle
    finally:
        _remove(file)
        os.close(handle)
