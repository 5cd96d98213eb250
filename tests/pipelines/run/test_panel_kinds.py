"""Every kind of judge in a panel, end to end: a planted better answer wins, and the store is what a
rebuild shows."""

from __future__ import annotations

import json
import random

import pytest

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError, EngineError
from prefab.factory.types import Completion
from prefab.pipelines.config.loader import resolve_pipeline
from prefab.pipelines.run.plan import plan
from prefab.pipelines.store.fill import fill, query
from tests.support import planted, project
from tests.support.planted import KINDS, panel
from tests.support.store_rows import checked

# panels, and the place of the good answer
PANELS = [(["pairwise"], 1), (["pointwise"], 1), (["listwise", "rubric"], 1), (list(KINDS), 0)]
MORE_PANELS = [
    *(([name], 1) for name in KINDS if name not in ("pairwise", "pointwise")),
    *((["pairwise", "pointwise"], 1), (["pointwise", "rubric"], 1)),
    *((list(KINDS), 1), (list(KINDS), 2)),
]


@pytest.mark.slow_but("listwise+rubric-1", "pairwise+reasoning+pointwise+scale+rubric+listwise-0")
@pytest.mark.parametrize(
    ("names", "good"),
    [*PANELS, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE_PANELS)],
    ids=lambda value: "+".join(value) if isinstance(value, list) else value,
)
def test_a_planted_better_answer_wins_on_either_side(tmp_path, names, good):
    result = run(
        project.pipeline(tmp_path, prompts=2, panel=panel(names)), engines=planted.engine(good)
    )
    assert result.state == "done" and not result.unscored and result.preferences.height == 6
    for row in result.preferences.iter_rows(named=True):
        if good in (row["a"], row["b"]):
            assert (row["chosen"], row["outcome"]) == (good, "a" if row["a"] == good else "b"), (
                names
            )
            assert row["p_chosen"] > 0.7 and row["n_scored"] == row["n_readings"] == 2 * len(names)
        elif "listwise" not in names:  # which must order the bad ones too
            assert row["outcome"] == "tie"
    again = run(
        project.pipeline(tmp_path, prompts=2, panel=panel(names)), engines=planted.engine(good)
    )
    assert (again.asked, again.reused) == (0, result.asked + result.reused)
    checked(tmp_path / "store")


@pytest.mark.slow_but("sample_one", "lexicographic")
@pytest.mark.parametrize("selection", ["sample_one", "weighted", "lexicographic"])
def test_selections_with_every_kind(tmp_path, selection):
    value = project.pipeline(tmp_path, prompts=3, panel=panel(KINDS, selection=selection))
    result = run(value, engines=planted.engine())
    rows = result.preferences.filter(
        (result.preferences["a"] == 1) | (result.preferences["b"] == 1)
    )
    assert set(rows["chosen"]) == {1} and rows.height == 6
    assert set(rows["n_readings"]) == {
        len(KINDS)
    }  # lexicographic: the first principle decides alone
    checked(tmp_path / "store")


def test_direct_rlaif_asks_each_answer_once_and_has_no_positions(tmp_path):
    result = run(
        project.pipeline(tmp_path, prompts=4, panel=panel(["pointwise"])), engines=planted.engine()
    )
    # 4 prompts x (3 samples + 3 answers x 2 principles)
    assert result.asked == 4 * (3 + 6) and result.frame("scores").height == 24
    assert set(result.verdicts["order"]) == {"-"} and set(result.verdicts["call"]) == {None}
    grades = {row["index"]: row["value"] for row in result.frame("scores").iter_rows(named=True)}
    rest = 0.09 / 17  # nine labels in two spellings, by hand
    nine = (9 * (0.9 + rest) + 2 * rest * sum(range(1, 9))) / 0.99
    assert grades[1] == pytest.approx(nine)
    readings = result.frame("readings")
    assert readings.height == 24 and not readings["p_a"].null_count()
    for column in ("p_ab", "p_ba", "winner_ab", "winner_ba"):
        assert readings[column].null_count() == 24


