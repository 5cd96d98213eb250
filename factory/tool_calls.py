"""Tools, calls of tools and their results, in messages, in answers and as judges are shown them.

A message has them in `more`. An answer is one text, in which each call is written as Hermes and
Qwen models write it: `<tool_call>`, a line of JSON with `name` and `arguments`, `</tool_call>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import orjson

from prefab.factory.keys import canonical
from prefab.factory.types import Message

Turn = dict[str, Any]
Calls = list[dict[str, Any]]
KEPT = ("tool_calls", "tool_call_id", "name")  # of a turn, beside its role and content
MARK = "[call]"
_CALL = re.compile(r"\s*<tool_call>\s*(\{.*?\})\s*</tool_call>", re.S)
_CALLS = re.compile(r"(?:\s*<tool_call>\s*\{(?:(?!</?tool_call>).)*\}\s*</tool_call>)+\s*\Z", re.S)


def message_of(turn: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()) -> Message:
    """A turn of a chat template as a message. `tools` are given with a conversation's first turn.

    Raises: ValueError where a call's arguments are not JSON that has one text (such as NaN).
    """
    found = {name: turn[name] for name in KEPT if turn.get(name)}
    if turn["role"] not in ("assistant", "tool"):
        found = {}
    if tools:
        found["tools"] = [dict(tool) for tool in tools]
    return Message(turn["role"], turn["content"], canonical(found).decode() if found else "")


def messages_of(
    turns: Iterable[Mapping[str, Any]], tools: Sequence[Any] = ()
) -> tuple[Message, ...]:
    """A conversation as messages. Raises: ValueError as `message_of`."""
    return tuple(message_of(turn, () if i else tools) for i, turn in enumerate(turns))


def message_turn(message: Message) -> Turn:
    """A message as a turn of a chat template: `role`, `content`, and what it has of `KEPT`."""
    turn: Turn = {"role": message.role, "content": message.content}
    if message.more:
        more = json.loads(message.more)
        turn |= {name: more[name] for name in KEPT if name in more}
    return turn


def tools_of(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The tools that a conversation may call, as a chat template takes them."""
    if not messages or not messages[0].more:
        return []
    found: list[dict[str, Any]] = json.loads(messages[0].more).get("tools", [])
    return found


def stored_text(messages: Iterable[Message]) -> str:
    """A conversation as the JSON that stores keep: `[[role, text], ...]`, with a third entry where
    a message has `more`.
    """
    turns = [[m.role, m.content, m.more] if m.more else [m.role, m.content] for m in messages]
    return orjson.dumps(turns).decode()


def stored_messages(text: str | bytes) -> tuple[Message, ...]:
    """The conversation of a text that `stored_text` wrote."""
    return tuple(Message(*turn) for turn in orjson.loads(text))


def server_turns(messages: Sequence[Message]) -> list[Turn]:
    """Messages as a server of chat completions takes them: a call's arguments as JSON text, and an
    id for each call, which its result names.
    """
    made, waiting, n = [], [], 0
    for message in messages:
        turn = message_turn(message)
        if calls := turn.get("tool_calls"):
            waiting = [call.get("id") or f"call_{n + i}" for i, call in enumerate(calls, 1)]
            n += len(calls)
            turn["tool_calls"] = [
                {"id": name, "type": "function", "function": as_text(call["function"])}
                for name, call in zip(waiting, calls, strict=True)
            ]
            turn["content"] = turn["content"] or None
        elif turn["role"] == "tool":
            turn.setdefault("tool_call_id", waiting[0] if waiting else "call_1")
            waiting = [name for name in waiting if name != turn["tool_call_id"]]
        made.append(turn)
    return made


def as_text(function: Mapping[str, Any]) -> dict[str, str]:
    """A call's function with its arguments as JSON text."""
    return {"name": function["name"], "arguments": arguments_text(function.get("arguments"))}


