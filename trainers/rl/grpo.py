"""GRPO and RLOO by TRL's trainers, with our rewards on text, our measure of KL, gold beside proxy
and the alarm.

What each setting optimises (`benchmarks/exact_optimum.py` shows it; G answers a group, reference
p):
  rloo                    p(y) exp(r(y) / beta), as PPO: KL is in the reward, counted over the whole
  answer grpo, kl: reverse       a token: p exp(Q / b), Q the final reward expected, b = beta G / (G
  - 1) grpo, kl: forward       a token: b p / (lambda - Q): the other divergence, which keeps more
  of what p says GRPO's KL is a loss term: no token answers for the KL of later ones, and its group
  mean holds the answer itself, which shrinks advantages by (G - 1) / G. With `scale_rewards: group`
  the effective beta differs by prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson

from prefab.factory.errors import ConfigError
from prefab.trainers import distributed
from prefab.trainers.chat import dialect
from prefab.trainers.common import (
    TrainError,
    checkpoints,
    default_device,
    load_policy,
    load_tokenizer,
    lora_config,
    mark_complete,
    translate_errors,
)
from prefab.trainers.registry import Stage
from prefab.trainers.rl import (
    checkpoint,
    evaluation,
    processes,
    rewards,
    rollout,
    sampling,
)
from prefab.trainers.rl import policy_gradient as pg
from prefab.trainers.rl.config import GrpoConfig
from prefab.trainers.rl.models import (
    check_inputs,
    encoded_for_gold,
    measure_call,
    policy_sampler,
    prompts_for,
    rewards_for,
    room_for_prompt,
    transformers_sampler,
)
from prefab.trainers.rl.rewards import Source
from prefab.trainers.rl.rollout import Prompt, SampledAnswer, TransformersSampler
from prefab.trainers.rl.state import GrpoRun, State

STATE = "prefab-state.json"  # beside TRL's own state in a checkpoint


def run(
    config: GrpoConfig,
    prompts: Sequence[Prompt] | None = None,
    sources: Sequence[Source] | None = None,
    gold: Source | None = None,
    eval_prompts: Sequence[Prompt] = (),
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> State:
    """Train, or go on from the last checkpoint in `out`; the policy lands in `out`/policy.

    Raises: ConfigError for what cannot be trained from, TrainError when training cannot go on;
    checkpoints are kept.
    """
    with (
        translate_errors(Path(config.out), "micro_batch or batch_size"),
        processes.others_watched(),
    ):
        prompts, eval_prompts = prompts_for(config, prompts, eval_prompts)
        sources, gold = rewards_for(config, sources, gold)
        t = prepare_run(config, prompts, sources)
        last = _restore(t)
        measure_call(t)
        eval_ids = encoded_for_gold(t, gold, eval_prompts)
        if t.state.step == 0:
            evaluation.start(t, gold, eval_prompts, eval_ids, config.method)
        trainer = _trainer(t, watch(t, gold, eval_prompts, eval_ids, on_step))
        with sampling.running_sampler(t, lambda: _save(t, trainer)):
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        checkpoint.finish(t, "grpo")
        return t.state


STAGE = Stage(
    GrpoConfig, run, "prompts", ("policy", checkpoint.METRICS), "policy", with_rewards=True
)


def _restore(t: GrpoRun) -> Path | None:
    """The checkpoint to go on from, whose state is now the run's; metrics of later steps are
    dropped.
    """
    last = checkpoint.claim(t)
    if last:
        t.state = checkpoint.restored_state(orjson.loads((last / STATE).read_bytes()))
    elif t.config.normalise == "reference":
        t.state.scales = evaluation.calibrate(t)
    kept = t.state.step if last else -1
    metrics = Path(t.config.out) / checkpoint.METRICS
    processes.on_main(lambda: checkpoint.forget_after(metrics, kept))
    return last


def prepare_run(
    config: GrpoConfig, prompts: Sequence[Prompt], sources: Sequence[Source]
) -> GrpoRun:
    """The models and encoded prompts; there is no value function, and TRL's trainer has the
    optimizer.

    Raises: ConfigError for no prompts, no rewards, a model that does not load, a batch that does
    not divide among the processes.
    """
    check_inputs(config.method.upper(), prompts, sources)
    n = distributed.world_size()
    if config.batch_size % (config.micro_batch * n):
        raise ConfigError(
            f"batch_size ({config.batch_size}) must be a multiple of micro_batch ({config.micro_batch}) "
            f"times the processes ({n})"
        )
    accelerator = distributed.accelerator_for(config.precision)
    if processes.is_sharded(accelerator) and (config.sampler == "vllm" or config.sample_ahead):
        raise ConfigError(
            "sampler: vllm and sample_ahead need the whole model in each process, and the launcher shards "
            "it: leave them out (TRL then samples), or launch with trainers/accelerate/cpu.yaml"
        )
    checkpoint.seed_step(config.seed, 0, "load", config.threads)
    tokenizer = load_tokenizer(config.model, config.chat_template, config.pad_token)
    # TRL ends answers at the tokenizer's EOS alone
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(dialect(tokenizer).end)
    policy = load_policy(config.model, config.attention).eval()
    reference = policy  # with lora, until TRL's trainer puts the adapters in
    if config.lora is None:
        reference = load_policy(config.reference or config.model, config.attention)
        reference = reference.eval().requires_grad_(False)
    room, ends = room_for_prompt(policy, config), rollout.end_ids(policy, tokenizer)
    return GrpoRun(
        config=config,
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        accelerator=accelerator,
        ends=ends,
        room=room,
        prompts=prompts,
        prompt_ids=rollout.encode(tokenizer, prompts, room, config.template_kwargs),
        sources=rewards.asked_once(sources),
        state=State(beta=config.beta),
        sampler=transformers_sampler(config, policy, ends, accelerator),
    )


def _trainer(t: GrpoRun, callback: Any) -> Any:
    """TRL's trainer for this configuration, with our reference and our reward."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.trainer.utils import add_fused_lm_head

    c = t.config
    settings = {
        "output_dir": c.out,
        "max_steps": c.steps,
        "per_device_train_batch_size": c.micro_batch,
        "gradient_accumulation_steps": c.batch_size // c.micro_batch // distributed.world_size(),
        "num_generations": c.group,
        "num_iterations": c.epochs,
        "max_completion_length": c.max_new_tokens,
        "temperature": c.temperature,
        "learning_rate": c.learning_rate,
        "lr_scheduler_type": c.schedule,
        "warmup_steps": 0,
        "weight_decay": c.weight_decay,
        "max_grad_norm": c.max_grad_norm,
        "adam_epsilon": 1e-5,
        "beta": c.beta,
        "epsilon": c.clip,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_steps": c.save_every,
        "save_total_limit": checkpoint.KEPT,
        "report_to": [],
        "seed": c.seed,
        "disable_tqdm": True,
        "bf16": c.precision == "bf16",
        "use_cpu": default_device() == "cpu",
        "gradient_checkpointing": c.gradient_checkpointing,
        "shuffle_dataset": False,
        "chat_template_kwargs": c.template_kwargs,
        "disable_dropout": True,
    }
    if c.method == "grpo":
        args = GRPOConfig(
            **settings,
            loss_type="dapo",
            scale_rewards=c.scale_rewards,
            use_bias_correction_kl=c.kl == "reverse",
        )
    else:
        args = RLOOConfig(**settings)
    # All steps' prompts in their order, as one epoch: TRL's own shuffle would begin anew when a run
    # goes on.
    turns, need = (
        [rollout.turns_of(prompt, t.tokenizer) for prompt in t.prompts],
        c.batch_size // c.group,
    )
    turns = [
        turns[i]
        for step in range(c.steps)
        for i in evaluation.rows_of(c.seed, len(turns), step, need)
    ]
    base = GRPOTrainer if c.method == "grpo" else RLOOTrainer
    trainer = _with_our_sampler(t, base)(
        model=t.policy,
        reward_funcs=reward_for(t),
        args=args,
        processing_class=t.tokenizer,
        callbacks=[callback],
        train_dataset=Dataset.from_list([{"prompt": row} for row in turns]),
        peft_config=lora_config(c.lora, "CAUSAL_LM"),
    )
    if c.lora is not None:
        t.policy, t.reference = trainer.model, None
    t.accelerator = trainer.accelerator
    t.sampler = policy_sampler(t, t.policy)
    trainer.remove_callback(PrinterCallback)
    if (
        t.reference is not None and c.beta > 0
    ):  # ours instead of its own copy, with the head that it gives its own
        add_fused_lm_head(t.reference, temperature=c.temperature)
        trainer.ref_model = trainer.accelerator.prepare_model(t.reference, evaluation_mode=True)
    return trainer


