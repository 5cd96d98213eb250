"""Losses of the offline stages, as pure functions of tensors; each gives one number a pair or
answer.

A pair's target is the probability that its `chosen` is the better one: 1.0 is a hard label, 0.5
says nothing. For every pair loss f it means the expected loss under that probability, target
f(chosen, rejected) + (1 - target) f(rejected, chosen); for the sigmoid that is the cross-entropy
with a soft label, for IPO its own population loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def logsigmoid(x: Tensor) -> Tensor:
    """log(sigmoid(x)), exact far into both tails."""
    from torch.nn import functional

    return functional.logsigmoid(x)


class Side(NamedTuple):
    """One answer of each pair: summed log-probabilities under the policy and the reference, and how
    many tokens.

    Shapes: B each.
    """

    logps_B: Tensor
    ref_logps_B: Tensor
    tokens_B: Tensor

    @property
    def ratio_B(self) -> Tensor:
        """Log-ratio of policy and reference: the implicit reward divided by beta, up to a constant
        of the prompt.
        """
        return self.logps_B - self.ref_logps_B

    @property
    def mean_ratio_B(self) -> Tensor:
        """The log-ratio a token."""
        return self.ratio_B / self.tokens_B.clamp(min=1)


def penalised(ref_logps_B: Tensor, tokens_B: Tensor, rate: float) -> Tensor:
    """The reference's log-probabilities less `rate` a token, so that beta times the log-ratio is
    the reward of an optimal policy that pays beta `rate` for each token.

    Source: Park et al. 2024 (2403.19159), eq. 9: R-DPO, with alpha = beta rate.
    """
    return ref_logps_B - rate * tokens_B if rate else ref_logps_B


def bradley_terry(
    chosen_B: Tensor,
    rejected_B: Tensor,
    target_B: Tensor | float = 1.0,
    margin_B: Tensor | float = 0.0,
) -> Tensor:
    """Cross-entropy of the preference that two rewards imply, sigmoid(chosen - rejected - margin),
    with the target.

    Its gradient in `chosen` is that probability minus the target: zero exactly where they are
    equal.
    Shapes: B.
    Source: Bradley and Terry 1952; soft targets as in Bai et al. 2022 and Lee et al. 2023; margin
    of Llama 2 (2307.09288).
    """
    logits_B = chosen_B - rejected_B - margin_B
    return -(target_B * logsigmoid(logits_B) + (1 - target_B) * logsigmoid(-logits_B))


def centring(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """(chosen + rejected)^2: holds rewards near zero, since pairs alone leave a constant of each
    prompt free.

    Shapes: B.
    Source: Eisenstein et al. 2023 (2312.09244), eq. 2; TRL's `center_rewards_coefficient`.
    """
    return (chosen_B + rejected_B) ** 2


def sigmoid(won: Side, lost: Side, beta: float, _: float = 0.0) -> Tensor:
    """-log sigmoid(beta (ratio_won - ratio_lost)). Source: Rafailov et al. 2023 (2305.18290), eq.
    7.
    """
    return -logsigmoid(beta * (won.ratio_B - lost.ratio_B))


def sigmoid_norm(won: Side, lost: Side, beta: float, _: float = 0.0) -> Tensor:
    """As `sigmoid`, of log-ratios a token. Source: TRL's `sigmoid_norm` (Tulu 3, 2411.15124)."""
    return -logsigmoid(beta * (won.mean_ratio_B - lost.mean_ratio_B))


def ipo(won: Side, lost: Side, beta: float, _: float = 0.0) -> Tensor:
    """(difference of log-ratios a token - 1 / (2 beta))^2: the difference has a target, so it
    cannot run away.

    With a soft target the difference ends at (2 target - 1) / (2 beta).
    Source: Azar et al. 2023 (2310.12036), eq. 17; a token, as TRL and its authors do.
    """
    return (won.mean_ratio_B - lost.mean_ratio_B - 1 / (2 * beta)) ** 2


def hinge(won: Side, lost: Side, beta: float, _: float = 0.0) -> Tensor:
    """max(0, 1 - beta difference). A soft target only scales it: it learns which is better, not by
    how much.

    Source: SLiC-HF (2305.10425), RSO (2309.06657).
    """
    return (1 - beta * (won.ratio_B - lost.ratio_B)).relu()


def robust(won: Side, lost: Side, beta: float, flipped: float) -> Tensor:
    """`sigmoid` made unbiased for labels of which a share `flipped` is wrong. May be negative.

    Source: Chowdhury et al. 2024 (2403.00409), eq. 12.
    """
    clean_B, noisy_B = sigmoid(won, lost, beta), sigmoid(lost, won, beta)
    return ((1 - flipped) * clean_B - flipped * noisy_B) / (1 - 2 * flipped)


