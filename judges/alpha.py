"""Krippendorff's alpha: 1 - observed / expected disagreement among all ratings that can be paired.

Source: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011); error: Gwet 2014, section 3.5.
"""
from __future__ import annotations

from dataclasses import replace
from math import sqrt

import numpy as np

from factory.stats import Estimate, t_quantile, undefined
from judges.patterns import Table, group, resample

_MATRIX_LIMIT = 2000  # categories: 32 MB of squared distances


def krippendorff_alpha(ratings, metric: str | np.ndarray = "nominal", *, resamples: int = 0, seed: int = 0) -> Estimate:
    """Alpha under the metric nominal, ordinal, interval or ratio, or a K x K matrix of squared differences.

    Any number of raters; items with one rating are left out. With over 2,000 distinct values nominal, ordinal and
    interval have a value and no error (a bootstrap of the items is `factory.stats.bootstrap`).

    Raises:
        ValueError: an unknown metric, a matrix of the wrong shape, or a ratio over negative values.
    """
    table = _paired(group(ratings))
    n = int(table.times.sum())
    if table.ratings_PK is None:
        return Estimate(_value_of_many(table, metric), n_items=n, n_raters=table.n_raters)
    if table.n_raters < 2:
        return undefined("fewer than two raters", n, table.n_raters)
    if n == 0:
        return undefined("no item has two ratings", 0, table.n_raters)
    used = table.times @ table.ratings_PK
    if (used > 0).sum() < 2:
        return undefined("only one category was used", n, table.n_raters)
    if len(used) > _MATRIX_LIMIT:
        return Estimate(_value_of_many(table, metric), n_items=n, n_raters=table.n_raters)
    distance = squared_differences(metric, table.values, used)
    value = float(_values(table, distance[None], table.times[None])[0])
    if not np.isfinite(value):
        return undefined("the ratings that occur do not differ under this metric", n, table.n_raters)
    estimate = Estimate(value, n_items=n, n_raters=table.n_raters)
    if n >= 2:
        se = _standard_error(table, distance, value)
        half = t_quantile(0.975, n - 1) * se
        estimate = replace(estimate, se=se, low=value - half, high=min(1.0, value + half))
    if resamples:
        draws = krippendorff_values(table, metric, resample(table, resamples, seed))
        draws = draws[np.isfinite(draws)] if np.isfinite(draws).mean() >= 0.95 else draws[:0]
        if len(draws) > 1:
            low, high = np.quantile(draws, [0.025, 0.975])
            estimate = replace(estimate, boot_low=float(low), boot_high=float(high))
    return estimate


def krippendorff_values(table: Table, metric: str | np.ndarray, times_BP: np.ndarray) -> np.ndarray:
    """Alpha for each row of pattern counts (a bootstrap's); NaN where one defines none."""
    kept = table.ratings_PK.sum(axis=1) >= 2
    table, times_BP = _paired(table), times_BP[:, kept] if len(kept) == times_BP.shape[1] else times_BP
    if isinstance(metric, str) and metric == "ordinal":  # its distances depend on how often each rank occurs
        used_BK = times_BP @ table.ratings_PK
        distance = np.stack([squared_differences(metric, table.values, used) for used in used_BK])
    else:
        distance = squared_differences(metric, table.values, table.times @ table.ratings_PK)[None]
    return _values(table, distance, times_BP)