def _with_our_sampler(t: GrpoRun, base: Any) -> Any:
    """TRL's trainer, which samples by the run's sampler: an answer is a function of seed, step and
    its place among the answers of all processes. Models that the launcher shards are sampled by
    TRL.
    """
    c = t.config

    class Sampling(base):
        """Answers by our sampler, and what their being another policy's changes."""

        sampled: list[SampledAnswer]  # of this process, in the step's order

        def _generate_single_turn(
            self, prompt_ids: list[list[int]], *rest: Any, **more: Any
        ) -> Any:
            if processes.is_sharded(self.accelerator):
                return super()._generate_single_turn(prompt_ids, *rest, **more)
            step, n = self.state.global_step, len(prompt_ids)
            answers = sampling.step_answers(t, processes.concatenated(prompt_ids), step)
            later, need = step + c.epochs, c.batch_size // c.group
            rows = evaluation.rows_of(c.seed, len(t.prompts), later // c.epochs, need)
            sampling.begin_ahead(
                t, [t.prompt_ids[i] for i in rows for _ in range(c.group)], step, later
            )
            self.sampled = answers[processes.rank() * n : (processes.rank() + 1) * n]
            ids = [answer.ids for answer in self.sampled]
            return (ids, None) if c.method == "grpo" else ids

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if t.off_policy or not isinstance(t.sampler, TransformersSampler):
                self._metrics["train"] |= _compared(t, self, batch)
            return batch

    return Sampling


def _compared(t: GrpoRun, trainer: Any, batch: dict[str, Any]) -> dict[str, list[float]]:
    """Metrics of how far the sampler's log-probabilities are from training's. Answers that were
    sampled ahead have their advantages weighted: each token in GRPO, each answer in RLOO, whose
    ratio is that of whole answers.

    Raises: TrainError for a gap that rounding does not explain.
    """
    import torch

    parts = ("prompt_ids", "completion_ids"), ("prompt_mask", "completion_mask")
    ids, attention = (torch.cat([batch[name] for name in names], 1) for names in parts)
    mask = batch["completion_mask"].bool()
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, mask.shape[1], t.config.micro_batch
        )[0].float()
    gap, largest = rollout.sampler_gap(trainer.sampled, logps, mask)
    told = processes.concatenated([(gap, largest, int(mask.sum()))])
    gap = sum(mean * n for mean, _, n in told) / sum(n for *_, n in told)
    found = {"sampler_gap": gap, "sampler_gap_largest": max(most for _, most, _ in told)}
    if not t.off_policy:  # else the gap is that of an update
        t.sampler.check(gap)
    else:
        sampled, of_rows = (
            rollout.sampler_logps(trainer.sampled, mask).to(logps),
            batch["advantages"],
        )
        if t.config.method == "rloo":
            logps, sampled = ((x * mask).sum(1, keepdim=True) for x in (logps, sampled))
            mask = mask.any(1, keepdim=True)
        weights = pg.importance_weights(logps, sampled, mask, t.config.importance_cap)
        batch["advantages"] = of_rows[:, None] * weights
        if t.config.method == "rloo":
            batch["advantages"] = batch["advantages"][:, 0]
        found["importance"] = float(pg.masked_mean(weights, mask))
    return {name: [value] for name, value in found.items()}


