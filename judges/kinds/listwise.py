"""Order K answers from best to worst, as one line like `[2] > [1] > [3]`.

For real models and the scripted engine; the embedded models were not trained for it. Answers are
shown in a permutation, since first places attract; `parse` undoes it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from pydantic import Field

from prefab.factory.spec.templates import Template
from prefab.factory.types import (
    Completion,
    Exactness,
    Principle,
    Prompt,
    Request,
    Sample,
    Sampling,
    UnscoredReason,
    Verdict,
)
from prefab.judges.base import Examples, JudgeConfig, candidate, conversation, generated, kwargs_of

PARSER_VERSION = 1
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


@dataclass(frozen=True, slots=True)
class Ranking:
    """The samples' positions (0..K-1, as given to `request`) from best to worst, or why there is no
    order.
    """

    order: tuple[int, ...] | None
    reason: UnscoredReason | None = None
    exactness: Exactness = "hard"


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


def request(
    config: ListwiseConfig,
    template: Template,
    prompt: Prompt,
    samples: Sequence[Sample],
    permutation: Sequence[int],
    principle: Principle,
    model: str,
    repeat: int = 0,
    specials: tuple[str, ...] = (),
    examples: Examples = (),
) -> Request:
    """Ask for the order of `samples`, shown in the order of `permutation` and numbered from 1."""
    shown = [candidate(prompt.messages, samples[i].text, specials) for i in permutation]
    messages = template.render(
        conversation=conversation(prompt.messages, specials),
        answers=shown,
        question=principle.compare,
        examples=examples,
    )
    repeats = (repeat,) if repeat else ()
    return Request(model, messages, Sampling(config.max_tokens), (), kwargs_of(config), repeats)


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
    unread = next((r for r in rankings if r.order is None), None)
    if unread is not None or not rankings:
        return Verdict(None, None, unread.reason if unread else "parse", exactness="hard")
    wins = sum(r.order.index(a) < r.order.index(b) for r in rankings)
    p = wins / len(rankings)
    return Verdict(
        p, "tie" if 2 * wins == len(rankings) else "a" if p > 0.5 else "b", exactness="hard"
    )


class ListwiseJudge:
    """The kind `listwise`: its configuration class is `Config`."""

    Config = ListwiseConfig
