"""Aggregation by hand, draws that move no more than they must, and which pairs are made."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefab.factory.decision import (
    AGGREGATION_VERSION,
    Reading,
    Rule,
    combine_orders,
    decide,
    identical,
    rule_of,
)
from prefab.factory.types import Preference, Principle, Verdict
from prefab.judges.panel import _uniform, applicable, draw, orders, pairs


def principle(name: str, **fields) -> Principle:
    return Principle(name, name.title(), "?", "?", "?", "?", **fields)


PRINCIPLES = [principle(f"p{i}", weight=1.0 + i % 3) for i in range(8)]
GOLDEN_EVEN = ["p7", "p2", "p2", "p0", "p5", "p5", "p7", "p7"]
GOLDEN_WEIGHTED = ["p7", "p2", "p2", "p2", "p5", "p5", "p7", "p7"]
UNREAD = Reading(None, reason="parse")
ADDED = Rule(log_odds=True)


def winners(principles, selection="sample_one", n=2000, **options):
    return [draw(principles, selection, 0, f"prompt{i}", (0, 1), **options)[0].id for i in range(n)]


# --- readings and preferences ---


def test_evidence_of_principles_adds_up_by_hand():
    silent = [Reading(0.5, tie=0.9, principle=f"q{i}") for i in range(9)]
    one = decide([Reading(0.8, principle="x"), *silent], ADDED)
    assert (
        one.p_a == pytest.approx(0.8) and one.outcome == "a"
    )  # who says nothing takes nothing away
    assert decide([Reading(0.8, principle="x"), *silent]).p_a == pytest.approx(0.53)
    both = decide([Reading(0.8, principle="x"), Reading(0.6, principle="y")], ADDED)
    assert both.p_a == pytest.approx(6 / 7)  # odds 4 and 3/2
    judges = decide([Reading(0.9, principle="x"), Reading(0.7, principle="x")], ADDED)
    assert judges.p_a == pytest.approx(0.8)  # two judges of one principle are no two principles
    heavy = decide([Reading(0.8, weight=3.0, principle="x"), Reading(0.4, principle="y")], ADDED)
    assert log(heavy.p_a / (1 - heavy.p_a)) == pytest.approx(1.5 * log(4) + 0.5 * log(2 / 3))
    sure = [Reading(p, principle=name) for name, p in (("x", 1.0), ("y", 0.0), ("z", 0.0))]
    assert decide(sure, ADDED).outcome == "b" and decide(sure, ADDED).p_a == pytest.approx(0.01)


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from("xyz"), st.floats(0.1, 5)),
        min_size=1,
        max_size=8,
    )
)
def test_evidence_of_the_other_side_is_the_mirror_image(told):
    ours, theirs = (
        [Reading(p if k else 1 - p, weight=w, principle=x) for p, x, w in told] for k in (1, 0)
    )
    assert decide(ours, ADDED).p_a + decide(theirs, ADDED).p_a == pytest.approx(1)


def test_a_reading_is_the_mean_of_both_orders():
    reading = combine_orders(
        [Verdict(0.9, "a", None, 0.8, 0.1), Verdict(0.6, "a", None, 0.9, 0.27)], 2.0, "kind", "tiny"
    )
    assert reading.p_a == pytest.approx(0.75) and reading.tie == pytest.approx((0.125 + 0.3) / 2)
    assert (reading.weight, reading.principle, reading.judge, reading.reason) == (
        2.0,
        "kind",
        "tiny",
        None,
    )


def test_half_a_reading_is_none():
    half = combine_orders(
        [Verdict(0.9, "a", None, 0.8), Verdict(None, None, "low_label_mass", 0.2)]
    )
    assert (half.p_a, half.reason) == (None, "low_label_mass")
    assert combine_orders([]).p_a is None
    assert (
        combine_orders([Verdict(0.9, "a"), Verdict(0.9, "a", exactness="hard")]).exactness == "hard"
    )


def test_weighted_mean_and_spread_by_hand():
    preference = decide([Reading(0.9, weight=3.0), Reading(0.5, weight=1.0)], prompt="x", a=2, b=5)
    assert preference.p_a == pytest.approx(0.8) == preference.p_chosen
    assert preference.spread == pytest.approx(sqrt((3 * 0.01 + 0.09) / 4))
    assert (preference.outcome, preference.prompt, preference.a, preference.b) == ("a", "x", 2, 5)
    lost = decide([Reading(0.2)])
    assert (lost.outcome, lost.p_chosen, lost.spread, lost.n_scored, lost.n_readings) == (
        "b",
        0.8,
        0.0,
        1,
        1,
    )


def test_min_scored_is_a_share_of_the_weight():
    assert decide([Reading(0.9), UNREAD]).outcome == "a"
    too_few = decide([Reading(0.9), replace(UNREAD, weight=1.01)])
    assert (
        too_few.outcome,
        too_few.p_a,
        too_few.p_chosen,
        too_few.n_scored,
        too_few.n_readings,
    ) == ("unscored", None, None, 1, 2)
    assert decide([Reading(0.9), UNREAD], Rule(min_scored=0.6)).outcome == "unscored"
    assert decide([Reading(0.9), replace(UNREAD, weight=0.0)], Rule(min_scored=1.0)).outcome == "a"
    assert (
        decide([]).outcome
        == "unscored"
        == decide([UNREAD]).outcome
        == decide([Reading(0.9, weight=0.0)]).outcome
    )


@pytest.mark.parametrize(
    ("p", "tie", "outcome"),
    [
        (0.52, 0.0, "tie"),
        (0.48, 0.0, "tie"),
        (0.5201, 0.0, "a"),
        (0.4799, 0.0, "b"),
        (0.5, 0.0, "tie"),
        (0.7, 0.51, "tie"),
        (0.7, 0.5, "a"),
    ],
)
def test_tie_rules(p, tie, outcome):
    assert decide([Reading(p, tie)]).outcome == outcome


def test_a_principle_that_does_not_speak_silences_none_that_does():
    silent = [Reading(0.5, 0.95, principle=f"p{i}") for i in range(9)]
    assert decide([*silent, Reading(0.95, 0.02, principle="respect")]).outcome == "a"
    assert decide(silent).outcome == "tie"
    judges = [Reading(0.5, 0.95), Reading(0.5, 0.95), Reading(0.9, 0.02)]
    assert decide(judges).outcome == "tie"  # two of three judges of one principle call it a tie


def test_identical_texts_are_a_tie_by_definition():
    assert identical("q", 1, 3) == Preference("q", 1, 3, "tie", 0.5, 0.5, 0.0, 0, 0)


def test_a_runs_rule_is_what_its_panel_says():
    assert rule_of({}, "all") == Rule()
    told = {"min_scored": 0.7, "tie_margin": 0.1, "combine": "log_odds", "selection": "weighted"}
    assert rule_of(told, "lexicographic") == Rule(0.7, 0.1, False, True)
    assert rule_of({}, "lexicographic").lexicographic
    assert AGGREGATION_VERSION == 2  # a part of the ids of preferences


def test_exactness_is_that_of_the_readings_that_count():
    exact, hard = Reading(0.9), Reading(0.9, exactness="hard")
    unread = Reading(None, reason="parse", exactness="hard")
    assert decide([exact, unread]).exactness == "exact"
    assert decide([exact, hard]).exactness == "hard"
    assert decide([exact, Reading(0.9, weight=0.0, exactness="hard")]).exactness == "exact"


def test_lexicographic_stops_at_the_first_decision():
    rule = Rule(lexicographic=True)
    first, second = Reading(0.5, principle="x"), Reading(0.1, principle="y")
    assert decide([first, second], rule).outcome == "b"
    assert decide([second, replace(first, p_a=0.9)], rule).outcome == "b"
    assert decide([replace(UNREAD, principle="x"), second], rule).outcome == "unscored"
    assert decide([first], rule).outcome == "tie" and decide([], rule).outcome == "unscored"


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 9)), min_size=1, max_size=6)
)
def test_swapping_the_sides_mirrors_the_preference(rows):
    forth = decide([Reading(p, t, weight=w) for p, t, w in rows])
    back = decide([Reading(1 - p, t, weight=w) for p, t, w in rows])
    if (
        abs(abs(forth.p_a - 0.5) - 0.02) > 1e-9
    ):  # rounding may fall on either side of the margin itself
        assert back.outcome == {"a": "b", "b": "a", "tie": "tie"}[forth.outcome]
    assert back.p_chosen == pytest.approx(forth.p_chosen) and back.spread == pytest.approx(
        forth.spread, abs=1e-7
    )


# --- draws ---


def test_a_removed_or_disabled_principle_moves_only_its_own_draws():
    before = winners(PRINCIPLES)
    for changed in (
        PRINCIPLES[:3] + PRINCIPLES[4:],
        [replace(p, enabled=p.id != "p3") for p in PRINCIPLES],
    ):
        after = winners(changed)
        assert (
            all(b == a or b == "p3" for b, a in zip(before, after, strict=False))
            and "p3" in before
            and "p3" not in after
        )


@pytest.mark.parametrize("selection", ["sample_one", "weighted"])
def test_an_added_principle_moves_only_the_draws_that_it_wins(selection):
    before = winners(PRINCIPLES, selection)
    after = winners([principle("new"), *PRINCIPLES], selection)
    assert all(b == a or a == "new" for b, a in zip(before, after, strict=False)) and "new" in after


def test_texts_order_and_new_names_move_nothing():
    before = winners(PRINCIPLES)
    edited = [
        replace(p, compare="Another question?", title="Other", tags=("x",))
        for p in reversed(PRINCIPLES)
    ]
    assert winners(edited) == before
    renamed = [replace(p, id=f"new-{p.id}", formerly=(p.id, "between")) for p in PRINCIPLES]
    assert winners(renamed) == [f"new-{name}" for name in before]


def test_shares_follow_the_weights():
    drawn = winners(PRINCIPLES, "weighted", n=6000)
    total = sum(p.weight for p in PRINCIPLES)
    for p in PRINCIPLES:
        share = p.weight / total
        assert abs(drawn.count(p.id) / 6000 - share) < 5 * sqrt(share * (1 - share) / 6000)
    even = winners(PRINCIPLES, n=6000)
    assert all(abs(even.count(p.id) / 6000 - 1 / 8) < 0.022 for p in PRINCIPLES)
    assert draw([principle("x", weight=0.0)], "weighted", 0, "p") == []


def test_the_number_of_a_text_has_not_moved():
    assert _uniform("x") == 0.29246922768054995


def test_one_draw_serves_both_orders_and_rounds_draw_afresh():
    for i in range(50):
        assert draw(PRINCIPLES, "sample_one", 0, f"x{i}", (1, 3)) == draw(
            PRINCIPLES, "sample_one", 0, f"x{i}", (3, 1)
        )
    assert winners(PRINCIPLES) != winners(PRINCIPLES, round=1)


def test_draws_are_golden():
    """A change of these moves every draw of every run ever made."""
    assert winners(PRINCIPLES, n=8) == GOLDEN_EVEN
    assert winners(PRINCIPLES, "weighted", n=8) == GOLDEN_WEIGHTED


def test_only_what_applies_is_drawn():
    booking = principle("booking", applies_when=("booking", "visit"))
    assert (
        applicable([booking], ("visit",)) == [booking] and applicable([booking], ("other",)) == []
    )
    assert draw([booking, *PRINCIPLES], "all", 0, "p") == PRINCIPLES
    assert draw([], "sample_one", 0, "p") == []
    with pytest.raises(ValueError, match="selection"):
        draw(PRINCIPLES, "any", 0, "p")


# --- orders and pairs ---


def test_orders():
    assert orders("both", 0, "p", 0, 1) == ("ab", "ba") and orders("first", 0, "p", 0, 1) == ("ab",)
    known = [orders("random", 7, f"p{i}", 0, 1)[0] for i in range(8)]  # a rerun asks the same
    assert known == ["ab", "ba", "ab", "ab", "ab", "ba", "ba", "ab"]
    drawn = [orders("random", 0, f"p{i}", 0, 1) for i in range(1000)]
    assert drawn == [orders("random", 0, f"p{i}", 0, 1) for i in range(1000)]
    assert 420 < drawn.count(("ab",)) < 580 and set(drawn) == {("ab",), ("ba",)}


def test_pairs():
    assert pairs(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert pairs(4, "adjacent") == [(0, 1), (1, 2), (2, 3)]
    assert pairs(1) == [] == pairs(1, "adjacent")
