"""Agreement against published tables to 1e-9, and against slow readings of the papers to 1e-12 on
random tables."""

from __future__ import annotations

import json
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from prefab.factory.stats import t_quantile
from prefab.judges.stats import agreement as ag
from prefab.judges.stats.krippendorff import (
    _alpha,
    _paired,
    _parts_of_many,
    _standard_error,
    _values_of_moments,
    krippendorff_values,
)
from prefab.judges.stats.rating_table import Table, category_weights, group, resample

GOLDEN = Path(__file__).parents[2] / "golden"
NAN = np.nan
RANDOM_TABLES = 300
TABLES = pytest.mark.parametrize(
    "tables", [RANDOM_TABLES // 4, pytest.param(RANDOM_TABLES, marks=pytest.mark.slow)]
)
BY_CHANCE = {
    name: partial(of, resamples=0)
    for name, of in {
        "gwet": ag.gwet_ac,
        "fleiss": ag.scott_pi,
        "scott": ag.scott_pi,
        "conger": ag.conger_kappa,
        "cohen": ag.cohen_kappa,
        "bp": ag.brennan_prediger,
        "pa2": ag.percent,
    }.items()
}


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


def rows(table) -> np.ndarray:
    return np.array([[NAN if x is None else x for x in row] for row in table], dtype=float)


def expand(counts) -> np.ndarray:
    """A contingency table of two raters as items x raters, categories from 1."""
    pairs = [
        (i + 1, j + 1) for i, row in enumerate(counts) for j, n in enumerate(row) for _ in range(n)
    ]
    return np.array(pairs, dtype=float)


def alpha_metric(weights: str, k: int):
    codes = np.arange(k)
    return {
        "identity": "nominal",
        "linear": np.abs(codes[:, None] - codes) * 1.0,
        "quadratic": "interval",
    }[weights]


def close(a: float, b: float, tolerance: float = 1e-9) -> bool:
    return abs(a - b) <= tolerance


# --- published tables ---


def test_every_coefficient_with_missing_ratings_of_four_raters():
    data = golden("krippendorff_2011_C")
    ratings = rows(data["ratings"])
    for name, expected in data["irrcac"].items():
        weights, chance = name.split("/")
        if chance == "krippendorff":
            found = ag.krippendorff_alpha(ratings, alpha_metric(weights, 5))
        else:
            found = BY_CHANCE[chance](ratings, weights)
        assert close(found.value, expected["coef"]) and close(found.se, expected["se"]), name
        assert close(found.low, expected["ci"][0]) and close(found.high, expected["ci"][1]), name
        assert (found.n_items, found.n_raters, found.undefined) == (11, 4, None)


@pytest.mark.parametrize("name", ["krippendorff_2011_C", "krippendorff_wikipedia"])
def test_alpha_under_four_metrics(name):
    data = golden(name)
    for metric, value in data["alpha"].items():
        assert close(ag.krippendorff_alpha(rows(data["ratings"]), metric).value, value), metric


def test_two_abstractors():
    """The tables' published errors divide by n, where those for raw ratings divide by n - 1;
    Cohen's does so in both."""
    data = golden("gwet_tables")["cont3x3abstractors"]
    ratings = expand(data["counts"])
    for name, expected in data["expected"].items():
        weights, chance = name.split("/")
        if chance == "krippendorff":
            found = ag.krippendorff_alpha(ratings, alpha_metric(weights, 3))
        else:
            found = BY_CHANCE[chance](ratings, weights)
        scale = 1.0 if chance == "cohen" else (99 / 100) ** 0.5
        assert close(found.value, expected["coef"]) and close(found.se * scale, expected["se"]), (
            name
        )
        assert close(found.value - t_quantile(0.975, 99) * found.se * scale, expected["ci"][0]), (
            name
        )


def test_high_agreement_paradox():
    data = golden("gwet_tables")["paradox"]
    ratings = expand(data["counts"])
    assert close(ag.percent(ratings).value, data["percent_agreement"])
    assert close(ag.cohen_kappa(ratings).value, data["cohen"])
    assert close(ag.krippendorff_alpha(ratings).value, data["krippendorff_nominal"])
    found = ag.gwet_ac(ratings)
    assert close(found.value, data["ac1"]) and close(found.se, data["ac1_se"])


def test_cohen_with_his_own_weights():
    data = golden("cohen_1968_weighted")
    ratings, weights = expand(data["counts"]), 1 - np.array(data["disagreement_weights"]) / 6
    plain, weighted = ag.cohen_kappa(ratings), ag.cohen_kappa(ratings, weights)
    assert close(plain.value, data["kappa"]) and close(plain.se, data["ase_kappa"])
    assert close(weighted.value, data["weighted_kappa"]) and close(
        weighted.se, data["ase_weighted"]
    )
    sas = data["sas_example"]
    plain, linear = (
        ag.cohen_kappa(expand(sas["counts"])),
        ag.cohen_kappa(expand(sas["counts"]), "linear"),
    )
    assert close(plain.value, sas["kappa"]) and close(plain.se, sas["ase"])
    assert close(plain.value - 1.959963984540054 * plain.se, sas["ci"][0])
    assert close(linear.value, sas["linear_weighted"]["kappa"]) and close(
        linear.se, sas["linear_weighted"]["ase"]
    )


def test_fleiss_and_randolph():
    data = golden("fleiss_wikipedia")
    assert close(ag.fleiss_kappa(data["counts"]).value, data["kappa"])
    assert close(ag.randolph_kappa(data["counts"]).value, data["randolph_free_marginal"])
    assert (ag.fleiss_kappa(data["counts"]).n_items, ag.fleiss_kappa(data["counts"]).n_raters) == (
        10,
        14,
    )


# --- slow readings of the papers ---


def slow_observed(ratings, weight) -> float:
    items = []
    for item in ratings:
        pairs = [weight(a, b) for a, b in permutations(item[~np.isnan(item)], 2)]
        if pairs:
            items.append(sum(pairs) / len(pairs))
    return sum(items) / len(items)


def slow_chance(kind: str, ratings, weight, categories) -> float:
    k = len(categories)
    if kind == "bp":
        return sum(weight(a, b) for a in categories for b in categories) / k**2
    if kind == "conger":
        shares = [
            {c: float(np.mean(column[~np.isnan(column)] == c)) for c in categories}
            for column in ratings.T
            if not np.isnan(column).all()
        ]
        pairs = [
            sum(weight(a, b) * g[a] * h[b] for a in categories for b in categories)
            for g, h in permutations(shares, 2)
        ]
        return sum(pairs) / len(pairs)
    rated = [item[~np.isnan(item)] for item in ratings if not np.isnan(item).all()]
    pi = {c: sum(float(np.mean(item == c)) for item in rated) / len(rated) for c in categories}
    if kind == "gwet":
        total = sum(weight(a, b) for a in categories for b in categories)
        return total / (k * (k - 1)) * sum(p * (1 - p) for p in pi.values())
    return sum(weight(a, b) * pi[a] * pi[b] for a in categories for b in categories)


def slow_alpha(ratings, metric: str) -> float:
    """From the coincidence matrix, as in Krippendorff 2011."""
    items = [item[~np.isnan(item)] for item in ratings]
    items = [item for item in items if len(item) > 1]
    categories = sorted({float(x) for item in items for x in item})
    coincidence = {(c, d): 0.0 for c in categories for d in categories}
    for item in items:
        for c, d in permutations(item, 2):
            coincidence[c, d] += 1 / (len(item) - 1)
    n_c = {c: sum(coincidence[c, d] for d in categories) for c in categories}
    n = sum(n_c.values())

    def difference(c, d):
        if metric == "nominal":
            return float(c != d)
        if metric == "interval":
            return (c - d) ** 2
        if metric == "ratio":
            return ((c - d) / (c + d)) ** 2 if c != d else 0.0
        low, high = min(c, d), max(c, d)
        between = sum(n_c[g] for g in categories if low <= g <= high)
        return (between - (n_c[low] + n_c[high]) / 2) ** 2 if c != d else 0.0

    observed = sum(coincidence[c, d] * difference(c, d) for c in categories for d in categories) / n
    expected = sum(n_c[c] * n_c[d] * difference(c, d) for c in categories for d in categories) / (
        n * (n - 1)
    )
    return 1 - observed / expected


def random_table(rng) -> np.ndarray:
    n, r, k = rng.integers(2, 12), rng.integers(2, 5), rng.integers(2, 5)
    truth = rng.integers(1, k + 1, size=(n, 1))
    ratings = np.where(rng.random((n, r)) < 0.6, truth, rng.integers(1, k + 1, size=(n, r))).astype(
        float
    )
    ratings[rng.random((n, r)) < rng.choice([0.0, 0.2, 0.4])] = NAN
    return ratings


def weight_function(name: str, categories):
    span = max(categories) - min(categories)
    return {
        "identity": lambda a, b: float(a == b),
        "linear": lambda a, b: 1 - abs(a - b) / span,
        "quadratic": lambda a, b: 1 - ((a - b) / span) ** 2,
    }[name]


@TABLES
def test_random_tables_against_the_papers(tables):
    rng, compared = np.random.default_rng(5), 0
    for _ in range(tables * 3 // 2):
        ratings = random_table(rng)
        categories = sorted(set(ratings[~np.isnan(ratings)].tolist()))
        if len(categories) < 2 or not ((~np.isnan(ratings)).sum(axis=1) > 1).any():
            continue
        table = group(ratings)
        name = str(rng.choice(["identity", "linear", "quadratic"]))
        weight = weight_function(name, categories)
        observed = slow_observed(ratings, weight)
        assert close(ag.percent(table, name, resamples=0).value, observed, 1e-12)
        for kind in ("bp", "gwet", "fleiss", "conger"):
            found, chance = (
                BY_CHANCE[kind](table, name),
                slow_chance(kind, ratings, weight, categories),
            )
            if found.value is None:
                assert close(chance, 1.0, 1e-9), (found, chance)
            else:
                assert close(found.value, (observed - chance) / (1 - chance), 1e-12), kind
        for metric in ("nominal", "ordinal", "interval", "ratio"):
            found = ag.krippendorff_alpha(table, metric, resamples=0)
            if found.value is None:
                assert found.undefined == "only one category was used"
            else:
                assert close(found.value, slow_alpha(ratings, metric), 1e-12), metric
        compared += 1
    assert compared >= tables


def slow_cohen(both, weight, categories) -> tuple[float, float, float]:
    """Value, chance and squared error of weighted kappa, as in Fleiss, Cohen and Everitt 1969,
    equations 4-9."""
    n = len(both)
    p = {
        (a, b): sum((x, y) == (a, b) for x, y in both.tolist()) / n
        for a in categories
        for b in categories
    }
    row, column = (
        {c: sum(p[pair] for pair in p if pair[side] == c) for c in categories} for side in (0, 1)
    )
    observed = sum(weight(a, b) * p[a, b] for a, b in p)
    chance = sum(weight(a, b) * row[a] * column[b] for a, b in p)
    of_row = {a: sum(column[b] * weight(a, b) for b in categories) for a in categories}
    of_column = {b: sum(row[a] * weight(a, b) for a in categories) for b in categories}
    if chance > 1 - 1e-9:
        return float("nan"), chance, float("nan")
    terms = sum(
        p[a, b] * (weight(a, b) * (1 - chance) - (of_row[a] + of_column[b]) * (1 - observed)) ** 2
        for a, b in p
    )
    variance = (terms - (observed * chance - 2 * chance + observed) ** 2) / (n * (1 - chance) ** 4)
    return (observed - chance) / (1 - chance), chance, variance


@TABLES
def test_cohen_on_random_tables(tables):
    rng, compared = np.random.default_rng(6), 0
    for _ in range(tables * 2):
        ratings = random_table(rng)[:, :2]
        both = ratings[~np.isnan(ratings).any(axis=1)]
        categories = sorted(set(ratings[~np.isnan(ratings)].tolist()))
        name = str(rng.choice(["identity", "linear", "quadratic"]))
        found = ag.cohen_kappa(ratings, name, resamples=0)
        if not len(both) or len(categories) < 2:
            assert found.value is None and found.undefined
            continue
        value, chance, variance = slow_cohen(both, weight_function(name, categories), categories)
        if chance > 1 - 1e-9:
            assert found.undefined == "only one category was used"
            continue
        assert close(found.value, value, 1e-12) and found.n_items == len(both)
        assert len(both) == 1 or close(found.se**2, variance, 1e-10)
        compared += 1
    assert compared >= tables


def test_fleiss_on_random_tables():
    rng = np.random.default_rng(7)
    for _ in range(RANDOM_TABLES):
        n, r, k = rng.integers(2, 12), rng.integers(2, 7), rng.integers(2, 5)
        counts = rng.multinomial(r, rng.dirichlet(np.ones(k)), size=n)
        if (counts.sum(axis=0) > 0).sum() < 2:
            assert ag.fleiss_kappa(counts, resamples=0).undefined
            continue
        agreement = sum((row @ row - r) / (r * (r - 1)) for row in counts) / n
        shares = counts.sum(axis=0) / (n * r)
        assert close(
            ag.fleiss_kappa(counts, resamples=0).value,
            (agreement - shares @ shares) / (1 - shares @ shares),
            1e-12,
        )
        assert close(
            ag.randolph_kappa(counts, resamples=0).value, (agreement - 1 / k) / (1 - 1 / k), 1e-12
        )


@pytest.mark.parametrize("kind", ["bp", "gwet", "fleiss", "conger"])
def test_errors_are_those_of_the_derivative(kind):
    """The variance of the derivative by each item's weight, measured by moving the weight a
    little."""
    rng = np.random.default_rng(8)
    for _ in range(20):
        ratings = random_table(rng)
        ratings = ratings[(~np.isnan(ratings)).sum(axis=1) > 1]
        table = group(ratings) if len(ratings) > 2 else None
        if table is None or table.n_raters < 2 or BY_CHANCE[kind](table).value is None:
            continue
        weights, h, n = category_weights("linear", table.values), 1e-6, table.times.sum()
        chance = {"bp": "uniform", "fleiss": "pooled", "conger": "raters", "gwet": "gwet"}[kind]
        variance = 0.0
        for p, times in enumerate(table.times):
            moved = [
                ag._coefficients(
                    table,
                    chance,
                    weights,
                    (table.times + s * h * np.eye(len(table.times))[p])[None],
                )[0][0]
                for s in (1, -1)
            ]
            variance += times * ((moved[0] - moved[1]) / (2 * h) * n) ** 2
        expected = (variance / (n * (n - 1))) ** 0.5
        assert close(BY_CHANCE[kind](table, "linear").se, expected, 1e-6)


# --- undefined, never a number ---

ALL = [
    ag.brennan_prediger,
    ag.cohen_kappa,
    ag.conger_kappa,
    ag.gwet_ac,
    ag.krippendorff_alpha,
    ag.scott_pi,
]


@pytest.mark.parametrize("coefficient", [*ALL, ag.percent])
@pytest.mark.parametrize(
    "ratings",
    [
        np.empty((0, 2)),
        np.full((3, 2), NAN),
        [[1, NAN], [2, NAN]],
        [[1, NAN], [NAN, 2]],
        [[1], [2]],
        np.empty((0, 0)),
    ],
)
def test_without_overlap_nothing_is_defined(coefficient, ratings):
    found = coefficient(np.array(ratings, dtype=float), resamples=50)
    assert found.value is None and found.se is None and found.low is None and found.undefined


@pytest.mark.parametrize("coefficient", ALL)
def test_one_category_defines_no_chance(coefficient):
    found = coefficient(np.ones((5, 2)))
    assert (found.value, found.undefined, found.n_items) == (None, "only one category was used", 5)


def test_one_category_is_still_full_agreement_in_percent():
    assert ag.percent(np.ones((5, 2))).value == 1.0
    assert ag.gwet_ac(np.ones((5, 2)), categories=[1, 2]).value == 1.0
    assert ag.brennan_prediger(np.ones((5, 2)), categories=[1, 2]).value == 1.0
    assert ag.cohen_kappa(np.ones((5, 2)), categories=[1, 2]).undefined


def test_one_item_has_a_value_and_no_error():
    found = ag.brennan_prediger([[1, 2, 1]])
    assert (
        found.value == pytest.approx((1 / 3 - 0.5) / 0.5) and found.se is None and found.low is None
    )


def test_unequal_counts_and_wrong_input_say_so():
    assert "from 2 to 3 ratings" in ag.fleiss_kappa([[2, 0], [1, 2]]).undefined
    assert "two raters, not 3" in ag.cohen_kappa([[1, 2, 1], [2, 2, 1]]).undefined
    for bad in ([1, 2], [[np.inf, 1]]):
        with pytest.raises(ValueError):
            ag.percent(np.array(bad, dtype=float))
    with pytest.raises(ValueError, match="symmetric"):
        ag.gwet_ac([[1, 2], [2, 1]], np.array([[1, 0.5], [0, 1]]))
    with pytest.raises(ValueError, match="unknown weights"):
        ag.gwet_ac([[1, 2], [2, 1]], "cubic")
    with pytest.raises(ValueError, match="outside"):
        ag.gwet_ac([[1, 3], [2, 1]], categories=[1, 2])
    with pytest.raises(ValueError, match="negative"):
        ag.krippendorff_alpha([[-1, 2], [2, 1]], "ratio")


# --- patterns and the bootstrap ---


def test_patterns_keep_every_item():
    rng = np.random.default_rng(9)
    for scale in (1.0, 0.37):  # whole numbers are counted, others sorted
        ratings = np.array([random_table(rng)[0, :2] for _ in range(500)]) * scale
        table = group(ratings)
        assert table.times.sum() == (~np.isnan(ratings).all(axis=1)).sum()
        for item, row in zip(ratings, table.pattern_of, strict=False):
            codes = table.codes[row] if row >= 0 else np.array([-1, -1])
            back = np.where(codes >= 0, table.values[codes], NAN)
            assert np.array_equal(item, back, equal_nan=True)


def test_many_raters_and_wide_scales_group_alike():
    rng = np.random.default_rng(10)
    ratings = rng.integers(0, 40, size=(30, 20)).astype(float)
    ratings[rng.random(ratings.shape) < 0.3] = NAN
    assert close(
        ag.krippendorff_alpha(ratings, "ordinal").value, slow_alpha(ratings, "ordinal"), 1e-12
    )
    assert close(
        ag.krippendorff_alpha(ratings * 1e6, "interval").value,
        slow_alpha(ratings, "interval"),
        1e-12,
    )


def test_alpha_of_probabilities_needs_no_categories():
    """Values, errors and bootstrap from sums of squares are those from the matrix of
    differences."""
    rng = np.random.default_rng(11)
    ratings = rng.random((3000, 1)) + 0.2 * rng.random((3000, 3))
    ratings[rng.random(ratings.shape) < 0.2] = NAN
    few = _paired(group(ratings[:60]))
    used = few.times @ few.ratings_PK
    for metric in ("nominal", "ordinal", "interval"):
        small, many = ag.krippendorff_alpha(few, metric), _parts_of_many(few, metric, used)
        assert close(small.value, _alpha(many, few.times), 1e-10), metric
        assert close(small.se, _standard_error(many, few.times), 1e-10), metric
    drawn = resample(few, 50, 0)
    assert (
        np.abs(
            _values_of_moments(_parts_of_many(few, "interval", used), drawn)
            - krippendorff_values(few, "interval", drawn)
        ).max()
        < 1e-10
    )
    found = ag.krippendorff_alpha(ratings, "interval")
    assert 0.9 < found.low < found.value < found.high < 0.97
    assert (found.boot_low, found.boot_high) == pytest.approx((found.low, found.high), abs=0.002)


@pytest.mark.parametrize("metric", ["nominal", "ordinal", "interval"])
def test_many_values_without_overlap_are_undefined(metric):
    """9,000 distinct values do not fit a matrix: what is undefined is so there too."""
    values = np.random.default_rng(12).random((9000, 1))
    apart = np.full((9000, 2), NAN)
    apart[:4500, :1], apart[4500:, 1:] = values[:4500], values[4500:]
    assert ag.krippendorff_alpha(values, metric).undefined == "fewer than two raters"
    assert ag.krippendorff_alpha(apart, metric).undefined == "no item has two ratings"
    assert ag.krippendorff_alpha(apart, metric).value is None


@pytest.mark.parametrize(
    "name", ["percent", "brennan_prediger", "scott_pi", "conger_kappa", "gwet_ac"]
)
def test_the_bootstrap_agrees_with_the_formula(name):
    rng = np.random.default_rng(12)
    truth = rng.integers(0, 3, size=(800, 1))
    ratings = np.where(rng.random((800, 4)) < 0.7, truth, rng.integers(0, 3, size=(800, 4))).astype(
        float
    )
    ratings[rng.random(ratings.shape) < 0.1] = NAN
    found = ag.all_coefficients(ratings, resamples=2000, seed=3)[name]
    assert (found.boot_high - found.boot_low) == pytest.approx(found.high - found.low, rel=0.1)
    assert found == ag.all_coefficients(ratings, resamples=2000, seed=3)[name]
    assert getattr(ag, name)(ratings, resamples=2000, seed=3) == found


@pytest.mark.parametrize("metric", ["nominal", "ordinal", "interval", "ratio"])
def test_a_resample_of_alpha_is_alpha_of_the_resample(metric):
    rng = np.random.default_rng(17)
    table = group(random_table(rng)[:, :4])
    drawn = resample(table, 30, 0)
    for times, value in zip(drawn, krippendorff_values(table, metric, drawn), strict=False):
        kept = times > 0
        again = Table(
            table.codes[kept], times[kept], table.values, table.ratings_PK[kept], table.n_raters
        )
        found = ag.krippendorff_alpha(again, metric, resamples=0).value
        assert np.isnan(value) if found is None else close(value, found, 1e-10)


def test_bootstrap_resamples_items():
    ratings = [[1, 1], [1, 2], [2, 2], [2, 2]]
    table = group(np.array(ratings, dtype=float))
    draws = resample(table, 500, 0)
    assert (draws.sum(axis=1) == 4).all() and draws.mean(axis=0) == pytest.approx(
        table.times, abs=0.2
    )
    alpha = ag.krippendorff_alpha(ratings, resamples=500)
    assert alpha.boot_low is None or alpha.boot_low <= alpha.value <= alpha.boot_high


def test_every_call_has_a_bootstrap_by_default():
    rng = np.random.default_rng(13)
    ratings = rng.integers(0, 2, size=(50, 2)).astype(float)
    counts = np.column_stack([(ratings == c).sum(axis=1) for c in (0, 1)])
    found = [of(ratings) for of in (*ALL, ag.percent)] + [
        ag.fleiss_kappa(counts),
        ag.randolph_kappa(counts),
    ]
    assert all(e.low <= e.value <= e.high and e.boot_low <= e.value <= e.boot_high for e in found)
    assert (
        ag.scott_pi(ratings, seed=1) == ag.scott_pi(ratings, seed=1) != ag.scott_pi(ratings, seed=2)
    )


def test_clusters_are_drawn_whole():
    """Ten copies of every item tell nothing new: over clusters the interval is that of the items
    without copies."""
    rng = np.random.default_rng(14)
    truth = rng.integers(0, 3, size=(200, 1))
    ratings = np.where(rng.random((200, 3)) < 0.7, truth, rng.integers(0, 3, size=(200, 3))).astype(
        float
    )
    ratings[rng.random(ratings.shape) < 0.1] = NAN
    copies, clusters = np.repeat(ratings, 10, axis=0), np.repeat(np.arange(200), 10)

    def width(e):
        return e.boot_high - e.boot_low

    once, naive = ag.all_coefficients(ratings), ag.all_coefficients(copies)
    whole = ag.all_coefficients(copies, clusters=clusters)
    for name in once:
        assert width(whole[name]) == pytest.approx(width(once[name]), rel=0.12), name
        assert width(naive[name]) < 0.45 * width(whole[name]), name
    drawn = resample(group(copies), 20, 0, clusters)
    assert (drawn % 10 == 0).all()
    with pytest.raises(ValueError, match="one cluster for each item"):
        resample(group(copies), 20, 0, clusters[:5])


def test_many_clusters_are_grouped_and_give_the_same_interval():
    rng = np.random.default_rng(15)
    ratings = rng.integers(0, 2, size=(9000, 2)).astype(float)
    plain, grouped = (
        ag.percent(ratings),
        ag.all_coefficients(ratings, clusters=np.arange(9000))["percent"],
    )
    assert grouped.boot_high - grouped.boot_low == pytest.approx(
        plain.boot_high - plain.boot_low, rel=0.15
    )
    assert (resample(group(ratings), 3, 0, np.arange(9000)).sum(axis=1) > 8000).all()


def test_the_whole_panel_says_what_does_not_apply():
    rng = np.random.default_rng(16)
    full = rng.integers(0, 3, size=(60, 3)).astype(float)
    found = ag.panel_coefficients(full, resamples=200)
    assert set(found) == set(ag.PANEL) and "two raters" in found["cohen_kappa quadratic"].undefined
    counts = np.column_stack([(full == c).sum(axis=1) for c in range(3)])
    assert close(found["fleiss_kappa"].value, ag.fleiss_kappa(counts).value, 1e-12)
    assert found["fleiss_kappa"].value == found["scott_pi"].value
    assert found["randolph_kappa"].value == found["brennan_prediger"].value
    full[0, 0] = NAN
    gaps = ag.panel_coefficients(full, resamples=200)
    assert (
        "from 2 to 3 ratings" in gaps["fleiss_kappa"].undefined
        and gaps["scott_pi"].value is not None
    )
    two = ag.panel_coefficients(full[:, :2], resamples=200)
    for weights in ("linear", "quadratic"):
        assert two[f"cohen_kappa {weights}"].value == ag.cohen_kappa(full[:, :2], weights).value
    assert two["cohen_kappa"].boot_low < two["cohen_kappa"].value < two["cohen_kappa"].boot_high


def test_no_interval_leaves_what_a_coefficient_can_be():
    """Four items, two raters who agree on one: Student's interval would go below -1."""
    ratings = np.array([[0, 1], [1, 0], [0, 1], [1, 1]], dtype=float)
    found = [ag.cohen_kappa(ratings), ag.scott_pi(ratings), ag.krippendorff_alpha(ratings)]
    assert all(-1 <= e.low <= e.value <= e.high <= 1 for e in found)
    assert -1.0 in [e.low for e in found]
