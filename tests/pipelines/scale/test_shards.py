"""A run over shards gives the rows of a run in one process, asks as often, and never again."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import unittest.mock
from dataclasses import replace

import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from prefab import run
from prefab.factory.errors import ConfigError, EngineError, StoreError
from prefab.factory.ledger.segments import restore
from prefab.factory.shared_files import LocalFiles
from prefab.factory.store.shared import SharedFolder
from prefab.pipelines.cli.main import app
from prefab.pipelines.config.loader import deciding, models, resolve_pipeline
from prefab.pipelines.quality import rating_matrix
from prefab.pipelines.quality.agreement import measure
from prefab.pipelines.quality.why import why
from prefab.pipelines.scale.array import run_task
from prefab.pipelines.scale.dividing import Pace, is_worth_dividing
from prefab.pipelines.scale.driver import Driver, exclusive, number_of_shards, prepare, run_local
from prefab.pipelines.scale.launchers import LocalLauncher
from prefab.pipelines.scale.lease import Lease
from prefab.pipelines.scale.merge import merge
from prefab.pipelines.scale.on_ray import check_address
from prefab.pipelines.scale.shard import ShardRun
from prefab.pipelines.scale.sharding import Part
from prefab.pipelines.scale.worker import Worker, kept_engines
from prefab.pipelines.store.export.base import export
from prefab.pipelines.store.fill import query, rebuild
from prefab.pipelines.view.index_build import main as build_index
from tests.pipelines.view.conftest import client_of
from tests.support import project
from tests.support.sharded import ThreadLauncher, rows, run_sharded, same_rows

# a repeated prompt, one under another id, and a group whose first prompt decides its split
EXTRA = (
    {"id": "p1", "prompt": "Question 1?", "group": "g1"},
    {"id": "other", "prompt": "Question 2?"},
    {"id": "q1", "prompt": "Another question?", "group": "g7", "split": "test"},
    {"id": "q2", "prompt": "Yet another question?", "group": "g7"},
    {"prompt": "A question without an id?"},
)


def pipeline(folder, **changes):
    """A pipeline in 3 shards."""
    scale = {"shards": 3, "local": str(folder / "local"), "publish_s": 60.0}
    value = project.pipeline(folder, prompts=7, scale=scale, **changes)
    with open(folder / "prompts.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in EXTRA)
    return value


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run of one process in `single`, and the same over shards in `store`, where
    the worker of shard 1 was lost; with the pipeline, both results and the launcher.
    """
    folder = tmp_path_factory.mktemp("sharded")
    value = pipeline(folder)
    single = run(value)
    shutil.move(folder / "store", folder / "single")
    return folder, value, single, *run_sharded(value, lose=(1,))


@pytest.fixture(scope="module")
def single(made):
    """The rows of the run of one process."""
    return rows(made[0] / "single")


def test_rows_and_calls_are_those_of_one_process(made, single):
    folder, _, alone, sharded, launcher = made
    assert (sharded.state, sharded.prompts) == ("done", alone.prompts)
    assert (sharded.asked, sharded.reused) == (alone.asked, alone.reused)
    assert (sharded.outcomes, sharded.p_chosen) == (alone.outcomes, alone.p_chosen)
    # each was asked and then derived with the calibration; the lost one was given out again
    assert sorted(launcher.given) == [0, 0, 1, 1, 1, 2, 2]
    same_rows(single, folder / "store")


def test_a_finished_run_starts_no_worker(made):
    _, value, single, _, _ = made
    again, launcher = run_sharded({**value, "budget": {"failed": 0.5}})
    assert not launcher.workers and (again.asked, again.resumed) == (0, True)
    assert again.reused == single.asked + single.reused
    assert again.outcomes == single.outcomes


