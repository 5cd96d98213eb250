"""Escalation: cheap judges first, a stronger one in doubt, within a share that no order of
execution can move."""

from __future__ import annotations

import random

import pytest

from prefab import run
from prefab.factory.decision import Reading, decide
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.types import Completion
from prefab.judges.escalation import When, choose, doubt, quota
from prefab.pipelines.config.loader import resolve_pipeline
from prefab.pipelines.run.plan import plan
from prefab.pipelines.store.fill import query
from tests.support import planted, project
from tests.support.planted import KINDS
from tests.support.planted import two_engines as engines
from tests.support.store_rows import checked

UNSCORED = Reading(None, reason="parse")


def of(*readings, **when):
    return doubt(decide(readings), readings, When(**when))


def test_what_calls_for_a_stronger_judge():
    sure, even, against = Reading(0.9, judge="x"), Reading(0.6, judge="x"), Reading(0.2, judge="y")
    assert of(sure) == "" and of(even) == "unsure" and of(UNSCORED) == "unscored"
    assert (
        of(Reading(0.7)) == "unsure" and of(Reading(0.70001)) == ""
    )  # within the margin, the margin included
    assert (
        of(sure, against) == "divided" and of(sure, against, disagreement=False, margin=0.04) == ""
    )
    assert of(sure, Reading(0.49, judge="y"), margin=0.0) == ""  # an even judge picks no side
    assert (
        of(
            Reading(0.9, judge="x", principle="p"),
            Reading(0.2, judge="x", principle="q"),
            margin=None,
        )
        == ""
    )
    assert (
        of(Reading(0.5, tie=0.98)) == "" and of(Reading(0.5, tie=0.02)) == "unsure"
    )  # a sure tie is no doubt
    assert of(sure, Reading(0.5, judge="x", principle="q")) == "unsure"  # one principle is enough
    assert (
        of(even, margin=None) == "" and of(UNSCORED, margin=None, disagreement=False) == "unscored"
    )


def test_a_quota_is_the_share_in_the_mean_and_depends_on_nothing_else():
    for n in (1, 3, 6):
        drawn = [quota(n, 0.33, 0, f"p{i}") for i in range(4000)]
        assert sum(drawn) / 4000 / n == pytest.approx(0.33, abs=0.03)
        assert set(drawn) <= {int(n * 0.33), int(n * 0.33) + 1}
        assert drawn == [quota(n, 0.33, 0, f"p{i}") for i in range(4000)]
    assert (quota(6, 0.5, 0, "p"), quota(6, 1.0, 0, "p"), quota(6, 0.0, 0, "p")) == (3, 6, 0)


def test_the_least_certain_are_chosen_first():
    doubts = {
        (0, 1): ("unsure", 0.6),
        (0, 2): ("", 0.99),
        (1, 2): ("unscored", None),
        (0, 3): ("unsure", 0.55),
    }
    assert choose(doubts, 2) == {(0, 1): "budget", (0, 2): "", (1, 2): "unscored", (0, 3): "unsure"}
    assert choose(doubts, 0) == {(0, 1): "budget", (0, 2): "", (1, 2): "budget", (0, 3): "budget"}


def pipeline(folder, prompts=4, cheap=("pairwise",), strong="pairwise", settings=None, **changes):
    """Cheap judges on `local`, a strong one on `big`."""
    judges = [
        {"name": f"cheap{i}", **KINDS[kind], "engine": "local"} for i, kind in enumerate(cheap)
    ]
    judges.append({"name": "strong", **KINDS[strong], "engine": "big"})
    value = project.pipeline(
        folder,
        prompts,
        panel={"judges": judges, "escalate": {"to": ["strong"], **(settings or {})}},
        **changes,
    )
    return {
        **value,
        "engines": {name: {"engine": "scripted", "model": name} for name in ("local", "big")},
    }


def test_the_strong_judge_is_asked_where_the_cheap_one_is_unsure_and_decides(tmp_path):
    made = engines()
    result = run(pipeline(tmp_path), engines=made)
    rows = result.preferences.sort("prompt", "a", "b").rows(named=True)
    even = [r for r in rows if r["prompt"] in ("p0", "p2")]
    odd = [r for r in rows if r["prompt"] in ("p1", "p3")]
    # even prompts: the cheap judge is sure, of the tie of the two bad answers too; odd ones: of
    # that tie alone
    assert {(r["a"], r["b"]): r["escalation"] for r in even} == dict.fromkeys(
        [(0, 1), (0, 2), (1, 2)], "settled"
    )
    assert {(r["a"], r["b"]): r["escalation"] for r in odd} == {
        (0, 1): "unsure",
        (0, 2): "settled",
        (1, 2): "unsure",
    }
    assert all(r["chosen"] == 1 and r["p_chosen"] > 0.9 for r in odd if 1 in (r["a"], r["b"]))
    assert all(
        r["n_readings"] == 2 for r in rows
    )  # one judge's two principles, the strong one's or not
    assert made["big"].total == 4 * 4  # 4 comparisons x 2 orders x 2 principles
    assert result.escalation == {"settled": 8, "unsure": 4, "calls": 16, "calls_if_all": 48}
    told = query(
        tmp_path / "store", "SELECT comparisons, escalated, unsure, over_budget FROM escalations"
    ).rows()
    assert told == [(12, 4, 4, 0)]
    again = run(pipeline(tmp_path), engines=engines())
    assert (
        again.asked == 0
        and again.escalation == result.escalation
        and plan(pipeline(tmp_path)).ask == 0
    )
    checked(tmp_path / "store")


