"""Two policies' answers put to a judge that took no part in the training data: a pipeline file
names it.

Every principle of the pipeline's constitution that applies is asked about, in both orders; calls
are kept in a ledger of their own, so an evaluation that was stopped goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefab.factory import decision
from prefab.factory.console import Progress
from prefab.factory.engines.base import resolve_model
from prefab.factory.errors import ConfigError
from prefab.factory.keys import model_identity
from prefab.factory.types import Comparison, Engine, Prompt, Sample
from prefab.judges import panel
from prefab.judges.base import Judge
from prefab.pipelines.config.loader import ResolvedPipeline, find_judge, resolve_pipeline
from prefab.pipelines.run.asking import (
    RepeatedQuestion,
    asking_session,
    engine_for,
    judged,
    kinds_with_engine,
)


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """A judge's verdict on a pair of answers: `p_a`, None where unscored; `tie` where it lies
    within the margin.
    """

    p_a: float | None
    tie: bool

    @property
    def gap(self) -> float | None:
        """P(the first is better) less a half; 0 for a tie, None where unscored."""
        if self.p_a is None:
            return None
        return 0.0 if self.tie else self.p_a - 0.5


def judge_pairs(
    pipeline: str,
    pairs: Sequence[tuple[Prompt, str, str]],
    folder: Path,
    trained_on: Sequence[str] = (),
    quiet: bool = False,
    engines: dict[str, Engine] | None = None,
) -> tuple[str, list[PairVerdict]]:
    """(the judge's name, what it says of each pair). Equal texts are a tie and are not asked.

    Raises: ConfigError where the judge's model also made the labels that a policy was trained on
    (`trained_on`).
    """
    loaded = resolve_pipeline(Path(pipeline), ())
    judge = find_judge(loaded, "", kinds_with_engine("pair", "one", "all"))
    engine = engine_for(loaded, judge, engines)
    if engine.identity in trained_on:
        raise ConfigError(
            f"judge: {judge.name} of {pipeline} labelled data that a policy was trained on: it would judge its "
            "own pupil. Name another model"
        )
    return judge.name, asyncio.run(_ask(loaded, judge, pairs, folder, engine, quiet))


def own_answers_note(pipeline: str, policies: Mapping[str, str]) -> list[str]:
    """A sentence where the judge of a pipeline file is one of the policies that it compares;
    nothing where it is none of them.

    Args:
        pipeline: The file, whose first judge compares.
        policies: By name: a folder, an embedded model or a hub name.
    """
    loaded = resolve_pipeline(Path(pipeline), ())
    judge = find_judge(loaded, "", kinds_with_engine("pair", "one", "all"))
    engine = loaded.config.engines[judge.engine]
    model = engine.get("model")
    if not model or engine.get("adapter"):
        return []
    asked = model_identity(resolve_model(model))
    own = [name for name, path in policies.items() if model_identity(resolve_model(path)) == asked]
    return [
        f"{judge.name} of {pipeline} is the model of {name}: it judges its own answers, so a "
        "preference for them is in its win rates and is not measured. Name another model to avoid it"
        for name in own
    ]


async def _ask(
    loaded: ResolvedPipeline,
    judge: Judge[Any],
    pairs: Sequence[tuple[Prompt, str, str]],
    folder: Path,
    engine: Engine,
    quiet: bool,
) -> list[PairVerdict]:
    questions = [
        (i, RepeatedQuestion(_comparison(prompt, i, a, b), principle))
        for i, (prompt, a, b) in enumerate(pairs)
        if a != b
        for principle in panel.applicable(loaded.constitution.principles, prompt.tags)
    ]
    prompts = [prompt for prompt, _, _ in pairs]
    described = {"recipe": "eval"}
    async with asking_session(
        loaded,
        judge,
        engine,
        folder,
        f"judge-{judge.name}",
        described,
        prompts,
        quiet=quiet,
    ) as session:
        with Progress("judging", len(questions), quiet, "questions") as progress:
            verdicts = await judged([q for _, q in questions], session, progress)
    readings: dict[int, list[decision.Reading]] = {}
    for (i, question), pair in zip(questions, verdicts, strict=True):
        readings.setdefault(i, []).append(
            decision.combine_orders(
                pair, question.principle.weight, question.principle.id, judge.name
            )
        )
    return [_pair_verdict(readings.get(i)) for i in range(len(pairs))]


def _comparison(prompt: Prompt, i: int, a: str, b: str) -> Comparison:
    """Sample numbers of their own, so that uses of two pairs of one prompt do not meet."""
    return Comparison(prompt, Sample(prompt.id, 2 * i, a), Sample(prompt.id, 2 * i + 1, b))


def _pair_verdict(readings: list[decision.Reading] | None) -> PairVerdict:
    if readings is None:
        return PairVerdict(0.5, True)  # equal texts
    found = decision.decide(readings)
    return (
        PairVerdict(found.p_a, found.outcome == "tie")
        if found.outcome != "unscored"
        else PairVerdict(None, False)
    )
