"""The format `nemo_rl`: rows for NVIDIA's NeMo RL.

Preferences are in the ranked form of its `PreferenceDataset` (rank 0 is preferred), demonstrations
in the form of its `openai_format`.
"""

from __future__ import annotations

from prefab.pipelines.store.export.layouts import (
    TURNS,
    Layout,
    LayoutFormat,
    Row,
    messages,
    plain,
)


def _preference(row: Row) -> Row | None:
    if not plain(row, "chosen", "rejected"):
        return None
    ranked = [{"rank": i, "completion": row[side]} for i, side in enumerate(("chosen", "rejected"))]
    return {
        "context": row["prompt"],
        "completions": ranked,
        "p_chosen": row["p_chosen"],
        "preference": row["preference"],
    }


NEMO_RL = LayoutFormat(
    {
        "preference": Layout("preference", _preference, TURNS),
        "sft": Layout("sft", messages),
    }
)
