"""The format `openrlhf`: rows for OpenRLHF with `--data.apply_chat_template`.

Preferences are read with `--data.prompt_key prompt`, demonstrations with `--data.input_key input
--data.output_key output`, prompts with `--data.input_key input`. A column `margin`, which
OpenRLHF's reward model would add to its loss, is not written. `openrlhf.sh` starts OpenRLHF on the
prompts with a served judge, or a reward model, as reward.
"""

from __future__ import annotations

from collections.abc import Mapping

from prefab.pipelines.store.export.launch import KEY, launch_script
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


REWARD_MODEL = """
# REWARD_MODEL: a folder that `prefab train reward` wrote, as reward instead of the judge."""
REWARD = f"""if [[ -n "${{REWARD_MODEL:-}}" ]]; then
    reward=(--reward.model_name_or_path "$REWARD_MODEL" --reward.num_gpus_per_node "$GPUS")
else
    {KEY.strip()}
    reward=(--reward.remote_url "http://127.0.0.1:8100/get_reward?key=$key&unscored=-1")
fi
"""
COMMAND = """exec python3 -m openrlhf.cli.train_ppo_ray \\
    --data.prompt_dataset {train} --data.input_key input --data.apply_chat_template \\
    --actor.model_name_or_path "$MODEL" "${{reward[@]}}" \\
    --actor.num_nodes 1 --actor.num_gpus_per_node "$GPUS" \\
    --ref.num_nodes 1 --ref.num_gpus_per_node "$GPUS" --train.colocate_all \\
    --vllm.num_engines "$GPUS" --vllm.tensor_parallel_size 1 --vllm.gpu_memory_utilization 0.5 \\
    --vllm.enable_sleep --ds.enable_sleep \\
    --algo.advantage.estimator group_norm --rollout.n_samples_per_prompt 8 \\
    --rollout.batch_size "$BATCH" --train.batch_size "$((8 * BATCH))" \\
    --algo.kl.use_loss --algo.kl.estimator k3 --algo.kl.init_coef 0.001 \\
    --data.max_len 2048 --rollout.max_new_tokens 1024 \\
    --ckpt.output_dir trained --ckpt.path checkpoints --ckpt.save_steps 20 "$@"
"""


def _settings(files: Mapping[str, str]) -> dict[str, str]:
    train = files.get("prompts/train")
    if train is None:
        return {}
    command = COMMAND.format(train=train)
    script = launch_script("OpenRLHF", "0.11.2", "openrlhf.sh", command, REWARD, REWARD_MODEL)
    return {"openrlhf.sh": script}


OPENRLHF = LayoutFormat(
    {
        "preference": Layout("preference", _preference, TURNS),
        "prompts": Layout("prompts", _prompt, TURNS),
        "sft": Layout("sft", _sft, TURNS),
    },
    _settings,
)
