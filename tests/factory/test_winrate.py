"""The length-controlled win rate: its model against a brute-force optimiser, its properties with
instruction difficulty."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefab.factory.stats import length_controlled_win_rate


def brute_force(y, columns):
    """The logistic likelihood's maximum by pattern search: try a step along each axis, halve it
    when none helps."""

    def loss(beta):
        logit = sum(b * c for b, c in zip(beta, columns, strict=True))
        return float(np.sum(np.logaddexp(0, logit) - y * logit))

    beta, step, best = np.zeros(len(columns)), 1.0, loss(np.zeros(len(columns)))
    while step > 1e-9:
        moved = False
        for i in range(len(columns)):
            for sign in (step, -step):
                trial = beta.copy()
                trial[i] += sign
                if (value := loss(trial)) < best:
                    beta, best, moved = trial, value, True
        step = step if moved else step / 2
    return beta


def comparisons(seed, n, skill=0.5, per_length=1.0, per_difficulty=0.0):
    """Judged pairs of which the truth is known, with lengths and difficulties."""
    rng = np.random.default_rng(seed)
    a, b, hard = rng.integers(20, 200, n), rng.integers(20, 200, n), rng.normal(0, 1, n)
    logit = skill + per_length * np.tanh((a - b) / (a - b).std()) + per_difficulty * hard
    return (rng.random(n) < 1 / (1 + np.exp(-logit))).astype(float), a, b, hard


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_model_of_the_paper(seed):
    """Fitted by brute force: sigmoid(skill + length term), then with difficulty the mean over
    instructions."""
    y, a, b, hard = comparisons(seed, 80, per_difficulty=0.7)
    one, length = np.ones(80), np.tanh((a - b) / (a - b).std())
    skill, _ = brute_force(y, [one, length])
    assert length_controlled_win_rate(y, a, b).value == pytest.approx(
        1 / (1 + np.exp(-skill)), abs=1e-6
    )
    skill, _, per_difficulty = brute_force(y, [one, length, hard])
    expected = np.mean(1 / (1 + np.exp(-(skill + per_difficulty * hard))))
    assert length_controlled_win_rate(y, a, b, difficulty=hard).value == pytest.approx(
        expected, abs=1e-6
    )


def test_a_longer_model_no_better_than_its_rival_gets_a_half():
    rng = np.random.default_rng(0)
    a, b = (
        rng.normal(150, 30, 4000),
        rng.normal(120, 30, 4000),
    )  # a writes more, and that alone wins
    p = 1 / (1 + np.exp(-1.5 * np.tanh((a - b) / (a - b).std())))
    y = (rng.random(4000) < p).astype(float)
    found = length_controlled_win_rate(y, a, b)
    assert y.mean() > 0.6 and found.low < 0.5 < found.high and abs(found.value - 0.5) < 0.03


def test_its_interval_covers_the_truth():
    """Of 200 samples from a known model, the 95% interval holds the true rate in 190 or so (4
    deviations: 177)."""
    rng = np.random.default_rng(5)
    hard = rng.normal(0, 1, 400)
    truth = np.mean(1 / (1 + np.exp(-(0.4 + 0.8 * hard))))
    covered = 0
    for _ in range(200):
        a, b = rng.integers(20, 200, 400), rng.integers(20, 200, 400)
        logit = 0.4 + 0.9 * np.tanh((a - b) / (a - b).std()) + 0.8 * hard
        found = length_controlled_win_rate(
            (rng.random(400) < 1 / (1 + np.exp(-logit))).astype(float), a, b, difficulty=hard
        )
        covered += found.low <= truth <= found.high
    assert covered >= 177


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(8, 80))
def test_swapping_the_models_mirrors_it(seed, n):
    rng = np.random.default_rng(seed)
    p, a, b, hard = (
        rng.random(n),
        rng.integers(1, 50, n),
        rng.integers(1, 50, n),
        rng.normal(3, 2, n),
    )
    forth, back = (
        length_controlled_win_rate(*rows, difficulty=hard) for rows in ((p, a, b), (1 - p, b, a))
    )
    assert (forth.value is None) == (back.value is None)
    if forth.value is not None:
        assert forth.value + back.value == pytest.approx(1.0, abs=1e-9)
        assert forth.se == pytest.approx(
            back.se, abs=1e-9
        ) and forth.low + back.high == pytest.approx(1.0, abs=1e-9)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(1, 100))
def test_without_length_differences_it_is_the_plain_win_rate(p, length):
    found = length_controlled_win_rate(
        p, [length] * len(p), [length] * len(p), difficulty=range(len(p))
    )
    assert found.value == pytest.approx(np.mean(p), abs=1e-12)


def test_the_fit_too_gives_the_plain_win_rate_as_length_differences_vanish():
    """Not only by the early return: lengths that differ in one pair alone, and alike in its mirror,
    change nothing."""
    y, _, _, hard = comparisons(1, 60, per_length=0)
    both, flipped = np.concatenate([y, y]), np.concatenate([hard, hard])
    a = np.array([60] + [50] * 59 + [40] + [50] * 59)
    found = length_controlled_win_rate(both, a, [50] * 120, difficulty=flipped)
    assert found.value == pytest.approx(y.mean(), abs=1e-9)


@given(st.lists(st.tuples(st.integers(1, 400), st.floats(-3, 3)), min_size=1, max_size=30))
def test_a_model_against_itself_is_a_half(rows):
    lengths, hard = zip(*rows, strict=True)
    assert (
        length_controlled_win_rate([0.5] * len(rows), lengths, lengths, difficulty=hard).value
        == 0.5
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_a_model_against_its_own_other_samples_is_a_half_or_undefined(seed, n):
    rng = np.random.default_rng(seed)
    p, a, b, hard = (
        rng.random(n),
        rng.integers(1, 90, n),
        rng.integers(1, 90, n),
        rng.normal(size=n),
    )
    both = length_controlled_win_rate([*p, *(1 - p)], [*a, *b], [*b, *a], difficulty=[*hard, *hard])
    assert both.undefined or both.value == pytest.approx(0.5, abs=1e-9)


def test_a_difficulty_that_does_not_differ_changes_nothing():
    y, a, b, _ = comparisons(2, 50)
    assert length_controlled_win_rate(y, a, b, difficulty=[2.0] * 50) == length_controlled_win_rate(
        y, a, b
    )


def test_a_difficulty_that_separates_wins_is_undefined():
    y, a, b, _ = comparisons(3, 50)
    assert "separated" in length_controlled_win_rate(y, a, b, difficulty=y).undefined
