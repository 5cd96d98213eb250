"""Train one stage in two processes that are killed with SIGKILL at random moments, until they get
to the end.

`python kill_two_driver.py STAGE SEED FILE:KILLS ...`: one process imports all and forks, so that a
try costs little; what the launcher would say is in the environment."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from prefab.trainers.registry import STAGES
from tests.support.killer import at_random, fork_in_two, until_done


def train_in_two(stage: str, file: Path) -> None:
    """One try in two processes."""
    second = fork_in_two()
    module = STAGES[stage]
    module.run(STAGES[stage].config.model_validate_json(file.read_text()), quiet=True)
    if second == 0:
        os._exit(0)
    if os.waitpid(second, 0)[1]:
        sys.exit("the other process failed")


if __name__ == "__main__":
    import datasets  # noqa: F401
    import trl  # noqa: F401

    stage, seed = sys.argv[1], int(sys.argv[2])
    for words in sys.argv[3:]:
        name, kills = words.rsplit(":", 1)
        until_done(partial(train_in_two, stage, Path(name)), at_random(int(kills), seed, 3.0))
