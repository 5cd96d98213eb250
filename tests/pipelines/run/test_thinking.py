"""Models that think before they answer: the thinking is a column of its own, and judges, critics
and revisers see answers alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.thinking import join_thinking
from prefab.pipelines.store.fill import query
from tests.support import project

THOUGHT = "Perhaps None. Perhaps Fault, or answer A, or draft 7 of it?"
WAYS = {
    "closed": lambda text: f"<think>\n{THOUGHT}\n</think>\n\n{text}",
    "opened by the template": lambda text: f"{THOUGHT}\n</think>\n\n{text}",
    "given apart": lambda text: join_thinking(THOUGHT, text),
}


def thinks(way, seen: list[str]):
    """The small project's model, which thinks before everything but a label read."""

    def answer(request):
        seen.extend(m.content for m in request.messages)
        found = project.answer(request)
        return found if "A" in request.labels else replace(found, text=way(found.text))

    return {"local": Scripted(ScriptedConfig(), answer)}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_judges_critics_and_revisers_see_answers_alone(tmp_path, way):
    value = project.pipeline(tmp_path, prompts=2, revise={"rounds": 1})
    seen: list[str] = []
    assert run(value, engines=thinks(way, seen)).state == "done"
    assert len(seen) > 20 and not any(THOUGHT in text or "think>" in text for text in seen)
    samples = query(value["store"], "SELECT text, thinking FROM samples").rows()
    assert samples and all(text.startswith(("draft ", "mended ")) for text, _ in samples)
    critiques = query(value["store"], "SELECT fault, text, thinking FROM critiques").rows()
    assert {(fault, text) for fault, text, _ in critiques} == {
        (True, "Fault: it is unkind."),
        (False, "None."),
    }
    assert {row[-1] for row in (*samples, *critiques)} == {THOUGHT}


def test_an_unfinished_thought_is_no_answer(tmp_path):
    def answer(request):
        found = project.answer(request)
        cut = project.asked(request) == "sample" and request.repeat[0] == 1
        return replace(found, text=f"<think>\n{THOUGHT}", finish="length") if cut else found

    value = project.pipeline(tmp_path, prompts=2, budget={"unscored": None})
    report = run(value, engines={"local": Scripted(ScriptedConfig(), answer)})
    assert report.state == "done"
    rows = query(
        value["store"], 'SELECT "index", text IS NULL, reason, thinking FROM samples ORDER BY 1'
    ).rows()
    assert [row for row in rows if row[0] == 1] == [(1, True, "truncated", THOUGHT)] * 2
    assert all(row[1:] == (False, None, None) for row in rows if row[0] != 1)
    compared = query(value["store"], "SELECT DISTINCT a, b FROM verdicts").rows()
    assert compared == [(0, 2)]
