"""PPO for language models: rewards less KL to the reference a token, advantages by a value
function. The loop is `rl.loop`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from prefab.trainers.registry import Stage
from prefab.trainers.rl import checkpoint, loop, models, rewards, rollout
from prefab.trainers.rl import policy_gradient as pg
from prefab.trainers.rl.batches import Packed
from prefab.trainers.rl.config import PpoConfig
from prefab.trainers.rl.rewards import Source
from prefab.trainers.rl.rollout import Prompt, SampledAnswer
from prefab.trainers.rl.state import Batch, Method, PpoRun, State
from prefab.trainers.steps import step_tokens

if TYPE_CHECKING:
    from torch import Tensor


def run(
    config: PpoConfig,
    prompts: Sequence[Prompt] | None = None,
    sources: Sequence[Source] | None = None,
    gold: Source | None = None,
    eval_prompts: Sequence[Prompt] = (),
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> State:
    """Train by PPO; see `loop.run`."""
    return loop.run(prepare_run, config, prompts, sources, gold, eval_prompts, on_step)


STAGE = Stage(
    PpoConfig, run, "prompts", ("policy", checkpoint.METRICS), "policy", with_rewards=True
)


def prepare_run(config: PpoConfig, prompts: Sequence[Prompt], sources: Sequence[Source]) -> PpoRun:
    """See `models.prepare_run`."""
    return models.prepare_run(PpoRun, METHOD, config, prompts, sources)


def _advantages(
    t: PpoRun, batch: Batch, scores: Sequence[float], _: Sequence[int], metrics: dict[str, Any]
) -> Tensor:
    """Generalised advantages, B T; the returns are added to the batch."""
    import torch

    mask, values = batch.mask, batch.values
    assert values is not None
    k1 = pg.kl_estimate(batch.logps, batch.reference, "k1")
    rewarded = pg.penalised_rewards(torch.tensor(scores, device=k1.device), k1, mask, t.state.beta)
    if any(isinstance(score, rewards.StepRewards) for score in scores):
        rewarded = pg.place_step_rewards(rewarded, _step_rewards(t, batch.answers, scores), mask)
    advantages, returns = pg.gae(rewarded, values, mask, t.config.gamma, t.config.lam)
    metrics |= {
        "explained_variance": pg.explained_variance(values, returns, mask),
        "value": float(pg.masked_mean(values, mask)),
        "return": float(pg.masked_mean(returns, mask)),
    }
    batch.returns = returns
    return pg.whiten(advantages, mask) if t.config.whiten_advantages else advantages


def _step_rewards(
    t: PpoRun, answers: Sequence[SampledAnswer], scores: Sequence[float]
) -> list[list[tuple[int, float]]]:
    """Of each answer, (token, reward) of the steps that have rewards of their own."""
    found = []
    for answer, score in zip(answers, scores, strict=True):
        steps = score.steps if isinstance(score, rewards.StepRewards) else ()
        tokens = step_tokens(t.tokenizer, answer.ids, [end for end, _ in steps])
        found.append([(at, value) for at, (_, value) in zip(tokens, steps, strict=True)])
    return found


def _loss(
    t: PpoRun, batch: Batch, rows_B: Tensor, packed: Packed
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Clipped surrogate, value loss and entropy bonus."""
    c, mask, n = t.config, packed.mask_BT, packed.mask_BT.shape[1]
    assert batch.values is not None and batch.returns is not None
    old, old_values, advantages, returns = (
        x[rows_B, :n] for x in (batch.logps, batch.values, batch.advantages, batch.returns)
    )
    with t.accelerator.autocast():
        logps, entropy, states = rollout.forward(
            t.policy, packed, c.temperature, models.values_from_policy(t), c.entropy_coef > 0
        )
        values = models.values_of(t, packed, states)
    policy_loss, clipped = pg.policy_loss(logps, old, advantages, mask, c.clip)
    value_loss, value_clipped = pg.value_loss(values, old_values, returns, mask, c.value_clip)
    bonus = 0.0 if entropy is None else c.entropy_coef * pg.masked_sum(entropy, mask)
    shift = pg.masked_sum(pg.kl_estimate(old, logps.detach(), "k3"), mask)
    loss = policy_loss + c.value_coef * value_loss - bonus
    return loss, (policy_loss, value_loss, clipped, value_clipped, shift)


METHOD = Method(
    name="ppo",
    stage="ppo",
    whole_answers=False,
    scores_alone=False,
    advantages=_advantages,
    loss=_loss,
    reported=("policy_loss", "value_loss", "clip_fraction", "value_clip_fraction", "shift"),
)
