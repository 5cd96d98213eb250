"""The arithmetic of PPO, GRPO and RLOO as pure functions of tensors.

Axes: B answers, T tokens of an answer (padded on the right), V vocabulary. A mask is True on real
tokens: those up to and including the one that ends the answer. What stands outside the mask never
matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

KLForm = Literal["k1", "k2", "k3"]
Scale = Literal["none", "group", "batch"]
EPSILON = 1e-8  # keeps a deviation of zero from dividing
SCALE_EPSILON = 1e-4  # as EPSILON, of advantages in groups: TRL's


def answer_mask(tokens_BT: Tensor, end_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(mask B T: True up to and including the first end token, ended B: whether there was one)."""
    import torch

    ends_BT = torch.isin(
        tokens_BT, torch.tensor(list(end_ids), dtype=tokens_BT.dtype, device=tokens_BT.device)
    )
    before_BT = ends_BT.cumsum(-1) - ends_BT.long()  # end tokens strictly before this one
    return before_BT == 0, ends_BT.any(-1)


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The sum over real tokens; a NaN outside the mask does no harm."""
    return x_BT.masked_fill(~mask_BT, 0.0).sum()


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The mean over real tokens; 0 where there are none."""
    return masked_sum(x_BT, mask_BT) / mask_BT.sum().clamp(min=1)


def whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """Scaled to deviation 1 over real tokens, with mean 0, or with its mean kept; 0 outside the
    mask.

    The deviation is that of the population (divided by n). Source: Ziegler et al. 2019; Huang et
    al. 2024, detail 7.
    """
    mean = masked_mean(x_BT, mask_BT)
    variance = masked_mean((x_BT - mean) ** 2, mask_BT)
    white_BT = (x_BT - mean) * (variance + EPSILON).rsqrt()
    return (white_BT if shift_mean else white_BT + mean).masked_fill(~mask_BT, 0.0)


def kl_estimate(logps_BT: Tensor, reference_BT: Tensor, form: KLForm) -> Tensor:
    """Per-token estimates of KL(policy || reference) at tokens drawn from the policy.

    k1, the log-ratio, has no bias; k2 = k1^2/2 is biased; k3 has no bias, is never negative, and
    varies less.
    Source: Schulman 2020, "Approximating KL divergence".
    """
    ratio_BT = logps_BT - reference_BT
    if form == "k1":
        return ratio_BT
    if form == "k2":
        return ratio_BT.square() / 2
    if form == "k3":
        return (-ratio_BT).expm1() + ratio_BT
    raise ValueError(f"unknown KL estimator {form!r}")


def penalised_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """Rewards a token: -beta KL everywhere, the answer's score at its last real token, 0 outside
    the mask.

    Source: Ziegler et al. 2019, eq. 2, with k1 a token.
    """
    import torch

    rewards_BT = (-beta * kl_BT).masked_fill(~mask_BT, 0.0)
    last_B = mask_BT.sum(-1) - 1
    rows = torch.arange(len(scores_B), device=scores_B.device)[last_B >= 0]
    return rewards_BT.index_put(
        (rows, last_B[rows]), scores_B[rows].to(rewards_BT.dtype), accumulate=True
    )


def place_step_rewards(
    rewards_BT: Tensor, steps: Sequence[Sequence[tuple[int, float]]], mask_BT: Tensor
) -> Tensor:
    """The rewards with those of steps moved from the last real token to the tokens that end the
    steps. The sum of each row stays, and so does the optimum where gamma is 1.

    `steps`: of each row, (token, reward). Source: Uesato et al. 2022, process-based feedback.
    """
    moved_BT = rewards_BT.clone()
    last_B = mask_BT.sum(-1) - 1
    for b, of_row in enumerate(steps):
        for token, reward in of_row:
            moved_BT[b, token] += reward
            moved_BT[b, last_B[b]] -= reward
    return moved_BT


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), 0 outside the mask; the value after the last real token is 0, finished
    or not.

    Source: Schulman et al. 2016, eq. 16; returns = advantages + values, the targets of the value
    function.
    """
    import torch

    rewards_BT, values_BT = (x.masked_fill(~mask_BT, 0.0) for x in (rewards_BT, values_BT))
    next_value, running, advantages = (
        torch.zeros_like(values_BT[:, 0]),
        torch.zeros_like(values_BT[:, 0]),
        [],
    )
    for t in reversed(range(values_BT.shape[1])):
        running = rewards_BT[:, t] + gamma * next_value - values_BT[:, t] + gamma * lam * running
        running = running.masked_fill(~mask_BT[:, t], 0.0)
        next_value = values_BT[:, t]
        advantages.append(running)
    advantages_BT = torch.stack(advantages[::-1], dim=1)
    return advantages_BT, advantages_BT + values_BT


def answer_sums(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The sum over the real tokens of each answer, B 1."""
    return x_BT.masked_fill(~mask_BT, 0.0).sum(-1, keepdim=True)


