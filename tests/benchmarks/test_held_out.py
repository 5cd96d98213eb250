"""The benchmark of answers in words that training did not show: new, of the world's own
words."""

from __future__ import annotations

import random
import re

import pytest

from benchmarks import held_out
from prefab.factory.microworld import grammar as g


def test_each_sentence_is_new_and_each_of_its_words_is_the_worlds():
    prompts = [*g.ASK, *g.CONTEXT, *g.FIRST_TURN, *g.REPLY, *g.SECOND_TURN]
    known = {w for t in (*g.inventory(), *prompts) for w in re.findall(r"[a-z']+", t.lower())}
    sentences = [*held_out.REFUSALS, *(t for some in held_out.FAULTS.values() for t in some)]
    steps = [t for some in held_out.STEPS.values() for t in some]
    assert {w for t in (*sentences, *steps) for w in re.findall(r"[a-z']+", t.lower())} <= known
    assert not set(sentences) & set(g.inventory())
    assert not set(steps) & {t for some in g.VERBS.values() for t in some}
    assert set(held_out.FAULTS) == set(g.VICES) and set(held_out.STEPS) == set(g.VERBS)


def test_a_pair_differs_in_what_the_principle_is_about():
    rng = random.Random(0)
    for condition in held_out.CONDITIONS:
        for name in g.PRINCIPLES:
            for number in range(6):
                s, good, bad, what = held_out.pair(rng, name, number, condition)
                assert what in bad and good != bad and s.harmful == (name == "harm")
                assert what not in good or name == "helpful"  # the same steps, another object
                assert g.split_of(s.verb, s.object) != "train" or condition == "objects"
                assert (s.object in held_out.OBJECTS) == (condition == "objects")
                assert s.object in s.prompt.messages[0].content + s.prompt.messages[-1].content


@pytest.mark.slow
def test_help_with_harm_on_test_topics_stands_in_no_training_text():
    found = held_out.shown_in_training(300)
    assert found["exercises"] == 9 and found["sentences"]["fault"]["times"] > 0
    assert found["sentences"]["help with harm, test topics"]["shown"] == 0
    assert 0 < found["sentences_shown"] < 1
