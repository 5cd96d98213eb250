"""Train one stage from a JSON configuration, in a process that a test may kill: `python
train_driver.py STAGE FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prefab.trainers.registry import STAGES

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    stage = STAGES[sys.argv[1]]
    print(
        json.dumps(
            stage.run(
                stage.config.model_validate_json(Path(sys.argv[2]).read_text()),
                quiet=True,
            )["steps"]
        )
    )
