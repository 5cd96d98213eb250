"""The loop that PPO, GRPO and RLOO share, from text to text.

A step samples answers, scores their text, takes log-probabilities from the forward that trains,
estimates advantages, and updates the policy (and PPO's value function) over a few epochs of
minibatches. All randomness is a function of (seed, step), so a run that was killed goes on exactly
where its last checkpoint stands.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, TypeVar

from prefab.trainers.common import TrainError, translate_errors
from prefab.trainers.rl import (
    checkpoint,
    overoptimization,
    processes,
    rewards,
    rollout,
    sampling,
)
from prefab.trainers.rl import policy_gradient as pg
from prefab.trainers.rl.config import PpoConfig, RlConfig
from prefab.trainers.rl.evaluation import calibrate, due, evaluate, rows_of, start, texts_of
from prefab.trainers.rl.models import (
    encoded_for_gold,
    learning_rates,
    measure_call,
    packed_batches,
    policy_kl,
    prompts_for,
    rewards_for,
)
from prefab.trainers.rl.rewards import Source
from prefab.trainers.rl.rollout import Prompt, SampledAnswer
from prefab.trainers.rl.state import Batch, Run, State

C = TypeVar("C", bound=RlConfig)
NORMS = ("grad_norm", "value_grad_norm")  # of the policy, of the value function


def run(
    prepare: Callable[[C, Sequence[Prompt], Sequence[Source]], Run],
    config: C,
    prompts: Sequence[Prompt] | None = None,
    sources: Sequence[Source] | None = None,
    gold: Source | None = None,
    eval_prompts: Sequence[Prompt] = (),
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> State:
    """Train what `prepare` makes, or go on from the last checkpoint in `out`; the policy lands in
    `out`/policy.

    What is left out is taken from the configuration. `on_step` sees each step's metrics.
    Raises: ConfigError for what cannot be trained from, TrainError when training cannot go on,
    EngineError where vLLM does not start; what is saved is kept.
    """
    with (
        translate_errors(Path(config.out), "micro_batch or batch_size"),
        processes.others_watched(),
    ):
        prompts, eval_prompts = prompts_for(config, prompts, eval_prompts)
        sources, gold = rewards_for(config, sources, gold)
        t = prepare(config, prompts, sources)
        eval_ids = encoded_for_gold(t, gold, eval_prompts)
        checkpoint.restore(t)
        measure_call(t)
        if config.normalise == "reference" and not t.state.scales:
            t.state.scales = calibrate(t)
        if t.state.step == 0:
            start(t, gold, eval_prompts, eval_ids)
            checkpoint.save(t)  # where a stop by KL at the second step goes back to
        with sampling.running_sampler(t):
            _steps(t, gold, eval_prompts, eval_ids, on_step)
        checkpoint.finish(t)
        return t.state


def _steps(
    t: Run,
    gold: Source | None,
    eval_prompts: Sequence[Prompt],
    eval_ids: list[list[int]],
    on_step: Callable[[dict[str, Any]], None] | None,
) -> None:
    """The steps that are left, each recorded; checkpoints and evaluations between them."""
    c = t.config
    while t.state.step < c.steps and not t.state.stopped:
        metrics = step(t)
        if gold and not t.state.stopped and due(t):
            metrics |= evaluate(t, gold, eval_prompts, eval_ids)
        checkpoint.record(t, metrics)
        if t.state.step % c.save_every == 0 or t.state.step == c.steps:
            checkpoint.save(t)
        if on_step:
            on_step(metrics)


def prompts_of_step(t: Run, step: int) -> list[int]:
    """The number of the prompt of each answer of a step; answers to one prompt are side by side."""
    c, n = t.config, t.config.answers_a_prompt
    return [i for i in rows_of(c.seed, len(t.prompts), step, c.batch_size // n) for _ in range(n)]


def sample_ahead(t: Run) -> None:
    """Begin to sample the next step's answers, where that is wanted."""
    sampling.begin_ahead(t, [t.prompt_ids[i] for i in prompts_of_step(t, t.state.step + 1)])


