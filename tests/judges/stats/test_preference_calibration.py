"""Readings become a probability that comes true as often as it says."""

from __future__ import annotations

import json
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefab.judges.stats.calibration import ece
from prefab.judges.stats.preference_calibration import (
    Calibration,
    combine,
    fit_calibration,
    log_odds,
    mean_correlation,
    quality,
)


def world(n: int, readings: int, shared: float, loud: float = 1.0, seed: int = 0):
    """Comparisons of which each reading sees the truth through noise; `shared` of the noise is one
    for all readings. `loud` multiplies the log-odds that they report."""
    rng = np.random.default_rng(seed)
    truth = np.where(rng.random(n) < 0.5, 1.0, -1.0)
    common = rng.normal(size=(n, 1)) * np.sqrt(shared)
    own = rng.normal(size=(n, readings)) * np.sqrt(1 - shared)
    # unit noise about +-m: the log-odds of one reading x are 2 m x
    x = 2 * 0.5 * (0.5 * truth[:, None] + common + own) * loud
    p = 1 / (1 + np.exp(-x))
    return p.tolist(), ((truth + 1) / 2).tolist(), [f"p{i // 2}" for i in range(n)]


def test_independent_readings_add_up_and_copies_are_averaged():
    odds = [log(3.0)] * 4
    assert combine(odds, 0.0) == pytest.approx(4 * log(3.0))
    assert combine(odds, 1.0) == pytest.approx(log(3.0))
    assert combine([log(3.0), None], 0.0) == pytest.approx(log(3.0))
    assert combine([log(3.0), log(3.0)], 0.0, [1.0, 0.0]) == pytest.approx(log(3.0))
    assert combine([None, None], 0.0) is None and combine([], 0.0) is None
    assert log_odds(1.0) == pytest.approx(log(99.0)) == -log_odds(0.0)


def test_correlation_does_not_depend_on_which_answer_is_a():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 1)) + rng.normal(size=(500, 3))
    flipped = x * np.where(rng.random((500, 1)) < 0.5, 1, -1)
    assert mean_correlation(x.tolist()) == pytest.approx(0.5, abs=0.08)
    assert mean_correlation(flipped.tolist()) == pytest.approx(mean_correlation(x.tolist()))
    assert mean_correlation([[1.0, 1.0], [-2.0, -2.0]]) == pytest.approx(1.0)
    assert mean_correlation([[1.0, None], [None, 2.0]]) == 0.0 == mean_correlation([[1.0]])


@pytest.mark.slow_but("auto-0.2-0.0", "auto-0.2-0.8", "auto-3.0-0.0", "auto-3.0-0.8")
@pytest.mark.parametrize("shared", [0.0, 0.8])
@pytest.mark.parametrize("loud", [0.2, 3.0])
@pytest.mark.parametrize("method", ["temperature", "isotonic", "auto"])
def test_calibrated_probabilities_come_true(shared, loud, method):
    p, y, groups = world(4000, 8, shared, loud)
    found = fit_calibration(p, y, groups, method)
    assert found.method == method or method == "auto"
    assert found.after.ece < 0.03 and found.after.log_loss < found.before.log_loss + 0.01
    assert loud > 1 or found.after.log_loss < found.before.log_loss
    again, truth, _ = world(4000, 8, shared, loud, seed=1)
    fresh = np.array([found.probability(row) for row in again])
    for low in (0.5, 0.7, 0.9):
        chosen = np.maximum(fresh, 1 - fresh)
        here = (chosen >= low) & (chosen < low + 0.1)
        right = (fresh > 0.5) == (np.array(truth) == 1)
        if here.sum() > 250:
            assert right[here].mean() == pytest.approx(chosen[here].mean(), abs=0.06)


