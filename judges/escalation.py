"""Which comparisons a stronger judge is asked about: those on which the first judges are unsure or
disagree, and those that could not be scored.

The budget holds for each prompt by itself, and what is left over is drawn from the prompt's
identity: the same comparisons are escalated in any order of execution, and again by a rerun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import floor

from prefab.factory.decision import Reading, by_principle, scored_readings
from prefab.factory.types import Preference

_EPS = 1e-12
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class When:
    """The conditions for asking the stronger judge: the likeliest label (a, b or tie) has a
    probability within `margin` of a half (None: this is not a condition), or judges pick different
    sides. A comparison that could not be scored is always escalated.
    """

    margin: float | None = 0.2
    disagreement: bool = True


def doubt(
    preference: Preference, readings: Sequence[Reading], when: When, tie_margin: float = 0.02
) -> str:
    """Why the first judges' readings are not enough: unscored, divided or unsure; empty when they
    are.
    """
    if preference.p_a is None:
        return "unscored"
    if when.disagreement and _divided(readings, tie_margin):
        return "divided"
    unsure = when.margin is not None and (certainty(readings) or 0.0) <= 0.5 + when.margin + _EPS
    return "unsure" if unsure else ""


def certainty(readings: Sequence[Reading]) -> float | None:
    """The probability of the likeliest of a, b and tie, under the principle where it is smallest;
    None without a reading.

    Judges that are sure of a tie are not unsure, though their P(a) is a half.
    """
    sums = by_principle(scored_readings(readings))
    means = [(p / weight, tie / weight) for p, tie, weight in sums]
    return min((max(p - tie / 2, 1 - p - tie / 2, tie) for p, tie in means), default=None)


def _divided(readings: Sequence[Reading], tie_margin: float) -> bool:
    """Whether one judge, over all its principles, picks a and another picks b. A judge within the
    tie margin picks neither.
    """
    sums: dict[str, list[float]] = {}
    for r, p_a in scored_readings(readings):
        total = sums.setdefault(r.judge, [0.0, 0.0])
        total[0] += r.weight * (p_a - 0.5)
        total[1] += r.weight
    sides = {
        total > 0 for total, weight in sums.values() if abs(total / weight) > tie_margin + _EPS
    }
    return len(sides) > 1


def quota(n: int, max_share: float, seed: int, prompt: str, round: int = 0) -> int:
    """How many of a prompt's `n` comparisons may be escalated: `n` times the share; whether its
    fraction is rounded up is drawn from the prompt's identity. So the mean over prompts is the
    share itself, also when a prompt has few comparisons.
    """
    exact = n * max_share
    whole = floor(exact + _EPS)
    state = blake2b(f"escalate\0{seed}\0{prompt}\0{round}".encode(), digest_size=8).digest()
    return whole + ((int.from_bytes(state, "big") // 4096 + 0.5) / 2**52 < exact - whole)


def choose(doubts: Mapping[Pair, tuple[str, float | None]], allowed: int) -> dict[Pair, str]:
    """Which comparisons are escalated. Gives, for each with its doubt and certainty, the reason to
    escalate it, `budget` where the quota was used up by others, or an empty text. Unscored ones
    come first, then the least certain.
    """
    wanted = sorted(
        (pair for pair, (why, _) in doubts.items() if why),
        key=lambda pair: (_rank(doubts[pair]), pair),
    )
    asked = set(wanted[:allowed])
    return {
        pair: why if pair in asked or not why else "budget" for pair, (why, _) in doubts.items()
    }


def _rank(doubt: tuple[str, float | None]) -> float:
    why, certain = doubt
    return -1.0 if why == "unscored" or certain is None else certain