def step(t: Run) -> dict[str, Any]:
    """One step: sample, score, estimate, update. Its metrics."""
    started, c = time.monotonic(), t.config
    rows = prompts_of_step(t, t.state.step)
    answers = sampling.step_answers(t, [t.prompt_ids[i] for i in rows], t.state.step)
    texts = texts_of(t, answers)
    sampled_s = time.monotonic() - started
    kept, scores, metrics = score(t, [t.prompts[i] for i in rows], answers, texts)
    scored_s = time.monotonic() - started
    answers, texts = [answers[b] for b in kept], [texts[b] for b in kept]
    batch, kl = estimate(t, answers, scores, metrics, [b // c.answers_a_prompt for b in kept])
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
        sample_ahead(t)
        metrics |= update(t, batch)
        if isinstance(c, PpoConfig) and c.kl == "adaptive":
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
) -> tuple[list[int], list[float], dict[str, Any]]:
    """(which answers have a score, their scores, metrics).

    Raises: TrainError where fewer than half have a score, or, at the first step, where a reward
    does not vary.
    """
    totals, found = rewards.score_ended(
        t.sources,
        prompts,
        texts,
        [a.ended for a in answers],
        t.config.unfinished_score,
        t.state.scales,
    )
    kept = [(b, total) for b, total in enumerate(totals) if total is not None]
    if len(kept) < max(2, len(answers) / 2):
        raise TrainError(
            f"rewards could not score {len(answers) - len(kept)} of {len(answers)} answers at step "
            f"{t.state.step + 1}; at least half must be"
        )
    if t.state.step == 0:
        rewards.check_all_vary(found)
    scores = [total for _, total in kept]
    metrics: dict[str, Any] = {
        "reward": fmean(scores),
        "reward_sd": pstdev(scores),
        "unscored": len(answers) - len(kept),
        "unfinished": fmean(not a.ended for a in answers),
        "length": fmean(len(a.ids) for a in answers),
        **_reward_metrics(t.sources, found),
    }
    return [b for b, _ in kept], scores, metrics


def _reward_metrics(sources: Sequence[Source], found: rewards.Scores) -> dict[str, float | None]:
    """The mean raw score of each source, and how far an ensemble's members differ."""
    metrics: dict[str, float | None] = {}
    for source in sources:
        if source.name in found.raw:
            known = [x for x in found.raw[source.name] if x is not None]
            metrics[f"reward/{source.name}"] = fmean(known) if known else None
            if len(source.members) > 1:
                apart = found.disagreement[source.name]
                metrics[f"disagreement/{source.name}"] = fmean(apart or [0.0])
    return metrics


def estimate(
    t: Run,
    answers: list[SampledAnswer],
    scores: list[float],
    metrics: dict[str, Any],
    groups: Sequence[int] = (),
) -> tuple[Batch, float]:
    """What the update needs of a step's answers, and their KL in nats an answer; adds to
    `metrics`. `groups`: the number of each answer's group, for methods that compare answers.
    """
    once = in_one_pass(t)
    mask, logps, reference, entropy, values = policy_kl(t, answers, with_policy=not once)
    batch = Batch(
        answers=answers,
        mask=mask,
        logps=logps,
        reference=reference,
        entropy=entropy,
        advantages=logps,
        values=values,
    )
    batch.advantages = t.method.advantages(t, batch, scores, groups, metrics)
    if once:
        batch.sums = _gradient(t, batch, list(range(len(answers))))
        processes.add_up(logps, entropy)
    k1, k3 = (pg.kl_estimate(logps, reference, form) for form in ("k1", "k3"))
    kl = float(pg.masked_sum(k1, mask)) / len(answers)
    gap, largest = rollout.sampler_gap(answers, logps, mask)
    if not t.off_policy:  # else the gap is that of an update
        t.sampler.check(gap)
    metrics |= {
        "kl": kl,
        "kl_k3": float(pg.masked_sum(k3, mask)) / len(answers),
        "entropy": float(pg.masked_mean(entropy, mask)),
        "sampler_gap": gap,
        "sampler_gap_largest": largest,
    }
    if t.off_policy:
        sampled = rollout.sampler_logps(answers, mask).to(logps)
        if t.method.whole_answers:
            logps, sampled = (pg.answer_sums(x, mask) for x in (logps, sampled))
            mask = mask[:, :1]
        weights = pg.importance_weights(logps, sampled, mask, t.config.importance_cap)
        batch.advantages = batch.advantages * weights
        metrics["importance"] = float(pg.masked_mean(weights, mask))
    return batch, kl


def in_one_pass(t: Run) -> bool:
    """Whether log-probabilities before the update are those of the forward that is differentiated:
    in a step of one update, where nothing is needed of them sooner.
    """
    return (
        t.method.scores_alone and t.config.epochs * t.config.minibatches == 1 and not t.off_policy
    )


def update(t: Run, batch: Batch) -> dict[str, Any]:
    """Epochs of minibatches over one batch. An update whose loss or gradient is not finite is left
    out and counted.

    Raises: TrainError when that happened `max_bad` times in a row; the weights are those before it,
    and are saved.
    """
    c, draw = t.config, random.Random(f"{t.config.seed}/{t.state.step}/minibatches")
    decay = 1 - t.state.step / c.steps if c.schedule == "linear" else 1.0
    for group, rate in zip(t.optimizer.param_groups, learning_rates(c), strict=True):
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
                    f"the loss was not finite in {c.max_bad} updates in a row (step {t.state.step + 1}). The "
                    f"last good policy is in {c.out}/policy: lower learning_rate, see the rewards' scale"
                )
            seen += [done] if done else []
    return {"learning_rate": c.learning_rate * decay} | {
        name: fmean(one[name] for one in seen) for name in (seen[0] if seen else ())
    }


