"""Metrics of judges: accuracy, position bias, and how far the errors of several judges are
correlated.

Probabilities speak of sample a in both orders (un-swapped), NaN where unscored; `gold` is 1, 0, or
NaN where it is not known (or a tie, on which no winner is right or wrong).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prefab.factory.stats import (
    Estimate,
    clustered_share,
    effective_clusters,
    t_quantile,
    undefined,
)
from prefab.judges.stats.rating_table import BoolArray, FloatArray

Clusters = (
    npt.NDArray[Any] | None
)  # a prompt for each item: answers to one prompt are not independent


def accuracy(p: FloatArray, gold: FloatArray, clusters: Clusters = None) -> Estimate:
    """The share of decided verdicts whose winner is gold's, over items where both are known. A
    probability of a half has no winner.
    """
    right, counted = _right(np.asarray(p, dtype=float)[:, None], np.asarray(gold, dtype=float))
    right, counted = right[:, 0], counted[:, 0]
    return (
        _share(right[counted], _of(clusters, counted))
        if counted.any()
        else undefined("no decided item has gold")
    )


def exact(ratings: FloatArray, gold: FloatArray, clusters: Clusters = None) -> Estimate:
    """The share of ratings (1, 0, or 0.5 for a tie) that are gold's, ties included."""
    ratings, gold = np.asarray(ratings, dtype=float), np.asarray(gold, dtype=float)
    known = ~np.isnan(ratings) & ~np.isnan(gold)
    return (
        _share(ratings[known] == gold[known], _of(clusters, known))
        if known.any()
        else undefined("no item has gold")
    )


def position_consistency(p_ab: FloatArray, p_ba: FloatArray, clusters: Clusters = None) -> Estimate:
    """The share of comparisons, scored in both orders, whose winner (a, b or neither) is the same
    in both.
    """
    both, known = _both(p_ab, p_ba)
    sides = np.sign(both - 0.5)
    return _share(sides[:, 0] == sides[:, 1], _of(clusters, known))


def first_slot_share(p_ab: FloatArray, p_ba: FloatArray, clusters: Clusters = None) -> Estimate:
    """The share of decided verdicts that pick the answer shown first, over comparisons scored in
    both orders, so that every answer was shown first as often as second: without position bias it
    is a half.
    """
    both, known = _both(p_ab, p_ba)
    picks = np.concatenate([both[:, 0] - 0.5, 0.5 - both[:, 1]])
    some = _of(clusters, known)
    return _share(
        picks[picks != 0] > 0, None if some is None else np.concatenate([some, some])[picks != 0]
    )


def slot_lean(p_ab: FloatArray, p_ba: FloatArray, clusters: Clusters = None) -> Estimate:
    """Direction of the position bias: of the comparisons whose winner changes with the order, the
    share that the first slot won, less a half and doubled: +1 always the first slot, -1 always the
    second, 0 balanced. Source: after Shi et al. 2024 (preference fairness), unnormalised.
    """
    both, known = _both(p_ab, p_ba)
    torn = (both[:, 0] - 0.5) * (both[:, 1] - 0.5) < 0
    some = _of(clusters, known)
    share = _share(both[torn, 0] > 0.5, _of(some, torn))
    if share.value is None:
        return undefined("no comparison was torn between the slots", len(both))
    low, high = (None if x is None else 2 * x - 1 for x in (share.low, share.high))
    return Estimate(
        2 * share.value - 1, None if share.se is None else 2 * share.se, low, high, share.n_items
    )


def stability(first: FloatArray, again: FloatArray, clusters: Clusters = None) -> Estimate:
    """Test-retest: the share of items, scored both times, whose winner is the same."""
    return position_consistency(first, again, clusters)


@dataclass(frozen=True, slots=True)
class Together:
    """How far J judges make the same errors. `correlation` J x J of their errors, NaN where two
    share no items or one never, or always, errs; `mean` of them, and `effective`, the number of
    independent judges that they are worth, with intervals.
    """

    correlation: FloatArray
    n_shared: npt.NDArray[np.int64]
    mean: Estimate
    effective: Estimate


