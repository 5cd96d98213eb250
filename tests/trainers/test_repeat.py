"""Several runs in one process, of different precision: none depends on what was trained before."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from prefab.trainers.registry import STAGES
from prefab.trainers.rl import grpo, ppo, rewards
from tests.support import answer_world, kill_ppo_driver, trained

WORLD = answer_world.World(length=2)


def train_ppo(models, out, precision):
    config = kill_ppo_driver.config(
        models, out, steps=1, batch_size=8, store=None, precision=precision
    )
    ppo.run(config, list(WORLD.prompts), rewards.single(WORLD.reward))
    return (out / "policy/model.safetensors").read_bytes()


def train_grpo(models, out, precision):
    config = grpo.GrpoConfig(
        model=str(models / "policy"),
        out=str(out),
        steps=1,
        batch_size=8,
        micro_batch=8,
        group=4,
        max_new_tokens=2,
        learning_rate=5e-3,
        kl_stop=None,
        reference_samples=32,
        precision=precision,
    )
    grpo.run(config, list(WORLD.prompts), rewards.single(WORLD.reward))
    return (out / "policy/model.safetensors").read_bytes()


def train_sft(models, out, precision):
    if not (models / "store").exists():
        trained.make_store(models)
        trained.make_model(models / "sft-model")
    config = STAGES["sft"].config.model_validate(
        {
            "model": str(models / "sft-model"),
            "out": str(out),
            "data": trained.data(models / "store"),
            "max_steps": 3,
            "precision": precision,
        }
    )
    STAGES["sft"].run(config, quiet=True)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.slow_but("train_ppo")
@pytest.mark.parametrize(
    "train", [train_ppo, pytest.param(train_grpo, marks=pytest.mark.slow), train_sft]
)
def test_runs_of_another_precision_follow_one_another(models, tmp_path, train):
    """fp32, bf16, fp32 again: both orders, and the last run gives the bits of the first."""
    first, mixed, again = (
        train(models, tmp_path / str(k), precision)
        for k, precision in enumerate(("fp32", "bf16", "fp32"))
    )
    assert first == again != mixed
