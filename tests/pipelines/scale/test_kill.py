"""SIGKILL of a worker and of the driver: what was answered is not asked again, and nobody goes on
asking. The server counts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress

import psutil
import pytest

from prefab.factory.paths import IMPORT_ROOT
from prefab.pipelines.config.loader import models
from prefab.pipelines.scale.driver import Driver, prepare
from prefab.pipelines.scale.launchers import LocalLauncher
from prefab.pipelines.scale.worker import kept_engines
from tests.support import project
from tests.support.scripted_process import scripted_server

IN_FLIGHT = 8
PROMPTS, CALLS = 24, 24 * 15  # 3 samples, and 3 pairs in 2 orders under 2 principles
PATIENCE_S = 600
RUN = "from prefab.pipelines.cli.main import main; main()"


@pytest.fixture
def server():
    """The address of a server that takes 20 ms for an answer and counts."""
    with scripted_server(delay_ms=20) as url:
        yield url


def environment():
    return {**os.environ, "PYTHONPATH": str(IMPORT_ROOT)}


def counts(url):
    with urllib.request.urlopen(url + "/counts") as answer:
        return json.load(answer)


def write(folder, url, shards):
    """The pipeline's file."""
    if not (folder / "pipeline.yaml").exists():
        value = project.pipeline(folder, PROMPTS)
        value["engines"]["local"] = {
            "engine": "openai",
            "model": "scripted",
            "base_url": url + "/v1",
            "max_in_flight": IN_FLIGHT,
            "canary_every": 0,  # canaries are asked again and again
        }
        value["scale"] = {"shards": shards, "local": str(folder / "local"), "publish_s": 0.2}
        project.write(folder, value)
    return folder / "pipeline.yaml"


def start(folder, url):
    """A run on two workers."""
    command = ["run", str(write(folder, url, 4)), "--on", "local:2", "--json"]
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def until_asked(url, number, process):
    """Wait until so many calls were made."""
    deadline = time.monotonic() + PATIENCE_S
    while counts(url)["asked"] < number:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_a_worker_then_the_driver(tmp_path, server):
    process = start(tmp_path, server)
    until_asked(server, 60, process)
    for worker in psutil.Process(process.pid).children()[:1]:
        with suppress(psutil.NoSuchProcess):  # where this test was stopped, the run may have ended
            worker.send_signal(signal.SIGKILL)
    until_asked(server, 160, process)
    workers = psutil.Process(process.pid).children()
    process.kill()
    at_kill = counts(server)["asked"]
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE_S)
    assert not alive  # they end by themselves
    # how soon, in seconds: benchmarks/scale_faults.py. Of 200 questions that were left, few came
    assert counts(server)["asked"] - at_kill <= 4 * IN_FLIGHT
    process = start(tmp_path, server)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    told = counts(server)
    assert told["distinct"] == CALLS
    # of each kill, what was in flight, or answered and not yet committed
    assert told["repeated"] <= 3 * 2 * IN_FLIGHT


@pytest.mark.slow
def test_what_a_killed_worker_left_is_divided_and_not_asked_again(tmp_path):
    """The third of three workers is killed and not replaced. The others divide its shard between
    them, with what it had answered and not published.
    """
    with scripted_server(delay_ms=200) as server:
        file = write(tmp_path, server, 3)
        scaled = prepare(file, ("scale.publish_s=600",), 3, True)
        launcher = LocalLauncher(scaled.setup)
        driver, ended = Driver(scaled, launcher), threading.Event()
        driver.is_worth_sharing = lambda pace, usual_per_s, workers: True

        def leave():
            while not ended.wait(0.02):
                busy = driver.busy.get(3)
                if busy and busy.counts.get("asked", 0) > 2 * IN_FLIGHT:
                    scaled.workers = 2
                    launcher.kill(3)
                    return

        threading.Thread(target=leave, daemon=True).start()
        try:
            result = driver.run(models(kept_engines(scaled.loaded)))
        finally:
            ended.set()
        told = counts(server)
    assert result.state == "done" and len(launcher.processes) == 3
    (shard,) = driver.failures
    assert len(driver.divided[shard].parts) == 2
    # what the killed worker had asked counts, without what it did not come to tell
    assert CALLS - 4 * IN_FLIGHT <= result.asked <= CALLS + 2 * IN_FLIGHT
    assert told["distinct"] == CALLS
    assert told["repeated"] <= 2 * IN_FLIGHT  # in flight, or answered and not yet committed
