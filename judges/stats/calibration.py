"""Calibration: whether a probability of 0.8 comes true 8 times in 10; its errors, and the
temperature that corrects it.

`p` are probabilities, `y` the truth: 1, 0, or 0.5 for a tie. All over items; nothing here depends
on judges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prefab.factory.stats import Estimate, effective_clusters, undefined
from prefab.judges.stats.rating_table import FloatArray

_EDGE = 1e-12  # a probability of exactly 0 or 1 would make one mistake infinitely bad
_COLDEST, _HOTTEST = 1e-2, 1e2


@dataclass(frozen=True, slots=True)
class Bin:
    """One row of a reliability table: the mean probability, the share that came true, and the
    number of items.
    """

    mean_p: float
    mean_y: float
    n: int


def reliability(p: FloatArray, y: FloatArray, bins: int = 15) -> list[Bin]:
    """Bins of equal mass; equal probabilities share a bin, so the order of the items never
    matters.
    """
    p, y = _checked(p, y)
    if not len(p):
        return []
    bin_of = bins_of(p, bins)
    n = np.bincount(bin_of)
    sums_p, sums_y = (np.bincount(bin_of, weights=w) for w in (p, y))
    return [
        Bin(float(a / m), float(b / m), int(m)) for a, b, m in zip(sums_p, sums_y, n, strict=True)
    ]


def bins_of(p: FloatArray, bins: int) -> npt.NDArray[np.integer[Any]]:
    """Each item's bin, of those that have items."""
    _values, place, times = np.unique(p, return_inverse=True, return_counts=True)
    middle = np.cumsum(times) - times / 2
    bin_of = np.minimum((bins * middle / len(p)).astype(int), bins - 1)[place]
    result: npt.NDArray[np.integer[Any]] = np.unique(bin_of, return_inverse=True)[1]
    return result


def ece(p: FloatArray, y: FloatArray, bins: int = 15) -> float | None:
    """Expected calibration error over bins of equal mass, as published, which is biased upwards
    (`calibration_error`); None without items. Source: Nguyen and O'Connor 2015.
    """
    rows = reliability(p, y, bins)
    total = sum(row.n for row in rows)
    return sum(row.n * abs(row.mean_p - row.mean_y) for row in rows) / total if total else None


