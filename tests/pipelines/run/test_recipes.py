"""Recipes and the runner, on real files and the scripted engine."""

from __future__ import annotations

import asyncio
import json
import sqlite3

import pytest
import yaml

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError, EngineError, TransportError
from prefab.factory.ledger.checksums import row_crc
from prefab.factory.types import Completion, Request
from prefab.pipelines.cli.run_report import report
from prefab.pipelines.quality import agreement
from prefab.pipelines.run.context import policy_sampling
from prefab.pipelines.run.plan import plan
from prefab.pipelines.run.runner import RunResult, at_work, resolve_pipeline, run_async
from tests.support import project


def test_rlaif_asks_every_pair_in_both_orders_and_keeps_probabilities(tmp_path):
    engines = project.engine()
    result = run(project.pipeline(tmp_path), engines=engines)
    # 6 prompts x (3 samples + 3 pairs x 2 orders x 2 principles)
    assert (result.state, result.prompts, result.asked, result.reused) == (
        "done",
        6,
        6 * (3 + 12),
        0,
    )
    assert (
        result.samples.height == 18
        and result.verdicts.height == 72
        and result.preferences.height == 18
    )
    preferences = result.preferences
    assert set(preferences["outcome"]) == {"a"} and set(preferences["chosen"]) == {0, 1}
    # P = (A + T/2) / (A + B + T) over both spellings; un-swapped mean of both orders, by hand
    ab = (0.801 + 0.041 / 2) / (0.801 + 0.151 + 0.041)
    ba = 1 - (0.301 + 0.041 / 2) / (0.301 + 0.651 + 0.041)
    assert preferences["p_chosen"].to_list() == pytest.approx([(ab + ba) / 2] * 18)


def test_running_again_asks_nothing_and_another_name_shares_the_answers(tmp_path):
    first = run(project.pipeline(tmp_path), engines=project.engine())
    again = run(project.pipeline(tmp_path), engines=project.engine())
    other = run(project.pipeline(tmp_path, name="other"), engines=project.engine())
    assert (again.asked, again.reused, again.resumed, again.version) == (0, first.asked, True, 1)
    assert (other.asked, other.reused) == (0, first.asked)
    columns = ["prompt", "a", "b", "p_a", "outcome"]
    frames = [r.preferences.select(columns).sort(columns) for r in (first, again, other)]
    assert frames[0].equals(frames[1]) and frames[0].equals(frames[2])


def test_editing_one_principle_asks_exactly_its_calls_again(tmp_path):
    value = project.pipeline(tmp_path)
    run(value, engines=project.engine())
    constitution = yaml.safe_load((tmp_path / "small.yaml").read_text())
    constitution["title"] = "Another title"
    constitution["principles"][1]["compare"] = "Which answer is much briefer?"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(constitution, sort_keys=False))
    told = plan(value)
    assert [(r.principle, r.ask) for r in told.rows if r.ask] == [("brief", 36)]
    assert told.changes == ["compare of principle brief changed"]
    assert [list(r.why) for r in told.rows if r.ask] == [told.changes]
    result = run(value, engines=project.engine())
    assert (result.asked, result.version) == (36, 2)


def test_equal_texts_are_a_tie_and_never_asked(tmp_path):
    def same(request):
        return (
            Completion("equal", "stop")
            if project.asked(request) == "sample"
            else project.answer(request)
        )

    result = run(project.pipeline(tmp_path), engines={"local": Scripted(ScriptedConfig(), same)})
    assert (result.asked, result.identical) == (18, 18)
    assert result.verdicts.height == 0 and set(result.preferences["outcome"]) == {"tie"}


def test_sweep_revises_each_fault_on_the_revised_text_and_keeps_everything(tmp_path):
    value = project.pipeline(
        tmp_path, prompts=2, recipe="cai", revise={"rounds": 2, "select": "sweep"}
    )
    value.pop("panel")
    engines = project.engine()
    result = run(value, engines=engines)
    rows = result.samples.sort("prompt", "index").rows(named=True)
    drafts, revisions = [r for r in rows if r["parent"] < 0], [r for r in rows if r["parent"] >= 0]
    assert len(drafts) == 6 and len(revisions) == 6
    assert {r["principle"] for r in revisions} == {"kind"} and {r["text"] for r in revisions} == {
        "mended 0",
        "mended 1",
        "mended 2",
    }
    assert [r["parent"] for r in revisions[:3]] == [0, 1, 2]
    # round 0: 2 principles on 6 drafts; round 1: on the 6 revised texts, of which three are new to
    # each prompt
    assert result.critiques.height == 24 and result.critiques["fault"].sum() == 6


