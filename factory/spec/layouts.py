"""What the row of a data file holds: its prompt, its answers, and which is better, by its columns.

The layouts that public data sets have are read as they are (`LAYOUTS`). What cannot be kept whole
is refused with a reason, never dropped.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.spec import yamlio
from prefab.factory.tool_calls import join_calls

# A turn has role (system, user, assistant, tool) and content; an assistant's may have tool_calls
# and reasoning_content, a tool's tool_call_id and name.
Turn = dict[str, Any]
Turns = list[Turn]
Pair = tuple[int, int, float]  # two answers' numbers, and P(the first is better)
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
PROMPTS = (
    "prompt",
    "question",
    "instruction",
    "query",
    "messages",
    "conversations",
    "conversation",
)
NO_CALLERS = ("system", "user")  # a tool's result follows the assistant's call or another result
SYSTEMS = ("system", "system_prompt")
# Of UltraFeedback: the mean of aspects first, since the overall score has known errors.
SCORES = ("fine-grained_score", "overall_score", "score")
TURN = re.compile(r"\n\n(Human|Assistant):")
BEGINS = re.compile(r"\s*Human:.*\n\nAssistant:", re.S)  # a transcript without its first blank line
# a list of turns in a column of texts, as tables that know no lists have it
WRITTEN = re.compile(r"\s*\[\s*\{\s*(['\"])(?:role|content|from|value)\1\s*:")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
WINNERS = {
    "model_a": 1.0,
    "a": 1.0,
    "model_b": 0.0,
    "b": 0.0,
    "tie": 0.5,
    "tie (inconsistent)": 0.5,
    "tie (bothbad)": 0.5,
    "both_bad": 0.5,
}


MAX_ANSWERS = 256  # of one prompt, which are 32,640 pairs


@dataclass(slots=True)
class Record:
    """What one row holds.

    Attributes:
        layout: The name of its layout.
        prompt: The conversation before the answer; it ends with a user's or a tool's turn.
        answers: The assistant's turns that answer it.
        contexts: For each answer, the turns between the prompt and this answer, where the compared
            conversations differ before their last answers; otherwise empty.
        pairs: Comparisons of the answers.
        label: Of a single answer: whether it is a good one.
        talk: A whole conversation, whose assistant's turns are demonstrations.
        tools: The tools that the conversation may call, as a chat template takes them.
        columns: What each column was taken for.
    """

    layout: str
    prompt: Turns = field(default_factory=list)
    answers: Turns = field(default_factory=list)
    contexts: list[Turns] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    label: bool | None = None
    talk: Turns = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)


Row = Mapping[str, Any]


def rename(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    """The row with each column `names[target]` under the name `target`.

    Raises: ValueError where the row has no such column.
    """
    missing = [source for source in names.values() if source not in row]
    if missing:
        raise ValueError(f"has no {missing[0]} to map; its fields are: {_fields(row)}")
    kept = {name: value for name, value in row.items() if name not in names.values()}
    return kept | {target: row[source] for target, source in names.items()}


def mapping(texts: Sequence[str]) -> dict[str, str]:
    """Columns to rename, from texts such as `prompt=question,chosen=good`.

    Raises: ConfigError for a text without `=`, or a column that no layout has.
    """
    found: dict[str, str] = {}
    for part in (part for text in texts for part in text.split(",")):
        target, equals, source = (piece.strip() for piece in part.partition("="))
        known = {*COMMON, *(name for one in LAYOUTS for name in (*one.columns, *one.meanings))}
        if not equals or not source:
            raise ConfigError(f"--map {part}: write COLUMN=YOURS, such as --map prompt=question")
        if target not in known:
            raise ConfigError(f"--map {part}: {yamlio.did_you_mean(target, sorted(known))}")
        found[target] = source
    return found


def parse(row: Any, names: Mapping[str, str] | None = None) -> Record:
    """What a row holds, by the columns that are filled.

    Args:
        row: A mapping from columns to values, or a text, which is a prompt.
        names: Columns to rename first: `{"chosen": "good"}` reads `good` as `chosen`.

    Raises: ValueError that says why the row cannot be kept, for the person whose file it is.
    """
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, Mapping):
        raise ValueError(f"is {yamlio.describe(row)}; must be text or an object")
    row = rename(row, names) if names else row
    layout = layout_of(row)
    if layout is None:
        raise ValueError(
            "has none of the columns of a known layout, such as prompt, chosen and rejected; "
            f"its fields are: {_fields(row)}"
        )
    record = layout.read(row)
    record.layout = record.layout or layout.name
    record.tools = record.tools or tools_of(row)
    used = {*layout.columns, *_filled(row, (*PROMPTS, *SYSTEMS, "input", "history", "tools"))}
    meanings = {**COMMON, **layout.meanings}
    record.columns = {name: meanings.get(name, name) for name in row if name in used | {*meanings}}
    if images := _filled(row, ("images", "image", "videos", "audios")):
        raise ValueError(f"has {images[0]}, which a text model cannot be shown")
    return record


def _fields(row: Row) -> str:
    return ", ".join(map(str, row)) or "none"


def _filled(row: Row, names: Sequence[str]) -> list[str]:
    """Which of these columns hold something."""
    return [name for name in names if row.get(name) not in (None, "", [], {})]


def tools_of(row: Row) -> list[dict[str, Any]]:
    """The tools that a row's conversation may call. Raises: ValueError."""
    tools = row.get("tools") or []
    if isinstance(tools, str):  # many data sets write them as JSON
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError("tools are no JSON") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools are {yamlio.describe(tools)}; must be a list of objects")
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    """Without the null fields that a table adds where other rows' objects have them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


# --- turns --------------------------------------------------------------------------------------


def turns_of(value: Any, role: str = "user") -> Turns:
    """A conversation from a text, one turn, a list of turns, or an HH-RLHF transcript.

    Args:
        value: Text of one turn of `role`; a turn; turns with the names of OpenAI (role, content)
            or of ShareGPT (from, value); a transcript ("\\n\\nHuman: ...\\n\\nAssistant: ...").
        role: Whose turn a text is.

    Raises: ValueError that names the turn that cannot be kept.
    """  # noqa: D301
    if isinstance(value, str) and WRITTEN.match(value):
        value = _written_turns(value, role)
    if isinstance(value, str):
        if BEGINS.match(value):
            value = f"\n\n{value.lstrip()}"
        if not TURN.match(value):
            return [{"role": role, "content": value}]
        parts = TURN.split(value)[1:]
        return [
            {"role": SPEAKERS[who], "content": text.strip()}
            for who, text in zip(parts[::2], parts[1::2], strict=True)
        ]
    if isinstance(value, Mapping) and ("content" in value or "value" in value):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"the {role_noun(role)} is {yamlio.describe(value)}; must be text or a list of turns"
        )
    return [_turn(one, number) for number, one in enumerate(value, 1)]


def _written_turns(text: str, role: str) -> list[Any]:
    """The list of turns that a text is, as JSON or as Python writes it. Raises: ValueError."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return list(read(text))
    raise ValueError(
        f"the {role_noun(role)} looks like a list of turns that was written as text, and cannot be "
        f"read back: {text.strip()[:60]!r}. Write the table as JSONL or Parquet"
    )


