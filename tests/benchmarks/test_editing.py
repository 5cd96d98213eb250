"""Editing a constitution of twelve principles, with the oracle as judge: what is asked, which
preferences flip."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks import editing
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.microworld import grammar, oracle, tasks
from prefab.factory.types import Completion, Engine, Message, Request
from tests.support import oraclejudge

FAULT = {fault[1]: name for name, faults in grammar.FAULTS.items() for fault in faults}


def answer(request: Request) -> Completion:
    """Drafts from the grammar, and the oracle's verdicts; it obeys a reversed question."""
    asked = request.messages[-1].content
    if not request.labels:
        verb, thing = oracle.topic(request.messages)
        rng = random.Random(f"{request.messages}{request.repeat}")
        situation = grammar.Situation(grammar.situation(rng).prompt, verb, thing)
        return Completion(tasks.candidate(rng, situation, 0.0).text, "stop")
    talk, a, b = (text for _, text in oraclejudge.FENCED.findall(asked))
    principle = next(name for gerund, name in FAULT.items() if gerund in asked)
    side = oracle.compare((Message("user", talk),), a, b, principle)
    if editing.REVERSED.split("{g}")[0] in asked:
        side = {"a": "b", "b": "a", "tie": "tie"}[side]
    label = {"a": "A", "b": "B", "tie": "T"}[side]
    masses = {label: 0.9} | {other: 0.05 for other in "ABT" if other != label}
    return oraclejudge.labels(request, masses)


def engines() -> dict[str, Engine]:
    return {"local": Scripted(ScriptedConfig(), answer)}


@pytest.mark.slow
def test_one_principles_calls_and_the_flips_of_the_oracle(
    tmp_path: Path,
) -> None:
    made, value = editing.judged_world(tmp_path, 12, engines())
    compared = sum(made.outcomes.values()) - made.identical
    assert len(value["principles"]) == 12 and compared > 50
    edit, _ = editing.one_principle(tmp_path, value, engines())
    assert edit["asked"] == 2 * edit["comparisons"] == 2 * compared
    assert edit["asked_by_reverting"] == 0
    assert edit["changes"] == ["compare of principle padding changed"]
    for principle in ("flattery", "helpful"):
        row, _ = editing.reversal(tmp_path, value, principle, engines())
        assert row["asked"] == 2 * compared and row["flip_rate"] > 0
        assert row["flip_rate"] == row["by_the_oracle"] and row["agree"] == 1.0


@pytest.mark.slow
def test_the_flips_are_those_of_judging_everything_anew(tmp_path: Path) -> None:
    _, value = editing.judged_world(tmp_path, 6, engines())
    row, found = editing.reversal(tmp_path, value, "flattery", engines())
    anew = editing.judged_anew(tmp_path, found, engines())
    assert anew["asked"] == 12 * row["asked"] and anew["comparisons"] == found.comparisons
    assert row["flip_rate"] == anew["flips"] / found.comparisons > 0
    assert anew["flips_that_diff_found"] == anew["flips"] and not anew["flips_that_only_diff_found"]
    assert anew["same_outcomes"] == found.comparisons
