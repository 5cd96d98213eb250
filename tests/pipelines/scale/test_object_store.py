"""An object store in the place of the shared folder: moto's server stands for S3."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import orjson
import psutil
import pytest

pytest.importorskip("obstore", reason="no object store: pip install 'prefab-rlaif[s3]'")
pytest.importorskip("moto.server", reason="no object store: pip install 'moto[server]'")

from prefab import run
from prefab.factory.errors import StoreError
from prefab.factory.object_store import ObjectStoreError, files_at
from prefab.factory.store.shared import SharedFolder
from prefab.pipelines.scale.array import run_task
from prefab.pipelines.scale.lease import Lease
from prefab.pipelines.scale.merge import merge
from tests.pipelines.scale.test_kill import RUN, counts, environment, until_asked
from tests.support import project
from tests.support.s3_server import BUCKET, bucket_files, s3_server
from tests.support.scripted_process import scripted_server
from tests.support.sharded import rows, run_sharded, same_rows

pytestmark = pytest.mark.slow
PATIENCE_S = 600
IN_FLIGHT = 8


@pytest.fixture(scope="module", autouse=True)
def server():
    with s3_server():
        yield


def pipeline(folder, address, **changes):
    """A pipeline in 3 shards, whose shared folder is this one of the bucket."""
    scale = {
        "shards": 3,
        "shared": f"s3://{BUCKET}/{address}",
        "local": str(folder / "local"),
        "publish_s": 60.0,
    }
    return project.pipeline(folder, prompts=7, scale=scale, **changes)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The rows of a run of one process, and its result."""
    folder = tmp_path_factory.mktemp("single")
    result = run(project.pipeline(folder, prompts=7))
    return rows(folder / "store"), result


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run over shards, one of whose workers was lost; its pipeline and result."""
    folder = tmp_path_factory.mktemp("sharded")
    value = pipeline(folder, "made")
    return folder, value, run_sharded(value, lose=(1,))[0]


def test_rows_and_calls_are_those_of_one_process(made, single):
    folder, _, sharded = made
    assert (sharded.state, sharded.asked) == ("done", single[1].asked)
    assert (sharded.outcomes, sharded.p_chosen) == (single[1].outcomes, single[1].p_chosen)
    same_rows(single[0], folder / "store", but=("runs",))  # of another folder
    assert not (folder / "store" / "segments").exists()


def test_another_machine_restores_what_is_published_and_asks_nothing(made, single, tmp_path):
    _, value, _ = made
    scale = {**value["scale"], "local": str(tmp_path / "local")}
    again, launcher = run_sharded({**value, "store": str(tmp_path / "store"), "scale": scale})
    assert (again.state, again.asked, again.version) == ("done", 0, 1)
    assert not launcher.workers  # nor is any shard derived again: the calibration came along
    same_rows(single[0], tmp_path / "store", but=("runs",))
    for name in bucket_files("made").names("states"):
        bucket_files("made").remove(f"states/{name}")
    again, launcher = run_sharded({**value, "store": str(tmp_path / "store"), "scale": scale})
    assert (again.state, again.asked) == ("done", 0) and launcher.workers
    same_rows(single[0], tmp_path / "store", but=("runs",))


def test_a_finished_run_copies_nothing_again(made):
    folder, value, _ = made

    def times():
        found = (folder / "store").rglob("*.parquet")
        return {path: path.stat().st_mtime_ns for path in found}

    run_sharded(value)
    before = times()
    run_sharded(value)
    assert before and times() == before
    assert not list((folder / "store").rglob(".*"))


def test_merged_shards_are_an_ordinary_store(made, single, tmp_path):
    folder, *_ = made
    merged = merge(folder / "store", tmp_path / "merged")
    assert merged.calls == single[1].asked
    same_rows(single[0], tmp_path / "merged", but=("runs",))


def test_the_copy_is_not_taken_for_the_store(made, tmp_path):
    folder, value, _ = made
    without = {key: entry for key, entry in value["scale"].items() if key != "shared"}
    with pytest.raises(StoreError, match=f"the copy of a store at s3://{BUCKET}/made"):
        run_sharded({**value, "scale": without})
    other = pipeline(tmp_path, "other")
    with pytest.raises(StoreError, match="has the rows of another run over shards"):
        run_sharded({**other, "store": str(folder / "store")})


def test_tasks_of_an_array_share_the_shards(single, tmp_path):
    value = pipeline(tmp_path, "array")
    held = Lease(bucket_files("array"), "claims/00001")
    assert not held.take()  # by another task
    first = run_task("1/2", value)
    assert first.state == "done" and 0 < first.asked < single[1].asked
    held.give_back()
    second = run_task("2/2", value)
    assert first.asked + second.asked == single[1].asked
    same_rows(single[0], tmp_path / "store", but=("runs",))
    assert bucket_files("array").names("claims") == []


def test_of_claims_that_meet_one_wins():
    files, n = bucket_files("claims"), 12
    with ThreadPoolExecutor(n) as pool:
        told = list(pool.map(lambda i: files.create("one", b"%d" % i), range(n)))
    assert told.count(True) == 1 and files.read("one") == b"%d" % told.index(True)
    gone = Lease(files, "lease")
    assert gone.take() == ""
    gone._end.set()
    value = orjson.loads(files.read("lease"))
    files.write("lease", orjson.dumps({**value, "started": "1"}))  # a process that has ended
    leases = [Lease(files, "lease") for _ in range(n)]
    with ThreadPoolExecutor(n) as pool:
        told = list(pool.map(lambda lease: lease.take(), leases))
    assert told.count("") == 1 and sum(lease.held for lease in leases) == 1
    (winner,) = (lease for lease in leases if lease.held)
    assert orjson.loads(files.read("lease"))["token"] == winner._token
    winner.give_back()
    assert files.names() == ["one"]


def test_a_renewal_that_comes_too_late_takes_nothing_back():
    files = bucket_files("late")
    assert files.create("lease", b"a")
    old = files.version("lease")
    assert files.take_over("lease", b"b", old.tag)
    assert files.renew("lease", b"a again", old.tag) is None
    assert not files.take_over("lease", b"c", old.tag)
    assert files.read("lease") == b"b"
    files.remove("lease")
    assert files.renew("lease", b"a", old.tag) is None
    assert files.version("lease") is None


def test_a_server_that_lets_two_processes_create_one_file_is_refused(tmp_path):
    with (
        s3_server(lambda request: request.pop("HTTP_IF_NONE_MATCH", None)),
        pytest.raises(StoreError, match="its server ignores `If-None-Match"),
    ):
        SharedFolder.create(tmp_path, 3, bucket_files("old"))


def test_what_the_server_refuses_is_told_in_one_line(tmp_path):
    def shared(bucket):
        return SharedFolder.create(tmp_path, 3, files_at(f"s3://{bucket}/run"))

    for make in (files_at("s3://no-such-bucket/run").names, lambda: shared("no-such-bucket")):
        with pytest.raises(
            ObjectStoreError, match="^s3://no-such-bucket: there is no such bucket$"
        ):
            make()

    def deny(request):
        request["PATH_INFO"] = "/"  # where no object can be written

    with s3_server(deny), pytest.raises(ObjectStoreError, match="run/shards.json: ") as refused:
        shared(BUCKET)
    assert "\n" not in str(refused.value)


def published_calls(name):
    """How many calls the segments in the bucket have."""
    files = bucket_files(name)
    found = 0
    for shard in range(4):
        segments = files.below(f"segments/{shard:05d}")
        for manifest in segments.names():
            if manifest.endswith(".json"):
                tables = json.loads(segments.read(manifest))["tables"]
                found += tables.get("calls", {"rows": 0})["rows"]
    return found


def test_a_worker_is_killed_with_its_disk(tmp_path):
    """Another one restores its shard from what it had published."""
    with scripted_server(delay_ms=20) as url:
        value = project.pipeline(tmp_path, 24)
        value["engines"]["local"] = {
            "engine": "openai",
            "model": "scripted",
            "base_url": url + "/v1",
            "max_in_flight": IN_FLIGHT,
            "canary_every": 0,
        }
        local = tmp_path / "local"
        shared = f"s3://{BUCKET}/killed"
        value["scale"] = {"shards": 4, "shared": shared, "local": str(local), "publish_s": 0.2}
        file = project.write(tmp_path, value)
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, "run", str(file), "--on", "local:2", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
        )
        until_asked(url, 150, process)
        published = published_calls("killed")
        for worker in psutil.Process(process.pid).children():
            worker.send_signal(signal.SIGKILL)
        asked = counts(url)["asked"]
        shutil.rmtree(local)
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, said
        told = counts(url)
    assert 0 < published <= asked < told["asked"]
    assert told["distinct"] == 24 * 15
    assert told["repeated"] <= asked - published
    shutil.move(tmp_path / "store", tmp_path / "sharded")
    with scripted_server(delay_ms=0) as url:
        value["engines"]["local"]["base_url"] = url + "/v1"
        run(value)
    same_rows(rows(tmp_path / "store"), tmp_path / "sharded", but=("runs",))
