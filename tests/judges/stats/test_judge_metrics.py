"""A judge's accuracy and pull to a slot, and how far judges err together, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from prefab.judges.stats.judge_metrics import (
    accuracy,
    errors_together,
    exact,
    first_slot_share,
    position_consistency,
    slot_lean,
    stability,
)

NAN = np.nan


def test_accuracy_counts_what_was_decided_and_is_known():
    found = accuracy([0.9, 0.2, 0.5, NAN, 0.7, 0.7], [1, 1, 1, 1, NAN, 0.5])
    assert (found.value, found.n_items) == (0.5, 2)
    assert accuracy([NAN], [1]).undefined and accuracy([0.5], [1]).undefined


def test_a_slot_picker_and_a_fair_judge():
    ab, ba = (
        np.full(10, 0.9),
        np.full(10, 0.1),
    )  # the first shown always wins; both speak of sample a
    assert position_consistency(ab, ba).value == 0.0 and first_slot_share(ab, ba).value == 1.0
    assert slot_lean(ab, ba).value == 1.0 and slot_lean(ba, ab).value == -1.0
    fair = np.linspace(0.1, 0.9, 10)
    assert (
        position_consistency(fair, fair).value == 1.0 and first_slot_share(fair, fair).value == 0.5
    )
    assert slot_lean(fair, fair).undefined and stability(fair, fair).value == 1.0


def test_unscored_verdicts_are_left_out():
    found = position_consistency([0.9, NAN, 0.9, 0.5], [0.8, 0.9, 0.2, 0.5])
    assert (found.value, found.n_items) == (pytest.approx(2 / 3), 3)
    assert first_slot_share([NAN], [0.3]).undefined


def test_copies_are_worth_one_judge():
    rng = np.random.default_rng(0)
    gold = rng.integers(0, 2, 5000).astype(float)

    def judge(p):
        return np.where(rng.random(5000) < p, gold, 1 - gold) * 0.8 + 0.1

    one = judge(0.8)
    copies = errors_together(np.column_stack([one, one, one]), gold)
    assert copies.mean.value == pytest.approx(1.0) and copies.effective.value == pytest.approx(1.0)
    independent = errors_together(np.column_stack([one, judge(0.8), judge(0.7)]), gold)
    assert abs(independent.mean.value) < 0.03 and independent.effective.value == pytest.approx(
        3.0, abs=0.2
    )
    assert (
        errors_together(np.column_stack([gold, gold]), gold).effective.value is None
    )  # nobody ever errs
    assert errors_together(one[:, None], gold).effective.value == 1.0


def test_ties_count_as_what_they_are():
    found = exact([1, 0.5, 0.5, 0, NAN, 1], [1, 0.5, 1, 0, 1, NAN])
    assert (found.value, found.n_items) == (0.75, 4) and exact(
        [NAN], [1]
    ).undefined == "no item has gold"


def test_answers_to_one_prompt_are_not_independent():
    rng = np.random.default_rng(1)
    ab, gold = np.repeat(rng.random(100), 8), np.ones(800)
    ba, prompts = np.repeat(rng.random(100), 8), np.repeat(np.arange(100), 8)
    for of, args in (
        (accuracy, (ab, gold)),
        (position_consistency, (ab, ba)),
        (first_slot_share, (ab, ba)),
        (slot_lean, (ab, ba)),
        (stability, (ab, ba)),
        (exact, (np.round(ab), gold)),
    ):
        naive, honest = of(*args), of(*args, prompts)
        assert honest.value == naive.value and honest.n_items == naive.n_items
        assert honest.high - honest.low > 2 * (naive.high - naive.low), of


def test_the_number_of_judges_has_an_interval_and_no_ceiling():
    """Errors that avoid one another are worth more than their number; copies of every item within a
    prompt leave the interval as wide."""
    rng = np.random.default_rng(4)
    wrong = rng.integers(0, 4, 200)  # each item has at most one judge that errs
    p = np.where(wrong[:, None] == np.arange(3), 0.1, 0.9)
    apart = errors_together(p, np.ones(200))
    assert apart.effective.value > 3 and apart.effective.low < apart.effective.value
    shared = np.where(rng.random((60, 1)) < 0.2, 0.1, np.where(rng.random((60, 3)) < 0.2, 0.1, 0.9))
    once = errors_together(shared, np.ones(60)).effective
    copies, prompts = np.repeat(shared, 10, axis=0), np.repeat(np.arange(60), 10)
    whole, naive = (errors_together(copies, np.ones(600), c).effective for c in (prompts, None))
    assert whole.low == pytest.approx(once.low, rel=0.02) and whole.n_groups == 60
    assert naive.high - naive.low < 0.5 * (whole.high - whole.low)
