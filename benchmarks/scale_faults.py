"""A run over shards whose workers are slow, join late or leave, and one whose driver is killed.

    python -m benchmarks.scale_faults             (about 10 minutes; processes of this machine)
    python -m benchmarks.scale_faults --on ray    (the same with actors of a Ray cluster)

Workers and servers are real processes. A server gives each answer after half a second, and each
worker has 16 questions in flight, so that a worker does 32 calls a second at most and the machine
is not what limits it. The ideal time is that of all workers asking at this pace from the first
moment on, each for the time that it is there. What is measured also has the start of the workers,
the division of shards, and the rows and the calibration at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from benchmarks.scale import RUN, pipeline
from prefab.factory.paths import IMPORT_ROOT
from prefab.pipelines.config.loader import models
from prefab.pipelines.scale.driver import LOOK_S, Driver, exclusive, prepare
from prefab.pipelines.scale.launchers import LocalLauncher
from prefab.pipelines.scale.worker import kept_engines

IN_FLIGHT, DELAY_S, SLOW = 16, 0.5, 10.0
PACE = IN_FLIGHT / DELAY_S  # calls a second of a worker at most
CALLS_A_PROMPT = 28
KILLS = 5  # of a driver


@dataclass(frozen=True, slots=True)
class Scenario:
    """How many workers there are from the beginning, and after so many seconds (`there`); whether
    the first one is ten times slower, and when the last one of the beginning is killed.
    """

    name: str
    workers: int
    there: Callable[[float], int]
    slow: bool = False
    leaves_s: float | None = None

    def ideal_s(self, calls: int) -> float:
        """The seconds that so many calls take where no worker ever waits."""
        left, now = float(calls), 0.0
        while left > 0:
            left -= PACE * 0.1 * (self.there(now) - self.slow * (1 - 1 / SLOW))
            now += 0.1
        return now

    def room(self, now: float) -> int:
        """For how many workers the driver is told that there is room: for one that leaves there is
        none a moment before, so that it is not replaced.
        """
        return min(self.there(now), self.there(now + 2 * LOOK_S))


def scenarios(full_s: float) -> list[Scenario]:
    """Those that are measured. Four workers of the usual speed take `full_s`."""
    late, leave = full_s * 0.4, full_s * 0.6
    return [
        Scenario("four workers", 4, lambda now: 4),
        Scenario("one of four is ten times slower", 4, lambda now: 4, slow=True),
        Scenario("three of four join late", 1, lambda now: 1 if now < late else 4),
        Scenario("one of four leaves", 4, lambda now: 4 if now < leave else 3, leaves_s=leave),
        Scenario(
            "one slow, one joins late, one leaves",
            3,
            lambda now: 3 if now < late or now > leave else 4,
            slow=True,
            leaves_s=leave,
        ),
    ]


@contextmanager
def server(delay_s: float) -> Iterator[str]:
    """The address of a scripted server in a process of its own."""
    command = [sys.executable, "-m", "prefab.factory.engines.scripted"]
    process = subprocess.Popen(
        [*command, "--delay-ms", str(delay_s * 1000)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(IMPORT_ROOT)},
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def at(url: str) -> dict[str, Any]:
    """The engine at a server."""
    engine = {"engine": "openai", "model": "scripted", "base_url": url + "/v1"}
    return {**engine, "canary_every": 0}  # canaries are asked again and again


def write_pipeline(folder: Path, prompts: int, url: str, workers: int) -> Path:
    """The pipeline of `benchmarks.scale` at a server."""
    file = pipeline(folder, prompts)
    value = json.loads(file.read_text())
    value["engines"] = {"local": {**at(url), "max_in_flight": IN_FLIGHT * workers}}
    file.write_text(json.dumps(value))
    return file


def uneven(base: type[Any], scenario: Scenario, slow_url: str) -> type[Any]:
    """A launcher whose first worker asks the slow server, with room as the scenario has it."""

    class Uneven(base):  # type: ignore[misc]  # LocalLauncher or RayLauncher
        began, started = time.monotonic(), 0

        def start(self) -> int:
            """Start a worker; the first one may have another server."""
            self.started += 1
            usual = self.setup
            if scenario.slow and self.started == 1:
                engine = f"engines.local.base_url={slow_url}/v1"
                self.setup = replace(usual, sets=[*usual.sets, engine])
            try:
                return int(super().start())
            finally:
                self.setup = usual

        def capacity(self) -> int:
            """As the scenario has it."""
            return scenario.room(time.monotonic() - self.began)

    return Uneven


def measure(base: Any, folder: Path, scenario: Scenario, prompts: int) -> dict[str, Any]:
    """One run: seconds, the ideal, and what the servers were asked."""
    with server(DELAY_S) as url, server(DELAY_S * SLOW) as slow_url:
        file = write_pipeline(folder, prompts, url, scenario.workers)
        launcher_class = uneven(base["launcher"], scenario, slow_url)
        began = time.monotonic()
        scaled = prepare(file, ("scale.shards=4",), scenario.workers, True)
        with exclusive(scaled.shared):
            launcher = launcher_class(scaled.setup, *base["more"])
            launcher_class.began = began
            if scenario.leaves_s is not None:
                leaving = threading.Timer(
                    scenario.leaves_s, lambda: launcher.kill(scenario.workers)
                )
                leaving.daemon = True
                leaving.start()
            driver = Driver(scaled, launcher, quiet=True)
            result = driver.run(models(kept_engines(scaled.loaded)))
        seconds = time.monotonic() - began
        told = [common.get(one + "/counts") for one in (url, slow_url)]
    calls = prompts * CALLS_A_PROMPT
    # what a worker that was killed had asked, and not published, is asked again
    if result.state != "done" or result.asked + result.reused < calls:
        raise SystemExit(f"{scenario.name}: {result}")
    ideal = scenario.ideal_s(calls)
    found = {
        "seconds": round(seconds, 1),
        "ideal": round(ideal, 1),
        "ratio": round(seconds / ideal, 3),
        "calls": calls,
        "asked of the slow server": told[1]["asked"],
        "asked twice": sum(one["asked"] for one in told) - calls,
        "shards that were divided": sum(bool(one.parts) for one in driver.divided.values()),
        "workers killed by the driver": len(driver.killed),
    }
    print(scenario.name, found, flush=True)
    return found


def kill_driver(on: str, folder: Path) -> dict[str, Any]:
    """SIGKILL of a driver in the middle of its run, seen from the server: when the last question
    came, and what the same command asks twice.
    """
    with server(0.02) as url:
        file = write_pipeline(folder, 200, url, 2)
        command = [sys.executable, "-c", RUN, "run", str(file), "--on", on, "--quiet", "--json"]
        sets = ["--set", "scale.workers=2", "--set", "scale.shards=2"]
        env = {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}
        process = subprocess.Popen([*command, *sets], stdout=subprocess.DEVNULL, env=env)
        while (before := common.get(url + "/counts"))["asked"] < 1000:
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        killed_at = time.time()
        process.wait()
        while workers_of(folder):
            time.sleep(0.05)
        ended_at = time.time()
        after = common.get(url + "/counts")
        again = subprocess.run(
            [*command, *sets], stdout=subprocess.PIPE, env=env, text=True, check=True
        )
        whole = common.get(url + "/counts")
    return {
        "last question, seconds after the kill": round(max(0.0, after["last_at"] - killed_at), 3),
        "questions after the last look before the kill": after["asked"] - before["asked"],
        "workers' end, seconds after the kill": round(ended_at - killed_at, 2),
        "asked twice": whole["repeated"],
        "state": json.loads(again.stdout)["state"],
    }


def workers_of(folder: Path) -> list[int]:
    """The processes that hold files of the run's local folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder / "local") in file.path for file in process.open_files()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@contextmanager
