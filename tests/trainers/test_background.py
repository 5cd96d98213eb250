"""What is written in a thread is a copy, errors reach who asked, and trackers get every number."""

from __future__ import annotations

import threading

import pytest
import torch

from prefab.factory.errors import ConfigError
from prefab.trainers import trackers
from prefab.trainers.background import BackgroundWriter, snapshot


def test_a_snapshot_is_not_changed_by_later_steps_and_keeps_what_is_tied():
    weight = torch.ones(2, 3)
    state = {"a": weight, "tied": weight.view(2, 3), "n": [1, {"t": torch.zeros(2)}], "none": None}
    found = snapshot(state)
    weight.add_(1)
    assert found["a"].eq(1).all() and found["a"] is found["tied"]
    assert found["n"][0] == 1 and found["n"][1]["t"].tolist() == [0, 0] and found["none"] is None
    empty = snapshot({"x": torch.empty(0), "y": torch.empty(0)})
    assert empty["x"] is not empty["y"]


def test_work_is_done_one_after_the_other_and_its_error_is_raised_once():
    writer, order, gate = BackgroundWriter(), [], threading.Event()
    writer.submit(lambda: (gate.wait(), order.append(1)))
    writer.check()
    assert not order
    gate.set()
    writer.submit(lambda: order.append(2))  # waits for the first
    writer.wait()
    assert order == [1, 2]

    def fails():
        raise OSError("no room")

    writer.submit(fails)
    writer.join()
    with pytest.raises(OSError, match="no room"):
        writer.check()
    writer.wait()


def test_only_finite_numbers_reach_a_tracker_and_a_missing_package_is_named(tmp_path, monkeypatch):
    sent = []

    class Sink:
        def log(self, step, metrics):
            sent.append((step, metrics))

        def close(self):
            sent.append("closed")

    with trackers.Trackers([Sink()]) as some:
        some.log(3, {"loss": 0.5, "name": "x", "none": None, "bad": float("nan"), "n": 2})
    assert sent == [(3, {"loss": 0.5, "n": 2.0}), "closed"]
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report: trackio is not installed: pip install trackio"):
        trackers.open_trackers(["trackio"], tmp_path, {})
    trackers.open_trackers([], tmp_path, {}).log(1, {"loss": 1.0})  # nothing is asked for
    assert not list(tmp_path.iterdir())


def test_tensorboards_files_hold_what_was_logged(tmp_path):
    """Read by the file's own format: a length, its checksum, an event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    with trackers.open_trackers(["tensorboard"], tmp_path, {}) as some:
        some.log(1, {"loss": 0.75, "eval_accuracy": 1})
        some.log(2, {"loss": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + size :]
    assert found == [(1, "loss", 0.75), (1, "eval_accuracy", 1.0), (2, "loss", 0.5)]
