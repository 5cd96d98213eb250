"""The critic names a fault under a principle, or says that there is none; the reviser corrects the
answer.

A critique's first word decides: "None" names no fault, "Fault" names one; anything else, and what
says both, is unscored. Where the template names these words as labels, the probability of a fault
is read at that word. List marks, fences and preambles around a critique or a revision are removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from pydantic import Field

from prefab.factory.spec.control_tokens import neutralise
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
    label_score,
    spellings,
    text_request,
    unwrap,
)

PARSER_VERSION = 1
DEFAULT_LABELS = ("None", "Fault")  # the words of a template that names none


class CritiqueConfig(JudgeConfig):
    """A critic and reviser: one model, two templates."""

    kind: Literal["critique"] = "critique"
    name: str = "critic"
    template: str = Field(
        "critique_labels.jinja",
        description="Left out: critique_labels.jinja, which reads the probability of a fault; in a "
        "store whose critiques were asked without labels, critique.jinja, which reuses them.",
    )
    revise_template: str = "revise.jinja"
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0.0, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Revision:
    """A revised answer's text, or why there is none; never both."""

    text: str | None
    reason: UnscoredReason | None = None


def parse_critique(
    completion: Completion,
    prompt: str = "",
    sample: int = 0,
    principle: str = "",
    labels: tuple[str, ...] = (),
    min_label_mass: float = 0.5,
) -> Critique:
    """What a critique says. Cut off is `truncated`, never a fault; one that says both ("Fault:
    None.") is unscored.

    Args:
        completion: The critic's answer.
        prompt: Id of the prompt, for the result.
        sample: Index of the answer, for the result.
        principle: Id of the principle, for the result.
        labels: The words for "no fault" and "a fault", as the template names them; without any,
            None and Fault, and no probability.
        min_label_mass: A first word whose labels have less probability together is unscored.
    """
    words = labels or DEFAULT_LABELS
    text, reason = generated(completion)
    if reason is not None:
        return Critique(prompt, sample, principle, text, None, reason)
    cleaned = _cleaned_critique(text, words)
    if cleaned is None:
        return Critique(prompt, sample, principle, text, None, "parse")
    fault = cleaned.lower().startswith(words[1].lower())
    if not (labels and completion.label_logps):
        return Critique(prompt, sample, principle, cleaned, fault)
    read = label_score(completion, spellings(labels), (0.0, 1.0), min_label_mass)
    said = fault if read.reason is None else None
    return Critique(
        prompt,
        sample,
        principle,
        cleaned,
        said,
        read.reason,
        read.value,
        read.mass,
        read.exactness,
    )


def parse_revision(completion: Completion) -> Revision:
    """The revised text without what a model puts around it (thinking, fences, tags, "Here is the
    revised answer:"), or why there is none. A text that goes on to explain its changes, or that
    is a critique, is unscored.
    """
    text, reason = generated(completion)
    if reason is not None:
        return Revision(None, reason)
    text = _stripped(text, _REVISION_HEAD)
    if not text or _CRITIQUE.match(text) or any(map(_REMARK.match, _PARAGRAPH.split(text)[1:])):
        return Revision(None, "parse")
    return Revision(text)


_PARAGRAPH = re.compile(r"\n\s*\n(?:[-*_]{3,}\s*\n)?")
_MARK = r"(?:[-*•>#]{1,6}|\(?\d{1,2}[.)])\s+"  # of a list, a heading or a quotation
_DECORATION = r"[*_`\"'“”‘’(\[]*"
_LEAD = rf"(?:{_MARK}|[*_`\"'“”‘’(\[])*+"  # possessive: it can be read in one way alone
_SURE = r"(?:(?:sure|certainly|of course|okay|ok|absolutely|understood)\b[!,.]?\s+)?"
_HERE = r"(?:here(?:'s|’s| is| are)|below is|this is|i(?:'ve|’ve| have) (?:revised|rewritten))\b"
_REVISED = r"(?:revised|rewritten|reworded|improved|corrected|updated|edited|new|better|final)"
_ANSWER = r"(?:answer|response|version|reply|revision|rewrite)"
_CRITIQUE_HEAD = re.compile(
    rf"{_LEAD}(?:{_SURE}{_HERE}[^\n:：]{{0,80}}"
    r"|(?:my |the )?(?:critique|evaluation|assessment|review|analysis|verdict|result)"
    r"[*_`]*)[:：][\s*_`]*",
    re.I,
)
_REVISION_HEAD = re.compile(
    rf"{_SURE}{_HERE}(?=[^\n:：]*\b{_ANSWER}\b)(?=[^\n:：]*\b{_REVISED}\b)[^\n:：]{{0,200}}[:：]\s*"
    rf"|(?:#+\s*|{_DECORATION})(?:the |my )?(?:{_REVISED}\s+)?{_ANSWER}[*_`]*[:：][\s*_`]*"
    rf"|(?:#+\s*|\*\*)(?:the |my )?{_REVISED}\s+{_ANSWER}[*_`]*\s*\n\s*",
    re.I,
)
# a paragraph after the first one that speaks of the changes and not to the person who asked
_REMARK = re.compile(
    r"\W*(?:changes(?: made)?|(?:explanation|summary) of (?:the )?changes|what (?:i|was) changed"
    r"|rationale)\b[^\n]{0,40}[:：\n]"
    r"|\W*(?:i(?:'ve|’ve| have)? (?:revised|rewritten|rewrote|reworded|removed|changed|edited)"
    r"|this (?:revised|rewritten|new|version|revision))\b[^\n]*"
    r"\b(?:answer|response|reply|version|critique|fault|wording|sentence|text)\b",
    re.I,
)
_CRITIQUE = re.compile(r"(?:critique|fault)\s*[:：]", re.I)


