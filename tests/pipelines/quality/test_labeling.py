"""`prefab label`: what is recorded, in which order answers are shown, undo, queue files, and a
terminal that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefab import run
from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.judges.kinds import human
from prefab.pipelines.cli.main import main
from prefab.pipelines.quality import label_files, labeling
from prefab.pipelines.store.fill import query
from tests.support import project

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def store(tmp_path):
    """Three prompts, three drafts each, two principles: 18 comparisons."""
    run(project.pipeline(tmp_path, prompts=3), engines=project.engine())
    return tmp_path / "store"


def label_with_keys(
    store: Path, keys: str, annotator: str = "ann", limit: int | None = None, **more
):
    """One session at a terminal that types `keys`; gives the report, what was shown, and the first
    task."""
    shown: list[str] = []
    with labeling.open_session(store, "", annotator, **more) as session:
        todo = list(session.todo)
        report = labeling.talk(session, iter(keys), shown.append, limit)
    return report, shown, todo


def standing(store: Path) -> list[human.Label]:
    return human.latest(labeling.recorded(store))


def test_a_label_speaks_of_the_answers_not_of_the_slots(store):
    report, _, todo = label_with_keys(store, "abtsq")
    assert report.data() | {"run": ""} == {
        "run": "",
        "annotator": "ann",
        "labelled": 4,
        "said": {"a": 1, "b": 1, "tie": 1, "skip": 1},
        "undone": 0,
        "unanswered": 0,
        "known": 0,
        "left": 14,
    }
    texts = dict(query(store, "SELECT sample, text FROM samples").iter_rows())
    for task, said, value in zip(todo, ("a", "b"), labeling.recorded(store), strict=False):
        chosen = task.shown[0] if said == "a" else task.shown[1]
        assert texts[value[value["winner"]]] == chosen and value["order"] == task.order
    assert [found.winner for found in standing(store)][2:] == ["tie", "skip"]
    rows = query(store, "SELECT prompt, winner, annotator FROM human_labels").to_dicts()
    assert len(rows) == 4 and {row["annotator"] for row in rows} == {"ann"}


def test_both_orders_are_shown_and_the_seed_decides(store):
    orders = [task.order for task in label_with_keys(store, "")[2]]
    assert {"ab", "ba"} == set(orders) and orders == [
        task.order for task in label_with_keys(store, "")[2]
    ]
    assert orders != [task.order for task in label_with_keys(store, "", seed=1)[2]]


@given(st.text(), st.integers(0, 9))
def test_orders_are_balanced(annotator, seed):
    places = [human.place_of("p", f"s{i}", "t", "kind") for i in range(400)]
    share = sum(human.shown_order(seed, annotator, place) == "ab" for place in places) / 400
    assert 0.35 < share < 0.65  # six standard deviations


def test_nothing_of_the_judges_is_shown(store):
    _, shown, todo = label_with_keys(store, "q")
    page = shown[-1]
    assert todo[0].text_a in page and todo[0].text_b in page and todo[0].question in page
    assert not [
        word for word in ("judge", "small@1", "0.8", "p_a", todo[0].a, todo[0].b) if word in page
    ]


def test_a_session_is_resumed_and_people_are_apart(store):
    first = label_with_keys(store, "aaaaaq")[2]
    again = label_with_keys(store, "")[2]
    assert len(again) == 13 and [task.place for task in again] == [task.place for task in first[5:]]
    assert len(label_with_keys(store, "", annotator="bob")[2]) == 18
    report, _shown, _ = label_with_keys(store, "t" * 99)
    assert (report.left, report.said) == (0, {"tie": 13}) and label_with_keys(store, "")[2] == []
    assert label_with_keys(store, "ab", annotator="bob", limit=1)[0].left == 17


def test_undo_is_a_row_and_what_it_takes_back_can_be_said_again(store):
    report, _, todo = label_with_keys(store, "abuuaq")
    assert (report.undone, report.left) == (2, 17)
    values = labeling.recorded(store)
    assert [sorted(value)[0] for value in values].count("annotator") == 2 and len(
        values
    ) == 5  # nothing was deleted
    assert [found.place for found in standing(store)] == [todo[0].place]
    report, shown, _ = label_with_keys(
        store, "uuaq"
    )  # the last session's, then nothing is left to undo
    assert report.undone == 1 and "there is nothing to undo" in shown
    assert [found.place for found in standing(store)] == [todo[0].place]


def test_the_same_word_after_an_undo_stands(store):
    label_with_keys(store, "auauaq")
    assert len(standing(store)) == 1 and len(labeling.recorded(store)) == 5


def test_other_keys_and_the_end_of_keys_label_nothing(store):
    report, shown, _ = label_with_keys(store, "xyz\n7")
    assert (
        report.data()["labelled"] == 0
        and labeling.recorded(store) == []
        and shown.count(labeling.HELP) == 6
    )


def test_latest_resolves_undo_corrections_and_several_people():
    a = human.row("p", "x", "y", "kind", "a", "ab", "ann", 1.0)
    b = human.row("p", "x", "y", "kind", "b", "ab", "ann", 2.0)
    turned = human.row("p", "y", "x", "kind", "a", "ab", "bob", 3.0)  # bob too prefers y
    found = human.latest([a, b, turned, {"note": "not a label"}])
    assert [(f.winner, f.winner_in_place, f.annotator) for f in found] == [
        ("b", "b", "ann"),
        ("a", "b", "bob"),
    ]
    assert human.gold(found) == {("p", "x", "y", "kind"): "b"}
    back = human.undo(human.name_of(b), "ann", 4.0)
    assert [f.winner for f in human.latest([a, b, turned, back])] == ["a", "a"]
    assert human.gold(human.latest([a, b, turned, back])) == {
        ("p", "x", "y", "kind"): None
    }  # one against one
    skipped = human.row("p", "x", "y", "kind", "skip", "ab", "ann", 5.0)
    assert human.gold(human.latest([a, skipped])) == {}
    assert human.row("p", "x", "y", "kind", "a", "ba", "ann", 1.0)["winner"] == "b"


@pytest.mark.slow
def test_people_are_gold_for_the_statistics(store):
    from prefab.pipelines.quality.rating_matrix import load_matrix
    from prefab.pipelines.store.selection import select as choose

    _, _, _todo = label_with_keys(store, "abu" + "bq")
    data, source = load_matrix(choose(store))
    known = int((data.gold == data.gold).sum())
    assert known == 2 and source == "2 comparisons labelled by 1 person"


@pytest.mark.slow
def test_which_comparisons_come_first(tmp_path):
    """Two judges: sure and of one mind about prompt p0, unsure about p1, of two minds about p2."""
    from math import log

    from prefab.factory.engines.scripted import Scripted, ScriptedConfig
    from prefab.factory.types import Completion

    def answer(request):
        if project.asked(request) == "sample":
            return project.answer(request)
        text = "\n".join(m.content for m in request.messages)
        p = 0.95
        if "Question 1?" in text:
            p = 0.5
        if "Question 2?" in text and request.template_kwargs == (("who", 2),):
            p = 0.05
        first, second = (int(part[0]) for part in text.split("draft ")[1:3])
        p = p if first < second else 1 - p
        masses = {"A": 0.9 * p, "B": 0.9 * (1 - p), "T": 0.01}
        spellings = {" " * i + k: v / 2 for k, v in masses.items() for i in (0, 1)}
        return Completion("A", "length", {k: log(v) for k, v in spellings.items()}, "exact", 9, 1)

    judges = [{"name": f"j{i}", "kind": "pairwise", "template_kwargs": {"who": i}} for i in (1, 2)]
    value = project.pipeline(tmp_path, prompts=3, panel={"judges": judges})
    run(value, engines={"local": Scripted(ScriptedConfig(), answer)})
    store = tmp_path / "store"
    order = {
        first: [task.prompt for task in labeling.tasks(store, "", "ann", first)]
        for first in labeling.FIRST
    }
    assert set(order["unsure"][:12]) == {"p1", "p2"} and set(order["unsure"][12:]) == {"p0"}
    assert set(order["divided"][:6]) == {"p2"}
    assert sorted(order["random"]) == sorted(order["unsure"]) and order["random"] != order["unsure"]
    only = labeling.tasks(store, "", "ann", principles=["kind"])
    assert len(only) == 9 and {task.principle for task in only} == {"kind"}
    with pytest.raises(ConfigError, match="brief, kind"):
        labeling.tasks(store, "", "ann", principles=["kinder"])


@pytest.fixture
def twins(tmp_path):
    """One prompt whose drafts 0 and 2 have the same text, one principle: of its two comparisons
    between different texts each is the other."""
    from dataclasses import replace

    from prefab.factory.engines.scripted import Scripted, ScriptedConfig

    def answer(request):
        made = project.answer(request)
        if project.asked(request) == "sample" and request.repeat[0] == 2:
            return replace(made, text=made.text.replace("draft 2", "draft 0"))
        return made

    value = project.pipeline(tmp_path, prompts=1)
    run(value, engines={"local": Scripted(ScriptedConfig(), answer)})
    return tmp_path / "store"


@pytest.mark.slow
def test_the_same_pair_is_asked_once_whatever_draft_it_comes_from(twins):
    places = query(twins, "SELECT count(*) FROM readings WHERE principle = 'kind'").item()
    assert places == 2  # draft 0 and 1, draft 1 and 2
    for first in labeling.FIRST:  # the first of them stands for both, whatever the order
        found = labeling.tasks(twins, "", "ann", first, principles=["kind"])
        assert [(task.text_a[:7], task.text_b[:7]) for task in found] == [("draft 0", "draft 1")]
    with labeling.open_session(twins, "", "ann") as session:
        task = session.todo[0]
        turned = human.row(  # as another run's session records it, which met the other draft
            task.prompt,
            "another draft",
            "one more",
            task.principle,
            "a",
            "ab",
            "ann",
            1.0,
            texts={"a": task.names[1], "b": task.names[0]},
        )
        session.record(turned)
        assert task in session.todo
        session.refresh()
        assert task not in session.todo and [w for _, _, w in session.done] == ["b"]
        assert task in session.of("bob").todo


def test_a_label_of_another_window_is_not_asked_for_again(store):
    with (
        labeling.open_session(store, "", "ann") as one,
        labeling.open_session(store, "", "ann", "random") as other,
    ):
        shown: list[str] = []
        first = one.todo[0]
        keys = iter("aq")

        def typed():
            for key in keys:
                if key == "a":
                    other.say("tie", one.todo[1])  # meanwhile, in another window
                yield key

        labeling.talk(one, typed(), shown.append)
        assert len(one.todo) == 16 and one.done[0][2] == "tie"
        other.refresh()
        assert other.undo().key == first.key  # the last label, whoever's window it was
        one.refresh()
        assert one.todo[0].key == first.key


def argilla_of(rows: list[dict], labels: dict[str, list]) -> None:
    """Fill in responses, as Argilla writes them: by person, the label of each record."""
    for person, said in labels.items():
        for row, value in zip(rows, said, strict=False):
            if value:
                found = row["responses"].setdefault("label", [])
                found.append({"value": value, "user_id": person})


def label_studio_of(rows: list[dict], labels: dict[str, list]) -> None:
    """Fill in annotations, as Label Studio exports them."""
    for number, row in enumerate(rows):
        row["id"], row["annotations"] = number + 1, []
        for person, said in labels.items():
            if number < len(said) and said[number]:
                result = {
                    "from_name": "label",
                    "to_name": "answer_a",
                    "type": "choices",
                    "value": {"choices": [said[number]]},
                }
                skipped = said[number] == "skip"
                row["annotations"].append(
                    {
                        "completed_by": {"email": person},
                        "was_cancelled": skipped,
                        "result": [] if skipped else [result],
                    }
                )


def json_min_of(rows: list[dict]) -> list[dict]:
    """Annotated tasks as Label Studio's JSON-MIN: a row for each annotation that was submitted."""
    return [
        {
            **row["data"],
            "id": row["id"],
            "label": annotation["result"][0]["value"]["choices"][0],
            "annotator": annotation["completed_by"]["email"],
            "annotation_id": 10 * row["id"] + number,
            "lead_time": 3.2,
        }
        for row in rows
        for number, annotation in enumerate(row["annotations"])
        if not annotation["was_cancelled"]
    ]


