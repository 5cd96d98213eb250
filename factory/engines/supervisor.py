"""Runs a server and never lets it outlive us: `python supervisor.py PARENT_PID COMMAND...`,
standard library only. The server writes where the supervisor does.

The supervisor holds the other end of a pipe to its parent. When that closes, however the parent
ended (`kill -9` too), it ends the whole process group of the server and whatever else descends from
it. vLLM's engine and worker processes are grandchildren: a death signal on the server alone would
leave them, with all their memory, behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE_S = 8.0  # vLLM takes 1-3 s to end its children and give back shared memory


def main() -> int:
    """Run the command until it or the parent ends; return its exit status."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda got, _: stopped.append(got))
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None:
        libc.prctl(
            PR_SET_CHILD_SUBREAPER, 1
        )  # orphaned grandchildren become ours, so that none is missed

    def end_with_supervisor() -> None:
        if libc is not None:
            libc.prctl(
                PR_SET_PDEATHSIG, signal.SIGTERM
            )  # in case somebody kills the supervisor itself

    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_supervisor
    )
    while child.poll() is None and not stopped and os.getppid() == parent:
        if select.select([0], [], [], 0.5)[0] and not os.read(0, 64):
            break
    return _end(child)


def _end(child: subprocess.Popen[bytes]) -> int:
    """End the server's process group with SIGTERM, then kill whatever is left; return its exit
    status.
    """
    _signal_group(child.pid, signal.SIGTERM)
    give_up = time.monotonic() + GRACE_S
    while time.monotonic() < give_up and (child.poll() is None or _left_behind(child.pid)):
        time.sleep(0.05)
    _signal_group(child.pid, signal.SIGKILL)
    code = child.wait()
    for _ in range(40):  # each round may uncover children of those just killed
        left = _left_behind(child.pid)
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return code if code >= 0 else 128 - code


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _left_behind(server: int) -> list[int]:
    """The supervisor's living children except the server: on Linux, orphaned descendants of the
    server become our children. Reaps the dead ones.
    """
    living = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            pid = int(stat.parent.name)
            if int(parent) == os.getpid() and pid != server:
                if state == "Z":
                    os.waitpid(pid, os.WNOHANG)
                else:
                    living.append(pid)
    return living


if __name__ == "__main__":
    sys.exit(main())
