"""The same run on a Ray cluster of several raylets on this machine: the rows of one process, after
the kill of a node with its disk, of a worker and of the driver. The server counts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest

ray = pytest.importorskip("ray", reason="no Ray: pip install 'prefab-rlaif[scale]'")

from ray._common.usage import usage_constants as constants  # after the skip
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

from prefab import run
from prefab.factory.errors import ConfigError, EngineError
from prefab.pipelines.config.loader import models
from prefab.pipelines.scale.driver import Driver, prepare, run_ray
from prefab.pipelines.scale.on_ray import RayLauncher, connected
from prefab.pipelines.scale.worker import kept_engines
from tests.pipelines.scale.test_kill import RUN, counts, environment, until_asked
from tests.support import project
from tests.support.scripted_process import scripted_server
from tests.support.sharded import published_calls, rows, same_rows

pytestmark = pytest.mark.slow
IN_FLIGHT = 8
PATIENCE_S = 600


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, and two nodes of one CPU."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_worker_niceness", "0")  # Ray's own 15 starves on a busy machine
        head = {"num_cpus": 0, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(2):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
    made.shutdown()


@pytest.fixture
def server():
    with scripted_server(delay_ms=20) as url:
        yield url


def pipeline(folder, url, prompts):
    engine = {"engine": "openai", "model": "scripted", "base_url": url + "/v1", "canary_every": 0}
    value = project.pipeline(folder, prompts)
    value["engines"] = {"local": {**engine, "max_in_flight": IN_FLIGHT}}
    value["scale"] = {"shards": 4, "local": str(folder / "local"), "publish_s": 0.2}
    return value


def kill_workers(folder):
    """Kill what holds files below the folder: a worker outlives its node by up to a second, and
    would ask on.
    """
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in file.path for file in process.open_files()):
                process.kill()
                process.wait(10)


def test_a_node_is_killed_with_its_disk_and_another_joins(cluster, server, tmp_path):
    value = pipeline(tmp_path, server, prompts=40)
    seen = {}
    with ThreadPoolExecutor(1) as pool:  # nodes are added in the main thread alone
        running = pool.submit(run_ray, value, address=cluster.address)
        while counts(server)["asked"] < 150 and not running.done():
            time.sleep(0.05)
        node = sorted(cluster.worker_nodes, key=lambda one: one.node_id)[0]
        seen["published"] = published_calls(tmp_path / "store")
        cluster.remove_node(node, allow_graceful=False)
        kill_workers(tmp_path / "local" / node.node_id[:8])
        seen["asked"] = counts(server)["asked"]
        shutil.rmtree(tmp_path / "local" / node.node_id[:8], ignore_errors=True)
        cluster.add_node(num_cpus=1)
        result = running.result()
    assert result.state == "done"
    told = counts(server)
    assert told["distinct"] == 40 * 15
    assert told["repeated"] <= seen["asked"] - seen["published"]
    sharded = tmp_path / "sharded"
    shutil.move(tmp_path / "store", sharded)
    run(value)
    shutil.move(tmp_path / "store", tmp_path / "single")
    shutil.move(sharded, tmp_path / "store")
    same_rows(rows(tmp_path / "single"), tmp_path / "store")


def test_nobody_asks_after_the_driver_was_killed(cluster, server, tmp_path):
    value = pipeline(tmp_path, server, prompts=30)
    value["scale"]["publish_s"] = 600  # so that a shard is published at its end alone
    file = project.write(tmp_path, value)
    command = ["run", str(file), "--on", f"ray:{cluster.address}", "--json", "--quiet"]

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", RUN, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )

    process = start()
    until_asked(server, 150, process)
    before = published_calls(tmp_path / "store")
    process.kill()
    process.wait()
    deadline = time.monotonic() + PATIENCE_S
    while any("RayActor" in " ".join(one.info["cmdline"] or ()) for one in _processes()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    asked, published = counts(server)["asked"], published_calls(tmp_path / "store")
    assert before < published <= asked < 30 * 15
    process = start()
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, said
    told = counts(server)
    assert told["distinct"] == 30 * 15
    # workers wait a moment for what is in flight, and publish it
    assert told["repeated"] <= asked - published


def _processes():
    return psutil.process_iter(["cmdline"])


def test_bad_input(cluster, tmp_path):
    value = project.pipeline(tmp_path)
    with pytest.raises(ConfigError, match="ray:// is for interactive use"):
        run_ray(value, address="ray://127.0.0.1:10001")
    with pytest.raises(EngineError, match="no Ray cluster at 127.0.0.1:1"):
        run_ray(value, address="127.0.0.1:1")


def test_another_version_of_ray_on_the_cluster_is_refused(cluster, tmp_path):
    client = GcsClient(address=cluster.address)
    key, space = constants.CLUSTER_METADATA_KEY, b"cluster"
    true = client.internal_kv_get(key, space)
    try:
        for changed in ({"ray_version": "2.1.0"}, {"python_version": "3.9.1"}):
            told = json.dumps({**json.loads(true), **changed}).encode()
            client.internal_kv_put(key, told, True, space)
            with pytest.raises(ConfigError, match="another version of Ray or of Python") as refused:
                run_ray(project.pipeline(tmp_path), address=cluster.address)
            assert next(iter(changed.values())) in str(refused.value)
    finally:
        client.internal_kv_put(key, true, True, space)


def test_a_worker_waits_for_a_gpu_and_says_so(cluster, tmp_path, capsys):
    scaled = prepare(project.pipeline(tmp_path, 4), (), 1, True)
    with connected(cluster.address, True), ThreadPoolExecutor(1) as pool:
        driver = Driver(scaled, RayLauncher(scaled.setup, gpus=1))
        running = pool.submit(driver.run, models(kept_engines(scaled.loaded)))
        said = ""
        while "a free CPU and 1 free GPU" not in said and not running.done():
            said += capsys.readouterr().err
            time.sleep(0.2)
        assert not running.done()
        cluster.add_node(num_cpus=1, num_gpus=1)
        assert running.result().state == "done"
