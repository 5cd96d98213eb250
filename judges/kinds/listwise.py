"""Order K answers from best to worst, as one line like `[2] > [1] > [3]`.

For real models and the scripted engine; the embedded models were not trained for it. Answers are
shown in permutations, because judges favour the first places; `parse` maps the ranking back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from itertools import product
from typing import Any, Literal

from pydantic import Field

from prefab.factory.types import (
    Completion,
    Principle,
    Prompt,
    Request,
    Sample,
    Sampling,
    Verdict,
)
from prefab.factory.uses import RankUse
from prefab.judges.base import (
    Ask,
    Decoded,
    Judge,
    JudgeConfig,
    Pair,
    Question,
    Ranking,
    RequestContext,
    RubricLines,
    candidate,
    conversation,
    generated,
    text_request,
    winner_of,
)

_LINE = re.compile(r"(?:Ranking:\s*)?(\[?[0-9]{1,3}\]?(?:\s*>\s*\[?[0-9]{1,3}\]?)*)\s*\.?")
_NUMBER = re.compile("[0-9]+")


class ListwiseConfig(JudgeConfig):
    """A judge that orders all the answers at once, in `permutations` different orders of showing
    them.
    """

    kind: Literal["listwise"] = "listwise"
    template: str = "listwise.jinja"
    permutations: int = Field(2, ge=1)
    max_tokens: int = Field(128, ge=1)


def permutations(k: int, n: int, prompt_id: str, seed: int = 0) -> list[tuple[int, ...]]:
    """`n` orders of showing K answers, each second one the reverse of the one before, so that slots
    balance.
    """
    shown: list[tuple[int, ...]] = []
    while len(shown) < n:
        i = len(shown)
        if i % 2:
            shown.append(shown[-1][::-1])
        else:
            shown.append(tuple(sorted(range(k), key=lambda j: _rank(seed, prompt_id, i, j))))
    return shown


def _rank(seed: int, prompt_id: str, i: int, j: int) -> bytes:
    return sha256(f"{seed}\0{prompt_id}\0{i}\0{j}".encode()).digest()


def parse(completion: Completion, permutation: Sequence[int]) -> Ranking:
    """The order of the samples. Every number exactly once in one line and nothing else, or it is
    unscored.
    """
    text, reason = generated(completion)
    if reason is not None:
        return Ranking(None, reason)
    line = _LINE.fullmatch(text)
    if line is None:
        return Ranking(None, "parse")
    shown = [int(number) for number in _NUMBER.findall(line.group(1))]
    if sorted(shown) != list(range(1, len(permutation) + 1)):
        return Ranking(None, "parse")
    return Ranking(tuple(permutation[i - 1] for i in shown))


def verdict(rankings: Sequence[Ranking], a: int, b: int) -> Verdict:
    """Samples a and b in several rankings of all: the share that puts a first. Unscored if any
    ranking is.
    """
    wins = 0
    for ranking in rankings:
        if ranking.order is None:
            return Verdict(None, None, ranking.reason, exactness="hard")
        wins += ranking.order.index(a) < ranking.order.index(b)
    if not rankings:
        return Verdict(None, None, "parse", exactness="hard")
    winner = winner_of(wins, len(rankings) - wins, 0)
    return Verdict(wins / len(rankings), winner, exactness="hard")


class ListwiseJudge(Judge[ListwiseConfig]):
    """All answers that are compared under a principle, ordered at once."""

    Config = ListwiseConfig
    shows = "all"

    def in_every_order(self) -> ListwiseJudge:
        """With two permutations each answer of a pair is shown first once."""
        return ListwiseJudge(self.config.model_copy(update={"permutations": 2}))

    def requests(
        self,
        role: str,
        questions: Sequence[Question],
        context: RequestContext,
        earlier: Sequence[Decoded],
    ) -> list[Ask]:
        """All answers under each principle, in each permutation, each repeat."""
        asks: list[Ask] = []
        for principle, samples in _by_principle(questions):
            prompt = questions[0][0].prompt
            shown = permutations(len(samples), self.config.permutations, prompt.id, context.seed)
            for (number, order), repeat in product(enumerate(shown), self.asked_repeats(context)):
                ordered = [samples[i] for i in order]
                indices = tuple(sample.index for sample in ordered)
                under = (context.run, prompt.id, principle.id, self.name)
                use = RankUse(*under, number, indices, repeat)
                asks.append((self.request(prompt, ordered, principle, repeat, context), use))
        return asks

    def request(
        self,
        prompt: Prompt,
        samples: Sequence[Sample],
        principle: Principle,
        repeat: int,
        context: RequestContext,
    ) -> Request:
        """Ask for the order of `samples`, shown in the order given and numbered from 1."""
        config, specials = self.config, context.specials
        messages = context.render(
            self.name,
            principle.compare,
            conversation=conversation(prompt.messages, specials),
            answers=[candidate(prompt.messages, sample.text, specials) for sample in samples],
            examples=context.examples(config.template, principle),
        )
        sampling = Sampling(config.max_tokens)
        return text_request(context.model, messages, sampling, config, repeat)

    def n_calls(self, questions: Sequence[Question], context: RequestContext) -> int:
        """One call a principle, permutation and repeat."""
        repeats = len(self.asked_repeats(context))
        return len(_by_principle(questions)) * self.config.permutations * repeats

    def decode(self, use: Any, completion: Completion) -> Ranking:
        """The order of the samples, by their indices."""
        return parse(completion, use.shown)

    def verdict(
        self, answers: Sequence[Decoded], pair: Pair, lines: RubricLines
    ) -> tuple[Verdict, tuple[str, ...]] | None:
        """The share of all permutations' rankings that puts a first."""
        by_number = {d.use.permutation: d for d in answers}
        found = [by_number.get(number) for number in range(self.config.permutations)]
        there = [d for d in found if d is not None and set(pair) <= set(d.use.shown)]
        rankings = [d.value for d in there if isinstance(d.value, Ranking)]
        if len(rankings) < len(found):
            return None
        return verdict(rankings, *pair), tuple(d.call for d in there)

    def verdicts_by_order(
        self, answers: Sequence[Decoded], pair: Pair, lines: RubricLines
    ) -> tuple[Verdict, Verdict]:
        """The rankings where a was shown before b, and the others."""
        sides: tuple[list[Ranking], list[Ranking]] = ([], [])
        for d in answers:
            if isinstance(d.value, Ranking):
                shown = d.use.shown
                sides[shown.index(pair[0]) > shown.index(pair[1])].append(d.value)
        missing = [Ranking(None, "transport")]
        return verdict(sides[0] or missing, *pair), verdict(sides[1] or missing, *pair)


def _by_principle(questions: Sequence[Question]) -> list[tuple[Principle, list[Sample]]]:
    """The samples that are compared under each principle, by their index."""
    found: dict[str, tuple[Principle, dict[int, Sample]]] = {}
    for comparison, principles in questions:
        for principle in principles:
            _, samples = found.setdefault(principle.id, (principle, {}))
            samples.update({sample.index: sample for sample in (comparison.a, comparison.b)})
    return [(p, [samples[i] for i in sorted(samples)]) for p, samples in found.values()]
