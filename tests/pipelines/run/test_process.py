"""Process labels: each step of an answer judged by itself, kept in the store, and made again from
the ledger."""

from __future__ import annotations

from math import log

import pytest

from prefab import query, run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.steps import step_spans
from prefab.factory.types import Completion
from prefab.pipelines.store.fill import fill
from tests.support import project
from tests.support.store_rows import checked

VERIFIER = {"name": "right", "kind": "verifier", "check": "regex", "reference": "[34]"}


@pytest.mark.parametrize(
    ("by", "text", "steps"),
    [
        ("line", "one\n\n  two \nthree", ["one", "  two", "three"]),
        ("line", "", []),
        ("line", " \n\t\n", []),
        ("paragraph", "a\nb\n\n \n c\nd\n", ["a\nb", "c\nd"]),
        ("paragraph", "\n\na", ["a"]),
    ],
)
def test_steps_of_a_text(by, text, steps):
    assert [text[slice(*span)] for span in step_spans(text, by)] == steps


def answer(request):
    """Three steps, of which those with a 3 or a 4 are right; a judge says No (no fault) to an
    answer that has no x so far, and nothing of a text with a question mark in its third line."""
    text, k = request.messages[-1].content, (request.repeat or (0,))[0]
    if not request.labels:
        return Completion(f"so 3\n\nso x{k}\nso 4{'?' if k else '.'}", "stop", None, "exact", 5, 9)
    if "so 4?" in text:
        return Completion("?", "length", dict.fromkeys(request.labels, -9.0), "exact", 20, 1)
    yes = 0.9 if "so x" in text else 0.2
    logps = {label: log({"Yes": yes, "No": 1 - yes}.get(label, 1e-9)) for label in request.labels}
    return Completion("No", "length", logps, "exact", 20, 1)


def recipe(folder, judges, **changes):
    more = {"recipe": "process", "panel": {"judges": judges}, "budget": {"unscored": 1.0}}
    policy = {"engine": "local", "samples": 2, "max_tokens": 32}
    return project.pipeline(folder, prompts=2, policy=policy, **{**more, **changes})


STEPS = 'SELECT "index", step, text, principle, p_right, reason FROM steps ORDER BY ALL'


def rows(folder):
    fill(folder)
    return query(folder, STEPS).rows()


def test_a_program_judges_each_line(tmp_path):
    value = recipe(tmp_path, [VERIFIER], steps={"shows": "step"})
    engines = {"local": Scripted(ScriptedConfig(), answer)}
    found = run(value, engines=engines)
    assert found.state == "done" and found.asked == 2 * 2 + 5  # each text once
    assert run(value, engines=engines).asked == 0
    checked(tmp_path / "store")
    of_first = [row[:5] for row in rows(tmp_path / "store") if row[0] == 0][::2]
    assert of_first == [
        (0, 0, "so 3", "", 1.0),
        (0, 1, "so x0", "", 0.0),
        (0, 2, "so 4.", "", 1.0),
    ]


def test_a_judge_is_shown_the_answer_up_to_the_step(tmp_path):
    value = recipe(tmp_path, [{"name": "judge", "kind": "rubric"}])
    found = run(value, engines={"local": Scripted(ScriptedConfig(), answer)})
    assert found.state == "done" and found.asked == 2 * (2 + 5 * 2)  # two principles
    checked(tmp_path / "store")
    told = {
        (index, step): (p, reason)
        for index, step, _, principle, p, reason in rows(tmp_path / "store")
        if principle == "kind"
    }
    assert told[0, 0] == (pytest.approx(0.8), None)
    assert told[0, 1] == told[0, 2] == (pytest.approx(0.1), None)
    assert told[1, 2] == (None, "low_label_mass")
    unscored = "SELECT role, n FROM unscored WHERE role = 'step'"
    assert query(tmp_path / "store", unscored).rows() == [("step", 4)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"panel": None}, "needs judges that score steps"),
        ({"panel": {"judges": [{"name": "j", "kind": "pairwise"}]}}, "pairwise judges do not"),
        ({"pairs": "adjacent"}, "compares no answers"),
        ({"recipe": "rlaif"}, "is for the recipe process alone"),
        (
            {"panel": {"judges": [{"name": "j", "kind": "reward_model", "model": "prefab-nano"}]}},
            "no probability that a step is right",
        ),
    ],
)
def test_what_process_labels_cannot_be_made_of(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        run(recipe(tmp_path, [VERIFIER], **{"steps": {"by": "line"}, **changes}))
