"""`prefab diff`: only what an edit touches is asked; the flips are those of judging anew."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from prefab import run
from prefab.factory.errors import ConfigError, TransportError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.spec.constitution import parse_constitution
from prefab.judges.stats.preference_calibration import Calibration
from prefab.pipelines.run.diff import Diff, diff, read_version
from prefab.pipelines.store import fill
from prefab.pipelines.store.calibrations import CALIBRATION, Learned
from prefab.pipelines.store.export.base import find_run
from prefab.pipelines.store.fill import query
from tests.support import planted, project
from tests.support.store_rows import checked


def judge_of_worse(request: Any) -> Any:
    """Under a question for the worse answer, the other answer is named."""
    if "A" in request.labels and "worse" in str(request.messages):
        said = planted.answer(request)
        if said.text in "AB":
            return planted.read(request.labels, "B" if said.text == "A" else "A", 0.97)
    return None


def engine() -> Any:
    return planted.engine(say=judge_of_worse)


def record_evaluation(store: Path, value: dict[str, Any]) -> None:
    ledger = Ledger.open(store)
    ledger.add_eval(value)
    asyncio.run(ledger.close())


def constitution(folder: Path, name: str, **principles: dict[str, Any]) -> str:
    """The small constitution with fields of its principles changed, as a file."""
    value = copy.deepcopy(project.CONSTITUTION)
    for principle in value["principles"]:
        principle.update(principles.get(principle["id"], {}))
    (folder / name).write_text(yaml.safe_dump(value, sort_keys=False))
    return str(folder / name)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    run(project.pipeline(folder), engines=engine())
    return folder


@pytest.fixture
def store(small: Path, tmp_path: Path) -> Path:
    """A copy of the project's store."""
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    return tmp_path / "store"


def compared(store: Path, old: str, new: str = "", **settings: Any) -> Any:
    return diff(old, new, store, engines=engine(), **settings)


def test_an_edit_asks_one_principles_questions_and_reverting_it_none(
    store: Path, tmp_path: Path
) -> None:
    edited = constitution(tmp_path, "edited.yaml", kind={"compare": "Which answer is worse?"})
    found = compared(store, edited)
    assert (found.old.asked, found.new.asked) == (0, 36)  # 18 comparisons in two orders
    assert found.changes == ["compare of principle kind changed"]
    assert [line.principle for line in found.principles if line.mean_move] == ["kind"]
    reverted = compared(store, edited, constitution(tmp_path, "reverted.yaml"))
    assert (reverted.old.asked, reverted.new.asked) == (0, 0)


@pytest.mark.slow_but("criterion-pairwise-0", "criterion-pointwise-18")
@pytest.mark.parametrize(
    ("field", "kind", "asked"),
    [("criterion", "pairwise", 0), ("compare", "pointwise", 0), ("criterion", "pointwise", 18)],
)
def test_a_field_that_no_judge_reads_asks_nothing_and_that_is_said(
    tmp_path: Path, field: str, kind: str, asked: int
) -> None:
    panel = {"judges": [{"name": "judge", "kind": kind}]}
    run(project.pipeline(tmp_path, panel=panel), engines=engine())
    edited = constitution(tmp_path, "edited.yaml", kind={field: "The answer is harsh."})
    found = compared(tmp_path / "store", edited)
    assert found.new.asked == asked
    assert found.changes[0].startswith(f"{field} of principle kind changed")
    assert ("nothing is asked for it" in found.changes[0]) == (asked == 0)


def test_the_flips_are_those_of_judging_everything_anew(store: Path, tmp_path: Path) -> None:
    worse = {"compare": "Which answer is worse?"}
    edited = constitution(tmp_path, "edited.yaml", kind=worse, brief=worse)
    found = compared(store, edited)
    assert len(found.flips) == 12 and found.flip_rate.value == pytest.approx(12 / 18)
    anew = tmp_path / "anew"
    settings = project.pipeline(tmp_path) | {"store": str(anew), "constitution": edited}
    run(settings, engines=engine())
    sql = "SELECT prompt, a, b, outcome, p_a FROM preferences WHERE run = {} ORDER BY ALL"
    assert query(store, sql.format(found.new.run)).rows() == query(anew, sql.format(1)).rows()
    before = {row[:3]: row[3] for row in query(store, sql.format(1)).rows()}
    after = {row[:3]: row[3] for row in query(anew, sql.format(1)).rows()}
    flips = {place for place in before if {before[place], after[place]} == {"a", "b"}}
    assert {(one.prompt, one.a, one.b) for one in found.flips} == flips


