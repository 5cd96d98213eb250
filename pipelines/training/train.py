"""`prefab train STAGE`: train a model from a configuration file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.spec.yamlio import did_you_mean
from prefab.pipelines.training import stages
from prefab.trainers.registry import STAGES


def train(
    stage: str, config: str | Path, sets: Iterable[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Train a model. The same call resumes a training that was stopped, and does not repeat one
    that has ended.

    Args:
        stage: `sft`, `reward`, `process`, `dpo`, `kto`, `ppo`, `grpo`, or `online` for rounds of
            sampling, judging and training.
        config: A configuration file, or the name of a preset in `trainers/presets/`.
        sets: Overrides of fields, for example `["epochs=1", "out=trained/sft"]`.
        quiet: Do not show progress.

    Returns:
        A dictionary with the trained model's folder and its figures. Of `ppo` and `grpo`: `policy`,
        `steps`, `stopped` (why it ended early, or None), `first` and `last` (metrics of a step),
        `evaluations`, `best`, `alarm`, `charts`. Of `online`: `policy`, `rounds`, `stopped`. Of
        the others: `model`, `steps`, `train` and `val` (rows), `seconds`, `metrics`.

    Raises:
        ConfigError: There is no such stage, or a mistake in the configuration or the data.
        StoreError: A store is missing or damaged, or another program holds it (HeldError).
        TrainError: The training cannot continue, for example because a loss is not a number.
    """
    if stage not in (*STAGES, "online"):
        raise ConfigError(
            f"there is no stage {stage!r}; {did_you_mean(stage, [*STAGES, 'online'])}"
        )
    if stage == "online":
        from prefab.pipelines.training import online

        return online.train(Path(config), sets, quiet)
    return stages.train(stage, Path(config), sets, quiet)
