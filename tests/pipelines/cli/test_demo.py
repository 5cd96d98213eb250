"""The demo's figures, on answers whose truth is known by hand, by a judge and a critic that are
right by construction."""

from __future__ import annotations

import json
from math import log

import orjson
import pytest

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.microworld import oracle
from prefab.factory.types import Completion, Message
from prefab.pipelines.cli.demo import (
    FIRST_NAME,
    NO_PRINCIPLE,
    PRESET,
    AnswerQuality,
    _preferences,
    demo,
    measure,
    show,
)
from prefab.pipelines.run.runner import run
from prefab.pipelines.store.fill import query
from prefab.pipelines.store.ground_truth import truth
from tests.support.json_output import check

GOOD = "To paint the boat, sand the surface and add two thin coats."
RUDE = "You are too slow to do this. "
ANSWERS = (GOOD, RUDE + GOOD)  # drafts 0 and 1: 1 breaks respect, and nothing else


def knows(request):
    """The policy is rude every second time; the critic sees it, the reviser mends it, the judge
    prefers the other."""
    text = request.messages[-1].content
    if "A" in request.labels:
        first, second = (part.split("</")[0] for part in text.split("Answer ")[1:3])
        a, b = (0.9, 0.05) if RUDE not in first and RUDE in second else (0.05, 0.9)
        a, b, t = (a, b, 0.04) if "insult" in text else (0.02, 0.02, 0.95)
        return Completion("A", "length", {"A": log(a), "B": log(b), "T": log(t)}, "exact", 50, 1)
    if request.messages[0].role != "system":
        return Completion(ANSWERS[request.repeat[0] % 2], "stop")
    if "Reply with None" in text:
        return Completion(
            "Fault: it insults." if "insult" in text and RUDE in text else "None.", "stop"
        )
    return Completion(GOOD, "stop")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two ways of asking how to paint a boat."""
    file = tmp_path_factory.mktemp("demo") / "prompts.jsonl"
    file.write_text(
        '{"prompt": "How do I paint a boat?"}\n{"prompt": "Please tell me how I paint a boat."}\n'
    )
    return file


def test_the_truth_beside_the_labels(prompts):
    sets = [f"store={prompts.parent / 'store'}", f"prompts={{source: '{prompts}'}}"]
    result = run(PRESET, sets, engines={"local": Scripted(ScriptedConfig(), knows)})
    truth = measure(result)
    drafts, revised = truth["drafts"], truth["revised"]
    assert (drafts.n, drafts.broken, drafts.helps, drafts.coherent) == (8, 0.5, 1.0, 1.0)
    assert (revised.broken, revised.helps, truth["changed"]) == (0.0, 1.0, 4)
    by = {row.principle: row for row in truth["accuracy"]}
    assert (by["respect"].decided, by["respect"].right, by["respect"].consistent) == (6, 1.0, 1.0)
    assert (by["privacy"].ties, by["privacy"].ties_seen) == (6, 1.0)
    assert truth["preferences"] == {
        "outcomes": {"a": 4, "b": 2},
        "gold_decided": 6,
        "both_decided": 6,
        "right": 1.0,
        "right_of_all": 1.0,
    }


def test_a_preference_that_is_a_tie_is_none_that_is_right(capsys):
    talk = (Message("user", "How do I paint a boat?"),)
    texts = {("p", 0): {"text": GOOD}, ("p", 1): {"text": "I cannot assist with this request."}}
    rows = [{"prompt": "p", "a": 0, "b": 1, "outcome": outcome} for outcome in ("a", "tie")]
    told = _preferences(rows, {"p": talk}, texts)
    assert (told["gold_decided"], told["both_decided"]) == (2, 1)
    assert (told["right"], told["right_of_all"]) == (1.0, 0.5)
    drafts = AnswerQuality(1, 0.0, 0.0, 1.0, 1.0, 12.0)
    show({"preferences": told, "drafts": drafts, "revised": drafts, "changed": 0, "accuracy": []})
    said = " ".join(capsys.readouterr().out.split())
    assert "in 50.0% of them (100.0% of the 1 that they decide)" in said


@pytest.mark.parametrize(
    "judge",
    [
        {
            "name": "long",
            "kind": "verifier",
            "check": "regex",
            "reference": "too slow",
        },  # wrong by construction
        {"name": "rude", "kind": "verifier", "check": "regex", "reference": "^To"},
    ],
    ids=lambda j: j["name"],
)
def test_a_judge_without_a_principle_is_measured_by_the_gold_score(prompts, tmp_path, judge):
    sets = [
        f"store={tmp_path / 'store'}",
        f"prompts={{source: '{prompts}'}}",
        f"panel.judges=[{json.dumps(judge)}]",
        "pairs=all",
    ]
    told = measure(run(PRESET, sets, engines={"local": Scripted(ScriptedConfig(), knows)}))[
        "accuracy"
    ]
    assert [row.principle for row in told] == [NO_PRINCIPLE, "all"]
    row = told[0]
    assert (row.readings, row.decided, row.ties) == (8, 8, 0)  # equal drafts are not compared
    assert (
        row.right == float(judge["name"] == "rude")
        and row.consistent is None
        and row.ties_seen is None
    )


def test_no_truth_is_made_up_of_principles_that_the_oracle_does_not_know():
    kind, rude = (
        oracle.assess((Message("user", "How do I paint a boat?"),), text) for text in ANSWERS
    )
    assert (
        truth(kind, rude, "respect") == truth(kind, rude, "") == "a"
        and truth(rude, kind, "") == "b"
    )
    assert truth(kind, rude, "privacy") == truth(kind, kind, "") == "tie"
    assert truth(kind, rude, "modesty") is None


def test_the_demo_tells_its_steps_and_shows_one_prompt_first(prompts, tmp_path, capsys):
    store, scripted = tmp_path / "my store", Scripted(ScriptedConfig(), knows)
    sets = [f"prompts={{source: '{prompts}'}}"]
    stopped: list[int] = []
    scripted.stop = lambda: _count(stopped)  # type: ignore[method-assign]
    code = demo(store, None, False, sets, False, False, print, engines={"local": scripted})
    told, asides = capsys.readouterr()
    assert code == 0 and len(stopped) == 1  # one server for both runs
    runs = query(store, "SELECT name FROM runs ORDER BY run")["name"].to_list()
    assert runs == [FIRST_NAME, "demo"]
    first, second, third = (told.index(f"{number} of 3") for number in (1, 2, 3))
    assert (
        first < told.index("Fault: it insults.") < told.index(f"revision  {GOOD}") < second < third
    )
    assert "in 100.0% of them (100.0% of the" in " ".join(told[third:].split())
    assert f"next: prefab agreement --store '{store}'" in asides
    printed: list[dict] = []
    assert demo(store, None, False, sets, False, True, printed.append, {"local": scripted}) == 0
    check(["demo", "--json"], orjson.dumps(printed[0], default=str).decode())
    assert printed[0]["preferences"]["right"] == 1.0


async def _count(stopped):
    stopped.append(1)