@pytest.mark.slow_but("edit3")
@pytest.mark.parametrize(
    "edit",
    [
        {"title": "Another title"},
        {"tags": ["tone"]},
        {"id": "kinder", "formerly": ["kind"]},
        {"id": "kinder"},
    ],
)
def test_edits_without_another_meaning_ask_nothing(
    store: Path, tmp_path: Path, edit: dict[str, Any]
) -> None:
    found = compared(store, constitution(tmp_path, "edited.yaml", kind=edit))
    assert found.new.asked == 0 and found.moved == found.changes == []
    assert {line.principle for line in found.principles} == {edit.get("id", "kind"), "brief"}


@pytest.mark.slow
def test_other_yaml_of_the_same_meaning_asks_nothing(store: Path, tmp_path: Path) -> None:
    value = copy.deepcopy(project.CONSTITUTION)
    value["principles"] = [dict(reversed(p.items())) for p in value["principles"]]
    text = "# a comment\n" + yaml.safe_dump(value, default_flow_style=True)
    (tmp_path / "flow.yaml").write_text(text)
    found = compared(store, str(tmp_path / "flow.yaml"))
    assert found.new.asked == 0 and found.changes == []
    assert found.old.digest == found.new.digest


@pytest.mark.slow
def test_a_later_run_finds_what_the_diff_asked(store: Path, tmp_path: Path) -> None:
    edited = constitution(tmp_path, "edited.yaml", kind={"compare": "Which answer is nicer?"})
    compared(store, edited)
    done = run(project.pipeline(tmp_path) | {"constitution": edited}, engines=engine())
    assert done.asked == 0
    assert find_run(store)["version"] == 2 and find_run(store)["name"] == "small"


def test_a_principle_that_is_gone_or_new_is_counted_apart(store: Path, tmp_path: Path) -> None:
    value = copy.deepcopy(project.CONSTITUTION)
    value["principles"][0] |= {"id": "true", "compare": "Which answer is truer?"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(value))
    lines = {
        line.principle: line for line in compared(store, str(tmp_path / "other.yaml")).principles
    }
    assert (lines["kind"].only_old, lines["true"].only_new) == (18, 18)
    assert lines["brief"].compared == 18


@pytest.mark.slow
def test_a_sample_is_the_same_each_time(store: Path, tmp_path: Path) -> None:
    edited = constitution(tmp_path, "edited.yaml", kind={"compare": "Which answer is worse?"})
    first = compared(store, edited, sample=5, seed=3)
    again = compared(store, edited, sample=5, seed=3)
    assert (first.comparisons, first.new.asked, again.new.asked) == (5, 10, 0)
    assert [one.preference for one in first.moved] == [one.preference for one in again.moved]


@pytest.mark.slow
def test_a_sample_of_a_calibrated_run_is_calibrated_as_the_run_is(
    store: Path, tmp_path: Path
) -> None:
    learned = Learned("", "oracle", "a test", Calibration("temperature", 0.0, 3.0))
    record_evaluation(
        store, asdict(learned) | {"name": CALIBRATION, "subject": "small@1", "run": 1}
    )
    found = compared(
        store, constitution(tmp_path, "edited.yaml", kind={"title": "Other"}), sample=5
    )
    assert (found.comparisons, found.moved) == (5, [])
    sql = "SELECT DISTINCT calibrated FROM preferences WHERE run = 2"
    assert query(store, sql).rows() == [("oracle",)]
    with_others = compared(store, constitution(tmp_path, "small.yaml"), sets=["panel.orders=first"])
    sql = f"SELECT DISTINCT calibrated FROM preferences WHERE run = {with_others.new.run}"
    assert query(store, sql).rows() == [(None,)]


@pytest.mark.slow
def test_a_filling_reads_the_constitutions_of_new_runs_only(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counted(text: str, name: str) -> Any:
        read.append(name)
        return parse_constitution(text, name)

    monkeypatch.setattr(fill, "parse_constitution", counted)
    for title in ("One", "Another"):
        compared(store, constitution(tmp_path, "edited.yaml", kind={"title": title}))
    assert read == [f"constitution of run small-rejudge@{n}" for n in (1, 2)]
    sql = "SELECT * FROM constitutions ORDER BY ALL"
    filled = query(store, sql).rows()
    fill.rebuild(store)
    assert filled == query(store, sql).rows()


def test_two_runs_are_compared_as_they_stand(store: Path, tmp_path: Path) -> None:
    worse = {"compare": "Which answer is worse?"}
    edited = constitution(tmp_path, "edited.yaml", kind=worse, brief=worse)
    run(project.pipeline(tmp_path) | {"constitution": edited}, engines=engine())
    found = diff("small@1", "small@2", store)
    assert len(found.flips) == 12 and found.new.asked == found.new.reused == 0


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_git_revision_of_a_constitution(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edited = {"compare": "Which answer is worse?"}
    constitution(tmp_path, "mine.yaml")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "mine.yaml"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    constitution(tmp_path, "mine.yaml", kind=edited)
    found = compared(store, "HEAD:mine.yaml", "mine.yaml")
    assert found.changes == ["compare of principle kind changed"]
    with pytest.raises(ConfigError, match="git says"):
        read_version("HEAD~7:mine.yaml", store)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("missing.yaml", "", "missing.yaml: no such file"),
        ("other@7", "small@1", "has no run 'other@7'"),
        ("small@1", "stranger@1", "no comparison in common"),
    ],
)
def test_bad_versions_are_told(store: Path, tmp_path: Path, old: str, new: str, words: str) -> None:
    if new.startswith("stranger"):
        settings = project.pipeline(tmp_path, prompts=1, name="stranger", store=str(store))
        source = tmp_path / "prompts.jsonl"
        source.write_text('{"id": "x", "prompt": "Something else?"}\n')
        run(settings, engines=engine())
    with pytest.raises(ConfigError, match=words):
        compared(store, old, new)


