"""Each target of the fuzzer on its corpus, and on a few new inputs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.fuzz.__main__ import CORPUS, bounded, corpus, one_round
from tests.fuzz.targets import TARGETS, Target


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name):
    for value in corpus(name):
        bounded(TARGETS[name].check, value)


def test_each_file_of_the_corpus_has_a_target():
    assert {file.stem for file in CORPUS.glob("*.json")} <= TARGETS.keys()


@pytest.mark.parametrize("name", TARGETS)
def test_new_inputs(name):
    target = TARGETS[name]
    settings(max_examples=30)(given(target.inputs)(lambda value: bounded(target.check, value)))()


def test_the_fuzzer_finds_a_fault(monkeypatch):
    def check(text: str) -> None:
        assert "fault" not in text.casefold()

    monkeypatch.setitem(TARGETS, "texts", Target(TARGETS["texts"].inputs, check))
    from collections import Counter

    tried: Counter[str] = Counter()
    kind, _, value = one_round("texts", 1, tried)
    assert kind == "AssertionError at targets.py:check" or kind.startswith("AssertionError")
    assert "fault" in value.casefold()
    assert tried["texts"] > 1
