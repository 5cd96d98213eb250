"""Which of two answers is better under a principle? A label read, directly or after a reasoning
pass.

P(first answer) = (A + T/2) / (A + B + T), the labels' masses over all their spellings; unscored
when they have less than `min_label_mass` together. A verdict always speaks of sample a, whatever
the order it was asked in.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from prefab.factory.spec.control_tokens import neutralise
from prefab.factory.spec.templates import fence
from prefab.factory.types import (
    Comparison,
    Completion,
    Order,
    Principle,
    Request,
    Sampling,
    Verdict,
)
from prefab.judges.base import (
    LabelJudgeConfig,
    PairJudge,
    Reasoning,
    RequestContext,
    answer_words,
    conversation,
    generated,
    label_masses,
    label_request,
    spellings,
    text_request,
    winner_of,
)

LABELS = ("A", "B", "T")


class PairwiseConfig(LabelJudgeConfig):
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


class PairwiseJudge(PairJudge[PairwiseConfig]):
    """Two answers, one label read; with `reasoning` a pass of free text before it."""

    Config = PairwiseConfig

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

    def __init__(self, config: PairwiseConfig) -> None:
        super().__init__(config)
        self._index = spellings(LABELS if config.ties else LABELS[:2])

    def labels(self) -> tuple[str, ...]:
        """The spellings of A, B and T (no T without ties)."""
        return tuple(self._index)

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
        reasoning: str | None = None,
    ) -> Request:
        """The label read of one comparison in one order, or the reasoning pass before it."""
        config, specials = self.config, context.specials
        name = self.name + " reasoning" if role == "reason" else self.name
        shown = conversation(comparison.prompt.messages, specials)
        talk = comparison.prompt.messages
        first = answer_words(talk, comparison.a.text)
        second = answer_words(talk, comparison.b.text)
        if order == "ba":
            first, second = second, first
        variables = {
            "conversation": shown,
            "answer_a": fence(shown, first, specials),
            "answer_b": fence(shown, second, specials),
            "examples": context.examples(self.templates()[name][0], principle),
        }
        if reasoning is not None:
            variables["reasoning"] = neutralise(reasoning, specials)
        messages = context.render(name, principle.compare, **variables)
        if role != "reason":
            tokens = config.answer_tokens
            return label_request(context.model, messages, self._index, config, repeat, tokens)
        seed = context.seed if config.temperature > 0 else None
        sampling = Sampling(config.reasoning_tokens, config.temperature, seed=seed)
        place = (comparison.a.index, comparison.b.index)
        return text_request(context.model, messages, sampling, config, repeat, place)

    def decode(self, use: Any, completion: Completion) -> Verdict | Reasoning:
        """A verdict, or the text of a finished reasoning."""
        if use.role != "reason":
            return self.parse(completion, use.order)
        text, reason = generated(completion)
        if reason is None:
            return Reasoning(text)
        return Verdict(None, None, reason, exactness=completion.exactness)

    def parse(self, completion: Completion, order: Order) -> Verdict:
        """The verdict of one label read, un-swapped. Never raises; never a winner without a read of
        both labels.
        """
        config = self.config
        forms = config.answer_tokens > 1
        masses = label_masses(completion, self._index, 3 if config.ties else 2, forms)
        if isinstance(masses, str):
            return Verdict(None, None, masses, exactness=completion.exactness)
        a, b, tie = masses if config.ties else (*masses, 0.0)
        if order == "ba":
            a, b = b, a
        total = a + b + tie
        if total < config.min_label_mass:
            return Verdict(None, None, "low_label_mass", total, tie, completion.exactness)
        p = (a + tie / 2) / total
        if config.clamp is not None:
            p = min(max(p, config.clamp[0]), config.clamp[1])
        mass = None if completion.label_logps is None else total
        return Verdict(p, winner_of(a, b, tie), None, mass, tie, completion.exactness)