def squared_differences(metric: str | np.ndarray, values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The metric's squared difference between categories of these `values`, `used` so often. Shapes: K x K."""
    k = len(values)
    if not isinstance(metric, str):
        matrix = np.asarray(metric, dtype=float)
        if matrix.shape != (k, k) or not np.allclose(matrix, matrix.T) or np.diag(matrix).any():
            raise ValueError(f"a metric must be a symmetric {k} x {k} matrix with 0 on its diagonal")
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
        return (difference / np.where(total == 0, 1.0, total)) ** 2
    raise ValueError(f"unknown metric {metric!r}: nominal, ordinal, interval, ratio or a matrix")


def _middle_ranks(used: np.ndarray) -> np.ndarray:
    """The ordinal metric sums the counts between two ranks, each end by half: a difference of middle ranks."""
    return np.cumsum(used) - used / 2.0


def _paired(table: Table) -> Table:
    kept = _ratings_each(table) >= 2
    if kept.all():
        return table
    codes = None if table.codes is None else table.codes[kept]
    counts = None if table.ratings_PK is None else table.ratings_PK[kept]
    return replace(table, codes=codes, times=table.times[kept], ratings_PK=counts, pattern_of=None)


def _ratings_each(table: Table) -> np.ndarray:
    return (table.codes >= 0).sum(axis=1) if table.ratings_PK is None else table.ratings_PK.sum(axis=1)


def _values(table: Table, distance_BKK: np.ndarray, times_BP: np.ndarray) -> np.ndarray:
    r = table.ratings_PK.sum(axis=1)
    used_BK = times_BP @ table.ratings_PK
    total = used_BK.sum(axis=1)
    if len(distance_BKK) == 1:
        within_P = ((table.ratings_PK @ distance_BKK[0]) * table.ratings_PK).sum(axis=1) / (r - 1)
        observed = times_BP @ within_P
        expected = ((used_BK @ distance_BKK[0]) * used_BK).sum(axis=1)
    else:
        pairs = np.einsum("pk,pl->pkl", table.ratings_PK / (r - 1)[:, None], table.ratings_PK)
        coincidences = times_BP @ pairs.reshape(len(r), -1)
        observed = (coincidences * distance_BKK.reshape(len(distance_BKK), -1)).sum(axis=1)
        expected = np.einsum("bk,bkl,bl->b", used_BK, distance_BKK, used_BK)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (total - 1.0) * observed / np.where(expected > 0, expected, np.nan)
    return 1.0 - ratio


def _standard_error(table: Table, distance: np.ndarray, alpha: float) -> float:
    """Gwet's linearisation. An ordinal metric's distances are taken as fixed."""
    weights = 1.0 - distance / distance.max()
    r, n = table.ratings_PK.sum(axis=1), table.times.sum()
    r_mean = float(table.times @ r) / n
    agreeing = (table.ratings_PK * (table.ratings_PK @ weights - 1.0)).sum(axis=1) / (r_mean * (r - 1))
    observed = float(table.times @ agreeing) / n
    pi = (table.times @ table.ratings_PK) / (n * r_mean)
    expected = float(pi @ weights @ pi)
    unbiased = (observed - expected) / (1.0 - expected)  # before the correction for small samples
    corrected = observed + (1.0 - observed) / float(table.times @ r)
    off = (r - r_mean) / r_mean
    own = (agreeing - corrected * off - expected) / (1.0 - expected)
    moved = (table.ratings_PK @ (weights @ pi)) / r_mean - expected * off - expected
    influence = own - 2.0 * (1.0 - unbiased) * moved / (1.0 - expected)
    return sqrt(float(table.times @ (influence - unbiased) ** 2) / (n * (n - 1)))


def _value_of_many(table: Table, metric: str | np.ndarray) -> float:
    """Alpha over so many values that no matrix holds their differences, from sums of squares alone."""
    given = table.codes >= 0
    r = given.sum(axis=1)
    used = np.bincount(table.codes[given], weights=np.broadcast_to(table.times[:, None], given.shape)[given],
                       minlength=len(table.values))
    total = used.sum()
    if isinstance(metric, str) and metric == "nominal":
        same = sum(((table.codes == column[:, None]) & given).sum(axis=1) * (column >= 0) for column in table.codes.T)
        observed = table.times @ ((r**2 - same) / (r - 1))
        expected = total**2 - (used**2).sum()
    elif isinstance(metric, str) and metric in ("interval", "ordinal"):
        values = table.values if metric == "interval" else _middle_ranks(used)
        values = values - (used @ values) / total  # centred, so that the squares do not cancel
        each = np.where(given, values[table.codes], 0.0)
        observed = table.times @ (2.0 * (r * (each**2).sum(axis=1) - each.sum(axis=1) ** 2) / (r - 1))
        expected = 2.0 * (total * (used @ values**2) - (used @ values) ** 2)
    else:
        raise ValueError(f"{len(used)} distinct values are too many for this metric: round them")
    return float(1.0 - (total - 1.0) * observed / expected)
