"""The training stages by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefab.factory.plugins import Registry
from prefab.trainers.data import Kind


@dataclass(frozen=True, slots=True)
class Stage:
    """One training stage: what it is configured by, reads, runs and writes.

    Attributes:
        config: The pydantic class of its configuration file.
        run: Trains by such a configuration. A training that was stopped goes on; one that has
            ended is not run again.
        reads: The kind of rows that its data sources must have.
        writes: Files below `out` that exist once it has ended.
        model: Where the trained model is, below `out`.
        with_rewards: Whether `run` also takes `sources` and `gold` (rewards on text) and `on_step`,
            and gives a `rl.state.State` instead of a dictionary.
    """

    config: type[Any]
    run: Callable[..., Any]
    reads: Kind
    writes: tuple[str, ...] = ("model.safetensors", "training.json", "README.md")
    model: str = "."
    with_rewards: bool = False


STAGES = Registry(
    "prefab.stages",
    {
        "sft": "prefab.trainers.offline.sft:STAGE",
        "reward": "prefab.trainers.offline.reward:STAGE",
        "process": "prefab.trainers.offline.process:STAGE",
        "dpo": "prefab.trainers.offline.dpo:STAGE",
        "kto": "prefab.trainers.offline.kto:STAGE",
        "ppo": "prefab.trainers.rl.ppo:STAGE",
        "grpo": "prefab.trainers.rl.grpo:STAGE",
    },
)
