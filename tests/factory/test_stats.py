"""Intervals by hand, the bootstrap, and what a length-controlled win rate must hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefab.factory.stats import (
    bootstrap,
    clustered_share,
    length_controlled_win_rate,
    over_seeds,
    over_seeds_p,
    paired_difference,
    student,
    t_quantile,
    wilson,
)


@pytest.mark.parametrize(
    ("df", "expected"),
    [
        (1, 12.706204736174707),
        (2, 4.302652729749464),
        (3, 3.182446305284263),
        (10, 2.2281388519649385),
        (30, 2.0422724563012373),
        (100, 1.9839715185235518),
    ],
)
def test_t_quantiles(df, expected):
    assert t_quantile(0.975, df) == pytest.approx(expected, abs=1e-9)
    assert t_quantile(0.025, df) == pytest.approx(-expected, abs=1e-9)


def test_wilson_by_hand():
    found = wilson(8, 10)
    z2 = 1.959963984540054**2
    centre, half = (0.8 + z2 / 20) / (1 + z2 / 10), (z2 * (0.016 + z2 / 400)) ** 0.5 / (1 + z2 / 10)
    assert (found.value, found.low, found.high) == (
        0.8,
        pytest.approx(centre - half),
        pytest.approx(centre + half),
    )
    assert (
        wilson(0, 10).low == 0.0 < wilson(0, 10).high
        and wilson(10, 10).high == 1.0 > wilson(10, 10).low
    )
    assert wilson(0, 0).undefined == "no trials" and wilson(0, 0).value is None


def test_bootstrap_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    found = bootstrap(values)
    assert found.value == pytest.approx(values.mean()) and found.se == pytest.approx(
        values.std() / 20, rel=0.08
    )
    assert found.low < found.value < found.high and found == bootstrap(values) != bootstrap(
        values, seed=1
    )
    assert bootstrap([]).undefined == "no items" and bootstrap([1.0]).se is None
    assert bootstrap([1.0, np.nan]).undefined


def test_bootstrap_draws_whole_prompts():
    """Ten copies of an answer are one item: the error is that of the prompts, not a third of it."""
    values = np.random.default_rng(1).normal(size=60)
    once, tenfold = (
        bootstrap(values),
        bootstrap(np.repeat(values, 10), clusters=np.repeat(np.arange(60), 10)),
    )
    assert tenfold.se == pytest.approx(once.se, rel=1e-9) and tenfold.n_items == 60
    median = bootstrap(
        np.repeat(values, 2), np.repeat(np.arange(60), 2), statistic=np.median, resamples=300
    )
    assert median.low <= median.value <= median.high


def test_paired_differences_cancel_what_is_shared():
    rng = np.random.default_rng(2)
    shared = rng.normal(0, 5, 300)
    found = paired_difference(shared + 0.5, shared + rng.normal(0, 0.1, 300))
    assert found.low > 0.4 and found.high < 0.6


# --- length control ---


def judged(rng, n=3000, skill=0.4, per_length=0.8):
    """Comparisons whose winner depends on skill and, through tanh, on length."""
    difference = rng.normal(20, 30, n)
    p = 1 / (1 + np.exp(-(skill + per_length * np.tanh(difference / difference.std()))))
    return (rng.random(n) < p).astype(float), 100 + difference, np.full(n, 100.0)


def test_the_length_bias_is_taken_out():
    won, length_a, length_b = judged(np.random.default_rng(3))
    found, truth = length_controlled_win_rate(won, length_a, length_b), 1 / (1 + np.exp(-0.4))
    assert found.low < truth < found.high and abs(found.value - truth) < 0.03 < won.mean() - truth


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 80))
def test_swapping_the_models_mirrors_it(seed, n):
    rng = np.random.default_rng(seed)
    p, length_a, length_b = rng.random(n), rng.integers(1, 50, n), rng.integers(1, 50, n)
    forth = length_controlled_win_rate(p, length_a, length_b)
    back = length_controlled_win_rate(1 - p, length_b, length_a)
    assert (forth.value is None) == (back.value is None)
    if forth.value is not None:
        assert forth.value + back.value == pytest.approx(1.0, abs=1e-9)
        assert forth.se == pytest.approx(
            back.se, abs=1e-9
        ) and forth.low + back.high == pytest.approx(1.0, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 100))
def test_without_length_differences_it_is_the_plain_win_rate(p, length):
    found = length_controlled_win_rate(p, [length] * len(p), [length] * len(p))
    assert found.value == pytest.approx(np.mean(p), abs=1e-12)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=30))
def test_a_model_against_itself_is_a_half(lengths):
    assert length_controlled_win_rate([0.5] * len(lengths), lengths, lengths).value == 0.5


def test_a_model_against_its_own_other_samples_is_a_half_or_undefined():
    rng = np.random.default_rng(4)
    for n in (1, 2, 3, 5, 40):
        p, a, b = rng.random(n), rng.integers(1, 90, n), rng.integers(1, 90, n)
        both = length_controlled_win_rate(
            [*p, *(1 - p)], [*a, *b], [*b, *a]
        )  # each pair once in each order
        assert both.undefined or both.value == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("p", "a", "b"),
    [
        ([], [], []),
        ([1, 0, 1], [5, 6, 7], [3, 4, 5]),
        ([1, 1, 0, 0], [9, 8, 1, 2], [5, 5, 5, 5]),
        ([1, 1, 1], [9, 2, 6], [5, 5, 5]),
        ([0.7], [9], [5]),
    ],
)
def test_what_length_explains_alone_is_undefined(p, a, b):
    found = length_controlled_win_rate(p, a, b)
    assert found.value is None and found.undefined


# --- shares over clusters ---


def test_a_share_of_copies_is_that_of_the_originals():
    hits = np.array([1.0] * 70 + [0.0] * 30)
    copies = clustered_share(np.repeat(hits, 10), np.repeat(np.arange(100), 10))
    once = clustered_share(hits, np.arange(100))
    assert copies.n_items == 1000 and copies.value == once.value == 0.7
    assert (copies.low, copies.high) == pytest.approx((once.low, once.high), abs=2e-3)
    naive = wilson(700, 1000)
    assert (once.low, once.high) == pytest.approx(
        (wilson(70, 100).low, wilson(70, 100).high), abs=2e-3
    )
    assert naive.high - naive.low < 0.4 * (copies.high - copies.low)


def test_clusters_that_tell_more_than_items_gain_nothing():
    """One hit and one miss in every cluster: the share has no variance between clusters, and no
    fewer items than it has."""
    found = clustered_share([1.0, 0.0] * 50, np.repeat(np.arange(50), 2))
    assert (found.low, found.high) == pytest.approx((wilson(50, 100).low, wilson(50, 100).high))


def test_where_all_hit_the_clusters_count():
    found = clustered_share(np.ones(1000), np.repeat(np.arange(20), 50))
    assert found.high == 1.0 and found.low == pytest.approx(wilson(20, 20).low)
    none = clustered_share(np.zeros(1000), np.repeat(np.arange(20), 50))
    assert none.low == 0.0 and none.high == pytest.approx(wilson(0, 20).high)
    assert (
        clustered_share([1.0, 0.0], [7, 7]).low is None
        and clustered_share([], []).undefined == "no trials"
    )
    assert clustered_share([1.0, 0.0, 1.0]) == wilson(2, 3)


def test_students_interval_by_hand_and_none_for_one_value():
    e = student([1.0, 2.0, 3.0])  # deviation 1, se 1/sqrt(3), t of two degrees of freedom 4.302653
    assert e.value == pytest.approx(2) and e.se == pytest.approx(3**-0.5) and e.n_items == 3
    assert (e.low, e.high) == pytest.approx(
        (2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6
    )
    alone = student([0.25])
    assert (alone.value, alone.low, alone.high) == (0.25, None, None)
    assert student([]).value is None and student([]).undefined


def test_a_clustered_share_by_hand():
    """Two clusters of three, 3 and 1 hits. The residuals' sums are 1 and -1; with the factor
    m / (m - 1) the variance is 2 * 2 / 36 = 1/9, the design effect 3: as two items of six, and
    fewer still by the square of Student's quantiles with 5 and with 1 degree of freedom."""
    found = clustered_share([1, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1])
    effective = 2 * (t_quantile(0.975, 5) / t_quantile(0.975, 1)) ** 2
    plain = wilson(4 / 6 * effective, effective)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
    assert found.value == pytest.approx(4 / 6) and found.n_items == 6


