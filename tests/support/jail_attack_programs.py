"""Programs that try to leave the verifier's jail, each a function that gives True when it got what
it wanted and False when it did not.

The text of this file is the answer's code (`jail_attacks.py` adds OUTSIDE, TERMINAL and `attack`),
so it imports nothing but the standard library. Numbers of system calls are written as on x86-64,
then as in the generic table (arm64, riscv64).
"""

# ruff: noqa: B023
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import socket
import time

OUTSIDE = TERMINAL = ""
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
X86 = os.uname().machine == "x86_64"
REFUSED = (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENETUNREACH)


def call(x86, generic, *args):
    """Whether a system call reached the kernel's code of that name, which may have found fault with
    the arguments.
    """
    ctypes.set_errno(0)
    done = libc.syscall(ctypes.c_long(x86 if X86 else generic), *args)
    return done >= 0 or ctypes.get_errno() not in REFUSED


def can(work):
    """Whether it ran without an error."""
    try:
        work()
    except (OSError, ValueError, MemoryError):
        return False
    return True


# --- files ---


def a_private_file_of_the_same_user():
    return can(lambda: open(OUTSIDE + "/private").read())


def a_public_file_by_name():
    return can(lambda: open(OUTSIDE + "/public").read())


def the_list_of_users():
    return can(lambda: open("/etc/passwd").read())


def the_machines_name():
    return can(lambda: open("/etc/hostname").read())


def a_processs_environment():
    return can(lambda: open("/proc/1/environ").read())


def a_processs_memory():
    return can(lambda: open("/proc/self/mem", "rb"))


def the_kernels_settings():
    return can(lambda: open("/proc/sys/kernel/hostname").read())


def devices_in_sysfs():
    return can(lambda: os.listdir("/sys/class"))


def folders_of_people():
    return any(
        os.path.exists(p) for p in ("/home", "/root", "/var", "/run", "/srv", "/opt", "/mnt")
    )


def the_way_up():
    return can(lambda: open("/.." * 20 + OUTSIDE + "/public").read())


def the_old_root():
    return can(lambda: os.chroot(".")) or set(os.listdir("/")) > {
        "proc",
        "dev",
        "tmp",
        "python",
        "packages",
        "usr",
        "lib",
        "lib64",
        "lib32",
        "libx32",
        "etc",
        "nix",
        "bin",
    }


def writing_to_the_root():
    return can(lambda: open("/new", "w")) or can(lambda: os.mkdir("/dev/new"))


def writing_to_the_libraries():
    return any(
        can(lambda: open(os.path.join(p, "x"), "w"))
        for p in {os.path.dirname(os.__file__), "/usr/lib", "/lib"}
    )


def a_folder_of_the_root_made_writable():
    return call(165, 40, b"none", b"/", None, ctypes.c_ulong(32), None)


def a_file_by_its_handle():
    return call(304, 265, 3, None, 0) or call(303, 264, -100, b"/", None, None, 0)


def a_hard_link():
    return can(lambda: os.link(OUTSIDE + "/public", "/tmp/x"))


def a_files_mode_by_name():
    before = os.stat(OUTSIDE + "/private").st_mode
    os.chmod(OUTSIDE + "/private", before ^ 0o100)
    return os.stat(OUTSIDE + "/private").st_mode != before


def a_files_time_by_name():
    os.utime(OUTSIDE + "/private", (1, 1))
    return os.stat(OUTSIDE + "/private").st_mtime == 1


def a_files_length_by_name():
    return can(lambda: os.truncate(OUTSIDE + "/private", 1))


def a_files_owner_by_name():
    return can(lambda: os.chown(OUTSIDE + "/private", os.getuid(), os.getgid()))


def a_file_taken_away():
    return can(lambda: os.rename(OUTSIDE + "/private", "x")) or can(
        lambda: os.unlink(OUTSIDE + "/private")
    )


