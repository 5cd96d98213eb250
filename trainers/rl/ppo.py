"""PPO for language models: one loop from text to text, small enough to read from top to bottom.

A step samples answers, scores their text, takes log-probabilities from the forward that trains,
charges KL to the reference a token, estimates advantages, and updates policy and value function
over a few epochs of minibatches. All randomness is a function of (seed, step), so a run that was
killed goes on exactly where its last checkpoint stands.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefab.trainers.common import Attention, Lora, Strict, TrainError, translate_errors
from prefab.trainers.data import DataConfig
from prefab.trainers.rl import checkpoint, overoptimization, rewards, rollout, rollout_vllm
from prefab.trainers.rl import policy_gradient as pg
from prefab.trainers.rl.models import (
    Run,
    State,
    as_reference,
    policy_kl,
    prepare_run,
    reference_logps,
    values_of,
)
from prefab.trainers.rl.overoptimization import CachedEval, Evaluation
from prefab.trainers.rl.rewards import RewardConfig, Source
from prefab.trainers.rl.rollout import Prompt, SampledAnswer

if TYPE_CHECKING:
    from torch import Tensor


class PpoConfig(Strict):
    """A PPO run, resolved. Names of metrics and defaults follow Huang et al. 2024 where they have
    one.
    """

    model: str = Field(
        description="The policy to begin with: a folder, an embedded model or a hub name."
    )
    reference: str | None = Field(
        None, description="What KL is charged to; left out: the policy as it begins."
    )
    out: str
    store: str | None = Field(
        None, description="Its `evals` get every step; left out: metrics.jsonl alone."
    )
    data: DataConfig | None = Field(
        None, description="Prompts: those of train are answered, those of val are watched."
    )
    rewards: list[RewardConfig] = []
    chat_template: str | None = None
    template_kwargs: dict[str, Any] = {}
    pad_token: str | None = None

    steps: int = Field(200, ge=1)
    batch_size: int = Field(64, ge=2, description="Answers a step.")
    minibatches: int = Field(2, ge=1)
    epochs: int = Field(4, ge=1)
    micro_batch: int = Field(
        16, ge=1, description="Answers a forward at most; gradients add up to the minibatch."
    )
    sample_batch: int = Field(64, ge=1, description="Prompts answered together.")
    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(
        1.0, gt=0, le=10, description="In sampling and in log-probabilities alike."
    )
    sampler: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="vllm: a server of its own, to which the weights are pushed after each update. The "
        "reference, and answers that gold is asked of, are sampled by transformers.",
    )
    vllm: rollout_vllm.Settings = rollout_vllm.Settings()

    learning_rate: float = Field(1e-5, gt=0)
    value_learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="linear: to 0 at the last step."
    )
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    clip: float = Field(0.2, gt=0, lt=1)
    value: Literal["separate", "shared"] = Field(
        "separate", description="A trunk of its own, or a head on the policy's."
    )
    value_model: str | None = Field(
        None, description="What a separate trunk begins with; left out: the policy."
    )
    value_clip: float | None = Field(0.2, gt=0)
    value_coef: float = Field(0.1, gt=0, description="Matters where the trunk is shared.")
    entropy_coef: float = Field(0.0, ge=0)
    whiten_advantages: bool = True

    beta: float = Field(
        0.05,
        ge=0,
        description="KL penalty a token, on rewards as normalised. Adaptive: where it begins.",
    )
    kl: Literal["fixed", "adaptive"] = "fixed"
    kl_target: float = Field(6.0, gt=0, description="Nats an answer, of adaptive KL.")
    kl_horizon: float = Field(
        10_000.0, gt=0, description="Answers over which beta may grow e-fold or so."
    )
    kl_stop: float | None = Field(30.0, gt=0, description="Nats an answer at which the run ends.")
    normalise: Literal["reference", "none"] = Field(
        "reference",
        description="none: raw rewards; scaling them by 1/deviation is a beta larger by the deviation.",
    )
    reference_samples: int = Field(
        256, ge=2, description="The reference's answers that the normalisation is taken from."
    )
    unfinished_score: float | None = Field(
        -2.0,
        description="Of an answer cut off by length, as normalised: two deviations below the reference's mean. "
        "null: such answers are scored like any other.",
    )
    unfinished_stop: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Such a share of unfinished answers, 5 steps running, ends the run.",
    )

    lora: Lora | None = None
    attention: Attention = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
    threads: int | None = Field(None, ge=1)
    save_every: int = Field(20, ge=1)
    max_bad: int = Field(
        3, ge=1, description="Updates in a row whose loss is no number, before the run ends."
    )
    gold: RewardConfig | None = Field(
        None, description="A score that nothing trains on, to watch over the proxy."
    )
    eval_every: int = Field(20, ge=1)
    eval_prompts: int = Field(
        256, ge=2, description="The same ones each time; of the validation split."
    )
    stop_on_alarm: bool = False


@dataclass(slots=True)
class Batch:
    """Answers of one step and what the update needs of them: B T, left-aligned, padded to the
    longest answer.
    """

    answers: list[SampledAnswer]
    mask: Tensor
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def run(
    config: PpoConfig,
    prompts: Sequence[Prompt] | None = None,
    sources: Sequence[Source] | None = None,
    gold: Source | None = None,
    eval_prompts: Sequence[Prompt] = (),
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> State:
    """Train, or go on from the last checkpoint in `out`; the policy lands in `out`/policy.

    What is left out is taken from the configuration. `on_step` sees each step's metrics.
    Raises: ConfigError for what cannot be trained from, TrainError when training cannot go on,
    EngineError where vLLM does not start; what is saved is kept.
    """
    with translate_errors(Path(config.out), "micro_batch or batch_size"):
        if prompts is None:
            prompts, eval_prompts = rollout.prompts_of(config.data, config.eval_prompts)
        t = prepare_run(
            config, prompts, rewards.build(config.rewards) if sources is None else sources
        )
        gold = gold or (rewards.build([config.gold])[0] if config.gold else None)
        eval_ids = (
            rollout.encode(t.tokenizer, eval_prompts, t.room, config.template_kwargs)
            if gold
            else []
        )
        checkpoint.restore(t)
        if config.normalise == "reference" and not t.state.scales:
            t.state.scales = calibrate(t)
        if t.state.step == 0:
            start(t, gold, eval_prompts, eval_ids)
            checkpoint.save(t)  # where a stop by KL at the second step goes back to
        with rollout_vllm.sampler(t) as t.sampler:
            while t.state.step < config.steps and not t.state.stopped:
                metrics = step(t)
                if gold and not t.state.stopped and due(t):
                    metrics |= evaluate(t, gold, eval_prompts, eval_ids)
                checkpoint.record(t, metrics)
                if t.state.step % config.save_every == 0 or t.state.step == config.steps:
                    checkpoint.save(t)
                if on_step:
                    on_step(metrics)
        checkpoint.finish(t)
        return t.state


def sample(
    t: Run, ids: Sequence[list[int]], purpose: str, model: Any = None
) -> tuple[list[SampledAnswer], list[str]]:
    """Answers to prompts and their texts, by the policy or another model."""
    seed = checkpoint.seed_step(
        t.config.seed, 0 if purpose == "evaluate" else t.state.step, purpose
    )
    if t.sampler is not None and purpose == "sample":
        answers = t.sampler.sample(ids, seed)
    else:
        with t.accelerator.autocast():
            answers = rollout.sample(
                model or t.policy,
                ids,
                t.config.max_new_tokens,
                t.config.temperature,
                t.ends,
                seed,
                t.config.sample_batch,
                [s.ids for s in t.state.seen] if purpose == "evaluate" else (),
                t.config.micro_batch,
            )
    return answers, t.tokenizer.batch_decode([a.ids for a in answers], skip_special_tokens=True)


def calibrate(t: Run) -> rewards.Scales:
    """The rewards' means and deviations on the reference's own answers, those that ended."""
    rows = rows_of(t.config.seed, len(t.prompts), 0, t.config.reference_samples)
    with as_reference(t) as reference:
        answers, texts = sample(t, [t.prompt_ids[i] for i in rows], "calibrate", reference)
    ended = [b for b, a in enumerate(answers) if a.ended or t.config.unfinished_score is None]
    if len(ended) < 2:
        raise TrainError(
            f"the reference ended {len(ended)} of {len(answers)} answers within max_new_tokens "
            f"({t.config.max_new_tokens}): raise it, or begin with a model that ends its answers"
        )
    return rewards.calibrate(
        t.sources, [t.prompts[rows[b]] for b in ended], [texts[b] for b in ended]
    )


def rows_of(seed: int, n: int, step: int, batch: int) -> list[int]:
    """Which prompts a step answers: every epoch is a shuffle of all of them, drawn from (seed,
    epoch).
    """
    rows: list[int] = []
    for epoch in range(step * batch // n, ((step + 1) * batch - 1) // n + 1):
        order = list(range(n))
        random.Random(f"{seed}/{epoch}/prompts").shuffle(order)
        rows += order[max(0, step * batch - epoch * n) : (step + 1) * batch - epoch * n]
    return rows


def step(t: Run) -> dict[str, Any]:
    """One step: sample, score, estimate, update. Its metrics."""
    started, c = time.monotonic(), t.config
    rows = rows_of(c.seed, len(t.prompts), t.state.step, c.batch_size)
    answers, texts = sample(t, [t.prompt_ids[i] for i in rows], "sample")
    sampled_s = time.monotonic() - started
    answers, texts, scores, metrics = score(t, [t.prompts[i] for i in rows], answers, texts)
    scored_s = time.monotonic() - started
    batch, kl = estimate(t, answers, scores, metrics)
    t.state.unfinished_in_a_row = (
        t.state.unfinished_in_a_row + 1 if metrics["unfinished"] > c.unfinished_stop else 0
    )
    metrics |= {
        "step": t.state.step + 1,
        "beta": t.state.beta,
        "distinct_1": overoptimization.distinct(texts, 1),
        "distinct_2": overoptimization.distinct(texts, 2),
    }
    if c.kl_stop is not None and kl > c.kl_stop:
        first = (
            "Policy and reference differ before any training: see model and reference. "
            if t.state.step == 0
            else ""
        )
        t.state.stopped = f"KL {kl:.1f} nats an answer, beyond kl_stop ({c.kl_stop:g}). {first}Raise beta or kl_stop"
        checkpoint.rewind(t)
    elif c.unfinished_score is not None and t.state.unfinished_in_a_row >= 5:
        t.state.stopped = (
            f"{metrics['unfinished']:.0%} of the answers do not end within max_new_tokens, 5 steps running. "
            "Raise max_new_tokens, or lower learning_rate"
        )
    else:
        metrics |= update(t, batch)
        if c.kl == "adaptive":
            t.state.beta = pg.adapt_beta(t.state.beta, kl, c.kl_target, len(answers), c.kl_horizon)
        t.state.step += 1
    total_s = time.monotonic() - started
    tokens = sum(len(a.ids) for a in answers)
    times = {
        "seconds": total_s,
        "sampling_share": sampled_s / total_s,
        "scoring_share": (scored_s - sampled_s) / total_s,
        "tokens_per_s": tokens / total_s,
    }
    return metrics | {"bad_updates": t.state.bad, "stopped": t.state.stopped, "times": times}


def score(
    t: Run,
    prompts: Sequence[Prompt],
    answers: list[SampledAnswer],
    texts: list[str],
) -> tuple[list[SampledAnswer], list[str], list[float], dict[str, Any]]:
    """Answers with their texts and scores, those that no reward could score left out, and
    metrics.
    """
    fixed = t.config.unfinished_score
    read = [b for b, a in enumerate(answers) if a.ended or fixed is None]
    found = (
        rewards.score(
            t.sources, [prompts[b] for b in read], [texts[b] for b in read], t.state.scales
        )
        if read
        else None
    )
    totals: list[float | None] = [fixed] * len(answers)
    for b, total in zip(read, found.total if found else (), strict=True):
        totals[b] = total
    kept = [b for b, total in enumerate(totals) if total is not None]
    if len(kept) < max(2, len(answers) / 2):
        raise TrainError(
            f"rewards could not score {len(answers) - len(kept)} of {len(answers)} answers at step "
            f"{t.state.step + 1}; at least half must be"
        )
    if t.state.step == 0 and found and len({texts[b] for b in read}) > 1:
        for name, raw in found.raw.items():
            rewards.check_varies(name, [x for x in raw if x is not None])
    scores = [totals[b] for b in kept]
    metrics: dict[str, Any] = {
        "reward": fmean(scores),
        "reward_sd": pstdev(scores),
        "unscored": len(answers) - len(kept),
        "unfinished": fmean(not a.ended for a in answers),
        "length": fmean(len(a.ids) for a in answers),
    }
    for source in t.sources if found else ():
        known = [x for x in found.raw[source.name] if x is not None]
        metrics[f"reward/{source.name}"] = fmean(known) if known else None
        if len(source.members) > 1:
            metrics[f"disagreement/{source.name}"] = fmean(found.disagreement[source.name] or [0.0])
    return [answers[b] for b in kept], [texts[b] for b in kept], scores, metrics


def estimate(
    t: Run, answers: list[SampledAnswer], scores: list[float], metrics: dict[str, Any]
) -> tuple[Batch, float]:
    """Advantages and returns of a step's answers, and their KL in nats an answer; adds to
    `metrics`.
    """
    import torch

    mask, logps, reference_logps, entropy, values = policy_kl(t, answers)
    k1, k3 = (pg.kl_estimate(logps, reference_logps, form) for form in ("k1", "k3"))
    kl = float(pg.masked_sum(k1, mask)) / len(answers)
    rewarded = pg.penalised_rewards(torch.tensor(scores, device=k1.device), k1, mask, t.state.beta)
    advantages, returns = pg.gae(rewarded, values, mask, t.config.gamma, t.config.lam)
    gap, largest = rollout.sampler_gap(answers, logps, mask)
    if t.sampler is not None:
        t.sampler.check(gap)
    metrics |= {
        "kl": kl,
        "kl_k3": float(pg.masked_sum(k3, mask)) / len(answers),
        "entropy": float(pg.masked_mean(entropy, mask)),
        "sampler_gap": gap,
        "sampler_gap_largest": largest,
        "explained_variance": pg.explained_variance(values, returns, mask),
        "value": float(pg.masked_mean(values, mask)),
        "return": float(pg.masked_mean(returns, mask)),
    }
    if t.config.whiten_advantages:
        advantages = pg.whiten(advantages, mask)
    return Batch(answers, mask, logps, values, advantages, returns), kl


def update(t: Run, batch: Batch) -> dict[str, Any]:
    """Epochs of minibatches over one batch. An update whose loss or gradient is no number is left
    out and counted.

    Raises: TrainError when that happened `max_bad` times in a row; the weights are those before it,
    and are saved.
    """
    c, draw = t.config, random.Random(f"{t.config.seed}/{t.state.step}/minibatches")
    t.policy.train(c.gradient_checkpointing)
    t.critic.train(c.gradient_checkpointing)
    decay = 1 - t.state.step / c.steps if c.schedule == "linear" else 1.0
    for group, rate in zip(
        t.optimizer.param_groups, (c.learning_rate, c.value_learning_rate), strict=True
    ):
        group["lr"] = rate * decay
    seen: list[dict[str, float]] = []
    for _ in range(c.epochs):
        order = list(range(len(batch.answers)))
        draw.shuffle(order)
        for k in range(c.minibatches):
            rows = order[k * len(order) // c.minibatches : (k + 1) * len(order) // c.minibatches]
            done = _minibatch(t, batch, rows) if rows else {}
            t.state.bad_in_a_row = 0 if done or not rows else t.state.bad_in_a_row + 1
            t.state.bad += int(bool(rows) and not done)
            if t.state.bad_in_a_row >= c.max_bad:
                checkpoint.finish(t)
                raise TrainError(
                    f"the loss was no number in {c.max_bad} updates in a row (step {t.state.step + 1}). The "
                    f"last good policy is in {c.out}/policy: lower learning_rate, see the rewards' scale"
                )
            seen += [done] if done else []
    t.policy.eval()
    t.critic.eval()
    return {"learning_rate": c.learning_rate * decay} | {
        name: fmean(one[name] for one in seen) for name in (seen[0] if seen else ())
    }


def _minibatch(t: Run, batch: Batch, rows: list[int]) -> dict[str, float]:
    """One optimizer step on these rows; nothing, and no step, where the loss or the gradient is no
    number.
    """
    import torch

    c, sums = (
        t.config,
        dict.fromkeys(
            ("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "shift"), 0.0
        ),
    )
    tokens = int(batch.mask[rows].sum())
    t.optimizer.zero_grad(set_to_none=True)
    for some in rollout.in_batches(batch.answers, rows, c.micro_batch, t.accelerator.device):
        packed = rollout.pack([batch.answers[b] for b in some], t.accelerator.device)
        mask, n = packed.mask_BT, packed.mask_BT.shape[1]
        old, old_values, advantages, returns = (
            x[some, :n] for x in (batch.logps, batch.values, batch.advantages, batch.returns)
        )
        with t.accelerator.autocast():
            logps, entropy, states = rollout.forward(
                t.policy, packed, c.temperature, "trunk" not in t.critic, c.entropy_coef > 0
            )
            values = values_of(t, packed, states)
        policy_loss, clipped = pg.policy_loss(logps, old, advantages, mask, c.clip)
        value_loss, value_clipped = pg.value_loss(values, old_values, returns, mask, c.value_clip)
        bonus = c.entropy_coef * pg.masked_sum(entropy, mask) if c.entropy_coef > 0 else 0.0
        t.accelerator.backward((policy_loss + c.value_coef * value_loss - bonus) / tokens)
        shift = pg.masked_sum(pg.kl_estimate(old, logps.detach(), "k3"), mask)
        for name, x in zip(
            sums, (policy_loss, value_loss, clipped, value_clipped, shift), strict=True
        ):
            sums[name] += float(x.detach()) / tokens
    norms = {
        name: float(torch.nn.utils.clip_grad_norm_(group["params"], c.max_grad_norm))
        for name, group in zip(
            ("grad_norm", "value_grad_norm"), t.optimizer.param_groups, strict=True
        )
    }
    if not all(map(isfinite, (*sums.values(), *norms.values()))):
        t.optimizer.zero_grad(set_to_none=True)
        return {}
    t.optimizer.step()
    return sums | norms


def evaluated_at(config: PpoConfig) -> range:
    """The steps after which gold is to be asked; 0 is before any training."""
    return range(0, config.steps + 1, config.eval_every)


def due(t: Run) -> bool:
    """Whether gold is asked after this step: as planned, and at once again where it was just seen
    to have fallen, so that the second look of the alarm need not wait.
    """
    planned, seen = evaluated_at(t.config), t.state.evaluations
    return t.state.step in planned or (
        overoptimization.fallen(seen, len(planned))
        and not overoptimization.alarm(seen, len(planned))
    )


def start(
    t: Run, gold: Source | None, prompts: Sequence[Prompt], ids: list[list[int]], stage: str = "ppo"
) -> None:
    """Proxy, gold and KL before any training: what gains and losses are measured from."""
    if gold and not t.state.evaluations:
        checkpoint.record(t, {"step": 0, **evaluate(t, gold, prompts, ids)}, stage)


def evaluate(
    t: Run, gold: Source, prompts: Sequence[Prompt], ids: list[list[int]]
) -> dict[str, Any]:
    """Proxy, gold and KL on the same held-out prompts with the same luck as ever; the best policy
    by gold is kept in `out`/best. Rewards, gold and reference are asked only about answers that the
    last evaluation has not scored.
    """
    answers, texts = sample(t, ids, "evaluate")
    former = t.state.seen or [None] * len(answers)
    new = [
        b
        for b, (a, seen) in enumerate(zip(answers, former, strict=True))
        if seen is None or a.ids != seen.ids or seen.proxy is None
    ]
    asked, said = [prompts[b] for b in new], [texts[b] for b in new]
    truth = rewards.score([gold], asked, said).total
    if None in truth:
        raise TrainError(
            f"gold {gold.name}: {truth.count(None)} of {len(truth)} answers have no score; gold must score all"
        )
    scored = zip(
        new,
        reference_logps(t, [answers[b] for b in new]),
        rewards.score(t.sources, asked, said, t.state.scales).total,
        truth,
        strict=True,
    )
    found = {b: CachedEval(answers[b].ids, *scores) for b, *scores in scored}
    t.state.seen = [found.get(b, seen) for b, seen in enumerate(former)]
    proxy = [s.proxy for s in t.state.seen if s.proxy is not None]
    if not proxy:
        raise TrainError(
            f"rewards could score none of the {len(answers)} answers that gold is asked of"
        )
    truth = [s.gold for s in t.state.seen]
    kl = fmean(
        sum(a.sampler_logps) - s.reference_logp for a, s in zip(answers, t.state.seen, strict=True)
    )
    t.state.evaluations.append(Evaluation(t.state.step, kl, fmean(proxy), tuple(truth)))
    fired = overoptimization.alarm(t.state.evaluations, len(evaluated_at(t.config)))
    if overoptimization.best(t.state.evaluations).step == t.state.step:
        checkpoint.write_policy(t, Path(t.config.out) / "best")
    if fired and t.config.stop_on_alarm:
        t.state.stopped = str(fired)
    return {
        "eval/proxy": fmean(proxy),
        "eval/gold": fmean(truth),
        "eval/kl": kl,
        "alarm": str(fired) if fired else "",
    }
