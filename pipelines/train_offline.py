"""`prefab train sft|reward|dpo|kto`: a configuration file to a model, over stores that are brought up to date first."""
from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.train_rl import catch_up, load
from trainers import processes

STAGES = ("sft", "reward", "dpo", "kto")


def train(stage: str, path: Path, sets: Iterable[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Run a stage to its end and give its result.

    Raises: ConfigError for mistakes in file or data, StoreError, HeldError where a store cannot be caught up, TrainError.
    """
    processes.end_with_launcher()
    module = importlib.import_module(f"trainers.{stage}")
    config = load(path, module.Config, sets)
    processes.main_alone(lambda: catch_up(source.store for source in config.data.sources))
    return module.run(config, quiet)
