"""The critic names a fault under a principle, or that there is none; the reviser mends it.

A critique's first word decides: "None" names no fault, "Fault" names one, anything else is
unscored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from prefab.factory.spec.templates import Template, neutralise
from prefab.factory.types import (
    Completion,
    Critique,
    Principle,
    Prompt,
    Request,
    Sample,
    Sampling,
    UnscoredReason,
)
from prefab.judges.base import (
    Examples,
    JudgeConfig,
    candidate,
    conversation,
    generated,
    kwargs_of,
    unwrap,
)

PARSER_VERSION = 1


class CritiqueConfig(JudgeConfig):
    """A critic and reviser: one model, two templates."""

    kind: Literal["critique"] = "critique"
    name: str = "critic"
    template: str = "critique.jinja"
    revise_template: str = "revise.jinja"
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0.0, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Revision:
    """A revised answer's text, or why there is none; never both."""

    text: str | None
    reason: UnscoredReason | None = None


def critique_request(
    config: CritiqueConfig,
    template: Template,
    prompt: Prompt,
    sample: Sample,
    principle: Principle,
    model: str,
    round: int = 0,
    repeat: int = 0,
    specials: tuple[str, ...] = (),
    examples: Examples = (),
    seed: int | None = None,
) -> Request:
    """Ask what is wrong with one answer under one principle. `seed` is the run's, used at
    temperature above 0.
    """
    messages = template.render(
        conversation=conversation(prompt.messages, specials),
        answer=candidate(prompt.messages, sample.text, specials),
        question=principle.critique,
        examples=examples,
    )
    return _free_text(config, messages, model, sample.index, round, repeat, seed)


def revise_request(
    config: CritiqueConfig,
    template: Template,
    prompt: Prompt,
    sample: Sample,
    principle: Principle,
    critique: str,
    model: str,
    round: int = 0,
    repeat: int = 0,
    specials: tuple[str, ...] = (),
    examples: Examples = (),
    seed: int | None = None,
) -> Request:
    """Ask for the answer again without the fault that `critique` names."""
    messages = template.render(
        conversation=conversation(prompt.messages, specials),
        answer=candidate(prompt.messages, sample.text, specials),
        question=principle.revise,
        critique=neutralise(critique, specials),
        examples=examples,
    )
    return _free_text(config, messages, model, sample.index, round, repeat, seed)


def parse_critique(
    completion: Completion, prompt: str = "", sample: int = 0, principle: str = ""
) -> Critique:
    """The critique of sample number `sample` of the prompt with id `prompt`. Cut off is
    `truncated`, never a fault.
    """
    text, reason = generated(completion)
    fault: bool | None = None
    if reason is None:
        fault = {"fault": True, "none": False}.get(_first_word(text))
        reason = None if fault is not None else "parse"
    return Critique(prompt, sample, principle, text, fault, reason)


def parse_revision(completion: Completion) -> Revision:
    """The revised text without the fences, tags or thinking that a model puts around it, or why
    there is none.
    """
    text, reason = generated(completion)
    if reason is not None:
        return Revision(None, reason)
    text = unwrap(text)
    return Revision(text) if text else Revision(None, "parse")


def _first_word(text: str) -> str:
    words = text.split(maxsplit=1)
    return words[0].strip("*_`#\"'().,:;!-").lower() if words else ""


def _free_text(
    config: CritiqueConfig,
    messages,
    model: str,
    sample: int,
    round: int,
    repeat: int,
    seed: int | None,
) -> Request:
    """At temperature above 0 two identical drafts, or rounds, do not share one answer."""
    if config.temperature > 0:
        sampling = Sampling(config.max_tokens, config.temperature, seed=seed)
        return Request(model, messages, sampling, (), kwargs_of(config), (sample, round, repeat))
    repeats = (repeat,) if repeat else ()
    return Request(model, messages, Sampling(config.max_tokens), (), kwargs_of(config), repeats)


class Critic:
    """The kind `critique`: its configuration class is `Config`."""

    Config = CritiqueConfig
