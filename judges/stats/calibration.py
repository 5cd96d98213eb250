"""Calibration: whether a probability of 0.8 comes true 8 times in 10; its errors, and the
temperature that corrects it.

`p` are probabilities, `y` the truth: 1, 0, or 0.5 for a tie. All over items; nothing here depends
on judges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
    _values, place, times = np.unique(p, return_inverse=True, return_counts=True)
    middle = np.cumsum(times) - times / 2
    bin_of = np.minimum((bins * middle / len(p)).astype(int), bins - 1)[place]
    n = np.bincount(bin_of, minlength=bins)
    sums_p, sums_y = (np.bincount(bin_of, weights=w, minlength=bins) for w in (p, y))
    return [
        Bin(float(a / m), float(b / m), int(m))
        for a, b, m in zip(sums_p, sums_y, n, strict=False)
        if m
    ]


def ece(p: FloatArray, y: FloatArray, bins: int = 15) -> float | None:
    """Expected calibration error over bins of equal mass; None without items. Source: Nguyen and
    O'Connor 2015.
    """
    rows = reliability(p, y, bins)
    total = sum(row.n for row in rows)
    return sum(row.n * abs(row.mean_p - row.mean_y) for row in rows) / total if total else None


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