# --- sockets ---


def a_unix_socket_by_path():
    return can(lambda: socket.socket(socket.AF_UNIX).connect(OUTSIDE + "/socket"))


def a_unix_datagram_socket_by_path():
    return can(
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(
            b"x", OUTSIDE + "/datagrams"
        )
    )


def an_abstract_unix_socket():
    return can(lambda: socket.socket(socket.AF_UNIX).connect("\0" + OUTSIDE))


def the_systems_message_bus():
    return any(
        can(lambda: socket.socket(socket.AF_UNIX).connect(p))
        for p in ("/run/dbus/system_bus_socket", "/var/run/docker.sock", "/run/systemd/private")
    )


def sockets_of_the_network():
    return can(lambda: socket.socket(socket.AF_INET)) or can(lambda: socket.socket(socket.AF_INET6))


def a_raw_socket():
    return can(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW)) or can(
        lambda: socket.socket(17, socket.SOCK_RAW)
    )


def a_socket_to_the_host_of_a_virtual_machine():
    return can(lambda: socket.socket(40, socket.SOCK_STREAM))


def a_socket_to_the_kernel():
    return can(lambda: socket.socket(16, socket.SOCK_RAW, 0)) or can(
        lambda: socket.socket(38, socket.SOCK_SEQPACKET)
    )


def a_socket_of_any_family():
    return any(can(lambda: socket.socket(f, t)) for f in range(1, 46) for t in (1, 2, 3, 5))


# --- terminals ---


def a_terminal_by_name():
    return can(lambda: os.write(os.open(TERMINAL, os.O_WRONLY | os.O_NOCTTY), b"hello"))


def all_terminals():
    return can(lambda: os.listdir("/dev/pts")) and bool(os.listdir("/dev/pts"))


def the_controlling_terminal():
    return can(lambda: open("/dev/tty", "w"))


def a_new_terminal():
    return can(lambda: open("/dev/ptmx", "w")) or can(lambda: os.openpty())


def the_console():
    return can(lambda: open("/dev/console", "w")) or can(lambda: open("/dev/kmsg", "w"))


def typing_into_a_terminal():
    return call(
        16, 29, 0, ctypes.c_ulong(0x5412), ctypes.byref(ctypes.c_char(b"x"))
    ) and ctypes.get_errno() not in (errno.ENOTTY, errno.EBADF)


def other_devices():
    return set(os.listdir("/dev")) - {"null", "zero", "full", "random", "urandom"} != set()


def shared_memory_by_name():
    return can(lambda: open("/dev/shm/x", "w"))


def a_device_node_of_its_own():
    return can(lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(254, 0)))


# --- memory ---


def system_v_memory():
    kept = 0
    for key in range(8):
        number = libc.shmget(0, 32 << 20, 0o1600)
        at = libc.shmat(number, None, 0) if number >= 0 else None
        if at in (None, 2**64 - 1):
            continue
        ctypes.memset(at, 1, 32 << 20)
        libc.shmdt(ctypes.c_void_p(at))
        kept += 32
    return kept > 64


def files_in_memory():
    kept = []
    for _ in range(20):
        try:
            kept.append(os.memfd_create("x"))
            os.write(kept[-1], b"x" * (8 << 20))
        except OSError:
            pass
    return len(kept) > 8


def many_empty_files():
    for number in range(40_000):
        try:
            os.close(os.open(f"/tmp/{number}", os.O_CREAT | os.O_WRONLY))
        except OSError:
            return False
    return True


def secret_memory():
    return call(447, 447, 0)


def messages_of_system_v():
    sent, text = 0, ctypes.create_string_buffer(b"\1" + b"\0" * 8000)
    for key in range(2):
        queue = libc.msgget(0, 0o1600)
        sent += queue >= 0 and libc.msgsnd(queue, text, 100, 0o4000) == 0
    return sent > 0


