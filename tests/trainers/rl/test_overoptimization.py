"""The alarm and Gao's fits on curves whose truth is known: how often it fires, how often it rightly
does not."""

from __future__ import annotations

from math import e, log, sqrt
from statistics import NormalDist

import numpy as np
import pytest

from prefab.factory.stats import bon_kl
from prefab.trainers.rl import overoptimization
from prefab.trainers.rl.overoptimization import Evaluation

PROMPTS, PLANNED = 256, 20


def run(rng, gold, proxy, evaluations=PLANNED, noise=0.5, prompt_sd=0.4):
    """Evaluations along true curves; each answer's gold is the prompt's own difficulty, the curve,
    and chance."""
    own = rng.normal(0, prompt_sd, PROMPTS)
    history, fired = [], None
    for k in range(1, evaluations + 1):
        scores = own + gold(k) + rng.normal(0, noise, PROMPTS)
        history.append(Evaluation(k, 0.5 * k, proxy(k) + rng.normal(0, 0.01), tuple(scores)))
        fired = fired or overoptimization.alarm(history, evaluations)
    return history, fired


def rising(k):
    return 0.1 * k


def test_it_stays_silent_on_a_plateau_of_many_evaluations():
    """Gold rises, then stays, while the proxy climbs on: 200 healthy runs, at most 5% with an
    alarm."""
    rng = np.random.default_rng(0)
    fired = [run(rng, lambda k: min(0.1 * k, 0.5), rising)[1] for _ in range(200)]
    assert sum(x is not None for x in fired) <= 10


def test_the_level_holds_where_few_answers_change_from_step_to_step():
    """Sampled with a fixed seed, as in training: 30% of the answers are drawn anew at each step
    from a distribution that stays the same. Dividing the level by the number of evaluations alone
    gives alarms in 11 of these 100 runs (`benchmarks/alarm.py --simulate` has more settings)."""
    rng, fired, n, planned = np.random.default_rng(6), 0, 150, 60
    for _ in range(100):
        levels = np.array([1.0, 0.86, 0.71, 0.0, -0.14])
        chance = rng.dirichlet([1.9, 0.6, 0.2, 0.15, 0.15], size=n).cumsum(axis=1)
        u, history, alarm = rng.random(n), [], None
        for k in range(planned):
            u = np.where(rng.random(n) < 0.3, rng.random(n), u)
            gold = levels[(u[:, None] > chance[:, :-1]).sum(axis=1)]
            history.append(Evaluation(k, 0.1 * k, float(k), tuple(gold.tolist())))
            if k > 1 and alarm is None:
                alarm = overoptimization.alarm(history, planned)
        fired += alarm is not None
    assert fired <= 5


