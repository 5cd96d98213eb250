"""Runs code that is not trusted: an answer's Python under tests, and (in `timeout_worker.py`)
regular expressions that may run without end.

`run_tests` counts the tests that an answer passes. `isolation.py` says what the sandbox keeps out
of reach, `test_runner.py` why a pass cannot be faked. Where the system gives an ordinary user no
namespaces (some containers, macOS, Ubuntu's AppArmor rule), only resource limits are left, and the
result says so (`isolation`).
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from prefab.factory.paths import IMPORT_ROOT
from prefab.judges.sandbox import memory_cgroup

# Run with -I: neither the environment nor the current folder decides what is imported. The packages
# are empty, since what their `__init__` import takes longer than the tests.
_TEST_RUNNER = """
import sys, types
for name in ("prefab", "prefab.judges", "prefab.judges.sandbox"):
    sys.modules[name] = package = types.ModuleType(name)
    package.__path__ = [{root!r} + "/" + name.replace(".", "/")]
from prefab.judges.sandbox import test_runner
test_runner.main()
"""
# From the strictest to the weakest: what keeps an answer in, whether the jail is complete, words.
_LEVELS: list[tuple[set[str], bool, str]] = [
    (
        {"isolated", "filtered"},
        True,
        "no network, no files but Python's, own processes only, few system calls",
    ),
    (
        {"landlocked", "filtered"},
        True,
        "no namespaces, but Landlock: no network, no files but Python's (names and sizes can be "
        "seen), few system calls, no signals to other processes",
    ),
    (
        {"isolated"},
        False,
        "no network, no files but Python's, own processes only; all system calls",
    ),
    (
        {"filtered"},
        False,
        "limits only: your files are within an answer's reach; no network, few system calls",
    ),
    (set(), False, "limits only: the network and your files are within an answer's reach"),
]
_KEPT_BY = ("isolated", "landlocked", "filtered")
_MEMORY = {True: "; memory limited by a control group", False: ""}
_lock = threading.Lock()
_known: list[dict[str, Any]] = []


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of an answer's process. `timeout_s` is wall and CPU time of one test (all together
    may take five times that). `processes` 1: it may start no process and no thread. `packages`:
    whether installed packages can be imported.
    """

    timeout_s: float = 10.0
    memory_mb: int = 512
    file_mb: int = 16
    processes: int = 1
    packages: bool = False


class NoSandbox(Exception):
    """No process could be started, or none as isolated as required. The answer is not at fault."""


def run_tests(
    tests: str, answer: str, limits: Limits = Limits(), isolated: bool = False
) -> dict[str, Any]:
    """Run the tests against the answer's code; with `isolated`, only where the jail is complete.

    Returns: `passed`, `total` and some `failures`, or `broken`: the tests cannot be run.
        `isolation` says what kept the answer in.
    Raises: NoSandbox.
    """
    mode = _mode()
    if isolated and not mode.get("complete", mode["isolated"]):
        raise NoSandbox(how_to_isolate())
    result = _examine(tests, answer, limits, mode)
    if "failed_to_run" in result:
        raise NoSandbox(result["failed_to_run"])
    return {**result, "isolation": mode["says"]}


def isolation_status() -> tuple[bool, str]:
    """Whether there is a complete jail here, and what there is in words.

    Raises: NoSandbox when not even a limited process runs.
    """
    mode = _mode()
    return bool(mode.get("complete", mode["isolated"])), mode["says"]


def how_to_isolate() -> str:
    """What this machine lacks for a complete jail, how to get it, and how to do with less."""
    mode = _mode()
    return (
        f"isolation is required, and this machine has no complete jail ({mode['why']}): "
        f"{mode['says']}. {advice()}"
    )


def advice() -> str:
    """How this machine could have a complete jail, by its settings, and how to do with less."""
    texts = [text for path, values, text in _ADVICE if _reads(path) in values]
    return f"{' '.join(texts) or _ELSE} Or allow less: `isolation: best`"


_ADVICE = (  # file of a setting, values that forbid, what to do
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        ("1",),
        "AppArmor forbids user namespaces: sysctl kernel.apparmor_restrict_unprivileged_userns=0.",
    ),
    (
        "/proc/sys/kernel/unprivileged_userns_clone",
        ("0",),
        "User namespaces are switched off: sysctl kernel.unprivileged_userns_clone=1.",
    ),
    (
        "/proc/sys/user/max_user_namespaces",
        ("0",),
        "User namespaces are switched off: sysctl user.max_user_namespaces=10000.",
    ),
    (
        "/.dockerenv",
        ("",),
        "This is a container: start it with --security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined --security-opt systempaths=unconfined.",
    ),
)
_ELSE = "Run on Linux 5.13 or newer, where user namespaces or Landlock are switched on."


def _reads(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _mode() -> dict[str, Any]:
    """The strictest way that works here, found out once by running a test that must pass."""
    with _lock:
        if _known:
            return _known[0]
        why: list[str] = []
        groups = (True, False) if memory_cgroup.parent() else (False,)
        for (kept_by, complete, says), cgroup in product(_LEVELS, groups):
            mode = {
                **{name: name in kept_by for name in _KEPT_BY},
                "cgroup": cgroup,
                "complete": complete,
                "why": "; ".join(dict.fromkeys(why)),
                "says": says + _MEMORY[cgroup],
            }
            result = _examine("assert one() == 1", "def one(): return 1", Limits(), mode)
            if result.get("passed") == 1:
                _known.append(mode)
                return mode
            why.append(result.get("failed_to_run") or str(result))
        if os.geteuid() == 0:
            why.append(
                "as root, whose processes are never counted, nothing weaker is run: try as an ordinary user"
            )
        raise NoSandbox("; ".join(dict.fromkeys(why)))


def _python() -> dict[str, str]:
    """Where this Python is, without its environment: that is what the answer runs on."""
    binary = Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()
    return {
        "python": str(binary.parent.parent),
        "binary": binary.name,
        "packages": sysconfig.get_path("purelib"),
    }


def _examine(tests: str, answer: str, limits: Limits, mode: dict[str, Any]) -> dict[str, Any]:
    flags = ["-I", *([] if limits.packages else ["-S"])]
    memory_mb = limits.memory_mb * limits.processes + limits.file_mb
    lent = memory_cgroup.lent(memory_mb) if mode.get("cgroup") else contextlib.nullcontext("")
    with lent as group, tempfile.TemporaryDirectory(prefix="prefab-verify-") as folder:
        os.chmod(folder, 0o777)
        job: dict[str, Any] = {
            "tests": tests,
            "answer": answer,
            "folder": folder,
            **asdict(limits),
            **mode,
            **_python(),
        }
        job["see_packages"] = limits.packages
        job["group"] = group
        try:
            done = subprocess.run(
                [sys.executable, *flags, "-c", _TEST_RUNNER.format(root=str(IMPORT_ROOT))],
                input=json.dumps(job).encode(),
                capture_output=True,
                start_new_session=True,
                cwd=folder,
                timeout=6 * limits.timeout_s + 60,
                env={"LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            return {"failed_to_run": "the test runner did not end"}
        except OSError as error:
            return {"failed_to_run": f"no process could be started: {error}"}
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        told = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return {
            "failed_to_run": f"the test runner ended (status {done.returncode}): {told[-1] if told else ''}"
        }
