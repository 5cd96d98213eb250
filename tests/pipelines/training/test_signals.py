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
def test_a_training_that_is_told_to_stop(config, number, training_forks):
    undisturbed, whole = config(f"whole-{number}")
    finish(training_forks, "train", "sft", undisturbed, "-q")
    file, out = config(f"stopped-{number}")
    told = stopped(training_forks.start([DRIVER, "training", "train", "sft", file, "-q"]), number)
    assert "the last checkpoint is kept" in told
    assert (out / "checkpoint-4").is_dir() and not (out / "model.safetensors").exists()
    done = json.loads(finish(training_forks, "train", "sft", file, "--json").stdout)
    assert done["steps"] == 12
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


REWARD = """
def reward(prompts, completions):
    return [float(len(text) % 7) for text in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "number"), [("ppo", signal.SIGTERM), ("ppo", signal.SIGINT), ("grpo", signal.SIGTERM)]
)
def test_a_policy_gradient_that_is_told_to_stop(config, tmp_path, stage, number, training_forks):
    """As above, for the trainings that sample."""
    (tmp_path / "reward.py").write_text(REWARD)
    rewards = [{"name": "length", "kind": "file", "paths": [str(tmp_path / "reward.py")]}]
    settings = json.loads(config("sft")[0].read_text())
    settings = {name: settings[name] for name in ("model", "data")}
    settings |= {
        "steps": 8,
        "save_every": 2,
        "eval_every": 8,
        "threads": 1,
        "max_new_tokens": 4,
        "gold": None,
    }
    settings |= {
        "rewards": rewards,
        "kl_stop": None,
        "batch_size": 8,
        "micro_batch": 8,
        "unfinished_score": None,
    }
    for out in ("whole", "stopped"):
        file = tmp_path / f"{out}.yaml"
        file.write_text(json.dumps(settings | {"out": str(tmp_path / out)}))
    finish(training_forks, "train", stage, tmp_path / "whole.yaml")
    out, words = tmp_path / "stopped", ("train", stage, tmp_path / "stopped.yaml")
    told = stopped(training_forks.start([DRIVER, "policy gradient", *words]), number)
    assert "the last checkpoint is kept" in told
    assert list(out.glob("checkpoint-*")) and not (out / "policy").exists()
    done = json.loads(finish(training_forks, *words, "--json").stdout)
    assert done["steps"] == 8
    weights = "policy/model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