def test_merged_shards_are_an_ordinary_store(made, single, tmp_path):
    folder, value, alone, _, _ = made
    merged = merge(folder / "store", tmp_path / "merged")
    assert merged.calls == alone.asked
    same_rows(single, tmp_path / "merged")
    rebuild(tmp_path / "merged")
    same_rows(single, tmp_path / "merged")
    again = run({**value, "store": str(tmp_path / "merged")})
    assert (again.asked, again.version) == (0, 1)


def copy_of(made, tmp_path, local=True):
    """Another copy of the shared folder, with the machine's own ledgers or without; its
    pipeline.
    """
    folder, value, *_ = made
    shutil.copytree(folder / "store", tmp_path / "store")
    if local:
        shutil.copytree(folder / "local", tmp_path / "local")
    scale = {**value["scale"], "local": str(tmp_path / "local")}
    return {**value, "store": str(tmp_path / "store"), "scale": scale}


def test_another_machine_restores_what_is_published_and_asks_nothing(made, single, tmp_path):
    value = copy_of(made, tmp_path, local=False)
    shutil.rmtree(tmp_path / "store" / "states")
    result, _ = run_sharded(value)
    assert (result.state, result.asked) == ("done", 0)
    value["store"] = str(tmp_path / "store")
    same_rows(single, tmp_path / "store")


def test_damaged_rows_are_made_anew_and_a_damaged_segment_is_asked_again(
    made, single, tmp_path, capsys
):
    value = copy_of(made, tmp_path, local=False)
    shared = SharedFolder(tmp_path / "store")
    shard = next(state.shard for state in shared.states())
    for path in (tmp_path / "store" / "tables" / "calls").glob(f"{shard:05d}-*"):
        path.write_bytes(b"damaged")
    assert query(tmp_path / "store", "SELECT count(*) FROM calls").item() > 0
    assert f"shard {shard}: its rows" in capsys.readouterr().err
    (segment,) = (tmp_path / "store" / "segments" / f"{shard:05d}").glob("*-calls.parquet")
    segment.write_bytes(segment.read_bytes()[:-1])
    result, launcher = run_sharded(value)
    assert set(launcher.given) == {shard} and "checksum" in capsys.readouterr().err
    of_shard = shared.state(shard).runs["1"]["counts"]
    assert 0 < result.asked == of_shard["asked"]
    same_rows(single, tmp_path / "store")
    # files that are damaged once the catalogue is there: one by its size, then another one within
    sql = "SELECT count(p_a) FROM verdicts"
    all_rows = query(tmp_path / "store", sql).item()
    first, second = (shared.rows_files(shared.state(one))["verdicts"] for one in (shard, 2))
    first.write_bytes(first.read_bytes()[:-1])
    assert 0 < query(tmp_path / "store", sql).item() < all_rows
    told = capsys.readouterr().err
    assert f"{first}: damaged or missing" in told and f"shard {shard}: its rows" in told
    second.write_bytes(second.read_bytes()[:-6] + b"\xff\xffPAR1")
    for _ in range(2):
        with pytest.raises(StoreError, match=f"{second}: damaged or missing. Remove it: the same"):
            query(tmp_path / "store", sql)


@pytest.mark.slow
def test_commands_read_the_rows_of_shards_as_those_of_one_process(made, tmp_path):
    folder, *_ = made
    files, tables, grids = [], [], []
    for name in ("single", "store"):
        export(folder / name, tmp_path / name)
        found = load_dataset(str(tmp_path / name), "preference", split="train").to_list()
        files.append(sorted(map(repr, found)))
        tables.append(export(folder / name, tmp_path / name / "tables", "parquet").rows())
        with client_of(folder / name) as client:
            page = "/preferences?format=json&run=small"
            while (answer := client.get(page)).status_code == 202:  # it copies them first
                time.sleep(0.1)
            rows = answer.json()["rows"]
        grids.append(sorted((row["preference"], row["text_a"], row["question"]) for row in rows))
        build_index(folder / name, 1, tmp_path / "index" / name)
    assert len(files[0]) > 5 and files[0] == files[1]
    assert tables[0] == tables[1]
    assert len(grids[0]) > 5 and grids[0] == grids[1]
    (preference,) = query(folder / "store", "SELECT min(preference) FROM preferences").row(0)
    assert why(folder / "store", preference).outcome == why(folder / "single", preference).outcome


