"""A planted better answer wins through every shape of a panel and every way from answers to pairs,
whatever its place.

Every kind of judge by itself and together: `test_panel_kinds.py`; a person: `test_people.py`.
"""

from __future__ import annotations

import polars as pl
import pytest

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.types import Completion
from prefab.pipelines.store.export.base import export
from tests.support import planted, project
from tests.support.planted import panel

FEW_SHOT = """examples:
  pairwise: [{prompt: P, a: First, b: Second, prefer: b}, {prompt: P, a: Third, b: Fourth, prefer: a}]
"""
SHAPES = {
    "orders random": panel(["pairwise"], orders="random"),
    "orders first": panel(["pairwise"], orders="first"),
    "few-shot": panel(["pairwise"]),
    "repeats": panel(["pairwise", "pointwise"], repeats=2),
    "clamped reasoning": {
        "judges": [{"name": "one", "kind": "pairwise", "reasoning": True, "clamp": [0.4, 0.6]}]
    },
    "weights": panel(["pairwise", "rubric"], weights={"rubric": 3.0}),
    "log-odds": panel(["pairwise"], combine="log_odds"),
    "escalated": panel(
        ["rubric", "pairwise"], escalate={"to": ["pairwise"], "when": {"margin": 0.5}}
    ),
    "without ties": {
        "judges": [
            {"name": "one", "kind": "pairwise"},
            {"name": "two", "kind": "pairwise", "ties": False},
        ]
    },
}


@pytest.mark.slow_but(
    "orders random-0", "few-shot-2", "repeats-0", "escalated-2", "without ties-0", "log-odds-2"
)
@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_through_every_shape_of_a_panel(tmp_path, shape, good):
    value = project.pipeline(tmp_path, prompts=3, panel=SHAPES[shape])
    shown = []
    if shape == "few-shot":
        with (tmp_path / "small.yaml").open("a") as file:
            file.write(FEW_SHOT)

    def note(request):
        shown.extend(m.content for m in request.messages if request.labels)
        if (
            "A" in request.labels
            and "T" not in request.labels
            and "good" not in request.messages[-1].content
        ):
            return planted.read(
                request.labels, "A", 0.495
            )  # of two bad ones a judge without ties picks some one

    result = run(value, engines=planted.engine(good, note))
    assert result.state == "done" and not result.unscored and result.preferences.height == 9
    met = result.preferences.filter(
        (result.preferences["a"] == good) | (result.preferences["b"] == good)
    )
    assert met.height == 6 and set(met["chosen"]) == {good} and met["p_chosen"].min() > 0.55
    assert (shape == "few-shot") == any("Fourth" in text for text in shown)


@pytest.mark.slow_but("0")
@pytest.mark.parametrize("good", [0, 1, 2])
def test_through_a_reward_model(tmp_path, good):
    judge = {"name": "rm", "kind": "reward_model", "model": "somebody/reward-model"}
    rewards = Scripted(
        ScriptedConfig(),
        lambda r: Completion(
            "1.5" if r.messages[-1].content.startswith("good") else "-0.5", "stop"
        ),
    )
    result = run(
        project.pipeline(tmp_path, prompts=2, panel={"judges": [judge]}),
        engines={**planted.engine(good), "judge rm": rewards},
    )
    met = result.preferences.filter(
        (result.preferences["a"] == good) | (result.preferences["b"] == good)
    )
    assert met.height == 4 and set(met["chosen"]) == {good}
    assert met["p_chosen"].to_list() == pytest.approx([0.8807970779778823] * 4)  # 1 / (1 + e^-2)
    assert rewards.total == 6


@pytest.mark.slow_but(
    "all-None-2",
    "best_worst-None-0",
    "tournament-None-2",
    "all-best_worst-2",
    "all-bradley_terry-0",
)
@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize(
    ("pairs", "method"),
    [
        ("all", None),
        ("best_worst", None),
        ("adjacent", None),
        ("tournament", None),
        ("all", "best_worst"),
        ("all", "bradley_terry"),
        ("all", "davidson"),
    ],
)
def test_by_every_way_from_answers_to_pairs(tmp_path, pairs, method, good):
    value = project.pipeline(
        tmp_path,
        prompts=2,
        panel=panel(["pairwise"]),
        pairs=pairs,
        **({"choose": {"method": method}} if method else {}),
    )
    run(value, engines=planted.engine(good))
    export(tmp_path / "store", tmp_path / "out")
    rows = pl.concat(
        [pl.read_parquet(file) for file in (tmp_path / "out" / "preference").glob("*.parquet")]
    )
    assert set(rows["prompt_id"]) == {"p0", "p1"}
    for row in rows.iter_rows(named=True):
        assert row["chosen"][0]["content"].startswith("good") and row["rejected"][0][
            "content"
        ].startswith("bad")
        assert row["p_chosen"] > 0.6
