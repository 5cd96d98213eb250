"""Over-optimisation: gold beside proxy over the distance from the reference, and an alarm when they
part.

Gold is what nothing trains on: a held-out judge, or the embedded world's oracle. Every evaluation
asks the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, sqrt
from statistics import fmean
from typing import Literal

import numpy as np

from prefab.factory.stats import Estimate, t_quantile, undefined

LEVEL = 0.05  # of the alarm over a whole run


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A policy at one step: KL to the reference in nats an answer, mean proxy, and gold for each of
    the same prompts.
    """

    step: int
    kl: float
    proxy: float
    gold: tuple[float, ...]

    @property
    def gold_mean(self) -> float:
        """Mean gold over the prompts."""
        return fmean(self.gold)


@dataclass(frozen=True, slots=True)
class CachedEval:
    """What the last evaluation saw of one prompt: the answer's tokens, their log-probability to the
    reference, scores.
    """

    ids: list[int]
    reference_logp: float
    proxy: float | None
    gold: float


@dataclass(frozen=True, slots=True)
class Alarm:
    """Gold has fallen below its best (at `best_step`) while the proxy rose. `lost` is the mean
    paired difference.
    """

    step: int
    best_step: int
    lost: float
    proxy_gained: float

    def __str__(self) -> str:
        return (
            f"over-optimisation: since step {self.best_step} the proxy rose by {self.proxy_gained:.3g} and gold fell "
            f"by {self.lost:.3g} on the same prompts, twice running. Keep the checkpoint of step {self.best_step}, and "
            "raise beta or mend the reward"
        )


def best(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The evaluation with the highest gold; the first of equals."""
    return max(evaluations, key=lambda e: (e.gold_mean, -e.step))


def fallen(evaluations: Sequence[Evaluation], tests: float, level: float = LEVEL) -> bool:
    """Whether the last evaluation's gold is below the best one's, by a one-sided paired t test at
    `level` / `tests`, while its proxy is above.

    The best of many evaluations is partly chance: against "two standard errors below the best" a
    plateau of many evaluations is called a fall nearly always. So the test is paired, and its level
    is divided.
    """
    now, top = evaluations[-1], best(evaluations)
    if top.step == now.step or now.proxy <= top.proxy:
        return False
    lost = np.subtract(top.gold, now.gold)
    n, mean = len(lost), float(lost.mean())
    if n < 2 or mean <= 0:
        return False
    level /= max(tests, 1)
    if np.ptp(lost) == 0:  # all prompts lost the same: the sign test
        return 2.0**-n <= level
    return mean / (float(lost.std(ddof=1)) / sqrt(n)) > t_quantile(1 - level, n - 1)


def suspected(evaluations: Sequence[Evaluation]) -> bool:
    """Whether gold is `fallen` at the last evaluation, at a tenth of the alarm's level: reason to
    ask again after the next step, and what the alarm requires of the evaluation before.
    """
    return fallen(evaluations, 10)


def alarm(evaluations: Sequence[Evaluation], planned: int, level: float = LEVEL) -> Alarm | None:
    """The alarm, if it is on at the last of these evaluations: `suspected` at the one before, and
    `fallen` there with the level divided by n²/3, where n is how many evaluations the run will have
    (`planned`, or more where there were more).

    The best and the last evaluation are one pair of n(n - 1)/2, and they depend on one another:
    sampled with a fixed seed only some answers change from step to step. Simulated with 2 to 100%
    of them changing (`python -m benchmarks.alarm --simulate`), at most `level` of the runs whose
    gold never changes have an alarm; divided by n alone it was up to three times that.
    """
    n = max(planned, len(evaluations))
    if len(evaluations) <= 2 or not suspected(evaluations[:-1]):
        return None
    if not fallen(evaluations, n * n / 3, level):
        return None
    now, top = evaluations[-1], best(evaluations)
    return Alarm(now.step, top.step, top.gold_mean - now.gold_mean, now.proxy - top.proxy)


@dataclass(frozen=True, slots=True)
class Fit:
    """gold(d) - gold(0) = d (a - b d) for best-of-n, d (a - b log d) for RL, with d = sqrt(KL).

    `peak` is the d where the fitted curve is highest, None where it has no peak (b is not
    positive).
    """

    form: Literal["bon", "rl"]
    a: Estimate
    b: Estimate
    peak: float | None
    rmse: float | None


def gao_fit(kl: Sequence[float], gold: Sequence[float], form: Literal["bon", "rl"]) -> Fit:
    """Gao's form fitted to gold scores relative to the reference's (so that 0 nats means 0).

    Both forms are linear in a and b: least squares, with t intervals that are exact for errors of
    one deviation. Undefined for fewer than 3 points apart from the start, or points that all stand
    at one distance.
    Source: Gao, Schulman and Hilton 2023 (2210.10760), section 3.
    """
    d, y = np.sqrt(np.asarray(kl, dtype=float).clip(min=0)), np.asarray(gold, dtype=float)
    known = d > 0
    d, y = d[known], y[known]
    if len(d) < 3:
        why = undefined(f"{len(d)} points away from the reference; at least 3 are needed", len(d))
        return Fit(form, why, why, None, None)
    x = np.column_stack([d, -d * d if form == "bon" else -d * np.log(d)])
    if np.linalg.matrix_rank(x) < 2:
        why = undefined("all points are at the same distance from the reference", len(d))
        return Fit(form, why, why, None, None)
    coefficients, *_ = np.linalg.lstsq(x, y, rcond=None)
    errors, df = y - x @ coefficients, len(d) - 2
    variance = float(errors @ errors) / df
    se = np.sqrt(variance * np.diag(np.linalg.inv(x.T @ x)))
    half = t_quantile(0.975, df) * se
    a, b = (
        Estimate(float(c), float(s), float(c - h), float(c + h), len(d))
        for c, s, h in zip(coefficients, se, half, strict=True)
    )
    return Fit(
        form,
        a,
        b,
        _peak(form, float(coefficients[0]), float(coefficients[1])),
        sqrt(float(np.mean(errors**2))),
    )


def gained_at(path: Sequence[tuple[float, float]], kl: float) -> float | None:
    """Gold gained at `kl` nats, from (KL, gold gained) along a run; None beyond the furthest.

    Straight lines over sqrt(KL) between what was measured, from nothing gained at no distance.
    """
    if kl > max((k for k, _ in path), default=0.0):
        return None
    d, gained = zip(*sorted([(0.0, 0.0), *((sqrt(max(k, 0.0)), g) for k, g in path)]), strict=True)
    return float(np.interp(sqrt(kl), d, gained))


def _peak(form: str, a: float, b: float) -> float | None:
    if b <= 0 or (form == "bon" and a <= 0):
        return None
    return a / (2 * b) if form == "bon" else exp(min(a / b - 1, 700.0))


def distinct(texts: Sequence[str], n: int) -> float | None:
    """Distinct n-grams of words as a share of all; None where there are none. Source: Li et al.
    2016, distinct-n.
    """
    grams = [
        tuple(words[i : i + n])
        for words in map(str.split, texts)
        for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else None