def test_a_revision_of_a_second_fault_stands_on_the_first(tmp_path):
    def always(request):
        kind = project.asked(request)
        if kind == "critique":
            return Completion("Fault: bad.", "stop")
        return (
            Completion(
                request.messages[-1].content.split("\n")[0][:3]
                + str(len(request.messages[-1].content)),
                "stop",
            )
            if kind == "revise"
            else project.answer(request)
        )

    value = project.pipeline(
        tmp_path, prompts=1, recipe="cai", revise={"rounds": 1, "select": "sweep"}
    )
    value.pop("panel")
    value["policy"]["samples"] = 1
    rows = (
        run(value, engines={"local": Scripted(ScriptedConfig(), always)})
        .samples.sort("index")
        .rows(named=True)
    )
    assert [(r["index"], r["parent"], r["principle"]) for r in rows] == [
        (0, -1, ""),
        (1, 0, "kind"),
        (2, 1, "brief"),
    ]


def test_draw_takes_one_principle_a_round(tmp_path):
    value = project.pipeline(
        tmp_path,
        prompts=8,
        recipe="cai",
        revise={"rounds": 3, "select": "draw", "temperature": 1.0},
    )
    value.pop("panel")
    result = run(value, engines=project.engine())
    assert result.critiques.height == 8 * 3 * 3
    assert set(result.critiques["principle"]) == {"kind", "brief"}


def test_an_unreadable_critique_is_counted_and_revises_nothing(tmp_path):
    def mumbles(request):
        return (
            Completion("Hm.", "stop")
            if project.asked(request) == "critique"
            else project.answer(request)
        )

    value = project.pipeline(tmp_path, recipe="cai", revise={"rounds": 1, "select": "sweep"})
    result = run(value, engines={"local": Scripted(ScriptedConfig(), mumbles)})
    assert result.unscored == {"critique parse": 36}
    assert result.samples.filter(result.samples["parent"] >= 0).height == 0


def test_prompts_longer_than_the_context_are_typed_and_the_rest_goes_on(tmp_path):
    value = project.pipeline(tmp_path, budget={"unscored": None})
    rows = (
        (tmp_path / "prompts.jsonl").read_text()
        + json.dumps({"id": "long", "prompt": "word " * 500})
        + "\n"
    )
    (tmp_path / "prompts.jsonl").write_text(rows)
    result = run(value, engines=project.engine(max_model_len=300))
    assert result.state == "done" and result.prompts == 7
    assert result.unscored == {"sample context": 3}
    assert result.preferences.height == 18
    assert set(result.samples.filter(result.samples["prompt"] == "long")["reason"]) == {"context"}


def test_failures_in_transport_heal_in_the_next_run(tmp_path):
    value = project.pipeline(tmp_path, budget={"failed": None})
    broken = run(value, engines=project.engine(fail_every=5))
    assert broken.failed > 0 and broken.preferences.height < 18
    healed = run(value, engines=project.engine())
    assert healed.failed == 0 and healed.preferences.height == 18
    clean = run(project.pipeline(tmp_path, store=str(tmp_path / "clean")), engines=project.engine())
    columns = ["prompt", "a", "b", "p_a", "outcome"]
    assert (
        healed.preferences.select(columns)
        .sort(columns)
        .equals(clean.preferences.select(columns).sort(columns))
    )


def test_an_engine_that_fails_for_good_stops_the_run_with_its_reason(tmp_path):
    class Dead(Scripted):
        async def start(self):
            from prefab.factory.errors import EngineError

            raise EngineError("no server here")

    with pytest.raises(Exception, match="no server here"):
        run(project.pipeline(tmp_path), engines={"local": Dead()})


def test_budgets_stop_a_run_and_what_was_answered_is_kept(tmp_path):
    def mute(request):
        logps = dict.fromkeys(request.labels, -9.0)
        return Completion("", "length", logps) if request.labels else project.answer(request)

    value = project.pipeline(tmp_path, prompts=60)
    result = run(value, engines={"local": Scripted(ScriptedConfig(max_in_flight=8), mute)})
    assert (
        result.state == "budget"
        and "budget.unscored of 5.0%" in result.reason
        and "low_label_mass" in result.reason
    )
    assert 200 <= result.asked < 60 * 15
    capped = run(
        project.pipeline(
            tmp_path, store=str(tmp_path / "capped"), prompts=60, budget={"calls": 100}
        ),
        engines=project.engine(max_in_flight=4),
    )
    assert capped.state == "budget" and 100 <= capped.asked < 300
    freed = run(
        project.pipeline(tmp_path, store=str(tmp_path / "capped"), prompts=60),
        engines=project.engine(),
    )
    assert freed.state == "done" and freed.reused >= capped.asked


