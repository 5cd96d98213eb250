"""The principles behind labelled pairs, with a judge that reads marks in the answers."""

from __future__ import annotations

import asyncio
import random
import re
from math import log

import numpy as np
import pytest
import yaml

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.spec.constitution import load_constitution
from prefab.factory.types import Completion, Message
from prefab.pipelines.quality.induction import (
    alike,
    as_pairs,
    choose,
    constitution_text,
    induce,
    merge,
    pairs_of_file,
    pairs_of_people,
    pairs_of_runs,
    rules_in,
)
from prefab.pipelines.run.runner import run
from tests.support import project

MARKS = ("red", "blue", "green", "loud", "calm", "tall")


def judge(request):
    """Prefers the answer that has the mark which the question names, with 0.9; else nearly even
    with a pull to the first slot. Proposes the marks of the answer that was preferred."""
    text = request.messages[-1].content
    if not request.labels:
        better = text.split("that was preferred:")[1].split("The other answer:")[0]
        rules = [f"- The answer has the word {mark} in it." for mark in MARKS if mark in better]
        return Completion("\n".join(rules) or "nothing", "stop", None, "exact", 9, 9)
    a, b = text.split("Answer A:")[1].split("Principle:")[0].split("Answer B:")
    asked = text.split("Principle:")[1]
    mark = next((mark for mark in MARKS if re.search(rf"\b{mark}\b", asked)), "none")
    p = 0.52 if (mark in a) == (mark in b) else 0.9 if mark in a else 0.1
    logps = {
        s + k: log(v if not s else 1e-4)
        for k, v in {"A": p * 0.9, "B": (1 - p) * 0.9, "T": 0.05}.items()
        for s in ("", " ")
    }
    return Completion("A", "length", logps, "exact", 20, 1)


def engine(answer=judge):
    return {"local": Scripted(ScriptedConfig(), answer)}


def marked_pairs(hidden, n=160, seed=0):
    """Pairs whose better answer has more of the hidden marks."""
    rng, rows = random.Random(seed), []
    while len(rows) < n:
        a, b = (" ".join(m for m in MARKS if rng.random() < 0.4) + f" {k}" for k in (1, 2))
        score = [sum(mark in text for mark in hidden) for text in (a, b)]
        if score[0] != score[1]:
            better, worse = (a, b) if score[0] > score[1] else (b, a)
            rows.append(((Message("user", f"Question {len(rows)}?"),), better, worse))
    return as_pairs(rows)


@pytest.fixture
def candidates(tmp_path):
    base = project.CONSTITUTION["principles"][0]
    names = [*MARKS, "none"]
    value = {
        **project.CONSTITUTION,
        "principles": [
            {**base, "id": name, "compare": f"Which answer is {name}?"} for name in names
        ],
    }
    file = tmp_path / "candidates.yaml"
    file.write_text(yaml.safe_dump(value, sort_keys=False))
    return file


@pytest.mark.slow_but("hidden0")
@pytest.mark.parametrize("hidden", [("red",), ("blue", "loud"), ("red", "green", "tall")])
def test_the_hidden_principles_are_named_and_no_others(tmp_path, candidates, hidden):
    value, pairs = project.pipeline(tmp_path), marked_pairs(hidden)
    found = induce(pairs, value, [candidates], engines=engine())
    assert {one.principle.id for one in found.principles} == set(hidden)
    assert found.accuracy.value == 1.0 and found.accuracy.low > 0.9
    assert (found.fitted, found.held_out) == (80, 80)
    assert found.asked == 160 * 7 * 2 and "likelihood-ratio test" in found.stop
    assert [one.kept for one in found.candidates].count(True) == len(hidden)
    for one in found.principles:
        assert all(one.principle.id in pair.chosen for pair in one.examples) and one.gain > 0
    again = induce(pairs, value, [candidates], engines=engine())
    assert (again.asked, again.accuracy) == (0, found.accuracy)


def test_labels_without_a_pattern_give_no_principle(tmp_path, candidates):
    rng = random.Random(1)
    rows = [
        ((Message("user", f"Q{i}?"),), *rng.sample([f"red {i}", f"tall loud {i}"], 2))
        for i in range(80)
    ]
    found = induce(as_pairs(rows), project.pipeline(tmp_path), [candidates], engines=engine())
    assert found.principles == [] and found.accuracy.undefined == "no principle was found"
    with pytest.raises(ConfigError, match="no principle explains the labels"):
        constitution_text(found)


