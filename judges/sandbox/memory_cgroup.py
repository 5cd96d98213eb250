"""Control groups that bound the memory of an answer's processes together, where one can be made.

A limit of address space (RLIMIT_AS) does not see what the kernel keeps for a process: full pipes
and socket pairs, page tables, files in its scratch folder. A control group does. Root can make one,
and so can an ordinary user below a group that systemd has given to them (`systemd-run --user
--scope -p Delegate=yes`). Groups are made once and lent to one check at a time.

Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

KERNEL_MB = 64  # for what the kernel keeps for an honest program
EMPTY_S = 2.0  # for killed processes to leave a group

_lock = threading.Lock()
_free: list[Path] = []
_numbers = count()


def parent() -> Path | None:
    """The group in which this process can make groups with a limit of memory, if there is one."""
    try:
        own = dict(line.split(":", 2)[1:] for line in _lines("/proc/self/cgroup"))
        mounts = [line.split() for line in _lines("/proc/self/mounts")]
    except (OSError, ValueError):
        return None
    for _, place, kind, options, *_ in mounts:
        if kind == "cgroup2" and "" in own:
            group = Path(place + own[""])
            folder = group if own[""] == "/" else group.parent
            controllers = _text(folder / "cgroup.subtree_control").split()
            if "memory" in controllers and os.access(folder / "cgroup.procs", os.W_OK):
                return folder
        if kind == "cgroup" and "memory" in options.split(","):
            folder = Path(place + own.get("memory", "/none"))
            if os.access(folder, os.W_OK):
                return folder
    return None


@contextlib.contextmanager
def lent(megabytes: int) -> Iterator[str]:
    """A group with this limit for the processes of one check, "" where none can be made."""
    group = _made()
    if group is None:
        yield ""
        return
    limit = str((megabytes + KERNEL_MB) << 20)
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (group / name).exists():
            (group / name).write_text(limit)
    try:
        yield str(group)
    finally:
        _give_back(group)


def _made() -> Path | None:
    with _lock:
        while _free:
            if _is_ours(group := _free.pop()):  # not that of the process that forked this one
                return group
    folder = parent()
    if folder is None:
        return None
    _remove_those_of_the_dead(folder)
    group = folder / f"prefab-{os.getpid()}-{next(_numbers)}"
    try:
        group.mkdir()
    except OSError:
        return None
    atexit.register(_remove, group)
    for name, value in (("memory.swap.max", "0"), ("memory.oom.group", "1")):
        with contextlib.suppress(OSError):
            (group / name).write_text(value)
    return group


def _give_back(group: Path) -> None:
    """Keep the group for the next check once it is empty: what is dying in it still has memory."""
    end = time.monotonic() + EMPTY_S
    while _text(group / "cgroup.procs").strip():
        if time.monotonic() > end:
            return
        time.sleep(0.001)
    with _lock:
        _free.append(group)


def _is_ours(group: Path) -> bool:
    return group.name.startswith(f"prefab-{os.getpid()}-") and group.is_dir()


def _remove(group: Path) -> None:
    if _is_ours(group):
        with contextlib.suppress(OSError):
            group.rmdir()


def _remove_those_of_the_dead(folder: Path) -> None:
    """Remove the empty groups that killed processes have left."""
    for group in folder.glob("prefab-*-*"):
        if not Path("/proc", group.name.split("-")[1]).exists():
            with contextlib.suppress(OSError):
                group.rmdir()


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
