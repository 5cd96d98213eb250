"""What all kinds of judges share: how answers are read, questions keyed, and scores combined."""

from __future__ import annotations

from math import inf, log

import pytest

from prefab.factory.types import (
    LONGEST_TEXT,
    Comparison,
    Completion,
    Message,
    Principle,
    Prompt,
    Sample,
    Sampling,
    Verdict,
)
from prefab.factory.uses import PairUse
from prefab.judges import base
from prefab.judges.base import Decoded, JudgeConfig, RequestContext, Score
from prefab.judges.kinds import human, pairwise, rubric

INDEX = base.spellings(("yes", "no"))
CONFIG = JudgeConfig(name="j")
PAIRWISE = pairwise.PairwiseJudge(pairwise.PairwiseConfig(name="pairwise"))
RUBRIC = rubric.RubricJudge(rubric.RubricConfig(name="rubric"))
RULE = Principle("kind", "Kind", "Kinder?", "Name it.", "Mend it.", "It is unkind.")
PROMPT = Prompt("p", (Message("user", "Question?"),))
PAIR = Comparison(PROMPT, Sample("p", 0, "x"), Sample("p", 1, "y"))


def exact(yes: float, no: float) -> Completion:
    """An exact read of two labels, each in one spelling."""
    known = {"yes": log(yes), "no": log(no)}
    return Completion("yes", "length", dict.fromkeys(INDEX, -inf) | known)


def hard(text: str, finish: str = "stop") -> Completion:
    """A label without log-probabilities."""
    return Completion(text, finish, None, "hard")


def test_masses_are_those_of_one_distribution():
    assert base.label_masses(exact(0.7, 0.305), INDEX, 2) == pytest.approx([0.7, 0.305])
    assert base.label_masses(exact(0.9, 0.4), INDEX, 2) == "no_logprobs"
    one = Completion("yes", "length", {"yes": log(0.9)})
    assert base.label_masses(one, INDEX, 2) == "no_logprobs"  # no was not read
    assert base.label_masses(Completion("", "context"), INDEX, 2) == "context"
    assert base.label_masses(Completion("", "refused"), INDEX, 2) == "refused"


@pytest.mark.parametrize("most", [0.5, 0.49])
def test_half_of_the_mass_is_enough(most):
    found = base.label_score(exact(most - 0.1, 0.1), INDEX, (1.0, 0.0), CONFIG.min_label_mass)
    assert (found.reason is None) == (most == 0.5) and found.mass == pytest.approx(most)


@pytest.mark.parametrize(
    "completion, forms, expected",
    [
        (hard(" no "), False, [0.0, 1.0]),
        (hard("Answer: no"), False, "parse"),
        (hard("Answer: no"), True, [0.0, 1.0]),
        (hard("<think>hm</think>Answer: no"), False, [0.0, 1.0]),
        (hard("<think>no", "length"), True, "truncated"),
        (hard("Answer: no", "length"), True, "truncated"),
        (hard("Answer: no, I think", "length"), True, [0.0, 1.0]),
        (hard("Answer:", "length"), True, "truncated"),
        (hard("Perhaps"), True, "parse"),
        (hard("no".ljust(LONGEST_TEXT)), False, [0.0, 1.0]),
        (hard("no".ljust(LONGEST_TEXT + 1)), False, "too_long"),
        (Completion("no", "stop"), False, "no_logprobs"),
    ],
)
def test_a_label_without_probabilities(completion, forms, expected):
    assert base.label_masses(completion, INDEX, 2, forms) == expected


def test_what_a_free_text_is_used_for():
    for finish in ("context", "refused"):
        assert base.generated(Completion("text", finish)) == ("", finish)
    assert base.generated(Completion(" text ", "stop")) == ("text", None)
    assert base.generated(Completion(" ", "stop")) == ("", "parse")
    assert base.generated(Completion("text", "length")) == ("text", "truncated")
    assert base.generated(Completion("<think>text", "stop"))[1] == "truncated"
    assert base.generated(Completion("x" * LONGEST_TEXT, "stop"))[1] is None
    assert base.generated(Completion("x" * (LONGEST_TEXT + 1), "stop")) == ("", "too_long")


@pytest.mark.parametrize(
    "text, inner",
    [
        ("plain", "plain"),
        ("```\ncode\n```", "code"),
        ("<answer>```text\ncode\n```</answer>", "code"),
        ("```\na\n```\nb\n```", "```\na\n```\nb\n```"),
        ("<b>one</b> and <b>two</b>", "<b>one</b> and <b>two</b>"),
    ],
)
def test_what_stands_around_the_whole_of_a_text_is_taken_off(text, inner):
    assert base.unwrap(text) == inner


