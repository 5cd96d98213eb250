"""`prefab agreement` on real stores: scripted judges of known faults are found out, and what cannot
be said is said."""

from __future__ import annotations

import asyncio
import json
import re
import sys

import numpy as np
import pytest

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.microworld import oracle
from prefab.factory.stats import Estimate, undefined
from prefab.factory.types import Completion, Message
from prefab.pipelines.cli.main import main
from prefab.pipelines.quality import agreement_tables as tables
from prefab.pipelines.quality.agreement import UnscoredError, aggregates, calibrate, gain, measure
from prefab.pipelines.quality.agreement_tables import in_brief
from prefab.pipelines.quality.rating_matrix import load_matrix
from prefab.pipelines.store.fill import query
from prefab.pipelines.store.selection import select
from tests.support import noisyworld, project

JUDGES = {
    "good": {"right": 0.95},
    "slot": {"right": 0.95, "first": 0.3},
    "fair": {"right": 0.85},
    "mean": {"right": 0.97, "mean": True},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four judges of the embedded world: two good ones, one drawn to the first slot, one that turns
    answers round."""
    folder = tmp_path_factory.mktemp("agreement")
    value, engines = noisyworld.pipeline(folder, JUDGES)
    assert run(value, engines=engines).state == "done"
    alone, engines = noisyworld.pipeline(folder, {"slot": JUDGES["slot"]}, name="alone")
    alone["panel"]["repeats"] = 2
    assert run(alone, engines=engines).state == "done"
    return folder / "store"


@pytest.fixture(scope="module")
def found(world):
    return measure(world, "world", resamples=200)


def row(rows, name, key="judge"):
    return next(r for r in rows if r[key] == name)


# --- in sentences ---


def test_the_sentences_say_what_the_figures_say(found):
    lines = in_brief(found)
    assert any(
        line.startswith("good is right in ") and "both orders in 100.0%" in line for line in lines
    )
    slot = row(found["judges"], "slot")
    assert any(
        line.startswith(f"slot is right in {slot['accuracy'].value:.1%} (") for line in lines
    )
    assert (
        sum("alpha" in line for line in lines) == 1 and f"{found['accuracy']['best']}" in lines[-1]
    )
    alone = {
        "judges": [
            {
                **slot,
                "accuracy": undefined("no gold"),
                "position_consistency": undefined("x"),
                "unscored": 0.25,
                "verdicts": 40,
            }
        ],
        "coefficients": None,
        "accuracy": None,
    }
    assert in_brief(alone) == ["slot could not be read in 25.0% of 40 verdicts"]


@pytest.mark.parametrize(
    ("value", "low", "words"),
    [
        (0.9, 0.8, "rely on"),
        (0.7, 0.6, "tentative conclusions (0.667), not"),
        (0.3, 0.1, "more than by chance, but"),
        (0.3, -0.1, "no more than by chance"),
        (-0.2, -0.3, "no more than by chance"),
    ],
)
def test_what_an_alpha_is_enough_for(value, low, words):
    alpha = Estimate(value, boot_low=low, boot_high=1.0)
    told = {"judges": [], "coefficients": {"krippendorff_alpha nominal": alpha}, "accuracy": None}
    assert words in in_brief(told)[0] and f"{value:.3f}" in in_brief(told)[0]


def test_what_is_undefined_is_told_once_a_reason(capsys):
    why = undefined("Cohen's kappa is for two raters, not 3: use conger_kappa")
    tables._coefficients(
        {
            "percent": Estimate(0.5, 0.1, 0.3, 0.7, 9, 3),
            "cohen_kappa": why,
            "cohen_kappa linear": why,
        }
    )
    shown = capsys.readouterr().out
    assert (
        "undefined: Cohen's kappa, Cohen's kappa linear: Cohen's kappa is for two raters, not 3: "
        "use conger_kappa" in shown
    )
    assert "share that agrees" in shown and shown.count("two raters") == 1


# --- against a count by hand, in plain SQL and plain Python ---


def test_a_judges_row_is_what_a_count_by_hand_gives(world, found):
    verdicts = query(
        world,
        "SELECT v.* FROM verdicts v JOIN runs r USING (run) WHERE r.name = 'world' "
        "AND judge = 'slot'",
    ).to_dicts()
    samples = {
        (s["prompt"], s["index"]): s["text"]
        for s in query(world, "SELECT * FROM samples").to_dicts()
    }
    talks = {
        p: tuple(Message(r, t) for r, t in json.loads(m))
        for p, m in query(world, "SELECT prompt, messages FROM prompts").iter_rows()
    }
    sides: dict[tuple, dict[str, dict]] = {}
    for v in verdicts:
        sides.setdefault((v["prompt"], v["a"], v["b"], v["principle"]), {})[v["order"]] = v
    agree = [s["ab"]["winner"] == s["ba"]["winner"] for s in sides.values()]
    first = [
        (v["winner"] == "a") == (order == "ab")
        for s in sides.values()
        for order, v in s.items()
        if v["winner"] != "tie"
    ]
    right = []
    for (prompt, a, b, principle), s in sides.items():
        gold = oracle.compare(talks[prompt], samples[prompt, a], samples[prompt, b], principle)
        p = (s["ab"]["p_a"] + s["ba"]["p_a"]) / 2
        if gold != "tie" and p != 0.5:
            right.append((p > 0.5) == (gold == "a"))
    mine = row(found["judges"], "slot")
    assert mine["position_consistency"].value == pytest.approx(np.mean(agree)) and mine[
        "readings"
    ] == len(sides)
    assert mine["first_slot_share"].value == pytest.approx(np.mean(first)) and mine[
        "verdicts"
    ] == len(verdicts)
    assert (mine["accuracy"].value, mine["accuracy"].n_items) == (
        pytest.approx(np.mean(right)),
        len(right),
    )
    assert mine["unscored"] == 0.0 and mine["label_mass"] == pytest.approx(1.0)


def test_known_faults_are_found_out(found):
    judges = {r["judge"]: r for r in found["judges"]}
    assert (
        judges["slot"]["first_slot_share"].low > 0.6
        and judges["slot"]["position_consistency"].high < 0.85
    )
    assert (
        judges["slot"]["slot_lean"].value == 1.0
        and judges["good"]["position_consistency"].value == 1.0
    )
    assert judges["mean"]["accuracy"].high < 0.15 < 0.85 < judges["good"]["accuracy"].low
    assert (
        judges["good"]["slot_lean"].undefined
        and "asked once" in judges["good"]["stability"].undefined
    )
    rows = {r["what"]: r["accuracy"].value for r in found["accuracy"]["rows"]}
    assert rows["Dawid-Skene"] > rows["majority"] and rows["Dawid-Skene"] > rows["mean probability"]
    assert set(rows) == {*JUDGES, "mean probability", "majority", "Dawid-Skene"}
    assert (
        found["accuracy"]["best"] in ("good", "slot")
        and found["accuracy"]["over_best"]["Dawid-Skene"].low is not None
    )
    assert (
        row(found["calibration"], "mean", "what")["ece"].value
        > 0.6
        > row(found["calibration"], "good", "what")["ece"].value
    )


def test_every_coefficient_has_a_value_or_a_reason(found):
    coefficients = found["coefficients"]
    assert len(coefficients) == 17
    for name, e in coefficients.items():
        assert (e.value is None) == bool(e.undefined), name
        assert e.value is None or (
            e.low < e.value < e.high and e.boot_low < e.value < e.boot_high
        ), name
    assert (
        "two raters" in coefficients["cohen_kappa"].undefined
        and coefficients["fleiss_kappa"].value is not None
    )
    assert len(found["between"]["pairs"]) == 6 and 1 <= found["between"]["effective"].value <= 4


def test_what_divides_them_comes_first_with_its_texts(world, found):
    worst = [min(r["percent"].value, r["position_consistency"].value) for r in found["principles"]]
    assert worst == sorted(worst) and len(worst) == 11
    for one in found["divided"]:
        ps = [said["p_a"] for said in one["judges"].values()]
        assert one["spread"] == pytest.approx(max(ps) - min(ps)) and all(one["text"].values())
        ids = query(
            world, "SELECT prompt FROM preferences WHERE preference = ?", [one["preference"]]
        )
        assert ids["prompt"].to_list() == [one["prompt"]]
    assert [one["principle"] for one in found["divided"]][:3] == [
        found["principles"][0]["name"]
    ] * 3
    assert {r["name"] for r in found["tags"]} >= {"harmful", "harmless"}


def test_options_choose_and_agree_with_the_whole(world, found):
    one = measure(world, "world@1", principles=("padding",), judges=("good", "fair"), resamples=0)
    assert [r["judge"] for r in one["judges"]] == ["fair", "good"] and one["items"] == found[
        "items"
    ] / 11
    pair = next(
        p for p in measure(world, "world", judges=("good", "fair"), resamples=0)["between"]["pairs"]
    )
    assert pair == next(p for p in found["between"]["pairs"] if p["judges"] == ["fair", "good"])
    assert (
        one["coefficients"]["cohen_kappa"].value is not None
        and one["coefficients"]["cohen_kappa"].boot_low is None
    )
    tagged = measure(world, "world", tags=("harmful",), resamples=0)
    assert 0 < tagged["items"] == row(found["tags"], "harmful", "name")["items"] < found["items"]
    assert (
        row(tagged["principles"], "harm", "name")["items"]
        < row(found["principles"], "harm", "name")["items"]
    )


def test_one_judge_is_still_told_of(world):
    found = measure(world, "alone", resamples=100)
    mine = found["judges"][0]
    assert mine["stability"].value == 1.0 and mine["stability"].n_items == mine["verdicts"] / 2
    assert (
        mine["position_consistency"].high < 0.85
        and found["coefficients"] is found["between"] is None
    )
    assert any("another judge in panel.judges" in words for words in found["limitations"])
    assert found["divided"] and all(
        one["judges"]["slot"]["ab"] != one["judges"]["slot"]["ba"] for one in found["divided"]
    )
    assert (
        found["principles"][0]["percent"].undefined
        and found["principles"][0]["position_consistency"].value < 1
    )


# --- gold from people ---


def test_people_are_gold_where_they_have_spoken(tmp_path):
    value = project.pipeline(tmp_path, prompts=4)
    run(value, engines=project.engine())
    rows = query(tmp_path / "store", 'SELECT prompt, "index", sample, text FROM samples').to_dicts()
    name = {(r["prompt"], r["index"]): r for r in rows}
    prompts = sorted({r["prompt"] for r in rows})

    async def label():
        ledger = Ledger.open(tmp_path / "store")
        said = {
            "prompt": prompts[0],
            "principle": "kind",
            "annotator": "ann",
            "winner": "b",
            "a": name[prompts[0], 0]["sample"],
            "b": name[prompts[0], 1]["sample"],
        }
        ledger.add_human_label(said)
        ledger.add_human_label(said | {"winner": "a"})  # ann's last word
        ledger.add_human_label(
            said
            | {
                "prompt": prompts[1],
                "annotator": "bob",
                "winner": "b",
                "a": name[prompts[1], 2]["text"],
                "b": name[prompts[1], 0]["text"],
            }
        )
        ledger.add_human_label(said | {"prompt": prompts[2], "a": 0, "b": 1, "winner": "b"})
        ledger.add_human_label(
            said | {"prompt": prompts[2], "a": 0, "b": 1, "annotator": "bob"} | {"winner": "a"}
        )
        ledger.add_human_label(
            {"prompt": prompts[3], "a": 0, "b": 1, "winner": "a"}
        )  # of which principle?
        await ledger.close()

    asyncio.run(label())
    data, source = load_matrix(select(tmp_path / "store"))
    known = {
        (p, a, b, c): g
        for (p, a, b, c), g in zip(
            data.items.select("prompt", "a", "b", "principle").iter_rows(), data.gold, strict=False
        )
        if not np.isnan(g)
    }
    assert known == {(prompts[0], 0, 1, "kind"): 1.0, (prompts[1], 0, 2, "kind"): 1.0}
    assert source == "2 comparisons labelled by 2 people"
    found = measure(tmp_path / "store", resamples=100)
    assert (
        found["judges"][0]["accuracy"].value == 1.0 and found["judges"][0]["accuracy"].n_items == 2
    )
    none = measure(tmp_path / "store", gold="none", resamples=100)
    assert none["accuracy"] is none["calibration"] is None and any(
        "no gold" in words for words in none["limitations"]
    )
    with pytest.raises(ConfigError, match="only that world has an oracle"):
        measure(tmp_path / "store", gold="oracle")


# --- what is not there, and what could not be read ---


def test_unscored_verdicts_are_counted_and_stay_out(tmp_path):
    def mumbling(request):
        answer = project.answer(request)
        if request.labels and "Question 1?" in request.messages[-1].content:
            return Completion(
                "A", "length", {k: v - 3 for k, v in answer.label_logps.items()}, "exact", 9, 1
            )
        return answer

    value = project.pipeline(tmp_path, prompts=4, budget={"unscored": None})
    run(value, engines={"local": Scripted(ScriptedConfig(), mumbling)})
    found = measure(tmp_path / "store", resamples=100)
    assert found["judges"][0]["unscored_reasons"] == {"low_label_mass": 12}
    assert (found["judges"][0]["scored"], found["judges"][0]["readings"]) == (18, 24)
    assert found["judges"][0]["unscored"] == 0.25 == found["principles"][0]["unscored"]
    assert found["judges"][0]["position_consistency"].n_items == 18


def test_a_store_that_cannot_answer_says_why(tmp_path, capsys, monkeypatch):
    def nothing(request):
        answer = project.answer(request)
        return Completion("", "refused") if request.labels else answer

    value = project.pipeline(tmp_path, prompts=2, budget={"unscored": None})
    run(value, engines={"local": Scripted(ScriptedConfig(), nothing)})
    with pytest.raises(UnscoredError, match="none of 24 verdicts could be read .refused: 24."):
        measure(tmp_path / "store")
    (tmp_path / "silent").mkdir()
    silent = project.pipeline(tmp_path / "silent", prompts=2, recipe="cai", panel=None)
    run(silent, engines=project.engine())
    for words, code, told in (
        ([str(tmp_path / "store")], 1, "could be read"),
        ([str(tmp_path / "none")], 2, "no store"),
        ([str(tmp_path / "silent/store")], 2, "no verdicts"),
        ([str(tmp_path / "store"), "--run", "other"], 2, "no run"),
        ([str(tmp_path / "store"), "--principle", "kinder"], 2, 'did you mean "kind"'),
        ([str(tmp_path / "store"), "--judge", "x"], 2, "known: judge"),
        ([str(tmp_path / "store"), "--tag", "x"], 2, "--tag x"),
    ):
        monkeypatch.setattr(sys, "argv", ["prefab", "agreement", "--store", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code, told in capsys.readouterr().err) == (code, True), words


def test_judges_without_an_order_have_readings_and_no_position(tmp_path):
    """Verdicts that follow from scores are asked in no order."""
    import duckdb

    value = project.pipeline(tmp_path, prompts=3)
    run(value, engines=project.engine())
    query(tmp_path / "store", "SELECT 1 AS x")
    con = duckdb.connect(str(tmp_path / "store/prefab.duckdb"))
    con.execute(
        "INSERT INTO verdicts SELECT * REPLACE ('scores' AS judge, '-' AS \"order\", NULL AS "
        "call, NULL AS mass, "
        "NULL AS tie_mass) FROM verdicts WHERE \"order\" = 'ab'"
    )
    con.close()
    found = measure(tmp_path / "store", resamples=100)
    mine = row(found["judges"], "scores")
    assert (
        mine["position_consistency"].undefined == "asked without an order" and mine["scored"] == 18
    )
    assert (
        mine["label_mass"] is None
        and row(found["judges"], "judge")["position_consistency"].n_items == 18
    )
    assert found["coefficients"]["percent"].n_items == 18


# --- as people see it ---


@pytest.mark.parametrize(
    "words", [["--run", "world"], ["--run", "alone"], ["--run", "world", "--gold", "none"]]
)
def test_tables_and_json(world, words, monkeypatch, capsys):
    for extra in ([], ["--json"]):
        monkeypatch.setattr(
            sys,
            "argv",
            ["prefab", "agreement", "--store", str(world), "--resamples", "50", *words, *extra],
        )
        with pytest.raises(SystemExit) as ended:
            main()
        out = capsys.readouterr()
        assert not ended.value.code and "Traceback" not in out.err
        if not extra:
            assert (
                "Principles, the least agreed on first" in out.out
                and "next: prefab agreement" in out.err
            )
            assert ("The panel's agreement" in out.out) == ("alone" not in words)
            assert ("Does p_chosen come true?" in out.out) == ("none" not in words)
            assert "What divides them:" in out.out and not re.search(r"\bnan\b", out.out)
            continue
        value = json.loads(out.out)
        assert isinstance(value["judges"][0]["position_consistency"]["value"], float)
        assert isinstance(value["principles"][0]["items"], int) and not _strings_that_are_numbers(
            value
        )


def _strings_that_are_numbers(value) -> list[str]:
    if isinstance(value, dict):
        return [x for part in value.values() for x in _strings_that_are_numbers(part)]
    if isinstance(value, list):
        return [x for part in value for x in _strings_that_are_numbers(part)]
    return [value] if isinstance(value, str) and value.replace(".", "", 1).isdigit() else []


# --- the pieces ---


def test_calibration_is_of_what_is_decided_and_a_tie_is_half():
    p, gold = np.array([0.9, 0.1, 0.5, 0.8, np.nan, 0.8]), np.array([1, 0, 1, 0.5, 1, np.nan])
    found = calibrate(p, gold, np.arange(6))
    assert (
        found["n"] == 3
        and found["brier"] == pytest.approx((0.01 + 0.01 + 0.09) / 3)
        and "fewer than" in found["why"]
    )


def test_the_temperature_never_sees_what_it_is_measured_on():
    """Overconfident in the half that it is fitted on, honest in the other: only the first can be
    seen in it."""
    rng = np.random.default_rng(0)
    honest = 0.5 + rng.random(4000) / 2
    gold = (rng.random(4000) < honest).astype(float)
    groups = np.arange(4000)
    loud = np.where(groups % 2 == 0, 1 / (1 + ((1 - honest) / honest) ** 3), honest)
    found = calibrate(loud, gold, groups)
    assert (
        found["temperature"] == pytest.approx(3.0, rel=0.15)
        and found["n_fitted"] + found["n_held_out"] == found["n"]
    )
    assert found["after"]["log_loss"] > found["before"]["log_loss"]


def test_a_gain_is_over_what_both_decide(world):
    data, _ = load_matrix(select(world, "world"))
    good, mean = data.p[:, data.judges.index("good")], data.p[:, data.judges.index("mean")]
    better = gain(good, mean, data, 200)
    assert better.low > 0.5 and gain(mean, good, data, 200).value == -better.value
    assert gain(good, np.full(len(good), 0.5), data).undefined
    panel = aggregates(data)
    assert np.nanmax(np.abs(panel["mean probability"] - np.nanmean(data.p, axis=1))) < 1e-12
    assert set(np.unique(panel["majority"][~np.isnan(panel["majority"])])) <= {0.0, 0.5, 1.0}
