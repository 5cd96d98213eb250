"""A sandbox for code that nobody trusts: namespaces where the system has them, resource limits
everywhere.

Standard library only; called by `test_runner.py` in a process that will run nothing else. Each
function changes the process that calls it. What the sandbox keeps in: the network, every file but a
small scratch folder in memory, other processes, CPU seconds, memory, file sizes, the number of
processes. What it does not: files can be read by name.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38  # linux/prctl.h
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
SYS_MOUNT_SETATTR, AT_RECURSIVE, RDONLY = 442, 0x8000, 1
INSIDE_ID = 1000
SCRATCH, HELD = "/tmp", "/mnt"
FIRST_NOBODY = 1_900_000_000  # above every id that is given to people or containers


def _libc(name: str, *args: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    if sys.platform == "linux":
        _libc("prctl", option, value, 0, 0, 0)


def isolate(job: dict[str, Any]) -> None:
    """New namespaces: no network, no file to write but a small scratch folder. Raises: OSError
    where not allowed.
    """
    uid, gid = os.geteuid(), os.getegid()
    _libc("unshare", NEWNS | NEWNET | NEWIPC | NEWUTS | (NEWUSER if uid else 0))
    maps = (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE_ID} {uid} 1"),
        ("gid_map", f"{INSIDE_ID} {gid} 1"),
    )
    for name, text in maps if uid else ():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _libc("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    attributes = (ctypes.c_uint64 * 4)(RDONLY, 0, 0, 0)
    _libc("syscall", SYS_MOUNT_SETATTR, -100, b"/", AT_RECURSIVE, ctypes.byref(attributes), 32)
    if not uid:  # the answer will be nobody, who may not enter the folder where root's Python is
        mount_scratch(HELD, 1)
        for name in ("python", "packages"):
            os.mkdir(f"{HELD}/{name}")
            _libc(
                "mount", job[name].encode(), f"{HELD}/{name}".encode(), None, MS_BIND | MS_REC, None
            )
            job[name] = f"{HELD}/{name}"
    mount_scratch(SCRATCH, job["file_mb"])


def leave_root(many_users: bool) -> None:
    """Become a user who owns nothing and is nobody else: root's own processes are never counted, so
    that a fork bomb of root's would have no bound. Raises: OSError where that is not allowed.
    """
    if os.geteuid() == 0:
        user = FIRST_NOBODY + int.from_bytes(os.urandom(3), "big") if many_users else 65_534
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def _many_users() -> bool:
    try:
        with open("/proc/self/uid_map") as file:
            return any(int(line.split()[2]) > FIRST_NOBODY + (1 << 24) for line in file)
    except OSError:
        return False


def mount_scratch(place: str, size_mb: int, flags: int = 0) -> None:
    """An empty file system in memory over a folder."""
    options = f"size={size_mb}m,mode=777".encode()
    _libc("mount", b"tmpfs", place.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | flags, options)


def limit(job: dict[str, Any], processes: int) -> None:
    """Bound this process: CPU seconds, address space, file size, open files, processes, no core
    dumps.
    """
    cpu_s, memory = int(job["timeout_s"]) + 1, job["memory_mb"] << 20
    wanted = {
        "CPU": (cpu_s, cpu_s + 1),
        "AS": (memory, memory),
        "FSIZE": (job["file_mb"] << 20,) * 2,
        "NOFILE": (64, 64),
        "CORE": (0, 0),
        "NPROC": (processes, processes),
    }
    for name, pair in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = pair if hard == resource.RLIM_INFINITY else tuple(min(p, hard) for p in pair)
        try:
            resource.setrlimit(kind, most)
        except (OSError, ValueError):
            if name not in ("AS", "NPROC"):  # macOS has these two in name only
                raise


def in_own_namespace(work: Callable[[], None]) -> int:
    """Do `work` as the first process of a process namespace; ending the process given here ends all
    of them.
    """
    launcher = os.fork()
    if launcher:
        return launcher
    try:
        prctl(DEATH_SIGNAL, signal.SIGKILL)
        _libc("unshare", NEWPID)
        first = os.fork()
        if first == 0:
            prctl(DEATH_SIGNAL, signal.SIGKILL)
            work()
        else:
            os.waitpid(first, 0)
    finally:
        os._exit(0)


def forked(work: Callable[[], None]) -> int:
    """Do `work` in a child process; gives its id."""
    child = os.fork()
    if child:
        return child
    try:
        prctl(DEATH_SIGNAL, signal.SIGKILL)
        work()
    finally:
        os._exit(0)


def start_answer(job: dict[str, Any]) -> tuple[socket.socket, int]:
    """The answer's process, in a namespace of its own where it is the first: when it ends, so does
    all it started.
    """
    ours, theirs = socket.socketpair()
    if job["isolated"]:
        _libc("unshare", NEWPID)  # of the children from now on; the answer is the only one
    child = os.fork()
    if child == 0:
        try:
            _become_answer(job, theirs.fileno())
        finally:
            os._exit(1)
    theirs.close()
    return ours, child


def _become_answer(job: dict[str, Any], fd: int) -> None:
    os.setsid()
    many_users = _many_users()
    if job["isolated"]:
        _libc("unshare", NEWNS)
        mount_scratch(SCRATCH, job["file_mb"])
        mount_scratch(
            "/proc", 1, flags=RDONLY
        )  # other processes' memory and command lines are in there
    os.chdir(SCRATCH if job["isolated"] else job["folder"])
    os.dup2(fd, 3)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.closerange(4, 4096)
    # A user of its own has these processes only. In a user namespace test runner, launcher and
    # runner count too. Where neither is to be had all of the user's count: then the answer may
    # start none.
    own = 0 if os.geteuid() == 0 else 3 if job["isolated"] else -job["processes"]
    limit(job, job["processes"] + own)
    leave_root(many_users)
    prctl(DEATH_SIGNAL, signal.SIGKILL)  # after the change of user, which clears it
    prctl(NO_NEW_PRIVILEGES, 1)
    os.set_inheritable(3, True)
    python = os.path.join(job["python"], "bin", job["binary"])
    start = f"import sys; sys.path.append({job['packages']!r})\n" if job["see_packages"] else ""
    environment = {
        "LD_LIBRARY_PATH": os.path.join(job["python"], "lib"),
        "LANG": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    os.execve(python, [python, "-I", "-S", "-c", start + job["candidate"]], environment)