def role_noun(role: str) -> str:
    """What a text of this role is called in messages."""
    return "answer" if role == "assistant" else "prompt"


def _turn(value: Any, number: int) -> Turn:
    if not isinstance(value, Mapping):
        raise ValueError(f"turn {number} is {yamlio.describe(value)}; must have role and content")
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if role not in ROLES:
        raise ValueError(
            f"turn {number} has the role {yamlio.describe(role)}; must be system, user, assistant "
            "or tool"
        )
    if role == "function_call":  # ShareGPT writes the calls as the turn's text
        turn: Turn = {"role": "assistant", "content": "", "tool_calls": _calls(content, number)}
        return turn
    if calls := _calls(value.get("tool_calls") or value.get("function_call"), number):
        content = "" if content is None else content
    turn = {"role": ROLES[role], "content": _content(content, number)}
    if calls and turn["role"] != "assistant":
        raise ValueError(f"turn {number} is the {role}'s and has tool_calls")
    if calls:
        turn["tool_calls"] = calls
    for name in ("reasoning_content", "tool_call_id", "name"):
        if isinstance(value.get(name), str) and value[name]:
            turn[name] = value[name]
    return turn


def _content(content: Any, number: int) -> str:
    if isinstance(content, list | tuple) and all(isinstance(part, Mapping) for part in content):
        other = [part.get("type") for part in content if part.get("type") != "text"]
        if other:
            raise ValueError(f"turn {number} has a part of type {other[0]}; only text can be kept")
        content = "".join(str(part.get("text") or "") for part in content)
    if content is None:
        raise ValueError(f"turn {number} has null as content, and no tool_calls")
    if not isinstance(content, str):
        raise ValueError(f"turn {number} has {yamlio.describe(content)} as content; must be text")
    return content


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls as chat templates take them, `{type, function: {name, arguments}}`, with the
    arguments as an object, which a template writes as JSON once.
    """
    if value in (None, "", []):
        return []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"turn {number} has a function call that is no JSON") from None
    made = []
    for call in value if isinstance(value, list | tuple) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"turn {number} has a tool call without the name of a function")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            with suppress(ValueError):  # a call that the model got wrong is kept as it is
                arguments = json.loads(arguments)
        made.append(
            {
                "type": "function",
                **({"id": call["id"]} if isinstance(call.get("id"), str) else {}),
                "function": {"name": function["name"], "arguments": _without_nulls(arguments)},
            }
        )
    return made


def check_prompt(turns: Turns) -> Turns:
    """The prompt, checked: system turns stand first alone, none is empty, the last is the user's or
    a tool's. Raises: ValueError.
    """
    if not turns:
        raise ValueError("the conversation has no turns")
    for number, turn in enumerate(turns, 1):
        if turn["role"] == "system" and number > 1:
            raise ValueError(f"turn {number} is a system message; only the first turn may be")
        if turn["role"] == "tool" and (number == 1 or turns[number - 2]["role"] in NO_CALLERS):
            raise ValueError(f"turn {number} is a tool's result, and no call stands before it")
        if not turn["content"].strip() and not turn.get("tool_calls") and turn["role"] != "tool":
            raise ValueError("the prompt is empty" if number == 1 else f"turn {number} is empty")
    if turns[-1]["role"] == "assistant":
        raise ValueError("ends with the assistant's turn; a prompt ends with the user's")
    if turns[-1]["role"] == "system":
        raise ValueError("has no user turn")
    return turns


def answer_text(turn: Turn) -> str:
    """An answer as a store keeps it: its text with its tool calls. Raises: ValueError where it
    thinks apart.
    """
    if turn.get("reasoning_content"):
        raise ValueError(
            "an answer has reasoning_content, which a store of texts cannot hold; train on the file itself"
        )
    return join_calls(turn["content"], turn.get("tool_calls", ()))


# --- prompts and answers of a row ---------------------------------------------------------------


def prompt_of(row: Row, column: str | None = None) -> Turns:
    """The prompt of a row: the named column, or the first of `PROMPTS` that is filled; with the
    texts of `system`, `history` and `input`. Empty where there is none.
    """
    name = column or next((n for n in (*PROMPTS, "input") if row.get(n) is not None), None)
    if name is None:
        return []
    value = row[name]
    if isinstance(value, str) and name != "input" and _filled(row, ("input",)):
        if not isinstance(row["input"], str):
            raise ValueError(f"input is {yamlio.describe(row['input'])}; must be text")
        value = f"{value}\n{row['input']}"
    turns = turns_of(value)
    if turns and turns[-1]["role"] == "assistant" and not _says(turns[-1]):
        turns = turns[:-1]  # a transcript that stops where the answer begins
    for said, answer in reversed(row.get("history") or ()):  # Alpaca's earlier turns
        turns = [*turns_of(said), *turns_of(answer, "assistant"), *turns]
    return with_system(row, turns)


def with_system(row: Row, turns: Turns) -> Turns:
    """The conversation, begun with the row's system text where it has one."""
    names = _filled(row, SYSTEMS)
    if not names:
        return turns
    text = row[names[0]]
    if not isinstance(text, str):
        raise ValueError(f"{names[0]} is {yamlio.describe(text)}; must be text")
    if turns and turns[0]["role"] == "system":
        if turns[0]["content"] != text:
            raise ValueError(f"{names[0]} is another text than the conversation's system turn")
        return turns
    return [{"role": "system", "content": text}, *turns] if text.strip() else turns