def test_the_error_of_a_calibrated_judge_is_no_larger_by_chance_alone():
    rng, n = np.random.default_rng(0), 300
    groups = [f"p{i // 3}" for i in range(n)]
    draws = [(p, rng.random(n) < p) for p in (rng.uniform(0.5, 1, n) for _ in range(20))]
    fits = [quality(p, y, groups) for p, y in draws]
    plain = [ece(p, y.astype(float)) for p, y in draws]
    assert np.mean([fit.ece for fit in fits]) < 0.4 * np.mean(plain)
    assert np.mean([fit.ece_low == 0.0 for fit in fits]) >= 0.8
    assert all(fit.ece_low <= fit.ece <= fit.ece_high for fit in fits)


def test_a_fit_that_was_recorded_without_an_interval_is_read():
    p, y, groups = world(60, 2, 0.0, 1.0)
    data = fit_calibration(p, y, groups).data()
    assert Calibration.from_data(json.loads(json.dumps(data))).data() == data
    for fit in (data["before"], data["after"]):
        del fit["ece_low"], fit["ece_high"]
    assert Calibration.from_data(data).after.ece_low is None


def test_a_share_of_votes_is_made_a_probability():
    """One principle of eleven speaks to each pair and is nearly always right: the mean says .55."""
    rng = np.random.default_rng(0)
    p, y = [], []
    for _ in range(600):
        row, truth = [0.5] * 11, int(rng.random() < 0.5)
        right = truth if rng.random() < 0.97 else 1 - truth
        row[rng.integers(11)] = 0.9 if right else 0.1
        p.append(row)
        y.append(truth)
    found = fit_calibration(p, y, [f"p{i}" for i in range(600)])
    assert found.probability(p[0]) == pytest.approx(0.97 if p[0][:].count(0.9) else 0.03, abs=0.02)
    assert max(np.mean(p[0]), 1 - np.mean(p[0])) < 0.55


def test_few_outcomes_are_all_right_and_give_no_certainty():
    p = [[0.8] if i % 2 else [0.2] for i in range(30)]
    found = fit_calibration(p, [float(i % 2) for i in range(30)], [f"p{i}" for i in range(30)])
    assert found.method == "temperature" and 0.95 < found.probability([0.8]) < 0.99


def test_without_outcomes_nothing_is_fitted_and_the_reason_is_told():
    p, y, groups = world(100, 3, 0.5)
    found = fit_calibration(p, [None] * 100, groups)
    assert found.method == "none" and "0 known outcomes" in found.reason and found.after is None
    assert found.probability(p[0]) == pytest.approx(
        1 / (1 + np.exp(-combine([log_odds(q) for q in p[0]], found.correlation)))
    )
    few = fit_calibration(p, [*y[:19], *[None] * 81], groups)
    assert few.method == "none" and few.n_outcomes == 19
    flat = fit_calibration([[0.5]] * 100, y, groups)
    assert flat.method == "none" and flat.probability([0.5]) == 0.5


def test_it_is_kept_as_json_and_the_order_of_comparisons_does_not_matter():
    p, y, groups = world(600, 4, 0.3)
    for method in ("temperature", "isotonic"):
        found = fit_calibration(p, y, groups, method)
        assert Calibration.from_data(json.loads(json.dumps(found.data()))) == found
        back = fit_calibration(p[::-1], y[::-1], groups[::-1], method)
        assert back.after.log_loss == pytest.approx(found.after.log_loss)
        assert back.probability(p[0]) == pytest.approx(found.probability(p[0]))


CALIBRATIONS = [
    fit_calibration(*world(600, 4, 0.3), method) for method in ("temperature", "isotonic")
]


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=6),
    st.sampled_from(CALIBRATIONS),
)
def test_exchanging_the_answers_gives_the_other_probability(row, found):
    p = found.probability(row)
    other = found.probability([None if q is None else 1 - q for q in row])
    assert (p is None) == (other is None) == all(q is None for q in row)
    assert p is None or (0 < p < 1 and p + other == pytest.approx(1.0, abs=1e-9))