@pytest.mark.slow_but("label-studio-label_studio_of")
@pytest.mark.parametrize("form, fill", [("argilla", argilla_of), ("label-studio", label_studio_of)])
def test_labels_go_to_other_programs_and_come_back_once(store, tmp_path, form, fill):
    file = tmp_path / "tasks.json"
    with labeling.open_session(store, "", "ann") as session:
        report = label_files.write_queue(session, file, 4, form)
        shown = {task.name(): task.shown for task in session.todo[:4]}
    assert (report.unanswered, report.left) == (4, 18)
    rows = json.loads(file.read_text())
    if form == "argilla":  # the names in the settings of its dataset
        page = (Path(__file__).resolve().parents[3] / "docs/panels.md").read_text()
        settings = re.findall(r'Field\("(\w+)"\)', page.split("```py\n")[1].split("```")[0])
        assert sorted(settings) == sorted(rows[0]["fields"])
    for row in rows:  # what people see: nothing of judges, principles' names, or drafts' numbers
        fields = row["fields"] if form == "argilla" else row["data"]
        name = row["id"] if form == "argilla" else row["data"]["comparison"]
        assert (fields["answer_a"], fields["answer_b"]) == shown[name]
    words = file.read_text()
    assert not [w for w in ("judge", "small@1", "p_a", '"principle', "verdict") if w in words]
    fill(rows, {"ben@x.org": ["a", "b", "skip", None], "cleo@x.org": ["b", "b", "tie", "a"]})
    file.write_text(json.dumps(rows))
    with labeling.open_session(store, "", "ann") as session:
        report = label_files.read_answers(session, file)
        assert len(session.todo) == 18  # none is ann's
    assert (report.said, report.known) == ({"a": 2, "b": 3, "skip": 1, "tie": 1}, 0)
    assert report.unanswered == 0
    texts = dict(query(store, "SELECT sample, text FROM samples").iter_rows())
    chosen = {  # what each said of what they saw, whatever the order
        (label.annotator, texts[label.a if label.winner == "a" else label.b])
        for label in standing(store)
        if label.winner in "ab"
    }
    names = [row["id"] if form == "argilla" else row["data"]["comparison"] for row in rows]
    a, b = ([shown[name][side] for name in names] for side in (0, 1))
    expected = {("ben@x.org", a[0]), ("ben@x.org", b[1])}
    assert chosen == expected | {("cleo@x.org", b[0]), ("cleo@x.org", b[1]), ("cleo@x.org", a[3])}
    n = len(labeling.recorded(store))
    with labeling.open_session(store, "", "ann") as session:
        again = label_files.read_answers(session, file)  # the same file once more
    assert (again.known, again.said, len(labeling.recorded(store))) == (7, {}, n)
    if form == "label-studio":
        file.write_text(json.dumps(json_min_of(rows)))
        with labeling.open_session(store, "", "ann") as session:
            again = label_files.read_answers(session, file)
        assert (again.known, again.said) == (6, {})  # all but the skip
        file.write_text(json.dumps([{**json_min_of(rows)[0], "annotator": "dan@x.org"}]))
        with labeling.open_session(store, "", "ann") as session:
            assert label_files.read_answers(session, file).said == {"a": 1}
    rows[0].pop("responses", None)
    rows[0].get("data", {}).pop("comparison", None)
    file.write_text(json.dumps(rows))
    with (
        labeling.open_session(store, "", "ann") as session,
        pytest.raises(ConfigError, match=r"tasks\.json row 1: each (record|task) has"),
    ):
        label_files.read_answers(session, file)


