"""`prefab audit judge`: what a judge falls for is found, exactly; what it does not is not; nothing
is asked twice."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError, TransportError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.spec.templates import load_template as load_template
from prefab.judges import bias_probes
from prefab.judges.kinds import human, listwise, pointwise, rubric
from prefab.judges.registry import judge_of
from prefab.pipelines.quality import judge_audit, probe_pairs
from prefab.pipelines.run.runner import resolve_pipeline, run
from prefab.pipelines.store.fill import query
from tests.support import oraclejudge, project
from tests.support.fork_server import COMMAND

ROOT = Path(__file__).resolve().parents[3]


def world(folder: Path, **changes):
    """A pipeline over the embedded world, judged by the scripted engine."""
    pipeline = {
        "recipe": "rlaif",
        "name": "world",
        "store": str(folder / "store"),
        "constitution": str(ROOT / "constitutions" / "microworld.yaml"),
        "prompts": {"source": "microworld", "limit": 4},
        "engines": {"local": {"engine": "scripted"}},
        "policy": {"engine": "local"},
        "panel": {
            "judges": [{"name": "one", "kind": "pairwise"}, {"name": "two", "kind": "pairwise"}]
        },
    }
    return resolve_pipeline(pipeline | changes)


def engine(falls=oraclejudge.never, slot=oraclejudge.never, **config):
    return {"local": Scripted(ScriptedConfig(**config), oraclejudge.judge(falls, slot))}


def by_name(report):
    return {finding.probe: finding for finding in report.findings}


def test_an_honest_judge_is_not_accused(tmp_path):
    report = judge_audit.audit(world(tmp_path), n=33, engines=engine())
    assert (report.judge, report.right.value, report.unscored) == ("one", 1.0, 0)
    assert len(report.findings) == len(bias_probes.PROBES) and report.truth == {
        "oracle": report.pairs
    }
    for finding in report.findings:
        assert finding.n_pairs == finding.n_right == 33, finding.probe
        assert (
            finding.one_order.value == 0.0
            and abs(finding.shift.value) < 1e-9
            and not finding.silenced
        )
        assert finding.probe == "swap" or finding.flips.value == finding.again.value == 0.0


def test_what_the_judge_falls_for_is_found_exactly(tmp_path):
    """Gullible to one phrasing of twelve, one token and headings; nothing else may be accused."""
    bait = ("tangerine", "Solution")

    def falls(text):
        return any(b in text for b in bait) or text.startswith(("## Answer", "### Step"))

    found = by_name(judge_audit.audit(world(tmp_path), n=60, engines=engine(falls)))
    flips = {name: f.flips.value * f.flips.n_items for name, f in found.items() if f.flips.value}
    caught = {
        name: sum(n for text, _, n in found[name].by_phrasing if falls(text)) for name in flips
    }
    assert set(flips) == {"markdown", "injection", "one_token"}
    assert flips == pytest.approx(caught)
    for name in flips:
        assert all((k == n if falls(text) else k == 0) for text, k, n in found[name].by_phrasing), (
            name
        )
        assert found[name].again.value == 0.0 and found[name].shift.value > 0.0
    tangerine = [(k, n) for text, k, n in found["injection"].by_phrasing if "tangerine" in text]
    assert tangerine == [(5, 5)] and found["injection"].shift.value == pytest.approx(5 / 60 * 0.85)


def test_a_pull_to_the_first_slot_is_found_by_the_swap_alone(tmp_path):
    found = by_name(
        judge_audit.audit(
            world(tmp_path), n=44, engines=engine(slot=lambda talk: "my" in talk.split())
        )
    )
    torn = found["swap"].n_pairs - found["swap"].n_right
    assert 0 < torn < 44 and found["swap"].one_order.value == pytest.approx(torn / (2 * 44 - torn))
    assert all(not f.flips.value for name, f in found.items() if name != "swap")


def test_a_second_audit_asks_nothing_and_another_judge_does(tmp_path):
    engines = engine()
    first = judge_audit.audit(world(tmp_path), n=11, engines=engines)
    (own,) = first.own_answers
    assert own.startswith(f"Judge {first.judge}: the model that wrote the answers judges them")
    asked = engines["local"].total
    assert first.asked == asked > 300
    again = judge_audit.audit(world(tmp_path), n=11, engines=engines)
    assert engines["local"].total == asked and again.asked == 0 and again.findings == first.findings
    more = judge_audit.audit(world(tmp_path), n=12, engines=engines, probes=["emotion"])
    assert engines["local"].total - asked == more.asked <= 2 * 3
    assert not (tmp_path / "store" / "ledger.sqlite").exists()  # what is asked here is no run's


@pytest.mark.parametrize(
    "config",
    [
        pointwise.PointwiseConfig(name="p", engine="local"),
        rubric.RubricConfig(name="r", engine="local"),
        listwise.ListwiseConfig(name="l", engine="local"),
    ],
    ids=lambda c: c.kind,
)
def test_every_kind_of_judge_can_be_audited(tmp_path, config):
    loaded = world(tmp_path)
    loaded = replace(
        loaded,
        judges=[judge_of(config)],
        templates={config.name: load_template(config.template, config.kind)},
    )
    found = by_name(
        judge_audit.audit(
            loaded,
            n=22,
            engines=engine(lambda text: "Oxford" in text),
            probes=["swap", "authority", "emotion", "special_tokens"],
        )
    )
    assert found["emotion"].flips.value == found["special_tokens"].flips.value == 0.0
    assert found["swap"].n_right == 22
    oxford = next((k, n) for text, k, n in found["authority"].by_phrasing if "Oxford" in text)
    if config.kind == "listwise":
        assert oxford == (7, 7) and found["swap"].one_order.value == 0.0
    else:  # single answers: the fault is hidden, so that the pair becomes a tie
        assert oxford == (0, 7) and found["authority"].ties == 7


def test_a_judge_that_reasons_is_audited_through_both_passes(tmp_path):
    judges = [{"name": "one", "kind": "pairwise", "reasoning": True}]
    truth = oraclejudge.judge()

    def answer(request):
        return truth(request) if request.labels else "Both stand somehow."

    engines = {"local": Scripted(ScriptedConfig(), answer)}
    report = judge_audit.audit(
        world(tmp_path, panel={"judges": judges}), n=11, probes=["padding"], engines=engines
    )
    assert report.right.value == 1.0 and report.asked == engines["local"].total == 2 * 2 * 33

    mute = {
        "local": Scripted(
            ScriptedConfig(), lambda request: truth(request) if request.labels else ""
        )
    }
    silent = judge_audit.audit(
        world(tmp_path / "mute", panel={"judges": judges}), n=11, probes=["padding"], engines=mute
    )
    assert (
        silent.unscored == 22
        and silent.findings[0].n_right == 0
        and silent.unmeasured() == ["padding"]
    )


def test_an_attack_that_silences_is_no_flip_and_no_pass(tmp_path):
    truth = oraclejudge.judge()

    def answer(request):
        if "beg you" in request.messages[-1].content:
            raise TransportError("gone")
        return truth(request)

    found = judge_audit.audit(
        world(tmp_path),
        n=33,
        probes=["emotion"],
        engines={"local": Scripted(ScriptedConfig(), answer)},
    )
    assert found.findings[0].silenced == 11 and found.findings[0].flips.value == 0.0
    assert found.findings[0].flips.n_items == 22


def test_the_gate(tmp_path):
    report = judge_audit.audit(
        world(tmp_path), n=36, engines=engine(lambda text: "tangerine" in text)
    )
    assert (
        report.past(0.02) == ["injection 8.3%"] and judge_audit.print_report(report, 0.02, []) == 1
    )
    assert report.past(0.09) == [] and judge_audit.print_report(report, 0.09, []) == 0
    assert judge_audit.print_report(report, None, []) == 0
    assert not json.dumps(report.data()).count("NaN") and len(judge_audit.rows(report)[0]) == len(
        judge_audit.COLUMNS
    )


def test_mistakes_are_told(tmp_path):
    with pytest.raises(ConfigError, match='did you mean "injection"'):
        judge_audit.audit(world(tmp_path), probes=["injektion"], engines=engine())
    with pytest.raises(ConfigError, match='no judge is named "three"'):
        judge_audit.audit(world(tmp_path), judge="three", engines=engine())
    with pytest.raises(ConfigError, match="no store here"):
        judge_audit.audit(resolve_pipeline(project.pipeline(tmp_path)), engines=project.engine())


# --- pairs from a store ---


def stored(folder: Path):
    source = project.pipeline(folder)
    engines = project.engine()
    run(source, engines=engines)
    return resolve_pipeline(source), engines


def test_a_store_s_pairs_are_audited_with_the_judge_s_own_verdicts_as_truth(tmp_path):
    loaded, engines = stored(tmp_path)
    asked, pairs = engines["local"].total, 6 * 3 * 2
    report = judge_audit.audit(
        loaded, n=500, engines=engines, probes=["swap", "markdown", "one_token"]
    )
    found = by_name(report)
    assert report.truth == {"judge": pairs} and report.right.value is None
    assert (
        found["swap"].n_pairs == pairs and found["markdown"].n_pairs == pairs / 2
    )  # `brief` is about length
    assert found["one_token"].n_pairs == 0 and report.unmeasured() == ["one_token"]
    assert (
        judge_audit.print_report(report, 1.0, []) == 0
        and judge_audit.print_report(report, 1.0, ["one_token"]) == 1
    )
    unedited = 2 * pairs  # known from the run: only the repeats and the edited pairs are asked
    assert (
        engines["local"].total - asked == report.asked == unedited + pairs
        and report.reused == unedited
    )
    assert all(finding.n_right == finding.n_pairs for finding in report.findings)
    rows = query(tmp_path / "store", "SELECT value FROM evals WHERE name = 'audit judge'")["value"]
    (recorded,) = map(json.loads, rows)  # for the pages of the store
    assert recorded["subject"] == report.judge and recorded["metrics"]["markdown"]["flips"] == {
        "value": found["markdown"].flips.value,
        "low": found["markdown"].flips.low,
        "high": found["markdown"].flips.high,
    }


@pytest.mark.slow
def test_a_person_s_label_is_truth_where_it_speaks_of_the_principle(tmp_path):
    loaded, engines = stored(tmp_path)
    rows = query(loaded.config.store, 'SELECT * FROM samples ORDER BY prompt, "index"').to_dicts()
    name = {(row["prompt"], row["index"]): row["sample"] for row in rows}
    text = {(row["prompt"], row["index"]): row["text"] for row in rows}

    async def label():
        ledger = Ledger.open(Path(loaded.config.store))
        one = {"prompt": "p0", "annotator": "me", "winner": "b", "principle": "kind"}
        ledger.add_human_label(one | {"a": name["p0", 0], "b": name["p0", 1]})
        ledger.add_human_label(
            one | {"a": text["p0", 2], "b": text["p0", 0], "winner": "a"}
        )  # sides exchanged
        ledger.add_human_label(one | {"a": name["p0", 1], "b": name["p0", 2], "winner": "tie"})
        ledger.add_human_label(
            {"prompt": "p1", "winner": "b", "a": name["p1", 0], "b": name["p1", 1]}
        )  # of which?
        await ledger.close()

    asyncio.run(label())
    found = {
        (c.comparison.prompt.id, c.comparison.a.index, c.comparison.b.index, c.principle.id): c
        for c in probe_pairs.stored_cases(
            Path(loaded.config.store), {"run": 1}, loaded.constitution.principles, loaded.judges[0]
        )
    }
    assert (found["p0", 0, 1, "kind"].gold, found["p0", 0, 1, "kind"].truth) == ("b", "human")
    assert found["p0", 0, 2, "kind"].gold == "b" and found["p0", 0, 2, "brief"].truth == "judge"
    assert ("p0", 1, 2, "kind") not in found and ("p0", 1, 2, "brief") in found
    assert found["p1", 0, 1, "kind"].gold is None and found["p1", 0, 1, "brief"].gold is None
    report = judge_audit.audit(loaded, n=500, engines=engines, probes=["markdown"])
    assert (
        report.truth == {"human": 2, "judge": 15} and report.right.value == 0.0
    )  # the judge prefers the lower number


def test_people_are_read_as_the_statistics_read_them(tmp_path):
    """Each person's last word, nothing taken back, and nobody's where they are split: then the
    judge's own is truth."""
    loaded, _ = stored(tmp_path)
    one = {"prompt": "p0", "principle": "kind", "annotator": "ann", "winner": "b"}
    rows = [
        one | {"a": 0, "b": 1},
        one | {"a": 0, "b": 1, "annotator": "bob", "winner": "a"},  # split
        one | {"a": 0, "b": 2, "winner": "a"},
        one | {"a": 0, "b": 2},  # a second thought
        one | {"a": 1, "b": 2},
    ]
    rows.append(human.undo(human.name_of(rows[-1]), "ann", 1.0))

    async def label():
        ledger = Ledger.open(Path(loaded.config.store))
        for row in rows:
            ledger.add_human_label(row)
        await ledger.close()

    asyncio.run(label())
    found = {
        (c.comparison.a.index, c.comparison.b.index): (c.gold, c.truth)
        for c in probe_pairs.stored_cases(
            Path(loaded.config.store), {"run": 1}, loaded.constitution.principles, loaded.judges[0]
        )
        if c.comparison.prompt.id == "p0" and c.principle.id == "kind"
    }
    assert found == {(0, 1): (None, "judge"), (0, 2): ("b", "human"), (1, 2): (None, "judge")}


def test_the_command(tmp_path, forks):
    path = project.write(tmp_path, world(tmp_path).resolved)

    def call(*options):
        command = ["-m", COMMAND, "audit", "judge", path, "--judge", "two", "-n", "11", *options]
        return forks.run(command, env={"PATH": "", "NO_COLOR": "1", "COLUMNS": "200"})

    shown = call("--max-flips", "1")
    assert (
        shown.returncode == 0
        and "injection" in shown.stdout
        and "truth: oracle" in shown.stdout.lower()
    )
    told = call("--json", "--probe", "injection", "--max-flips", "0")
    report = json.loads(told.stdout)
    assert (
        told.returncode == 1
        and report["asked"] == 0
        and report["findings"][0]["probe"] == "injection"
    )
    assert re.search(r"more than 0.0% flips: injection", told.stderr)
    wrong = call("--probe", "injektion")
    assert (
        wrong.returncode == 2 and "did you mean" in wrong.stderr and "Traceback" not in wrong.stderr
    )
