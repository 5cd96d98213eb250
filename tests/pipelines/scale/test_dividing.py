"""How long a run takes where a worker is slow, joins late or leaves: the driver with workers that
only pass the time, on a clock of their own. Shards of the same size, each worth a time of one at
the usual speed.
"""

from __future__ import annotations

import heapq
import itertools
import queue
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefab.pipelines.scale import driver as driving
from prefab.pipelines.scale.dividing import DRAIN_S
from prefab.pipelines.scale.driver import Driver
from prefab.pipelines.scale.launchers import WorkerEvent
from prefab.pipelines.scale.sharding import Part

PROMPTS = 1000  # of a shard
TICK_S = 5.0
OVERHEAD_S = 3.0  # of a part: restoring, publishing
SLOW = 10.0


class Cluster:
    """Workers on a clock of their own. `speeds` has by worker how many seconds of a usual worker it
    does in one; `hangs` those that never stop; `leaves` by worker when it ends. `machine`: all
    workers are on one, so that each finds the ledgers of the others; else each has its own.
    """

    def __init__(self, shard_s, speeds, room=None, hangs=(), leaves=None, machine=""):
        self.shard_s, self.speeds, self.hangs, self.leaves = shard_s, speeds, hangs, leaves or {}
        self.machine = machine
        self.unpublished = {}  # by part, prompts that a worker that left had done
        self.room = room or (lambda now: 0)
        self.now, self.started, self.killed = 0.0, 0, []
        self.events = self
        self.order = itertools.count()
        self.coming = []
        self.work = {}  # by worker: part, began, seconds at the usual speed, done at the beginning
        self.done = {}  # by part, prompts

    def clock(self):
        return self.now

    def capacity(self):
        return self.room(self.now)

    def waiting(self):
        return ""

    def start(self):
        self.started += 1
        place = self.machine or f"machine {self.started}"
        self._later(1.0, self.started, "ready", {"place": place})
        if self.started in self.leaves:
            self._later(self.leaves[self.started], self.started, "gone", {"why": "it left"})
        return self.started

    def close(self):
        pass

    def kill(self, worker):
        self.killed.append(worker)
        self.work.pop(worker, None)
        self._later(0.1, worker, "gone", {"why": "killed"})

    def send(self, worker, message):
        if "do" in message:
            job = message["do"]
            part = Part(job["shard"], job["first"], job["end"])
            if self.machine:
                self._add(part, self.unpublished.pop(part, 0.0))
            self.work[worker] = SimpleNamespace(part=part, began=self.now + OVERHEAD_S)
            self._later(OVERHEAD_S, worker, "progress", {"work": self.work[worker]})
        elif worker in self.work and worker not in self.hangs:
            done = self._prompts_of(worker)
            work = self.work.pop(worker)
            self._add(work.part, done)
            seconds = max(0.0, work.began - self.now) + OVERHEAD_S
            self._later(seconds, worker, "done", self._told(work.part, "stopped", done))

    def _add(self, part, done):
        self.done[part] = self.done.get(part, 0.0) + done

    def _size(self, part):
        """Prompts that are left of a part: what others have done of the shard is spread over it."""
        size = PROMPTS * (part.end - part.first) / 65536
        share = sum(
            done * (min(p.end, part.end) - max(p.first, part.first)) / (p.end - p.first)
            for p, done in self.done.items()
            if p.shard == part.shard and max(p.first, part.first) < min(p.end, part.end)
        )
        return max(0.0, size - share)

    def _prompts_of(self, worker):
        """What a worker has done of its part."""
        work = self.work[worker]
        passed = max(0.0, self.now - work.began)
        per_s = PROMPTS / self.shard_s * self.speeds.get(worker, 1.0)
        return min(self._size(work.part), passed * per_s)

    def _told(self, part, state, done):
        counts = {"asked": round(done), "reused": 0, "prompts": round(done), "failed": 0}
        counts |= {"prompt_tokens": 0, "completion_tokens": 0, "unscored": {}}
        whole = state == "done" and part.is_whole
        return {"state": state, "rows": whole, "counts": counts, "part": part}

    def _later(self, seconds, worker, event, data):
        at = self.now + seconds
        heapq.heappush(self.coming, (at, next(self.order), worker, event, data))

    def get(self, timeout):
        """The next event, as of a queue; the time passes until then."""
        if not self.coming or self.coming[0][0] > self.now + timeout:
            if timeout:
                self.now = self.coming[0][0] if self.coming else self.now + timeout
            raise queue.Empty
        at, _, worker, event, data = heapq.heappop(self.coming)
        self.now = max(self.now, at)
        if event == "gone" and worker in self.work:
            done = self._prompts_of(worker)
            part = self.work.pop(worker).part
            self.unpublished[part] = self.unpublished.get(part, 0.0) + done
        if event != "progress":
            return WorkerEvent(worker, event, data)
        work = data["work"]
        if self.work.get(worker) is not work:  # it has stopped, or ended
            return WorkerEvent(0, "progress", {})
        done = self._prompts_of(worker)
        if done >= self._size(work.part):
            del self.work[worker]
            self._add(work.part, done)
            return WorkerEvent(worker, "done", self._told(work.part, "done", done))
        self._later(TICK_S, worker, "progress", data)
        return WorkerEvent(
            worker, "progress", {"counts": {"prompts": round(done), "asked": round(done)}}
        )


