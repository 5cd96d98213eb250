"""People as a panel's stronger judge: asked apart from runs, taken in by the next, and never
guessed."""

from __future__ import annotations

import polars as pl
import pytest

from prefab import run
from prefab.factory.errors import ConfigError
from prefab.factory.types import Completion
from prefab.judges.kinds import human
from prefab.pipelines.cli.run_report import next_command
from prefab.pipelines.quality import agreement, labeling
from prefab.pipelines.run.plan import plan
from tests.support import project
from tests.support.planted import two_engines as engines
from tests.support.store_rows import checked


def pipeline(folder, **settings):
    """Four prompts, of which the cheap judge is in doubt about two pairs each of p1 and p3, under
    both principles."""
    judges = [{"name": "cheap", "kind": "pairwise"}, {"name": "people", "kind": "human"}]
    value = project.pipeline(
        folder, 4, panel={"judges": judges, "escalate": {"to": ["people"], **settings}}
    )
    return {**value, "engines": {"local": {"engine": "scripted", "model": "local"}}}


def made(folder, **settings):
    return run(pipeline(folder, **settings), engines={"local": engines()["local"]})


def say(store, wanted, n, annotator="ann", about=None):
    """The next `n` comparisons (of those `about` which there is something to say) labelled by
    somebody who sees which answer is the good one, and says it is or is not."""
    with labeling.open_session(store, "", annotator) as session:
        todo = [task for task in session.todo if about is None or task.key in about]
        for task in todo[:n]:
            good = "a" if "good" in task.shown[0] else "b"
            session.say(good if wanted else human.swapped(good), task)
        return [(task.prompt, task.text_a, task.text_b) for task, _, _ in session.done[-n:]]


def doubted(result):
    return result.preferences.filter(
        result.preferences["prompt"].is_in(["p1", "p3"])
        & ((result.preferences["a"] == 1) | (result.preferences["b"] == 1))
    )


def test_what_is_in_doubt_waits_for_people_and_their_word_decides(tmp_path, capsys):
    first = made(tmp_path)
    assert (first.state, first.awaited, first.preferences.height) == ("done", 8, 8) and doubted(
        first
    ).height == 0
    assert first.escalation == {"settled": 8, "unsure": 4, "calls": 8, "calls_if_all": 24}
    assert next_command(first, "prefab run pipeline.yaml") == 0
    told = capsys.readouterr().err
    assert (
        "8 labels from people are missing" in told
        and "prefab label --store" in told
        and "prefab run pipeline.yaml" in told
    )
    shown = say(first.store, True, 8)  # what the run waits for comes first
    assert len(shown) == 8 and all(
        prompt in ("p1", "p3") and "good" in a + b for prompt, a, b in shown
    )
    assert plan(pipeline(tmp_path)).ask == 8
    second = made(tmp_path)
    assert (second.awaited, second.asked, second.preferences.height) == (0, 8, 12)
    rows = doubted(second)
    assert rows.height == 4 and set(rows["chosen"]) == {1} and set(rows["p_chosen"]) == {1.0}
    assert (
        set(rows["exactness"]) == {"hard"}
        and set(rows["escalation"]) == {"unsure"}
        and set(rows["n_readings"]) == {2}
    )
    assert made(tmp_path).asked == 0 == plan(pipeline(tmp_path)).ask
    checked(first.store)


@pytest.mark.slow
def test_a_corrected_label_is_another_answer(tmp_path):
    made(tmp_path)
    say(tmp_path / "store", True, 8)
    made(tmp_path)
    with labeling.open_session(tmp_path / "store", "", "ann") as session:
        task = session.undo()
        session.say("b" if "good" in task.shown[0] else "a")
    last = made(tmp_path)
    assert (last.asked, last.awaited) == (1, 0)
    changed = doubted(last).filter(
        pl.col("outcome") == "tie"
    )  # one principle says the one, one the other
    assert changed.height == 1 and changed["prompt"].to_list() == [task.prompt]
    for _ in range(2):  # taken back, said again, and taken back again: each time nothing stands
        with labeling.open_session(tmp_path / "store", "", "ann") as session:
            session.undo()
        back = made(tmp_path)
        assert (back.awaited, doubted(back).height) == (1, 3)
        say(tmp_path / "store", True, 1)
        said = made(tmp_path)
        assert (said.awaited, doubted(said).height, set(doubted(said)["chosen"])) == (0, 4, {1})
    checked(tmp_path / "store")