@pytest.mark.slow
def test_shares_are_checked_at_the_end_of_a_short_run_and_its_answers_kept(tmp_path):
    value = project.pipeline(
        tmp_path,
        prompts=4,
        pairs="adjacent",
        panel={"judges": [{"name": "judge", "kind": "pairwise"}], "orders": "random"},
    )
    value["policy"]["samples"] = 2
    failing = run(value, engines=project.engine(fail_every=2))
    n = failing.asked + failing.failed
    assert n < 30 and failing.state == "budget" and failing.prompts == 4
    assert failing.reason.startswith(
        f"{failing.failed} of {n} answers failed: more than the budget.failed of 1.0%"
    )
    assert failing.samples.height and failing.asked >= 4
    healed = run(value, engines=project.engine())
    assert healed.state == "done" and healed.reused == failing.asked

    def mute(request: Request) -> Completion:
        return (
            Completion("", "length", dict.fromkeys(request.labels, -9.0))
            if request.labels
            else project.answer(request)
        )

    unread = run(
        {**value, "store": str(tmp_path / "unread")},
        engines={"local": Scripted(ScriptedConfig(), mute)},
    )
    assert (
        unread.state == "budget"
        and "8 of 16 answers are unscored" in unread.reason
        and "low_label_mass" in unread.reason
    )
    assert (
        run({**value, "store": str(tmp_path / "unread"), "budget": {"unscored": 0.5}}).state
        == "done"
    )


@pytest.mark.slow
def test_an_answer_that_cannot_be_read_is_asked_again_and_never_hangs(tmp_path, capsys):
    value = project.pipeline(tmp_path)
    run(value, engines=project.engine())
    with sqlite3.connect(tmp_path / "store" / "ledger.sqlite") as con:
        con.execute(
            "UPDATE calls SET label_logps = replace(label_logps, ':', '#') WHERE id = "
            "(SELECT max(id) FROM calls WHERE label_logps IS NOT NULL)"
        )

    async def again() -> RunResult:
        loaded = resolve_pipeline(value)
        return await asyncio.wait_for(run_async(loaded, engines=project.engine()), 20)

    mended = asyncio.run(again())
    assert (mended.state, mended.asked, mended.verdicts.height) == ("done", 1, 72)
    assert "1 damaged answers were asked again" in capsys.readouterr().err
    assert run(value, engines=project.engine()).asked == 0


@pytest.mark.slow
def test_the_window_keeps_the_engine_full_and_no_fuller(tmp_path):
    engines = project.engine(max_in_flight=16, delay_s=0.005)
    value = project.pipeline(tmp_path, prompts=40)
    assert at_work(resolve_pipeline(value), engines) == 2 * 16 // 3 + 2
    run(value, engines=engines)
    assert engines["local"].most_in_flight == 16


def test_a_panel_of_two_judges_and_reasoning(tmp_path):
    def thinks(request):
        return (
            Completion("Because.", "stop")
            if project.asked(request) == "reason"
            else project.answer(request)
        )

    judges = [
        {"name": "plain", "kind": "pairwise"},
        {"name": "thinker", "kind": "pairwise", "reasoning": True},
    ]
    result = run(
        project.pipeline(tmp_path, prompts=2, panel={"judges": judges}),
        engines={"local": Scripted(ScriptedConfig(), thinks)},
    )
    assert result.verdicts.height == 2 * 3 * 2 * 2 * 2
    assert set(result.preferences["n_readings"]) == {4}
    assert result.asked == 2 * (3 + 12 + 12 + 12)


@pytest.mark.parametrize(
    ("kind", "reason"), [("human", "people label apart"), ("critique", "no kind of judge")]
)
def test_what_no_panel_asks_is_refused_with_the_reason(tmp_path, kind, reason):
    value = project.pipeline(tmp_path, panel={"judges": [{"name": "points", "kind": kind}]})
    with pytest.raises(ConfigError, match=reason):
        run(value)


def test_the_seed_counts_only_where_something_is_drawn(tmp_path):
    loaded = resolve_pipeline(project.pipeline(tmp_path))

    class Ctx:
        config = loaded.config

    assert policy_sampling(Ctx).seed == 0
    Ctx.config = resolve_pipeline(
        project.pipeline(tmp_path, policy={"engine": "local", "temperature": 0.0})
    ).config
    assert policy_sampling(Ctx).seed is None


def test_inside_a_running_loop_as_in_a_notebook(tmp_path):
    async def cell():
        return run(project.pipeline(tmp_path, prompts=1), engines=project.engine())

    assert asyncio.run(cell()).state == "done"


