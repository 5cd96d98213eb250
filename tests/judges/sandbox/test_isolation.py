"""The verifier's jail: what programs try to reach in it, what they can still do, and what is said
where there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefab.factory.paths import IMPORT_ROOT
from prefab.judges import sandbox
from prefab.judges.sandbox import memory_cgroup, seccomp
from tests.support import jail_attacks


@pytest.fixture(scope="module")
def isolated() -> None:
    complete, words = sandbox.isolation_status()
    if not complete:
        pytest.skip(words)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    with jail_attacks.prepared(folder) as terminal:
        yield folder, terminal


@pytest.mark.parametrize("name", jail_attacks.ATTACKS)
def test_no_attack_gets_through(name, isolated, outside):
    assert jail_attacks.outcome(name, *outside) == "held"


# What can be seen without namespaces: the names of files.
SEEN = {"": set(), "landlocked filtered": {"folders_of_people"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "level", [pytest.param(level, marks=[pytest.mark.slow] if level else []) for level in SEEN]
)
def test_no_attack_of_an_ordinary_users_answer_gets_through(level, tmp_path_factory):
    """User namespaces or Landlock make the jail, and the files of the same user are near."""
    python, folder = "/usr/bin/python3", tmp_path_factory.mktemp("outside")
    if not Path(python).exists():
        pytest.skip("no Python that an ordinary user may run")
    user = {"user": 54_321, "group": 54_321, "extra_groups": []} if os.geteuid() == 0 else {}
    os.chown(folder, user.get("user", -1), user.get("group", -1))
    for above in (folder, *folder.parents):
        if above.stat().st_uid == 0 and not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)
    done = subprocess.run(
        [python, jail_attacks.__file__, IMPORT_ROOT, folder, *([level] if level else [])],
        capture_output=True,
        text=True,
        cwd="/",
        **user,
    )
    if "Permission" in done.stderr:
        pytest.skip("the project's folder is root's alone")
    if "NoSandbox" in done.stderr:
        pytest.skip(f"limits only: {done.stderr.splitlines()[-1]}")
    found = json.loads(done.stdout)
    if not found["isolation"][0]:
        pytest.skip(found["isolation"][1])
    through = {name: text for name, text in found["attacks"].items() if text != "held"}
    assert through.keys() == SEEN[level], through


WORKS = {
    "files": """
import tempfile, shutil, pathlib
def f():
    folder = pathlib.Path(tempfile.mkdtemp())
    (folder / "a").write_text("text"); shutil.copy2(folder / "a", folder / "b"); os.replace(folder / "b", folder / "c")
    names = sorted(os.listdir(folder)); shutil.rmtree(folder)
    return names == ["a", "c"]
""",
    "asyncio": """
import asyncio
async def add(a, b):
    await asyncio.sleep(0.01)
    return a + b
def f(): return asyncio.run(add(1, 2)) == 3
""",
    "the standard library": """
import sqlite3, hashlib, decimal, zoneinfo, datetime, random, secrets, json, csv, re, uuid, bz2, lzma, zlib, statistics, heapq
def f():
    if os.path.isdir("/usr/share/zoneinfo"):
        noon = datetime.datetime(2024, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Paris"))
        assert noon.utcoffset().seconds == 7200
    db = sqlite3.connect("/tmp/x.db")
    db.execute("create table t (x)")
    db.execute("insert into t values (3)")
    db.commit()
    assert len(secrets.token_hex(4)) == 8 and hashlib.sha256(b"x").digest()
    return db.execute("select x from t").fetchone() == (3,)
""",
    "signals and time": """
import signal, time
def f():
    got = []
    signal.signal(signal.SIGALRM, lambda *a: got.append(1)); signal.setitimer(signal.ITIMER_REAL, 0.01); time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGALRM)
    return got == [1, 1]
""",
    "pairs of sockets": """
import socket
def f():
    a, b = socket.socketpair(); a.sendall(b"x")
    return b.recv(1) == b"x"
""",
    "threads": """
