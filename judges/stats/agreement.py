"""Agreement of raters beyond chance: every usual coefficient, for any number of raters, with
missing ratings.

All are (observed - chance) / (1 - chance) with weights between categories; they differ in what
chance is. `ratings` is items x raters, float, NaN for missing (or a `rating_table.Table`, grouped
once for many coefficients); `counts` is items x categories. Standard errors are the linearised ones
of Gwet; intervals use t with n - 1 degrees of freedom. Every function takes `resamples` (0: none)
and `seed` for the bootstrap's interval over items (`boot_low`, `boot_high`: none over more than
100,000 distinct patterns, or where over 5% of the resamples define no value).

Source: Gwet, Handbook of Inter-Rater Reliability, 4th ed. (2014), and Gwet 2008, 2021 for the
variances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, sqrt
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from prefab.factory.stats import Estimate, effective_clusters, t_quantile, undefined
from prefab.judges.stats.krippendorff import krippendorff_alpha, krippendorff_values, with_interval
from prefab.judges.stats.rating_table import (
    RESAMPLES,
    BoolArray,
    CodeArray,
    FloatArray,
    Table,
    category_weights,
    cluster_counts,
    draws,
    group,
    group_counts,
)

__all__ = [
    "Estimate",
    "all_coefficients",
    "brennan_prediger",
    "cohen_kappa",
    "conger_kappa",
    "fleiss_kappa",
    "gwet_ac",
    "krippendorff_alpha",
    "panel_coefficients",
    "percent",
    "randolph_kappa",
    "scott_pi",
]
Weights = str | FloatArray | None
Chance = Literal["none", "uniform", "gwet", "pooled", "raters"]
Kind = Literal[Chance, "alpha", "cohen", "same pooled", "same uniform"]
_SAME_SIZE: dict[str, Chance] = {"same pooled": "pooled", "same uniform": "uniform"}
_ONE_CATEGORY = "only one category was used"
_FLAT = 1e-12  # below this, 1 - chance is rounding and the ratio says nothing


def percent(
    ratings: FloatArray | Table,
    weights: Weights = None,
    *,
    categories: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The share of pairs of ratings of an item that agree, averaged over items with at least two
    ratings.
    """
    return _estimate(group(ratings, categories), "none", weights, resamples, seed)


