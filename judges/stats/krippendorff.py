"""Krippendorff's alpha: 1 - observed / expected disagreement among all ratings that can be paired.

Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011); error: Gwet 2014, section
3.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np

from prefab.factory.stats import Estimate, percentiles, t_quantile, undefined
from prefab.judges.stats.rating_table import RESAMPLES, FloatArray, Table, draws, group

_MATRIX_LIMIT = 2000  # categories: 32 MB of squared distances


def krippendorff_alpha(
    ratings: FloatArray | Table,
    metric: str | FloatArray = "nominal",
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Alpha under the metric nominal, ordinal, interval or ratio, or a K x K matrix of squared
    differences.

    Any number of raters; items with one rating are left out. Over more than 2,000 distinct values
    only nominal, ordinal and interval are defined, and only interval has the bootstrap's interval.

    Raises:
        ValueError: an unknown metric, a matrix of the wrong shape, or a ratio over negative values.
    """
    table = _paired(group(ratings))
    n = int(table.times.sum())
    if table.n_raters < 2:
        return undefined("fewer than two raters", n, table.n_raters)
    if n == 0:
        return undefined("no item has two ratings", 0, table.n_raters)
    used = _used(table)
    if (used > 0).sum() < 2:
        return undefined("only one category was used", n, table.n_raters)
    many = table.ratings_PK is None or len(used) > _MATRIX_LIMIT
    parts = _parts_of_many(table, metric, used) if many else _parts(table, metric, used)
    if parts.expected <= 0:
        return undefined(
            "the ratings that occur do not differ under this metric", n, table.n_raters
        )
    value = _alpha(parts, table.times)
    estimate = Estimate(value, n_items=n, n_raters=table.n_raters)
    if n >= 2:
        se = _standard_error(parts, table.times)
        half = t_quantile(0.975, n - 1) * se
        estimate = replace(
            estimate, se=se, low=max(-1.0, value - half), high=min(1.0, value + half)
        )
    if many and metric != "interval":
        return estimate
    return with_interval(
        estimate,
        [krippendorff_values(table, metric, drawn) for drawn in draws(table, resamples, seed)],
    )


def with_interval(
    estimate: Estimate, pieces: Sequence[FloatArray], independent: float | None = None
) -> Estimate:
    """The estimate with the percentile interval of its resampled values, widened for few
    `independent` items or clusters (`stats.percentiles`); none when over 5% of them are undefined.
    """
    values = np.concatenate([np.empty(0), *pieces])
    found = values[np.isfinite(values)]
    if len(found) < 2 or len(found) < 0.95 * len(values):
        return estimate
    low, high = np.quantile(found, percentiles(independent or estimate.n_items))
    return replace(estimate, boot_low=float(low), boot_high=float(high))


@dataclass(frozen=True, slots=True)
class _Parts:
    """Disagreement by pattern: `within` among a pattern's own ratings, `outer` of them with all
    ratings' shares; `expected` among all pairs of ratings. `moments` (sums of values and of
    squares) where they were made from them.
    """

    r: FloatArray
    within: FloatArray
    outer: FloatArray
    expected: float
    moments: tuple[FloatArray, FloatArray] | None = None


def _used(table: Table) -> FloatArray:
    """How often each category was used. Shapes: K."""
    if table.ratings_PK is not None:
        return table.times @ table.ratings_PK
    given = table.known_codes >= 0
    weights = np.broadcast_to(table.times[:, None], given.shape)[given]
    used = np.bincount(table.known_codes[given], weights=weights, minlength=len(table.values))
    return used.astype(float)


def _parts(table: Table, metric: str | FloatArray, used: FloatArray) -> _Parts:
    distance, counts = squared_differences(metric, table.values, used), table.known_counts
    within = ((counts @ distance) * counts).sum(axis=1)
    return _Parts(
        counts.sum(axis=1),
        within,
        counts @ (distance @ (used / used.sum())),
        float(used @ distance @ used),
    )


def _parts_of_many(table: Table, metric: str | FloatArray, used: FloatArray) -> _Parts:
    """The same over so many values that no matrix holds their differences, from sums of squares
    alone.
    """
    codes = table.known_codes
    given, total = codes >= 0, used.sum()
    r = given.sum(axis=1).astype(float)
    if isinstance(metric, str) and metric == "nominal":
        same = sum(
            ((codes == column[:, None]) & given).sum(axis=1) * (column >= 0) for column in codes.T
        )
        outer = np.where(given, 1.0 - (used / total)[codes], 0.0).sum(axis=1)
        return _Parts(r, r**2 - same, outer, float(total**2 - (used**2).sum()))
    if not (isinstance(metric, str) and metric in ("interval", "ordinal")):
        raise ValueError(f"{len(used)} distinct values are too many for this metric: round them")
    values = table.values if metric == "interval" else _middle_ranks(used)
    values = values - (used @ values) / total  # centred, so that the squares do not cancel
    each = np.where(given, values[codes], 0.0)
    first, second = each.sum(axis=1), (each**2).sum(axis=1)
    mean, square = float(used @ values) / total, float(used @ values**2) / total
    outer = second - 2.0 * mean * first + r * square
    return _Parts(
        r,
        2.0 * (r * second - first**2),
        outer,
        float(2.0 * total**2 * (square - mean**2)),
        (first, second),
    )


