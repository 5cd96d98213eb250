"""A plan: bounds that hold, reasons, every principle, sampling, and time from the history."""

from __future__ import annotations

import sqlite3

import pytest
import yaml

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import RequestRefused, TransportError
from prefab.factory.spec import data_files
from prefab.factory.types import Completion
from prefab.pipelines.run.plan import plan
from prefab.pipelines.run.runner import run
from tests.support import project


def always_at_fault(request):
    kind = project.asked(request)
    if kind == "critique":
        return Completion("Fault: bad.", "stop", None, "exact", 9, 32)
    if kind == "revise":
        return Completion(f"new {hash(request)}", "stop", None, "exact", 9, 32)
    return project.answer(request)


@pytest.mark.slow_but("1-sweep", "3-draw")
@pytest.mark.parametrize("select", ["sweep", "draw"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_bounds_hold_where_every_critique_names_a_fault(tmp_path, select, rounds):
    value = project.pipeline(tmp_path, prompts=3, revise={"rounds": rounds, "select": select})
    told = plan(value)
    result = run(value, engines={"local": Scripted(ScriptedConfig(), always_at_fault)})
    by_role = {"revise": 0, "critique": 0}
    for row in told.rows:
        by_role[row.role] = by_role.get(row.role, 0) + row.at_most
    assert told.ask < result.asked == told.at_most
    assert by_role["revise"] == result.samples.filter(result.samples["parent"] >= 0).height
    con = sqlite3.connect(tmp_path / "store" / "ledger.sqlite")
    (tokens,) = con.execute("SELECT sum(completion_tokens) FROM calls").fetchone()
    assert 0 < tokens <= told.tokens_at_most


def test_the_expected_number_of_revisions_follows_the_faults_seen_so_far(tmp_path):
    value = project.pipeline(tmp_path, prompts=10, revise={"rounds": 1})
    run(value, engines={"local": Scripted(ScriptedConfig(), always_at_fault)})
    more = project.pipeline(tmp_path, prompts=12, revise={"rounds": 1})
    asked = sum(row.ask for row in plan(more).rows if row.role == "revise")
    assert asked == 2 * 3 * 2  # prompts, drafts, principles: all 60 critiques so far named a fault


def test_reasons_tell_new_prompts_from_edits_and_from_failed_calls(tmp_path):
    class Down(Scripted):
        async def complete(self, key, request):
            if "Question 1?" in request.messages[-1].content and request.labels:
                raise TransportError("the line is down")
            return await super().complete(key, request)

    value = project.pipeline(tmp_path, prompts=4, budget={"failed": None})
    run(value, engines={"local": Down(ScriptedConfig(), project.answer)})
    value = project.pipeline(tmp_path, prompts=5, budget={"failed": None})
    text = (tmp_path / "small.yaml").read_text().replace("answer is briefer", "answer is shorter")
    (tmp_path / "small.yaml").write_text(text)
    why = {(row.role, row.principle): row.why for row in plan(value).rows}
    assert why["sample", ""] == {"new prompt": 3}
    assert why["judge", "kind"] == {"new prompt": 6, "failed before": 6}
    assert why["judge", "brief"] == {"new prompt": 6, "compare of principle brief changed": 24}


def test_refused_calls_are_told_and_not_counted_as_calls_to_make(tmp_path):
    class Refuses(Scripted):
        async def complete(self, key, request):
            if request.labels:
                raise RequestRefused("HTTP 400: no")
            return await super().complete(key, request)

    value = project.pipeline(tmp_path, prompts=2, budget={"failed": None})
    run(value, engines={"local": Refuses(ScriptedConfig(), project.answer)})
    told = plan(value)
    assert (told.ask, told.refused) == (0, 24)


def test_every_principle_is_listed_also_those_that_are_never_drawn(tmp_path):
    value = project.pipeline(tmp_path, prompts=2)
    constitution = yaml.safe_load((tmp_path / "small.yaml").read_text())
    kind, _ = constitution["principles"]
    constitution["selection"] = "sample_one"
    constitution["principles"] += [
        {**kind, "id": "off", "enabled": False},
        {**kind, "id": "tagged", "applies_when": {"tags": ["booking"]}},
    ]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(constitution, sort_keys=False))
    found = {p.principle: p for p in plan(value).principles}
    assert found["kind"].comparisons + found["brief"].comparisons == 6
    assert found["off"].note == "disabled"
    assert found["tagged"].note == "no prompt has a tag of booking"
    result = run(value, engines=project.engine())
    drawn = result.verdicts["principle"].value_counts().rows()
    assert {p: n // 2 for p, n in drawn} == {
        p: q.comparisons for p, q in found.items() if not q.note
    }
    never = next(p for p in found.values() if p.note == "no prompt has a tag of booking")
    text = (tmp_path / "small.yaml").read_text()
    edited = text.replace(
        "id: tagged\n  title: Kind\n  compare: Which", "id: tagged\n  title: Kind\n  compare: Whose"
    )
    assert edited != text
    (tmp_path / "small.yaml").write_text(edited)
    told = plan(value)
    assert told.ask == 0 and told.changes == ["compare of principle tagged changed"]
    note = next(p.note for p in told.principles if p.principle == never.principle)
    assert note.endswith("changed, and nothing is asked under what changed")


def test_a_sample_of_the_prompts_is_extrapolated_with_an_interval(tmp_path):
    run(project.pipeline(tmp_path, prompts=20), engines=project.engine())
    value = project.pipeline(tmp_path, prompts=200)
    told, whole = plan(value, sample=80), plan(value, sample=0)
    assert (told.prompts, told.counted, whole.counted) == (200, 92, 200)  # all 20 that are known
    assert (whole.ask, whole.reused) == (180 * 15, 20 * 15)
    assert (told.ask, told.reused) == (whole.ask, whole.reused)
    assert told.ask_low == told.ask == told.ask_high  # each new prompt makes as many calls
    principles = [(p.principle, p.comparisons) for p in told.principles]
    assert principles == [("kind", 600), ("brief", 600)]


def test_a_question_that_two_prompts_share_is_counted_once(tmp_path):
    value = project.pipeline(tmp_path, prompts=1)
    (tmp_path / "prompts.jsonl").write_text(
        '{"id": "p0", "prompt": "Same?"}\n{"id": "p1", "prompt": "Same?"}\n'
    )
    told = plan(value)
    assert sum(row.ask for row in told.rows if row.role == "sample") == 3
    assert run(value, engines=project.engine()).asked <= told.ask


def test_time_leaves_out_what_lies_between_two_starts(tmp_path):
    value = project.pipeline(tmp_path, prompts=10)
    run(value, engines=project.engine())
    con = sqlite3.connect(tmp_path / "store" / "ledger.sqlite", isolation_level=None)
    con.execute("UPDATE calls SET at = 1000 + id / 100.0")  # 100 calls a second
    con.execute("UPDATE starts SET at = 999")
    more = project.pipeline(tmp_path, prompts=20)
    told = plan(more)
    assert told.seconds == pytest.approx(told.ask / 100, rel=0.02)
    con.execute("UPDATE calls SET at = at + 3000 WHERE id > 75")
    con.execute("INSERT INTO starts (run, at, crc) VALUES (1, 3999, 0)")
    assert plan(more).seconds == pytest.approx(told.seconds, rel=0.02)
    con.execute("DELETE FROM starts WHERE at = 3999")
    assert plan(more).seconds == pytest.approx(told.seconds, rel=0.02)  # longer than any answer


def test_roles_tell_who_judges_its_own_answers(tmp_path):
    value = project.pipeline(tmp_path, prompts=1, revise={"rounds": 1})
    value["engines"]["other"] = {"engine": "scripted", "model": "another"}
    value["panel"]["judges"].append({"name": "far", "kind": "pairwise", "engine": "other"})
    notes = {role.role: role.note for role in plan(value).roles}
    assert notes == {
        "policy": "",
        "critic": "the policy criticises its own answers",
        "judge judge": "the policy judges its own answers",
        "judge far": "",
    }
    engines = {**project.engine(), "other": project.engine()["local"]}
    assert [role.role for role in run(value, engines=engines).roles] == list(notes)


@pytest.mark.slow
def test_of_a_large_file_some_rows_are_read_and_the_rest_is_extrapolated(tmp_path, monkeypatch):
    value = project.pipeline(tmp_path, prompts=400)
    whole = plan(value)
    assert whole.read_one_in == 1 and whole.prompts == 400
    monkeypatch.setattr(data_files, "MOST_ROWS", 100)
    some = plan(value)
    assert some.read_one_in == 4 and 350 <= some.prompts <= 450 and some.counted <= 110
    assert abs(some.ask / whole.ask - 1) < 0.12
    assert plan(value, sample=0).data() == {**whole.data(), "counted": 400}
    few = plan({**value, "prompts": {**value["prompts"], "limit": 60}})
    assert few.read_one_in == 1 and few.prompts == 60