def _says(turn: Turn) -> bool:
    return bool(turn["content"].strip() or turn.get("tool_calls"))


def _answer(value: Any, name: str) -> Turn:
    """One answer: text, or one turn of the assistant."""
    turns = turns_of(value, "assistant")
    if len(turns) != 1:
        raise ValueError(f"{name} must be one answer, not {len(turns)} turns")
    return _checked(turns[0], name)


def _checked(turn: Turn, name: str) -> Turn:
    if turn["role"] != "assistant":
        raise ValueError(
            f"{name} ends with the turn of {yamlio.describe(turn['role'])}; the last must be the "
            "assistant's"
        )
    if not _says(turn):
        raise ValueError(f"the answer of {name} is empty; must be text")
    return turn


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f"{name} is {yamlio.describe(value)}; must be a number")
    return float(value)


def _required(row: Row) -> Turns:
    prompt = prompt_of(row)
    if not prompt:
        raise ValueError(f"has no prompt: give one of {', '.join(PROMPTS)}")
    return check_prompt(prompt)


def _two(row: Row, first: str, second: str, p: float, prompt: Turns | None = None) -> Record:
    """Two answers in columns of their own, the first better with probability `p`."""
    answers = [_answer(row.get(name), name) for name in (first, second)]
    return Record("", prompt or _required(row), answers, pairs=[(0, 1, p)])


