"""Runs `prefab` commands in forks of a process that has imported all they need, so that a command
costs its own work and not seconds of imports.

Each line of stdin is a job in JSON (`args`, `cwd`, `out`, `err`, `timeout_s`, and if wanted `env`,
`shim`, `address_space`); for each, stdout has the process's id, and after its end a line with
`code`, `seconds`, `cpu_s` and `peak_mb`. A code of None means that it ran out of time.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from typing import Any


def import_all() -> None:
    """What `prefab run` and `prefab export` import on their way."""
    for name in (
        *("aiohttp", "duckdb", "polars", "pyarrow.parquet", "uvloop"),
        *(
            f"prefab.{name}"
            for name in (
                "factory.engines.openai",
                "factory.engines.scripted",
                "judges.kinds.pairwise",
                "pipelines.cli.main",
                "pipelines.cli.project",
                "pipelines.run.plan",
                "pipelines.run.rlaif",
                "pipelines.run.runner",
                "pipelines.store.export",
                "pipelines.store.fill",
            )
        ),
    ):
        importlib.import_module(name)


def begin(job: dict[str, Any]) -> None:
    """In the child: its folder, its output, its limits."""
    os.setpgid(0, 0)
    os.chdir(job["cwd"])
    os.environ.update(job.get("env") or {})
    for number, name in ((1, job["out"]), (2, job["err"])):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    sys.argv = ["prefab", *job["args"]]
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if job.get("address_space"):
        resource.setrlimit(resource.RLIMIT_AS, (job["address_space"],) * 2)
    if shim := job.get("shim"):
        record_files(shim)


def record_files(shim: dict[str, Any]) -> None:
    """Record the operations on files below `root` (see shim.c), with a mark after each commit of
    answers and after each one of the store."""
    from prefab.factory.ledger import db

    library = ctypes.CDLL(None)
    library.torture_begin(
        shim["root"].encode(), shim.get("record", "").encode(), ctypes.c_long(shim.get("at", 0))
    )
    db.kill_point = lambda name: library.torture_mark(name.encode())


def command(job: dict[str, Any]) -> int:
    """The command, as `prefab` would end."""
    from prefab.pipelines.cli.main import main

    begin(job)
    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, int) or error.code is None:
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(job: dict[str, Any]) -> None:
    code = command(job)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def wait(pid: int, timeout_s: float) -> dict[str, Any]:
    """The end of a process, which is killed when its time is over."""
    began, over = time.monotonic(), False
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if not over and time.monotonic() - began > timeout_s:
            over = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)
    return {
        "code": None if over else os.waitstatus_to_exitcode(status),
        "seconds": round(time.monotonic() - began, 2),
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "peak_mb": used.ru_maxrss // 1024,
    }


if __name__ == "__main__":
    import_all()
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        print(pid, flush=True)
        print(json.dumps(wait(pid, job["timeout_s"])), flush=True)
