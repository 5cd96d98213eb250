"""One answer from many raters: mean probability, majority, Dawid-Skene, Bradley-Terry and Davidson.

Missing ratings are NaN and stay missing: an item that nobody rated has no aggregate, not a half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prefab.factory.extras import missing_package
from prefab.judges.stats.rating_table import BoolArray, FloatArray, Table, group

_NEVER = 1e-300  # stands for probability 0 inside a logarithm


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Shapes (N items): `p` the aggregated probability and `spread` the raters' deviation, NaN
    where unscored; `weight` the share of the raters' weight that was given.
    """

    p: FloatArray
    spread: FloatArray
    weight: FloatArray


def mean_probability(
    p_NJ: FloatArray, weights: Sequence[float] | FloatArray | None = None, min_scored: float = 0.5
) -> Aggregate:
    """The (weighted) mean of the judges' probabilities per item, where at least `min_scored` of the
    weight was given.

    Shapes: p_NJ items x judges, NaN for unscored.
    """
    p_NJ = np.asarray(p_NJ, dtype=float)
    weights_J = np.ones(p_NJ.shape[1]) if weights is None else np.asarray(weights, dtype=float)
    given = ~np.isnan(p_NJ)
    weight = given @ weights_J
    filled = np.where(given, p_NJ, 0.0)
    enough = (weight > 0) & (weight >= min_scored * weights_J.sum() * (1 - 1e-12))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.where(enough, (filled @ weights_J) / weight, np.nan)
        spread = np.sqrt((np.where(given, (p_NJ - p[:, None]) ** 2, 0.0) @ weights_J) / weight)
    return Aggregate(p, np.where(enough, spread, np.nan), weight / max(weights_J.sum(), _NEVER))