def test_the_labels_of_one_person_are_the_annotators(store, tmp_path):
    file = tmp_path / "tasks.json"
    with labeling.open_session(store, "", "ann") as session:
        with pytest.raises(ConfigError, match="no format of label files: argilla, label-studio"):
            label_files.write_queue(session, file, 2, "argila")
        with pytest.raises(ConfigError, match=r"ends with \.json"):
            label_files.write_queue(session, tmp_path / "tasks.jsonl", 2, "argilla")
        label_files.write_queue(session, file, 2, "label-studio")
    rows = json.loads(file.read_text())
    label_studio_of(rows, {"7": ["a", "tie"]})
    file.write_text(json.dumps(rows))
    with labeling.open_session(store, "", "ann") as session:
        label_files.read_answers(session, file)
    assert {label.annotator for label in standing(store)} == {"ann"}


def fill_in(file: Path, answers: list) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row | {"label": said} for row, said in zip(rows, answers, strict=False)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.mark.slow
def test_a_queue_file_there_and_back(store, tmp_path):
    file = tmp_path / "queue.jsonl"
    label_with_keys(store, "aaq")
    with labeling.open_session(store, "", "ann") as session:
        assert label_files.write_queue(session, file, 4).unanswered == 4
        with pytest.raises(ConfigError, match="exists already"):
            label_files.write_queue(session, file)
    rows = fill_in(file, ["a", "T", "", "b"])
    assert sorted(rows[0]) == ["answer_a", "answer_b", "conversation", "id", "label", "question"]
    with labeling.open_session(store, "", "ann") as session:
        report = label_files.read_answers(session, file)
    assert (report.said, report.unanswered, report.left) == ({"a": 1, "tie": 1, "b": 1}, 1, 13)
    texts = dict(query(store, "SELECT sample, text FROM samples").iter_rows())
    first = standing(store)[2]
    assert texts[first.a if first.winner == "a" else first.b] == rows[0]["answer_a"]
    n = len(labeling.recorded(store))
    with labeling.open_session(
        store, "", "ann", seed=5
    ) as session:  # another seed shows other orders: the file's own counts
        assert label_files.read_answers(session, file).known == 3
    assert len(labeling.recorded(store)) == n
    fill_in(file, ["b", "T", "", "b"])
    with labeling.open_session(store, "", "ann") as session:
        assert (label_files.read_answers(session, file).said, len(session.todo)) == (
            {"b": 1},
            13,
        )  # a change of mind


