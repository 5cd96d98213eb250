"""The format `text`: TRL's standard format, in which prompt and answers are texts and not turns.

It holds prompts of one user turn without a system text, for which TRL has no column. No chat
template is applied: for chat models `trl` is the better format.
"""

from __future__ import annotations

from typing import Any

from prefab.pipelines.store.export.layouts import (
    QUESTION,
    Layout,
    LayoutFormat,
    Make,
    Row,
    one_turn,
    text,
)


def texts(system: bool, *answers: str) -> Make:
    """The function that writes prompt and answers as texts and keeps the other columns; `system`
    says whether a system text has a column of its own.
    """

    def row(of: Row) -> Row | None:
        question = one_turn(of)
        made: dict[str, Any] = {name: text(of[name]) for name in answers}
        if question is None or None in made.values() or (question[0] and not system):
            return None
        head = {"system": question[0]} if system else {}
        rest = {name: of[name] for name in of if name not in ("prompt", "tools", "split", *answers)}
        return {**head, "prompt": question[1], **made, **rest}

    return row


ANSWERS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "unpaired": ("completion",),
    "prompts": (),
    "sft": ("completion",),
}
TEXT = LayoutFormat(
    {name: Layout(name, texts(False, *answers), QUESTION) for name, answers in ANSWERS.items()}
)