# --- layouts ------------------------------------------------------------------------------------


def _pair(row: Row) -> Record:
    """`chosen` and `rejected`: an answer each, or a whole conversation each."""
    sides = {name: _side(row, name) for name in ("chosen", "rejected")}
    given = prompt_of(row)
    whole = [turns[0]["role"] in ("system", "user") for turns in sides.values()]
    if whole[0] != whole[1]:
        raise ValueError("one of chosen and rejected is a whole conversation, the other an answer")
    if whole[0]:
        if given == sides["chosen"]:  # `messages` repeats the chosen conversation
            given = []
        prompt = _common_prefix(sides)
        _check_agrees(given, prompt)
    else:
        if not given:
            raise ValueError(
                'has no prompt: give "prompt", or conversations in chosen and rejected'
            )
        sides = {name: [*given, *turns] for name, turns in sides.items()}
        prompt = _common_prefix(sides)
    if row.get("two_contexts"):
        return _compared(sides, _p_chosen(row), "trl")
    answers = [_last(turns, name, len(prompt)) for name, turns in sides.items()]
    text = row["chosen"] if isinstance(row["chosen"], str) else ""
    transcript = TURN.match(text) or BEGINS.match(text)
    layout = "hh-rlhf" if transcript else "trl"
    return Record(layout, check_prompt(prompt), answers, pairs=[(0, 1, _p_chosen(row))])


def _side(row: Row, name: str) -> Turns:
    """The turns of `chosen` or `rejected`, the last of which is the assistant's."""
    if row[name] is None:
        raise ValueError(f"{name} is null")
    turns = turns_of(row[name], "assistant")
    if not turns:
        raise ValueError(f"{name} has no turns")
    _checked(turns[-1], name)
    return with_system(row, turns) if turns[0]["role"] in ("system", "user") else turns


def _common_prefix(sides: Mapping[str, Turns]) -> Turns:
    """The turns that both conversations begin with, at least one left to each."""
    one, other = sides.values()
    most = min(len(one), len(other)) - 1
    n = next((i for i in range(most) if one[i] != other[i]), most)
    return one[:n]


def _last(turns: Turns, name: str, n: int) -> Turn:
    """The only turn after the first `n`."""
    if turns[-1]["role"] == "assistant" and len(turns) > n + 1:
        more = "; if each answer follows other turns on purpose, add two_contexts: true to the row"
        raise ValueError(
            f"{name} must be one answer to the prompt, or the prompt and one answer; here the two "
            f"conversations part before their last turn (at turn {n + 1} of {len(turns)})"
            + (more if name in ("chosen", "rejected") else "")
        )
    return _checked(turns[-1], name)