def majority(ratings: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Each item's most frequent rating and the share it has; NaN for both where nobody rated, and
    for the rating where several are equally frequent (a split vote has no majority, and none is
    drawn).
    """
    table = group(ratings)
    n = len(ratings)
    if not len(table.times):
        return np.full(n, np.nan), np.full(n, np.nan)
    most = table.known_counts.max(axis=1)
    alone = (table.known_counts == most[:, None]).sum(axis=1) == 1
    winner = np.where(alone, table.values[table.known_counts.argmax(axis=1)], np.nan)
    share = most / table.known_counts.sum(axis=1)
    return _to_items(winner, table), _to_items(share, table)


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """Shapes (K classes, R raters, P rows): `priors` K; `confusion` R x K x K, P(said | true);
    `posterior` P x K.

    `undefined` says why there is no fit; all else is empty then. `entropy` of a row is its
    uncertainty in nats.
    """

    priors: FloatArray
    confusion: FloatArray
    posterior: FloatArray
    loglik: float
    iterations: int
    converged: bool
    undefined: str | None = None

    @property
    def entropy(self) -> FloatArray:
        """Shapes: P. In nats; 0 where the class is certain."""
        p = self.posterior
        result: FloatArray = -(p * np.log(np.maximum(p, _NEVER))).sum(axis=1)
        return result


def dawid_skene(
    ratings: FloatArray | Table, tolerance: float = 1e-12, limit: int = 10_000
) -> DawidSkene:
    """Each rater's errors and each item's probable class, from items x raters; the posterior has
    one row an item (NaN for an item that nobody rated), or one a pattern when given a `Table`.
    """
    table = group(ratings)
    if not len(table.times) or len(table.values) < 2:
        reason = "no ratings" if not len(table.times) else "only one category was used"
        return DawidSkene(np.empty(0), np.empty(0), np.empty(0), float("nan"), 0, False, reason)
    said_PRK = (table.known_codes[:, :, None] == np.arange(len(table.values))).astype(float)
    fit = dawid_skene_counts(said_PRK, table.times, tolerance, limit)
    if isinstance(ratings, Table):
        return fit
    posterior = np.stack([_to_items(column, table) for column in fit.posterior.T], axis=1)
    return DawidSkene(
        fit.priors, fit.confusion, posterior, fit.loglik, fit.iterations, fit.converged
    )


def dawid_skene_counts(
    said_PRK: FloatArray,
    times: FloatArray | None = None,
    tolerance: float = 1e-12,
    limit: int = 10_000,
) -> DawidSkene:
    """Expectation-maximisation from majority shares until no posterior moves by more than
    `tolerance`.

    Shapes: said_PRK how often each rater said each class of each row; `times` how many items a row
    stands for.
    Source: Dawid and Skene 1979.
    """
    said_PRK = np.asarray(said_PRK, dtype=float)
    p, r, k = said_PRK.shape
    times = np.ones(p) if times is None else times
    flat = said_PRK.reshape(p, r * k)
    posterior = said_PRK.sum(axis=1) / said_PRK.sum(axis=(1, 2))[:, None]
    for iteration in range(1, limit + 1):
        weighted = posterior * times[:, None]
        priors = weighted.sum(axis=0) / times.sum()
        confusion = (weighted.T @ flat).reshape(k, r, k)
        total = confusion.sum(axis=2, keepdims=True)
        confusion = np.divide(
            confusion, total, out=np.full_like(confusion, 1.0 / k), where=total > 0
        )
        joint = flat @ np.log(np.maximum(confusion, _NEVER)).reshape(k, r * k).T + np.log(
            np.maximum(priors, _NEVER)
        )
        top = joint.max(axis=1, keepdims=True)
        likelihood = np.exp(joint - top)
        evidence = likelihood.sum(axis=1, keepdims=True)
        before, posterior = posterior, likelihood / evidence
        moved = float(np.abs(posterior - before).max())
        if moved < tolerance:
            break
    loglik = float(times @ (top + np.log(evidence))[:, 0])
    return DawidSkene(
        priors, confusion.transpose(1, 0, 2), posterior, loglik, iteration, moved < tolerance
    )


def _to_items(by_pattern: FloatArray, table: Table) -> FloatArray:
    return np.append(by_pattern, np.nan)[table.pattern_of]  # row -1, nobody rated it, is the NaN


@dataclass(frozen=True, slots=True)
class Strengths:
    """A fit of pairwise comparisons. `worth` sums to 1; `log_worth` is centred on 0, with its
    standard errors `se`; `nu` is the tie parameter (0 without ties). `undefined` says why there is
    no fit; all else is empty then.
    """

    worth: FloatArray
    log_worth: FloatArray
    se: FloatArray
    nu: float
    undefined: str | None = None


def bradley_terry(wins: FloatArray) -> Strengths:
    """Strengths from K x K wins (row beat column; fractions of a win count).

    Undefined unless everybody can be reached from everybody by wins (Ford 1957): the fit would be
    infinite. The `evalica` library does the fit. Source: Bradley and Terry 1952.
    """
    return _strengths(np.array(wins, dtype=float), None)


def davidson(wins: FloatArray, ties: FloatArray) -> Strengths:
    """Strengths with ties: P(tie) is proportional to nu sqrt(worth_i worth_j). `ties` is symmetric,
    each tie once in either half. The `evalica` library does the fit (Newman's algorithm; its v is
    nu / 2). Source: Davidson 1970.
    """
    return _strengths(np.array(wins, dtype=float), np.array(ties, dtype=float))


def _strengths(wins: FloatArray, ties: FloatArray | None) -> Strengths:
    k = len(wins)
    empty = np.empty(0)
    np.fill_diagonal(wins, 0.0)
    if ties is not None:
        np.fill_diagonal(ties, 0.0)
        if not np.array_equal(ties, ties.T):
            raise ValueError("ties must be symmetric")
    if k < 2:
        return Strengths(empty, empty, empty, 0.0, "fewer than two to compare")
    if not wins.any():
        return Strengths(empty, empty, empty, 0.0, "nobody won")
    beats = wins > 0 if ties is None else (wins > 0) | (ties > 0)
    if _n_components(beats) > 1:
        return Strengths(empty, empty, empty, 0.0, "a group never lost to, or never met, the rest")
    worth, nu = _fit(wins, ties if ties is not None and ties.any() else None)
    worth = worth / worth.sum()
    logs = np.log(worth)
    met = wins + wins.T + (0.0 if ties is None else ties)
    return Strengths(worth, logs - logs.mean(), _strength_errors(worth, nu, met), nu)


def _n_components(beats: BoolArray) -> int:
    """The number of strongly connected components: 1 where everybody reaches everybody by wins."""
    try:
        from scipy.sparse.csgraph import connected_components  # optional: evalica brings scipy
    except ImportError as error:
        raise missing_package(error.name, "fitting strengths") from error
    return int(connected_components(beats, directed=True, connection="strong")[0])


def _fit(wins: FloatArray, ties: FloatArray | None) -> tuple[FloatArray, float]:
    try:
        import evalica  # optional: it brings scipy and pandas
    except ImportError as error:
        raise missing_package(error.name, "fitting strengths") from error

    rows = [(i, j, evalica.Winner.X, wins[i, j]) for i, j in zip(*np.nonzero(wins), strict=False)]
    if ties is not None:
        rows += [
            (i, j, evalica.Winner.Draw, ties[i, j])
            for i, j in zip(*np.nonzero(np.triu(ties)), strict=False)
        ]
    xs, ys, winners, weights = (list(column) for column in zip(*rows, strict=False))
    options = {"weights": [float(w) for w in weights], "tolerance": 1e-13, "limit": 100_000}
    xs, ys = [int(x) for x in xs], [int(y) for y in ys]
    fit = (evalica.bradley_terry if ties is None else evalica.newman)(xs, ys, winners, **options)
    worth = fit.scores.reindex(range(len(wins))).to_numpy(dtype=float)
    return worth, 0.0 if ties is None else 2.0 * float(fit.v)


def _strength_errors(worth: FloatArray, nu: float, met: FloatArray) -> FloatArray:
    """From the expected information; centred on 0, so through its pseudo-inverse."""
    k = len(worth)
    information = np.zeros((k + 1, k + 1))
    for i, j in zip(*np.nonzero(np.triu(met)), strict=False):
        tie = nu * np.sqrt(worth[i] * worth[j])
        p = np.array([worth[i], worth[j], tie]) / (worth[i] + worth[j] + tie)
        gradient = np.zeros((3, k + 1))
        gradient[0, i] = gradient[1, j] = gradient[2, k] = 1.0
        gradient[2, [i, j]] = 0.5
        gradient -= p @ gradient
        information += met[i, j] * (gradient.T * p) @ gradient
    result: FloatArray = np.sqrt(
        np.maximum(np.diag(np.linalg.pinv(information, rcond=1e-12))[:k], 0.0)
    )
    return result
