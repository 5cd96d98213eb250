"""Ctrl-C and SIGTERM in the middle of a training, in real processes: the same command goes on from
the last checkpoint and gives the model of an undisturbed training."""

from __future__ import annotations

import json
import signal

import pytest

from tests.pipelines.cli.test_signals import DRIVER, finish, stopped
from tests.support import trained


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The configuration file of a training of 12 steps with a checkpoint every 4, into `out`."""
    folder = tmp_path_factory.mktemp("signals")
    store, model = trained.make_store(folder), trained.make_model(folder / "model")

    def write(out):
        file = folder / f"{out}.yaml"
        settings = {"model": str(model), "out": str(folder / out), "data": trained.data(store)}
        settings |= {"batch_size": 12, "max_steps": 12, "eval_every": 4}
        file.write_text(json.dumps(settings))
        return file, folder / out

    return write


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_training_that_is_told_to_stop(config, number, forks):
    undisturbed, whole = config(f"whole-{number}")
    finish(forks, "train", "sft", undisturbed, "-q")
    file, out = config(f"stopped-{number}")
    told = stopped(forks.start([DRIVER, "training", "train", "sft", file, "-q"]), number)
    assert "the last checkpoint is kept" in told
    assert (out / "checkpoint-4").is_dir() and not (out / "model.safetensors").exists()
    done = json.loads(finish(forks, "train", "sft", file, "--json").stdout)
    assert done["steps"] == 12
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