def _values_of_moments(parts: _Parts, times_BP: FloatArray) -> FloatArray:
    """Alpha of each resample under the interval metric."""
    assert parts.moments is not None  # the interval metric has them
    first, second = parts.moments
    total = times_BP @ parts.r
    expected = 2.0 * (total * (times_BP @ second) - (times_BP @ first) ** 2)
    observed = times_BP @ (parts.within / (parts.r - 1.0))
    return _ratio(total, observed, expected)


def _alpha(parts: _Parts, times: FloatArray) -> float:
    observed = float(times @ (parts.within / (parts.r - 1.0)))
    return 1.0 - (float(times @ parts.r) - 1.0) * observed / parts.expected


def krippendorff_values(table: Table, metric: str | FloatArray, times_BP: FloatArray) -> FloatArray:
    """Alpha for each row of pattern counts (a bootstrap's); NaN where one defines none, or over too
    many values.
    """
    kept = _ratings_each(table) >= 2
    table, times_BP = _paired(table), times_BP[:, kept]
    counts_PK = table.ratings_PK
    if counts_PK is None or counts_PK.shape[1] > _MATRIX_LIMIT:
        parts = _parts_of_many(table, metric, _used(table)) if metric == "interval" else None
        return (
            np.full(len(times_BP), np.nan) if parts is None else _values_of_moments(parts, times_BP)
        )
    r, used_BK = counts_PK.sum(axis=1), times_BP @ counts_PK
    total = used_BK.sum(axis=1)
    if (
        isinstance(metric, str) and metric == "ordinal"
    ):  # its distances depend on how often each rank occurs
        ranks_BK = (
            _middle_ranks(used_BK) - total[:, None] / 2
        )  # centred, so that the squares do not cancel
        within_BP = 2.0 * (r * (ranks_BK**2 @ counts_PK.T) - (ranks_BK @ counts_PK.T) ** 2)
        observed = (times_BP * within_BP) @ (1.0 / (r - 1.0))
        expected = 2.0 * (
            total * (used_BK * ranks_BK**2).sum(axis=1) - (used_BK * ranks_BK).sum(axis=1) ** 2
        )
    else:
        distance = squared_differences(metric, table.values, table.times @ counts_PK)
        observed = times_BP @ (((counts_PK @ distance) * counts_PK).sum(axis=1) / (r - 1.0))
        expected = ((used_BK @ distance) * used_BK).sum(axis=1)
    return _ratio(total, observed, expected)


def squared_differences(
    metric: str | FloatArray, values: FloatArray, used: FloatArray
) -> FloatArray:
    """The metric's squared difference between categories of these `values`, `used` so often.
    Shapes: K x K.
    """
    k = len(values)
    if not isinstance(metric, str):
        matrix = np.asarray(metric, dtype=float)
        if matrix.shape != (k, k) or not np.allclose(matrix, matrix.T) or np.diag(matrix).any():
            raise ValueError(
                f"a metric must be a symmetric {k} x {k} matrix with 0 on its diagonal"
            )
        return matrix
    if metric == "nominal":
        return 1.0 - np.eye(k)
    if metric == "ordinal":
        values, metric = _middle_ranks(used), "interval"
    difference = values[:, None] - values[None, :]
    if metric == "interval":
        return difference**2
    if metric == "ratio":
        if values.min() < 0:
            raise ValueError("a ratio scale has no negative values")
        total = values[:, None] + values[None, :]
        result: FloatArray = (difference / np.where(total == 0, 1.0, total)) ** 2
        return result
    raise ValueError(f"unknown metric {metric!r}: nominal, ordinal, interval, ratio or a matrix")


def _middle_ranks(used: FloatArray) -> FloatArray:
    """The ordinal metric sums the counts between two ranks, each end by half: a difference of
    middle ranks.
    """
    return np.cumsum(used, axis=-1) - used / 2.0


def _paired(table: Table) -> Table:
    kept = _ratings_each(table) >= 2
    if kept.all():
        return table
    codes = None if table.codes is None else table.codes[kept]
    counts = None if table.ratings_PK is None else table.ratings_PK[kept]
    return replace(table, codes=codes, times=table.times[kept], ratings_PK=counts, pattern_of=None)


def _ratings_each(table: Table) -> FloatArray:
    result: FloatArray = (
        (table.known_codes >= 0).sum(axis=1)
        if table.ratings_PK is None
        else table.ratings_PK.sum(axis=1)
    )
    return result


def _ratio(total: FloatArray, observed: FloatArray, expected: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore", invalid="ignore"):
        result: FloatArray = 1.0 - (total - 1.0) * observed / np.where(
            expected > 0, expected, np.nan
        )
        return result


def _standard_error(parts: _Parts, times: FloatArray) -> float:
    """Gwet's linearisation, in disagreements. An ordinal metric's distances are taken as fixed."""
    n = times.sum()
    r_mean = float(times @ parts.r) / n
    ratio = parts.r / r_mean
    own = parts.within / (r_mean * (parts.r - 1.0))
    observed, expected = float(times @ own) / n, parts.expected / (n * r_mean) ** 2
    corrected = observed * (1.0 - 1.0 / (n * r_mean))
    # `unbiased` lacks the correction for small samples; off it, each pattern's move of observed and
    # of expected.
    unbiased = 1.0 - observed / expected
    moved_observed = (expected - own + corrected * (ratio - 1.0)) / expected
    moved_expected = ratio - parts.outer / r_mean - (1.0 - expected) * ratio
    influence = moved_observed - 2.0 * (1.0 - unbiased) * moved_expected / expected
    return sqrt(float(times @ (influence - unbiased) ** 2) / (n * (n - 1)))