def cohen_kappa(
    ratings: FloatArray | Table,
    weights: Weights = None,
    *,
    categories: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Cohen's kappa of two raters over the items that both rated; linear, quadratic or own weights.

    Source: Cohen 1960, 1968; error: Fleiss, Cohen and Everitt 1969.
    """
    return _cohen(group(ratings, categories), weights, resamples, seed)


def conger_kappa(
    ratings: FloatArray | Table,
    weights: Weights = None,
    *,
    categories: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Cohen's kappa for any number of raters: chance by each rater's own use of the categories.
    Source: Conger 1980.
    """
    return _estimate(group(ratings, categories), "raters", weights, resamples, seed)


def scott_pi(
    ratings: FloatArray | Table,
    weights: Weights = None,
    *,
    categories: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Scott's pi, and for more raters or missing ratings Fleiss's generalisation of it: chance by
    pooled use.

    Source: Scott 1955; Fleiss 1971; missing ratings: Gwet 2014.
    """
    return _estimate(group(ratings, categories), "pooled", weights, resamples, seed)


def brennan_prediger(
    ratings: FloatArray | Table,
    weights: Weights = None,
    *,
    categories: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Chance as if every category were equally likely. `categories` matters: also those that nobody
    used.

    Source: Brennan and Prediger 1981.
    """
    return _estimate(group(ratings, categories), "uniform", weights, resamples, seed)


def gwet_ac(
    ratings: FloatArray | Table,
    weights: Weights = None,
    *,
    categories: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Gwet's AC1, or AC2 with weights: sensible even where nearly all ratings are of one category.
    Source: 2008.
    """
    return _estimate(group(ratings, categories), "gwet", weights, resamples, seed)


def fleiss_kappa(counts: FloatArray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Fleiss's kappa from items x categories counts, the same number of ratings an item, as in its
    paper (1971).

    The error is Gwet's, not Fleiss's own of 1979, which holds only where the true kappa is 0.
    """
    return _same_size(group_counts(counts), "pooled", resamples, seed)


def randolph_kappa(counts: FloatArray, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Randolph's free-marginal kappa from items x categories counts; every column is a category.
    Source: 2005.
    """
    return _same_size(group_counts(counts), "uniform", resamples, seed)


def all_coefficients(
    ratings: FloatArray | Table,
    weights: Weights = None,
    metric: str = "nominal",
    *,
    categories: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: npt.NDArray[Any] | None = None,
) -> dict[str, Estimate]:
    """Every coefficient that allows missing ratings, over the same resamples; patterns are grouped
    and drawn once.

    `clusters` names each item's cluster (its prompt, or its prompt's group): errors and intervals
    are over whole clusters then. Shapes: clusters N.
    """
    table = group(ratings, categories)
    names: dict[str, Chance] = {
        "percent": "none",
        "brennan_prediger": "uniform",
        "scott_pi": "pooled",
        "conger_kappa": "raters",
        "gwet_ac": "gwet",
    }
    kinds: dict[str, tuple[Kind, Weights]] = {
        name: (chance, weights) for name, chance in names.items()
    }
    kinds["krippendorff_alpha"] = ("alpha", metric)
    return _together(table, kinds, resamples, seed, clusters)


PANEL: dict[str, tuple[Kind, Weights]] = {
    "percent": ("none", None),
    "cohen_kappa": ("cohen", None),
    "cohen_kappa linear": ("cohen", "linear"),
    "cohen_kappa quadratic": ("cohen", "quadratic"),
    "conger_kappa": ("raters", None),
    "conger_kappa quadratic": ("raters", "quadratic"),
    "fleiss_kappa": ("same pooled", None),
    "randolph_kappa": ("same uniform", None),
    "brennan_prediger": ("uniform", None),
    "scott_pi": ("pooled", None),
    "krippendorff_alpha nominal": ("alpha", "nominal"),
    "krippendorff_alpha ordinal": ("alpha", "ordinal"),
    "krippendorff_alpha interval": ("alpha", "interval"),
    "gwet_ac1": ("gwet", None),
    "gwet_ac2 linear": ("gwet", "linear"),
    "gwet_ac2 quadratic": ("gwet", "quadratic"),
}


def panel_coefficients(
    ratings: FloatArray | Table,
    *,
    categories: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: npt.NDArray[Any] | None = None,
    kinds: Mapping[str, tuple[Kind, Weights]] = PANEL,
) -> dict[str, Estimate]:
    """Every coefficient in `kinds`, those too that are for two raters or for items of one size
    alone: where they do not apply they are undefined and say why. Over the same resamples, as in
    `all_coefficients`.
    """
    return _together(group(ratings, categories), kinds, resamples, seed, clusters)


def _together(
    table: Table,
    kinds: Mapping[str, tuple[Kind, Weights]],
    resamples: int,
    seed: int,
    clusters: npt.NDArray[Any] | None,
) -> dict[str, Estimate]:
    found = {name: _plain(table, *kind) for name, kind in kinds.items()}
    resampled = {
        name: _resampled(table, *kinds[name])
        for name, estimate in found.items()
        if estimate.value is not None
    }
    if not resampled:
        return found
    independent = None
    if clusters is not None:
        counts_CP = cluster_counts(table, clusters, np.random.default_rng(seed))
        independent = effective_clusters(counts_CP.sum(axis=1))
        n_groups = len(np.unique(np.asarray(clusters)[cast("CodeArray", table.pattern_of) >= 0]))
        found |= {
            name: _over_clusters(found[name], of, table.times, counts_CP, n_groups)
            for name, of in resampled.items()
        }
    pieces: dict[str, list[FloatArray]] = {name: [] for name in resampled}
    for times_BP in draws(table, resamples, seed, clusters):
        for name, of in resampled.items():
            pieces[name].append(of(times_BP))
    return found | {
        name: with_interval(found[name], drawn, independent) for name, drawn in pieces.items()
    }


def _over_clusters(
    estimate: Estimate,
    of: Callable[[FloatArray], FloatArray],
    times_P: FloatArray,
    counts_CP: FloatArray,
    n_groups: int,
) -> Estimate:
    """The estimate with the error of the jackknife over whole clusters, and the interval that
    Student's t with it gives in log(1 - value), where a coefficient near 1 is less skewed.

    None where the coefficient is undefined without some cluster, or no cluster moves it.
    Source: Efron and Stein 1981; degrees of freedom: `effective_clusters` less one.
    """
    bare = replace(estimate, se=None, low=None, high=None, n_groups=n_groups)
    m, value = len(counts_CP), cast("float", estimate.value)
    if m < 2:
        return bare
    without_C = of(times_P - counts_CP)
    squares = float(((without_C - without_C.mean()) ** 2).sum())
    if not np.isfinite(squares) or squares == 0 or value >= 1:
        return bare
    se = sqrt((m - 1) / m * squares)
    half = t_quantile(0.975, effective_clusters(counts_CP.sum(axis=1)) - 1) * se / (1 - value)
    return replace(
        bare,
        se=se,
        low=max(LEAST, 1 - (1 - value) * exp(min(half, 700.0))),
        high=1 - (1 - value) * exp(-half),
    )


def _plain(table: Table, kind: Kind, weights: Weights) -> Estimate:
    """One coefficient without a bootstrap."""
    if kind == "alpha":
        return krippendorff_alpha(table, _metric(weights), resamples=0)
    if kind == "cohen":
        return _cohen(table, weights, 0, 0)
    if kind in _SAME_SIZE:
        return _same_size(table, _SAME_SIZE[kind], 0, 0)
    return _estimate(table, cast("Chance", kind), weights, 0, 0)


def _resampled(table: Table, kind: Kind, weights: Weights) -> Callable[[FloatArray], FloatArray]:
    """The same coefficient for each row of pattern counts."""
    if kind == "alpha":
        metric = _metric(weights)
        return lambda times_BP: krippendorff_values(table, metric, times_BP)
    weights_KK = category_weights(weights, table.values)
    if kind == "cohen":
        both, used = _rated_by_both(table)
        return lambda times_BP: _coefficients(used, "raters", weights_KK, times_BP[:, both])[0]
    chance = _SAME_SIZE.get(kind) or cast("Chance", kind)
    return lambda times_BP: _coefficients(table, chance, weights_KK, times_BP)[0]


def _metric(weights: Weights) -> str | FloatArray:
    assert weights is not None  # alpha's kinds name their metric here
    return weights


def _rated_by_both(table: Table) -> tuple[BoolArray, Table]:
    both: BoolArray = np.all(table.known_codes >= 0, axis=1)
    return both, replace(
        table,
        codes=table.known_codes[both],
        times=table.times[both],
        ratings_PK=table.known_counts[both],
        pattern_of=None,
    )


def _cohen(table: Table, weights: Weights, resamples: int, seed: int) -> Estimate:
    n_pairable = _pairable(table)
    if table.known_codes.shape[1] != 2:
        reason = (
            f"Cohen's kappa is for two raters, not {table.known_codes.shape[1]}: use conger_kappa"
        )
        return undefined(reason, n_pairable, table.n_raters)
    both, used = _rated_by_both(table)
    if not both.any():
        return undefined("no item was rated by both raters", 0, table.n_raters)
    estimate = _estimate(used, "raters", weights, resamples, seed)
    if estimate.se is None:
        return estimate
    n = estimate.n_items
    return _interval(estimate, estimate.se * sqrt((n - 1) / n), n)  # their formula divides by n


def _same_size(table: Table, chance: Chance, resamples: int, seed: int) -> Estimate:
    sizes = table.known_counts.sum(axis=1)
    if len(sizes) and sizes.min() != sizes.max():
        reason = f"items have from {sizes.min():.0f} to {sizes.max():.0f} ratings: use scott_pi or brennan_prediger"
        return undefined(reason, _pairable(table), table.n_raters)
    return _estimate(table, chance, None, resamples, seed)


def _pairable(table: Table) -> int:
    return int(table.times[table.known_counts.sum(axis=1) >= 2].sum())


def _estimate(
    table: Table, chance: Chance, weights: Weights, resamples: int, seed: int
) -> Estimate:
    n_pairable = _pairable(table)
    weights_KK = category_weights(weights, table.values)
    if table.n_raters < 2:
        return undefined("fewer than two raters", n_pairable, table.n_raters)
    if n_pairable == 0:
        return undefined("no item has two ratings", 0, table.n_raters)
    if chance != "none" and len(table.values) < 2:
        return undefined(_ONE_CATEGORY, n_pairable, table.n_raters)
    value, _observed, expected = _coefficients(table, chance, weights_KK, table.times[None, :])
    if chance != "none" and 1.0 - expected[0] < _FLAT:
        return undefined(_ONE_CATEGORY, n_pairable, table.n_raters)
    estimate = Estimate(float(value[0]), None, None, None, n_pairable, table.n_raters)
    n = float(table.times.sum())
    if n_pairable >= 2:
        influence = _influence(table, chance, weights_KK, float(value[0]), float(expected[0]))
        variance = float(table.times @ (influence - value[0]) ** 2) / (n * (n - 1))
        estimate = _interval(estimate, sqrt(variance), n)
    pieces = [
        _coefficients(table, chance, weights_KK, drawn)[0]
        for drawn in draws(table, resamples, seed)
    ]
    return with_interval(estimate, pieces)


LEAST = -1.0  # of a coefficient: complete disagreement; no interval goes below it


def _interval(estimate: Estimate, se: float, n: float) -> Estimate:
    """The t interval, which cannot pass 1. Source: Gwet 2014; n - 1 degrees of freedom."""
    assert estimate.value is not None
    half = t_quantile(0.975, n - 1) * se
    low, high = max(LEAST, estimate.value - half), min(1.0, estimate.value + half)
    return replace(estimate, se=se, low=low, high=high)


def _observed_P(table: Table, weights_KK: FloatArray) -> FloatArray:
    """Weighted agreement among the pairs of ratings of each pattern; 0 where there is no pair."""
    r = table.known_counts.sum(axis=1)
    agreeing = (table.known_counts * (table.known_counts @ weights_KK - 1.0)).sum(axis=1)
    return np.where(r >= 2, agreeing / np.maximum(r * (r - 1), 1.0), 0.0)


def _coefficients(
    table: Table, chance: Chance, weights_KK: FloatArray, times_BP: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Value, observed and chance agreement for each row of pattern counts. NaN where a resample
    defines none.
    """
    pairable = table.known_counts.sum(axis=1) >= 2
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = (times_BP @ _observed_P(table, weights_KK)) / (times_BP @ pairable)
        expected = _chance(table, chance, weights_KK, times_BP)
        value = (observed - expected) / np.where(1.0 - expected < _FLAT, np.nan, 1.0 - expected)
    return value, observed, expected


def _chance(
    table: Table, chance: Chance, weights_KK: FloatArray, times_BP: FloatArray
) -> FloatArray:
    result: FloatArray
    k = len(table.values)
    if chance == "none":
        return np.zeros(len(times_BP))
    if chance == "uniform":
        return np.full(len(times_BP), weights_KK.sum() / k**2)
    if chance == "raters":
        shares_BRK, _ = _rater_shares(table, times_BP)
        r = np.isfinite(shares_BRK[:, :, 0]).sum(axis=1)
        shares_BRK = np.nan_to_num(shares_BRK)
        total = shares_BRK.sum(axis=1)
        same = ((shares_BRK @ weights_KK) * shares_BRK).sum(axis=(1, 2))
        result = (((total @ weights_KK) * total).sum(axis=1) - same) / (r * (r - 1))
        return result
    pi_BK = _pooled(table, times_BP)
    if chance == "gwet":
        result = weights_KK.sum() * (pi_BK * (1.0 - pi_BK)).sum(axis=1) / (k * (k - 1))
        return result
    assert chance == "pooled"
    result = ((pi_BK @ weights_KK) * pi_BK).sum(axis=1)
    return result


def _pooled(table: Table, times_BP: FloatArray) -> FloatArray:
    shares = table.known_counts / table.known_counts.sum(axis=1, keepdims=True)
    result: FloatArray = (times_BP @ shares) / times_BP.sum(axis=1, keepdims=True)
    return result


def _rater_shares(table: Table, times_BP: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Each rater's shares of the categories (NaN for one without ratings) and number of ratings."""
    one_hot = _one_hot(table)
    p, r, k = one_hot.shape
    counts = (times_BP @ one_hot.reshape(p, r * k)).reshape(len(times_BP), r, k)
    rated = counts.sum(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return counts / rated[:, :, None], rated


def _one_hot(table: Table) -> FloatArray:
    codes = table.known_codes[:, (table.known_codes >= 0).any(axis=0)]
    result: FloatArray = (codes[:, :, None] == np.arange(len(table.values))).astype(float)
    return result


def _influence(
    table: Table, chance: Chance, weights_KK: FloatArray, value: float, expected: float
) -> FloatArray:
    """Each pattern's term of the linearised coefficient; their variance over items is the
    coefficient's.
    """
    r = table.known_counts.sum(axis=1)
    n, n_pairable = table.times.sum(), table.times[r >= 2].sum()
    own = (
        (n / n_pairable) * (_observed_P(table, weights_KK) - expected * (r >= 2)) / (1.0 - expected)
    )
    moved = _chance_influence(table, chance, weights_KK, expected) - expected
    result: FloatArray = own - 2.0 * (1.0 - value) * moved / (1.0 - expected)
    return result


def _chance_influence(
    table: Table, chance: Chance, weights_KK: FloatArray, expected: float
) -> FloatArray:
    """Half the derivative of chance by each pattern's weight, centred on chance itself."""
    result: FloatArray
    r, k = table.known_counts.sum(axis=1), len(table.values)
    if chance in ("none", "uniform"):
        return np.full(len(r), expected)
    if chance == "raters":
        return _rater_chance_influence(table, weights_KK)
    pi = _pooled(table, table.times[None, :])[0]
    if chance == "gwet":
        result = weights_KK.sum() / (k * (k - 1)) * (table.known_counts @ (1.0 - pi)) / r
        return result
    assert chance == "pooled"
    result = (table.known_counts @ (weights_KK @ pi)) / r
    return result


def _rater_chance_influence(table: Table, weights_KK: FloatArray) -> FloatArray:
    """Of Conger's chance. Source: Gwet 2014, section 5.5 (lambda_ig)."""
    shares, rated = _rater_shares(table, table.times[None, :])
    shares, rated = shares[0], rated[0]
    one_hot, n, r = _one_hot(table), table.times.sum(), len(rated)
    present = one_hot.sum(axis=2) - rated / n
    centred = (one_hot - present[:, :, None] * shares) * (n / rated)[:, None]
    others = (shares.sum(axis=0) - shares) @ weights_KK
    result: FloatArray = (centred * others).sum(axis=(1, 2)) / (r * (r - 1))
    return result
