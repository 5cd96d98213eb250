"""From readings to a probability: the readings of a comparison are combined as evidence, and the
result is calibrated on outcomes that are known.

A reading is one judge under one principle, P(a is better). The mean of readings is a share of
votes, not a probability: of eleven principles most say nothing about a pair, and the mean stays
near a half however sure the others are. So log-odds are added up, with a discount because readings
are correlated, and the sum is mapped to a probability on the outcomes of some comparisons: people's
labels, a known truth, or the answers of a second asking.

`fit_calibration` needs numpy and scipy; a fitted `Calibration` is applied without them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from math import exp, isfinite, log
from typing import Any, Literal

Method = Literal["auto", "temperature", "isotonic"]
Fitted = Literal["none", "temperature", "isotonic"]
# One reading is held within these odds: an engine's 0.9999 is not worth ten readings of 0.7.
SUREST = 0.99
LEAST_OUTCOMES = 20  # fewer say too little even of one parameter
LEAST_ISOTONIC = 200
FOLDS = 5


@dataclass(frozen=True, slots=True)
class Fit:
    """How good the probabilities are, of `p_chosen`, each predicted without its own group:
    expected calibration error without its bias upwards and its 95% interval over groups, log loss,
    and the reliability table (mean probability, share that was right, number). Without an interval
    (what was recorded before there was one), the error has its bias.
    """

    ece: float
    log_loss: float
    reliability: tuple[tuple[float, float, int], ...]
    ece_low: float | None = None
    ece_high: float | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """How readings become a probability.

    Args:
        method: temperature, isotonic, or none: the combined log-odds as they are.
        correlation: The mean correlation of two readings' log-odds, 0 to 1.
        temperature: The combined log-odds are divided by it.
        knots: For isotonic: pairs of combined log-odds and probability, increasing from (0, 0.5);
            the curve below 0 is its mirror.
        n_outcomes: Comparisons with a known outcome.
        n_groups: Groups (prompts) that they belong to.
        before: The quality of the probabilities as they were without the calibration; None without
            outcomes.
        after: The quality of the calibrated probabilities, cross-fitted by group.
        reason: Why nothing was fitted, where `method` is none.
    """

    method: Fitted
    correlation: float
    temperature: float = 1.0
    knots: tuple[tuple[float, float], ...] = ()
    n_outcomes: int = 0
    n_groups: int = 0
    before: Fit | None = None
    after: Fit | None = None
    reason: str | None = None

    def probability(
        self, p_a: Sequence[float | None], weights: Sequence[float] | None = None
    ) -> float | None:
        """P(a is better) of one comparison from its readings' P(a); None where none is scored.

        Exchanging a and b gives 1 minus the probability.
        """
        odds = [None if p is None else log_odds(p) for p in p_a]
        combined = combine(odds, self.correlation, weights)
        return None if combined is None else self.of_log_odds(combined)

    def of_log_odds(self, combined: float) -> float:
        """The probability of combined log-odds."""
        if self.method != "isotonic":
            return _sigmoid(combined / self.temperature)
        if combined < 0:
            return 1.0 - self.of_log_odds(-combined)
        i = bisect_right([x for x, _ in self.knots], combined)
        if i == len(self.knots):
            return self.knots[-1][1]
        (x0, y0), (x1, y1) = self.knots[i - 1], self.knots[i]
        return y0 + (y1 - y0) * (combined - x0) / (x1 - x0)

    @property
    def rule(self) -> str:
        """What decides the probabilities, and nothing else: for ids of what is derived."""
        return repr((self.method, self.correlation, self.temperature, self.knots))

    def data(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Calibration:
        """The inverse of `data`."""
        fits = {
            name: None
            if data[name] is None
            else Fit(
                data[name]["ece"],
                data[name]["log_loss"],
                tuple((float(p), float(y), int(n)) for p, y, n in data[name]["reliability"]),
                data[name].get("ece_low"),
                data[name].get("ece_high"),
            )
            for name in ("before", "after")
        }
        knots = tuple((float(x), float(y)) for x, y in data["knots"])
        return cls(**{**data, **fits, "knots": knots})


def log_odds(p: float) -> float:
    """The log-odds of a reading, held within those of `SUREST`."""
    held = min(max(p, 1 - SUREST), SUREST)
    return log(held / (1 - held))


def combine(
    odds: Sequence[float | None], correlation: float, weights: Sequence[float] | None = None
) -> float | None:
    """The log-odds of a comparison: the weighted mean of its scored readings' times their effective
    number, n / (1 + (n - 1) correlation). Independent readings are added up, fully correlated ones
    are averaged. With unequal weights, n is (sum of w)^2 / sum of w^2. None without a scored
    reading.

    Source: the design effect, Kish 1965.
    """
    held = [1.0] * len(odds) if weights is None else weights
    known = [(x, w) for x, w in zip(odds, held, strict=True) if x is not None and w > 0]
    if not known:
        return None
    total = sum(w for _, w in known)
    n = total**2 / sum(w**2 for _, w in known)
    return n / (1 + (n - 1) * correlation) * sum(x * w for x, w in known) / total


def mean_correlation(odds: Sequence[Sequence[float | None]]) -> float:
    """The mean correlation of two readings' log-odds, over the comparisons that both scored, each
    pair of readings by its number of those; from 0 to 1, and 0 where no two readings meet.

    Which answer is called a is arbitrary, so the log-odds are not centred: exchanging a and b in
    any comparison changes nothing.
    Shapes: a row a comparison, a column a reading.
    """
    import numpy as np

    values = np.array([[np.nan if x is None else x for x in row] for row in odds], dtype=float)
    if values.ndim != 2 or values.shape[1] < 2:
        return 0.0
    there = np.isfinite(values)
    filled = np.where(there, values, 0.0)
    squares = (filled**2).T @ there  # [i, j]: of reading i over the rows that j scored too
    scale = np.sqrt(squares * squares.T)
    times = there.T.astype(float) @ there
    upper = np.triu(scale > 0, 1)
    if not upper.any():
        return 0.0
    each = (filled.T @ filled)[upper] / scale[upper]
    return float(np.clip(np.average(each, weights=times[upper]), 0.0, 1.0))


def fit_calibration(
    p_a: Sequence[Sequence[float | None]],
    outcomes: Sequence[float | None],
    groups: Sequence[str],
    method: Method = "auto",
    weights: Sequence[Sequence[float]] | None = None,
    before: Sequence[float | None] | None = None,
    sharpen: bool = True,
) -> Calibration:
    """Learn how readings become a probability.

    Args:
        p_a: A row a comparison, a column a reading (one judge under one principle): P(a is better);
            None where it is unscored or was not asked. All comparisons count for the correlation.
        outcomes: A comparison's known outcome: 1 (a is better), 0 (b is), 0.5 (a tie); None where
            it is not known.
        groups: What belongs together (the prompt); a group is never on both sides of a test.
        method: One temperature, an isotonic curve, or (auto) the one with the smaller log loss on
            groups that it was not fitted on.
        weights: Of each reading, as `p_a`; None: all the same.
        before: P(a) of each comparison as it is without the calibration, to measure its quality
            on the same outcomes; None: of the combined log-odds at temperature 1.
        sharpen: Whether the temperature may be below 1, which makes the judges' probabilities
            surer. Not where the outcomes are the judges' own second answers: these can show that
            judges are less certain than they say, but not that they are right more often.

    Returns:
        The calibration. `method` is none, with a reason, where fewer than 20 outcomes are known.

    Source: Guo et al. 2017 (temperature); Zadrozny and Elkan 2002 (isotonic); targets are smoothed
    as Platt 1999 does, so that a few outcomes that are all right give no certainty.
    """
    correlation, combined = combine_all(p_a, weights)
    shown = before or [None if x is None else _sigmoid(x) for x in combined]
    x, y, known, shares = _with_outcomes(combined, outcomes, groups, shown)
    n, n_groups = len(x), len(set(known))
    reason = None if any(x) else "no reading favours an answer"
    if n < LEAST_OUTCOMES or n_groups < 2:
        reason = f"{n} known outcomes, and {LEAST_OUTCOMES} of two prompts are needed"
    if reason is not None:
        return Calibration("none", correlation, n_outcomes=n, n_groups=n_groups, reason=reason)
    wanted = _METHODS[method if n >= LEAST_ISOTONIC and sharpen else "temperature"]
    tested = {name: quality(_cross_fitted(name, x, y, known, sharpen), y, known) for name in wanted}
    best = min(wanted, key=lambda name: tested[name].log_loss)
    temperature, knots = _fit(best, x, y, sharpen)
    was = quality(shares, y, known)
    return Calibration(best, correlation, temperature, knots, n, n_groups, was, tested[best])


def combine_all(
    p_a: Sequence[Sequence[float | None]], weights: Sequence[Sequence[float]] | None = None
) -> tuple[float, list[float | None]]:
    """The mean correlation of the readings, and the combined log-odds of each comparison.

    Shapes: a row a comparison, a column a reading.
    """
    odds = [[None if p is None else log_odds(p) for p in row] for row in p_a]
    correlation = mean_correlation(odds)
    each = [None] * len(odds) if weights is None else weights
    return correlation, [combine(row, correlation, w) for row, w in zip(odds, each, strict=True)]


_METHODS: dict[Method, tuple[Fitted, ...]] = {
    "auto": ("temperature", "isotonic"),
    "temperature": ("temperature",),
    "isotonic": ("isotonic",),
}


def _with_outcomes(
    combined: Sequence[float | None],
    outcomes: Sequence[float | None],
    groups: Sequence[str],
    shares: Sequence[float | None],
) -> tuple[list[float], list[float], list[str], list[float]]:
    """Log-odds, outcome, group and share of the comparisons that have log-odds and an outcome."""
    found = [
        (x, float(y), group, 0.5 if share is None else share)
        for x, y, group, share in zip(combined, outcomes, groups, shares, strict=True)
        if x is not None and y is not None and isfinite(y)
    ]
    return (
        [x for x, _, _, _ in found],
        [y for _, y, _, _ in found],
        [group for _, _, group, _ in found],
        [share for _, _, _, share in found],
    )


def quality(p: Sequence[float], y: Sequence[float], groups: Sequence[str]) -> Fit:
    """The quality of probabilities that a is better, told as those of the chosen answer: P(chosen)
    at least a half, and whether it was right. Comparisons of one group are not independent.
    """
    import numpy as np

    from prefab.judges.stats import calibration

    p_N, y_N = np.asarray(p, dtype=float), np.asarray(y, dtype=float)
    chosen, right = np.maximum(p_N, 1 - p_N), np.where(p_N >= 0.5, y_N, 1 - y_N)
    table = tuple((b.mean_p, b.mean_y, b.n) for b in calibration.reliability(chosen, right))
    error = calibration.calibration_error(chosen, right, clusters=np.asarray(groups))
    loss = calibration.log_loss(chosen, right)
    return Fit(error.value or 0.0, loss or 0.0, table, error.low, error.high)


def _cross_fitted(
    method: Fitted, x: Sequence[float], y: Sequence[float], groups: Sequence[str], sharpen: bool
) -> list[float]:
    """The probability of each comparison by a fit on other groups. Groups are put into folds in the
    order of their digests, so the order of the comparisons does not matter.
    """
    ordered = sorted(set(groups), key=lambda g: blake2b(g.encode(), digest_size=8).digest())
    fold_of = {group: i % FOLDS for i, group in enumerate(ordered)}
    fits = {}
    for fold in set(fold_of.values()):
        train = [i for i, group in enumerate(groups) if fold_of[group] != fold]
        temperature, knots = _fit(method, [x[i] for i in train], [y[i] for i in train], sharpen)
        fits[fold] = Calibration(method, 0.0, temperature, knots)
    return [fits[fold_of[g]].of_log_odds(value) for value, g in zip(x, groups, strict=True)]


def _fit(
    method: Fitted, x: Sequence[float], y: Sequence[float], sharpen: bool
) -> tuple[float, tuple[tuple[float, float], ...]]:
    """The temperature and the knots."""
    import numpy as np

    from prefab.judges.stats import calibration

    x_N, n = np.asarray(x, dtype=float), len(x)
    y_N = (np.asarray(y, dtype=float) * n + 0.5) / (n + 1)
    if method == "temperature":
        fitted = calibration.fit_temperature_of(x_N, y_N) or 1.0
        return fitted if sharpen else max(1.0, fitted), ()
    from scipy.optimize import isotonic_regression

    both_x, both_y = np.concatenate([x_N, -x_N]), np.concatenate([y_N, 1 - y_N])
    at, place = np.unique(both_x, return_inverse=True)
    times = np.bincount(place)
    curve = isotonic_regression(np.bincount(place, weights=both_y) / times, weights=times)
    starts = curve.blocks[:-1]
    middles = np.add.reduceat(at * times, starts) / np.add.reduceat(times, starts)
    blocks = zip(middles.tolist(), curve.x[starts].tolist(), strict=True)
    return 1.0, ((0.0, 0.5), *((a, b) for a, b in blocks if a > 1e-9))


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x >= 0 else 1 - 1 / (1 + exp(x))
