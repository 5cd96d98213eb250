"""`prefab why`: every verdict, call and answer that a preference stands on."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefab import run
from prefab.factory.errors import ConfigError
from prefab.pipelines.cli.main import app
from prefab.pipelines.quality.why import Node, why
from prefab.pipelines.store.fill import query
from tests.support import planted, project


def nodes(node: Node) -> list[Node]:
    return [node, *(inner for below in node.below for inner in nodes(below))]


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_the_tree_has_every_verdict_with_the_messages_that_were_sent(
    tmp_path: Path, kind: str
) -> None:
    panel = {"judges": [{"name": "judge", "kind": kind}]}
    run(project.pipeline(tmp_path, panel=panel), engines=planted.engine())
    store = tmp_path / "store"
    sql = "SELECT preference, prompt, a, b, p_chosen FROM preferences WHERE outcome = 'b' LIMIT 1"
    name, prompt, a, b, p = query(store, sql).rows()[0]
    found = why(store, name[:10])
    assert (found.preference, found.outcome, found.run) == (name, "b", "small@1")
    assert found.root.facts["p_chosen"] == p
    said = query(
        store,
        'SELECT principle, "order", p_a FROM verdicts WHERE prompt = $p AND a = $a AND b = $b',
        {"p": prompt, "a": a, "b": b},
    ).rows()
    shown = nodes(found.root)
    assert sorted(
        n.facts["p_a"] for n in shown if "tie_mass" in n.facts or "exactness" in n.facts
    ) == (sorted(p for _, _, p in said))
    judged = [n for n in shown if n.call and n.call.labels]
    assert len(judged) == 4  # two principles, two orders or two answers
    questions = [
        p["compare" if kind == "pairwise" else "criterion"]
        for p in project.CONSTITUTION["principles"]
    ]
    for question in questions:
        assert sum(question in n.call.messages[-1][1] for n in judged if n.call) == 2
    titles = {n.title: n.facts for n in shown}
    assert titles["run small@1"]["recipe"] == "rlaif"
    assert titles["constitution small"]["digest"] == found_constitution(store)[:8]
    assert len(titles["template judge"]["digest"]) == 8
    drafts = [facts for title, facts in titles.items() if "draft" in title]
    assert [(d["temperature"], d["max_tokens"], d["seed"]) for d in drafts] == [(1.0, 32, 0)] * 2
    texts = {n.text for n in shown}
    assert f"Question {prompt[1:]}?" in texts and any(
        text.startswith("good answer") for text in texts
    )


def found_constitution(store: Path) -> str:
    return query(store, "SELECT constitution FROM runs").rows()[0][0]


def test_bad_ids_are_told_and_the_page_holds_no_markup_of_answers(tmp_path: Path) -> None:
    def say(request):
        if not request.labels and request.messages[0].role != "system":
            return planted.Completion(f"<script>{request.repeat}</script> good answer", "stop")
        return None

    run(project.pipeline(tmp_path), engines=planted.engine(say=say))
    store = tmp_path / "store"
    with pytest.raises(ConfigError, match="has no preference"):
        why(store, "zzzz")
    with pytest.raises(ConfigError, match="has no preference"):
        why(store, "")
    name = query(store, "SELECT preference FROM preferences").rows()[0][0]
    page = tmp_path / "why.html"
    done = CliRunner().invoke(
        app, ["why", name, "--store", str(store), "--html", str(page), "--calls"]
    )
    assert done.exit_code == 0, done.output
    assert "Which answer is kinder?" in done.output and "&lt;script&gt;" in page.read_text()
    text = page.read_text()
    assert "<script>" not in text and "http" not in text.replace("http-equiv", "")
    assert (
        text.count("<pre>") >= 8 and "Which answer is kinder?" in text
    )  # messages as they were sent