@pytest.mark.parametrize("together", [1, 2, 16])
def test_agreement_over_shards_is_that_of_one_store(made, monkeypatch, together):
    monkeypatch.setattr(rating_matrix, "SHARDS", together)
    single, sharded = (measure(made[0] / name, resamples=20) for name in ("single", "store"))
    assert single["items"] > 20 and repr(single) == repr(sharded)


def test_what_needs_one_ledger_says_so(made):
    store = str(made[0] / "store")
    for command in (
        ["store", "verify", store],
        ["store", "backup", store, "copy"],
        ["store", "forget", "--store", store, "--role", "judge"],
        ["import-preferences", "--store", store, __file__],
    ):
        done = CliRunner().invoke(app, command)
        assert isinstance(done.exception, ConfigError), command
        assert "prefab store merge" in str(done.exception)


@pytest.mark.slow
def test_more_prompts_are_asked_in_the_shards_that_have_them(made, tmp_path):
    value = copy_of(made, tmp_path)
    (tmp_path / "prompts.jsonl").write_text(
        (made[0] / "prompts.jsonl").read_text() + '{"prompt": "A new question?"}\n'
    )
    value["prompts"] = {"source": str(tmp_path / "prompts.jsonl")}
    result, launcher = run_sharded(value)
    assert result.version == 2  # another source
    assert result.asked == 15  # 3 samples, and 3 pairs in 2 orders under 2 principles
    assert len(set(launcher.given)) == 3


@pytest.mark.slow
def test_a_budget_is_held_over_all_shards(made, tmp_path):
    value = pipeline(tmp_path, budget={"calls": 20})
    value["engines"] = {"local": {"engine": "scripted", "delay_s": 0.2, "max_in_flight": 2}}
    result, _ = run_sharded(value, workers=1)
    assert result.state == "budget" and "budget.calls of 20" in result.reason
    assert 20 <= result.asked < made[2].asked
    value["budget"] = {}
    value["engines"] = {"local": {"engine": "scripted"}}
    rest, _ = run_sharded(value)
    assert (rest.state, rest.version) == ("done", 1)
    assert rest.asked + result.asked == made[2].asked


@pytest.mark.slow
def test_a_shard_that_loses_its_workers_is_set_aside_and_named(tmp_path):
    value = pipeline(tmp_path)
    with pytest.raises(EngineError, match=r"1 of 3 shards were set aside \(2\)"):
        run_sharded(value, lose=(2, 2, 2))
    result, launcher = run_sharded(value)
    assert result.state == "done" and launcher.given[0] == 2
    assert (launcher.given.count(0), launcher.given.count(1)) == (1, 1)  # for the calibration


def test_a_run_whose_engine_answers_nothing_ends_with_the_first_shard(tmp_path):
    value = pipeline(tmp_path)
    value["engines"] = {"local": {"engine": "scripted", "fail_every": 1}}
    scaled = prepare(value, (), 1, True)
    launcher = ThreadLauncher(scaled.setup)
    with pytest.raises(
        EngineError, match=r"none of \d+ calls was answered.*No shard has an answer"
    ):
        Driver(scaled, launcher).run(models(kept_engines(scaled.loaded)))
    assert len(launcher.given) == scaled.retries and len(set(launcher.given)) == 1


def test_a_worker_with_an_error_that_nobody_expects_is_replaced(tmp_path, monkeypatch, capsys):
    """Its process goes on, so that the driver would wait for its shard for ever."""
    ordinary, failed = ShardRun.run, []

    def once(self, *more):
        if self.job.shard == 1 and not failed:
            failed.append(1)
            raise ZeroDivisionError("by zero")
        return ordinary(self, *more)

    monkeypatch.setattr(ShardRun, "run", once)
    result, launcher = run_sharded(pipeline(tmp_path))
    given = launcher.given
    assert result.state == "done" and given.count(1) == given.count(0) + 1
    told = capsys.readouterr().err
    assert "shard 1: its worker was lost: ZeroDivisionError: by zero" in told
    assert "Traceback" in told


