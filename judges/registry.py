"""The kinds of judges and critics by name: an explicit dictionary of each, and other packages'
entry points.
"""

from __future__ import annotations

from typing import Any

from prefab.factory.plugins import Registry
from prefab.judges.base import Judge, JudgeConfig

JUDGES = Registry(
    "prefab.judges",
    {
        "pairwise": "prefab.judges.kinds.pairwise:PairwiseJudge",
        "pointwise": "prefab.judges.kinds.pointwise:PointwiseJudge",
        "rubric": "prefab.judges.kinds.rubric:RubricJudge",
        "listwise": "prefab.judges.kinds.listwise:ListwiseJudge",
        "human": "prefab.judges.kinds.human:HumanJudge",
        "verifier": "prefab.judges.kinds.verifier:VerifierJudge",
        "reward_model": "prefab.judges.kinds.reward_model:RewardModelJudge",
    },
)
CRITICS = Registry("prefab.critics", {"critique": "prefab.judges.kinds.critique:Critic"})


def judge_of(config: JudgeConfig) -> Judge[Any]:
    """The judge that a configuration describes."""
    kind = config.model_dump(include={"kind"})["kind"]
    made: Judge[Any] = JUDGES[kind](config)
    return made
