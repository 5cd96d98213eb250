"""Estimates with their uncertainty: intervals, the bootstrap, and the length-controlled win rate.

What cannot be estimated is `undefined`, with the reason in words; it is never 0, 1 or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, isfinite, log, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its standard error and 95% interval; `boot_*` is the bootstrap's interval where
    one was asked for.

    Either `value` is set or `undefined` says why not. `se` and the interval may be missing where
    the value is not (one item; no analytic formula). `n_groups` counts the independent groups that
    the interval stands on; 0 where every item counts as independent.
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
    n_groups: int = 0


def bon_kl(n: int) -> float:
    """The largest KL of best-of-n to the policy it draws from, in nats: log n - (n - 1) / n. It is
    reached where no two answers score the same.

    Source: Stiennon et al. 2020, appendix G.3; an upper bound in general, Beirami et al. 2024.
    """
    return log(n) - (n - 1) / n


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

    With `clusters` (a group of prompts, or a prompt, each) that is the number of items over their
    design effect and over the square of Student's quantile to the normal one, never above the
    number of items; where all or none hit, which says nothing of the effect, the effective number
    of clusters. `n_items` counts items, `n_groups` clusters.
    Source: Korn and Graubard 1998, with Wilson's interval for theirs; design effect: Kish 1965;
    degrees of freedom: `effective_clusters` less one.
    """
    hits = np.asarray(hits, dtype=float)
    if clusters is None or len(hits) == 0:
        return wilson(float(hits.sum()), len(hits), level)
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    n_C = np.bincount(groups).astype(float)
    hits_C = np.bincount(groups, weights=hits)
    return clustered_share_of_sums(
        len(hits),
        float(hits.sum()),
        len(n_C),
        float(hits_C @ hits_C),
        float(hits_C @ n_C),
        float(n_C @ n_C),
        level,
    )


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
    p, m = float(hits / n), int(clusters)
    if m < 2:
        return Estimate(p, n_items=int(n), n_groups=m)
    independent = n * n / n_n
    if p in (0.0, 1.0):
        effective = independent
    else:
        squares = max(0.0, hits_hits - 2 * p * hits_n + p * p * n_n)
        variance = independent / (independent - 1) * squares / n**2
        quantiles = [t_quantile(0.5 + level / 2, df - 1) for df in (n, independent)]
        effective = min(n, p * (1 - p) / max(variance, 1e-300) * (quantiles[0] / quantiles[1]) ** 2)
    found = wilson(p * effective, effective, level) if effective > 1e-9 else Estimate(p)
    low, high = (0.0 if p == 0.0 else found.low), (1.0 if p == 1.0 else found.high)
    return Estimate(p, found.se, low, high, int(n), n_groups=m)


def effective_clusters(sizes_C: np.ndarray) -> float:
    """The number of equal clusters that tell as much as these of unequal sizes: (sum n)^2 / sum
    n^2. Less one it is the degrees of freedom of a variance between clusters.

    Source: Carter, Schnepel and Steigerwald 2017, for clusters that are alike within.
    """
    sizes_C = np.asarray(sizes_C, dtype=float)
    return float(sizes_C.sum() ** 2 / (sizes_C @ sizes_C))