def test_a_worker_that_has_ended_does_not_disturb_the_end(tmp_path):
    launcher = LocalLauncher(prepare(pipeline(tmp_path), (), 1, True).setup)
    launcher.processes[1] = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    launcher.processes[1].wait()
    launcher.send(1, {"stop": True})
    launcher.close()


@pytest.mark.slow
def test_tasks_of_an_array_share_the_shards(made, single, tmp_path):
    value = {**made[1], "store": str(tmp_path / "store")}
    value["scale"] = {**value["scale"], "local": str(tmp_path / "local")}
    files = LocalFiles(tmp_path / "store")
    held = Lease(files, "claims/00001")
    assert not held.take()  # by another task
    first = run_task("1/2", value)
    assert first.state == "done" and 0 < first.asked < made[2].asked
    held.give_back()
    waiting = Lease(files, "driver.lease")
    shared = SharedFolder(tmp_path / "store")
    assert {state.shard for state in shared.states()} == {0, 2}
    assert not waiting.take()
    with pytest.raises(StoreError, match="drives a run here"):
        run_task("2/2", value)
    waiting.give_back()
    second = run_task("2/2", value)
    assert first.asked + second.asked == made[2].asked
    assert second.p_chosen == made[2].p_chosen  # learned by the last one
    same_rows(single, tmp_path / "store", but=("runs",))  # of another folder


def test_a_lease_that_another_process_has_just_taken_over_is_left_to_it(tmp_path):
    files = LocalFiles(tmp_path)
    assert files.create("lease", b"a") and not files.create("lease", b"b")
    old = files.version("lease")
    assert files.take_over("lease", b"b", old.tag)
    assert not files.take_over("lease", b"c", old.tag)
    assert files.renew("lease", b"a", old.tag) is None
    assert files.read("lease") == b"b" and [path.name for path in tmp_path.iterdir()] == ["lease"]
    files.remove("lease")
    assert not files.take_over("lease", b"c", old.tag) and not any(tmp_path.iterdir())


def test_a_lease_of_a_process_that_ended_is_taken_over(tmp_path):
    files = LocalFiles(tmp_path)
    gone = Lease(files, "lease")
    assert gone.take() == ""
    assert Lease(files, "lease").take() == f"process {os.getpid()} on {os.uname().nodename}"
    value = json.loads((tmp_path / "lease").read_bytes())
    (tmp_path / "lease").write_text(json.dumps({**value, "started": "1"}))  # another process
    assert Lease(files, "lease").take() == ""
    (tmp_path / "lease").write_text(json.dumps({**value, "boot": "elsewhere"}))
    assert Lease(files, "lease").owner()  # not heard of for less than a minute
    os.utime(tmp_path / "lease", (0, 0))
    assert Lease(files, "lease").take() == ""


@pytest.mark.parametrize(
    ("elapsed_s", "done", "workers", "worth"),
    [
        *((100, 10, 1, True), (100, 80, 1, False), (100, 100, 1, False), (5, 0, 1, False)),
        *((300, 0, 1, True), (50, 50, 1, False), (50, 50, 5, True)),
    ],
)
def test_a_shard_is_divided_where_it_would_end_much_sooner(elapsed_s, done, workers, worth):
    assert is_worth_dividing(Pace(elapsed_s, done, total=100), 2.0, workers) is worth


