"""Who works on what, where processes of several machines share files: a file that its owner
renews. Time is that of whoever keeps the files, since clocks of machines differ.
"""

from __future__ import annotations

import os
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from prefab.factory.shared_files import FileVersion, SharedFiles

RENEW_S = 5.0
LEASE_S = 60.0  # after which an owner that does not renew its file counts as gone


class Lease:
    """The right to work on something, for one process at a time."""

    def __init__(self, files: SharedFiles, name: str) -> None:
        """`name` is that of the file."""
        self.files, self.name = files, name
        self.held = False
        self._token = uuid.uuid4().hex
        self._renewals = 0
        self._end = threading.Event()

    def take(self) -> str:
        """Take the lease. Returns: empty, or who has it."""
        while not self.files.create(self.name, self._me()):
            version, owner = self._read()
            if owner is not None and owner["token"] == self._token:
                break  # the answer to the first request to create it was lost
            if who := self._living(version, owner):
                return who
            if version is not None and self.files.take_over(self.name, self._me(), version.tag):
                break
        self.held = True
        threading.Thread(target=self._renew, daemon=True).start()
        return ""

    def owner(self) -> str:
        """Who has it; empty where nobody does."""
        return self._living(*self._read())

    def give_back(self) -> None:
        """Let others take it."""
        self._end.set()
        owner = self._read()[1] if self.held else None
        if owner is not None and owner["token"] == self._token:
            self.files.remove(self.name)
        self.held = False

    def _me(self) -> bytes:
        host, pid = os.uname().nodename, os.getpid()
        known = {"host": host, "pid": pid, "started": _started(pid), "boot": _boot_id()}
        return orjson.dumps({**known, "token": self._token, "renewals": self._renewals})

    def _read(self) -> tuple[FileVersion | None, dict[str, Any] | None]:
        """The version of the file, from before it was read, and what it holds."""
        version = self.files.version(self.name)
        try:
            owner: dict[str, Any] = orjson.loads(self.files.read(self.name))
        except FileNotFoundError:
            return None, None
        return version, owner

    def _living(self, version: FileVersion | None, owner: dict[str, Any] | None) -> str:
        """The owner; empty for a process of this machine that has ended, or one of another that
        does not renew.
        """
        if version is None or owner is None:
            return ""
        here = owner["boot"] == _boot_id()
        if here and _started(owner["pid"]) != owner["started"]:
            return ""
        if not here and self._now() - version.at > LEASE_S:
            return ""
        return f"process {owner['pid']} on {owner['host']}"

    def _now(self) -> float:
        """The time by the clock of whoever keeps the files."""
        probe = f"{self.name}.{self._token}.now"
        self.files.write(probe, b"")
        version = self.files.version(probe)
        self.files.remove(probe)
        return version.at if version else 0.0

    def _renew(self) -> None:
        version = self.files.version(self.name)
        tag = version.tag if version else None
        while tag is not None and not self._end.wait(RENEW_S):
            self._renewals += 1
            with suppress(OSError):
                tag = self.files.renew(self.name, self._me(), tag) or self._own_tag()

    def _own_tag(self) -> str | None:
        """The file's tag where it is still ours: the answer to a renewal may have been lost."""
        version, owner = self._read()
        ours = owner is not None and owner["token"] == self._token
        return version.tag if version is not None and ours else None


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
