"""Who works on what, where processes of several machines share a folder: a file that its owner
renews. Time is that of the file system, since clocks of machines differ.
"""

from __future__ import annotations

import os
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from prefab.factory.store.shared import create_whole

RENEW_S = 5.0
LEASE_S = 60.0  # after which an owner that does not renew its file counts as gone


class Lease:
    """The right to work on something, for one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = False
        self._token = uuid.uuid4().hex
        self._end = threading.Event()

    def take(self) -> str:
        """Take the lease. Returns: empty, or who has it."""
        while not create_whole(self.path, self._me()):
            if who := self.owner():
                return who
            stale = self.path.with_name(f".{self.path.name}.{self._token}")
            with suppress(FileNotFoundError):
                self.path.rename(stale)  # one of those who see it gone renames it
                stale.unlink()
        self.held = True
        threading.Thread(target=self._renew, daemon=True).start()
        return ""

    def owner(self) -> str:
        """Who has it; empty where nobody does."""
        owner = self._read()
        if owner is None or self._is_gone(owner):
            return ""
        return f"process {owner['pid']} on {owner['host']}"

    def give_back(self) -> None:
        """Let others take it."""
        self._end.set()
        owner = self._read() if self.held else None
        if owner is not None and owner["token"] == self._token:
            self.path.unlink(missing_ok=True)
        self.held = False

    def _me(self) -> bytes:
        host, pid = os.uname().nodename, os.getpid()
        known = {"host": host, "pid": pid, "started": _started(pid), "boot": _boot_id()}
        return orjson.dumps({**known, "token": self._token})

    def _read(self) -> dict[str, Any] | None:
        try:
            owner: dict[str, Any] = orjson.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        return owner

    def _is_gone(self, owner: dict[str, Any]) -> bool:
        """Whether a process of this machine has ended, or one of another does not renew."""
        if owner["boot"] == _boot_id():
            return bool(_started(owner["pid"]) != owner["started"])
        probe = self.path.with_name(f".{self.path.name}.{self._token}.now")
        probe.write_bytes(b"")
        now = probe.stat().st_mtime
        probe.unlink()
        try:
            return now - self.path.stat().st_mtime > LEASE_S
        except FileNotFoundError:
            return True

    def _renew(self) -> None:
        while not self._end.wait(RENEW_S):
            with suppress(OSError):
                os.utime(self.path)


def _started(pid: int) -> str:
    """When a process started, in the system's ticks; empty for one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _boot_id() -> str:
    """What tells machines and containers apart, whatever their names."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts) or os.uname().nodename
