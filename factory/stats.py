"""Estimates with their uncertainty: intervals, the bootstrap, and the length-controlled win rate.

What cannot be estimated is `undefined`, with the reason in words; it is never 0, 1 or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its standard error and 95% interval; `boot_*` is the bootstrap's interval where
    one was asked for.

    Either `value` is set or `undefined` says why not. `se` and the interval may be missing where
    the value is not (one item; no analytic formula).
    """

    value: float | None
    se: float | None = None
    low: float | None = None
    high: float | None = None
    n_items: int = 0
    n_raters: int = 0
    undefined: str | None = None
    boot_low: float | None = None
    boot_high: float | None = None


def undefined(reason: str, n_items: int = 0, n_raters: int = 0) -> Estimate:
    """An estimate without a value, and the reason."""
    return Estimate(None, n_items=n_items, n_raters=n_raters, undefined=reason)


def z_quantile(p: float) -> float:
    """The quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(p)


def t_quantile(p: float, df: float) -> float:
    """The quantile of Student's t with `df` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, p))


def student(values: Sequence[float], level: float = 0.95) -> Estimate:
    """A mean with Student's interval, for a few independent values such as seeds; no bounds for a
    single one.

    Source: Student 1908.
    """
    n = len(values)
    if n == 0:
        return undefined("no values")
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, None, None, None, 1)
    se = float(np.std(values, ddof=1)) / n**0.5
    half = t_quantile(0.5 + level / 2, n - 1) * se
    return Estimate(mean, se, mean - half, mean + half, n)


def wilson(successes: float, n: float, level: float = 0.95) -> Estimate:
    """A share with Wilson's score interval, which stays inside [0, 1] and is never empty at 0 or n.

    Source: Wilson 1927; Brown, Cai and DasGupta 2001 recommend it for small n.
    """
    if n <= 0:
        return undefined("no trials")
    z2 = z_quantile(0.5 + level / 2) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Estimate(p, sqrt(p * (1 - p) / n), low, high, int(n))


def clustered_share(
    hits: Sequence[bool] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    level: float = 0.95,
) -> Estimate:
    """A share with Wilson's interval at the effective number of items: the number of independent
    items that would give the same precision.

    With `clusters` (a prompt each) that is the number of items over their design effect, never
    above it; where all or none hit, which says nothing of the effect, the number of clusters.
    `n_items` counts items.
    Source: Korn and Graubard 1998, with Wilson's interval for theirs; design effect: Kish 1965.
    """
    hits = np.asarray(hits, dtype=float)
    n, p = len(hits), float(hits.mean()) if len(hits) else 0.0
    if clusters is None or n == 0:
        return wilson(float(hits.sum()), n, level)
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    m = int(groups.max()) + 1
    if m < 2:
        return Estimate(p, n_items=n)
    residuals = np.bincount(groups, weights=hits - p)
    return _clustered(p, n, m, float(residuals @ residuals), level)


def clustered_share_of_sums(
    n: float,
    hits: float,
    clusters: float,
    hits_hits: float,
    hits_n: float,
    n_n: float,
    level: float = 0.95,
) -> Estimate:
    """`clustered_share` from sums that a database makes.

    Args:
        n: Items.
        hits: Items that hit.
        clusters: Clusters that have items.
        hits_hits: The sum over clusters of hits squared.
        hits_n: That of hits times items.
        n_n: That of items squared.
        level: Of the interval.
    """
    if n <= 0:
        return undefined("no trials")
    p = hits / n
    if clusters < 2:
        return Estimate(p, n_items=int(n))
    squares = max(0.0, hits_hits - 2 * p * hits_n + p * p * n_n)
    return _clustered(p, int(n), int(clusters), squares, level)


def _clustered(p: float, n: int, m: int, squares: float, level: float) -> Estimate:
    """A share of `n` items in `m` clusters, by the sum of the clusters' squared residuals."""
    variance = m / (m - 1) * squares / n**2
    effective = float(m) if p in (0.0, 1.0) else n / max(1.0, variance * n / (p * (1 - p)))
    found = wilson(p * effective, effective, level)
    low, high = (0.0 if p == 0.0 else found.low), (1.0 if p == 1.0 else found.high)
    return Estimate(p, found.se, low, high, n)