def errors_together(p_NJ: FloatArray, gold: FloatArray, clusters: Clusters = None) -> Together:
    """The correlation of the judges' errors, each pair over the items that both decided, and J / (1
    + (J - 1) mean): the judges' number after the design effect of their correlation. It is above J
    where errors cancel; a bound that is infinite is None.

    Intervals are those of the jackknife over `clusters` (items without them).
    Source: Kish 1965; Efron and Stein 1981.
    """
    p_NJ = np.asarray(p_NJ, dtype=float)
    right, counted = _right(p_NJ, np.asarray(gold, dtype=float))
    j = p_NJ.shape[1]
    groups = np.arange(len(gold)) if clusters is None else np.asarray(clusters)
    groups = np.unique(groups, return_inverse=True)[1]
    sizes_C = np.bincount(groups, weights=counted.any(axis=1)).astype(float)
    correlation, n_shared = np.full((j, j), np.nan), np.zeros((j, j), dtype=int)
    without_CP = []  # each pair's correlation without each cluster
    for a in range(j):
        for b in range(j):
            shared = counted[:, a] & counted[:, b]
            n_shared[a, b] = shared.sum()
            x, y = (right[shared, k].astype(float) for k in (a, b))
            sums_C4 = np.column_stack(
                [
                    np.bincount(groups[shared], weights=w, minlength=len(sizes_C))
                    for w in (np.ones(len(x)), x, y, x * y)
                ]
            )
            correlation[a, b] = _correlation(sums_C4.sum(axis=0))
            if a < b and not np.isnan(correlation[a, b]):
                without_CP.append(_correlation(sums_C4.sum(axis=0) - sums_C4))
    if j == 1:
        return Together(correlation, n_shared, undefined("one judge"), Estimate(1.0))
    if not without_CP:
        nothing = undefined("no two judges have errors to compare")
        return Together(correlation, n_shared, nothing, nothing)
    mean = _jackknife(
        float(np.nanmean(correlation[~np.eye(j, dtype=bool)])),
        np.mean(without_CP, axis=0)[sizes_C > 0],
        sizes_C[sizes_C > 0].astype(float),
        0 if clusters is None else int((sizes_C > 0).sum()),
    )
    return Together(correlation, n_shared, mean, _worth(mean, j))


def _correlation(sums: FloatArray) -> FloatArray:
    """Of two columns of zeros and ones, from n and the sums of x, y and xy; NaN where one does not
    vary. Shapes: ... x 4.
    """
    n, x, y, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        varies = (n - x) * x * (n - y) * y
        result: FloatArray = (n * xy - x * y) / np.sqrt(np.where(varies > 0, varies, np.nan))
        return result


def _jackknife(value: float, without_C: FloatArray, sizes_C: FloatArray, n_groups: int) -> Estimate:
    """A mean correlation with Student's interval in Fisher's z."""
    m, n = len(sizes_C), int(sizes_C.sum())
    squares = float(((without_C - without_C.mean()) ** 2).sum())
    if m < 2 or not np.isfinite(squares) or squares == 0 or abs(value) >= 1:
        return Estimate(value, n_items=n, n_groups=n_groups)
    se = float(np.sqrt((m - 1) / m * squares))
    half = t_quantile(0.975, effective_clusters(sizes_C) - 1) * se / (1 - value**2)
    low, high = (float(np.tanh(np.arctanh(value) + side)) for side in (-half, half))
    return Estimate(value, se, low, high, n, n_groups=n_groups)


def _worth(mean: Estimate, j: int) -> Estimate:
    """J / (1 + (J - 1) mean), which falls as the mean rises: its bounds change places."""

    def judges(correlation: float | None) -> float | None:
        if correlation is None or 1 + (j - 1) * correlation <= 0:
            return None
        return j / (1 + (j - 1) * correlation)

    value = judges(mean.value)
    if value is None:
        return undefined("errors cancel entirely", mean.n_items)
    low, high = judges(mean.high), judges(mean.low)
    return Estimate(value, None, low, high, mean.n_items, n_groups=mean.n_groups)


def _right(p_NJ: FloatArray, gold: FloatArray) -> tuple[BoolArray, BoolArray]:
    """Which verdicts are right, and which count: decided, with a gold side."""
    side, truth = np.sign(p_NJ - 0.5), np.sign(gold - 0.5)[:, None]
    counted = ~np.isnan(side) & (side != 0) & ~np.isnan(truth) & (truth != 0)
    return counted & (side == truth), counted


def _both(p_ab: FloatArray, p_ba: FloatArray) -> tuple[FloatArray, BoolArray]:
    both = np.column_stack([np.asarray(p_ab, dtype=float), np.asarray(p_ba, dtype=float)])
    known = ~np.isnan(both).any(axis=1)
    return both[known], known


def _of(clusters: Clusters, kept: BoolArray) -> Clusters:
    return None if clusters is None else np.asarray(clusters)[kept]


def _share(hits: npt.NDArray[Any], clusters: Clusters = None) -> Estimate:
    return clustered_share(hits, clusters)