def test_a_verdict_of_two_scores_by_hand(tmp_path):
    """Grades 9 with 0.9 against 2 with 0.9, the rest even: P(above) + P(equal) / 2."""
    result = run(
        project.pipeline(tmp_path, prompts=1, panel=panel(["pointwise"])), engines=planted.engine(0)
    )
    small, large = 2 * 0.09 / 17 / 0.99, (0.9 + 0.09 / 17) / 0.99
    a = [large if v == 9 else small for v in range(1, 10)]
    b = [large if v == 2 else small for v in range(1, 10)]
    above = sum(a[i] * b[j] for i in range(9) for j in range(i))
    equal = sum(a[i] * b[i] for i in range(9))
    row = result.verdicts.filter((result.verdicts["a"] == 0) & (result.verdicts["b"] == 1)).row(
        0, named=True
    )
    assert row["p_a"] == pytest.approx(above + equal / 2) and row["winner"] == "a"


def test_a_prompts_own_rubric_comes_before_the_principles(tmp_path):
    value = project.pipeline(tmp_path, prompts=3, panel=panel(["rubric"]))
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    rows[0]["rubric"] = [
        {"criterion": "It helps.", "points": 3},
        {"criterion": "It is rude.", "points": -1},
    ]
    rows[1]["rubric"] = ["It helps."]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(value, engines=planted.engine())
    scores = result.frame("scores").sort("prompt", "index", "points")
    own = scores.filter(scores["prompt"] == "p0")
    assert own["criterion"].to_list() == ["It is rude.", "It helps."] * 3
    assert own["points"].to_list() == [-1.0, 3.0] * 3 and set(own["principle"]) == {""}
    assert scores.filter(scores["prompt"] == "p1").height == 3
    assert set(scores.filter(scores["prompt"] == "p2")["principle"]) == {"kind", "brief"}
    decided = result.preferences.filter(
        (result.preferences["a"] == 1) | (result.preferences["b"] == 1)
    )
    assert set(decided["chosen"]) == {1}
    n = dict(result.preferences.select("prompt", "n_readings").unique().iter_rows())
    assert n == {"p0": 1, "p1": 1, "p2": 2}
    # another rubric under the same id: asked anew, and only what is new counts
    rows[0]["rubric"] = [{"criterion": "It is rude.", "points": -2}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    after = run(value, engines=planted.engine())
    scores = after.frame("scores")
    assert after.asked == 0  # the line itself was asked before: new points, no call
    assert scores.filter(scores["prompt"] == "p0")["points"].to_list() == [-2.0] * 3
    assert after.preferences.height == 9
    kept = dict(query(tmp_path / "store", "SELECT prompt, rubric FROM prompts").iter_rows())
    assert kept == {"p0": '[["It is rude.",-2.0]]', "p1": '[["It helps.",1.0]]', "p2": None}
    checked(tmp_path / "store")


def test_a_wrong_rubric_spoils_its_row_alone(tmp_path):
    value = project.pipeline(tmp_path, prompts=2, panel=panel(["rubric"]))
    wrong = [
        {"points": 1},
        {"criterion": " "},
        {"criterion": "x", "points": 0},
        {"criterion": "x", "points": "2"},
        {"criterion": "x", "points": True},
        7,
    ]
    with (tmp_path / "prompts.jsonl").open("a") as file:
        for i, line in enumerate(wrong):
            file.write(json.dumps({"prompt": f"x{i}", "rubric": [line]}) + "\n")
    result = run(value, engines=planted.engine())
    assert (result.malformed, result.prompts) == (len(wrong), 2)


def test_unscored_scores_are_counted_once_and_silence_their_comparisons(tmp_path):
    def mute(request):
        lost = "5" in request.labels and "bad 0" in request.messages[-1].content
        return Completion("", "length", dict.fromkeys(request.labels, -9.0)) if lost else None

    value = project.pipeline(
        tmp_path, prompts=2, panel=panel(["pointwise"]), budget={"unscored": None}
    )
    result = run(value, engines=planted.engine(say=mute))
    assert result.unscored == {"score low_label_mass": 4}  # one answer, two principles, two prompts
    told = query(tmp_path / "store", "SELECT role, reason, n FROM unscored").rows()
    assert told == [("score", "low_label_mass", 4)]
    outcomes = {(r["a"], r["b"]): r["outcome"] for r in result.preferences.iter_rows(named=True)}
    assert outcomes == {(0, 1): "unscored", (0, 2): "unscored", (1, 2): "a"}


@pytest.mark.slow
def test_failures_heal_and_fills_on_the_way_change_nothing(tmp_path):
    value = project.pipeline(tmp_path, prompts=6, panel=panel(KINDS), budget={"failed": None})
    for n in (3, 7):
        broken = run(value, engines=planted.engine(fail_every=n))
        assert broken.failed
        fill(tmp_path / "store")
    healed = run(value, engines=planted.engine())
    assert healed.failed == 0 and healed.preferences.height == 18
    filled = checked(tmp_path / "store")
    assert not filled["work"]
    clean = run({**value, "store": str(tmp_path / "clean")}, engines=planted.engine())
    columns = ["prompt", "a", "b", "p_a", "outcome", "n_readings"]
    assert (
        healed.preferences.select(columns)
        .sort(columns)
        .equals(clean.preferences.select(columns).sort(columns))
    )
    assert clean.frame("scores").height == healed.frame("scores").height


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_a_run_stopped_anywhere_goes_on(tmp_path, seed):
    value = project.pipeline(tmp_path, prompts=3, panel=panel(["pointwise", "rubric", "listwise"]))
    rng, calls = random.Random(seed), 0
    while calls < 3 * (3 + 6 + 6 + 4):
        stopped = run(
            {**value, "budget": {"calls": rng.randrange(1, 30)}},
            engines=planted.engine(max_in_flight=2),
        )
        calls += stopped.asked
        checked(tmp_path / "store")
        if stopped.state == "done":
            break
    whole = run(value, engines=planted.engine())
    assert whole.state == "done" and whole.preferences.height == 9
    checked(tmp_path / "store")


def test_a_plan_counts_the_calls_of_every_kind(tmp_path):
    value = project.pipeline(tmp_path, prompts=2, panel=panel(KINDS))
    told = plan(value)
    by_judge = {}
    for row in told.rows:
        by_judge[row.judge or row.role] = by_judge.get(row.judge or row.role, 0) + row.ask
    assert by_judge == {
        "sample": 6,
        "pairwise": 24,
        "reasoning": 48,
        "pointwise": 12,
        "scale": 24,
        "rubric": 12,
        "listwise": 8,
    }
    result = run(value, engines=planted.engine())
    assert result.asked == told.ask and plan(value).ask == 0


def test_changing_a_criterion_asks_the_scores_alone(tmp_path):
    value = project.pipeline(tmp_path, prompts=2, panel=panel(["pairwise", "pointwise"]))
    run(value, engines=planted.engine())
    text = (
        (tmp_path / "small.yaml").read_text().replace("The answer is long.", "The answer is wordy.")
    )
    (tmp_path / "small.yaml").write_text(text)
    told = plan(value)
    assert [(r.role, r.principle, r.ask, list(r.why)) for r in told.rows if r.ask] == [
        ("score", "brief", 6, ["criterion of principle brief changed"])
    ]
    assert run(value, engines=planted.engine()).asked == 6


def test_examples_are_shown_with_the_label_that_the_judge_would_give(tmp_path):
    value = project.pipeline(tmp_path, prompts=1, panel=panel(["pointwise", "rubric"]))
    text = (tmp_path / "small.yaml").read_text() + (
        "examples:\n  pointwise: [{prompt: P, answer: An, score: 7, principle: kind}]\n"
        "  rubric: [{prompt: P, answer: An, fault: true, principle: brief}]\n"
    )
    (tmp_path / "small.yaml").write_text(text)
    shown = []

    def note(request):
        shown.extend(m.content for m in request.messages if request.labels)

    run(value, engines=planted.engine(say=note))
    assert sum("Fault: The answer is unkind.\nGrade: 7" in text for text in shown) == 3
    assert sum("Statement: The answer is long.\nTrue: Yes" in text for text in shown) == 3
    assert sum("Example" in text for text in shown) == 6


def test_the_answers_of_a_ranking_are_in_the_store(tmp_path):
    result = run(
        project.pipeline(tmp_path, prompts=1, panel=panel(["listwise"])), engines=planted.engine(2)
    )
    rows = result.frame("rankings").sort("principle", "permutation").to_dicts()
    assert len(rows) == 4 and {tuple(row["ranked"]) for row in rows} == {(2, 0, 1)}
    assert rows[1]["shown"] == rows[0]["shown"][::-1]  # each second one is the other way round


def test_a_ranking_that_cannot_be_read_silences_every_comparison(tmp_path):
    def babble(request):
        return (
            Completion("I like them all", "stop")
            if "Reply with the numbers" in request.messages[-1].content
            else None
        )

    value = project.pipeline(
        tmp_path, prompts=1, panel=panel(["listwise"]), budget={"unscored": None}
    )
    result = run(value, engines=planted.engine(say=babble))
    assert set(result.preferences["outcome"]) == {"unscored"} and result.unscored == {
        "rank parse": 4
    }


def test_a_program_judges_without_a_principle_beside_the_others(tmp_path):
    """A verifier says 1 of the good answer and 0 of the bad ones, exactly; the run makes its engine
    itself."""
    verifier = {"name": "right", "kind": "verifier", "check": "regex", "reference": "^good"}
    value = project.pipeline(
        tmp_path, prompts=2, panel={"judges": [verifier, {"name": "pairs", **KINDS["pairwise"]}]}
    )
    told = plan(value)
    result = run(value, engines=planted.engine(2))
    assert (
        sum(row.ask for row in told.rows if row.judge == "right") == 6 and result.asked == told.ask
    )
    scores = result.frame("scores")
    assert (
        scores.height == 6
        and set(scores["principle"]) == {""}
        and set(scores["judge"]) == {"right"}
    )
    assert {row["index"]: row["value"] for row in scores.iter_rows(named=True)} == {
        0: 0.0,
        1: 0.0,
        2: 1.0,
    }
    rows = {
        (r["a"], r["b"]): r for r in result.preferences.iter_rows(named=True) if r["prompt"] == "p0"
    }
    assert rows[0, 2]["chosen"] == rows[1, 2]["chosen"] == 2 and rows[0, 1]["outcome"] == "tie"
    assert rows[0, 2]["n_readings"] == 3  # two principles of the one, none of the other
    again = run(value, engines=planted.engine(2))
    assert again.asked == 0 and again.version == 1
    checked(tmp_path / "store")


@pytest.mark.slow
def test_a_program_alone_needs_no_principle_that_applies(tmp_path):
    verifier = {"name": "right", "kind": "verifier", "check": "regex", "reference": "^good"}
    value = project.pipeline(tmp_path, prompts=2, panel={"judges": [verifier]})
    text = (
        (tmp_path / "small.yaml")
        .read_text()
        .replace("  id: kind", "  applies_when: {tags: [none]}\n  id: kind")
    )
    (tmp_path / "small.yaml").write_text(
        text.replace("- id:", "- applies_when: {tags: [never]}\n  id:")
    )
    result = run(value, engines=planted.engine(0))
    assert result.asked == 2 * (3 + 3) and result.verdicts.height == 6
    assert [
        r["chosen"] for r in result.preferences.sort("prompt", "a", "b").iter_rows(named=True)
    ] == [0, 0, None] * 2
    changed = {**value, "panel": {"judges": [{**verifier, "reference": "^bad"}]}}
    other = run(changed, engines=planted.engine(0))  # another check is another version of the run
    assert (other.version, other.asked) == (2, 6)
    assert set(other.preferences.filter(other.preferences["outcome"] != "tie")["chosen"]) == {1, 2}


@pytest.mark.parametrize("name", ["pairwise", "pointwise", "rubric"])
def test_every_label_is_seen_to_be_one_token_before_anything_is_asked(tmp_path, name):
    class Splits(Scripted):
        async def prepare(self, labels):
            self.seen = labels
            raise EngineError(f"label {labels[0]!r} is more than one token for this model")

    engine = Splits(ScriptedConfig(), planted.answer)
    with pytest.raises(EngineError, match="more than one token"):
        run(project.pipeline(tmp_path, prompts=1, panel=panel([name])), engines={"local": engine})
    assert (
        engine.total == 0
        and engine.seen[0] == {"pairwise": "A", "pointwise": "1", "rubric": "Yes"}[name]
    )


def test_a_verifiers_files_are_found_from_the_pipeline_file(tmp_path, monkeypatch):
    """As its constitution and prompts are, wherever the command is typed; the run remembers the
    names as they stand."""
    (tmp_path / "project").mkdir()
    verifier = {"name": "right", "kind": "verifier", "check": "exact", "references": "right.jsonl"}
    value = project.pipeline(tmp_path / "project", prompts=2, panel={"judges": [verifier]})
    path = project.write(tmp_path / "project", value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"panel.judges\[0\].references: no such file: right.jsonl"
    ):
        resolve_pipeline(path)
    rows = [{"prompt": f"p{i}", "reference": "good one"} for i in range(2)]
    (tmp_path / "project" / "right.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    loaded = resolve_pipeline(path)
    assert loaded.judges[0].config.references == str(tmp_path / "project" / "right.jsonl")
    assert loaded.resolved["panel"]["judges"][0]["references"] == "right.jsonl"
    result = run(path, engines=planted.engine())
    assert result.state == "done" and set(result.frame("scores")["value"]) <= {0.0, 1.0}
    assert not result.frame("scores")["reason"].drop_nulls().len()