def place(on: str) -> Iterator[dict[str, Any]]:
    """How workers are started, and the words for `--on`."""
    if on == "local":
        yield {"launcher": LocalLauncher, "more": (), "on": "local:2"}
        return
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray's own 15 starves on a busy machine
    from ray.cluster_utils import Cluster

    from prefab.pipelines.scale.on_ray import RayLauncher, connected

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=2)
        cluster.wait_for_nodes()
        with connected(cluster.address, True):
            yield {"launcher": RayLauncher, "more": (0,), "on": f"ray:{cluster.address}"}
    finally:
        cluster.shutdown()


def main() -> None:
    """Measure, print, and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--on", choices=("local", "ray"), default="local")
    parser.add_argument("--only", choices=("stragglers", "kill"))
    parser.add_argument("--scenario", help="Of the stragglers, only the one of this name.")
    args = parser.parse_args()
    name = "scale_faults" + ("_ray" if args.on == "ray" else "")
    file = common.RESULTS / f"{name}.json"
    part = args.only or args.scenario
    found = json.loads(file.read_text()) if part and file.exists() else {}
    found.pop("where", None)
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        where = stack.enter_context(place(args.on))
        if args.only != "kill":
            full_s = args.prompts * CALLS_A_PROMPT / PACE / 4
            known = found.get("stragglers", {}) if args.scenario else {}
            found |= {"in_flight": IN_FLIGHT, "delay_s": DELAY_S, "stragglers": known}
            for number, one in enumerate(scenarios(full_s)):
                if args.scenario not in (None, one.name):
                    continue
                told = measure(where, base / f"run{number}", one, args.prompts)
                found["stragglers"][one.name] = told
        if args.only != "stragglers" and not args.scenario:
            kills = [kill_driver(where["on"], base / f"kill{n}") for n in range(KILLS)]
            last = [one["last question, seconds after the kill"] for one in kills]
            found["driver killed"] = {
                "kills": kills,
                "last question, median": statistics.median(last),
                "last question, latest": max(last),
            }
            print(json.dumps(found["driver killed"], indent=1), flush=True)
    common.write(name, False, **found)


if __name__ == "__main__":
    main()