def reward_for(t: GrpoRun) -> Callable[..., list[float | None]]:
    """The sources as one reward function of TRL: scaled, summed, a fixed score for answers without
    an end.
    """

    def reward(
        prompts: Any, completions: Any, completion_ids: Any, log_metric: Any = None, **_: Any
    ) -> list[float | None]:
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
        ended = [ids[-1] in t.ends for ids in completion_ids]
        rows = processes.concatenated(list(zip(prompts, texts, ended, strict=True)))
        all_prompts, all_texts, all_ended = zip(*rows, strict=True)
        totals, found = rewards.score_ended(
            t.sources,
            all_prompts,
            all_texts,
            all_ended,
            t.config.unfinished_score,
            t.state.scales,
        )
        if t.state.step == 0:
            rewards.check_all_vary(found)
        for name, raw in found.raw.items():
            known = [x for x in raw if x is not None]
            if log_metric and known:
                log_metric(f"reward/{name}", fmean(known))
        first = processes.rank() * len(texts)
        return totals[first : first + len(texts)]

    return reward


def _save(t: GrpoRun, trainer: Any) -> Path:
    """Write a checkpoint of the run as it is between two steps."""
    folder = Path(t.config.out) / f"checkpoint-{t.state.step}"
    if folder not in checkpoints(folder.parent):
        trainer._save_checkpoint(trainer.model, trial=None)
        _mark(t, folder)
    return folder


