"""TRL 1.9's experimental PPO for benchmarks/ppo_speed.py: after every step one line of JSON, then
it waits to be told to go on.

Runs in an environment of its own (`make peers-venvs`). Generation is timed and answers' tokens are
counted (up to and with the first end token) around its own function; nothing else of it is touched.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(folder: Path) -> None:
    """Train as `settings.json` in the folder says."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    s = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(s["threads"])
    tokenizer = AutoTokenizer.from_pretrained(s["model"], padding_side="left")
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(s["model"], dtype="float32") for _ in range(2)
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(s["reward"], dtype="float32")
        for _ in range(2)
    )
    seen = {"generation_s": 0.0, "tokens": 0}
    theirs = ppo_trainer.batch_generation

    def timed(model, queries, *args, **kwargs):
        began = time.perf_counter()
        answers, logits = theirs(model, queries, *args, **kwargs)
        seen["generation_s"] = time.perf_counter() - began
        new = answers[:, queries.shape[1] :]
        ends = new == tokenizer.eos_token_id
        seen["tokens"] = int((ends.cumsum(1) - ends.long() == 0).sum())
        return answers, logits

    ppo_trainer.batch_generation = timed

    class Turns(TrainerCallback):
        """Says what a step made, and waits."""

        def on_train_begin(self, *_, **__):
            sys.stdin.readline()

        def on_step_end(self, *_, **__):
            print("STEP " + json.dumps(seen), flush=True)
            sys.stdin.readline()

    rows = json.loads((folder / "prompts.json").read_text())
    args = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=s["micro"],
        gradient_accumulation_steps=s["batch"] // s["micro"],
        num_mini_batches=s["minibatches"],
        num_ppo_epochs=s["epochs"],
        total_episodes=s["batch"] * s["steps"],
        local_rollout_forward_batch_size=s["batch"],
        response_length=s["max_new_tokens"],
        stop_token="eos",
        missing_eos_penalty=1.0,
        learning_rate=s["learning_rate"],
        kl_coef=s["beta"],
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        seed=0,
        temperature=1.0,
    )
    trainer = PPOTrainer(
        args,
        tokenizer,
        policy,
        reference,
        reward,
        Dataset.from_list([{"input_ids": ids} for ids in rows]),
        value,
        callbacks=[Turns()],
    )
    print(f"gradient checkpointing: {policy.is_gradient_checkpointing}", file=sys.stderr)
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