def bootstrap(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    statistic: Callable[[np.ndarray], float] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """A mean (or another statistic of the rows) with an interval that stands on resampled clusters.

    Of a mean of zeros and ones the interval is that of `clustered_share`; of any other mean it is
    studentised (`clustered_mean`). Another statistic has the percentile interval, widened by
    Student's quantile to the normal one. With `clusters` (a group of prompts, or a prompt, each)
    whole clusters are drawn, since answers to one prompt are not independent; `n_items` and
    `n_groups` count them then. Seeded.
    Shapes: values N, or N x anything for a statistic of rows.
    Source: Efron 1979; widened: Hesterberg 2015, section 5.3.
    """
    values = np.asarray(values, dtype=float)
    if statistic is None:
        if clusters is not None and len(values) and np.isin(values, (0.0, 1.0)).all():
            share = clustered_share(values, clusters, level)
            return replace(share, n_items=share.n_groups)
        return clustered_mean(values, clusters, resamples, seed, level)
    if len(values) == 0:
        return undefined("no items")
    groups, sizes_C = _clusters(len(values), clusters)
    m, value = len(sizes_C), float(statistic(values))
    if not isfinite(value):
        return undefined("the statistic is not finite", m)
    n_groups = 0 if clusters is None else m
    if m < 2:
        return Estimate(value, n_items=m, n_groups=n_groups)
    draws = _resampled_statistics(
        values, groups, m, statistic, resamples, np.random.default_rng(seed)
    )
    low, high = np.quantile(draws, percentiles(effective_clusters(sizes_C), level))
    return Estimate(value, float(draws.std(ddof=1)), float(low), float(high), m, n_groups=n_groups)


def percentiles(independent: float, level: float = 0.95) -> tuple[float, float]:
    """The two quantiles of resampled values that make an interval, widened for few `independent`
    items or clusters.

    A resampled deviation is too small by sqrt((m - 1) / m), and is read by the normal quantile
    where Student's is due. Source: Hesterberg 2015, section 5.3.
    """
    from scipy.special import ndtr

    m = max(independent, 1.0 + 1e-6)
    low = float(ndtr(-sqrt(m / (m - 1)) * t_quantile(0.5 + level / 2, m - 1)))
    return low, 1.0 - low


MANY_CLUSTERS = 5000  # from here on a resampled quantile is Student's to two digits


def clustered_mean(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """A mean with a studentised bootstrap interval over whole clusters.

    Each side reaches as many standard errors (robust to clusters) as the resampled t values say,
    but no fewer than Student's quantile and no more than twice that: for a skewed distribution the
    resampled quantile is needed, for few clusters it is too noisy to be believed below the exact
    one. Coverage is simulated in `benchmarks/coverage.py`.
    Source: Hall 1992, section 3.3; a mean over clusters is the ratio of sums to counts.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return undefined("no items")
    groups, sizes_C = _clusters(len(values), clusters)
    m, value = len(sizes_C), float(values.mean())
    if not isfinite(value):
        return undefined("the statistic is not finite", m)
    n_groups = 0 if clusters is None else m
    if m < 2:
        return Estimate(value, n_items=m, n_groups=n_groups)
    sums_C = np.bincount(groups, weights=values - value, minlength=m)
    se = _error(sums_C, sizes_C)
    quantile = t_quantile(0.5 + level / 2, effective_clusters(sizes_C) - 1)
    below, above = quantile, quantile
    if m <= MANY_CLUSTERS and resamples and se > 1e-12 * abs(value):
        t_B = _resampled_t(sums_C, sizes_C, resamples, np.random.default_rng(seed))
        low, high = np.quantile(t_B, [0.5 - level / 2, 0.5 + level / 2])
        below, above = (float(min(max(q, quantile), 2 * quantile)) for q in (high, -low))
    return Estimate(value, se, value - below * se, value + above * se, m, n_groups=n_groups)


def over_seeds(
    values: Sequence[float] | np.ndarray,
    seeds: Sequence[Any] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    level: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """A mean over policies that were trained with several seeds and over groups of prompts that all
    of them answered, for another seed and another group: both are drawn, and both move the mean.

    The variance is that between seeds plus that between groups, less that between their cells,
    which both hold; never below either. Student's degrees of freedom are Satterthwaite's. Without a
    second seed it is `clustered_mean`. `n_items` counts seeds, `n_groups` groups.

    `bounds` are the least and the greatest value that there can be, (0, 1) of a share. The interval
    is then made in logits of the mean's place between them, and ends between them. A symmetric one
    that is cut at its bounds holds a share near 1 too seldom (`benchmarks/coverage.py`). Where all
    values are at one bound, nothing tells how seeds differ, and the interval is Wilson's for the
    effective number of groups.
    Source: Cameron, Gelbach and Miller 2011, equation 2.13; Satterthwaite 1946.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return undefined("no items")
    n_seeds, n_groups = len(set(seeds)), len(set(clusters))
    if n_seeds < 2 or n_groups < 2:
        found = clustered_mean(values, clusters, level=level)
        return found if bounds is None else bounded(found, *bounds)
    se, df = _two_way(values, seeds, clusters)
    value, half = float(values.mean()), t_quantile(0.5 + level / 2, df) * se
    low, high = value - half, value + half
    if bounds is not None:
        independent = effective_clusters(_clusters(len(values), clusters)[1])
        low, high = _between(value, half, bounds, independent, level)
    return Estimate(value, se, low, high, n_seeds, n_groups=n_groups)


def _between(
    value: float, half: float, bounds: tuple[float, float], independent: float, level: float
) -> tuple[float, float]:
    """The interval of a mean of values within `bounds`, of half width `half` in its own units."""
    least, width = bounds[0], bounds[1] - bounds[0]
    place, edge = (value - least) / width, 1e-12
    if edge < place < 1 - edge:
        logit, step = log(place / (1 - place)), half / width / (place * (1 - place))
        ends = _sigmoid(logit - step), _sigmoid(logit + step)
    else:
        share = wilson(round(place) * independent, independent, level)
        assert share.low is not None and share.high is not None
        ends = share.low, share.high
    return least + width * ends[0], least + width * ends[1]


def over_seeds_p(
    values: Sequence[float] | np.ndarray,
    seeds: Sequence[Any] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
) -> float:
    """The two-sided p-value of a mean of 0, with the error of `over_seeds`; 1 where nothing
    varies.
    """
    from scipy.special import stdtr

    values = np.asarray(values, dtype=float)
    se, df = _two_way(values, seeds, clusters)
    return float(2 * stdtr(df, -abs(values.mean()) / se)) if se > 0 else 1.0


def ratio_over_seeds(
    above: Sequence[float] | np.ndarray,
    below: Sequence[float] | np.ndarray,
    seeds: Sequence[Any] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
    level: float = 0.95,
) -> Estimate:
    """The ratio of two means over the same policies and groups of prompts, for another seed and
    another group.

    The interval holds each ratio r for which the mean of above - r below, with the interval of
    `over_seeds`, may be 0. Where the mean of `below` is not surely above 0 there is no such
    interval, and the ratio is undefined.
    Source: Fieller 1954.
    """
    from scipy.optimize import brentq

    above, below = np.asarray(above, dtype=float), np.asarray(below, dtype=float)
    whole = over_seeds(below, seeds, clusters, level)
    if whole.value is None or whole.low is None or whole.low <= 0:
        return undefined("the denominator may be 0", whole.n_items)
    ratio = float(above.mean() / below.mean())

    def outside(r: float) -> float:
        """Below 0 where the ratio may be r: how far the mean is from 0, less its half width."""
        left = over_seeds(above - r * below, seeds, clusters, level)
        assert left.value is not None and left.low is not None
        return abs(left.value) - (left.value - left.low)

    if outside(ratio) >= 0:  # nothing varies
        return Estimate(ratio, 0.0, ratio, ratio, whole.n_items, n_groups=whole.n_groups)
    bounds = []
    for side in (-1.0, 1.0):
        step = abs(ratio) + 1.0
        while outside(ratio + side * step) < 0:
            step *= 2
            if step > MOST_RATIO:
                return undefined("the interval of the ratio has no end", whole.n_items)
        bounds.append(float(brentq(outside, ratio, ratio + side * step, xtol=1e-6)))
    low, high = bounds
    return Estimate(ratio, None, low, high, whole.n_items, n_groups=whole.n_groups)


MOST_RATIO = 1e6


def _two_way(
    values: np.ndarray,
    seeds: Sequence[Any] | np.ndarray,
    clusters: Sequence[Any] | np.ndarray,
) -> tuple[float, float]:
    """The standard error of a mean over seeds and groups, and its degrees of freedom."""
    seed_of, _ = _clusters(len(values), seeds)
    group_of, groups_C = _clusters(len(values), clusters)
    parts = []
    for place in (seed_of, group_of, seed_of * len(groups_C) + group_of):
        place, sizes_C = _clusters(len(values), place)
        sums_C = np.bincount(place, weights=values - values.mean())
        parts.append((_error(sums_C, sizes_C) ** 2, effective_clusters(sizes_C) - 1))
    (by_seed, df_seed), (by_group, df_group), (by_cell, _) = parts
    variance = max(by_seed + by_group - by_cell, by_seed, by_group)
    df = variance**2 / max(by_seed**2 / df_seed + by_group**2 / df_group, 1e-300)
    return sqrt(variance), max(df, 1.0)


def _error(sums_C: np.ndarray, sizes_C: np.ndarray) -> float:
    """The robust standard error of a mean, from its clusters' sums of deviations and sizes."""
    terms = [sums_C.sum(), sizes_C.sum(), sums_C @ sums_C, sums_C @ sizes_C, sizes_C @ sizes_C]
    return float(_errors(np.array([terms]))[0])


def _clusters(n: int, clusters: Sequence[Any] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Each item's cluster as a number, and the clusters' sizes."""
    groups = (
        np.arange(n)
        if clusters is None
        else np.unique(np.asarray(clusters), return_inverse=True)[1]
    )
    return groups, np.bincount(groups).astype(float)


def _errors(sums_B5: np.ndarray) -> np.ndarray:
    """The robust standard error of the mean of each resample, from its sums over clusters of s, n,
    s^2, s n and n^2 (s the sum of a cluster's values, n its size).
    """
    s, n, s_s, s_n, n_n = sums_B5.T
    mean, independent = s / n, n * n / n_n
    squares = np.maximum(s_s - 2 * mean * s_n + mean * mean * n_n, 0.0)
    result: np.ndarray = np.sqrt(independent / np.maximum(independent - 1, 1e-9) * squares) / n
    return result


def _resampled_t(
    sums_C: np.ndarray, sizes_C: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """The mean over its standard error in each resample of the clusters, of values centred at their
    mean; a resample without variance counts as far out on its side.
    """
    m = len(sums_C)
    terms_C5 = np.column_stack([sums_C, sizes_C, sums_C**2, sums_C * sizes_C, sizes_C**2])
    pieces, step = [], max(1, 4_000_000 // m)  # 32 MB of counts at a time
    for start in range(0, resamples, step):
        counts_BC = rng.multinomial(m, np.full(m, 1 / m), size=min(step, resamples - start))
        sums_B5 = counts_BC @ terms_C5
        mean, se = sums_B5[:, 0] / sums_B5[:, 1], _errors(sums_B5)
        flat = se <= 1e-12
        pieces.append(np.where(flat, np.sign(mean) * 1e300, mean / np.where(flat, 1.0, se)))
    return np.concatenate(pieces)


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
    """The mean of a - b over the same items, with the interval of `clustered_mean`: two checkpoints
    on the same prompts.
    """
    return clustered_mean(
        np.asarray(a, dtype=float) - np.asarray(b, dtype=float), clusters, resamples, seed
    )


def length_controlled_win_rate(
    p_a: Sequence[float] | np.ndarray,
    length_a: Sequence[float] | np.ndarray,
    length_b: Sequence[float] | np.ndarray,
    level: float = 0.95,
    difficulty: Sequence[float] | None = None,
    clusters: Sequence[Any] | np.ndarray | None = None,
    seeds: Sequence[Any] | np.ndarray | None = None,
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
    and to `clusters` of comparisons (a group of prompts, or a prompt, each; sandwich of their
    jackknife), and where there are several training `seeds`, to those (`over_seeds`); the interval
    is made in logits, with Student's quantile.
    """
    y = np.asarray(p_a, dtype=float)
    difference = np.asarray(length_a, dtype=float) - np.asarray(length_b, dtype=float)
    n = len(y)
    if n == 0:
        return undefined("no comparisons")
    if not difference.any():
        return bounded(clustered_mean(y, clusters, level=level))
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
    return _read_at_zero(x, y, beta, level, clusters, seeds)


def bounded(found: Estimate, least: float = 0.0, greatest: float = 1.0) -> Estimate:
    """The estimate with its interval cut at the least and the greatest value that there can be."""
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(least, found.low), high=min(greatest, found.high))


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


def _read_at_zero(
    x: np.ndarray,
    y: np.ndarray,
    beta: np.ndarray,
    level: float,
    clusters: Sequence[Any] | np.ndarray | None,
    seeds: Sequence[Any] | np.ndarray | None,
) -> Estimate:
    """The mean prediction without a length difference (column 1), its error by the delta method
    over clusters.
    """
    p = 1.0 / (1.0 + np.exp(-(x @ beta)))
    bread = np.linalg.inv((x * (p * (1 - p))[:, None]).T @ x)
    equal = x.copy()
    equal[:, 1] = 0.0
    q = 1.0 / (1.0 + np.exp(-(equal @ beta)))
    value, slope = float(q.mean()), (equal * (q * (1 - q))[:, None]).mean(0)
    leverage = np.minimum(p * (1 - p) * np.einsum("nk,kl,nl->n", x, bread, x), 0.99)
    influence = (x @ bread @ slope) * (y - p) / (1 - leverage) + (q - value) / len(y)
    groups, sizes_C = _clusters(len(y), clusters)
    m, n_groups = len(sizes_C), 0 if clusters is None else len(sizes_C)
    if m < 2:
        return Estimate(value, n_items=len(y), n_groups=n_groups)
    if seeds is not None and len(set(seeds)) > 1:
        se, df = _two_way(influence * len(y), seeds, groups)
    else:
        moved_C, df = np.bincount(groups, weights=influence), effective_clusters(sizes_C) - 1
        se = sqrt(float(moved_C @ moved_C) * (df + 1) / df)
    logit = log(value / (1 - value))
    half = t_quantile(0.5 + level / 2, df) * se / (value * (1 - value))
    low, high = _sigmoid(logit - half), _sigmoid(logit + half)
    return Estimate(value, se, low, high, len(y), n_groups=n_groups)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + exp(-x)) if x > -700 else 0.0
