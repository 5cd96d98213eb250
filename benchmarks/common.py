"""What the benchmarks share: running a command while watching it, waiting for a quiet machine,
writing results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
RESULTS = HERE / "results"
HERTZ = os.sysconf("SC_CLK_TCK")
NEEDS_GPU = "this benchmark needs a GPU and there is none here; --quick shows on a CPU that the script works"


def busy_s() -> float:
    """CPU seconds that the whole machine has been busy since it started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / HERTZ


def wait_quiet(limit_s: float = 20.0, cores: float = 0.15) -> bool:
    """Wait until the machine uses less than `cores` over a second; False when it never did within
    `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        before = busy_s()
        time.sleep(1.0)
        if busy_s() - before < cores:
            return True
    return False


def get(url: str, data: bytes | None = None, timeout_s: float = 10.0) -> Any:
    """The JSON at `url` (POST when there is data)."""
    with urllib.request.urlopen(
        urllib.request.Request(url, data=data), timeout=timeout_s
    ) as answer:
        return json.load(answer)


@contextmanager
def mock(python: str, port: int, latency_ms: float) -> Iterator[str]:
    """The mock server in its own process on the last core; gives its address."""
    command = [
        python,
        str(PEERS / "mock_openai.py"),
        "--port",
        str(port),
        "--latency-ms",
        str(latency_ms),
        "--cpu",
        str((os.cpu_count() or 1) - 1),
    ]
    process = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            if process.poll() is not None:
                raise SystemExit(f"the mock server did not start: {' '.join(command)}")
            try:
                get(url + "/stats")
                break
            except OSError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait()


def watched(
    command: list[str], timeout_s: float, cwd: Path, env: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a command; give its RESULT line, exit status, wall and CPU seconds and peak memory of its
    process tree.

    Units: `peak_rss_mb` and `peak_pss_mb` in MiB (PSS shares out pages that forked workers have in
    common); `foreign_cores` is what the rest of the machine used meanwhile, a mock server's share
    included."""
    before, busy, started = (
        resource.getrusage(resource.RUSAGE_CHILDREN),
        busy_s(),
        time.perf_counter(),
    )
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **(env or {})},
        start_new_session=True,
    )
    peak, done = {"rss": 0, "pss": 0}, threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, peak, done), daemon=True)
    sampler.start()
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    done.set()
    sampler.join()
    after, wall_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    line = re.search(r"^RESULT (.*)$", out, re.M)
    result = json.loads(line[1]) if line else {"error": (err or out)[-2000:]}
    return {
        **result,
        "rc": process.returncode,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_rss_mb": peak["rss"] / 2**20,
        "peak_pss_mb": peak["pss"] / 2**20,
        "foreign_cores": max(0.0, busy_s() - busy - cpu_s) / wall_s,
    }


def _sample(pid: int, peak: dict[str, int], done: threading.Event) -> None:
    import psutil

    turn = 0
    while not done.wait(0.1):
        rss = pss = 0
        for process in tree(pid):
            try:
                rss += process.memory_info().rss
                pss += process.memory_full_info().pss if turn % 10 == 0 else 0
            except psutil.Error:
                continue
        peak["rss"], peak["pss"] = max(peak["rss"], rss), max(peak["pss"], pss)
        turn += 1


def tree(pid: int) -> list[Any]:
    """The process and everything below it."""
    import psutil

    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def median(values: Iterable[float | None]) -> float | None:
    """The median of the values that there are."""
    found = [v for v in values if v is not None]
    return statistics.median(found) if found else None


def write(name: str, quick: bool, **results: Any) -> Path:
    """Write `results` with what they were measured on, and to the folder that $OUT names as well
    where it is set. A `--quick` run goes beside, and is not to be committed."""
    path = RESULTS / (f"{name}.quick.json" if quick else f"{name}.json")
    RESULTS.mkdir(exist_ok=True)
    where = measured_on()
    if not where["clean"] and not quick:
        print("measured with changes that are not committed; the README must say so")
    text = json.dumps({"where": where, **results}, indent=1) + "\n"
    path.write_text(text)
    if out := os.environ.get("OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / path.name).write_text(text)
    print(f"wrote {path}")
    return path


def measured_on() -> dict[str, Any]:
    """The machine, the commit and the command. `clean`: apart from results nothing differs from the
    commit."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=HERE.parent, capture_output=True, text=True)
        return done.stdout.strip()

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_at_end": os.getloadavg()[0],
        "commit": git("rev-parse", "--short", "HEAD"),
        "clean": not git("status", "--porcelain", "--", ".", ":!benchmarks/results"),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m benchmarks." + Path(sys.argv[0]).stem + _options(),
    }


def _options() -> str:
    """The command's options without those that name a place on this machine."""
    given = sys.argv[1:]
    return "".join(
        f" {a}"
        for a, after in zip(given, [*given[1:], ""], strict=False)
        if not a.startswith("/") and not after.startswith("/")
    )


def asked(args: argparse.Namespace) -> dict[str, Any]:
    """What a benchmark was asked for, likewise."""
    return {name: value for name, value in vars(args).items() if not isinstance(value, Path)}


def _cpu() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def words(e: Any) -> str:
    """An estimate, or one as a mapping, with its interval where it has one."""
    found = e if isinstance(e, dict) else asdict(e) if e is not None else {}
    if found.get("value") is None:
        return ""
    return f"{found['value']:.3f}" + (
        "" if found["low"] is None else f" ({found['low']:.3f} to {found['high']:.3f})"
    )


def table(columns: list[str], rows: list[list[Any]]) -> None:
    """A Markdown table on stdout, as it stands in the README."""
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print(
            "| "
            + " | ".join(
                f"{x:,.3g}"
                if isinstance(x, float) and abs(x) < 100
                else f"{x:,.0f}"
                if isinstance(x, (int, float))
                else str(x)
                for x in row
            )
            + " |",
            flush=True,
        )
