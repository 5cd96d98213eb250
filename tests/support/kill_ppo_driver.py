"""Run a small PPO in child processes that are killed with SIGKILL at random moments, until one gets
to the end.

`python kill_ppo_driver.py FOLDER KILLS SEED`: one process imports torch, and forks, so that a try
costs milliseconds."""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from prefab.trainers.rl import ppo, rewards
from tests.support.answer_world import World
from tests.support.killer import at_random, until_done

WORLD = World(length=3)


def noisy(prompts, completions):
    """A reward with a chance of its own: what is drawn from a global generator must come back after
    a kill too."""
    return [r + 0.01 * random.random() for r in WORLD.reward(prompts, completions)]


def config(folder: Path, out: str | Path, **changes) -> ppo.PpoConfig:
    """Few-token PPO with everything on that has a state: adaptive KL, normalised rewards, gold,
    weights that decay."""
    settings = {
        "model": str(folder / "policy"),
        "reference": str(folder / "reference"),
        "out": str(folder / out),
        "steps": 12,
        "batch_size": 16,
        "minibatches": 2,
        "epochs": 2,
        "micro_batch": 5,
        "sample_batch": 7,
        "max_new_tokens": 3,
        "learning_rate": 5e-3,
        "value_learning_rate": 5e-3,
        "beta": 0.1,
        "kl": "adaptive",
        "kl_target": 0.5,
        "kl_horizon": 100.0,
        "kl_stop": None,
        "reference_samples": 32,
        "save_every": 3,
        "eval_every": 4,
        "threads": 1,
        "weight_decay": 0.01,
    }
    return ppo.PpoConfig(**(settings | changes))


def train(settings: ppo.PpoConfig) -> None:
    """One try; goes on from the last checkpoint."""
    prompts = list(WORLD.prompts) * 5
    ppo.run(
        settings, prompts, rewards.single(noisy), rewards.Source("gold", (WORLD.reward,)), prompts
    )


if __name__ == "__main__":
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    until_done(
        lambda: train(config(folder, "killed", store=str(folder / "store"))),
        at_random(kills, seed, 1.5),
    )