def group_advantages(scores_B: Tensor, group_B: Tensor, scale: Scale = "none") -> Tensor:
    """Scores less the mean of their group, divided by the deviation (of a sample: by n - 1) of the
    group or of all scores where `scale` says so; 0 for an answer that is alone in its group.

    `group_B`: the number of each answer's group, from 0.
    Source: Shao et al. 2024 (GRPO), section 4.1; Liu et al. 2025, "Dr. GRPO", for `none`.
    """
    gain_B, n_B = _above_mean(scores_B, group_B)
    if scale == "batch":
        return gain_B / (scores_B.std() + SCALE_EPSILON)
    if scale == "group":
        squares_B = _group_sums(gain_B.square(), group_B)
        return gain_B / ((squares_B / (n_B - 1).clamp(min=1)).sqrt() + SCALE_EPSILON)
    return gain_B


def leave_one_out_advantages(scores_B: Tensor, group_B: Tensor) -> Tensor:
    """Scores less the mean of the other answers of their group; 0 for an answer without others.

    Source: Ahmadian et al. 2024 (RLOO), eq. 10.
    """
    gain_B, n_B = _above_mean(scores_B, group_B)
    return gain_B * n_B / (n_B - 1).clamp(min=1)


def _above_mean(scores_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """(scores less the mean of their group, how many answers the group has)."""
    n_B = group_B.bincount()[group_B]
    return scores_B - _group_sums(scores_B, group_B) / n_B, n_B


def _group_sums(x_B: Tensor, group_B: Tensor) -> Tensor:
    """Of each answer, the sum over its group."""
    return x_B.new_zeros(int(group_B.max()) + 1).index_add(0, group_B, x_B)[group_B]


def kl_loss(
    logps_BT: Tensor, old_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, corrected: bool
) -> Tensor:
    """k3 to the reference, summed over real tokens, to be differentiated. `corrected`: times the
    ratio to the policy that sampled, so that the gradient is that of the reverse KL; without it
    that of the forward KL.

    Source: DeepSeek-V3.2, eq. 7, for the correction.
    """
    logps_BT, old_BT, reference_BT = (
        x.masked_fill(~mask_BT, 0.0) for x in (logps_BT, old_BT, reference_BT)
    )
    k3_BT = kl_estimate(logps_BT, reference_BT, "k3")
    return masked_sum(k3_BT * (logps_BT - old_BT).exp() if corrected else k3_BT, mask_BT)


def policy_loss(
    logps_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """(the clipped surrogate, summed over real tokens; how many tokens were clipped).

    A sum, so that parts of a minibatch add up to the whole whatever their lengths.
    Source: Schulman et al. 2017, eq. 7.
    """
    import torch

    ratio_BT = (logps_BT - old_BT).masked_fill(~mask_BT, 0.0).exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip, 1 + clip)
    return masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT), (
        (clipped_BT > plain_BT) & mask_BT
    ).sum()


def importance_weights(logps_BT: Tensor, sampled_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """How much more likely the policy makes each token than the one that sampled it, at most `cap`;
    0 outside the mask.

    Source: truncated importance sampling, Ionides 2008; for tokens that an older policy sampled, Fu
    et al. 2025 (AReaL), whose clipped ratio is to the policy before the update, as here.
    """
    ratio_BT = (logps_BT - sampled_BT).masked_fill(~mask_BT, 0.0).exp().clamp(max=cap)
    return ratio_BT.masked_fill(~mask_BT, 0.0)


def value_loss(
    values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """(half the squared error, clipped around the old values, summed over real tokens; tokens
    clipped).

    `clip` None leaves the clipping out. Source: Schulman et al.'s `baselines`; Huang et al. 2024,
    detail 6.
    """
    import torch

    values_BT, old_BT, returns_BT = (
        x.masked_fill(~mask_BT, 0.0) for x in (values_BT, old_BT, returns_BT)
    )
    plain_BT = (values_BT - returns_BT).square() / 2
    if clip is None:
        return masked_sum(plain_BT, mask_BT), torch.zeros((), dtype=torch.long)
    near_BT = old_BT + (values_BT - old_BT).clamp(-clip, clip)
    clipped_BT = (near_BT - returns_BT).square() / 2
    return masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT), (
        (clipped_BT > plain_BT) & mask_BT
    ).sum()


def entropy(logps_BTV: Tensor) -> Tensor:
    """Entropy in nats of the distribution over the next token, from all its log-probabilities."""
    return -(logps_BTV.exp() * logps_BTV).sum(-1)


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) over real tokens; None where the returns do not
    vary.
    """
    returns, errors = returns_BT[mask_BT].double(), (returns_BT - values_BT)[mask_BT].double()
    if returns.numel() < 2 or float(returns.var()) < EPSILON:
        return None
    return 1.0 - float(errors.var() / returns.var())


def adapt_beta(beta: float, kl: float, target: float, n: int, horizon: float) -> float:
    """Beta after a step of n answers whose KL was `kl` nats an answer: up where KL is above its
    target, else down.

    A step changes it by at most 20% of n / horizon. Source: Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * n / horizon)