import threading, concurrent.futures, queue
def f():
    with concurrent.futures.ThreadPoolExecutor(2) as pool: return sum(pool.map(lambda x: x * x, range(5))) == 30
""",
    "processes": """
import subprocess, sys
def f():
    return subprocess.run([sys.executable, "-S", "-c", "print(42)"], capture_output=True, text=True).stdout == "42\\n"
""",
}


@pytest.mark.parametrize("name", WORKS)
def test_what_honest_programs_do_works(name):
    processes = 4 if name in ("threads", "processes") else 1
    limits = sandbox.Limits(timeout_s=10, processes=processes)
    found = sandbox.run_tests("assert f() is True", "import os\n" + WORKS[name], limits)
    if "processes" in name and not sandbox.isolation_status()[0]:
        pytest.skip(sandbox.isolation_status()[1])
    assert found["passed"] == 1, found


def test_packages_are_seen_when_asked_for():
    code = "import numpy as np\ndef f(): return int(np.linalg.det(np.eye(3)) + np.arange(4).sum())"
    limits = sandbox.Limits(timeout_s=20, memory_mb=2048)
    assert sandbox.run_tests("assert f() == 7", code, limits)["passed"] == 0
    limits = sandbox.Limits(timeout_s=20, memory_mb=2048, packages=True)
    assert sandbox.run_tests("assert f() == 7", code, limits)["passed"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="/proc and subreapers")
def test_the_table_of_calls_is_the_kernels():
    """Each name has the number of this machine's headers, where there are any."""
    machine = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h"}.get(os.uname().machine)
    header = Path("/usr/include") / (machine or "asm-generic/unistd.h")
    numbers = {}
    for line in header.read_text().splitlines() if header.exists() else ():
        match line.split():
            case ["#define", name, number] if number.isdigit():
                numbers[name.removeprefix("__NR_").removeprefix("__NR3264_")] = int(number)
    for name, number in seccomp.numbers().items():
        assert numbers.get(name, number) == number, name
    assert len(set(seccomp.numbers().values())) == len(seccomp.numbers())


def test_the_memory_of_an_answers_processes_is_bounded_together():
    """A control group holds them, where one can be made, and is empty again afterwards."""
    if memory_cgroup.parent() is None:
        pytest.skip("limits only: no control group of memory can be made here")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = memory_cgroup.parent() / f"prefab-{ended.pid}-0"  # as of a process that was killed
    left.mkdir()
    memory_cgroup._free.clear()
    with memory_cgroup.lent(300) as lent:
        assert not left.exists()
    folder = Path(lent)
    file = next(f for f in (folder / "memory.max", folder / "memory.limit_in_bytes") if f.exists())
    tests, code = "assert f() == 1", "import time\ndef f():\n  time.sleep(1)\n  return 1"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(sandbox.run_tests, tests, code, sandbox.Limits(memory_mb=100))
        seen = []
        while not running.done():
            seen.append(len((folder / "cgroup.procs").read_text().split()))
            time.sleep(0.01)
    assert (
        running.result()["passed"] == 1
        and max(seen) == 1
        and (folder / "cgroup.procs").read_text() == ""
    )
    assert int(file.read_text()) == (100 + 16 + memory_cgroup.KERNEL_MB) << 20


def test_what_is_missing_is_said_and_how_to_get_it(monkeypatch):
    """In the words of the machine: here, as where AppArmor forbids user namespaces."""
    mode = {
        "isolated": False,
        "complete": False,
        "why": "unshare: Operation not permitted",
        "says": "limits only",
    }
    monkeypatch.setattr(sandbox, "_known", [mode])
    with pytest.raises(
        sandbox.NoSandbox, match="isolation is required.*unshare.*limits only.*isolation: best"
    ):
        sandbox.run_tests("assert f() == 1", "def f(): return 1", isolated=True)
    setting = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"
    monkeypatch.setattr(sandbox, "_reads", lambda path: "1" if path == setting else None)
    assert "apparmor_restrict_unprivileged_userns=0" in sandbox.how_to_isolate()
