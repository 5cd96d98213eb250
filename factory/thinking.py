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

# Qwen, DeepSeek and others; Mistral; Seed-OSS; Kimi; Command; LongCat; MiniMax; OpenThinker; Gemma;
# MedGemma; and what other fine-tunes write
TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("<unused94>thought", "<unused95>"),
)
# What some of these families write around the answer.
_BEFORE = re.compile(r"\s*+(?:<\|START_RESPONSE\|>|<\|begin_of_solution\|>)")
_AFTER = ("<|END_RESPONSE|>", "<|end_of_solution|>")
MOST_BLOCKS = 32  # of thinking, one after another
# gpt-oss writes its thinking and its answer as messages of named channels; a server that leaves the
# control tokens out gives "analysis...assistantfinal...".
_CHANNELS = re.compile(
    r"\s*(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)\b"
    r"|analysis(?=[A-Z\"'*])(?=.*assistant(?:final|commentary))|analysis(?=(?:We|The|User|I)\b)",
    re.S,
)
_FINAL = re.compile(r"<\|channel\|>final(?:<\|message\|>)?|assistantfinal(?:json)?")
_HARMONY = re.compile(r"<\|(?:start|end|message|return|channel|call)\|>")


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
    if not _MAY_THINK.search(text):
        return ThinkingSplit("", text)
    if begun := _CHANNELS.match(text):
        return _of_channels(text, begun.end())
    parts: list[str] = []
    found = _block(text) or ThinkingSplit("", text)
    while found.finished and len(parts) < MOST_BLOCKS and _OPENING.match(found.answer):
        again = _block(found.answer)
        if again is None:
            break
        parts.append(found.thinking)
        found = again
    thinking = "\n\n".join(filter(None, (*parts, found.thinking)))
    return found._replace(thinking=thinking)


def _block(text: str) -> ThinkingSplit | None:
    """The text's first block of thinking; None where it does not begin with one."""
    splits = (_split(text, opening, closing) for opening, closing in TAGS)
    found = next((split for split in splits if split is not None), None)
    if found is None or not found.finished or not (begins := _BEFORE.match(found.answer)):
        return found
    answer = found.answer[begins.end() :].rstrip()
    end = next((end for end in _AFTER if answer.endswith(end)), "")
    return found._replace(answer=answer.removesuffix(end).strip())


_OPENING = re.compile("|".join(re.escape(opening) for opening, _ in TAGS), re.I)
_MAY_THINK = re.compile(r"[<\[◁]|analysis")  # most answers do not: they cost one search
_EACH = {pair: re.compile(f"{re.escape(pair[0])}|{re.escape(pair[1])}", re.I) for pair in TAGS}


def _of_channels(text: str, start: int) -> ThinkingSplit:
    """The last message of the channel `final` is the answer; what is before it is thinking."""
    finals = list(_FINAL.finditer(text, start))
    if not finals:
        return ThinkingSplit(_HARMONY.sub("", text[start:]).strip(), "", False)
    thinking = _HARMONY.sub("", text[start : finals[-1].start()]).removesuffix("assistant").strip()
    return ThinkingSplit(thinking, _HARMONY.sub("", text[finals[-1].end() :]).strip())


def closing_tag_alone(text: str) -> bool:
    """Whether a text begins with thinking that it does not open: its chat template did."""
    begins = _OPENING.match(text.lstrip()) or _CHANNELS.match(text)
    return bool(split_thinking(text).thinking) and not begins


def _split(text: str, opening: str, closing: str) -> ThinkingSplit | None:
    """The text's first block between these tags; None where it does not begin with one."""
    tags = list(_EACH[opening, closing].finditer(text))
    if not tags:
        return None
    opened = _is(tags[0], opening) and not text[: tags[0].start()].strip()
    start = tags[0].end() if opened else 0
    depth, closings = 1, sum(_is(tag, closing) for tag in tags)
    for tag in tags[opened:]:
        closings -= _is(tag, closing)
        if _in_backticks(text, tag.start(), tag.end()):
            continue
        if _is(tag, opening):
            if not opened:
                return None
            depth += 1
            continue
        depth -= 1
        if depth == 0 or not closings:
            return ThinkingSplit(text[start : tag.start()].strip(), text[tag.end() :].strip())
    return ThinkingSplit(text[start:].strip(), "", False) if opened else None


def _is(tag: re.Match[str], spelling: str) -> bool:
    """Whether a tag that was found is this one, in any case of its letters."""
    return tag.group().lower() == spelling.lower()


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
    it: `reasoning_content`, `reasoning` or `thinking`, or content in typed parts; and with its tool
    calls.

    Raises: TypeError where the content is neither text nor parts of text, or a call has no name.
    """
    content = message.get("content")
    thinking = _thoughts_of(message)
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


def _thoughts_of(message: Mapping[str, Any]) -> Any:
    """What a message has as thinking of its own, parts as one text; empty without."""
    found = next((message[name] for name in THOUGHTS if message.get(name)), "")
    return "".join(map(_part_text, found)) if isinstance(found, list) else found


THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # a message's fields, by server


def refusal_of(message: Mapping[str, Any]) -> str:
    """The words by which a message refuses: its `refusal`, or a part of its content of this type;
    empty where it refuses nothing.

    Raises: TypeError where that is no text.
    """
    content = message.get("content")
    parts = [one.get("refusal") for one in content] if isinstance(content, list) else []
    found = message.get("refusal") or next((words for words in parts if words), "")
    if not isinstance(found, str):
        raise TypeError(f"refusal is {type(found).__name__}")
    return found


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