def test_what_is_over_the_share_stays_with_the_cheap_judge(tmp_path):
    result = made(
        tmp_path, max_share=0.34
    )  # 1.02 of a prompt's three comparisons: one, and seldom two
    assert (
        result.escalation["budget"] + result.escalation["unsure"] == 4
        and result.escalation["budget"] >= 1
    )
    assert result.awaited == 2 * result.escalation["unsure"]
    left = doubted(result)
    assert set(left["escalation"]) == {"budget"} and left.height == result.escalation["budget"]


@pytest.mark.slow
def test_people_who_are_split_are_waited_for_and_some_may_not_count(tmp_path):
    made(tmp_path)
    with labeling.open_session(tmp_path / "store", "", "bob") as session:
        waiting = {task.key for task in session.todo[:8]}
    say(tmp_path / "store", True, 8)
    with labeling.open_session(tmp_path / "store", "", "bob") as session:
        assert not waiting & {task.key for task in session.todo[:4]}  # nobody waits for them
    say(tmp_path / "store", False, 8, "bob", waiting)
    with labeling.open_session(tmp_path / "store", "", "cleo") as session:
        assert waiting == {task.key for task in session.todo[:8]}  # split: they wait again
    assert made(tmp_path).awaited == 8
    rows = labeling.recorded(tmp_path / "store")
    assert {winner for winner, _ in human.answers(rows).values()} == {None}
    assert len(human.answers(rows, ["bob"])) == 8 and None not in {
        w for w, _ in human.answers(rows, ["bob"]).values()
    }


@pytest.mark.slow
def test_statistics_take_people_for_gold_not_for_a_judge(tmp_path):
    made(tmp_path)
    say(tmp_path / "store", True, 8)
    made(tmp_path)
    found = agreement.measure(tmp_path / "store", resamples=0)
    assert [row["judge"] for row in found["judges"]] == ["cheap"] and found["gold"].startswith(
        "8 comparisons labelled by 1"
    )
    assert (
        found["judges"][0]["accuracy"].value == 0.0
    )  # where it was in doubt it leaned the wrong way


@pytest.mark.parametrize("said", ["a", "b", "tie"])
@pytest.mark.parametrize("names", [("x", "y"), ("y", "x")])
def test_a_word_is_of_the_answers_whatever_their_order(said, names):
    """A label of another program's, that names the answers by their texts."""
    rows = [{"prompt": "p", "a": names[0], "b": names[1], "principle": "kind", "winner": said}]
    known, judge = human.answers(rows), human.HumanJudge(human.HumanConfig(name="people"))
    better = {"a": names[0], "b": names[1], "tie": None}[said]
    for a, b in (("x", "y"), ("y", "x")):
        request = human.request(known, "p", a, b, "kind")
        word = request.messages[0].content.split('"said":"')[1].split('"')[0]
        verdict = judge.decode(None, Completion(word, "stop"))
        assert verdict.exactness == "hard" and verdict.p_a in (0.0, 0.5, 1.0)
        assert verdict.winner == ("tie" if better is None else "a" if better == a else "b")
    assert (
        human.request(known, "p", "x", "y", "brief") is None
        and human.request(known, "q", "x", "y", "kind") is None
    )


def test_people_are_not_asked_about_everything(tmp_path):
    value = project.pipeline(
        tmp_path,
        panel={
            "judges": [{"name": "cheap", "kind": "pairwise"}, {"name": "people", "kind": "human"}]
        },
    )
    with pytest.raises(
        ConfigError, match=r"panel.judges\[1\].kind: people label apart .* panel.escalate.to"
    ):
        run(value)