def _set_mode(t: Run, training: bool) -> None:
    """Training mode of what is trained; gradient checkpointing works in it alone."""
    for model in (t.policy, t.critic):
        if model is not None:
            model.train(training)


def _gradient(t: Run, batch: Batch, rows: list[int]) -> dict[str, float]:
    """Compute the gradient of the loss of these rows, all processes' together; what it reports. A
    number that is not finite in one process is so in all, which then all leave the update out.
    """
    import torch

    c, device = t.config, t.accelerator.device
    n = len(rows) if t.method.whole_answers else sum(len(batch.answers[b].ids) for b in rows)
    sums = torch.zeros(len(t.method.reported), dtype=torch.float64, device=device)
    t.optimizer.zero_grad(set_to_none=True)
    mine = processes.share(rows)
    _set_mode(t, c.gradient_checkpointing)
    for some, packed in packed_batches(t, batch.answers, mine, training=True):
        loss, parts = t.method.loss(t, batch, some, packed)
        t.accelerator.backward(loss / n)
        sums += torch.stack([x.detach().to(sums) for x in parts]) / n  # read once, at the end
    _set_mode(t, False)
    processes.add_up_gradients(p for group in t.optimizer.param_groups for p in group["params"])
    processes.add_up(sums)
    return dict(zip(t.method.reported, sums.tolist(), strict=True))


def _minibatch(t: Run, batch: Batch, rows: list[int]) -> dict[str, float]:
    """One optimizer step on these rows; nothing, and no step, where the loss or the gradient is no
    number.
    """
    import torch

    sums = _gradient(t, batch, rows) if batch.sums is None else batch.sums
    norms = {
        name: float(torch.nn.utils.clip_grad_norm_(group["params"], t.config.max_grad_norm))
        for name, group in zip(NORMS, t.optimizer.param_groups, strict=False)
    }
    if not all(map(isfinite, (*sums.values(), *norms.values()))):
        t.optimizer.zero_grad(set_to_none=True)
        return {}
    t.optimizer.step()
    return sums | norms
