"""The formats `llama_factory` (LLaMA-Factory's sharegpt) and `llama_factory_alpaca`, each with the
`dataset_info.json` that names its datasets: `dataset_dir` is the folder of the export.

sharegpt holds conversations in which user and assistant take turns, with calls of tools; alpaca one
question with at most one system text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prefab.pipelines.store.export.layouts import (
    ONE_TURN,
    Layout,
    LayoutFormat,
    Make,
    Row,
    Settings,
    Turn,
    one_turn,
    text,
)

SETTINGS = "dataset_info.json"
ALTERNATING = "this layout holds conversations in which user and assistant take turns"
FROM = {"user": "human", "assistant": "gpt", "tool": "observation"}
# which of a conversation's roles may stand at even and at odd places
PLACES = (("human", "observation"), ("gpt", "function_call"))


def _sharegpt(turns: list[Turn]) -> tuple[str, list[dict[str, str]]] | None:
    """The system text and the turns; None where they do not alternate or a turn has text and calls
    of tools.
    """
    system = ""
    if turns and turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    made = []
    for place, turn in enumerate(turns):
        calls = turn.get("tool_calls")
        if calls and turn["content"]:
            return None
        role = "function_call" if calls else FROM.get(turn["role"], "")
        if role not in PLACES[place % 2]:
            return None
        made.append({"from": role, "value": _calls(calls) if calls else str(turn["content"])})
    return system, made


def _calls(calls: list[dict[str, Any]]) -> str:
    """Calls as LLaMA-Factory reads them: JSON of names and arguments."""
    functions = [call["function"] for call in calls]
    return json.dumps(
        [
            {"name": function["name"], "arguments": _arguments(function["arguments"])}
            for function in functions
        ],
        ensure_ascii=False,
    )


def _arguments(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _head(row: Row, system: str) -> Row:
    return {"system": system, "tools": row.get("tools") or ""}


def _pairs(row: Row) -> Row | None:
    talk = _sharegpt(row["prompt"])
    sides = [_sharegpt(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
    if talk is None or None in sides:
        return None
    chosen, rejected = (side[1][-1] for side in sides if side)
    return {
        "conversations": talk[1],
        "chosen": chosen,
        "rejected": rejected,
        **_head(row, talk[0]),
        "p_chosen": row["p_chosen"],
        "preference": row["preference"],
    }


def _whole(row: Row) -> Row | None:
    talk = _sharegpt(row["prompt"] + row["completion"])
    return talk and {"conversations": talk[1], **_head(row, talk[0])}


def _rated(row: Row) -> Row | None:
    made = _whole(row)
    return made and {**made, "kto_tag": row["label"]}


def _alpaca(*answers: str) -> Make:
    """The function that writes a question as `instruction`, and answers under these names of
    `trl`. `history` is not written: `datasets` cannot read a file whose first 10 MB have none.
    """

    def row(of: Row) -> Row | None:
        question, texts = one_turn(of), {name: text(of[name]) for name in answers}
        if question is None or None in texts.values():
            return None
        output = {"output" if name == "completion" else name: told for name, told in texts.items()}
        rated = {"kto_tag": of["label"]} if "label" in of else {}
        return {"instruction": question[1], "input": "", "system": question[0], **output, **rated}

    return row


def _settings(formatting: str) -> Settings:
    """The function that writes `dataset_info.json`: an entry a dataset and split, with the columns
    that its rows have.
    """
    of_talk = {"messages": "conversations", "system": "system", "tools": "tools"}
    of_turn = {
        "prompt": "instruction",
        "query": "input",
        "system": "system",
    }
    pair = {"chosen": "chosen", "rejected": "rejected"}
    answer = {} if formatting == "sharegpt" else {"response": "output"}
    more = {
        "preference": pair,
        "unpaired": {**answer, "kto_tag": "kto_tag"},
        "sft": answer,
        "prompts": {},
    }

    def files_of(files: Mapping[str, str]) -> dict[str, str]:
        entries = {}
        for place, file in files.items():
            name, split = place.split("/")
            columns = {**(of_talk if formatting == "sharegpt" else of_turn), **more[name]}
            entries[f"{name}_{split}"] = {
                "file_name": file,
                "formatting": formatting,
                **({"ranking": True} if name == "preference" else {}),
                "columns": columns,
            }
        return {SETTINGS: json.dumps(entries, indent=2) + "\n"}

    return files_of


LLAMA_FACTORY = LayoutFormat(
    {
        "preference": Layout("preference", _pairs, ALTERNATING),
        "unpaired": Layout("unpaired", _rated, ALTERNATING),
        "sft": Layout("sft", _whole, ALTERNATING),
    },
    _settings("sharegpt"),
)
LLAMA_FACTORY_ALPACA = LayoutFormat(
    {
        "preference": Layout("preference", _alpaca("chosen", "rejected"), ONE_TURN),
        "unpaired": Layout("unpaired", _alpaca("completion"), ONE_TURN),
        "prompts": Layout("prompts", _alpaca(), ONE_TURN),
        "sft": Layout("sft", _alpaca("completion"), ONE_TURN),
    },
    _settings("alpaca"),
)
