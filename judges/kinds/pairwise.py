"""Which of two answers is better under a principle? A label read, directly or after a reasoning
pass.

P(first answer) = (A + T/2) / (A + B + T), the labels' masses over all their spellings; unscored
when they have less than `min_label_mass` together. A verdict always speaks of sample a, whatever
the order it was asked in.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from prefab.factory.spec.templates import Template, fence, neutralise
from prefab.factory.types import (
    Comparison,
    Completion,
    Order,
    Principle,
    Request,
    Sampling,
    UnscoredReason,
    Verdict,
)
from prefab.judges.base import (
    Examples,
    JudgeConfig,
    PairJudge,
    Reasoning,
    RequestContext,
    conversation,
    generated,
    kwargs_of,
    label_masses,
    label_request,
)
from prefab.judges.base import spellings as _spellings

PARSER_VERSION = 1
LABELS = ("A", "B", "T")
_WITH_TIES = _spellings(LABELS)
_WITHOUT_TIES = _spellings(LABELS[:2])


class PairwiseConfig(JudgeConfig):
    """A pairwise judge. With `reasoning` it thinks aloud first (`reasoning_template`) and is read
    afterwards.

    `clamp` keeps a probability read after reasoning off the extremes, as in the CAI paper (40-60
    helped most there).
    """

    kind: Literal["pairwise"] = "pairwise"
    template: str = "pairwise.jinja"
    ties: bool = True
    reasoning: bool = False
    reasoning_template: str = "pairwise_cot.jinja"
    scored_template: str = "pairwise_scored.jinja"
    reasoning_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.0, ge=0.0, allow_inf_nan=False)
    clamp: tuple[float, float] | None = None

    @field_validator("clamp")
    @classmethod
    def _around_half(cls, clamp: tuple[float, float] | None) -> tuple[float, float] | None:
        if clamp is not None and not 0.0 <= clamp[0] <= 0.5 <= clamp[1] <= 1.0:
            raise ValueError(
                f"clamp must be [low, high] with 0 <= low <= 0.5 <= high <= 1, not {list(clamp)}"
            )
        return clamp


def labels(config: PairwiseConfig) -> tuple[str, ...]:
    """Every spelling that this judge reads."""
    return tuple(_WITH_TIES if config.ties else _WITHOUT_TIES)


def request(
    config: PairwiseConfig,
    template: Template,
    comparison: Comparison,
    principle: Principle,
    model: str,
    order: Order,
    repeat: int = 0,
    specials: tuple[str, ...] = (),
    examples: Examples = (),
    reasoning: str | None = None,
) -> Request:
    """The label read of one comparison in one order; with `reasoning`, the scoring pass (its own
    template).
    """
    variables = _variables(comparison, principle, order, specials, examples)
    if reasoning is not None:
        variables["reasoning"] = neutralise(reasoning, specials)
    index = _WITH_TIES if config.ties else _WITHOUT_TIES
    return label_request(model, template.render(**variables), index, config, repeat)


def reasoning_request(
    config: PairwiseConfig,
    template: Template,
    comparison: Comparison,
    principle: Principle,
    model: str,
    order: Order,
    repeat: int = 0,
    specials: tuple[str, ...] = (),
    examples: Examples = (),
    seed: int | None = None,
) -> Request:
    """The first pass of a judge that reasons: free text. `seed` is the run's, used at temperature
    above 0.
    """
    messages = template.render(**_variables(comparison, principle, order, specials, examples))
    if config.temperature > 0:
        sampling = Sampling(config.reasoning_tokens, config.temperature, seed=seed)
        repeats: tuple[int, ...] = (comparison.a.index, comparison.b.index, repeat)
    else:
        sampling = Sampling(config.reasoning_tokens)
        repeats = (repeat,) if repeat else ()
    return Request(model, messages, sampling, (), kwargs_of(config), repeats)


def parse_reasoning(completion: Completion) -> tuple[str, UnscoredReason | None]:
    """The reasoning to score with, and why there is none. Cut-off reasoning has not concluded:
    `truncated`.
    """
    return generated(completion)


def parse(completion: Completion, order: Order, config: PairwiseConfig) -> Verdict:
    """The verdict of one label read, un-swapped. Never raises; never a winner without a read of
    both labels.
    """
    index = _WITH_TIES if config.ties else _WITHOUT_TIES
    masses = label_masses(completion, index, 3 if config.ties else 2)
    if isinstance(masses, str):
        return unscored(masses, completion)
    a, b, tie = masses if config.ties else (masses[0], masses[1], 0.0)
    if order == "ba":
        a, b = b, a
    total = a + b + tie
    if total < config.min_label_mass:
        return Verdict(None, None, "low_label_mass", total, tie, completion.exactness)
    p = (a + tie / 2) / total
    if config.clamp is not None:
        p = min(max(p, config.clamp[0]), config.clamp[1])
    winner = "tie" if tie > a + b or a == b else "a" if a > b else "b"
    return Verdict(
        p,
        winner,
        None,
        None if completion.label_logps is None else total,
        tie,
        completion.exactness,
    )


def unscored(reason: UnscoredReason, completion: Completion | None = None) -> Verdict:
    """A verdict that is none, and why."""
    return Verdict(None, None, reason, exactness=completion.exactness if completion else "exact")


def _variables(
    comparison: Comparison,
    principle: Principle,
    order: Order,
    specials: tuple[str, ...],
    examples: Examples,
) -> dict[str, Any]:
    shown = conversation(comparison.prompt.messages, specials)
    first, second = (comparison.a, comparison.b) if order == "ab" else (comparison.b, comparison.a)
    return {
        "conversation": shown,
        "answer_a": fence(shown, first.text, specials),
        "answer_b": fence(shown, second.text, specials),
        "question": principle.compare,
        "examples": examples,
    }


class PairwiseJudge(PairJudge[PairwiseConfig]):
    """Two answers, one label read; with `reasoning` a pass of free text before it."""

    Config = PairwiseConfig
    PARSER_VERSION = PARSER_VERSION

    @property
    def passes(self) -> tuple[str, ...]:
        """`reason` comes first where the judge reasons."""
        return ("reason", "judge") if self.config.reasoning else ("judge",)

    def templates(self) -> dict[str, tuple[str, str]]:
        """A judge that reasons has a template a pass."""
        if not self.config.reasoning:
            return super().templates()
        return {
            self.name: (self.config.scored_template, "pairwise_scored"),
            self.name + " reasoning": (self.config.reasoning_template, "pairwise_cot"),
        }

    def labels(self) -> tuple[str, ...]:
        """The spellings of A, B and T (no T without ties)."""
        return labels(self.config)

    def reading(self) -> Any:
        """Ties, reasoning, the least label mass and the clamp."""
        c = self.config
        return [c.ties, c.reasoning, c.min_label_mass, c.clamp]

    def request(
        self,
        role: str,
        comparison: Comparison,
        principle: Principle,
        order: Order,
        repeat: int,
        context: RequestContext,
        reasoning: str | None,
    ) -> Request:
        """The request of one pass."""
        config, reasons = self.config, role == "reason"
        file, _ = self.templates()[self.name + " reasoning" if reasons else self.name]
        examples = context.examples(file, principle)
        template = context.templates[self.name + " reasoning" if reasons else self.name]
        at = (config, template, comparison, principle, context.model, order, repeat)
        if reasons:
            return reasoning_request(*at, context.specials, examples, context.seed)
        return request(*at, context.specials, examples, reasoning)

    def decode(self, use: Any, completion: Completion) -> Verdict | Reasoning:
        """A verdict, or the text of a finished reasoning."""
        if use.role != "reason":
            return parse(completion, use.order, self.config)
        text, reason = parse_reasoning(completion)
        return Reasoning(text) if reason is None else unscored(reason, completion)