def test_all_readings_count_where_the_panel_says_so(tmp_path):
    result = run(pipeline(tmp_path, settings={"decides": "all"}), engines=engines())
    escalated = result.preferences.filter(result.preferences["escalation"] == "unsure")
    settled = result.preferences.filter(result.preferences["escalation"] == "settled")
    assert set(escalated["n_readings"]) == {4} and set(settled["n_readings"]) == {2}


@pytest.mark.slow_but("cheap2-rubric")
@pytest.mark.parametrize(
    ("cheap", "strong"),
    [
        (["reasoning"], "pointwise"),
        (["rubric"], "listwise"),
        (["pairwise", "pointwise", "listwise"], "rubric"),
        pytest.param(["pairwise"], "reasoning", marks=pytest.mark.slow),
        pytest.param(["pointwise"], "pairwise", marks=pytest.mark.slow),
        pytest.param(["scale"], "rubric", marks=pytest.mark.slow),
        pytest.param(["listwise"], "pairwise", marks=pytest.mark.slow),
    ],
)
def test_a_planted_better_answer_wins_through_every_kind(tmp_path, cheap, strong):
    value = pipeline(
        tmp_path, 2, cheap, strong, {"when": {"margin": 0.5}}
    )  # everything is in doubt
    result = run(value, engines=engines(good=2))
    rows = result.preferences.filter(
        (result.preferences["a"] == 2) | (result.preferences["b"] == 2)
    )
    assert (
        rows.height == 4
        and set(rows["chosen"]) == {2}
        and set(rows["escalation"]) <= {"unsure", "divided"}
    )
    assert run(value, engines=engines(good=2)).asked == 0
    checked(tmp_path / "store")


def test_judges_that_pick_different_sides_are_divided(tmp_path):
    judges = [
        {"name": "one", "kind": "pairwise", "engine": "local"},
        {"name": "two", "kind": "pairwise", "engine": "big"},
        {"name": "strong", "kind": "pointwise", "engine": "big"},
    ]
    value = pipeline(tmp_path, prompts=2)
    value["panel"] = {"judges": judges, "escalate": {"to": ["strong"], "when": {"margin": None}}}

    def wrong(request):
        if "A" in request.labels:
            seen = planted.SEEN.findall(request.messages[-1].content)
            return planted.read(
                request.labels, "T" if "good" not in seen else "B" if seen[0] == "good" else "A"
            )
        return None

    result = run(
        value,
        engines={
            **planted.engine(1, wrong, model="local"),
            "big": Scripted(ScriptedConfig(model="big"), planted.answer),
        },
    )
    outcomes = {
        (r["a"], r["b"]): (r["escalation"], r["chosen"])
        for r in result.preferences.iter_rows(named=True)
    }
    assert outcomes == {(0, 1): ("divided", 1), (1, 2): ("divided", 1), (0, 2): ("settled", None)}
    checked(tmp_path / "store")


def test_what_the_cheap_judge_cannot_read_goes_to_the_strong_one(tmp_path):
    def mute(request):
        lost = "A" in request.labels
        return Completion("", "length", dict.fromkeys(request.labels, -9.0)) if lost else None

    value = pipeline(tmp_path, 2, settings={"when": {"margin": None}}, budget={"unscored": None})
    result = run(value, engines=engines(say=mute))
    assert set(result.preferences["escalation"]) == {"unscored"}
    assert set(result.preferences.filter(result.preferences["outcome"] != "tie")["chosen"]) == {1}
    assert "unscored" not in set(result.preferences["outcome"])


@pytest.mark.slow
@pytest.mark.parametrize("share", [pytest.param(0.0, marks=pytest.mark.slow), 0.4])
def test_a_share_is_kept_whatever_comes_first(tmp_path, share):
    found = []
    for at_once, delay in ((1, 0.0), (5, 0.002)):
        folder = tmp_path / f"{at_once}"
        folder.mkdir()
        value = pipeline(folder, 30, settings={"max_share": share, "when": {"margin": 0.5}})
        made = engines(max_in_flight=at_once, delay_s=delay)
        result = run(value, engines=made)
        told = result.escalation
        n = told.get("unsure", 0)
        assert n + told.get("budget", 0) == 90 and n / 90 == pytest.approx(share, abs=0.08)
        assert made["big"].total == 4 * n == told["calls"] and told["calls_if_all"] == 360
        found.append(
            sorted(result.preferences.select("prompt", "a", "b", "escalation", "p_a").rows())
        )
    checked(folder / "store")
    assert found[0] == found[1]


