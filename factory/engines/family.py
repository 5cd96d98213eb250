"""How a served model differs from most: found by a probe of one or two short calls, and by what the
server refuses.

Nothing of this is part of a key: a question stays the same question when a server needs it in
another form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from prefab.factory.types import Message

Thinking = Literal["no", "unless_told", "always"]
MaxTokensField = Literal["max_tokens", "max_completion_tokens"]
PROBE = (
    Message("system", "Answer with one letter and nothing else."),
    Message("user", "Which letter comes first in the alphabet, A or B?"),
)
SYSTEM_PROBE = (Message("system", "Probe of a system turn"), Message("user", "Hello"))
PROBE_LABELS = ("A", "B")
PROBE_TOKENS = 256  # enough for the thoughts of a model about this question
# a field that is refused is left out when it has this value, which changes nothing
NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "stop": [],
    "n": 1,
    "stream": False,
}
LOGPROBS = ("top_logprobs", "logprob_token_ids", "return_tokens_as_token_ids", "logprobs")
DROPPABLE = ("temperature", "seed", "chat_template_kwargs")
_SYSTEM = re.compile(
    r"system[ _-](?:role|message|prompt|instruction|turn)s?\b.*(?:not|n't|unsupported|invalid)"
    r"|(?:not|n't|unsupported|invalid)\b.*\bsystem[ _-]?(?:role|message|prompt|instruction|turn)?"
    r"|developer instruction|roles? must alternate|only user and assistant roles",
    re.I | re.S,
)
_UNSUPPORTED = re.compile(
    r"unsupported|(?:not|n't)(?: be)? (?:support|allow|permit|accept|available|enabled)|unknown"
    r"|unrecogni[sz]ed|unexpected|extra (?:inputs|fields)|deprecated|only the default|no longer",
    re.I,
)
_TOOL_PARSER = re.compile(r"tool[ _-]choice\b.*\brequires|tool[-_ ]call[-_ ]parser", re.I | re.S)
_AT_MOST = re.compile(
    r"(?:at most|less than or equal to|<=|max(?:imum)?(?: of| value)?(?: is|:)?|between 0 and|up to)\s*(\d+)",
    re.I,
)


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a served model.

    Args:
        system_role: Whether it takes a system turn; else system text joins the first user turn.
        max_tokens_field: The name under which it takes the longest answer.
        left_out: Fields that it refuses.
        logprobs: Whether it gives log-probabilities; without them labels are `hard`.
        top_logprobs: How many of the likeliest tokens it gives, where fewer than are asked for.
        thinking: Whether it thinks before it answers: `no`; `unless_told` (`enable_thinking: false`
            stops it); `always`.
        opens_thinking: Whether its chat template opens the thinking, so that a text has the closing
            tag alone.
        tool_parser: Whether the server finds the tool calls in an answer; without it they come in
            the text, as the model writes them.
        begins: What it began with when it was asked for one letter, where that was no letter.
    """

    system_role: bool = True
    max_tokens_field: MaxTokensField = "max_tokens"
    left_out: tuple[str, ...] = ()
    logprobs: bool = True
    top_logprobs: int | None = None
    thinking: Thinking = "no"
    begins: str = ""
    opens_thinking: bool = False
    tool_parser: bool = True

    def thinks(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether it thinks when asked with these arguments of the chat template."""
        told_not_to = kwargs.get("enable_thinking") is False
        return self.thinking == "always" or (self.thinking == "unless_told" and not told_not_to)

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Family:
        """From plain data, as `data` gives it or JSON holds it."""
        return cls(**{**data, "left_out": tuple(data.get("left_out", ()))})

    def notes(self) -> list[str]:
        """What is unusual of every request, a sentence each."""
        others = [name for name in self.left_out if name != "temperature"]
        unusual = {
            "takes no system turn: system text joins the first user turn": not self.system_role,
            f"takes {self.max_tokens_field} in place of max_tokens": self.max_tokens_field
            != "max_tokens",
            "takes no temperature: it samples at its own, at label reads too": "temperature"
            in self.left_out,
            f"refuses {', '.join(others)}: left out": bool(others),
            "gives no log-probabilities: labels are hard, without a probability": not self.logprobs,
            f"gives the {self.top_logprobs} likeliest tokens at most": self.top_logprobs
            is not None,
            "thinks before it answers unless told not to": self.thinking == "unless_told",
            "thinks before every answer: more tokens are allowed for it": self.thinking == "always",
        }
        return [words for words, so in unusual.items() if so]


def learned(
    family: Family, message: str, param: str, body: Mapping[str, Any], has_system: bool
) -> Family | None:
    """The family after a refusal (a 4xx); None when it teaches nothing.

    Args:
        family: The family by which the request was written.
        message: The server's message.
        param: The field that the server names, or empty.
        body: The request's fields without its messages.
        has_system: Whether the messages have a system turn.
    """
    if has_system and family.system_role and _SYSTEM.search(message):
        return replace(family, system_role=False)
    if family.tool_parser and _TOOL_PARSER.search(message):
        return replace(family, tool_parser=False)
    name = param if param in body else _named(message, body)
    if name is None or not (_UNSUPPORTED.search(message) or name in LOGPROBS):
        return None
    if name in ("max_tokens", "max_completion_tokens"):
        other: MaxTokensField = "max_completion_tokens" if name == "max_tokens" else "max_tokens"
        return replace(family, max_tokens_field=other)
    if name in LOGPROBS:
        return _fewer_logprobs(family, message, body)
    if droppable(name, body.get(name)):
        return replace(family, left_out=tuple(sorted({*family.left_out, name})))
    return None


def droppable(name: str, value: Any) -> bool:
    """Whether a field may be left out where it has this value."""
    return name in DROPPABLE or (name in NEUTRAL and value == NEUTRAL[name])


def _fewer_logprobs(family: Family, message: str, body: Mapping[str, Any]) -> Family:
    """The family whose log-probabilities were refused: fewer, or none."""
    most = _AT_MOST.search(message)
    if most and 0 < int(most[1]) < body.get("top_logprobs", 0):
        return replace(family, top_logprobs=int(most[1]))
    return replace(family, logprobs=False)


def _named(message: str, body: Mapping[str, Any]) -> str | None:
    """The field of the body that a message speaks of: the first one named in it."""
    places = {
        found.start(): name
        for name in {*body, "seed"}
        if (found := re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message))
        or (name in LOGPROBS and (found := re.search(r"(?i)log[- ]?prob", message)))
    }
    return places[min(places)] if places else None


def without_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation with its system text at the head of the first user turn."""
    system = [m.content for m in messages if m.role == "system"]
    rest = [m for m in messages if m.role != "system"]
    if not system:
        return messages
    at = next((i for i, m in enumerate(rest) if m.role == "user"), None)
    if at is None:
        return (Message("user", "\n\n".join(system)), *rest)
    rest[at] = replace(rest[at], content="\n\n".join([*system, rest[at].content]))
    return tuple(rest)
