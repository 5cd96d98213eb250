"""Train one stage from JSON configurations, each of which may be killed on the way.

`python train_driver.py STAGE FILE[:STEP,STEP] ...`: a training is killed as soon as the checkpoint
of a step begins to be written. One process imports all and forks, so that a try costs little."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from prefab.trainers.registry import STAGES
from tests.support.killer import until_done


def train(stage: str, file: Path) -> None:
    """One try; goes on from the last checkpoint."""
    module = STAGES[stage]
    module.run(module.config.model_validate_json(file.read_text()), quiet=True)


def has_begun(checkpoint: Path, pid: int) -> bool:
    """Whether a checkpoint is being written."""
    return checkpoint.exists()


if __name__ == "__main__":
    import datasets  # noqa: F401
    import trl  # noqa: F401
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    for words in sys.argv[2:]:
        name, _, steps = words.partition(":")
        file = Path(name)
        written = [file.with_suffix("") / f"checkpoint-{s}" for s in steps.split(",") if s]
        until_done(
            partial(train, sys.argv[1], file), [partial(has_begun, folder) for folder in written]
        )
