"""The format `torchtune`: whole conversations, as `torchtune.datasets.preference_dataset` and
`chat_dataset` (`conversation_style: openai`) read them with `source: json`.
"""

from __future__ import annotations

from prefab.pipelines.store.export.layouts import (
    TURNS,
    Layout,
    LayoutFormat,
    Row,
    only_text,
    plain,
    text_messages,
)


def _preference(row: Row) -> Row | None:
    if not plain(row, "chosen", "rejected"):
        return None
    return {
        "chosen": row["prompt"] + row["chosen"],
        "rejected": row["prompt"] + row["rejected"],
        "p_chosen": row["p_chosen"],
        "preference": row["preference"],
    }


def _conversations(row: Row) -> Row | None:
    if not only_text(row["chosen"] + row["rejected"]):
        return None
    return {name: row[name] for name in ("chosen", "rejected", "p_chosen", "preference")}


TORCHTUNE = LayoutFormat(
    {
        "preference": Layout("preference", _preference, TURNS),
        "conversations": Layout("conversations", _conversations, TURNS),
        "sft": Layout("sft", text_messages, TURNS),
    }
)