def test_mistakes_in_an_answers_file_are_told_with_their_lines_and_nothing_is_recorded(
    store, tmp_path
):
    file = tmp_path / "queue.jsonl"
    with labeling.open_session(store, "", "ann") as session:
        label_files.write_queue(session, file, 2)
    rows = fill_in(file, ["a", "b"])
    bad = [
        rows[0],
        rows[1] | {"label": "A or B"},
        rows[0] | {"label": "b"},
        rows[0] | {"id": "00"},
        ["x"],
        {"id": 7},
        rows[1] | {"label": 1},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in bad) + "\n{half")
    with labeling.open_session(store, "", "ann") as session, pytest.raises(ConfigError) as caught:
        label_files.read_answers(session, file)
    told = {problem.line: problem.message for problem in caught.value.problems}
    assert set(told) == {2, 3, 4, 5, 6, 7, 9}
    assert (
        "not one of a, b, tie, skip" in told[2]
        and "in line 1" in told[3]
        and "another run" in told[4]
    )
    assert labeling.recorded(store) == []
    with (
        labeling.open_session(store, "", "ann") as session,
        pytest.raises(ConfigError, match="cannot be read"),
    ):
        label_files.read_answers(session, tmp_path / "none.jsonl")


@given(st.text())
def test_nothing_shown_can_move_the_cursor(text):
    shown = labeling.harmless(text)
    assert all(c in "\n\t" or c.isprintable() for c in shown)
    assert labeling.harmless("a\x1b[2Jb") == "a\\x1b[2Jb"


