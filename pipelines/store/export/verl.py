"""The format `verl`: Parquet files for verl.

`prompts` are for `RLHFDataset` (PPO, GRPO) with a reward model, `sft` for `MultiTurnSFTDataset`,
`reward` (texts) for `RMDataset`.
"""

from __future__ import annotations

from prefab.pipelines.store.export.layouts import (
    QUESTION,
    TURNS,
    Layout,
    LayoutFormat,
    Row,
    one_turn,
    plain,
    text,
    text_messages,
)


def _prompt(row: Row) -> Row | None:
    if not plain(row):
        return None
    return {
        "data_source": f"prefab/{row['run']}",
        "prompt": row["prompt"],
        "ability": "preference",
        "reward_model": {"style": "model", "ground_truth": ""},
        "extra_info": {
            "split": row["split"],
            "prompt_id": row["prompt_id"],
            "prompt": row["prompt"],  # what a reward function is given beside the answer
        },
    }


def _reward(row: Row) -> Row | None:
    question, chosen, rejected = one_turn(row), text(row["chosen"]), text(row["rejected"])
    if question is None or question[0] or chosen is None or rejected is None:
        return None
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": question[1], **sides, "p_chosen": row["p_chosen"]}


VERL = LayoutFormat(
    {
        "reward": Layout("preference", _reward, QUESTION),
        "prompts": Layout("prompts", _prompt, TURNS),
        "sft": Layout("sft", text_messages, TURNS),
    },
    suffix="parquet",
)
