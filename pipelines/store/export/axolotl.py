"""The format `axolotl`: rows for axolotl's strategies, with the lines of its configuration.

`preference` is for `rl: dpo` (`type: chat_template.default`), `unpaired` for `rl: kto`, `sft` for
`type: chat_template`, `reward` for reward models (`type: bradley_terry.chat_template`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from prefab.pipelines.store.export.layouts import (
    ONE_TURN,
    QUESTION,
    TURNS,
    Layout,
    LayoutFormat,
    Row,
    messages,
    one_turn,
    plain,
    text,
)

SETTINGS = "axolotl.yaml"
STRATEGIES: dict[str, dict[str, Any]] = {
    "preference": {"type": "chat_template.default", "field_messages": "messages"},
    "unpaired": {"type": {"field_prompt": "instruction", "field_completion": "completion"}},
    "reward": {"type": "bradley_terry.chat_template"},
    "sft": {"type": "chat_template", "field_messages": "messages"},
}


def _preference(row: Row) -> Row | None:
    if not plain(row, "chosen", "rejected"):
        return None
    return {
        "messages": row["prompt"],
        "chosen": row["chosen"][0],
        "rejected": row["rejected"][0],
        "p_chosen": row["p_chosen"],
        "preference": row["preference"],
    }


def _reward(row: Row) -> Row | None:
    question, chosen, rejected = one_turn(row), text(row["chosen"]), text(row["rejected"])
    if question is None or chosen is None or rejected is None:
        return None
    system, prompt = question
    return {"system": system, "input": prompt, "chosen": chosen, "rejected": rejected}


def _unpaired(row: Row) -> Row | None:
    question, completion = one_turn(row), text(row["completion"])
    if question is None or question[0] or completion is None:
        return None
    return {"instruction": question[1], "completion": completion, "label": row["label"]}


def _settings(files: Mapping[str, str]) -> dict[str, str]:
    blocks = []
    for name, strategy in STRATEGIES.items():
        if file := files.get(f"{name}/train"):
            dataset = {"path": file, "ds_type": "json", "split": "train", **strategy}
            blocks.append(f"# {name}\n{yaml.safe_dump({'datasets': [dataset]}, sort_keys=False)}")
    head = "# The `datasets:` of an axolotl configuration for each dataset of this export.\n"
    return {SETTINGS: "---\n".join([head, *blocks])}


AXOLOTL = LayoutFormat(
    {
        "preference": Layout("preference", _preference, TURNS),
        "reward": Layout("preference", _reward, ONE_TURN),
        "unpaired": Layout("unpaired", _unpaired, QUESTION),
        "prompts": Layout("prompts", lambda row: {"prompt": row["prompt"]}),
        "sft": Layout("sft", messages),
    },
    _settings,
)