# --- the command, from a pipe and in a real terminal ---


def prefab(*words: str, keys: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefab.pipelines.cli.main", "label", *words],
        input=keys,
        cwd=ROOT,
        text=True,
        capture_output=True,
    )


def test_the_command(store, tmp_path, monkeypatch, capsys):
    done = prefab("--store", str(store), "--annotator", "ann", "--json", keys="a\nb\nq\n")
    assert done.returncode == 0 and json.loads(done.stdout)["labelled"] == 2, done.stderr
    for words, told in (
        ([str(tmp_path / "none")], "no store here"),
        ([str(store), "--first", "best"], "did you mean"),
        ([str(store), "--run", "nobody"], "has no run"),
        ([str(store), "--queue", "a", "--answers", "b"], "give only one of them"),
        ([str(store), "--queue", "a", "--export", "argilla", "b"], "give only one of them"),
    ):
        monkeypatch.setattr(sys, "argv", ["prefab", "label", "--store", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2 and told in capsys.readouterr().err.replace("\n", " ")


class Terminal:
    """`prefab label` in a pseudo-terminal."""

    def __init__(self, store: Path) -> None:
        self.seen = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # a test run in the background has it ignored
            os.chdir(ROOT)
            os.execv(
                sys.executable,
                [
                    sys.executable,
                    "-m",
                    "prefab.pipelines.cli.main",
                    "label",
                    "--store",
                    str(store),
                    "--annotator",
                    "ann",
                ],
            )

    def wait_for(self, text: str, timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while text.encode() not in self.seen:
            assert time.monotonic() < end, self.seen[-2000:]
            if select.select([self.fd], [], [], 1.0)[0]:
                self.seen += os.read(self.fd, 65536)

    def type(self, key: str) -> None:
        self.seen = b""
        os.write(self.fd, key.encode())

    def end(self, timeout_s: float = 60.0) -> int:
        try:
            while select.select([self.fd], [], [], timeout_s)[0] and os.read(self.fd, 65536):
                pass
        except OSError:
            pass  # how Linux says that the other side of a terminal is gone
        else:
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.fd)
        return os.waitpid(self.pid, 0)[1]


@pytest.mark.slow
def test_a_terminal_killed_in_the_middle_keeps_what_was_answered(store):
    terminal = Terminal(store)
    terminal.wait_for("1 of 18")
    terminal.type("a")  # one key, no Enter
    terminal.wait_for("2 of 18")
    terminal.type("b")
    terminal.wait_for("3 of 18")
    os.kill(terminal.pid, signal.SIGKILL)
    assert os.WIFSIGNALED(terminal.end())
    assert len(standing(store)) == 2
    terminal = Terminal(store)
    terminal.wait_for("3 of 18")
    terminal.type("u")
    terminal.wait_for("2 of 18")
    terminal.type("\x03")  # Ctrl-C
    assert terminal.end() == 0
    assert len(standing(store)) == 1 and len(labeling.recorded(store)) == 3


def test_a_run_and_a_person_can_write_at_once(store, tmp_path):
    """A ledger that is open elsewhere takes labels too."""

    async def both() -> None:
        ledger = Ledger.open(store)
        await asyncio.to_thread(label_with_keys, store, "abq")
        ledger.add_eval({"name": "meanwhile"})
        await ledger.close()

    asyncio.run(both())
    assert len(standing(store)) == 2