def _mark(t: GrpoRun, folder: Path) -> None:
    """TRL's checkpoint with our state, which is whole from now on."""
    (folder / STATE).write_bytes(orjson.dumps(asdict(t.state)))
    mark_complete(folder)


def watch(
    t: GrpoRun,
    gold: Source | None,
    eval_prompts: Sequence[Prompt],
    ids: list[list[int]],
    on_step: Callable[[dict[str, Any]], None] | None,
) -> Any:
    """The callback that records every step, watches KL, loss and gold, and marks checkpoints that
    are whole.
    """
    from transformers import TrainerCallback

    c = t.config

    class Watch(TrainerCallback):
        """What happens at TRL's steps, logs and saves."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            checkpoint.seed_step(
                c.seed, state.global_step, "sample"
            )  # TRL samples from the global generator

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            if not logs or "loss" not in logs:
                return
            if not all(isfinite(logs.get(name, 0.0)) for name in ("loss", "grad_norm")):
                raise TrainError(
                    f"the loss or its gradient is not finite at step {state.global_step}. The last whole "
                    f"checkpoint in {c.out} is good: lower learning_rate, see the rewards' scale"
                )
            t.state.step = state.global_step
            metrics = measured(logs) | {"step": t.state.step, "beta": c.beta}
            if c.kl_stop is not None and metrics["kl"] > c.kl_stop:
                t.state.stopped = f"KL {metrics['kl']:.1f} nats an answer, beyond kl_stop ({c.kl_stop:g}). Raise beta or kl_stop"
            elif gold and evaluation.due(t):
                t.policy.eval()
                metrics |= evaluation.evaluate(t, gold, eval_prompts, ids)
                t.policy.train()
            checkpoint.record(t, metrics | {"stopped": t.state.stopped}, c.method)
            control.should_training_stop = control.should_training_stop or bool(t.state.stopped)
            if on_step:
                on_step(metrics)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(c.out) / f"checkpoint-{state.global_step}"
            processes.concatenated([state.global_step])  # all have written their part
            processes.on_main(lambda: _mark(t, folder))

    return Watch()


def measured(logs: dict[str, Any]) -> dict[str, Any]:
    """TRL's log of a step under our names. Its KL is a mean over tokens: times the mean length,
    nats an answer.
    """
    length = logs["completions/mean_length"]
    named = {
        "reward": "reward",
        "reward_std": "reward_sd",
        "entropy": "entropy",
        "loss": "loss",
        "grad_norm": "grad_norm",
        "completions/clipped_ratio": "unfinished",
        "learning_rate": "learning_rate",
    }
    found = {ours: logs[theirs] for theirs, ours in named.items() if theirs in logs}
    same = ("reward/", "sampler_gap", "importance")
    apart = {name: value for name, value in logs.items() if name.startswith(same)}
    return found | apart | {"kl": logs.get("kl", 0.0) * length, "length": length}
