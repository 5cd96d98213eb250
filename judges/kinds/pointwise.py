"""How good is one answer under a principle, on a scale of one-token labels? The expected score over
their masses.

Also the reward of direct RLAIF (`reward`). Scales stop at 9: "10" is two tokens in many tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field, model_validator

from prefab.factory.spec.templates import Template
from prefab.factory.types import Completion, Principle, Prompt, Request, Sample, Verdict
from prefab.judges.base import (
    Examples,
    JudgeConfig,
    RequestContext,
    RubricLines,
    Score,
    ScoreJudge,
    candidate,
    conversation,
    label_request,
    label_score,
    spellings,
)

PARSER_VERSION = 1


class PointwiseConfig(JudgeConfig):
    """A judge that scores one answer on the scale `low`..`high`, both included."""

    kind: Literal["pointwise"] = "pointwise"
    template: str = "pointwise.jinja"
    low: int = Field(1, ge=0, le=9)
    high: int = Field(9, ge=0, le=9)

    @model_validator(mode="after")
    def _some_scale(self) -> PointwiseConfig:
        if self.low >= self.high:
            raise ValueError(f"the scale {self.low}..{self.high} has fewer than two labels")
        return self


def labels(config: PointwiseConfig) -> tuple[str, ...]:
    """Every spelling that this judge reads."""
    return tuple(_scale(config.low, config.high)[0])


@lru_cache
def _scale(low: int, high: int) -> tuple[dict[str, int], tuple[float, ...]]:
    values = range(low, high + 1)
    return spellings([str(v) for v in values]), tuple(map(float, values))


def request(
    config: PointwiseConfig,
    template: Template,
    prompt: Prompt,
    sample: Sample,
    principle: Principle,
    model: str,
    repeat: int = 0,
    specials: tuple[str, ...] = (),
    examples: Examples = (),
) -> Request:
    """The label read of one answer under one principle. The principle's `criterion` names a
    fault.
    """
    messages = template.render(
        conversation=conversation(prompt.messages, specials),
        answer=candidate(prompt.messages, sample.text, specials),
        question=principle.criterion,
        examples=examples,
    )
    return label_request(model, messages, _scale(config.low, config.high)[0], config, repeat)


def parse(completion: Completion, config: PointwiseConfig) -> Score:
    """The expected score on the judge's own scale, or why there is none. Never raises."""
    index, values = _scale(config.low, config.high)
    return label_score(completion, index, values, config.min_label_mass)


def reward(score: Score, config: PointwiseConfig) -> float | None:
    """The expected score rescaled to [-1, 1]; None when unscored. Source: Lee et al. 2023, direct
    RLAIF.
    """
    if score.value is None:
        return None
    return 2.0 * (score.value - config.low) / (config.high - config.low) - 1.0


def verdict(a: Score, b: Score) -> Verdict:
    """Two answers' scores as a verdict: P(a above b) + half of P(equal), the two reads taken as
    independent.
    """
    if a.value is None or b.value is None:
        return Verdict(None, None, a.reason or b.reason or "parse", exactness=_weaker(a, b))
    wins = tie = losses = 0.0
    for i, p in enumerate(a.probabilities):
        tie += p * b.probabilities[i]
        wins += p * sum(b.probabilities[:i])
        losses += b.probabilities[i] * sum(a.probabilities[:i])
    total = wins + tie + losses
    winner = "tie" if tie > wins + losses or wins == losses else "a" if wins > losses else "b"
    return Verdict((wins + tie / 2) / total, winner, None, total, tie, _weaker(a, b))


def _weaker(a: Score, b: Score):
    return next(e for e in ("hard", "bounds", "exact") if e in (a.exactness, b.exactness))


class PointwiseJudge(ScoreJudge[PointwiseConfig]):
    """One answer on a scale, under a principle."""

    Config = PointwiseConfig
    PARSER_VERSION = PARSER_VERSION
    rewards = True

    def labels(self) -> tuple[str, ...]:
        """The spellings of the scale's numbers."""
        return labels(self.config)

    def request(
        self,
        prompt: Prompt,
        sample: Sample,
        principle: Principle,
        line: int,
        repeat: int,
        context: RequestContext,
    ) -> Request:
        """The label read of one answer."""
        examples = context.examples(self.config.template, principle)
        template = context.templates[self.name]
        at = (self.config, template, prompt, sample, principle, context.model, repeat)
        return request(*at, context.specials, examples)

    def decode(self, use: Any, completion: Completion) -> Score:
        """The expected score."""
        return parse(completion, self.config)

    def compare(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """P(a above b) + half of P(equal)."""
        return verdict(a[0], b[0])

    def reward(self, score: Score) -> float | None:
        """The expected score rescaled from its scale to -1..1."""
        return reward(score, self.config)