def semaphores_of_system_v():
    return libc.semget(0, 100, 0o1600) >= 0


def posix_message_queues():
    return call(240, 180, b"x", os.O_RDWR | os.O_CREAT, 0o600, None)


def asynchronous_system_calls():
    return call(425, 425, 8, ctypes.create_string_buffer(256))


def memory_locked_in_place():
    return libc.mlockall(2) == 0


def faults_of_pages():
    return call(323, 282, 1)


# --- kernel ---


def tracing():
    return libc.ptrace(0, 0, None, None) == 0


def another_processs_memory():
    return call(310, 270, 1, None, 0, None, 0, 0) or call(311, 271, 1, None, 0, None, 0, 0)


def another_processs_files():
    return call(438, 438, 0, 0, 0) or call(434, 434, 1, 0)


def a_user_namespace():
    return libc.unshare(0x10000000) == 0


def a_mount_namespace():
    return libc.unshare(0x20000) == 0


def a_namespace_by_clone():
    pid = libc.syscall(
        ctypes.c_long(56 if X86 else 220), ctypes.c_ulong(0x10000011), None, None, None, None
    )
    if pid == 0:
        os._exit(0)
    return pid > 0


def clone3():
    return call(435, 435, None, 0)


def anothers_namespace():
    return call(308, 268, 3, 0)


def mounting():
    return libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) == 0


def the_new_calls_for_mounting():
    return (
        call(430, 430, b"tmpfs", 0)
        or call(428, 428, -100, b"/", 0)
        or call(442, 442, -100, b"/", 0, None, 0)
    )


def unmounting():
    return libc.umount2(b"/tmp", 2) == 0 or libc.umount2(b"/proc", 2) == 0


def programs_in_the_kernel():
    return call(321, 280, 0, None, 0)


def performance_counters():
    return call(298, 241, None, 0, -1, -1, 0)


def the_users_keys():
    return call(250, 219, 0, -3, 0) or call(248, 217, b"user", b"x", b"y", 1, -3)


def the_kernels_log():
    return call(103, 116, 10, None, 0)


def modules():
    return call(175, 105, None, 0, b"") or call(313, 273, 0, b"", 0)


def another_personality():
    return call(135, 92, 0x0040000)


def priorities_of_others():
    return can(lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))


def the_clock():
    return can(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))


def the_machines_name_changed():
    return can(lambda: socket.sethostname("x"))


def becoming_another_user():
    return can(lambda: os.setuid(0)) or can(lambda: os.setgroups([0]))


def the_parents_process():
    return can(lambda: os.kill(os.getppid(), 0)) and os.getppid() > 0


def the_limits_of_the_parent():
    parent = os.getppid()
    limits = resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    return parent > 0 and can(lambda: resource.prlimit(parent, *limits))


def a_signal_to_the_parent_through_a_socket():
    a = socket.socketpair()[0]
    if os.getppid() == 0 or not can(lambda: fcntl.fcntl(a, fcntl.F_SETOWN, os.getppid())):
        return False
    return fcntl.fcntl(a, fcntl.F_GETOWN) == os.getppid()


def the_processors_of_the_parent():
    return os.getppid() > 0 and can(lambda: os.sched_setaffinity(os.getppid(), {0}))


def the_limits_raised():
    return can(lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))) or can(
        lambda: resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))
    )


def watching_files():
    return call(300, 262, 0, 0)


def a_second_table_of_calls():
    if not X86:
        return False
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(0x40000000 + 39))
    return ctypes.get_errno() not in (errno.ENOSYS, errno.EPERM)


def the_landlock_seccomp_and_fanotify_calls():
    return call(317, 277, 1, 0, None) or call(444, 444, None, 0, 1)


def calls_of_32_bit_programs():
    """They have other numbers: the filter ends a process that makes one."""
    if not X86:
        return False
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
    code = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(ctypes.c_int)(code)() != -errno.ENOSYS
