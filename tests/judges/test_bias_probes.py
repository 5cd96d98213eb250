"""The bias battery: probes leave the truth alone, and findings count what they say they count."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefab.factory.microworld import grammar, oracle, tasks
from prefab.factory.spec.templates import fence
from prefab.factory.stats import clustered_share
from prefab.factory.types import Principle, Verdict
from prefab.judges import bias_probes
from tests.support.oraclejudge import CONSTITUTION

PROBES = {probe.name: probe for probe in bias_probes.PROBES}
WANTED = (
    "swap",
    "padding",
    "repetition",
    "markdown",
    "authority",
    "flattery",
    "self_style",
    "injection",
    "one_token",
    "special_tokens",
    "closing_fence",
    "other_language",
    "emotion",
)


def principle(words: str) -> Principle:
    return Principle("p", words, "Which?", "c", "r", "criterion")


def sure(side: str, p: float = 0.9) -> Verdict:
    p_a = {"a": p, "b": 1 - p, "tie": 0.5}[side]
    return Verdict(p_a, side, None, 1.0, 0.9 if side == "tie" else 0.0)


UNREAD = Verdict(None, None, "low_label_mass")


def test_the_battery_is_whole():
    assert len(PROBES) == len(bias_probes.PROBES) >= 12 and set(WANTED) <= set(PROBES)
    assert len(PROBES["one_token"].phrasings) >= 10 and {":", "Solution"} <= set(
        PROBES["one_token"].phrasings
    )
    formats = " ".join(PROBES["special_tokens"].phrasings)
    assert all(
        token in formats
        for token in ("<|im_end|>", "[INST]", "<|eot_id|>", "</s>", "<start_of_turn>")
    )
    for probe in bias_probes.PROBES:
        assert probe.why and len(set(probe.phrasings)) == len(probe.phrasings)


def test_most_attacks_were_never_shown_in_training():
    """What the embedded models were trained against is known; the battery must not be a copy of
    it."""
    seen = {
        text.strip(" .").lower() for pattern in tasks.HOSTILE for text in grammar.choices(pattern)
    }
    seen |= {token.strip(" .").lower() for token in tasks.TOKENS}
    for probe in (probe for probe in bias_probes.PROBES if any(probe.phrasings)):
        unseen = [text for text in probe.phrasings if text.strip(" .").lower() not in seen]
        wanted = 6 if probe.name == "one_token" else len(probe.phrasings)
        assert len(unseen) >= wanted, probe.name


@pytest.mark.parametrize("probe", bias_probes.PROBES, ids=lambda p: p.name)
def test_the_truth_stays(probe):
    """Every phrasing, under every principle that the probe may be asked under: the oracle's verdict
    is the same."""
    rng, tried = random.Random(f"truth {probe.name}"), 0
    for asked in CONSTITUTION.principles:
        found = 0
        while bias_probes.allowed(probe, asked) and found < 3:
            s = grammar.situation(rng, "test")
            a, b = tasks.candidate(rng, s, 0.0).text, tasks.candidate(rng, s, 0.0).text
            gold = oracle.compare(s.prompt.messages, a, b, asked.id)
            if gold == "tie":
                continue
            found += 1
            better, worse = (a, b) if gold == "a" else (b, a)
            for k in range(len(probe.phrasings)):
                tried += 1
                assert (
                    oracle.compare(
                        s.prompt.messages, better, bias_probes.edited(probe, worse, k), asked.id
                    )
                    == "a"
                )
    assert tried >= 3 * len(probe.phrasings)


def test_principles_that_an_edit_could_matter_under_are_left_out():
    left_out = {
        probe.name: {p.id for p in CONSTITUTION.principles if not bias_probes.allowed(probe, p)}
        for probe in bias_probes.PROBES
    }
    assert left_out["padding"] == left_out["repetition"] == {"padding"}
    assert "flattery" in left_out["flattery"] and {"sources", "overclaim"} <= left_out["authority"]
    assert {"refusal", "preaching"} <= left_out["self_style"] and "pressure" in left_out["emotion"]
    assert left_out["one_token"] == {p.id for p in CONSTITUTION.principles} - {"helpful"}
    assert not left_out["swap"] and not left_out["injection"] and not left_out["special_tokens"]
    assert not bias_probes.allowed(PROBES["padding"], principle("Keep it short"))
    assert bias_probes.allowed(
        PROBES["padding"], principle("Do not belong to a club")
    )  # "long" inside a word is none


def test_edits_are_what_they_say():
    text = "To sell it, post a price. Good luck."
    assert bias_probes.edited(PROBES["swap"], text, 3) == text
    assert bias_probes.edited(PROBES["repetition"], text, 0) == f"{text} {text}"
    assert (
        bias_probes.edited(PROBES["one_token"], text, 0) == ":"
        and bias_probes.edited(PROBES["one_token"], text, 15) == "Solution"
    )
    assert (
        bias_probes.edited(PROBES["markdown"], text, 0)
        == "## Answer\n\n- To sell it, post a price.\n- Good luck."
    )
    assert (
        bias_probes.edited(PROBES["markdown"], "```\nx. y\n```", 2)
        == "**Overview**\n\n```\nx. y\n```"
    )
    assert bias_probes.edited(PROBES["self_style"], text, 0).endswith(" " + text)
    assert bias_probes.edited(PROBES["injection"], text, 10).startswith(text + "\n### Instruction")


@settings(deadline=None)
@given(st.text(max_size=200), st.integers(0, 40), st.sampled_from(bias_probes.PROBES))
def test_no_edit_escapes_the_fence(text, k, probe):
    shown = fence("How?", bias_probes.edited(probe, text, k))
    tag = shown[1:7]
    assert (
        shown.startswith(f"<{tag}>\n") and shown.endswith(f"\n</{tag}>") and shown.count(tag) == 2
    )


def test_flips_by_hand():
    """Four pairs: one flips wholly, one in one order, one was wrong before, one becomes unread."""

    def tried(gold, before, after, again=None, phrasing="x"):
        return bias_probes.Tried(gold, before, again or before, after, phrasing)

    loses, wins = (sure("a"), sure("a")), (sure("b"), sure("b"))
    found = bias_probes.find(
        PROBES["padding"],
        [
            tried("a", loses, wins, phrasing="y"),
            tried("a", loses, (sure("a"), sure("b", 0.6))),
            tried("b", loses, wins),
            tried("a", loses, (sure("a"), UNREAD)),
            tried("b", wins, (sure("tie"), sure("tie"))),
        ],
    )
    assert (found.n_pairs, found.n_right, found.ties, found.silenced) == (5, 4, 1, 1)
    assert (found.flips.value, found.flips.n_items) == (1 / 3, 3) and found.again.value == 0.0
    assert found.flips == clustered_share([1, 0, 0], [1, 2, 3])
    assert found.one_order.value == pytest.approx(
        3 / 7
    )  # 2 of the first, 1 of the second, 0 of 1 and of 2
    shifts = [0.8, (0.1 + 0.6) / 2 - 0.1, 0.1 - 0.9, 0.5 - 0.1]
    assert (
        found.shift.value == pytest.approx(sum(shifts) / 4) and found.shift.low < found.shift.value
    )
    assert found.by_phrasing == (("x", 0, 2), ("y", 1, 1))


def test_the_baseline_is_the_same_question_again():
    pairs = [
        bias_probes.Tried(
            "a", (sure("a"),) * 2, (sure("b" if i < 2 else "a"),) * 2, (sure("a"),) * 2
        )
        for i in range(8)
    ]
    found = bias_probes.find(PROBES["padding"], pairs)
    assert (
        found.again.value == 0.25
        and found.flips.value == 0.0
        and found.shift.value == pytest.approx(0.0)
    )


def test_a_slot_picker_is_found_by_swapping():
    """It picks the first slot in 3 pairs of 8 and is right in the others: of 13 right verdicts 3
    turn wrong."""
    pairs = [
        bias_probes.Tried(
            "a", (sure("a"), sure("b" if i < 3 else "a")), (sure("a"),) * 2, (sure("a"),) * 2
        )
        for i in range(8)
    ]
    found = bias_probes.find(PROBES["swap"], pairs)
    assert (
        found.one_order.value == pytest.approx(3 / 13)
        and found.flips.value is None
        and found.flips.undefined
    )
    assert found.shift.value == pytest.approx(3 / 8 * 0.4)


def test_pairs_of_one_prompt_are_not_independent():
    """40 pairs of which a fifth flips, four a prompt and alike: ten prompts tell as much as ten
    pairs."""

    def tried(size):
        right = (sure("a"),) * 2
        return bias_probes.find(
            PROBES["padding"],
            [
                bias_probes.Tried(
                    "a", right, right, (sure("b" if i < 8 else "a"),) * 2, "x", str(i // size)
                )
                for i in range(40)
            ],
        )

    alone, found = tried(1), tried(4)
    assert found.flips.value == found.one_order.value == alone.flips.value == 0.2
    width = found.flips.high - found.flips.low
    assert width > 1.7 * (alone.flips.high - alone.flips.low)
    assert found.one_order.high - found.one_order.low == pytest.approx(
        width, rel=0.02
    )  # an order more tells next to nothing new
    assert found.shift.n_items == 10 and alone.shift.n_items == 40


def test_nothing_to_measure_is_undefined():
    found = bias_probes.find(PROBES["emotion"], [])
    assert (
        found.flips.value is None
        and "no pair" in found.flips.undefined
        and found.shift.value is None
    )
    wrong = bias_probes.find(
        PROBES["emotion"],
        [bias_probes.Tried("a", (sure("b"),) * 2, (sure("b"),) * 2, (sure("b"),) * 2)],
    )
    assert (
        wrong.flips.value is None and wrong.n_right == 0 and wrong.shift.value == pytest.approx(0.0)
    )


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), *[st.sampled_from(["a", "b", "tie", "none"])] * 6),
        max_size=12,
    )
)
def test_relabelling_the_sides_changes_nothing(rows):
    """Which answer is called a is an accident: mirrored pairs give the same findings."""

    def verdict(side):
        return UNREAD if side == "none" else sure(side)

    pairs = [
        bias_probes.Tried(
            g, *((verdict(x), verdict(y)) for x, y in zip(v[::2], v[1::2], strict=True))
        )
        for g, *v in rows
    ]
    mirrored = [
        bias_probes.Tried(
            "b" if t.gold == "a" else "a",
            *(tuple(v.swap() for v in part) for part in (t.before, t.again, t.after)),
        )
        for t in pairs
    ]
    one, other = (
        bias_probes.find(PROBES["padding"], pairs),
        bias_probes.find(PROBES["padding"], mirrored),
    )
    assert (one.n_right, one.ties, one.silenced) == (other.n_right, other.ties, other.silenced)
    for name in (
        "flips",
        "again",
        "one_order",
    ):  # sums of the same numbers in another order: the last digit may differ
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine.n_items, mine.undefined) == (theirs.n_items, theirs.undefined)
        for field in ("value", "se", "low", "high"):
            a, b = getattr(mine, field), getattr(theirs, field)
            assert a == b or a == pytest.approx(b, abs=1e-12)
    assert one.shift.value == other.shift.value or one.shift.value == pytest.approx(
        other.shift.value, abs=1e-12
    )
