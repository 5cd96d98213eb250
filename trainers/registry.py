"""The training stages by name: each a module with its configuration class and `run`."""

from __future__ import annotations

from prefab.factory.plugins import Registry

STAGES = Registry(
    "prefab.stages",
    {
        "sft": "prefab.trainers.offline.sft",
        "reward": "prefab.trainers.offline.reward",
        "dpo": "prefab.trainers.offline.dpo",
        "kto": "prefab.trainers.offline.kto",
        "ppo": "prefab.trainers.rl.ppo",
        "grpo": "prefab.trainers.rl.grpo",
    },
)
CONFIGS = Registry(
    "prefab.stage_configs",
    {
        "sft": "prefab.trainers.offline.sft:SftConfig",
        "reward": "prefab.trainers.offline.reward:RewardTrainingConfig",
        "dpo": "prefab.trainers.offline.dpo:DpoConfig",
        "kto": "prefab.trainers.offline.kto:KtoConfig",
        "ppo": "prefab.trainers.rl.ppo:PpoConfig",
        "grpo": "prefab.trainers.rl.grpo:GrpoConfig",
    },
)
