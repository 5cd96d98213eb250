"""Landlock: which files a process may open, decided by the process itself. It replaces an empty
root where there are no namespaces, as in most containers.

Standard library only. Landlock does not cover some calls that change a file by its name (chmod,
utime, truncate on older kernels); `seccomp.py` does. Names, sizes and times of files can still be
seen.

Source: landlock(7), linux/landlock.h.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # numbers of the calls, on all machines
_RULE_PATH_BENEATH, _VERSION = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
_MAKE_SPECIAL = 1 << 6 | 1 << 9 | 1 << 11  # devices and sockets
_RIGHTS = (13, 14, 15, 15, 16)  # rights known to version 1, 2, 3, 4, 5 and later
_TCP, _SCOPES = 3, 3  # bind and connect; abstract Unix sockets and signals


def version() -> int:
    """The version of Landlock in this kernel, 0 where there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, int(ctypes.CDLL(None).syscall(_CREATE, None, 0, _VERSION)))


def restrict(readable: list[str], writable: list[str]) -> None:
    """From now on, this process opens only these files and what lies below these folders.

    It must have given up new privileges (PR_SET_NO_NEW_PRIVS) before. Missing paths are left out.
    Raises: OSError where there is no Landlock.
    """
    known = version()
    if not known:
        raise OSError("this kernel has no Landlock")
    rights = (1 << _RIGHTS[min(known, len(_RIGHTS)) - 1]) - 1
    parts = [rights, *([_TCP] if known >= 4 else []), *([_SCOPES] if known >= 6 else [])]
    attributes = struct.pack(f"={len(parts)}Q", *parts)
    rules = _call(_CREATE, attributes, len(attributes), 0)
    for paths, allowed in ((readable, _READ), (writable, rights & ~_MAKE_SPECIAL)):
        for path in paths:
            _allow(rules, path, allowed & rights)
    _call(_RESTRICT, rules, 0)
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not stat.S_ISDIR(os.fstat(file).st_mode):
        rights &= _OF_FILES
    _call(_ADD, rules, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, file), 0)
    os.close(file)


def _call(number: int, *args: int | bytes) -> int:
    result = int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock: {os.strerror(code)}")
    return result
