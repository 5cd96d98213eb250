"""Best-of-n: each answer is scored once, the best is a demonstration, best and worst are a pair."""

from __future__ import annotations

from math import log

import pytest

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.store import datasets, store
from prefab.factory.types import Completion
from prefab.pipelines.config.loader import resolve_pipeline
from prefab.pipelines.run.plan import plan
from prefab.pipelines.store.fill import fill
from tests.support import planted, project
from tests.support.store_rows import checked

N = 5


def recipe(folder, judges=("pointwise",), **changes):
    return project.pipeline(
        folder,
        prompts=3,
        **{
            "recipe": "best_of_n",
            "policy": {"engine": "local", "samples": N, "max_tokens": 32},
            "panel": planted.panel(judges),
            **changes,
        },
    )


def frames(folder):
    """The datasets of the last run, and the notes on what is left out."""
    notes: list[str] = []
    fill(folder)

    def work(read):
        notes.clear()
        parts = datasets.dataset_parts(read, datasets.find_run(folder, read), notes)
        return next(iter(parts)), list(parts)

    return store.read_store(folder, work)[0], notes


@pytest.mark.slow_but("3-judges2")
@pytest.mark.parametrize("judges", [["pointwise"], ["rubric"], ["pointwise", "rubric"]])
@pytest.mark.parametrize("good", [0, 3])
def test_the_best_is_a_demonstration_and_is_paired_with_a_worse_one(tmp_path, judges, good):
    value = recipe(tmp_path, judges)
    found = run(value, engines=planted.engine(good))
    assert found.state == "done" and not found.unscored
    assert found.asked == 3 * (N + N * 2 * len(judges))  # two principles
    assert found.preferences.height == 3 and set(found.preferences["chosen"]) == {good}
    assert run(value, engines=planted.engine(good)).asked == 0
    checked(tmp_path / "store")
    made, notes = frames(tmp_path / "store")
    texts = [row[0]["content"] for row in made["sft"]["completion"]]
    assert len(texts) == 3 and all(text.startswith("good answer") for text in texts)
    assert made["preference"].height == 3
    assert any("best of 5 answers" in note and "0.81 nats" in note for note in notes)


def numbers(request):
    """Answers 0 to 4; prompt 2 gets no right one, and prompt 1 only right ones."""
    text, k = request.messages[-1].content, request.repeat[0]
    said = {"Question 0?": k, "Question 1?": 4, "Question 2?": k % 3}[text]
    return Completion(f"It is {said}", "stop", None, "exact", 5, 4)


@pytest.mark.slow_but("choose1-wanted1-1")
@pytest.mark.parametrize(
    ("choose", "wanted", "below"),
    [
        ({}, ["3", "4", "0"], 0),
        ({"min_score": 1.0}, ["3", "4"], 1),
        ({"min_score": 1.0, "demonstrations": "accepted"}, ["3", "4", "4"], 8),
    ],
)
def test_rejection_sampling_keeps_what_a_program_accepts(tmp_path, choose, wanted, below):
    """Right is 3 or more: an answer below the score is no demonstration, though it is the best of
    its prompt; equal answers stand once."""
    verifier = {"name": "right", "kind": "verifier", "check": "regex", "reference": "[34]"}
    value = recipe(tmp_path, panel={"judges": [verifier]}, choose=choose)
    engine = {"local": Scripted(ScriptedConfig(), numbers)}
    found = run(value, engines=engine)
    assert dict(found.preferences["outcome"].value_counts().iter_rows()) == {"b": 1, "tie": 2}
    right = {row["n"]: row["score"] for row in found.best_of}
    # shares of right answers 2/5, 1 and 0: one is drawn right, or of two not both are wrong
    assert right == pytest.approx({1: 1.4 / 3, 2: 1.7 / 3, 4: 2 / 3, 5: 2 / 3})
    assert [row["kl"] for row in found.best_of] == pytest.approx(
        [log(n) - (n - 1) / n for n in (1, 2, 4, 5)]
    )
    made, notes = frames(tmp_path / "store")
    texts = sorted(
        (prompt[0]["content"], row[0]["content"].removeprefix("It is "))
        for prompt, row in zip(made["sft"]["prompt"], made["sft"]["completion"], strict=True)
    )
    assert [text for _, text in texts] == wanted
    assert sum(f"{below:,} answers are scored below 1" in note for note in notes) == bool(below)


def test_an_answer_without_a_score_is_neither_best_nor_worst(tmp_path):
    def say(request):
        if request.labels and "bad 4" in request.messages[-1].content:
            return Completion("?", "stop", dict.fromkeys(request.labels, -9.0), "exact", 9, 1)
        return None

    value = recipe(tmp_path, budget={"unscored": 1.0})
    found = run(value, engines=planted.engine(0, say))
    assert found.unscored == {"score low_label_mass": 6}
    assert set(found.preferences["b"]) == {3} and set(found.preferences["outcome"]) == {"a"}


def test_a_plan_is_what_the_run_asks(tmp_path):
    value = recipe(tmp_path)
    told = plan(value)
    assert told.at_most == run(value, engines=planted.engine()).asked
    assert plan(value).ask == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"panel": planted.panel(["pairwise"])}, "pairwise judges do not score one"),
        ({"panel": None}, "name one under panel.judges"),
        ({"policy": {"engine": "local", "samples": 1}}, "at least 2"),
        ({"pairs": "adjacent"}, "has no meaning in best_of_n"),
        ({"revise": {"rounds": 1}}, "has no meaning in best_of_n"),
        ({"choose": {"demonstrations": "accepted"}}, "Set choose.min_score"),
        ({"choose": {"min_score": 1}, "panel": planted.panel(["rubric"])}, "whose scale it is on"),
        ({"recipe": "rlaif", "choose": {"min_score": 1.0}}, "for the recipe best_of_n alone"),
    ],
)
def test_settings_that_contradict_are_refused_with_their_place(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        resolve_pipeline(recipe(tmp_path, **changes))
