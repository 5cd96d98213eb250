"""What a reasoning model thinks before it answers, and the answer, in one text.

A completion's text is raw: thinking stands in it as `<think>...</think>` before the answer, also
where the server gave it apart (`reasoning_content`). Where the chat template opens the thinking,
the text has the closing tag alone. Judges, stores and trainers take the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from prefab.factory.tool_calls import join_calls
from prefab.factory.types import LONGEST_TEXT, Completion, UnscoredReason

# Qwen, DeepSeek and others; Mistral; Seed-OSS; Kimi; and what other fine-tunes write
TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)


class ThinkingSplit(NamedTuple):
    """The two parts of a text. `finished` is False when the text ends within the thinking; the
    answer is then empty.
    """

    thinking: str
    answer: str
    finished: bool = True


def split_thinking(text: str) -> ThinkingSplit:
    """Split a model's text into its thinking and its answer; white space around both is dropped
    where there is any thinking.

    Several blocks one after another are one thinking. A tag in backticks is a word of the text, and
    so is a closing tag after an opening one in the middle of a text.
    """
    for opening, closing in TAGS:
        found = _split(text, opening, closing)
        if found is not None:
            break
    else:
        return ThinkingSplit("", text)
    if not found.finished:
        return found
    again = split_thinking(found.answer) if found.answer.startswith(_OPENINGS) else None
    if again is None:
        return found
    thinking = "\n\n".join(part for part in (found.thinking, again.thinking) if part)
    return ThinkingSplit(thinking, again.answer, again.finished)


_OPENINGS = tuple(opening for opening, _ in TAGS)


def closing_tag_alone(text: str) -> bool:
    """Whether a text begins with thinking that it does not open: its chat template did."""
    return bool(split_thinking(text).thinking) and not text.lstrip().startswith(_OPENINGS)


def _split(text: str, opening: str, closing: str) -> ThinkingSplit | None:
    """The text's first block between these tags; None where it does not begin with one."""
    opened = text.lstrip().startswith(opening)
    if not opened and closing not in text:
        return None
    start = text.index(opening) + len(opening) if opened else 0
    depth = 1
    for tag in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text[start:]):
        at = start + tag.start()
        if _in_backticks(text, at, start + tag.end()):
            continue
        if tag.group() == opening:
            if not opened:
                return None
            depth += 1
            continue
        depth -= 1
        after = text[start + tag.end() :]
        if depth == 0 or closing not in after:
            return ThinkingSplit(text[start:at].strip(), after.strip())
    return ThinkingSplit(text[start:].strip(), "", False) if opened else None


def _in_backticks(text: str, start: int, end: int) -> bool:
    return text[max(start - 1, 0) : start] == "`" and text[end : end + 1] == "`"


def join_thinking(thinking: str, answer: str) -> str:
    """Thinking that a server gave apart, and the answer, as one text. Without an answer the
    thinking stays open. A closing tag that the thinking names is broken up.
    """
    held = thinking.replace("</think>", "</ think>").replace("<think>", "< think>")
    return f"<think>\n{held}\n</think>\n\n{answer}" if answer else f"<think>\n{held}"


class PolicyAnswer(NamedTuple):
    """A policy's answer without its thinking, or why there is none; never both."""

    text: str | None
    thinking: str
    reason: UnscoredReason | None = None


def policy_answer(completion: Completion) -> PolicyAnswer:
    """What a completion answers. An unfinished thought is no answer: `truncated`."""
    if completion.finish == "context" or completion.finish == "refused":
        return PolicyAnswer(None, "", completion.finish)
    if len(completion.text) > LONGEST_TEXT:
        return PolicyAnswer(None, "", "too_long")
    thinking, answer, finished = split_thinking(completion.text)
    if not finished:
        return PolicyAnswer(None, thinking, "truncated")
    if thinking and not answer:
        return PolicyAnswer(
            None, thinking, "truncated" if completion.finish == "length" else "parse"
        )
    return PolicyAnswer(answer, thinking)


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a chat completion's message, with thinking that the server gave apart joined to
    it: `reasoning_content` or `reasoning`, or content in typed parts; and with its tool calls.

    Raises: TypeError where the content is neither text nor parts of text, or a call has no name.
    """
    content = message.get("content")
    thinking = message.get("reasoning_content") or message.get("reasoning") or ""
    if isinstance(content, list):
        thought = [part for part in content if part.get("type") in ("thinking", "reasoning")]
        thinking = thinking or "".join(_part_text(part) for part in thought)
        content = "".join(_part_text(part) for part in content if part not in thought)
    if not isinstance(content, str | None):
        raise TypeError(f"content is {type(content).__name__}")
    content = content or ""
    calls = message.get("tool_calls") or [message.get("function_call")]
    if calls[0]:
        content = join_calls(content, calls)
    return join_thinking(thinking, content) if _is_text(thinking) else content


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _part_text(part: Mapping[str, Any]) -> str:
    """A part's text: `{"type": "text", "text": ...}`, or `{"type": "thinking", "thinking": [...]}`
    with such parts inside.
    """
    inner = part.get("text", part.get("thinking", part.get("reasoning")))
    if isinstance(inner, list):
        return "".join(_part_text(x) for x in inner)
    if not isinstance(inner, str):
        raise TypeError(f"a part of the content of type {part.get('type')!r} has no text")
    return inner
