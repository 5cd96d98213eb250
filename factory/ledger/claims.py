"""Claims: which process asks which question, where several work on one store at once.

Each open ledger is a row of `owners`. While it is alone it claims nothing. A newcomer waits until
the others have seen it (`acknowledged`) and have claimed what they are asking; from then on each
claims a question before it asks, in the transaction that looks for an answer once more, and gives
the claim back with the answer. Claims of a process that has died are free at once. Those of one
that lives are a lease, which its heartbeat renews: when it has been stopped (Ctrl-Z) or hangs for
`LEASE_S`, others ask its questions. Should it answer after all, the first answer stands.

Each function takes a connection to `ledger.sqlite`; those that write run in a transaction.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

LEASE_S = 60.0
ACKNOWLEDGED_WITHIN_S = 5.0  # after which a newcomer goes on without an owner's answer


def join(con: sqlite3.Connection) -> int:
    """Register this process, after dropping the dead. Returns: its id, which is none of those that
    the others have acknowledged, so that they have yet to see this process.
    """
    for owner in _owners(con):
        if not _alive(owner):
            leave(con, owner[0])
    me = 1 + max((max(owner[0], owner[5]) for owner in _owners(con)), default=0)
    beat(con, me, me)
    return me


def beat(con: sqlite3.Connection, me: int, acknowledged: int) -> None:
    """Say that this process lives, and up to which newcomer it has claimed its questions."""
    row = (me, _host(), os.getpid(), _started(os.getpid()), time.time(), acknowledged)
    con.execute("INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?, ?, ?)", row)


def leave(con: sqlite3.Connection, owner: int) -> None:
    """Give back an owner's claims, and forget the owner."""
    con.execute("DELETE FROM claims WHERE owner = ?", (owner,))
    con.execute("DELETE FROM owners WHERE id = ?", (owner,))


def others(con: sqlite3.Connection, me: int) -> list[tuple[int, int]]:
    """Id and `acknowledged` of each other living owner."""
    return [(owner[0], owner[5]) for owner in _owners(con) if owner[0] != me and _alive(owner)]


def claim(con: sqlite3.Connection, me: int, keys: Sequence[bytes]) -> set[bytes]:
    """Claim those of the questions on which no other owner has a lease. Returns: all of them that
    are ours now.
    """
    living = {
        owner[0] for owner in _owners(con) if owner[0] != me and _alive(owner) and _heard_of(owner)
    }
    mine = set()
    for key in keys:
        row = con.execute("SELECT owner FROM claims WHERE key = ?", (key,)).fetchone()
        if row is None or row[0] not in living:
            con.execute("INSERT OR REPLACE INTO claims VALUES (?, ?)", (key, me))
            mine.add(key)
    return mine


def release(con: sqlite3.Connection, me: int, keys: Sequence[bytes]) -> None:
    """Give back claims."""
    con.executemany("DELETE FROM claims WHERE key = ? AND owner = ?", [(key, me) for key in keys])


def _owners(con: sqlite3.Connection) -> list[tuple[int, str, int, str, float, int]]:
    return con.execute("SELECT * FROM owners").fetchall()


def _alive(owner: tuple[int, str, int, str, float, int]) -> bool:
    """Whether an owner's process lives, told by its id and the time it started, where it is on this
    machine and in this container; elsewhere by its heartbeat, which it has only while it is not
    alone.
    """
    _, host, pid, started, _, _ = owner
    return _started(pid) == started if host == _host() else _heard_of(owner)


def _heard_of(owner: tuple[int, str, int, str, float, int]) -> bool:
    """Whether an owner's last heartbeat is younger than a lease."""
    return abs(time.time() - owner[4]) < LEASE_S


@cache
def _host() -> str:
    parts = [os.uname().nodename]
    for file in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            link = os.path.islink(file)
            parts.append(os.readlink(file) if link else Path(file).read_text().strip())
        except OSError:
            parts.append("")
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process started, in the system's ticks; empty for one that is no more."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self/stat").exists() or not _exists(pid) else "unknown"
    return "" if state == "Z" else fields[18]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
