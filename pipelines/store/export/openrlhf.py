"""The format `openrlhf`: rows for OpenRLHF with `--data.apply_chat_template`.

Preferences are read with `--data.prompt_key prompt`, demonstrations with `--data.input_key input
--data.output_key output`, prompts with `--data.input_key input`. A column `margin`, which
OpenRLHF's reward model would add to its loss, is not written.
"""

from __future__ import annotations

from prefab.pipelines.store.export.layouts import TURNS, Layout, LayoutFormat, Row, plain


def _preference(row: Row) -> Row | None:
    if not plain(row, "chosen", "rejected"):
        return None
    names = ("prompt", "chosen", "rejected", "p_chosen", "preference")
    return {name: row[name] for name in names}


def _sft(row: Row) -> Row | None:
    if not plain(row, "completion"):
        return None
    return {"input": row["prompt"], "output": row["completion"]}


def _prompt(row: Row) -> Row | None:
    return {"input": row["prompt"]} if plain(row) else None


OPENRLHF = LayoutFormat(
    {
        "preference": Layout("preference", _preference, TURNS),
        "prompts": Layout("prompts", _prompt, TURNS),
        "sft": Layout("sft", _sft, TURNS),
    }
)
