"""`prefab train sft|reward|dpo|kto`: a configuration file to a model, over stores that are brought
up to date first.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefab.pipelines.training.stages import catch_up, load_config
from prefab.trainers import distributed
from prefab.trainers.registry import CONFIGS, STAGES

OFFLINE = ("sft", "reward", "dpo", "kto")


def train(stage: str, path: Path, sets: Iterable[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Run a stage to its end and give its result.

    Raises: ConfigError for mistakes in file or data, StoreError, HeldError where a store cannot be
    caught up, TrainError.
    """
    distributed.end_with_launcher()
    module = STAGES[stage]
    config = load_config(path, CONFIGS[stage], sets)
    distributed.main_alone(lambda: catch_up(source.store for source in config.data.sources))
    result: dict[str, Any] = module.run(config, quiet)
    return result