@pytest.mark.slow
def test_the_plain_rule_would_cry_wolf():
    """Two standard errors below the best, without pairing or level: what the alarm must not be."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(40):
        history, _ = run(rng, lambda k: min(0.1 * k, 0.5), rising, evaluations=60)
        top = max(history, key=lambda h: h.gold_mean)
        se = sqrt(np.var(top.gold) / PROMPTS)
        wrong += any(h.gold_mean < top.gold_mean - 2 * se for h in history[12:])
    assert wrong > 12


def test_it_fires_before_a_third_of_the_gain_is_lost():
    """Gold gains 1.0 by the middle of the run and then falls: in at least 90 of 100 runs the alarm
    comes in time."""
    rng, in_time = np.random.default_rng(1), 0
    for _ in range(100):
        _, fired = run(rng, lambda k: 1.0 - abs(k - 10) * 0.1, rising)
        in_time += fired is not None and 1.0 - abs(fired.step - 10) * 0.1 > 0.667 - 1e-9
    assert in_time >= 90


def test_it_stays_silent_while_the_proxy_falls_too():
    rng = np.random.default_rng(2)
    for _ in range(50):
        assert run(rng, lambda k: -0.1 * k, lambda k: -0.1 * k)[1] is None


def test_one_bad_evaluation_is_not_enough():
    low, high = tuple([0.0] * 50), tuple([1.0] * 50)
    history = [Evaluation(1, 1, 1.0, high), Evaluation(2, 2, 2.0, low), Evaluation(3, 3, 3.0, high)]
    assert overoptimization.fallen(history[:2], 3) and overoptimization.alarm(history, 3) is None
    fired = overoptimization.alarm([*history[:2], Evaluation(3, 3, 3.0, low)], 3)
    assert (fired.step, fired.best_step, fired.lost, fired.proxy_gained) == (3, 1, 1.0, 2.0)
    assert "since step 1 the proxy rose by 2" in str(fired)


def test_the_level_is_that_of_a_paired_t_test():
    """Differences of mean m and deviation s over n prompts: on one side of the quantile it has
    fallen, on the other not."""
    n, planned = 10_000, 10
    z = NormalDist().inv_cdf(1 - 0.05 / planned)
    half = np.tile([1.0, -1.0], n // 2)
    s = np.std(half, ddof=1)
    for factor, fallen in ((0.99, False), (1.01, True)):
        lost = half + z * factor * s / sqrt(n)
        history = [
            Evaluation(1, 1, 0.0, tuple([5.0] * n)),
            Evaluation(2, 1, 1.0, tuple(5.0 - lost)),
        ]
        assert overoptimization.fallen(history, planned) is fallen


@pytest.mark.parametrize(
    ("before", "now", "fires"), [(2.7, 4.15, True), (2.5, 4.15, False), (2.7, 4.0, False)]
)
def test_the_alarm_needs_a_suspicion_and_then_its_own_level(before, now, fires):
    """Of 80 evaluations: the normal quantile is 2.58 at .005, 4.07 at .05 over 80²/3."""
    n = 10_000
    half = np.tile([1.0, -1.0], n // 2)
    s = np.std(half, ddof=1)
    golds = [5.0 - (half + z * s / sqrt(n)) for z in (before, now)]
    history = [
        Evaluation(1, 1, 0.0, tuple([5.0] * n)),
        *(Evaluation(k, 1, float(k), tuple(g.tolist())) for k, g in enumerate(golds, 2)),
    ]
    assert (overoptimization.alarm(history, 80) is not None) is fires


def test_the_best_is_the_first_of_equals():
    history = [
        Evaluation(k, 1.0, 0.0, gold)
        for k, gold in enumerate([(1.0, 2.0), (3.0, 0.0), (1.0, 1.0)], 1)
    ]
    assert overoptimization.best(history).step == 1 and not overoptimization.fallen(history[:2], 2)


@pytest.mark.parametrize("form", ["bon", "rl"])
def test_a_curve_without_noise_gives_its_own_coefficients(form):
    d = np.linspace(0.3, 5, 12)
    gold = d * (1.3 - 0.4 * (d if form == "bon" else np.log(d)))
    fit = overoptimization.gao_fit([0.0, *d**2], [0.0, *gold], form)
    assert (
        fit.a.value == pytest.approx(1.3) and fit.b.value == pytest.approx(0.4) and fit.rmse < 1e-9
    )
    grid = np.linspace(0.01, 100, 2_000_000)
    curve = grid * (1.3 - 0.4 * (grid if form == "bon" else np.log(grid)))
    assert fit.peak == pytest.approx(grid[curve.argmax()], abs=1e-3)
    assert fit.peak == pytest.approx(1.3 / 0.8 if form == "bon" else e ** (1.3 / 0.4 - 1))


@pytest.mark.parametrize("form", ["bon", "rl"])
def test_intervals_hold_the_truth_as_often_as_they_say(form):
    rng, d = np.random.default_rng(3), np.linspace(0.5, 4, 9)
    truth = d * (1.0 - 0.3 * (d if form == "bon" else np.log(d)))
    inside = np.zeros(2)
    for _ in range(1000):
        fit = overoptimization.gao_fit(d**2, truth + rng.normal(0, 0.1, len(d)), form)
        inside += [fit.a.low <= 1.0 <= fit.a.high, fit.b.low <= 0.3 <= fit.b.high]
    assert all(930 <= count <= 968 for count in inside)


def test_a_fit_needs_points():
    assert "at least 3" in overoptimization.gao_fit([0, 1, 2], [0, 1, 2], "rl").a.undefined
    assert "same distance" in overoptimization.gao_fit([2, 2, 2], [0, 1, 2], "bon").b.undefined
    assert overoptimization.gao_fit([1, 2, 3], [1, 2, 4], "bon").peak is None  # it only rises


def test_best_of_n_and_distinct():
    assert bon_kl(1) == 0 and bon_kl(4) == pytest.approx(log(4) - 0.75)
    assert (
        overoptimization.distinct(["a b a", "b a"], 1) == 2 / 5
        and overoptimization.distinct(["a b a", "b a"], 2) == 2 / 3
    )
    assert overoptimization.distinct(["a", ""], 2) is None


def test_gold_at_a_distance_is_read_off_straight_lines_over_its_square_root():
    path = [(4.0, 3.0), (1.0, 1.0)]  # in whatever order; nothing is gained at no distance
    assert overoptimization.gained_at(path, 0.25) == pytest.approx(0.5)
    assert overoptimization.gained_at(path, 1.0) == pytest.approx(1.0)
    assert overoptimization.gained_at(path, 2.25) == pytest.approx(2.0)
    assert (
        overoptimization.gained_at(path, 4.1) is None
        and overoptimization.gained_at([], 0.1) is None
    )