def test_parts_of_a_shard_have_each_position_once():
    parts = Part(7).split(3)
    assert [part.first for part in parts[1:]] == [part.end for part in parts[:-1]]
    assert (parts[0].first, parts[-1].end) == (0, 65536)
    assert [Part(7).name, parts[0].name] == ["00007", "00007-0-21845"]
    smallest = [Part(7, 5, 8), Part(7, 8, 10)]
    assert [part.split(4) for part in smallest] == [
        [Part(7, 5, 6), Part(7, 6, 7), Part(7, 7, 8)],
        [Part(7, 8, 9), Part(7, 9, 10)],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_a_straggler_is_divided_and_nothing_is_asked_twice(made, single, tmp_path, workers):
    """The second worker needs two minutes for a shard, one call after the other. With four workers
    and three shards, one is idle from the beginning.
    """
    scaled = prepare(pipeline(tmp_path), (), workers, True)
    slow = ["engines.local={engine: scripted, delay_s: 2.0, max_in_flight: 1}"]
    launcher = ThreadLauncher(scaled.setup, sets={2: slow}, together=2)
    driver = Driver(scaled, launcher)
    driver.is_worth_dividing = lambda pace, usual_per_s, workers: pace.elapsed_s > 0.7
    result = driver.run(models(kept_engines(scaled.loaded)))
    assert result.state == "done" and 2 in driver.slow and driver.divided
    assert (result.asked, result.outcomes) == (made[2].asked, made[2].outcomes)
    same_rows(single, tmp_path / "store", but=("runs",))
    ledgers = [path.name for path in (tmp_path / "local").iterdir()]
    assert sorted(ledgers) == ["00000", "00001", "00002"]  # those of parts are removed


def test_a_shard_waits_for_the_worker_that_may_be_where_its_ledger_is(tmp_path):
    scaled = prepare(pipeline(tmp_path), (), 2, True)
    driver = Driver(scaled, ThreadLauncher(scaled.setup))
    driver.pending, driver.idle, driver.starting, driver.places = [], [1], {2}, {1: "here"}
    driver.pending = [Part(0), Part(1), Part(2)]
    assert driver.next_part(1) == Part(2)  # none was worked on before
    scaled.shared.write_place("00000", "elsewhere")
    scaled.shared.write_place("00002", "here")
    assert driver.next_part(1) == Part(2)
    driver.pending = [Part(0)]
    driver._asked_at = time.monotonic() + 100
    assert driver.next_part(1) is None
    driver._asked_at -= 1000  # the other worker does not come
    assert driver.next_part(1) == Part(0)


def test_a_plan_tells_the_shards(tmp_path):
    file = project.write(tmp_path, pipeline(tmp_path))
    said = CliRunner().invoke(app, ["plan", str(file)]).output
    assert "3 shards of about 54 new calls" in " ".join(said.split())


@pytest.mark.parametrize(
    ("prompts", "shards"), [(1, 1), (12, 2), (10_000, 6), (1_000_000, 16), (10_000_000, 150)]
)
def test_small_runs_have_few_shards(tmp_path, prompts, shards):
    """For two workers; a prompt takes 15 calls."""
    assert number_of_shards(resolve_pipeline(project.pipeline(tmp_path)), 2, prompts) == shards


def test_an_address_of_a_cluster_that_is_not_there_is_told_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        check_address(address)
    for nowhere in (address, "127.0.0.1:99999"):
        with pytest.raises(EngineError, match=f"no Ray cluster at {nowhere}"):
            check_address(nowhere)
    for named in ("", "auto", "local"):
        check_address(named)


def test_bad_input(made, tmp_path):
    folder, value, *_ = made
    with pytest.raises(ConfigError, match="their number cannot change"):
        run_sharded(value, sets=("scale.shards=4",))
    with pytest.raises(ConfigError, match="this store is in shards"):
        run(value)
    with pytest.raises(StoreError, match="filled by `prefab run` without shards"):
        run_sharded({**value, "store": str(folder / "single")})
    (tmp_path / "shards.json").write_text('{"format": 2, "shards": 3, "id": "x"}')
    with pytest.raises(StoreError, match="newer version"):
        run_sharded({**value, "store": str(tmp_path)})
    segment = tmp_path / "segments" / "000001-abc.json"
    segment.parent.mkdir()
    segment.write_text('{"format": 2, "tables": {}}')
    with pytest.raises(StoreError, match=r"000001-abc.json: written by a newer version"):
        restore(tmp_path / "ledger.sqlite", LocalFiles(segment.parent))
    with pytest.raises(ConfigError, match=r"gs://bucket/run is no address .* Write s3://BUCKET"):
        run_sharded(value, sets=("scale.shared=gs://bucket/run",))
    with pytest.raises(ConfigError, match=r"s3:/bucket/run is no address"):
        run_sharded(value, sets=("scale.shared=s3:/bucket/run",))
    with (
        unittest.mock.patch.dict(sys.modules, {"obstore": None}),
        pytest.raises(ConfigError, match=r"s3://bucket/run needs obstore: "),
    ):
        run_sharded(value, sets=("scale.shared=s3://bucket/run",))
    with pytest.raises(ConfigError, match=r"store: s3://bucket/run .* Set scale.shared=s3://"):
        run_sharded(value, sets=("store=s3://bucket/run",))
    with (
        exclusive(SharedFolder(folder / "store")),
        pytest.raises(StoreError, match=f"process {os.getpid()} on .* drives a run here"),
    ):
        run_local(value)


def test_a_file_system_without_hard_links_is_told(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StoreError, match="makes no hard links"):
        SharedFolder.create(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_clocks_of_machines_decide_nothing(tmp_path, monkeypatch):
    """A lease is compared with the clock of the file system alone."""
    files = LocalFiles(tmp_path)
    there = Lease(files, "lease")
    assert there.take() == ""
    value = json.loads((tmp_path / "lease").read_bytes())
    (tmp_path / "lease").write_text(json.dumps({**value, "boot": "elsewhere"}))
    for wrong in (0.0, 1e11):
        monkeypatch.setattr(time, "time", lambda wrong=wrong: wrong)
        assert Lease(files, "lease").owner()


def test_a_worker_refuses_a_folder_that_is_not_the_drivers(tmp_path):
    setup = prepare(pipeline(tmp_path), (), 1, True).setup
    for wrong in (replace(setup, id="another"), replace(setup, shared=str(tmp_path / "absent"))):
        told = []
        asyncio.run(Worker(wrong, told.append).main())
        assert told[0]["fatal"] and "is not the folder that the driver sees" in told[0]["message"]


def test_a_worker_that_is_told_to_stop_right_after_its_job_asks_nothing(tmp_path):
    scaled = prepare(pipeline(tmp_path), (), 1, True)
    shared, loaded = scaled.shared, scaled.loaded
    known = models(kept_engines(loaded))
    record = shared.begin_run(
        loaded.config.name, loaded.resolved, {**loaded.texts, **known}, deciding
    )
    told = []

    async def work():
        worker = Worker(scaled.setup, told.append)
        job = {"shard": 0, "run": record["id"], "digest": scaled.prompts.digests[0]}
        for message in ({"do": job, "models": known}, {"stop": True}, {"end": True}):
            worker.inbox.put_nowait(message)
        await worker.main()

    asyncio.run(work())
    (done,) = (event for event in told if event["event"] == "done")
    assert (done["state"], done["counts"]["asked"]) == ("stopped", 0)


@pytest.mark.slow
def test_a_damaged_file_of_prompts_stops_its_shard_alone(tmp_path):
    scaled = prepare(pipeline(tmp_path), (), 1, True)
    scaled.shared.files.write(f"{scaled.prompts.folder}/00001.jsonl", b"damaged")
    launcher = ThreadLauncher(scaled.setup)
    with pytest.raises(
        EngineError, match=r"1 of 3 shards were set aside \(1\).*00001.jsonl: damaged"
    ):
        Driver(scaled, launcher).run(models(kept_engines(scaled.loaded)))
    assert sorted(launcher.given) == [0, 1, 1, 1, 2]
