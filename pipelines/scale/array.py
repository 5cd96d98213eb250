"""One task of an array job (Slurm, Kubernetes): it works off shards that no other task has, without
a driver.

Each shard is claimed by a file that one task can make and that it renews. A task begins with its
own part of the shards, and goes on with those that others have not begun. The last one learns the
calibration. The budget holds within each task.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefab.factory.console import say
from prefab.factory.errors import ConfigError, StoreError
from prefab.pipelines.config.loader import deciding, models
from prefab.pipelines.run.runner import RunResult, in_event_loop
from prefab.pipelines.scale.driver import (
    DRIVER,
    Driver,
    Scaled,
    exclusive,
    is_done,
    prepare,
    record_result,
)
from prefab.pipelines.scale.launchers import LocalLauncher
from prefab.pipelines.scale.lease import Lease
from prefab.pipelines.scale.results import sum_counts
from prefab.pipelines.scale.shard import ShardJob, ShardRun
from prefab.pipelines.scale.sharding import prompts_of
from prefab.pipelines.scale.worker import end_engines, kept_engines


def run_task(
    task: str, source: str | Path | dict[str, Any], sets: Iterable[str] = (), quiet: bool = True
) -> RunResult:
    """Work off shards as one task of an array.

    Args:
        task: This task and the number of tasks, such as 17/64; tasks may be counted from 0 or 1.
        source: As for `prefab.run`.
        sets: Overrides of fields.
        quiet: Print nothing.

    Returns:
        What this task did. `state` is `done` also where other tasks still work.

    Raises:
        ConfigError: A mistake in the pipeline or in `task`.
        StoreError: A driver works on the store, or it is damaged.
    """
    number, of = _parse(task)
    scaled = prepare(source, sets, of, quiet)
    result, ended = in_event_loop(_work(scaled, number, of, quiet))
    if result.state == "done" and all(
        is_done(scaled, scaled.shared.state(shard), result.run)
        for shard in range(scaled.shared.shards)
    ):
        return _finish(scaled, result, ended)
    return result


def _parse(task: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", task)
    if not found or not 0 <= int(found[1]) <= int(found[2]) or found[2] == "0":
        raise ConfigError(f"--shard {task}: write the task and the number of tasks, such as 17/64")
    return int(found[1]), int(found[2])


async def _work(
    scaled: Scaled, number: int, of: int, quiet: bool
) -> tuple[RunResult, dict[str, str]]:
    """Work off shards until none is left to claim. Returns: the sum, and the models."""
    loaded, shared = scaled.loaded, scaled.shared
    engines = kept_engines(loaded, of)
    texts = models(engines)
    record = shared.begin_run(
        loaded.config.name, loaded.resolved, {**loaded.texts, **texts}, deciding
    )
    shared.start_run(record["id"])
    run: int = record["id"]
    counts: list[dict[str, Any]] = []
    state = "done"
    try:
        for shard in sorted(range(shared.shards), key=lambda one: ((one - number) % of, one)):
            _refuse_beside_driver(scaled)
            with _claimed(scaled, shard) as mine:
                if not mine or is_done(scaled, shared.state(shard), run):
                    continue
                job = ShardJob(shard, run, digest=scaled.prompts.digests[shard])
                local = Path(scaled.setup.local)
                one = ShardRun(loaded, shared, local, job, budget=True)
                prompts = prompts_of(shared.files, scaled.prompts.folder, job.part, local)
                told = await one.run(engines, prompts, scaled.setup.publish_s)
                record_result(scaled, shard, run, told)
                counts.append(told["counts"])
            if not quiet:
                say(f"shard {shard}: {told['state']}, {told['counts']['asked']:,} calls")
            if told["state"] != "done":
                state = told["state"]
                break
    finally:
        await end_engines(engines)
    result = sum_counts(counts, record, shared.folder)
    if state != "done":
        last = counts[-1]
        result.state, result.reason, result.signal = state, last["reason"], last["signal"]
    return result, texts


@contextmanager
def _claimed(scaled: Scaled, shard: int) -> Iterator[bool]:
    """Whether this task may work on a shard, inside it."""
    lease = Lease(scaled.shared.files, f"claims/{shard:05d}")
    mine = not lease.take()
    try:
        yield mine
    finally:
        if mine:
            lease.give_back()


def _refuse_beside_driver(scaled: Scaled) -> None:
    """Raises: StoreError while a driver gives out shards."""
    if owner := Lease(scaled.shared.files, DRIVER).owner():
        raise StoreError(
            f"{scaled.shared.files.address}: {owner} drives a run here. Stop it, or wait"
        )


def _finish(scaled: Scaled, result: RunResult, texts: dict[str, str]) -> RunResult:
    """Learn the calibration, once all shards are done: nothing is asked. Where another task does
    so already, nothing.
    """
    try:
        with exclusive(scaled.shared):
            result.p_chosen = Driver(scaled, LocalLauncher(scaled.setup)).run(texts).p_chosen
    except StoreError:
        if not Lease(scaled.shared.files, DRIVER).owner():
            raise
    return result
