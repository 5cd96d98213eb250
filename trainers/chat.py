"""Conversations as tokens: what a chat template writes, where a turn ends, and which texts would
become control tokens.

Tokens are made here and nowhere else: the template is applied once, as text, and the text is
tokenised without special tokens of the tokenizer's own, so that a second BOS cannot come in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prefab.factory.errors import ConfigError

Turn = Mapping[str, Any]  # role and content; of an assistant also tool_calls, reasoning_content
Turns = Sequence[Turn]
Answer = str | Turn  # the assistant's next turn; a text where it is nothing else
CLOSING = re.compile(r"</[\w:]+>|\[/\w+\]")  # of reasoning: </think>, [/THINK]
OPENS = re.compile(r"[<\[](think|thinking|thought|reasoning)[>\]]\s*$", re.IGNORECASE)  # a prompt
TAG = re.compile(r"</?\w+>|\[/?\w+\]")


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a tokenizer's chat template does, found by rendering short conversations.

    Attributes:
        end: The token that ends an assistant's turn; the tokenizer's EOS where the template writes
            none.
        tail: What the template writes after an assistant's last words.
        has_system: Whether a system turn is written.
        control: Texts that would end or begin a turn if they stood in an answer.
        markup: Texts of added tokens that are special, or that the template writes or looks for.
    """

    end: int
    tail: str
    has_system: bool
    control: tuple[str, ...]
    markup: tuple[str, ...]


def dialect(tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> Dialect:
    """The dialect of a tokenizer with its chat template as it is now."""
    plain = {name: value for name, value in (kwargs or {}).items() if name != "tools"}
    return _dialect(tokenizer, tokenizer.chat_template, json.dumps(plain, default=str))


@lru_cache(maxsize=32)
def _dialect(tokenizer: Any, template: str, kwargs: str) -> Dialect:
    given, words = json.loads(kwargs), "Probe words"
    asked = [{"role": "user", "content": words}]
    replied = [*asked, {"role": "assistant", "content": words}]
    _, found, tail = chat_text(tokenizer, replied, False, given).rpartition(words)
    tail = tail if found else ""
    added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
    end = next((i for i in ids_of(tokenizer, tail) if i in added), tokenizer.eos_token_id)

    def written(turns: Turns) -> set[str]:
        ids = ids_of(tokenizer, chat_text(tokenizer, turns, False, given))
        return {added[i] for i in ids if i in added}

    # tags beside an answer, which no user's turn has, are of its reasoning
    beside = {text for text in written([*replied, *asked]) if not TAG.fullmatch(text)}
    around = written(asked) | beside
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    own = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, added.get(end)} - {None}
    return Dialect(
        end,
        tail,
        _has_system(tokenizer, asked, given),
        _longest_first(around | own | {text for text in special if text not in template}),
        _longest_first(around | own | special | {t for t in added.values() if t in template}),
    )


def _longest_first(texts: Iterable[Any]) -> tuple[str, ...]:
    return tuple(
        sorted(
            {text for text in texts if text.strip() and len(text) > 1}, key=lambda t: (-len(t), t)
        )
    )


def _has_system(tokenizer: Any, asked: Turns, kwargs: Mapping[str, Any]) -> bool:
    words = "Probe of a system turn"
    try:
        text = chat_text(tokenizer, [{"role": "system", "content": words}, *asked], False, kwargs)
    except ConfigError:
        return False
    return words in text


def chat_text(
    tokenizer: Any, turns: Turns, prompt: bool, kwargs: Mapping[str, Any] | None = None
) -> str:
    """A conversation as the template writes it; with `prompt`, up to where the assistant's answer
    begins.

    Raises: ConfigError where the template refuses the conversation.
    """
    import jinja2

    def render(some: Turns) -> str:
        text: str = tokenizer.apply_chat_template(
            [dict(turn) for turn in some],
            tokenize=False,
            add_generation_prompt=prompt,
            **(kwargs or {}),
        )
        return text

    try:
        try:
            return render(turns)
        except TypeError:  # some templates want a call's arguments as JSON
            return render([_with_json(turn) for turn in turns])
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"the chat template refuses this conversation: {error}") from None