class _Patterns(NamedTuple):
    """What finds the labels in a critique."""

    label: re.Pattern[str]
    listed: re.Pattern[str]
    contradiction: re.Pattern[str]


@lru_cache(maxsize=16)
def _patterns(labels: tuple[str, ...]) -> _Patterns:
    none, fault = map(re.escape, labels)
    words = rf"{fault}s?|{none}"
    return _Patterns(
        re.compile(rf"{_LEAD}(?P<label>{words})\b(?P<after>[*_`\"'”’)\]]*)", re.I),
        re.compile(rf"^\s*{_MARK}(?={_DECORATION}(?:{words})\b)", re.I | re.M),
        re.compile(
            r"\W*(?:but|however|although|though|except|yet|still)\b"
            rf"|.*[.!?;]\s+\W*{fault}\s*[:：]",
            re.I | re.S,
        ),
    )


_END_OF_NONE = re.compile(
    r"\s*(?:$|[.,:：;!?。，\n–—-]|(?:was |were )?(?:found|noted|observed|identified|present)\b)"
)
_FOUND = r"(?:found|present|detected|identified|observed|seen|applicable|here|at all)"
_NO_FAULT = re.compile(
    r"(?:there (?:is|are|was|were) )?(?:none|no|nothing|nil|n/?a|not)\b"
    r"(?: (?:such|real|clear|obvious|specific|major|significant))*"
    rf"(?: (?:faults?|issues?|problems?|violations?|one|any|wrong|{_FOUND}))*"
    rf"(?: (?:is|are|was|were|to be))?(?: {_FOUND})*",
    re.I,
)


def _cleaned_critique(text: str, labels: tuple[str, ...]) -> str | None:
    """The critique from its label on, without marks and preambles; None where it has no label, or
    contradicts itself.
    """
    patterns, no_fault = _patterns(labels), labels[0].lower()
    text = _stripped(text, _CRITIQUE_HEAD)
    label = patterns.label.match(text)
    if label is None:
        return None
    rest = text[label.end() :]
    none = label["label"].lower() == no_fault
    others = {
        found["label"].lower() == no_fault
        for line in rest.splitlines()[1:]
        if (found := patterns.label.match(line.lstrip()))
    }
    clause = re.split(r"[.!?;。\n]", rest.lstrip(" \t.:：。,*_`-–—\"'"), maxsplit=1)[0].strip(
        " *_`\"'"
    )
    if others - {none}:
        return None
    if none and (patterns.contradiction.match(rest) or not _END_OF_NONE.match(rest)):
        return None
    if not none and len(clause) < 100 and _NO_FAULT.fullmatch(clause):
        return None
    if label["after"] or rest.startswith("：") or re.match(r"\s*[:：]\s*[*_`]+", rest):
        colon = re.match(r"\s*[:：][\s*_`]*", rest)
        rest = ": " + rest[colon.end() :] if colon else rest
    return label["label"] + patterns.listed.sub("", rest)


def _stripped(text: str, head: re.Pattern[str]) -> str:
    """The text without fences, tags, quotation marks and one list mark around the whole of it, and
    without what `head` finds before it.
    """
    for _ in range(4):
        inner = unwrap(text)
        inner = inner[found.end() :].strip() if (found := head.match(inner)) else inner
        if len(inner) > 1 and inner[0] + inner[-1] in ('""', "“”") and inner[0] not in inner[1:-1]:
            inner = inner[1:-1].strip()
        if "\n" not in inner and (mark := re.match(r"(?:[-*•]|\d{1,2}[.)])\s+", inner)):
            inner = inner[mark.end() :]
        if inner == text:
            break
        text = inner
    return text


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
        labels = tuple(spellings(context.templates["critique"].labels))
        return replace(self._request(messages, sample, context, round, repeat), labels=labels)

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
        return context.render(
            role,
            question,
            conversation=conversation(prompt.messages, context.specials),
            answer=candidate(prompt.messages, sample.text, context.specials),
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