def test_a_model_proposes_the_candidates(tmp_path):
    found = induce(marked_pairs(("blue",)), project.pipeline(tmp_path), engines=engine())
    assert [one.principle.id for one in found.principles] == ["the-answer-has-the-word-blue-in-it"]
    assert len(found.candidates) == len(MARKS)
    assert "follows this rule" in found.principles[0].principle.compare
    mute = {"local": Scripted(ScriptedConfig(), lambda request: Completion("I cannot.", "stop"))}
    value = project.pipeline(tmp_path, store=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="proposed no rule that can be read"):
        induce(marked_pairs(("blue",)), value, engines=mute)


def test_the_result_is_a_constitution_with_tests(tmp_path, candidates):
    pairs = marked_pairs(("red", "tall"))
    found = induce(pairs, project.pipeline(tmp_path), [candidates], engines=engine())
    file = tmp_path / "found.yaml"
    file.write_text(constitution_text(found, "found"))
    made = load_constitution(file)
    assert {p.id for p in made.principles} == {"red", "tall"}
    assert {test["principle"] for test in made.tests} == {"red", "tall"}
    assert all(test["principle"] in test["a"] for test in made.tests)
    assert f"of {found.held_out} held-out pairs" in file.read_text()


@pytest.mark.slow
def test_pairs_of_a_file_of_people_and_of_two_runs_that_disagree(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "P", "chosen": "good", "rejected": "bad"}\n')
    assert [(p.chosen, p.rejected) for p in pairs_of_file(file)] == [("good", "bad")]
    value = project.pipeline(tmp_path, prompts=3)
    run(value, engines=project.engine())
    with pytest.raises(ConfigError, match="nobody labelled a pair"):
        pairs_of_people(tmp_path / "store")
    ledger = Ledger.open(tmp_path / "store")
    ledger.add_human_label(
        {"prompt": "p0", "a": 0, "b": 1, "winner": "b", "annotator": "ann", "principle": ""}
    )
    asyncio.run(ledger.close())
    (pair,) = pairs_of_people(tmp_path / "store")
    assert (pair.chosen[:7], pair.rejected[:7]) == ("draft 1", "draft 0")

    def contrary(request):
        found = project.answer(request)
        if not found.label_logps:
            return found
        swap = {"A": "B", "B": "A", " A": " B", " B": " A"}
        logps = {swap.get(label, label): p for label, p in found.label_logps.items()}
        return Completion(found.text, found.finish, logps, "exact", 20, 1)

    text = (tmp_path / "small.yaml").read_text().replace("Which answer", "Whose answer")
    (tmp_path / "small.yaml").write_text(text)
    run({**value, "name": "other"}, engines={"local": Scripted(ScriptedConfig(), contrary)})
    found = pairs_of_runs(tmp_path / "store", "other", "small")
    assert len(found) == 9 and all(p.chosen > p.rejected for p in found)
    with pytest.raises(ConfigError, match="disagree on no pair"):
        pairs_of_runs(tmp_path / "store", "small", "small")


def test_a_needless_principle_is_dropped():
    rng = np.random.default_rng(0)
    one, two = rng.choice([-1.0, 1.0], (2, 400))
    flip = np.sign(one + two + 0.5 * rng.standard_normal(400))
    blurred = (one + two) * 0.7 * flip  # decides like both together
    odds = np.column_stack([one * flip, two * flip, blurred + 0.9 * rng.standard_normal(400)])
    kept, weights, _ = choose(odds, 10)
    assert sorted(kept) == [0, 1] and (weights > 0).all()
    assert choose(odds, 1)[2].startswith("1 principle is the most")


def test_of_candidates_that_the_judge_answers_alike_the_first_is_named():
    rng = np.random.default_rng(1)
    clear = np.where(rng.random(200) < 0.9, 2.0, -2.0)
    blurred = clear + 0.05 * rng.standard_normal(200)
    other = 2.0 * rng.choice([-1.0, 1.0], 200)
    odds = np.column_stack([other, blurred, clear])
    assert choose(odds[:, [0, 2]], 1)[0] == [1] and alike(odds, 2) == [1]
    assert choose(odds, 10)[0] == [1]


def test_rules_are_read_and_near_repetitions_merged():
    text = "Here:\n- Be kind to people\n2) **Be kind to all people**\n* No lists at all\n- x\nend"
    rules = rules_in(text)
    assert rules == ["Be kind to people", "Be kind to all people", "No lists at all"]
    assert merge(["No lists at all", *rules]) in (
        ["No lists at all", "Be kind to people"],
        ["Be kind to people", "No lists at all"],
    )


def test_too_few_pairs(tmp_path):
    with pytest.raises(ConfigError, match="too few labelled pairs to find principles: 3"):
        induce(marked_pairs(("red",), 3), project.pipeline(tmp_path), engines=engine())
