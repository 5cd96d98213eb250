"""From K answers to pairs: which are compared, which become pairs, and that the way stands beside
them."""

from __future__ import annotations

from math import log

import polars as pl
import pytest

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.store.datasets import choice
from prefab.factory.types import Completion
from prefab.pipelines.run.plan import plan
from prefab.pipelines.store.export.base import export
from tests.support import planted, project
from tests.support.store_rows import checked

P = {(0, 1): 0.8, (0, 2): 0.9, (1, 2): 0.7}  # of the lower number, in either order


def graded(request) -> Completion:
    """Judges who think each sample better than the next ones, by these probabilities."""
    if not request.labels:
        return project.answer(request)
    first, second = (int(part[0]) for part in request.messages[-1].content.split("draft ")[1:3])
    p = P[first, second] if first < second else 1 - P[second, first]
    return Completion(
        "A",
        "length",
        {"A": log(p), "B": log(1 - p), "T": -40.0, " A": -40.0, " B": -40.0, " T": -40.0},
    )


def graded_engine():
    return {"local": Scripted(ScriptedConfig(), graded)}


def pairs(folder, name="out"):
    """The exported pairs of all splits: the answers' numbers, p_chosen and method, with the
    card."""
    export(folder / "store", folder / name)
    frame = pl.concat(
        [pl.read_parquet(file) for file in sorted((folder / name / "preference").glob("*.parquet"))]
    )
    rows = {
        (r["prompt_id"], int(r["chosen"][0]["content"][6]), int(r["rejected"][0]["content"][6])): (
            r["p_chosen"],
            r["method"],
        )
        for r in frame.iter_rows(named=True)
    }
    return rows, (folder / name / "README.md").read_text()


def test_a_tournament_compares_winners_with_winners(tmp_path):
    value = project.pipeline(
        tmp_path,
        prompts=2,
        pairs="tournament",
        policy={"engine": "local", "samples": 5, "temperature": 1.0, "max_tokens": 32},
    )
    assert plan(value).ask == 2 * (5 + 4 * 4)  # four comparisons, two orders, two principles
    result = run(value, engines=planted.engine(3))
    met = {
        (r["a"], r["b"]): r["chosen"]
        for r in result.preferences.iter_rows(named=True)
        if r["prompt"] == "p0"
    }
    # 0-1 and 2-3 with 4 waiting; the first of a tie goes on: 0-3 with 4 waiting; 3-4
    assert met == {(0, 1): None, (2, 3): 3, (0, 3): 3, (3, 4): 3}
    assert run(value, engines=planted.engine(3)).asked == 0
    checked(tmp_path / "store")


@pytest.mark.slow
def test_a_tournament_goes_on_after_failures_and_with_escalation(tmp_path):
    judges = [{"name": "cheap", "kind": "pointwise"}, {"name": "strong", "kind": "pairwise"}]
    value = project.pipeline(
        tmp_path,
        prompts=4,
        pairs="tournament",
        budget={"failed": None},
        panel={"judges": judges, "escalate": {"to": ["strong"], "when": {"margin": 0.5}}},
    )
    run(value, engines=planted.engine(2, fail_every=4))
    result = run(value, engines=planted.engine(2))
    assert result.preferences.height == 8 and set(result.preferences["escalation"]) == {"unsure"}
    assert set(result.preferences.filter(pl.col("b") == 2)["chosen"]) == {2}
    checked(tmp_path / "store")


@pytest.mark.slow
def test_a_margin_leaves_out_what_is_nearly_even_and_says_so(tmp_path):
    value = project.pipeline(tmp_path, prompts=1, choose={"margin": 0.25})
    run(value, engines=graded_engine())
    rows, card = pairs(tmp_path)
    assert {key[1:]: round(p, 6) for key, (p, _) in rows.items()} == {(0, 1): 0.8, (0, 2): 0.9}
    assert {method for _, method in rows.values()} == {"compared"}
    assert "1 decided comparisons are within 0.25 of a half" in card


@pytest.mark.slow_but("davidson")
@pytest.mark.parametrize("method", ["bradley_terry", "davidson"])
def test_a_fit_gives_its_own_probabilities(tmp_path, method):
    """Three answers, each met once: the score equations of Bradley and Terry hold for the exported
    probabilities."""
    value = project.pipeline(tmp_path, prompts=1, choose={"method": method})
    result = run(value, engines=graded_engine())
    rows, card = pairs(tmp_path)
    p = {key[1:]: found[0] for key, found in rows.items()}
    assert p[0, 1] + p[0, 2] == pytest.approx(0.8 + 0.9, abs=1e-6)
    assert (1 - p[0, 1]) + p[1, 2] == pytest.approx(0.2 + 0.7, abs=1e-6)
    assert {found[1] for found in rows.values()} == {
        method
    } and f"pairs were chosen by {method}" in card
    strengths = result.frame("strengths").sort("index")
    assert strengths["strength"].is_sorted(descending=True) and set(strengths["method"]) == {method}
    assert strengths["strength"].sum() == pytest.approx(0, abs=1e-9)
    checked(tmp_path / "store")


def test_the_usual_choice_follows_what_is_compared():
    assert choice({"pairs": "best_worst"}) == ("best_worst", 0.0) and choice({}) == (
        "compared",
        0.0,
    )
    assert choice({"pairs": "all", "choose": {"method": "best_worst", "margin": 0.1}}) == (
        "best_worst",
        0.1,
    )
