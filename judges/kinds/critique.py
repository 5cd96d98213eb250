"""The critic names a fault under a principle, or says that there is none; the reviser corrects the
answer.

A critique's first word decides: "None" names no fault, "Fault" names one, anything else is
unscored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from prefab.factory.spec.templates import neutralise
from prefab.factory.types import (
    Completion,
    Critique,
    Message,
    Principle,
    Prompt,
    Request,
    Sample,
    Sampling,
    UnscoredReason,
)
from prefab.judges.base import (
    JudgeConfig,
    RequestContext,
    candidate,
    conversation,
    generated,
    text_request,
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


class Critic:
    """One model with two templates: it names a fault, and it revises an answer."""

    Config = CritiqueConfig

    def __init__(self, config: CritiqueConfig) -> None:
        self.config = config

    def critique_request(
        self,
        prompt: Prompt,
        sample: Sample,
        principle: Principle,
        context: RequestContext,
        round: int = 0,
        repeat: int = 0,
    ) -> Request:
        """Ask what is wrong with one answer under one principle."""
        messages = self._render("critique", prompt, sample, principle.critique, principle, context)
        return self._request(messages, sample, context, round, repeat)

    def revise_request(
        self,
        prompt: Prompt,
        sample: Sample,
        principle: Principle,
        critique: str,
        context: RequestContext,
        round: int = 0,
        repeat: int = 0,
    ) -> Request:
        """Ask for the answer again without the fault that `critique` names."""
        shown = neutralise(critique, context.specials)
        messages = self._render(
            "revise", prompt, sample, principle.revise, principle, context, critique=shown
        )
        return self._request(messages, sample, context, round, repeat)

    def _render(
        self,
        role: str,
        prompt: Prompt,
        sample: Sample,
        question: str,
        principle: Principle,
        context: RequestContext,
        **more: str,
    ) -> tuple[Message, ...]:
        return context.templates[role].render(
            conversation=conversation(prompt.messages, context.specials),
            answer=candidate(prompt.messages, sample.text, context.specials),
            question=question,
            examples=context.examples(role, principle),
            **more,
        )

    def _request(
        self,
        messages: tuple[Message, ...],
        sample: Sample,
        context: RequestContext,
        round: int,
        repeat: int,
    ) -> Request:
        config = self.config
        seed = context.seed if config.temperature > 0 else None
        sampling = Sampling(config.max_tokens, config.temperature, seed=seed)
        place = (sample.index, round)
        return text_request(context.model, messages, sampling, config, repeat, place)
