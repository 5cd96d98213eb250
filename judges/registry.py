"""What one question of each kind of judge shows: a pair of answers, one answer, or all of them.

A kind that is not named here is a program (`verifier`, `reward_model`): it reads one answer, needs
no principle, and its module makes the engine that runs it. People (`human`) are shown pairs apart
from runs, in no order that counts.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from prefab.factory.plugins import Registry

Shows = Literal["pair", "one", "all", "apart"]
SHOWS: dict[str, Shows] = {
    "pairwise": "pair",
    "pointwise": "one",
    "rubric": "one",
    "listwise": "all",
    "human": "apart",
}
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


def module(kind: str) -> Any:
    """The module of this kind."""
    return sys.modules[JUDGES[kind].__module__]


def shows(config: Any) -> Shows:
    """What one question of this judge shows. Only those that show a pair are asked in two
    orders.
    """
    return SHOWS.get(config.kind, "one")


def is_program(config: Any) -> bool:
    """Whether a program decides, without a principle."""
    return config.kind not in SHOWS


def has_own_engine(config: Any) -> bool:
    """Whether its module makes the engine that answers it: a program, and people."""
    return is_program(config) or config.kind == "human"


def engine_of(config: Any) -> str:
    """The name of the engine that answers this judge; a program's, and people's, is their own."""
    return f"judge {config.name}" if has_own_engine(config) else config.engine


def repeats(config: Any) -> int:
    """How often this judge is asked the same; a program says the same each time."""
    return 1 if has_own_engine(config) else config.repeats


def templates(config: Any) -> dict[str, tuple[str, str]]:
    """By the role under which a run keeps it: the template's file and its kind."""
    if has_own_engine(config):
        return {}
    if config.kind == "pairwise" and config.reasoning:
        return {
            config.name: (config.scored_template, "pairwise_scored"),
            config.name + " reasoning": (config.reasoning_template, "pairwise_cot"),
        }
    return {config.name: (config.template, config.kind)}


def files(kind: str) -> tuple[str, ...]:
    """The fields of this kind of judge that name files of the user's."""
    return getattr(module(kind), "FILES", ())


def labels(config: Any) -> tuple[str, ...]:
    """Every spelling that this judge reads; none for those that write text, and for programs."""
    found = None if is_program(config) else getattr(module(config.kind), "labels", None)
    return found(config) if found else ()


def reader(config: Any) -> Any:
    """What of a judge's configuration decides how its answers are read, as plain data: part of each
    verdict's id.
    """
    if config.kind == "pairwise":
        return [config.ties, config.reasoning, config.min_label_mass, config.clamp]
    asked = {
        "name",
        "engine",
        "weight",
        "repeats",
        "template",
        "template_kwargs",
    }  # decide what is asked
    return config.model_dump(mode="json", exclude=asked)


def version(config: Any) -> int:
    """The version of the parser that reads this judge's answers."""
    return getattr(module(config.kind), "PARSER_VERSION", 1)
