"""Does an answer meet a criterion, yes or no? One label read a criterion, and points over a list of
them.

A constitution's `criterion` names a fault, so its weight counts against the answer (a pitfall).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, Literal

from pydantic import Field

from prefab.factory.decision import weakest
from prefab.factory.keys import rubric_id
from prefab.factory.types import Completion, Principle, Prompt, Request, Sample, Verdict
from prefab.judges.base import (
    NO_PRINCIPLE,
    LabelJudgeConfig,
    RequestContext,
    RubricLines,
    Score,
    ScoreJudge,
    label_request,
    label_score,
    spellings,
    winner_of,
)

LABELS = ("Yes", "No")
_INDEX = spellings(LABELS)


class RubricConfig(LabelJudgeConfig):
    """A judge that answers Yes or No for one criterion at a time."""

    kind: Literal["rubric"] = "rubric"
    template: str = "rubric.jinja"
    min_scored: float = Field(
        0.5,
        gt=0.0,
        le=1.0,
        description="The share of a rubric's weight that must be read for both answers.",
    )


class RubricJudge(ScoreJudge[RubricConfig]):
    """Yes or No for each line: of the prompt's own rubric, or a principle's criterion (a fault)."""

    Config = RubricConfig

    def labels(self) -> tuple[str, ...]:
        """The spellings of Yes and No."""
        return tuple(_INDEX)

    def own_rubric(self, prompt: Prompt) -> str:
        """The name of the prompt's rubric, where it has one."""
        return rubric_id(prompt.rubric) if prompt.rubric else ""

    def lines(self, principle: str, own: RubricLines | None) -> RubricLines:
        """The prompt's own rubric, or the principle's fault as a pitfall."""
        return own or super().lines(principle, own)

    def request(
        self,
        prompt: Prompt,
        sample: Sample,
        principle: Principle,
        line: int,
        repeat: int,
        context: RequestContext,
    ) -> Request:
        """The label read of one answer on one line. The constitution's examples are about its
        principles, so they are left out for a prompt's own lines.
        """
        own = principle is NO_PRINCIPLE
        criterion = prompt.rubric[line][0] if own else principle.criterion
        messages = self.render(prompt, sample, criterion, None if own else principle, context)
        tokens = self.config.answer_tokens
        return label_request(context.model, messages, _INDEX, self.config, repeat, tokens)

    def decode(self, use: Any, completion: Completion) -> Score:
        """P(yes) = Yes / (Yes + No), or why there is none."""
        least, forms = self.config.min_label_mass, self.config.answer_tokens > 1
        return label_score(completion, _INDEX, (1.0, 0.0), least, forms)

    def verdict_of(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """Two answers on the lines that were read for both; unscored when those have less than
        `min_scored` of the weight.
        """
        weights = [abs(points) for _, points in lines]
        read = [x.value is not None and y.value is not None for x, y in zip(a, b, strict=True)]
        known = sum(compress(weights, read))
        if known == 0 or known < self.config.min_scored * sum(weights) * (1 - 1e-12):
            return super().verdict_of(a, b, lines)
        kept = list(compress(lines, read))
        return self.compare(list(compress(a, read)), list(compress(b, read)), kept)

    def compare(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """P(a earns more points) + half of P(as many), all reads taken as independent."""
        points_a, points_b = _points(a, lines), _points(b, lines)
        above = sum(p * q for x, p in points_a.items() for y, q in points_b.items() if x > y)
        below = sum(p * q for x, p in points_a.items() for y, q in points_b.items() if x < y)
        tie = sum(p * points_b.get(x, 0.0) for x, p in points_a.items())
        mass, winner = above + tie + below, winner_of(above, below, tie)
        exactness = weakest(s.exactness for s in (*a, *b))
        return Verdict((above + tie / 2) / mass, winner, None, mass, tie, exactness)

    def merit(self, score: Score) -> float | None:
        """P(no): under a principle a yes is a fault."""
        return None if score.value is None else 1.0 - score.value


def _points(scores: Sequence[Score], lines: RubricLines) -> dict[float, float]:
    """The distribution of the points earned. A line's points are earned when its answer is yes.
    Sums are rounded, so that equal weights stay equal sums (0.1 + 0.2).
    """
    distribution = {0.0: 1.0}
    for score, (_, points) in zip(scores, lines, strict=True):
        yes = score.known
        after: dict[float, float] = {}
        for earned, p in distribution.items():
            for gained, q in ((points, yes), (0.0, 1.0 - yes)):
                key = round(earned + gained, 4)
                after[key] = after.get(key, 0.0) + p * q
        distribution = after
    return distribution
