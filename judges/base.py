"""What every kind of judge shares: ready-made texts for the templates, label reads, and the typed
reasons of failure.

Nothing here decides who won; it only turns a `Completion` into label masses or into one of the
unscored reasons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from prefab.factory.spec.templates import conversation_text, fence, neutralise
from prefab.factory.types import Completion, Exactness, Message, Request, Sampling, UnscoredReason

LABEL_READ = Sampling(max_tokens=1)
Examples = Sequence[
    Mapping[str, Any]
]  # few-shot, from the constitution, as the template's loop reads them

# The masses of one distribution sum to at most 1; servers round (bf16 logits), so a little more is
# let through.
_MASS_SLACK = 1.01


class JudgeConfig(BaseModel):
    """The fields that every judge has in a pipeline file; each kind adds its own.

    `template_kwargs` go to the chat template: a model that thinks unless told not to (Qwen3) would
    put a label read on `<think>`, so thinking is off unless asked for; templates that know no such
    switch ignore it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    engine: str | None = None
    weight: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    repeats: int = Field(1, ge=1)
    min_label_mass: float = Field(0.5, gt=0.0, le=1.0)
    template_kwargs: dict[str, Any] = {"enable_thinking": False}


@dataclass(frozen=True, slots=True)
class Score:
    """What one answer got: either `value` with the labels' `probabilities`, or `reason`; never
    both, never neither.

    `probabilities` are normalised over the labels, in their order; `mass` is what the labels had
    together (None when the engine gave a bare label).
    """

    value: float | None
    probabilities: tuple[float, ...] = ()
    mass: float | None = None
    reason: UnscoredReason | None = None
    exactness: Exactness = "exact"


def spellings(labels: Sequence[str]) -> dict[str, int]:
    """Every spelling that is read, plain and after a space, with the index of its label."""
    return {prefix + label: i for prefix in ("", " ") for i, label in enumerate(labels)}


def label_masses(
    completion: Completion, index: Mapping[str, int], n: int
) -> list[float] | UnscoredReason:
    """The probability of each of `n` labels, summed over its spellings, or why there is none.

    A label that an exact read does not mention was not read at all, so nothing follows from its
    absence. In a top-k read (`bounds`) it lies below the k-th token and counts 0. Without
    log-probabilities the bare answer must be a label, whole and in its own case: `hard`.
    """
    if completion.finish == "context" or completion.finish == "refused":
        return completion.finish
    logps = completion.label_logps
    if logps is None:
        return _hard_masses(completion, index, n)
    masses = [0.0] * n
    unread = (1 << n) - 1
    try:
        for spelling, logp in logps.items():
            i = index.get(spelling)
            if i is None:
                continue
            if not logp <= 0.01:  # NaN fails every comparison, so it ends here too
                return "no_logprobs"
            masses[i] += exp(logp)
            unread &= ~(1 << i)
    except (TypeError, AttributeError):  # null or text where a number should be
        return "no_logprobs"
    if (unread and completion.exactness == "exact") or sum(masses) > _MASS_SLACK:
        return "no_logprobs"
    return masses


def _hard_masses(
    completion: Completion, index: Mapping[str, int], n: int
) -> list[float] | UnscoredReason:
    if completion.exactness != "hard":
        return "no_logprobs"
    i = index.get(completion.text.strip()) if isinstance(completion.text, str) else None
    if i is None:
        return "parse"
    return [float(j == i) for j in range(n)]


def label_score(
    completion: Completion, index: Mapping[str, int], values: Sequence[float], min_mass: float
) -> Score:
    """The expected value over labels worth `values`, or an unscored `Score`."""
    masses = label_masses(completion, index, len(values))
    if isinstance(masses, str):
        return Score(None, reason=masses, exactness=completion.exactness)
    total = sum(masses)
    hard = completion.label_logps is None
    if total < min_mass:
        return Score(None, mass=total, reason="low_label_mass", exactness=completion.exactness)
    probabilities = tuple(mass / total for mass in masses)
    value = sum(p * v for p, v in zip(probabilities, values, strict=True))
    return Score(value, probabilities, None if hard else total, None, completion.exactness)


def label_request(
    model: str,
    messages: tuple[Message, ...],
    index: Mapping[str, int],
    config: JudgeConfig,
    repeat: int = 0,
) -> Request:
    """A greedy read of the first token's label probabilities."""
    return Request(
        model, messages, LABEL_READ, tuple(index), kwargs_of(config), (repeat,) if repeat else ()
    )


def kwargs_of(config: JudgeConfig) -> tuple[tuple[str, Any], ...]:
    """The chat template's arguments in the request's own, ordered form."""
    kwargs = config.template_kwargs
    return tuple(sorted(kwargs.items())) if kwargs else ()


@lru_cache(maxsize=2048)
def _talk(messages: tuple[Message, ...], specials: tuple[str, ...]) -> str:
    return neutralise(conversation_text(messages), specials)


def conversation(messages: tuple[Message, ...], specials: tuple[str, ...] = ()) -> str:
    """The prompt as a template shows it, fenced: all pairs, principles and orders of a prompt share
    it.
    """
    talk = _talk(messages, specials)
    return fence(talk, talk, specials)


def candidate(messages: tuple[Message, ...], text: str, specials: tuple[str, ...] = ()) -> str:
    """A candidate's text, neutralised and fenced (`fence` remembers: every pair with the same
    answer shares it).
    """
    return fence(_talk(messages, specials), text, specials)


def generated(completion: Completion) -> tuple[str, UnscoredReason | None]:
    """A free-text answer without a thinking block, and why it cannot be used (`parse` when nothing
    is left).
    """
    if completion.finish == "context" or completion.finish == "refused":
        return "", completion.finish
    text = completion.text if isinstance(completion.text, str) else ""
    if text.lstrip().startswith("<think>"):
        _, closed, rest = text.partition("</think>")
        text = rest if closed else ""
    text = text.strip()
    if completion.finish == "length":
        return text, "truncated"
    return text, None if text else "parse"


_CODE_FENCE = re.compile(r"\A(`{3,})[^\n`]*\n(.*)\n?\1\Z", re.DOTALL)
_TAG_OPEN = re.compile(r"\A<([\w-]{1,40})(?: [^<>\n]{0,80})?>")


def unwrap(text: str) -> str:
    """The text without code fences or one pair of tags around the whole of it, as models echo them;
    else unchanged.
    """
    for _ in range(4):
        inner = _unwrap_once(text)
        if inner == text:
            break
        text = inner
    return text


def _unwrap_once(text: str) -> str:
    text = text.strip()
    fenced = _CODE_FENCE.match(text)
    if fenced and fenced.group(1) not in fenced.group(2):
        return fenced.group(2).strip()
    opened = _TAG_OPEN.match(text)
    if opened and text.endswith(closing := f"</{opened.group(1)}>"):
        inner = text[opened.end() : -len(closing)]
        return inner.strip() if closing not in inner else text
    return text