def _compared(sides: Mapping[str, Turns], p: float, layout: str = "") -> Record:
    """Two conversations that end with the answers that were compared, the first one better with
    probability `p`. Where they differ before, each answer has a context of its own.
    """
    if empty := [name for name, turns in sides.items() if not turns]:
        raise ValueError(f"{empty[0]} has no turns")
    answers = [_checked(turns[-1], name) for name, turns in sides.items()]
    prompt = _common_prefix(sides)
    n = len(prompt)
    if not all(len(turns) > n + 1 for turns in sides.values()):
        answers = [_last(turns, name, n) for name, turns in sides.items()]
        return Record(layout, check_prompt(prompt), answers, pairs=[(0, 1, p)])
    for turns in sides.values():
        check_prompt(turns[:-1])
    if all(turn["role"] == "system" for turn in prompt):
        raise ValueError("the two conversations begin with different questions")
    contexts = [turns[n:-1] for turns in sides.values()]
    return Record(layout, prompt, answers, contexts, [(0, 1, p)])


def _check_agrees(given: Turns, prompt: Turns) -> None:
    """Raises: ValueError where `given`, the row's own prompt, is neither how the conversations
    begin nor how their common part ends.
    """

    def plain(turns: Turns) -> list[tuple[str, str]]:
        return [(t["role"], " ".join(t["content"].split())) for t in turns if t["role"] != "system"]

    mine, common = plain(given), plain(prompt)
    if mine != common[: len(mine)] and mine != common[-len(mine) :]:
        raise ValueError(
            "its prompt is not what the conversations of chosen and rejected begin with; leave one "
            "of the two out"
        )


def _p_chosen(row: Row) -> float:
    """The probability of a pair: its own, else 1; a half where both have the same score."""
    if row.get("p_chosen") is not None:
        p = _number(row["p_chosen"], "p_chosen")
        if not 0 <= p <= 1:
            raise ValueError(f"p_chosen is {p}; it is a probability, from 0 to 1")
        return p
    if row.get("score_chosen") is None or row.get("score_rejected") is None:
        return 1.0
    up, down = (_number(row[name], name) for name in ("score_chosen", "score_rejected"))
    if up < down:
        raise ValueError(f"chosen has the lower score ({up:g} against {down:g}); exchange the two")
    return 0.5 if up == down else 1.0


def _compare(values: Sequence[float]) -> list[Pair]:
    """Every two answers, the one of the higher value better; equal ones are a tie.

    Raises: ValueError for more answers than are compared.
    """
    if len(values) > MAX_ANSWERS:
        raise ValueError(f"has {len(values):,} answers to one prompt; at most {MAX_ANSWERS}")
    return [
        (a, b, 0.5 if values[a] == values[b] else float(values[a] > values[b]))
        for a, b in combinations(range(len(values)), 2)
    ]


def _openai(row: Row) -> Record:
    """OpenAI's pairs for fine-tuning: `input` has the conversation and its tools."""
    asked = row["input"]
    if not isinstance(asked, Mapping) or not asked.get("messages"):
        raise ValueError("input must be an object with messages")
    answers = [_answer(row[name], name) for name in ("preferred_output", "non_preferred_output")]
    record = Record("", check_prompt(turns_of(asked["messages"])), answers, pairs=[(0, 1, 1.0)])
    record.tools = tools_of(asked)
    return record


def _ultrafeedback(row: Row) -> Record:
    found = row["completions"]
    if not isinstance(found, list) or len(found) < 2:
        raise ValueError("completions must be a list of two or more")
    by = next(
        (s for s in SCORES if all(isinstance(c, dict) and c.get(s) is not None for c in found)),
        None,
    )
    if by is None:
        raise ValueError(
            f"completions need a score each, all by the same name: {', '.join(SCORES)}"
        )
    answers = [_answer(c.get("response"), f"completion {i}") for i, c in enumerate(found, 1)]
    scores = [_number(c[by], f"{by} of completion {i}") for i, c in enumerate(found, 1)]
    return Record("", _required(row), answers, pairs=_compare(scores))


def _nectar(row: Row) -> Record:
    found = row["answers"]
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(a, dict) for a in found):
        raise ValueError("answers must be a list of two or more, with answer and rank each")
    answers = [_answer(a.get("answer"), f"answer {i}") for i, a in enumerate(found, 1)]
    ranks = [-_number(a.get("rank"), f"the rank of answer {i}") for i, a in enumerate(found, 1)]
    return Record("", _required(row), answers, pairs=_compare(ranks))


def _by_sign(row: Row, column: str) -> float:
    """P(the first is better) from a strength that is negative where the first one is."""
    strength = _number(row[column], column)
    return 0.5 if strength == 0 else float(strength < 0)