def calibration_error(
    p: FloatArray,
    y: FloatArray,
    bins: int = 15,
    clusters: npt.NDArray[Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """`ece` without its bias upwards, and a 95% interval over whole clusters; 0 at the least.

    By chance alone a bin's mean differs from its share, and the absolute value makes an error of
    that: a calibrated judge shows .058 over 300 items in 10 bins. The bins' differences are drawn
    with the covariance that their clusters show; the mean excess of drawn errors over the assumed
    one is the bias. Assumed differences are a line over p plus a remainder, each shrunk by what
    chance explains of it. The interval inverts a test: it holds every error under which the
    observed one lies within the middle 95% of those drawn, along that line.
    Source: for the bias of binned errors Roelofs et al. 2022; empirical Bayes shrinkage by moments,
    Efron and Morris 1973. Coverage is simulated in `benchmarks/coverage.py`.
    """
    p, y = _checked(p, y)
    if not len(p):
        return undefined("no items")
    bin_of, groups, sizes_C = bins_of(p, bins), np.arange(len(p)), np.ones(len(p))
    if clusters is not None:
        groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
        sizes_C = np.bincount(groups).astype(float)
    n_B = np.bincount(bin_of).astype(float)
    gaps_B = np.bincount(bin_of, weights=y - p) / n_B
    share_B = n_B / len(p)
    plain = float(share_B @ np.abs(gaps_B))
    m, n_groups = len(sizes_C), 0 if clusters is None else len(sizes_C)
    if m < 2:
        return Estimate(plain, n_items=len(p), n_groups=n_groups)
    spread_CB = np.bincount(
        groups * len(n_B) + bin_of, weights=y - p - gaps_B[bin_of], minlength=m * len(n_B)
    )
    spread_CB = spread_CB.reshape(m, len(n_B)) / n_B
    independent = effective_clusters(sizes_C)
    covariance = spread_CB.T @ spread_CB * independent / (independent - 1)
    line_B, assumed_B = _smoothed(p, bin_of, gaps_B, np.diag(covariance))
    rng = np.random.default_rng(seed)
    values, vectors = np.linalg.eigh(covariance)
    noise = rng.normal(size=(draws, len(n_B))) @ (vectors * np.sqrt(values.clip(0))).T
    excess = (np.abs(assumed_B + noise) @ share_B).mean() - share_B @ np.abs(assumed_B)
    student = np.sqrt((independent - 1) / rng.chisquare(independent - 1, size=(draws, 1)))
    low, high = _inverted(plain, line_B, share_B, noise * student)
    value = max(0.0, plain - float(excess))
    return Estimate(value, None, min(low, value), max(high, value), len(p), n_groups=n_groups)


def _smoothed(
    p: FloatArray, bin_of: npt.NDArray[np.integer[Any]], gaps_B: FloatArray, variance_B: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The line through the bins' gaps over their mean probability (the error of a judge that is
    too sure, or not sure enough), and the gaps as far as chance does not explain them.
    """
    n_B = np.bincount(bin_of).astype(float)
    binomial_B = np.maximum(np.bincount(bin_of, weights=p * (1 - p)) / n_B**2, 1e-9)
    mean_B = np.bincount(bin_of, weights=p) / n_B
    x = np.column_stack([np.ones(len(n_B)), mean_B - mean_B.mean()])
    weighted = x / binomial_B[:, None]
    line_B = x @ np.linalg.lstsq(weighted.T @ x, weighted.T @ gaps_B, rcond=None)[0]
    effect = max(1.0, float((variance_B / binomial_B).mean()))  # of the clusters
    assumed_B = np.zeros(len(n_B))
    for part, df in ((line_B, 2), (gaps_B - line_B, len(n_B) - 2)):
        explained = float((part**2 / binomial_B).sum()) / effect
        if explained > max(df, 0):
            assumed_B += (1 - max(df, 0) / explained) * part
    return line_B, assumed_B


def _inverted(
    plain: float, line_B: FloatArray, share_B: FloatArray, noise: FloatArray
) -> tuple[float, float]:
    """The errors, shaped as the line, under which `plain` is neither too high nor too low."""
    size = float(share_B @ np.abs(line_B))
    shape_B = line_B / size if size > 1e-12 else np.ones(len(share_B))
    reach = plain + 6 * float((np.abs(noise) @ share_B).mean()) + 1e-9
    errors = np.linspace(0.0, reach, 80)
    above = np.array([(np.abs(e * shape_B + noise) @ share_B >= plain).mean() for e in errors])
    above = np.maximum.accumulate(above)
    low, high = np.interp([0.025, 0.975], above, errors)
    return float(low if above[0] < 0.025 else 0.0), float(high if above[-1] > 0.975 else reach)


def brier(p: FloatArray, y: FloatArray) -> float | None:
    """Mean squared error of the probabilities; None without items. Source: Brier 1950."""
    p, y = _checked(p, y)
    return float(((p - y) ** 2).mean()) if len(p) else None


def log_loss(p: FloatArray, y: FloatArray) -> float | None:
    """Mean cross-entropy in nats, probabilities held 1e-12 off 0 and 1; None without items."""
    p, y = _checked(p, y)
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean()) if len(p) else None


def fit_temperature(p: FloatArray, y: FloatArray) -> float | None:
    """The temperature between 0.01 and 100 that minimises the log loss. Fit it on a split that
    nothing else uses.

    The loss is convex in 1 / T, so its slope is bisected. None when every probability is a half.
    Source: Guo et al. 2017.
    """
    p, y = _checked(p, y)
    return fit_temperature_of(_logit(p), y)


def fit_temperature_of(logits: FloatArray, y: FloatArray) -> float | None:
    """`fit_temperature` of log-odds instead of probabilities."""
    if not logits.any():
        return None

    def slope(inverse: float) -> float:
        return float((logits * (_sigmoid(logits * inverse) - y)).sum())

    low, high = 1 / _HOTTEST, 1 / _COLDEST
    if slope(low) >= 0:
        return _HOTTEST
    if slope(high) <= 0:
        return _COLDEST
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def apply_temperature(p: FloatArray, temperature: float) -> FloatArray:
    """The probabilities at another temperature; a half stays a half, and P(a) + P(b) stays 1."""
    return _sigmoid(_logit(np.asarray(p, dtype=float)) / temperature)


def _logit(p: FloatArray) -> FloatArray:
    p = np.clip(p, _EDGE, 1 - _EDGE)
    result: FloatArray = np.log(p) - np.log1p(-p)
    return result


def _sigmoid(x: FloatArray) -> FloatArray:
    return np.where(
        x >= 0, 1 / (1 + np.exp(-np.abs(x))), np.exp(-np.abs(x)) / (1 + np.exp(-np.abs(x)))
    )


def _checked(p: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    p, y = np.asarray(p, dtype=float), np.asarray(y, dtype=float)
    if p.shape != y.shape or p.ndim != 1:
        raise ValueError(f"p and y must be of one length, not {p.shape} and {y.shape}")
    for name, x in (("p", p), ("y", y)):
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError(f"{name} must lie in [0, 1]; leave unscored items out")
    return p, y