def end_of_run(monkeypatch, cluster, shards, workers):
    """The time at which all shards are done, and the driver."""
    monkeypatch.setattr(driving, "record_result", lambda scaled, shard, run, data: shard)
    places = {}
    shared = SimpleNamespace(
        place=lambda name: places.get(name, ""), write_place=places.__setitem__, shards=shards
    )
    scale = SimpleNamespace(workers=0 if cluster.capacity() else workers)
    none = SimpleNamespace(unscored=None, failed=None, calls=None, tokens=None)
    config = SimpleNamespace(scale_settings=lambda: scale, budget=none, name="simulated")
    scaled = SimpleNamespace(
        loaded=SimpleNamespace(config=config),
        shared=shared,
        prompts=SimpleNamespace(counts=[PROMPTS] * shards, digests=[""] * shards),
        workers=workers,
        retries=3,
    )
    driver = Driver(scaled, cluster, clock=cluster.clock)
    driver.states = dict.fromkeys(range(shards))
    driver._work(range(shards))
    assert driver.counts.keys() == set(range(shards))
    # what a worker that left had told counts too; a budget is held to it
    asked = driver.totals()["asked"]
    assert asked == sum(one["asked"] for one in driver.counts.values())
    late = len(cluster.leaves) * TICK_S * PROMPTS / cluster.shard_s  # asked, and not told
    assert asked >= 0.99 * shards * PROMPTS - late
    return cluster.now, driver


@pytest.mark.parametrize(("workers", "shards"), [(2, 2), (4, 4), (4, 9), (4, 32), (16, 33)])
def test_a_straggler_ten_times_slower(monkeypatch, workers, shards):
    shard_s = 600.0
    cluster = Cluster(shard_s, {1: 1 / SLOW})
    seconds, driver = end_of_run(monkeypatch, cluster, shards, workers)
    ideal = shard_s * shards / (workers - 1 + 1 / SLOW)
    assert seconds / ideal <= 1.3
    assert driver.slow <= {1} and not cluster.killed


def test_a_straggler_that_does_not_stop_is_killed(monkeypatch):
    cluster = Cluster(600.0, {1: 1 / SLOW}, hangs=(1,))
    seconds, driver = end_of_run(monkeypatch, cluster, 8, 4)
    assert cluster.killed == [1] and not driver.failures
    # what it had not published is done again, after the time it was given to stop
    assert seconds <= 1.3 * 600.0 * 8 / 3.1 + DRAIN_S


def test_a_worker_that_joins_late_takes_its_part(monkeypatch):
    cluster = Cluster(600.0, {}, room=lambda now: 1 if now < 1000.0 else 4)
    seconds, _ = end_of_run(monkeypatch, cluster, 8, 1)
    assert cluster.started == 4
    assert seconds <= 1.3 * (1000.0 + (8 * 600.0 - 1000.0) / 4)


def test_the_shards_of_a_worker_that_leaves_are_done_by_the_others(monkeypatch):
    cluster = Cluster(600.0, {}, leaves={2: 900.0}, room=lambda now: 4 if now < 900.0 else 3)
    seconds, driver = end_of_run(monkeypatch, cluster, 16, 4)
    assert sum(map(len, driver.failures.values())) == 1
    lost = 300.0  # here, what a worker that dies has done of a shard counts as not published
    assert seconds <= 1.3 * (900.0 + (16 * 600.0 + lost - 4 * 900.0) / 3)


@pytest.mark.parametrize("machine", ["one", ""])
def test_what_a_worker_that_leaves_has_not_done_is_divided_among_those_that_are_free(
    monkeypatch, machine
):
    """The last shards are in work: with what is left given whole to one worker, 1.31."""
    leaves, shard_s = 53.0, 88.0
    cluster = Cluster(shard_s, {}, leaves={4: leaves}, machine=machine)
    cluster.room = lambda now: 4 if now < leaves - 10 else 3
    seconds, driver = end_of_run(monkeypatch, cluster, 4, 4)
    lost_s = 0.0 if machine else (leaves - 1.0 - OVERHEAD_S)
    assert seconds <= 1.25 * (leaves + (4 * shard_s + lost_s - 4 * leaves) / 3)
    (shard,) = driver.failures
    assert len(driver.divided[shard].parts) > 1 and not cluster.killed
    # nothing that was done on this machine is done again
    assert sum(cluster.done.values()) == pytest.approx(4 * PROMPTS, rel=0.01)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.data())
def test_workers_that_leave_at_any_time_cost_little(data):
    """All is done, and with all ledgers on one machine nothing twice, whenever workers leave."""
    workers, shards = data.draw(st.integers(3, 8)), data.draw(st.integers(1, 20))
    shard_s = data.draw(st.sampled_from([60.0, 300.0, 1800.0]))
    machine = data.draw(st.sampled_from(["one", ""]))
    whole_s = shard_s * max(1.0, shards / workers)
    there = {
        worker: data.draw(st.floats(5.0, 1.2 * whole_s))
        for worker in data.draw(st.sets(st.integers(1, workers), max_size=2))
    }
    cluster = Cluster(shard_s, {}, leaves=there, machine=machine)
    with pytest.MonkeyPatch.context() as patch:
        seconds, _ = end_of_run(patch, cluster, shards, workers)
    by_shard = dict.fromkeys(range(shards), 0.0)
    for part, done in cluster.done.items():
        by_shard[part.shard] += done
    assert all(done >= 0.99 * PROMPTS for done in by_shard.values()) and not cluster.killed
    if machine:
        assert sum(by_shard.values()) == pytest.approx(shards * PROMPTS, rel=0.01)
    # a shard that is lost is done again, by one worker, at worst; some seconds until it begins
    rounds = -(-shards // workers)
    assert seconds <= shard_s * (rounds + len(there)) + 60.0 * (1 + len(there))