@pytest.mark.slow
def test_nothing_is_escalated_before_every_cheap_answer_is_there(tmp_path):
    value = pipeline(tmp_path, 8, budget={"failed": None})
    for n in (4, 9):
        run(value, engines=engines(fail_every=n))
        early = query(
            tmp_path / "store", "SELECT count(*) FROM preferences WHERE escalation IS NULL"
        ).rows()
        assert early == [(0,)]
    healed = run(value, engines=engines())
    (tmp_path / "clean").mkdir()
    clean = run(pipeline(tmp_path / "clean", 8), engines=engines())
    columns = ["prompt", "a", "b", "p_a", "outcome", "escalation", "n_readings"]
    frames = [r.preferences.select(columns).sort(columns) for r in (healed, clean)]
    assert healed.failed == 0 and frames[0].height == 24 and frames[0].equals(frames[1])
    assert not checked(tmp_path / "store")["work"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_a_run_stopped_anywhere_escalates_the_same(tmp_path, seed):
    value = pipeline(tmp_path, 6, ["pairwise", "pointwise"], "reasoning", {"max_share": 0.5})
    rng = random.Random(seed)
    for _ in range(20):
        calls = rng.randrange(1, 40)
        stopped = run({**value, "budget": {"calls": calls}}, engines=engines(max_in_flight=2))
        waiting = query(
            tmp_path / "store", "SELECT coalesce(sum(prompts), 0)::INT FROM waiting"
        ).rows()[0][0]
        assert (stopped.state == "done") == (stopped.preferences.height == 18), waiting
        if stopped.state == "done":
            break
    last = run(value, engines=engines())
    (tmp_path / "clean").mkdir()
    clean = run({**value, "store": str(tmp_path / "clean")}, engines=engines())
    columns = ["prompt", "a", "b", "p_a", "outcome", "escalation", "n_readings"]
    assert (
        last.preferences.select(columns)
        .sort(columns)
        .equals(clean.preferences.select(columns).sort(columns))
    )
    checked(tmp_path / "store")


def test_a_plan_estimates_what_hangs_on_answers_still_to_come(tmp_path):
    value = pipeline(tmp_path, 10, settings={"max_share": 0.5})
    rows = {(row.judge, row.principle): row for row in plan(value).rows if row.role == "judge"}
    assert rows["cheap0", "kind"].ask == 60
    assert rows["strong", "kind"].ask == rows["strong", "kind"].estimated == 60 - round(60 * 0.67)
    run(value, engines=engines())
    assert plan(value).ask == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"to": ["stronk"]},
            'panel.escalate.to[0]: no judge is named "stronk"; did you mean "strong"',
        ),
        ({"to": ["strong", "cheap0"]}, "panel.escalate.to: names every judge"),
        ({"to": []}, "panel.escalate.to"),
        ({"max_share": 2}, "panel.escalate.max_share"),
        ({"when": {"margn": 0.1}}, 'did you mean "margin"'),
        ({"decides": "both"}, "panel.escalate.decides"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(tmp_path, settings, words):
    with pytest.raises(ConfigError) as caught:
        resolve_pipeline(pipeline(tmp_path, settings=settings))
    assert words in str(caught.value)


@pytest.mark.parametrize("model", ["prefab-tiny", "prefab-nano"])
def test_the_embedded_models_are_not_asked_to_rank(tmp_path, model):
    value = project.pipeline(tmp_path, panel={"judges": [{"name": "ranks", "kind": "listwise"}]})
    value["engines"] = {"local": {"engine": "vllm", "model": model}}
    with pytest.raises(ConfigError, match=r"panel.judges\[0\].kind: .*not trained to rank"):
        resolve_pipeline(value)


def test_where_no_principle_applies_a_program_has_the_last_word(tmp_path):
    value = pipeline(tmp_path, 2)
    value["panel"]["judges"][0] = {
        "name": "right",
        "kind": "verifier",
        "check": "regex",
        "reference": "^good",
    }
    text = (
        (tmp_path / "small.yaml")
        .read_text()
        .replace("- id:", "- applies_when: {tags: [never]}\n  id:")
    )
    (tmp_path / "small.yaml").write_text(text)
    result = run(value, engines=engines())
    assert set(result.preferences["escalation"]) == {"settled"} and result.preferences.height == 6
    assert not checked(tmp_path / "store")["work"]
