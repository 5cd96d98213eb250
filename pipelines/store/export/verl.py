"""The format `verl`: Parquet files for verl.

`prompts` are for `RLHFDataset` (PPO, GRPO) with a reward model, `sft` for `MultiTurnSFTDataset`,
`reward` (texts) for `RMDataset`. `verl.sh` starts verl on the prompts with a served judge as reward
(`verl_reward.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prefab.pipelines.store.export.launch import KEY, launch_script
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


COMMAND = """export PREFAB_JUDGE_KEY=$key
exec python3 -m verl.trainer.main_ppo \\
    data.train_files={train} data.val_files={val} \\
    data.train_batch_size="$BATCH" data.max_prompt_length=1024 data.max_response_length=1024 \\
    data.filter_overlong_prompts=true \\
    algorithm.adv_estimator=grpo \\
    actor_rollout_ref.model.path="$MODEL" \\
    actor_rollout_ref.actor.ppo_mini_batch_size="$BATCH" actor_rollout_ref.actor.use_dynamic_bsz=true \\
    actor_rollout_ref.actor.use_kl_loss=true actor_rollout_ref.actor.kl_loss_coef=0.001 \\
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \\
    actor_rollout_ref.rollout.tensor_model_parallel_size=1 \\
    reward.custom_reward_function.path="$PWD/verl_reward.py" \\
    reward.custom_reward_function.name=compute_score \\
    trainer.nnodes=1 trainer.n_gpus_per_node="$GPUS" trainer.total_epochs=1 \\
    trainer.val_before_train=false trainer.save_freq=20 'trainer.logger=[console]' \\
    trainer.project_name=prefab trainer.experiment_name=judge "$@"
"""


def _settings(files: Mapping[str, str]) -> dict[str, str]:
    train = files.get("prompts/train")
    if train is None:
        return {}
    command = COMMAND.format(train=train, val=files.get("prompts/validation", train))
    reward = Path(__file__).with_name("verl_reward.py").read_text(encoding="utf-8")
    script = launch_script("verl", "0.9.1", "verl.sh", command, KEY)
    return {"verl.sh": script, "verl_reward.py": reward}


VERL = LayoutFormat(
    {
        "reward": Layout("preference", _reward, QUESTION),
        "prompts": Layout("prompts", _prompt, TURNS),
        "sft": Layout("sft", text_messages, TURNS),
    },
    _settings,
    suffix="parquet",
)
