"""A jail for code that nobody trusts: namespaces, an almost empty root and a filter of system calls
where the system has them, resource limits everywhere.

Standard library only; called by `test_runner.py` in a process that will run nothing else. Each
function changes the process that calls it. The answer's process has no network and no sockets to
anybody, sees no file but Python and the system's libraries (read-only) and a small scratch folder
in memory, no device but null, zero, full and random, and no process but its own; CPU seconds,
memory, file sizes and the number of processes are limited.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable
from typing import Any

from prefab.judges.sandbox import candidate, landlock, seccomp

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
SYS_PIVOT_ROOT = 155 if os.uname().machine == "x86_64" else 41
MNT_DETACH = 2
INSIDE_ID = 1000
SCRATCH, ROOT = "/tmp", "/tmp/.root"  # ROOT: what will be the answer's /
DEVICES = ("null", "zero", "full", "random", "urandom")
LIBRARIES = (
    *(f"{above}lib{kind}" for above in ("usr/", "") for kind in ("", "32", "64", "x32")),
    "etc/ld.so.cache",
    "usr/share/zoneinfo",
)
FIRST_NOBODY = 1_900_000_000  # above every id that is given to people or containers


def _libc(name: str, *args: Any) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    if sys.platform == "linux":
        _libc("prctl", option, value, 0, 0, 0)


def open_group(job: dict[str, Any]) -> None:
    """Open the answer's control group, which is not to be reached by name later."""
    if job.get("group"):
        opened = os.open(f"{job['group']}/cgroup.procs", os.O_WRONLY)
        job["group_fd"] = fcntl.fcntl(opened, fcntl.F_DUPFD, 10)  # 3 will be the answer's socket


def isolate(job: dict[str, Any]) -> None:
    """New namespaces: no network, no file to write but a small scratch folder. Makes the answer's
    root.

    Raises: OSError where not allowed.
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
    _read_only("/", AT_RECURSIVE)
    # opened before the scratch folder hides what lies below it
    visible = {inside: _opened(source) for inside, source in _visible(job).items()}
    mount_scratch(SCRATCH, job["file_mb"])
    _make_root({inside: held for inside, held in visible.items() if held is not None})
    if not job["see_packages"]:
        _hide_packages(f"{ROOT}/python")


def _visible(job: dict[str, Any]) -> dict[str, str]:
    """The files and folders of this machine that an answer sees: its name for each, and ours."""
    parts = (f"bin/{job['binary']}", "lib", "lib64")
    visible = {f"python/{part}": os.path.join(job["python"], part) for part in parts}
    visible |= {path: f"/{path}" for path in LIBRARIES}
    visible |= {f"dev/{name}": f"/dev/{name}" for name in DEVICES}
    if job["python"].startswith("/nix/"):
        visible["nix/store"] = "/nix/store"
    if job["see_packages"]:
        visible["packages"] = job["packages"]
    return visible


def _opened(source: str) -> str | int | None:
    """The target of a relative link, else a file descriptor of the file or folder; None where there
    is none.
    """
    if os.path.islink(source) and not os.readlink(source).startswith("/"):
        return os.readlink(source)
    try:
        return os.open(source, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None


def _make_root(visible: dict[str, str | int]) -> None:
    """A file system in memory with these files and folders, and nothing else, made read-only."""
    os.mkdir(ROOT)
    mount_scratch(ROOT, 1)
    for path in ("proc", "tmp"):
        os.mkdir(f"{ROOT}/{path}")
    for inside, held in visible.items():
        place = f"{ROOT}/{inside}"
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if isinstance(held, str):
            os.symlink(held, place)
            continue
        if stat.S_ISDIR(os.fstat(held).st_mode):
            os.mkdir(place)
        else:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY))
        _mount(f"/proc/self/fd/{held}", place, MS_BIND | MS_REC)
        os.close(held)
    _read_only(ROOT, 0)


def _hide_packages(python: str) -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for name in ("lib", "lib64"):
        folder = f"{python}/{name}/{version}/site-packages"
        if os.path.isdir(folder) and not os.path.islink(f"{python}/{name}"):
            mount_scratch(folder, 1, RDONLY)


def enter_root(file_mb: int) -> None:
    """Make the root that `isolate` has made this process's own, with an empty scratch folder."""
    _libc("unshare", NEWNS)
    mount_scratch(f"{ROOT}{SCRATCH}", file_mb)
    os.chdir(ROOT)
    _libc("syscall", SYS_PIVOT_ROOT, b".", b".")
    _libc("umount2", b".", MNT_DETACH)  # the old root, which lies over the new one
    os.chdir(SCRATCH)


def _mount(source: str, place: str, flags: int) -> None:
    _libc("mount", source.encode(), place.encode(), None, flags, None)


def _read_only(place: str, flags: int) -> None:
    attributes = (ctypes.c_uint64 * 4)(RDONLY, 0, 0, 0)
    _libc("syscall", SYS_MOUNT_SETATTR, -100, place.encode(), flags, ctypes.byref(attributes), 32)


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
    files = 1024 * size_mb  # each empty file takes about 1 kB that `size` does not count
    options = f"size={size_mb}m,nr_inodes={files},mode=777".encode()
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


def limit_memory(megabytes: int) -> None:
    """Bound this process's address space, where the system does so."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = megabytes << 20
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (wanted, wanted))


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
            os.dup2(theirs.fileno(), 3)
            _become_answer(job)
        except OSError as error:
            candidate.send(socket.socket(fileno=3), {"failed": str(error)})
        finally:
            os._exit(1)
    theirs.close()
    return ours, child


def _become_answer(job: dict[str, Any]) -> None:
    os.setsid()
    many_users = _many_users()
    if job.get("group"):
        os.write(job["group_fd"], b"0")  # this process, and all that it starts
    if job["isolated"]:
        enter_root(job["file_mb"])
        job = {**job, "python": "/python", "packages": "/packages"}
    else:
        os.chdir(job["folder"])
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
    if job.get("landlocked"):
        devices = [f"/dev/{name}" for name in DEVICES]
        landlock.restrict(list(_visible(job).values()), [job["folder"], *devices])
    if job.get("filtered"):
        seccomp.install(None if job["isolated"] else os.getpid())
    os.set_inheritable(3, True)
    python = os.path.join(job["python"], "bin", job["binary"])
    environment = {
        "LD_LIBRARY_PATH": os.path.join(job["python"], "lib"),
        "LANG": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    packages = [job["packages"]] if job["see_packages"] else []
    os.execve(python, [python, "-I", "-S", "-c", job["candidate"], *packages], environment)
