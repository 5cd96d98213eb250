"""How good is one answer under a principle, on a scale of one-token labels? The expected score over
their masses.

Also the reward of direct RLAIF (`reward`). Scales stop at 9: "10" is two tokens in many tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from prefab.factory.types import Completion, Principle, Prompt, Request, Sample, Verdict
from prefab.judges.base import (
    LabelJudgeConfig,
    RequestContext,
    RubricLines,
    Score,
    ScoreJudge,
    label_request,
    label_score,
    scale_verdict,
    spellings,
)


class PointwiseConfig(LabelJudgeConfig):
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


class PointwiseJudge(ScoreJudge[PointwiseConfig]):
    """One answer on a scale, under a principle."""

    Config = PointwiseConfig
    rewards = True

    def __init__(self, config: PointwiseConfig) -> None:
        super().__init__(config)
        self._values = [float(v) for v in range(config.low, config.high + 1)]
        self._index = spellings([f"{v:.0f}" for v in self._values])

    def labels(self) -> tuple[str, ...]:
        """The spellings of the scale's numbers."""
        return tuple(self._index)

    def request(
        self,
        prompt: Prompt,
        sample: Sample,
        principle: Principle,
        line: int,
        repeat: int,
        context: RequestContext,
    ) -> Request:
        """The label read of one answer under one principle. The principle's `criterion` names a
        fault.
        """
        messages = self.render(prompt, sample, principle.criterion, principle, context)
        tokens = self.config.answer_tokens
        return label_request(context.model, messages, self._index, self.config, repeat, tokens)

    def decode(self, use: Any, completion: Completion) -> Score:
        """The expected score on the judge's own scale, or why there is none."""
        least, forms = self.config.min_label_mass, self.config.answer_tokens > 1
        return label_score(completion, self._index, self._values, least, forms)

    def compare(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """P(a above b) + half of P(equal)."""
        return scale_verdict(a[0], b[0])

    def reward(self, score: Score) -> float | None:
        """The expected score rescaled to [-1, 1]; None when unscored. Source: Lee et al. 2023,
        direct RLAIF.
        """
        config = self.config
        if score.value is None:
            return None
        return 2.0 * (score.value - config.low) / (config.high - config.low) - 1.0
