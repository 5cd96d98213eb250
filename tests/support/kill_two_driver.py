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

from prefab.factory.engines.vllm_process import free_port
from prefab.trainers import distributed
from prefab.trainers.registry import STAGES
from tests.support.killer import at_random, until_done


def train_in_two(stage: str, file: Path) -> None:
    """One try: this process is the main one, and the other is its child, which ends when it
    does."""
    os.environ |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    other = os.fork()
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(other == 0))
    distributed.end_with_launcher()
    module = STAGES[stage]
    module.run(STAGES[stage].config.model_validate_json(file.read_text()), quiet=True)
    if other == 0:
        os._exit(0)
    if os.waitpid(other, 0)[1]:
        sys.exit("the other process failed")


if __name__ == "__main__":
    import datasets  # noqa: F401
    import trl  # noqa: F401

    stage, seed = sys.argv[1], int(sys.argv[2])
    for words in sys.argv[3:]:
        name, kills = words.rsplit(":", 1)
        until_done(partial(train_in_two, stage, Path(name)), at_random(int(kills), seed, 3.0))