def bootstrap(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    statistic: Callable[[np.ndarray], float] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """A mean (or another statistic of the rows) with a percentile interval over resampled items,
    seeded.

    With `clusters` (a prompt each) whole clusters are drawn, since answers to one prompt are not
    independent; `n_items` counts them then.
    Shapes: values N, or N x anything for a statistic of rows.
    Source: Efron 1979; for a mean over clusters, the ratio of resampled sums to resampled counts.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return undefined("no items")
    groups = (
        np.arange(len(values))
        if clusters is None
        else np.unique(np.asarray(clusters), return_inverse=True)[1]
    )
    n = int(groups.max()) + 1
    rng = np.random.default_rng(seed)
    if statistic is None:
        draws = _resampled_means(values, groups, n, resamples, rng)
        value = float(values.mean())
    else:
        draws = _resampled_statistics(values, groups, n, statistic, resamples, rng)
        value = float(statistic(values))
    if not isfinite(value):
        return undefined("the statistic is not finite", n)
    if n < 2:
        return Estimate(value, n_items=n)
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(
        value,
        float(draws.std(ddof=1)),
        float(low),
        float(high),
        n,
        0,
        None,
        float(low),
        float(high),
    )


def _resampled_means(
    values: np.ndarray, groups: np.ndarray, n: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    sums = np.bincount(groups, weights=values, minlength=n)
    sizes = np.bincount(groups, minlength=n).astype(float)
    draws = np.empty(resamples)
    step = max(1, 4_000_000 // n)  # 32 MB of indices at a time, at any size
    for start in range(0, resamples, step):
        chosen = rng.integers(0, n, size=(min(step, resamples - start), n))
        draws[start : start + len(chosen)] = sums[chosen].sum(1) / sizes[chosen].sum(1)
    return draws


def _resampled_statistics(
    values: np.ndarray,
    groups: np.ndarray,
    n: int,
    statistic: Callable[[np.ndarray], float],
    resamples: int,
    rng: np.random.Generator,
) -> np.ndarray:
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(groups, minlength=n))[:-1])
    draws = [
        statistic(values[np.concatenate([members[g] for g in rng.integers(0, n, n)])])
        for _ in range(resamples)
    ]
    return np.asarray(draws, dtype=float)


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """The mean of a - b over the same items, with a bootstrap interval: two checkpoints on the same
    prompts.
    """
    return bootstrap(
        np.asarray(a, dtype=float) - np.asarray(b, dtype=float), clusters, None, resamples, seed
    )


def length_controlled_win_rate(
    p_a: Sequence[float] | np.ndarray,
    length_a: Sequence[float] | np.ndarray,
    length_b: Sequence[float] | np.ndarray,
    level: float = 0.95,
    difficulty: Sequence[float] | None = None,
) -> Estimate:
    """The win rate of a over b if both wrote equally long: a logistic model in tanh(length
    difference / its deviation), read at zero difference. `p_a` may be soft; a tie is 0.5.

    `difficulty` is one number an instruction, known from elsewhere (AlpacaEval fits it over many
    models); each model takes it in its own way, so it gets a coefficient, and the win rate is the
    mean over the instructions. Without length differences it is the plain win rate. Undefined when
    length and winner cannot be told apart: one same difference everywhere, or one that separates
    wins from losses.
    Source: Dubois et al. 2024, section 3, per pair of models: its terms for the model, the length
    and the instruction, by maximum likelihood. AlpacaEval's code adds an L1 penalty chosen by
    cross-validation and 0.2 of weight on two baselines that were told to be short or long:
    shrinkage to their data, which another benchmark has not. Errors are robust to soft targets
    (sandwich), the interval is made in logits.
    """
    y = np.asarray(p_a, dtype=float)
    difference = np.asarray(length_a, dtype=float) - np.asarray(length_b, dtype=float)
    n = len(y)
    if n == 0:
        return undefined("no comparisons")
    if not difference.any():
        return _plain_win_rate(y, level)
    deviation = float(difference.std())
    if deviation <= 1e-12 * float(np.abs(difference).max()):
        return undefined("every comparison has the same length difference", n)
    terms = [np.ones(n), np.tanh(difference / deviation)]
    if difficulty is not None and np.ptp(hard := np.asarray(difficulty, dtype=float)) > 0:
        terms.append(
            (hard - hard.mean()) / hard.std()
        )  # the same model; the fit is easier on the computer
    x = np.column_stack(terms)
    beta = _logistic_fit(x, y)
    if beta is None:
        return undefined(
            "wins and losses are separated by length or difficulty, or one side always wins", n
        )
    return _read_at_zero(x, y, beta, level)


def _plain_win_rate(y: np.ndarray, level: float) -> Estimate:
    n, p = len(y), float(y.mean())
    if n < 2:
        return Estimate(p, n_items=n)
    se = float(y.std(ddof=1)) / sqrt(n)
    half = t_quantile(0.5 + level / 2, n - 1) * se
    return Estimate(p, se, max(0.0, p - half), min(1.0, p + half), n)


def _logistic_fit(x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Newton's method for the logistic likelihood with targets in [0, 1]; None where it has no
    finite maximum.
    """
    beta = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1.0 / (1.0 + np.exp(-np.clip(x @ beta, -500, 500)))
        information = (x * (p * (1 - p))[:, None]).T @ x
        if np.linalg.cond(information) > 1e13:
            return None
        step = np.linalg.solve(information, x.T @ (y - p))
        step *= min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-300))
        beta = beta + step
        if float(np.abs(beta).max()) > 50:  # odds of e^50: the likelihood grows without end
            return None
        if float(np.abs(step).max()) < 1e-13 * max(1.0, float(np.abs(beta).max())):
            return beta
    return beta if float(np.abs(step).max()) < 1e-8 else None


def _read_at_zero(x: np.ndarray, y: np.ndarray, beta: np.ndarray, level: float) -> Estimate:
    """The mean prediction without a length difference (column 1), its error by the delta method."""
    p = 1.0 / (1.0 + np.exp(-(x @ beta)))
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x)
    meat = (x * ((y - p) ** 2)[:, None]).T @ x
    equal = x.copy()
    equal[:, 1] = 0.0
    q = 1.0 / (1.0 + np.exp(-(equal @ beta)))
    value, slope = float(q.mean()), (equal * (q * (1 - q))[:, None]).mean(0)
    se = sqrt(max(float(slope @ bread @ meat @ bread @ slope), 0.0))
    logit, half = log(value / (1 - value)), z_quantile(0.5 + level / 2) * se / (value * (1 - value))
    return Estimate(value, se, _sigmoid(logit - half), _sigmoid(logit + half), len(y))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + exp(-x)) if x > -700 else 0.0
