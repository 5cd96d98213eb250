"""What each principle does in a run, against values derived by hand."""

from __future__ import annotations

import asyncio
import json
from math import log

import pytest
import yaml

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.types import Completion
from prefab.pipelines.quality.principle_effects import principle_effects
from prefab.pipelines.run.runner import run
from tests.support import project

PRINCIPLES = ("first", "also-first", "last", "mute", "absent")
SIDE = {"first": "ZIG", "also-first": "ZIG", "last": "ZAG"}


def answer(request):
    """The lower draft wins under `first` and `also-first`, the higher under `last` with more
    certainty; nobody wins under `mute`."""
    if project.asked(request) != "judge":
        return project.answer(request)
    text = "\n".join(m.content for m in request.messages)
    one, two = (int(part[0]) for part in text.split("draft ")[1:3])
    p = 0.5
    if "ZIG" in text:
        p = 0.7 if one < two else 0.2
    elif "ZAG" in text:
        p = 0.2 if one < two else 0.8
    tie = 0.04
    values = {"A": p * 0.9, "B": (1 - p) * 0.9, "T": tie}
    logps = {s + k: log(v if not s else 1e-4) for k, v in values.items() for s in ("", " ")}
    return Completion("A", "length", logps, "exact", 20, 1)


@pytest.fixture
def store(tmp_path):
    value = project.pipeline(tmp_path, prompts=20)
    constitution = yaml.safe_load((tmp_path / "small.yaml").read_text())
    template = constitution["principles"][0]
    constitution["principles"] = [
        {**template, "id": name, "title": name, "compare": f"{name} {SIDE.get(name, 'EVEN')}?"}
        for name in PRINCIPLES
    ]
    constitution["principles"][-1]["applies_when"] = {"tags": ["never"]}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(constitution, sort_keys=False))
    run(value, engines={"local": Scripted(ScriptedConfig(), answer)})
    return tmp_path / "store"


def test_every_figure_of_a_principle(store):
    report = principle_effects(store, "small")
    found = {e.principle: e for e in report.principles}
    assert list(found) == list(PRINCIPLES) and report.comparisons == 60
    assert found["absent"].comparisons == 0 and found["absent"].flips.undefined == "not applied"
    assert {e.comparisons for e in found.values()} == {60, 0}
    assert [found[name].decisive.value for name in PRINCIPLES[:4]] == [1, 1, 1, 0]
    # P(a) is the mean of both orders with half of the tie: (0.7 + 0.8) / 2 of the mass 0.9 of 0.94
    p = (0.75 * 0.9 + 0.02) / 0.94
    assert found["first"].strength == pytest.approx(2 * p - 1, abs=1e-3)
    assert found["last"].strength > found["first"].strength
    assert {found[n].position_consistency.value for n in ("first", "last")} == {1.0}
    # P(a) over all: first and also-first .75, last .21, mute .5: a wins; without one of the first
    # two it is a tie, and without another one nothing changes
    assert [found[n].flips.value for n in PRINCIPLES[:4]] == [1, 1, 0, 0]
    assert found["first"].flips.n_items == 60 and found["first"].alone == 0
    assert report.separated.value == 1.0 and report.n_unseparated == 0


@pytest.mark.slow
def test_principles_that_say_the_same_or_contradict(store):
    related = {(p.first, p.second): p for p in principle_effects(store).pairs}
    assert related["first", "also-first"].relation == "same"
    assert related["first", "last"].relation == "contrary"
    assert related["first", "last"].agree.value == 0.0
    assert related["first", "mute"].relation == "" and related["first", "mute"].decided == 0
    assert not any("absent" in pair for pair in related)


@pytest.mark.slow
def test_agreement_with_people_and_prompts_that_nothing_separates(store):
    ledger = Ledger.open(store)
    for i in range(6):
        for principle, winner in (("first", "a"), ("last", "a"), ("", "b")):
            label = {"prompt": f"p{i}", "a": 0, "b": 1, "winner": winner, "annotator": "ann"}
            if principle:
                label["principle"] = principle
            ledger.add_human_label(label)
    asyncio.run(ledger.close())
    found = {e.principle: e for e in principle_effects(store, gold="human").principles}
    assert (found["first"].accuracy.value, found["first"].accuracy.n_items) == (1.0, 6)
    assert found["last"].accuracy.value == 0.0 and found["last"].overall.value == 1.0
    assert found["also-first"].accuracy.value is None and found["also-first"].overall.value == 0.0


@pytest.mark.slow
def test_under_one_principle_a_comparison_nothing_is_said_of_leaving_it_out(tmp_path):
    value = project.pipeline(tmp_path, prompts=4)
    value["panel"]["selection"] = "sample_one"
    run(value, engines=project.engine())
    found = principle_effects(tmp_path / "store").principles
    assert sum(e.alone for e in found) == 12 == sum(e.comparisons for e in found)
    assert all(e.flips.value is None for e in found)


@pytest.mark.slow
def test_prompts_that_no_principle_separates_are_listed(tmp_path):
    run(project.pipeline(tmp_path), engines={"local": Scripted(ScriptedConfig(), answer)})
    report = principle_effects(tmp_path / "store")
    assert (report.n_unseparated, report.separated.value) == (6, 0)
    assert [p.prompt for p in report.unseparated] == [f"p{i}" for i in range(6)]
    assert json.dumps(report.data())  # plain data
