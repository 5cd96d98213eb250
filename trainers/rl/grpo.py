"""GRPO and RLOO, which compare answers to the same prompt and need no value function. The loop is
`rl.loop`.

What each setting optimises (`benchmarks/exact_optimum.py` shows it), with r the reward, p the
reference, Q the expected final reward of a token, G the answers of a group:

- `rloo`: over whole answers p(y) exp(r(y) / beta), as PPO; KL is in the reward.
- `grpo`, `kl: reverse`: token by token p exp(Q / b) with b = beta G / (G - 1).
- `grpo`, `kl: forward`: token by token b p / (lambda - Q), the other divergence, which stays nearer
  to p.

GRPO's KL is a loss term: no token answers for the KL of later ones. Its group mean holds the answer
itself, which shrinks advantages by (G - 1) / G. With `scale_rewards: group` the effective beta
differs by prompt.

Ratio, clipping and loss are a token in GRPO (a mean over all tokens of an update, "dapo"), and an
answer in RLOO (a mean over answers). Both are those of TRL 1.16's trainers, which a test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from prefab.trainers.registry import Stage
from prefab.trainers.rl import checkpoint, loop, models, rollout
from prefab.trainers.rl import policy_gradient as pg
from prefab.trainers.rl.batches import Packed
from prefab.trainers.rl.config import GrpoConfig
from prefab.trainers.rl.rewards import Source
from prefab.trainers.rl.rollout import Prompt
from prefab.trainers.rl.state import Batch, GrpoRun, Method, State

if TYPE_CHECKING:
    from torch import Tensor


def run(
    config: GrpoConfig,
    prompts: Sequence[Prompt] | None = None,
    sources: Sequence[Source] | None = None,
    gold: Source | None = None,
    eval_prompts: Sequence[Prompt] = (),
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> State:
    """Train by GRPO or RLOO; see `loop.run`."""
    return loop.run(prepare_run, config, prompts, sources, gold, eval_prompts, on_step)


STAGE = Stage(
    GrpoConfig, run, "prompts", ("policy", checkpoint.METRICS), "policy", with_rewards=True
)


def prepare_run(
    config: GrpoConfig, prompts: Sequence[Prompt], sources: Sequence[Source]
) -> GrpoRun:
    """See `models.prepare_run`."""
    return models.prepare_run(GrpoRun, METHODS[config.method], config, prompts, sources)


def _grpo_advantages(
    t: GrpoRun, batch: Batch, scores: Sequence[float], groups: Sequence[int], _: dict[str, Any]
) -> Tensor:
    """The same for each token of an answer, B T."""
    found_B = pg.group_advantages(*_in_groups(batch, scores, groups), t.config.scale_rewards)
    return found_B[:, None].to(batch.logps).expand_as(batch.logps)


def _rloo_advantages(
    t: GrpoRun, batch: Batch, scores: Sequence[float], groups: Sequence[int], _: dict[str, Any]
) -> Tensor:
    """Of scores less beta times the KL of the whole answer, B 1."""
    scores_B, group_B = _in_groups(batch, scores, groups)
    kl_B = pg.answer_sums(batch.logps - batch.reference, batch.mask)[:, 0]
    found_B = pg.leave_one_out_advantages(scores_B - t.state.beta * kl_B, group_B)
    return found_B[:, None].to(batch.logps)


def _in_groups(
    batch: Batch, scores: Sequence[float], groups: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(scores, numbers of their groups), each B."""
    import torch

    device = batch.logps.device
    return (
        torch.tensor(scores, dtype=torch.float64, device=device),
        torch.tensor(groups, device=device),
    )


def _grpo_loss(
    t: GrpoRun, batch: Batch, rows_B: Tensor, packed: Packed
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Clipped surrogate and KL, a token."""
    c, mask, n, once = t.config, packed.mask_BT, packed.mask_BT.shape[1], loop.in_one_pass(t)
    with t.accelerator.autocast():
        logps, entropy, _ = rollout.forward(t.policy, packed, c.temperature, entropy=once)
    if once:
        assert entropy is not None  # it was asked for
        batch.logps[rows_B, :n], batch.entropy[rows_B, :n] = logps.detach(), entropy.detach()
    old, reference, advantages = (
        x[rows_B, :n] for x in (batch.logps, batch.reference, batch.advantages)
    )
    loss, clipped = pg.policy_loss(logps, old, advantages, mask, c.clip)
    policy_loss = loss
    if t.state.beta > 0:
        kl = pg.kl_loss(logps, old, reference, mask, corrected=c.kl == "reverse")
        loss = policy_loss + t.state.beta * kl
    shift = pg.masked_sum(pg.kl_estimate(old, logps.detach(), "k3"), mask)
    return loss, (loss, policy_loss, clipped, shift)


def _rloo_loss(
    t: GrpoRun, batch: Batch, rows_B: Tensor, packed: Packed
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Clipped surrogate of whole answers."""
    c, mask, n = t.config, packed.mask_BT, packed.mask_BT.shape[1]
    with t.accelerator.autocast():
        logps, *_ = rollout.forward(t.policy, packed, c.temperature)
    new, old = (pg.answer_sums(x, mask) for x in (logps, batch.logps[rows_B, :n]))
    loss, clipped = pg.policy_loss(new, old, batch.advantages[rows_B], mask[:, :1], c.clip)
    shift = pg.masked_sum(pg.kl_estimate(old, new.detach(), "k3"), mask[:, :1])
    return loss, (loss, loss, clipped, shift)


REPORTED = ("loss", "policy_loss", "clip_fraction", "shift")
METHODS = {
    "grpo": Method(
        name="grpo",
        stage="grpo",
        whole_answers=False,
        scores_alone=True,
        advantages=_grpo_advantages,
        loss=_grpo_loss,
        reported=REPORTED,
    ),
    "rloo": Method(
        name="rloo",
        stage="grpo",
        whole_answers=True,
        scores_alone=False,
        advantages=_rloo_advantages,
        loss=_rloo_loss,
        reported=REPORTED,
    ),
}
