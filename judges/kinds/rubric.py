"""Does an answer meet a criterion, yes or no? One label read a criterion, and points over a list of
them.

A constitution's `criterion` names a fault, so its weight counts against the answer (a pitfall).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefab.factory.keys import rubric_id
from prefab.factory.spec.templates import Template
from prefab.factory.types import Completion, Principle, Prompt, Request, Sample, Verdict
from prefab.judges.base import (
    NO_PRINCIPLE,
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
LABELS = ("Yes", "No")
_INDEX = spellings(LABELS)


class RubricConfig(JudgeConfig):
    """A judge that answers Yes or No for one criterion at a time; `min_scored` is the share of
    weight it must read.
    """

    kind: Literal["rubric"] = "rubric"
    template: str = "rubric.jinja"
    min_scored: float = 0.5


@dataclass(frozen=True, slots=True)
class Criterion:
    """One line of a rubric. `points` are earned when the answer is yes; negative points make it a
    pitfall.
    """

    text: str
    points: float = 1.0


def criteria(principles: Iterable[Principle]) -> list[Criterion]:
    """A constitution as a rubric of pitfalls, each as heavy as its principle."""
    return [Criterion(p.criterion, -p.weight) for p in principles]


def labels(config: RubricConfig) -> tuple[str, ...]:
    """Every spelling that this judge reads."""
    return tuple(_INDEX)


def request(
    config: RubricConfig,
    template: Template,
    prompt: Prompt,
    sample: Sample,
    criterion: str,
    model: str,
    repeat: int = 0,
    specials: tuple[str, ...] = (),
    examples: Examples = (),
) -> Request:
    """The label read of one answer under one criterion, from a principle or from a rubric of the
    prompt's own.
    """
    messages = template.render(
        conversation=conversation(prompt.messages, specials),
        answer=candidate(prompt.messages, sample.text, specials),
        question=criterion,
        examples=examples,
    )
    return label_request(model, messages, _INDEX, config, repeat)


def parse(completion: Completion, config: RubricConfig) -> Score:
    """P(yes) = Yes / (Yes + No), or why there is none. Never raises."""
    return label_score(completion, _INDEX, (1.0, 0.0), config.min_label_mass)


def total(scores: Sequence[Score], criteria: Sequence[Criterion], min_scored: float = 0.5) -> Score:
    """The expected points, rescaled to [0, 1] between the worst and the best possible, over the
    criteria read.

    Unscored when less than `min_scored` of the weight was read, with the reason of its heaviest
    unread criterion.
    """
    weights = [abs(c.points) for c in criteria]
    read = [i for i, s in enumerate(scores) if s.value is not None and weights[i] > 0]
    weight = sum(weights[i] for i in read)
    if not read or weight < min_scored * sum(weights) * (1 - 1e-12):
        unread = [i for i, s in enumerate(scores) if s.value is None]
        worst = max(unread, key=lambda i: weights[i], default=None)
        return Score(None, reason="parse" if worst is None else scores[worst].reason)
    earned = sum(weights[i] * _fulfilled(scores[i], criteria[i]) for i in read)
    return Score(earned / weight, (), None, None, _weakest(scores[i] for i in read))


def verdict(a: Sequence[Score], b: Sequence[Score], criteria: Sequence[Criterion]) -> Verdict:
    """Two answers over the same rubric: P(a earns more) + half of P(as much), all reads taken as
    independent.

    Unscored when any criterion of either is: answers are compared on the same lines or not at all.
    """
    unread = next((s for s in (*a, *b) if s.value is None), None)
    if unread is not None or not criteria:
        return Verdict(None, None, unread.reason if unread else "parse")
    above, tie, below = _compare(_points(a, criteria), _points(b, criteria))
    winner = "tie" if tie > above + below or above == below else "a" if above > below else "b"
    mass = above + tie + below
    return Verdict((above + tie / 2) / mass, winner, None, mass, tie, _weakest((*a, *b)))


def _fulfilled(score: Score, criterion: Criterion) -> float:
    return score.value if criterion.points >= 0 else 1.0 - score.value


def _points(scores: Sequence[Score], criteria: Sequence[Criterion]) -> dict[float, float]:
    """The distribution of the points earned. Sums are rounded, so that equal weights stay equal
    sums (0.1 + 0.2).
    """
    distribution = {0.0: 1.0}
    for score, criterion in zip(scores, criteria, strict=True):
        after: dict[float, float] = {}
        for points, p in distribution.items():
            for gained, q in ((criterion.points, score.value), (0.0, 1.0 - score.value)):
                key = round(points + gained, 4)
                after[key] = after.get(key, 0.0) + p * q
        distribution = after
    return distribution


def _compare(a: dict[float, float], b: dict[float, float]) -> tuple[float, float, float]:
    above = sum(p * q for x, p in a.items() for y, q in b.items() if x > y)
    below = sum(p * q for x, p in a.items() for y, q in b.items() if x < y)
    tie = sum(p * b.get(x, 0.0) for x, p in a.items())
    return above, tie, below


def _weakest(scores: Iterable[Score]):
    found = {s.exactness for s in scores}
    return next(e for e in ("hard", "bounds", "exact") if e in found)


class RubricJudge(ScoreJudge[RubricConfig]):
    """Yes or No for each line: of the prompt's own rubric, or a principle's criterion (a fault)."""

    Config = RubricConfig
    PARSER_VERSION = PARSER_VERSION

    def labels(self) -> tuple[str, ...]:
        """The spellings of Yes and No."""
        return labels(self.config)

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
        examples = () if own else context.examples(self.config.template, principle)
        template = context.templates[self.name]
        at = (self.config, template, prompt, sample, criterion, context.model, repeat)
        return request(*at, context.specials, examples)

    def decode(self, use: Any, completion: Completion) -> Score:
        """P(yes)."""
        return parse(completion, self.config)

    def compare(self, a: Sequence[Score], b: Sequence[Score], lines: RubricLines) -> Verdict:
        """P(a earns more points) + half of P(as many)."""
        return verdict(a, b, [Criterion(text, points) for text, points in lines])

    def merit(self, score: Score) -> float | None:
        """P(no): under a principle a yes is a fault."""
        return None if score.value is None else 1.0 - score.value
