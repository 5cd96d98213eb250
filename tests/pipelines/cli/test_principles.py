"""plan, render, principles and induce as a user runs them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from prefab.pipelines.cli.main import app
from prefab.pipelines.run.runner import run
from tests.pipelines.quality.test_induction import engine, marked_pairs
from tests.support import project


def told(*words):
    """What a command prints, with its errors."""
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    path = project.write(folder, project.pipeline(folder, prompts=4))
    run(path, engines=project.engine())
    return folder


def test_a_plan_names_reasons_principles_and_roles(made):
    shown = told("plan", made / "pipeline.yaml")
    assert shown.exit_code == 0, shown.output
    for words in ("continues small@1", "0 new calls", "kind", "the policy judges its own answers"):
        assert words in shown.output
    shown = told("plan", made / "pipeline.yaml", "--set", "policy.samples=4")
    assert "policy.samples: 3 is now 4" in shown.output and "at most" in shown.output
    value = json.loads(told("plan", made / "pipeline.yaml", "--json").stdout)
    assert (value["ask"], value["at_most"], value["counted"]) == (0, 0, 4)
    assert [p["comparisons"] for p in value["principles"]] == [12, 12]


def test_render_shows_messages_and_what_is_read(made):
    shown = told("render", "pairwise", made / "pipeline.yaml", "--sample", 2)
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("[user]") == 2 and "reads 'A' 'B' 'T'" in shown.output
    (call,) = json.loads(told("render", "policy", made / "pipeline.yaml", "--json").stdout)
    assert call["stage"] == "policy" and call["messages"][0][1].startswith("Question")


def test_principles_tells_what_each_does(made):
    shown = told("principles", "small", "--store", made / "store")
    assert shown.exit_code == 0, shown.output
    assert "small@1 · 12 comparisons of 4 prompts" in shown.output and "brief" in shown.output
    value = json.loads(told("principles", "--store", made / "store", "--json").stdout)
    assert [p["comparisons"] for p in value["principles"]] == [12, 12]
    assert told("principles", "nobody", "--store", made / "store").exit_code != 0


def test_induce_refuses_what_it_cannot_use(made, tmp_path):
    pipeline = made / "pipeline.yaml"
    (tmp_path / "few.jsonl").write_text('{"prompt": "P", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "there.yaml").write_text("id: x\n")
    for words, why in (
        (("--pairs", tmp_path / "few.jsonl"), "too few labelled pairs to find principles: 1"),
        (("--pairs", tmp_path / "few.jsonl", "--run", "small"), "leave --run and --against out"),
        (("--store", made / "store"), "nobody labelled a pair"),
        (("--out", tmp_path / "there.yaml"), "exists already"),
    ):
        shown = told("induce", pipeline, *words)
        assert shown.exit_code != 0 and why in str(shown.exception), (words, shown.output)


def test_induce_writes_a_constitution(made, tmp_path):
    from prefab.pipelines.quality import induction

    rows = [
        {"prompt": p.prompt.messages[0].content, "chosen": p.chosen, "rejected": p.rejected}
        for p in marked_pairs(("red",), 80)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pipeline, pairs = made / "pipeline.yaml", induction.pairs_of_file(tmp_path / "pairs.jsonl")
    induction.induce(pairs, pipeline, engines=engine(), store=tmp_path / "kept")
    shown = told(
        *("induce", pipeline, "--pairs", tmp_path / "pairs.jsonl", "--store", tmp_path / "kept"),
        *("--out", tmp_path / "found.yaml"),
    )
    assert shown.exit_code == 0, shown.output + str(shown.exception)
    assert "0 asked" in shown.output and "word-red" in (tmp_path / "found.yaml").read_text()
    assert told("check", tmp_path / "found.yaml").exit_code == 0
