"""Aggregation against published fits and slow references; calibration by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prefab.judges.stats.aggregate import (
    bradley_terry,
    davidson,
    dawid_skene,
    dawid_skene_counts,
    majority,
    mean_probability,
)
from prefab.judges.stats.calibration import (
    apply_temperature,
    brier,
    calibration_error,
    ece,
    fit_temperature,
    log_loss,
    reliability,
)
from prefab.judges.stats.rating_table import group

GOLDEN = Path(__file__).parents[2] / "golden"
NAN = np.nan


def golden(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


# --- means and majorities ---


def test_mean_probability_by_hand():
    found = mean_probability([[0.9, 0.5], [NAN, 0.5], [0.9, NAN], [NAN, NAN]], weights=[3, 1])
    assert (
        found.p[:1] == pytest.approx([0.8])
        and np.isnan(found.p[1])
        and found.p[2] == 0.9
        and np.isnan(found.p[3])
    )
    assert (
        found.spread[0] == pytest.approx(((3 * 0.01 + 0.09) / 4) ** 0.5) and found.spread[2] == 0.0
    )
    assert found.weight.tolist() == [1.0, 0.25, 0.75, 0.0]


def test_a_split_vote_has_no_majority():
    winner, share = majority(np.array([[1, 1, 0], [1, 0, NAN], [NAN, NAN, NAN], [0, NAN, NAN]]))
    assert np.array_equal(winner, [1, NAN, NAN, 0], equal_nan=True)
    assert np.array_equal(share, [2 / 3, 0.5, NAN, 1.0], equal_nan=True)
    assert np.isnan(majority(np.full((2, 2), NAN))[0]).all()


# --- Dawid-Skene ---


def test_the_anaesthetists():
    data = golden("dawid_skene_1979")
    fit = dawid_skene_counts(np.array(data["counts"]))
    assert fit.converged and fit.undefined is None
    assert np.abs(fit.priors - data["priors"]).max() < 1e-9
    assert np.abs(fit.confusion - np.array(data["confusion"])).max() < 1e-9
    assert abs(fit.loglik - data["loglik"]) < 1e-9
    assert (fit.posterior.argmax(axis=1) + 1).tolist() == data["posterior_argmax_1based"]


def slow_dawid_skene(ratings, categories, rounds):
    n, r = ratings.shape
    posterior = [
        [sum(x == c for x in item) / sum(x == x for x in item) for c in categories]
        for item in ratings
    ]
    for _ in range(rounds):
        k = range(len(categories))
        priors = [sum(p[j] for p in posterior) / n for j in k]
        said = {}
        for rater in range(r):
            for j in k:
                total = sum(
                    posterior[i][j] for i in range(n) if ratings[i, rater] == ratings[i, rater]
                )
                for m in k:
                    given = sum(
                        posterior[i][j] for i in range(n) if ratings[i, rater] == categories[m]
                    )
                    said[rater, j, m] = given / total if total > 0 else 1 / len(categories)
        for i in range(n):
            joint = [
                priors[j]
                * np.prod(
                    [
                        said[rater, j, m]
                        for rater in range(r)
                        for m in k
                        if ratings[i, rater] == categories[m]
                    ]
                )
                for j in k
            ]
            posterior[i] = [x / sum(joint) for x in joint]
    return np.array(posterior)


def test_em_by_patterns_is_em_by_items():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth = rng.integers(0, 3, size=(30, 1))
        ratings = np.where(
            rng.random((30, 4)) < 0.7, truth, rng.integers(0, 3, size=(30, 4))
        ).astype(float)
        ratings[:, 1:][rng.random((30, 3)) < 0.3] = NAN
        fit = dawid_skene(ratings, tolerance=0.0, limit=12)
        assert fit.iterations == 12 and not fit.converged
        assert np.abs(fit.posterior - slow_dawid_skene(ratings, [0.0, 1.0, 2.0], 12)).max() < 1e-10


def test_a_bad_judge_is_found_out():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 4000)
    right = rng.random((4000, 4)) < np.array([0.9, 0.8, 0.8, 0.25])  # the last one errs on purpose
    fit = dawid_skene(np.where(right, truth[:, None], 1 - truth[:, None]).astype(float))
    assert fit.confusion[:, 0, 0] == pytest.approx([0.9, 0.8, 0.8, 0.25], abs=0.03)
    winner, _ = majority(np.where(right, truth[:, None], 1 - truth[:, None]).astype(float))
    assert (fit.posterior.argmax(axis=1) == truth).mean() > (winner == truth).mean() + 0.05
    assert ((fit.entropy >= 0) & (fit.entropy <= np.log(2) + 1e-12)).all()


def test_nothing_to_fit_says_so():
    assert dawid_skene(np.full((3, 2), NAN)).undefined == "no ratings"
    assert dawid_skene(np.ones((3, 2))).undefined == "only one category was used"
    ratings = np.array([[0, 1], [NAN, NAN], [1, 1]])
    assert np.isnan(dawid_skene(ratings).posterior[1]).all()
    assert dawid_skene(group(ratings)).posterior.shape == (2, 2)


# --- strengths ---


def test_strengths_that_cannot_be_finite():
    assert (
        bradley_terry([[0, 3], [0, 0]]).undefined == "a group never lost to, or never met, the rest"
    )
    assert bradley_terry([[0, 0], [0, 0]]).undefined == "nobody won"
    assert bradley_terry([[5]]).undefined == "fewer than two to compare"
    assert davidson([[0, 3, 0], [1, 0, 0], [0, 0, 0]], np.zeros((3, 3))).undefined
    with pytest.raises(ValueError, match="symmetric"):
        davidson([[0, 1], [1, 0]], [[0, 1], [0, 0]])


def test_journals_and_puddings():
    data = golden("bradley_terry_davidson")
    citations = bradley_terry(data["citations"]["wins"])
    logs = citations.log_worth - citations.log_worth[0]
    assert np.abs(logs - data["citations"]["log_ability"]).max() < 1e-9
    assert citations.worth.sum() == pytest.approx(1.0) and citations.nu == 0.0
    wins, ties = np.zeros((6, 6)), np.zeros((6, 6))
    for i, j, _, wins_i, wins_j, tied in data["pudding"]["rows"]:
        wins[i - 1, j - 1], wins[j - 1, i - 1] = wins_i, wins_j
        ties[i - 1, j - 1] = ties[j - 1, i - 1] = tied
    pudding = davidson(wins, ties)
    assert np.abs(pudding.worth - data["pudding"]["davidson_worth"]).max() < 1e-8
    assert abs(pudding.nu - data["pudding"]["davidson_nu"]) < 1e-8


def test_errors_of_strengths_by_hand():
    """Two players, 30 wins to 10: the log odds have variance 1/30 + 1/10, and a centred half of it
    has a quarter."""
    fit = bradley_terry([[0, 30], [10, 0]])
    assert fit.log_worth[0] - fit.log_worth[1] == pytest.approx(np.log(3))
    assert fit.se == pytest.approx([((1 / 30 + 1 / 10) / 4) ** 0.5] * 2)


def test_errors_of_strengths_with_ties_are_those_of_the_likelihood():
    """Against the curvature of the log-likelihood in log worth and log nu, by differences."""
    wins = np.array([[0.0, 12, 7], [5, 0, 9], [8, 3, 0]])
    ties = np.array([[0.0, 6, 2], [6, 0, 5], [2, 5, 0]])
    fit = davidson(wins, ties)

    def likelihood(x):
        worth, nu, total = np.exp(x[:3]), np.exp(x[3]), 0.0
        for i in range(3):
            for j in range(i + 1, 3):
                tie = nu * np.sqrt(worth[i] * worth[j])
                whole = np.log(worth[i] + worth[j] + tie)
                total += wins[i, j] * (np.log(worth[i]) - whole)
                total += wins[j, i] * (np.log(worth[j]) - whole)
                total += ties[i, j] * (np.log(tie) - whole)
        return total

    at, h = np.array([*np.log(fit.worth), np.log(fit.nu)]), 1e-4
    steps = np.eye(4) * h
    curvature = np.array(
        [
            [
                likelihood(at + a + b)
                - likelihood(at + a - b)
                - likelihood(at - a + b)
                + likelihood(at - a - b)
                for b in steps
            ]
            for a in steps
        ]
    ) / (4 * h * h)
    expected = np.sqrt(np.diag(np.linalg.pinv(-curvature, rcond=1e-6))[:3])
    assert fit.se == pytest.approx(expected, rel=1e-4)


# --- calibration ---


def test_calibration_by_hand():
    p, y = np.array([0.1, 0.1, 0.8, 0.8]), np.array([0, 1, 1, 1])
    assert [(b.mean_p, b.mean_y, b.n) for b in reliability(p, y, 2)] == [
        (pytest.approx(0.1), 0.5, 2),
        (pytest.approx(0.8), 1.0, 2),
    ]
    assert ece(p, y, 2) == pytest.approx((0.4 + 0.2) / 2)
    assert brier(p, y) == pytest.approx((0.01 + 0.81 + 0.04 + 0.04) / 4)
    assert log_loss(p, y) == pytest.approx(-(np.log(0.9) + np.log(0.1) + 2 * np.log(0.8)) / 4)
    assert ece([], []) is None and brier([], []) is None and log_loss([], []) is None
    assert log_loss([1.0], [0.0]) == pytest.approx(-np.log(1e-12), rel=1e-4)
    for bad in ([NAN], [1.2]):
        with pytest.raises(ValueError, match="p must lie"):
            ece(bad, [1])


def test_there_are_fifteen_bins_of_equal_mass():
    """Thirty different probabilities: two to a bin, and the error is that of the fifteen pairs."""
    p = np.linspace(0.02, 0.98, 30) ** 2
    y = np.array([0, 1, 1] * 10)
    pairs = [abs(p[i : i + 2].mean() - y[i : i + 2].mean()) for i in range(0, 30, 2)]
    assert ece(p, y) == pytest.approx(np.mean(pairs))


def test_bins_have_equal_mass_and_no_order():
    rng = np.random.default_rng(2)
    p = rng.random(1500)
    y = (rng.random(1500) < p).astype(float)
    assert {b.n for b in reliability(p, y)} == {100}
    shuffled = rng.permutation(1500)
    coarse = np.round(p, 1)
    assert ece(coarse, y) == pytest.approx(ece(coarse[shuffled], y[shuffled]), abs=1e-12)
    assert ece(p, y) < 0.06 and ece(np.full(10, 0.5), np.array([0, 1] * 5)) == 0.0


def test_temperature_mends_overconfidence():
    rng = np.random.default_rng(3)
    honest = rng.random(20_000)
    y = (rng.random(20_000) < honest).astype(float)
    loud = apply_temperature(honest, 1 / 3)
    temperature = fit_temperature(loud, y)
    assert temperature == pytest.approx(3.0, rel=0.05)
    assert ece(apply_temperature(loud, temperature), y) < 0.02 < ece(loud, y)
    assert apply_temperature(np.array([0.5, 0.9]), 7.0)[0] == 0.5
    assert fit_temperature(np.array([0.5, 0.5]), np.array([0, 1])) is None
    assert fit_temperature(np.array([0.6, 0.4]), np.array([1, 0])) == pytest.approx(0.01)
    assert fit_temperature(np.array([0.6, 0.4]), np.array([0, 1])) == pytest.approx(100)
    assert log_loss(apply_temperature(loud, temperature), y) < log_loss(loud, y)


def test_the_error_of_a_calibrated_judge_is_nearly_none():
    """Binned errors are biased upwards (.058 over 300 items, Roelofs et al. 2022); the corrected
    one is not, and its interval holds 0; that of a judge that is too sure does not."""
    rng, plain, corrected = np.random.default_rng(21), [], []
    for _ in range(20):
        p = rng.uniform(0.5, 1, 300)
        y = (rng.random(300) < p).astype(float)
        plain.append(ece(p, y, 10))
        corrected.append(calibration_error(p, y, 10, draws=200))
    assert np.mean(plain) > 0.05 > 0.025 > np.mean([e.value for e in corrected])
    assert sum(e.low == 0.0 for e in corrected) >= 17
    sure = calibration_error(p, (rng.random(300) < 0.5 + (p - 0.5) / 2).astype(float), 10)
    assert 0 < sure.low < sure.value < sure.high and abs(sure.value - 0.125) < 0.06
    assert calibration_error([], []).undefined and calibration_error([0.7], [1.0]).low is None