def _helpsteer2(row: Row) -> Record:
    return _two(row, "response_1", "response_2", _by_sign(row, "preference_strength"))


def _helpsteer3(row: Row) -> Record:
    prompt = check_prompt(with_system(row, turns_of(row["context"])))
    return _two(row, "response1", "response2", _by_sign(row, "overall_preference"), prompt)


def _saferlhf(row: Row) -> Record:
    better = row["better_response_id"]
    if better not in (0, 1):
        raise ValueError(f"better_response_id is {yamlio.describe(better)}; must be 0 or 1")
    return _two(row, "response_0", "response_1", float(better == 0))


def _numbered(row: Row) -> Record:
    if str(row["label"]) not in ("1", "2"):
        raise ValueError(f"label is {yamlio.describe(row['label'])}; must be 1 or 2")
    prompt = check_prompt(prompt_of(row, "input"))
    return _two(row, "output_1", "output_2", float(str(row["label"]) == "1"), prompt)


def _arena(row: Row) -> Record:
    """Two models' conversations and a winner (Arena, LMSYS, MT-Bench). `turn: 1` judges the first
    answers alone.
    """
    if row["winner"] not in WINNERS:
        raise ValueError(
            f"winner is {yamlio.describe(row['winner'])}; must be one of {', '.join(WINNERS)}"
        )
    sides = {n: with_system(row, turns_of(row[n])) for n in ("conversation_a", "conversation_b")}
    if row.get("turn") == 1:
        ends = {
            n: [t["role"] for t in turns].index("assistant") + 1
            for n, turns in sides.items()
            if any(t["role"] == "assistant" for t in turns)
        }
        sides = {n: turns[: ends.get(n)] for n, turns in sides.items()}
    return _compared(sides, WINNERS[row["winner"]])


def _arena_columns(row: Row) -> Record:
    """The Arena's table: the user's turns, and each model's, as lists of texts."""
    said, a, b = (_texts(row[name], name) for name in ("prompt", "response_a", "response_b"))
    votes = [bool(row.get(f"winner_{name}")) for name in ("model_a", "model_b", "tie")]
    if sum(votes) != 1:
        raise ValueError("exactly one of winner_model_a, winner_model_b and winner_tie must be 1")
    if len(said) != len(a) or len(a) != len(b):
        raise ValueError("prompt, response_a and response_b have different numbers of turns")
    sides = {
        name: [
            turn
            for question, answer in zip(said, texts, strict=True)
            for turn in (*turns_of(question), {"role": "assistant", "content": answer})
        ]
        for name, texts in (("response_a", a), ("response_b", b))
    }
    return _compared(sides, (1.0, 0.0, 0.5)[votes.index(True)])


