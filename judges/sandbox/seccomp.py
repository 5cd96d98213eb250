"""A filter of system calls (seccomp): what is not in the table below is refused by the kernel.

Standard library only. The table has what CPython, its standard library and usual packages call on
plain data and on files that are in reach; it has no sockets to anything, no shared memory that a
limit does not see, no namespaces, mounts, tracing, keys, or kernel interfaces that a program of
this kind does not need. A refused call fails with ENOSYS, as on an older kernel, so that the C
library falls back to what it did before such a call existed.

Source: seccomp(2), linux/seccomp.h, linux/bpf_common.h, asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Sequence

# name:number on x86-64:number on machines with the generic table (arm64, riscv64).
_CALLS = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69
pwritev:296:70 preadv2:327:286 pwritev2:328:287 open:2: openat:257:56 close:3:57
close_range:436:436 lseek:8:62 stat:4: fstat:5:80 lstat:6: newfstatat:262:79 statx:332:291
access:21: faccessat:269:48 faccessat2:439:439 dup:32:23 dup2:33: dup3:292:24
ftruncate:77:46 fallocate:285:47 fadvise64:221:223 fsync:74:82 fdatasync:75:83
flock:73:32 getdents:78: getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 mkdir:83:
mkdirat:258:34 rmdir:84: rename:82: renameat:264:38 renameat2:316:276 unlink:87: unlinkat:263:35
link:86: linkat:265:37 symlink:88: symlinkat:266:36 readlink:89: readlinkat:267:78
fchmod:91:52 umask:95:166
statfs:137:43 fstatfs:138:44 sendfile:40:71 copy_file_range:326:285 getxattr:191:8
lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13 pipe:22:
pipe2:293:59 poll:7: ppoll:271:73 select:23: pselect6:270:72 epoll_create:213:
epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232: epoll_pwait:281:22 epoll_pwait2:441:441
eventfd:284: eventfd2:290:19 signalfd:282: signalfd4:289:74 timerfd_create:283:85
timerfd_settime:286:86 timerfd_gettime:287:87 recvfrom:45:207 recvmsg:47:212 shutdown:48:210
getsockname:51:204 getpeername:52:205 getsockopt:55:209 setsockopt:54:208 mmap:9:222
munmap:11:215 mprotect:10:226 mremap:25:216 madvise:28:233 brk:12:214 msync:26:227
membarrier:324:283 execve:59:221 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95
fork:57: vfork:58: getpid:39:172 getppid:110:173 gettid:186:178 getpgrp:111: getpgid:121:155
setpgid:109:154 getsid:124:156 setsid:112:157 pause:34: alarm:37: setitimer:38:103
getitimer:36:102 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113
clock_getres:229:114 gettimeofday:96:169 time:201: times:100:153 timer_create:222:107
timer_settime:223:110 timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111
getrusage:98:165 getrlimit:97:163 setrlimit:160:164 sysinfo:99:179
uname:63:160 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177 getresuid:118:148
getresgid:120:150 getgroups:115:158 set_tid_address:218:96 set_robust_list:273:99
get_robust_list:274:100 rseq:334:293 arch_prctl:158: prctl:157:167 futex:202:98
futex_waitv:449:449 sched_yield:24:124 sched_getaffinity:204:123
sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
sched_get_priority_min:147:126 sched_rr_get_interval:148:127 getpriority:140:141 getcpu:309:168
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136
rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sigaltstack:131:132 restart_syscall:219:128
getrandom:318:278
"""
# to a process by its number, and to a file by its name
_TO_PROCESSES = (
    "kill:62:129 tkill:200:130 tgkill:234:131 prlimit64:302:261 sched_setaffinity:203:122"
)
_TO_NAMES = """
chmod:90: fchmodat:268:53 utime:132: utimes:235: utimensat:280:88 futimesat:261:
"""
_SPECIAL = """
clone:56:220 ioctl:16:29 socket:41:198 socketpair:53:199 sendto:44:206
fcntl:72:25 truncate:76:45
"""
_MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2), "riscv64": (0xC00000F3, 2)}

_SET_SECCOMP, _MODE_FILTER = 22, 2  # linux/prctl.h, linux/seccomp.h
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000  # the second table of calls on x86-64
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW... of clone(2)
_SIGNAL_OWNERS = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: a signal to another process
_IOCTLS = (0x541B, 0x5421, 0x5450, 0x5451)  # FIONREAD, FIONBIO, FIONCLEX, FIOCLEX