def _with_json(turn: Turn) -> Turn:
    """The turn, with the arguments of its tool calls as JSON texts."""
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**turn, "tool_calls": calls}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that already holds its control tokens: nothing is put before or after
    them.
    """
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def shown(tokenizer: Any, turns: Turns, kwargs: Mapping[str, Any] | None = None) -> list[Turn]:
    """A conversation as the model may be shown it: no text of a user, a system or a tool becomes an
    added token, no text of the assistant one that ends a turn, and a system turn that the template
    has no place for stands before the first user's words.
    """
    known = dialect(tokenizer, kwargs)
    found = []
    for turn in turns:
        tokens = known.control if turn["role"] == "assistant" else known.markup
        found.append({**turn, "content": broken(turn["content"], tokens)})
    if known.has_system or len(found) < 2 or found[0]["role"] != "system":
        return list(found)
    system, first, *rest = found
    if first["role"] != "user":
        return list(found)
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


def broken(text: str, tokens: Iterable[str]) -> str:
    """The text with a space in each of these tokens' spellings, so that none is read as one."""
    for token in tokens:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def prompt_ids(tokenizer: Any, turns: Turns, kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """The tokens that a server is given for this conversation, after which it samples."""
    return ids_of(tokenizer, chat_text(tokenizer, turns, True, kwargs))


def conversation_ids(
    tokenizer: Any, turns: Turns, kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """A finished conversation, all that the template writes: what a reward model reads here and on
    vLLM alike.
    """
    text = chat_text(tokenizer, turns, False, kwargs)
    check_prompt_text(turns, text)
    return ids_of(tokenizer, text)


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and its answer as tokens: `prompt` as at sampling, `answer` up to and with the
    end-of-turn token.

    `merged`: the tokenizer would have joined tokens across the border, had it seen both at once.
    """

    prompt: list[int]
    answer: list[int]
    merged: bool


def turn_of(answer: Answer) -> Turn:
    """An answer as the assistant's turn."""
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def answered(
    tokenizer: Any, turns: Turns, answer: Answer, kwargs: Mapping[str, Any] | None = None
) -> Answered:
    """A conversation that waits for the assistant, with the answer, for any chat template.

    The answer's tokens are those that the template writes after the prompt as it stands at
    sampling. Where it writes the last turn otherwise than it stands there (templates that strip
    reasoning, or open it in the prompt), they are the answer's own text and what the template
    writes behind it. What follows the end-of-turn token is cut, since nothing is sampled there;
    where the template writes none, EOS is added, or the policy would never learn to stop.

    Raises: ConfigError when the template does not write the answer's text, or a user's or a system
        turn, as it is, or leaves out tool calls.
    """
    turn = turn_of(answer)
    start = chat_text(tokenizer, turns, True, kwargs)
    whole = chat_text(tokenizer, [*turns, turn], False, kwargs)
    check_tools(turns, start)
    check_tools([turn], whole)
    known = dialect(tokenizer, kwargs)
    rest = _rest(start, whole, turn, known.tail)
    check_prompt_text(turns, start)
    before, after = ids_of(tokenizer, start), ids_of(tokenizer, rest)
    merged = ids_of(tokenizer, start + rest) != before + after
    if known.end in after:
        after = after[: after.index(known.end) + 1]
    elif not _is_special(tokenizer, after[-1:]):  # such as gpt-oss's end of a tool call
        after = [*after, known.end]
    return Answered(before, after, merged)


def _is_special(tokenizer: Any, ids: Sequence[int]) -> bool:
    tokens = [tokenizer.added_tokens_decoder.get(i) for i in ids]
    return any(token is not None and token.special for token in tokens)


def _rest(start: str, whole: str, turn: Turn, tail: str) -> str:
    """What follows the prompt `start`, of an answer that the template writes as `whole`."""
    text: str = turn["content"]
    if opens := OPENS.search(start):
        return _after_opened(start, whole, turn, tail, opens)
    if whole.startswith(start) and text in whole[len(start) :]:
        return whole[len(start) :]
    body = whole.removesuffix(tail)
    if text and (at := body.rfind(text)) >= 0:
        return whole[at:]
    visible = CLOSING.split(text)[-1].strip()
    if turn.get("tool_calls") or not visible or visible == text or visible not in body:
        raise _rewritten(text)
    return text + tail  # the template strips reasoning, which the model writes itself


def _rewritten(text: str) -> ConfigError:
    return ConfigError(f"the chat template does not write this answer as it is: {text[:60]!r}")


def _after_opened(start: str, whole: str, turn: Turn, tail: str, opens: re.Match[str]) -> str:
    """As `_rest`, for a prompt that opens the reasoning (`<think>`), which the answer closes."""
    text: str = turn["content"]
    tag, space = opens[0].rstrip(), opens[0][len(opens[0].rstrip()) :]
    close = f"{tag[0]}/{tag[1:]}"
    own = text.lstrip().removeprefix(tag).removeprefix(space)
    if close in text:
        return own + tail  # the model's own words, whatever the template makes of them
    if text.lstrip().startswith(tag):
        raise ConfigError(f"an answer ends within its reasoning: {text[:60]!r}")
    base = start[: opens.start()]
    rest = whole[len(base) :].lstrip() if whole.startswith(base) else ""
    if rest.startswith(tag) and text in rest:
        return rest.removeprefix(tag).removeprefix(space)
    if turn.get("tool_calls") or text not in whole:
        raise _rewritten(text)
    return f"\n{close}\n\n{text}{tail}"  # no reasoning, as templates that write it have it


def check_prompt_text(turns: Turns, text: str) -> None:
    """Raises: ConfigError where the words of a system's or a user's turn are not in `text`, as the
    template wrote these turns: some write the last turn alone, or cut long ones.
    """
    for number, turn in enumerate(turns, 1):
        if turn["role"] in ("system", "user") and turn["content"].strip() not in text:
            raise ConfigError(
                f"the chat template does not write turn {number} ({turn['role']}) as it is: "
                f"{turn['content'][:60]!r}"
            )


def check_tools(turns: Turns, text: str) -> None:
    """Raises: ConfigError where tool calls or their results are not in `text`, as the template
    wrote these turns.
    """
    for turn in turns:
        names = [call["function"]["name"] for call in turn.get("tool_calls") or ()]
        # by words: some templates write a result as a JSON text
        result = re.findall(r"\w+", turn["content"])[:5] if turn["role"] == "tool" else []
        if any(name not in text for name in (*names, *result)):
            raise ConfigError(
                "the chat template writes no tool calls and results; train a model whose template has them"
            )