def _texts(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except ValueError:
            found = value
        value = found if isinstance(found, list) else [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name} must be a text, or a list of texts")
    return value


def _labelled(row: Row) -> Record:
    label = row["label"]
    if label not in (0, 1):  # True and False are
        raise ValueError(f"label is {yamlio.describe(label)}; must be true or false")
    answers = [_answer(row["completion"], "completion")]
    return Record("", _required(row), answers, label=bool(label))


def _demonstration(row: Row) -> Record:
    """A prompt and its answer in one of the usual columns."""
    name = next(name for name in ANSWERS if row.get(name) is not None)
    turns = turns_of(row[name], "assistant")
    prompt = _required(row)
    if len(turns) == 1:
        return Record("", prompt, [_checked(turns[0], name)])
    return Record("", prompt, talk=_checked_talk([*prompt, *turns]))


ANSWERS = ("completion", "response", "output", "answer")


def _conversation(row: Row) -> Record:
    """A whole conversation: a demonstration where it ends with the assistant, else a prompt."""
    talk = prompt_of(row)
    if talk and talk[-1]["role"] == "assistant":
        return Record("", talk=_checked_talk(talk))
    return Record("", check_prompt(talk))


def _checked_talk(talk: Turns) -> Turns:
    check_prompt(talk[:-1])
    _checked(talk[-1], "the conversation")
    return talk


def _prompt(row: Row) -> Record:
    return Record("", _required(row))


COMMON = {
    "prompt": "the prompt",
    "question": "the prompt",
    "instruction": "the prompt",
    "query": "the prompt",
    "messages": "the conversation",
    "conversations": "the conversation",
    "conversation": "the conversation",
    "context": "the prompt",
    "input": "the prompt's second part",
    "history": "earlier turns",
    "system": "the system turn",
    "system_prompt": "the system turn",
    "tools": "the tools",
    "id": "the prompt's id",
    "group": "the group that stays on one side of a split",
    "split": "the split",
    "tags": "tags",
    "rubric": "the prompt's own rubric",
    "weight": "the weight of the loss",
    "p_chosen": "P(chosen is better)",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """One layout of rows: the columns it is known by, how it is read, and what the columns mean."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Record]
    meanings: Mapping[str, str]


# In the order in which they are tried: a row may have the columns of several.
LAYOUTS = (
    Layout("ultrafeedback", ("completions",), _ultrafeedback, {"completions": "scored answers"}),
    Layout("nectar", ("prompt", "answers"), _nectar, {"answers": "ranked answers"}),
    Layout(
        "arena",
        ("conversation_a", "conversation_b", "winner"),
        _arena,
        {
            "conversation_a": "the first conversation",
            "conversation_b": "the second conversation",
            "winner": "which is better",
            "turn": "the turn that was judged",
        },
    ),
    Layout(
        "arena-columns",
        ("prompt", "response_a", "response_b", "winner_model_a"),
        _arena_columns,
        {
            "response_a": "the first answer",
            "response_b": "the second answer",
            "winner_model_a": "the first is better",
            "winner_model_b": "the second is better",
            "winner_tie": "a tie",
        },
    ),
    Layout(
        "helpsteer3",
        ("context", "response1", "response2", "overall_preference"),
        _helpsteer3,
        {
            "response1": "the first answer",
            "response2": "the second answer",
            "overall_preference": "which is better: below 0 the first, 0 a tie",
        },
    ),
    Layout(
        "helpsteer2-preference",
        ("prompt", "response_1", "response_2", "preference_strength"),
        _helpsteer2,
        {
            "response_1": "the first answer",
            "response_2": "the second answer",
            "preference_strength": "which is better: below 0 the first, 0 a tie",
        },
    ),
    Layout(
        "pku-saferlhf",
        ("prompt", "response_0", "response_1", "better_response_id"),
        _saferlhf,
        {
            "response_0": "the first answer",
            "response_1": "the second answer",
            "better_response_id": "which is better (safer: map better_response_id=safer_response_id)",
        },
    ),
    Layout(
        "openai",
        ("input", "preferred_output", "non_preferred_output"),
        _openai,
        {
            "input": "the prompt and its tools",
            "preferred_output": "the better answer",
            "non_preferred_output": "the worse answer",
        },
    ),
    Layout(
        "llmbar",
        ("input", "output_1", "output_2", "label"),
        _numbered,
        {
            "input": "the prompt",
            "output_1": "the first answer",
            "output_2": "the second answer",
            "label": "the number of the better one",
        },
    ),
    Layout(
        "trl",
        ("chosen", "rejected"),
        _pair,
        {
            "chosen": "the better answer",
            "rejected": "the worse answer",
            "two_contexts": "whether each answer follows other turns, on purpose",
            "score_chosen": "the chosen answer's score; equal scores are a tie",
            "score_rejected": "the rejected answer's score",
        },
    ),
    Layout(
        "unpaired",
        ("completion", "label"),
        _labelled,
        {"completion": "the answer", "label": "whether it is good"},
    ),
    *(Layout("demonstration", (name,), _demonstration, {name: "the answer"}) for name in ANSWERS),
    Layout("conversation", ("messages",), _conversation, {}),
    Layout("conversation", ("conversations",), _conversation, {}),
    Layout("conversation", ("conversation",), _conversation, {}),
    *(
        Layout("prompt", (name,), _prompt, {})
        for name in ("prompt", "question", "instruction", "query")
    ),
)


def layout_of(row: Row) -> Layout | None:
    """The first layout all of whose columns the row has; of columns that are null in this row, only
    `chosen` and `rejected` count.
    """
    there = {name for name in row if row[name] is not None or name in ("chosen", "rejected")}
    found = (layout for layout in LAYOUTS if there.issuperset(layout.columns))
    return next(found, None)