Instruction = tuple[int, int, int, int]  # code, steps if true, steps if false, value


def numbers() -> dict[str, int]:
    """The number on this machine of each call that the filter knows."""
    return _numbers(
        f"{_CALLS} {_TO_PROCESSES} {_TO_NAMES} {_SPECIAL}", _MACHINES[os.uname().machine][1]
    )


def unavailable() -> str:
    """Why no filter can be made for this machine, or ""."""
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _MACHINES or struct.calcsize("P") != 8:
        return f"there is no table of system calls for {sys.platform} on {machine}"
    return ""


def install(alone: int | None) -> None:
    """Filter this process's system calls from now on, and those of all that it starts.

    It must have given up new privileges (PR_SET_NO_NEW_PRIVS) before. `alone` is its number where
    it has no namespaces: it then reaches no other process, and changes no file by name that it
    cannot open. None: it has them.
    Raises: OSError where the kernel has no filters, or none for this machine is known.
    """
    if unavailable():
        raise OSError(errno.ENOSYS, unavailable())
    code = b"".join(struct.pack("=HBBI", *step) for step in instructions(alone))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(kept := _buffer(code)))
    result = ctypes.CDLL(None, use_errno=True).prctl(
        _SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), program, 0, 0
    )
    del kept
    if result != 0:
        code_of = ctypes.get_errno()
        raise OSError(code_of, f"seccomp: {os.strerror(code_of)}")


def _buffer(code: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(code, len(code))


def instructions(alone: int | None) -> list[Instruction]:
    """The filter's program: the machine, then calls whose arguments matter, then the table."""
    machine, column = _MACHINES[os.uname().machine]
    special = _numbers(_SPECIAL, column)
    to_processes = _numbers(_TO_PROCESSES, column).values()
    to_names = _numbers(_TO_NAMES, column).values()
    allowed = list(_numbers(_CALLS, column).values())
    start: list[Instruction] = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, machine),  # a 32-bit call has other numbers
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if column == 1:
        start += [(_AT_LEAST, 0, 1, _X32), _fail(errno.ENOSYS)]
    blocks = [
        (
            special["clone"],
            [_argument(0), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), _fail(errno.EPERM), _ALLOWED],
        ),
        (special["ioctl"], [_argument(1), *_one_of(_IOCTLS, errno.ENOTTY)]),
        (special["fcntl"], [_argument(1), *_none_of(_SIGNAL_OWNERS, errno.EPERM)]),
        (special["socket"], [_fail(errno.ENETUNREACH)]),
        (special["socketpair"], [_argument(0), *_one_of((1,), errno.EAFNOSUPPORT)]),
        # to the socket's own other end; an address could name somebody else's socket
        (
            special["sendto"],
            [_argument(4), (_EQUAL, 0, 3, 0), _argument(4, 4), *_one_of((0,), errno.EPERM)],
        ),
    ]
    if alone is None:
        allowed += [*to_processes, *to_names, special["truncate"]]
    else:
        own = [_argument(0), *_one_of((0, alone), errno.EPERM)]
        blocks += [(number, own) for number in to_processes]
        blocks += [(number, [_fail(0)]) for number in to_names]  # as if done: copies of files do so
    for number, block in blocks:
        start += [(_EQUAL, 0, len(block), number), *block]
    return [*start, *_one_of(allowed, errno.ENOSYS)]


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = [row.split(":") for row in table.split()]
    return {row[0]: int(row[column]) for row in rows if row[column]}


def _argument(index: int, byte: int = 0) -> Instruction:
    """Load the lower half of an argument (`byte` 4: the upper); all these machines are
    little-endian.
    """
    return (_LOAD, 0, 0, _ARGUMENTS + 8 * index + byte)


def _fail(code: int) -> Instruction:
    return (_RETURN, 0, 0, _FAIL | code)


_ALLOWED: Instruction = (_RETURN, 0, 0, _ALLOW)


def _none_of(values: Sequence[int], code: int) -> list[Instruction]:
    """Fail the call when what was loaded is one of these, else allow it."""
    last = len(values)
    tests = [(_EQUAL, last - at, 0, value) for at, value in enumerate(values)]
    return [*tests, _ALLOWED, _fail(code)]


def _one_of(values: Sequence[int], code: int) -> list[Instruction]:
    """Allow the call when what was loaded is one of these, else fail it. At most 255 values."""
    last = len(values)
    tests = [(_EQUAL, last - at, 0, value) for at, value in enumerate(values)]
    return [*tests, _fail(code), _ALLOWED]