def test_samples_and_round_tell_questions_apart_only_where_chance_answers():
    def key(temperature: float, repeat: int) -> tuple[int, ...]:
        sampling = Sampling(8, temperature, seed=1 if temperature else None)
        return base.text_request("m", PROMPT.messages, sampling, CONFIG, repeat, (3, 0)).repeat

    assert (key(0.7, 0), key(0.7, 2)) == ((3, 0, 0), (3, 0, 2))
    assert (key(0.0, 0), key(0.0, 2)) == ((), (2,))


def test_two_scores_as_a_verdict_by_hand():
    """Of three grades: P(a above b) = .5 (.2 + .3) + .3 x .2 = .31, as P(b above a); equal: .2 x .2
    + .3 x .3 + .5 x .5 = .38."""
    a, b = Score(1.3, (0.2, 0.3, 0.5)), Score(1.3, (0.2, 0.3, 0.5))
    found = base.scale_verdict(a, b)
    assert (found.p_a, found.tie_mass) == pytest.approx((0.5, 0.38)) and found.winner == "tie"
    sure = base.scale_verdict(Score(2.0, (0.0, 0.0, 1.0)), b)
    assert (sure.p_a, sure.tie_mass, sure.winner) == (0.75, 0.5, "a")
    assert base.scale_verdict(b, Score(0.0, (1.0, 0.0, 0.0))).p_a == pytest.approx(0.9)


def test_a_rubrics_yes_is_a_fault():
    assert RUBRIC.lines("kind", None) == (("kind", -1.0),)
    assert RUBRIC.reward(Score(0.25, (0.75, 0.25))) == pytest.approx(0.5)  # of a fault, .25
    assert RUBRIC.reward(Score(None, reason="parse")) is None


def judged(order: str, p_a: float, role: str = "judge") -> Decoded:
    """A verdict on answers 0 and 1."""
    use = PairUse(1, "p", role, 0, 1, "kind", "pairwise", order)
    return Decoded(use, Verdict(p_a, "a" if p_a > 0.5 else "b"), f"{order}-{role}")


def test_each_order_has_its_own_verdict_and_one_that_lacks_an_answer_is_unscored():
    lines = PAIRWISE.lines("kind", None)
    both = PAIRWISE.verdicts_by_order([judged("ab", 0.9), judged("ba", 0.2)], (0, 1), lines)
    assert [v.p_a for v in both] == [0.9, 0.2]
    _, missing = PAIRWISE.verdicts_by_order([judged("ab", 0.9)], (0, 1), lines)
    assert (missing.p_a, missing.winner, missing.reason) == (None, None, "transport")


def test_the_verdict_is_that_of_the_last_pass():
    passes = ("reason", "judge")
    last = base.last_verdict([judged("ab", 0.9), judged("ab", 0.1, "reason")], passes)
    assert last is not None and (last[0].p_a, last[1]) == (0.9, ("ab-judge",))
    waiting = Decoded(judged("ab", 0.9).use, None)
    assert base.last_verdict([], passes) is base.last_verdict([waiting], passes) is None


def test_a_program_is_asked_once_and_a_model_as_often_as_its_configuration_says():
    asked = pairwise.PairwiseJudge(pairwise.PairwiseConfig(name="j", repeats=3))
    assert (asked.repeats, list(asked.asked_repeats(RequestContext()))) == (3, [0, 1, 2])
    assert human.HumanJudge(human.HumanConfig(name="people", repeats=3)).repeats == 1


def test_a_principles_examples_are_those_of_its_template():
    seen = []

    class Template:
        """Gives what it is filled in with."""

        def render(self, specials, **variables):
            return (Message("user", f"{variables['question']} {list(variables['examples'])}"),)

    def examples(file, principle):
        seen.append((file, principle.id))
        return [{"answer": "e"}]

    context = RequestContext(templates={"rubric": Template()}, examples=examples)
    sample = PAIR.a
    shown = RUBRIC.render(PROMPT, sample, "Q", RULE, context)[0].content
    assert shown == "Q [{'answer': 'e'}]" and seen[0][1] == "kind"
    assert RUBRIC.render(PROMPT, sample, "Q", None, context)[0].content == "Q []"
