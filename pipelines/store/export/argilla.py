"""The format `argilla`: pairs as records that people check in Argilla 2, with the judges'
preference as a suggestion.

The records have the fields and the question of `prefab label --export argilla` (docs/panels.md has
the settings of the dataset). That command shows comparisons without what the judges said; these
records show it.
"""

from __future__ import annotations

from prefab.pipelines.store.export.layouts import TURNS, Layout, LayoutFormat, Row, plain, text


def _record(row: Row) -> Row | None:
    """A record. Which answer is shown first depends on the id alone, not on which one won."""
    chosen, rejected = text(row["chosen"]), text(row["rejected"])
    if not plain(row) or chosen is None or rejected is None:
        return None
    swapped = int(row["preference"][:8], 16) % 2 == 1
    first, second = (rejected, chosen) if swapped else (chosen, rejected)
    suggestion = {"value": "b" if swapped else "a", "score": row["p_chosen"], "agent": row["run"]}
    turns = row["prompt"]
    return {
        "id": row["preference"],
        "fields": {
            "conversation": turns,
            "question": turns[-1]["content"],
            "answer_a": first,
            "answer_b": second,
        },
        "metadata": {"prompt_id": row["prompt_id"], "p_chosen": row["p_chosen"]},
        "suggestions": {"label": suggestion},
        "responses": {},
        "vectors": {},
    }


ARGILLA = LayoutFormat({"records": Layout("preference", _record, TURNS)}, suffix="json")