@pytest.mark.slow
def test_a_file_of_pairs_is_judged_under_both_versions(tmp_path: Path) -> None:
    """Also where the first try failed half-way: the answers, which no call gave, stay."""
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"good answer {i}", "rejected": f"bad 0 answer {i}"}
        for i in range(6)
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "pairs.parquet")
    project.write(tmp_path, project.pipeline(tmp_path))
    worse = {"compare": "Which answer is worse?"}
    edited = constitution(tmp_path, "edited.yaml", kind=worse, brief=worse)

    def failing(request: Any) -> Any:
        if "good answer 3" in str(request.messages):
            raise TransportError("the server is away")
        return judge_of_worse(request)

    def found(*names: str, **engines: Any) -> Diff:
        files = [str(tmp_path / name) for name in names]
        return diff(*files, store=store, pairs=tmp_path / "pairs.parquet", **engines)

    store = tmp_path / "pairs-store"
    first = found("small.yaml", "edited.yaml", engines=planted.engine(say=failing))
    assert (first.comparisons, first.new.failed > 0) == (5, True)
    whole = found("small.yaml", "edited.yaml", engines=engine())
    assert (whole.comparisons, len(whole.flips), whole.source) == (6, 6, "pairs@1")
    assert (whole.old.asked, whole.new.asked, first.new.asked) == (4, 2, 10)
    with_labels = found("edited.yaml")
    assert (with_labels.old.name, len(with_labels.flips)) == ("pairs@1", 6)
    assert query(store, "SELECT DISTINCT text FROM samples WHERE run = 3").height == 12
    assert edited and checked(store)


@pytest.mark.slow
def test_pairs_with_turns_of_their_own_before_the_answers(tmp_path: Path) -> None:
    """Judges see an answer with the turns between prompt and answer; the store keeps them apart."""
    start, later = {"role": "user", "content": "A fish?"}, {"role": "user", "content": "And?"}
    sides = {
        side: [start, {"role": "assistant", "content": f"{side} fish"}, later, last]
        for side, word in (("chosen", "good"), ("rejected", "bad 0"))
        for last in [{"role": "assistant", "content": f"{word} answer"}]
    }
    row = json.dumps({**sides, "two_contexts": True})
    (tmp_path / "pairs.jsonl").write_text(row + "\n")
    project.write(tmp_path, project.pipeline(tmp_path))
    asked = []

    def heard(request: Any) -> Any:
        asked.append(str(request.messages))
        return judge_of_worse(request)

    store, edited = tmp_path / "store", constitution(tmp_path, "edited.yaml")
    engines = planted.engine(say=heard)
    found = diff(edited, store=store, pairs=tmp_path / "pairs.jsonl", engines=engines)
    assert (found.comparisons, found.new.asked, len(found.flips)) == (1, 4, 0)
    assert all("chosen fish" in text and "rejected fish" in text for text in asked)
    sql = "SELECT text, context FROM samples WHERE run = {} ORDER BY ALL"
    assert query(store, sql.format(2)).rows() == query(store, sql.format(1)).rows()
    checked(store)


def test_pairs_without_a_judge_or_with_a_run_are_told(tmp_path: Path) -> None:
    row = {"prompt": "A question?", "chosen": "good", "rejected": "bad"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    file, store = constitution(tmp_path, "mine.yaml"), tmp_path / "store"
    with pytest.raises(ConfigError, match="no pipeline.yaml beside it; name a pipeline"):
        diff(file, store=store, pairs=tmp_path / "pairs.jsonl")
    with pytest.raises(ConfigError, match="--pairs or --run, not both"):
        diff(file, store=store, run="small", pairs=tmp_path / "pairs.jsonl")
