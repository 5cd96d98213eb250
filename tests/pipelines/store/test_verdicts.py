"""From uses to verdicts and preferences, without a store: which answers count, in what order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from prefab.factory import decision
from prefab.factory.types import Preference, Verdict
from prefab.factory.uses import ComparisonUse, EscalationUse, PairUse, RankUse, ScoreUse
from prefab.judges.base import Decoded
from prefab.pipelines.store import verdicts
from prefab.pipelines.store.verdicts import Found, Heard, RecordedUse, Rules


def rules(strong: tuple[str, ...] = (), joined: bool = False, learned: Any = None) -> Rules:
    one: Any = SimpleNamespace(weight=2.0)
    return Rules(
        run=1,
        judges=dict.fromkeys(("cheap", "dear"), one),
        readers={},
        orders="both",
        seed=0,
        rule=decision.Rule(),
        weights={"p1": 0.5},
        positions={"p0": 0, "p1": 1},
        strong=strong,
        joined=joined,
        fit="",
        learned=learned,
        critique_labels=(),
        critique_mass=0.5,
        steps="line",
    )


def test_the_latest_use_of_a_place_counts_in_the_order_of_rows():
    early, late = (RankUse(1, "q", "p", "j", 0, shown) for shown in ((0, 1), (1, 0)))
    why, other = (EscalationUse(1, "q", 0, 1, reason) for reason in ("", "tie"))
    pair = PairUse(1, "q", "judge", 0, 1, "p", "j", "ab")
    uses = [
        RecordedUse(row, use, b"")
        for row, use in ((5, other), (1, early), (4, why), (2, pair), (3, late))
    ]
    assert [(r.rowid, r.use) for r in verdicts.latest(uses)] == [(2, pair), (3, late), (5, other)]


def test_of_several_rubrics_the_one_that_was_asked_about_last_counts():
    uses = [ScoreUse(1, "q", 0, "", "j", line, rubric) for rubric in "bac" for line in (0, 1)]
    uses += [ScoreUse(1, "q", 0, "", "j", 2, "a"), ScoreUse(1, "q", 0, "p", "k")]
    heard = verdicts.gather([Decoded(use, 0.5) for use in uses])
    assert heard.rubric_of == {"j": "a"}
    lines = [one.use.line for one in heard.answers["j", "", 0]]
    assert lines == [0, 1, 2] and list(heard.answers) == [("k", "p", 0), ("j", "", 0)]


def test_comparisons_are_known_by_their_principles_and_places():
    uses: list[Any] = [ComparisonUse(1, "q", 0, 1, "p0"), EscalationUse(1, "q", 0, 1, "budget")]
    uses += [PairUse(1, "q", role, 0, 2, "p1", "j", "ba", 3) for role in ("reason", "judge")]
    heard = verdicts.gather([Decoded(use, None) for use in uses])
    assert heard.principles == {(0, 1): {"p0"}, (0, 2): {"p1"}}
    assert heard.decisions == {(0, 1): "budget"}
    (place,) = heard.pairs[0, 2]
    assert place == ("p1", "j", 3, "ba") and len(heard.pairs[0, 2][place]) == 2


@pytest.mark.parametrize(
    ("decided", "alone", "joined"),
    [
        (None, None, None),
        ("", ["cheap"], ["cheap"]),
        ("budget", ["cheap"], ["cheap"]),
        ("tie", ["dear"], ["cheap", "dear"]),
    ],
)
def test_whose_word_makes_a_preference(decided, alone, joined):
    assert verdicts.judges_of(decided, rules(("dear",))) == alone
    assert verdicts.judges_of(decided, rules(("dear",), True)) == joined
    assert verdicts.judges_of(decided, rules()) == ["cheap", "dear"]


def test_readings_stand_in_the_constitutions_order_and_what_needs_no_principle_first():
    places = [("p1", "cheap"), ("other", "cheap"), ("p0", "dear"), ("", "cheap"), ("p0", "cheap")]
    assert list(verdicts.weighed(places, rules()).items()) == [
        (("", "cheap"), 2.0),
        (("other", "cheap"), 2.0),
        (("p0", "cheap"), 2.0),
        (("p0", "dear"), 2.0),
        (("p1", "cheap"), 1.0),
    ]


def test_a_preference_waits_for_every_place_and_is_made_of_these_alone():
    here, there = ("p0", "cheap", 0, "ab"), ("p0", "cheap", 0, "ba")
    found = {here: Found(Verdict(0.9, "a", None, 1.0), "k", ("k",))}
    assert verdicts.preference("q", (0, 1), found, {here, there}, rules()) is None
    assert verdicts.preference("q", (0, 1), found, set(), rules()) is None
    found[there] = Found(Verdict(0.1, "b", None, 1.0), "l", ("l",))
    made = verdicts.preference("q", (0, 1), found, {here}, rules())
    assert made is not None
    assert (made[0].outcome, made[0].p_a, len(made[1])) == ("a", 0.9, 1)


@pytest.mark.parametrize(
    ("outcome", "p", "expected"),
    [
        ("b", 0.6, ("a", 0.6, 0.6)),
        ("a", 0.4, ("b", 0.4, 0.6)),
        ("tie", 0.6, ("tie", 0.6, 0.6)),
        ("a", None, ("a", 0.7, 0.7)),
    ],
)
def test_the_more_probable_answer_is_chosen(outcome, p, expected):
    calibration = SimpleNamespace(probability=lambda p_a, weights: p)
    decided = Preference("q", 0, 1, outcome, 0.7, 0.7, 0.0, 1, 1)
    learned = rules(learned=SimpleNamespace(calibration=calibration))
    made = verdicts.calibrated(decided, [decision.Reading(0.7)], learned)
    assert (made.outcome, made.p_a, made.p_chosen) == expected
    assert verdicts.calibrated(decided, [], rules()) is decided
    unscored = Preference("q", 0, 1, "unscored", None, None, None, 0, 1)
    assert verdicts.calibrated(unscored, [], learned) is unscored


def test_a_verdict_of_one_answer_alone_names_no_single_call():
    def judge(shows: str) -> Any:
        return SimpleNamespace(
            shows=shows,
            per_principle=True,
            repeats=1,
            ordered=shows == "pair",
            lines=lambda principle, rubric: (),
            verdict=lambda said, pair, lines: (
                (Verdict(0.8, "a", None, 1.0), tuple(d.call for d in said)) if said else None
            ),
        )

    pair = PairUse(1, "q", "judge", 0, 1, "p0", "cheap", "ab")
    scores = [ScoreUse(1, "q", sample, "p0", "dear") for sample in (0, 1)]
    said = [Decoded(use, 0.5, call) for use, call in zip([pair, *scores], "xyz", strict=True)]
    of = rules()
    of.judges = {"cheap": judge("pair"), "dear": judge("one")}
    found = verdicts.verdicts("q", (0, 1), verdicts.gather(said), of)
    calls = {place: (one.call, one.calls) for place, one in found.items()}
    assert calls == {
        ("p0", "cheap", 0, "ab"): ("x", ("x",)),
        ("p0", "dear", 0, "-"): ("", ("y", "z")),
    }
    heard = Heard(principles={(0, 1): {"p0", ""}})
    both = verdicts.expected("q", (0, 1), heard, of, ["cheap", "dear"])
    assert both == {("p0", "cheap", 0, "ab"), ("p0", "cheap", 0, "ba"), ("p0", "dear", 0, "-")}