def test_seeds_are_runs_and_not_more_answers_of_one():
    """Gains of .078, .007 and .004 by seed, over prompts that hardly differ: Student's interval of
    three values, whatever the number of answers; pooled, they would seem to be certain."""
    rng = np.random.default_rng(5)
    seeds, groups = (x.ravel() for x in np.indices((3, 20, 30))[:2])
    gains = np.array([0.078, 0.007, 0.004])[seeds] + rng.normal(0, 1e-3, len(seeds))
    found, by_seed = over_seeds(gains, seeds, groups), student([0.078, 0.007, 0.004])
    assert (found.low, found.high) == pytest.approx((by_seed.low, by_seed.high), abs=0.003)
    assert found.low < 0 < found.value < found.high and (found.n_items, found.n_groups) == (3, 20)
    assert over_seeds_p(gains, seeds, groups) == pytest.approx(0.35, abs=0.05)
    assert bootstrap(gains, groups).low > 0.02
    only = bootstrap(gains[seeds == 0], groups[seeds == 0])
    assert over_seeds(gains[seeds == 0], seeds[seeds == 0], groups[seeds == 0]) == only


def test_an_interval_over_seeds_ends_within_its_bounds():
    """By hand: the half width over p(1 - p) in logits; of a score from -1 to 1, of its place."""
    seeds, groups = (x.ravel() for x in np.indices((3, 4, 10))[:2])
    shares = (np.arange(120) % 10 < np.array([10, 9, 8])[seeds]).astype(float)
    plain = over_seeds(shares, seeds, groups)
    found = over_seeds(shares, seeds, groups, bounds=(0.0, 1.0))
    assert plain.high > 1 and (found.value, found.se) == (plain.value, plain.se)
    half = (plain.high - plain.value) / (0.9 * 0.1)
    ends = [1 / (1 + np.exp(-(np.log(9) + step))) for step in (-half, half)]
    assert (found.low, found.high) == pytest.approx(tuple(ends)) and ends[1] < 1
    score = over_seeds(2 * shares - 1, seeds, groups, bounds=(-1.0, 1.0))
    assert (score.low, score.high) == pytest.approx(tuple(2 * end - 1 for end in ends))
    middle = over_seeds(
        0.5 + (shares - 0.9) / 100, seeds, groups
    )  # far from bounds nothing changes
    same = over_seeds(0.5 + (shares - 0.9) / 100, seeds, groups, bounds=(0.0, 1.0))
    assert (same.low, same.high) == pytest.approx((middle.low, middle.high), abs=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_values_that_are_all_at_a_bound_still_have_an_interval(sign):
    seeds, groups = (x.ravel() for x in np.indices((3, 4, 10))[:2])
    found = over_seeds(np.full(120, sign), seeds, groups, bounds=(-1.0, 1.0))
    reach = 2 * wilson(4, 4).low - 1
    expected = (reach, 1.0) if sign > 0 else (-1.0, -reach)
    assert (found.low, found.high) == pytest.approx(expected)


def test_one_seeds_interval_is_cut_at_its_bounds():
    values, groups = np.array([1.0, 0.99, 0.4, 1.0]), np.arange(4)
    plain = over_seeds(values, np.zeros(4), groups)
    found = over_seeds(values, np.zeros(4), groups, bounds=(-1.0, 1.0))
    assert plain.high > 1 and found.high == 1.0 and found.low == max(-1.0, plain.low)


def test_groups_that_differ_widen_a_win_rate_at_equal_length():
    """Ten copies of each comparison tell nothing new where they are one group."""
    won, length_a, length_b = judged(np.random.default_rng(6), n=80)
    copies = [np.repeat(x, 10) for x in (won, length_a, length_b)]
    once = length_controlled_win_rate(won, length_a, length_b)
    naive = length_controlled_win_rate(*copies)
    whole = length_controlled_win_rate(*copies, clusters=np.repeat(np.arange(80), 10))
    assert whole.value == pytest.approx(once.value) and whole.n_groups == 80
    assert whole.se == pytest.approx(once.se, rel=0.1) and naive.se < 0.4 * whole.se