def arguments_text(arguments: Any) -> str:
    """A call's arguments as JSON text; a text that is no JSON, as a model wrote it, stays."""
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments or {}, ensure_ascii=False)


# --- answers ------------------------------------------------------------------------------------


class SplitAnswer(NamedTuple):
    """The two parts of an answer."""

    content: str
    calls: Calls


def join_calls(content: str, calls: Iterable[Mapping[str, Any]]) -> str:
    """An answer and its calls as one text. The calls' ids, which servers draw, are left out.

    Raises: TypeError for a call without the name of a function.
    """
    parts = [content] if content else []
    for call in calls:
        function = call.get("function", call)
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str):
            raise TypeError("a tool call has no name")
        if isinstance(arguments, str):
            with suppress(ValueError):  # else kept as the model wrote it
                arguments = json.loads(arguments)
        line = json.dumps({"name": name, "arguments": arguments or {}}, ensure_ascii=False)
        line = line.replace("<", "\\u003c")  # no argument ends the call
        parts.append(f"<tool_call>\n{line}\n</tool_call>")
    return "\n".join(parts)


def split_calls(text: str) -> SplitAnswer:
    """The content of an answer and the calls at its end; a text without calls, or with one that is
    no JSON of a call, is content.
    """
    found = _CALLS.search(text) if "</tool_call>" in text else None
    if found is None:
        return SplitAnswer(text, [])
    calls: Calls = []
    for match in _CALL.finditer(found.group()):
        try:
            call = json.loads(match[1])
        except ValueError:
            return SplitAnswer(text, [])
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return SplitAnswer(text, [])
        arguments = call.get("arguments", call.get("parameters")) or {}
        calls.append(
            {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
        )
    return SplitAnswer(text[: found.start()].rstrip(), calls)


def answer_turn(text: str) -> Turn:
    """An answer as the assistant's turn of a chat template."""
    content, calls = split_calls(text)
    turn: Turn = {"role": "assistant", "content": content}
    return {**turn, "tool_calls": calls} if calls else turn


# --- for judges ---------------------------------------------------------------------------------


def shown_answer(text: str) -> str:
    """An answer as judges are shown it: a line `[call] name(arguments)` a call. The mark in other
    text is broken by a space.
    """
    content, calls = split_calls(text)
    return "\n".join([*_said(content), *map(_shown_call, calls)])


def answer_in_context(context: Sequence[Message], answer: str) -> str:
    """An answer with the turns between the prompt and it, as one text for judges: the first turn's
    text, then `User: ...` and `Assistant: ...` by turn. Without a context the answer alone.
    """
    if not context:
        return answer
    turns = [*context, Message("assistant", answer)]
    said = [f"{turn.role.capitalize()}: {turn.content}" for turn in turns]
    return "\n\n".join([turns[0].content, *said[1:]])


def shown_conversation(messages: Sequence[Message]) -> str:
    """A conversation with tools as judges are shown it: the tools, then a line `Role: words` a turn
    with its calls after it.
    """
    lines = []
    for tool in tools_of(messages):
        function = tool.get("function", tool)
        names = ", ".join((function.get("parameters") or {}).get("properties") or {})
        words = f": {function['description']}" if function.get("description") else ""
        lines.append(f"Tool {function.get('name', '')}({names}){words}")
    for message in messages:
        turn = message_turn(message)
        who = f"{turn['role'].capitalize()} {turn.get('name', '')}".strip()
        lines += [f"{who}: {said}" for said in _said(turn["content"])]
        lines += [f"{who}: {_shown_call(call)}" for call in turn.get("tool_calls", ())]
    return "\n".join(lines)


def _said(content: str) -> list[str]:
    return [content.replace(MARK, "[ call]")] if content else []


def _shown_call(call: Mapping[str, Any]) -> str:
    function = call["function"]
    return f"{MARK} {function['name']}({arguments_text(function.get('arguments'))})"