def simpo(won: Side, lost: Side, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta difference of log-probabilities a token - gamma); there is no reference.

    Source: Meng et al. 2024 (2405.14734), eq. 6; TRL's CPO trainer with `loss_type="simpo"`.
    """
    mean_won_B, mean_lost_B = (side.logps_B / side.tokens_B.clamp(min=1) for side in (won, lost))
    return -logsigmoid(beta * (mean_won_B - mean_lost_B) - gamma)


def exo_pair(won: Side, lost: Side, beta: float, smoothing: float) -> Tensor:
    """KL from the policy's to the label's distribution over the two. Source: Ji et al. 2024
    (2402.00856), eq. 16.
    """
    logits_B = beta * (won.ratio_B - lost.ratio_B)
    labels = logits_B.new_tensor([1 - smoothing, smoothing]).log()
    return logits_B.sigmoid() * (logsigmoid(logits_B) - labels[0]) + (-logits_B).sigmoid() * (
        logsigmoid(-logits_B) - labels[1]
    )


def nca_pair(won: Side, lost: Side, beta: float, _: float = 0.0) -> Tensor:
    """Each answer's own likelihood against noise. Source: Chen et al. 2024 (2402.05369)."""
    rewards_B, others_B = beta * won.ratio_B, beta * lost.ratio_B
    return -logsigmoid(rewards_B) - 0.5 * logsigmoid(-rewards_B) - 0.5 * logsigmoid(-others_B)


def bco_pair(won: Side, lost: Side, beta: float, _: float = 0.0) -> Tensor:
    """A classifier of good and bad answers whose logit is the implicit reward. Source: Jung et al.
    2024 (2404.04656).
    """
    return -logsigmoid(beta * won.ratio_B) - logsigmoid(-beta * lost.ratio_B)


def sppo_hard(won: Side, lost: Side, beta: float, _: float = 0.0) -> Tensor:
    """Each log-ratio towards plus or minus 1 / (2 beta). Source: Wu et al. 2024 (2405.00675), eq.
    4.7.
    """
    return (won.ratio_B - 0.5 / beta) ** 2 + (lost.ratio_B + 0.5 / beta) ** 2


def apo_zero(won: Side, lost: Side, beta: float, _: float = 0.0) -> Tensor:
    """Up with the chosen, down with the rejected, each on its own. Source: 2408.06266, eq. 7."""
    return 1 - (beta * won.ratio_B).sigmoid() + (beta * lost.ratio_B).sigmoid()


def apo_down(won: Side, lost: Side, beta: float, _: float = 0.0) -> Tensor:
    """Down with both, more with the rejected: for chosen answers worse than the model's. Source:
    2408.06266, eq. 8.
    """
    return (beta * won.ratio_B).sigmoid() + 1 - (beta * (won.ratio_B - lost.ratio_B)).sigmoid()


def discopop(won: Side, lost: Side, beta: float, tau: float) -> Tensor:
    """A mixture of the logistic and the exponential loss, found by search. Source: 2406.08414, eq.
    5.
    """
    logits_B = beta * (won.ratio_B - lost.ratio_B)
    mix_B = (logits_B / tau).sigmoid()
    return -logsigmoid(logits_B) * (1 - mix_B) + (-logits_B).exp() * mix_B


PAIR_LOSSES: dict[str, Callable[[Side, Side, float, float], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "simpo": simpo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
# What the last argument of these is, where TRL's configuration says nothing else.
EXTRA = {"robust": 0.1, "simpo": 0.5, "exo_pair": 1e-3, "discopop": 0.05}


def preference(
    name: str,
    chosen: Side,
    rejected: Side,
    beta: float,
    target_B: Tensor | float = 1.0,
    extra: float | None = None,
) -> Tensor:
    """A pair loss by name, expected under the target probability. Where every target is 1 it is the
    plain loss.

    `extra` is what the loss takes besides beta: share of flipped labels (robust), margin (simpo),
    smoothing (exo_pair), temperature (discopop); left out: `EXTRA`.
    Shapes: B.
    """
    loss, more = PAIR_LOSSES[name], EXTRA.get(name, 0.0) if extra is None else extra
    right_B = loss(chosen, rejected, beta, more)
    if isinstance(target_B, float) and target_B == 1.0:
        return right_B
    return target_B * right_B + (1 - target_B) * loss(rejected, chosen, beta, more)


def implied_probability(chosen: Side, rejected: Side, beta: float) -> Tensor:
    """The probability that the policy, read as a reward model, gives to the chosen answer. Shapes:
    B.
    """
    return (beta * (chosen.ratio_B - rejected.ratio_B)).sigmoid()


def kto(
    ratio_B: Tensor,
    label_B: Tensor,
    kl: Tensor | float,
    beta: float,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Tensor:
    """How little each answer's utility is, seen from the point `kl` (a constant: nothing flows back
    through it).

    `label_B` is 1 for a thumb up, 0 for down; between them the expected loss.
    Shapes: B; kl a scalar, at least 0.
    Source: Ethayarajh et al. 2024 (2402.01306), eq. 7.
    """
    up_B = desirable * (1 - (beta * (ratio_B - kl)).sigmoid())
    down_B = undesirable * (1 - (beta * (kl - ratio_B)).sigmoid())
    return label_B * up_B + (1 - label_B) * down_B


def kto_reference(kl_logps_B: Tensor, kl_ref_logps_B: Tensor) -> Tensor:
    """The reference point of `kto`: the mean log-ratio of answers under prompts they do not belong
    to, at least 0.

    Shapes: B to a scalar without gradient.
    Source: Ethayarajh et al. 2024, section 4.1.
    """
    return (kl_logps_B - kl_ref_logps_B).mean().detach().clamp(min=0)


def weighted_mean(loss_B: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """The mean of weight times loss. Weights average 1 over the data, not over a batch: dividing by
    a batch's own sum would make a row count more where it happens to stand among light ones.
    Shapes: B to a scalar.
    """
    return loss_B.mean() if weight_B is None else (weight_B * loss_B).mean()