def test_plan_before_anything_ran_estimates_and_says_so(tmp_path):
    told = plan(project.pipeline(tmp_path, revise={"rounds": 1}))
    by_role = {}
    for row in told.rows:
        by_role.setdefault(row.role, []).append(row)
    assert sum(r.ask for r in by_role["sample"]) == 18 and not sum(
        r.estimated for r in by_role["sample"]
    )
    assert sum(r.ask for r in by_role["judge"]) == 72 == sum(r.estimated for r in by_role["judge"])
    assert sum(r.ask for r in by_role["critique"]) == 36
    assert told.reused == 0 and not (tmp_path / "store").exists()


def test_plan_of_a_finished_run_asks_nothing(tmp_path):
    value = project.pipeline(tmp_path, revise={"rounds": 1})
    result = run(value, engines=project.engine())
    # the plan makes its own engines: the same model by name, so the same keys
    told = plan(value)
    assert (told.ask, told.reused, told.resumes) == (0, result.asked + result.reused, True)


def test_transport_errors_are_data_unless_nothing_is_answered(tmp_path):
    class Flaky(Scripted):
        async def complete(self, key, request):
            if project.asked(request) in self.dead:
                raise TransportError("the line is down")
            return await super().complete(key, request)

    engine = Flaky(ScriptedConfig(), project.answer)
    engine.dead = {"judge"}
    result = run(
        project.pipeline(tmp_path, prompts=2, budget={"failed": None}), engines={"local": engine}
    )
    assert (result.state, result.failed, result.asked) == ("done", 24, 6)
    engine.dead = {"sample", "judge"}
    with pytest.raises(EngineError, match="none of 6 calls was answered: the line is down"):
        run(
            project.pipeline(tmp_path, prompts=2, store=str(tmp_path / "b")),
            engines={"local": engine},
        )


def test_the_probability_of_a_fault_is_kept_and_told(tmp_path, capsys):
    value = project.pipeline(tmp_path, prompts=2, revise={"rounds": 1})
    result = run(value, engines=project.engine())
    columns = ["fault", "p_fault", "mass", "exactness"]
    found = {tuple(row) for row in result.critiques.select(columns).rows()}
    near = {(fault, round(p, 6), round(mass, 6), exactness) for fault, p, mass, exactness in found}
    assert near == {(True, 0.75, 0.8, "exact"), (False, 0.1, 0.8, "exact")}
    assert result.unsure_critiques == sum(result.faults.values()) > 0
    report(result)
    assert "P(fault) between 0.2 and 0.8" in capsys.readouterr().out
    told = {row["principle"]: row for row in agreement.measure(tmp_path / "store")["critiques"]}
    assert told["kind"]["p_fault"] == pytest.approx(0.75) and told["kind"]["hard"] == 0
    assert told["kind"]["unsure"] == told["kind"]["faults"] == told["kind"]["critiques"]


def test_a_fault_that_is_not_probable_enough_is_not_revised(tmp_path):
    value = project.pipeline(tmp_path, prompts=2, revise={"rounds": 1, "min_p_fault": 0.8})
    result = run(value, engines=project.engine())
    assert sum(result.faults.values()) > 0
    assert (result.samples["parent"] >= 0).sum() == 0


@pytest.mark.slow
def test_a_store_whose_critiques_have_no_labels_goes_on_without(tmp_path):
    old = project.pipeline(tmp_path, prompts=2, revise={"rounds": 1})
    first = run({**old, "critic": {"template": "critique.jinja"}}, engines=project.engine())
    assert first.critiques["p_fault"].null_count() == first.critiques.height
    # as a version of Prefab recorded it that knew one template, and its name for the default
    with sqlite3.connect(tmp_path / "store" / "ledger.sqlite") as con:
        ((text,),) = con.execute("SELECT config FROM runs").fetchall()
        config = json.dumps({**json.loads(text), "critic": None}, sort_keys=True)
        columns = [row[1] for row in con.execute("PRAGMA table_info(runs)")]
        row = dict(zip(columns, con.execute("SELECT * FROM runs").fetchone(), strict=True))
        row["config"] = config.replace('": ', '":').replace(', "', ',"')
        row["crc"] = row_crc(tuple(row[name] for name in columns[:-1]))
        con.execute(
            "UPDATE runs SET config = ?, crc = ? WHERE id = ?",
            (row["config"], row["crc"], row["id"]),
        )
    again = run(old, engines=project.engine())
    assert again.asked == 0
    named = run({**old, "critic": {"template": "critique_labels.jinja"}}, engines=project.engine())
    assert named.asked > 0 and named.critiques["p_fault"].null_count() == 0
    assert run(old, engines=project.engine()).asked == 0
