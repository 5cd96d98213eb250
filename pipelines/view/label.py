"""The page on which people label comparisons, blind: the tasks, the order and the records are those
of `prefab label`.
"""

from __future__ import annotations

import asyncio
import getpass
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.stats import clustered_share
from prefab.judges.kinds import human
from prefab.pipelines.quality.labeling import FIRST, First, LabelingSession, Task, tasks
from prefab.pipelines.store.labels import recorded
from prefab.pipelines.view.analysis import working
from prefab.pipelines.view.jobs import Job
from prefab.pipelines.view.label_tasks import task_of
from prefab.pipelines.view.pages import Page, Parameters, View, one
from prefab.pipelines.view.reader import Row

LONGEST_NAME = 60
_LOCK = threading.RLock()
_SESSIONS: dict[tuple[str, ...], LabelingSession] = {}


def _recorder(store: Path) -> Any:
    """A function that records one label and lets go of the ledger."""

    def record(value: dict[str, Any]) -> None:
        ledger = Ledger.open(store)
        try:
            ledger.add_human_label(value)
        finally:
            asyncio.run(ledger.close())

    return record


class ChoosingError(ConfigError):
    """The comparisons of a large run are still being read, by `job`."""

    def __init__(self, job: Job | None) -> None:
        super().__init__("the comparisons are being chosen: open the page again in some seconds")
        self.job = job


def session(view: View, parameters: Parameters) -> tuple[LabelingSession, str, str]:
    """The session of a person on a run, the person's name, and what comes first.

    Raises: ConfigError for a run without comparisons, or a wrong name or order; ChoosingError.
    """
    about = view.run(one(parameters, "run"))
    run = about["named"]
    who = one(parameters, "annotator").strip() or view.annotator or getpass.getuser()
    first = one(parameters, "first") or "unsure"
    if first not in FIRST:
        raise ConfigError(f"first: {first!r} is none of {', '.join(FIRST)}")
    if len(who) > LONGEST_NAME or not who.isprintable():
        raise ConfigError(f"a name has at most {LONGEST_NAME} letters")
    principle = one(parameters, "principle")
    key = (str(view.folder), run, who, first, principle)
    with _LOCK:
        if key not in _SESSIONS:
            todo = _tasks(view, about, who, cast("First", first), principle)
            record = _recorder(view.folder)
            _SESSIONS[key] = LabelingSession(todo, lambda: recorded(view.folder), who, 0, record)
        _SESSIONS[key].refresh()
        return _SESSIONS[key], who, first


def _tasks(view: View, about: Row, who: str, first: First, principle: str) -> list[Task]:
    if not view.is_large(about["run"]):
        view.reader.close()  # the tasks are read by `prefab label`'s own queries
        return tasks(view.folder, about["named"], who, first, 0, [principle] if principle else ())
    job = view.comparisons(about["run"], first, principle)
    if job is None or job.running:
        raise ChoosingError(job)
    if job.error:
        raise ConfigError(job.error)
    view.jobs.drop(job)
    return [task_of(value, who) for value in job.result]


def label(view: View, parameters: Parameters) -> Page:
    """The next comparison, as a person sees it: nothing of what judges said."""
    try:
        return _label(view, parameters)
    except ChoosingError as error:
        return working(view, "Label", error.job, "label")


def _label(view: View, parameters: Parameters) -> Page:
    with _LOCK:
        found, who, first = session(view, parameters)
        task = found.todo[0] if found.todo else None
        rows = recorded(view.folder)
        data = {
            "run": view.run(one(parameters, "run"))["named"],
            "who": who,
            "first": first,
            "principle": one(parameters, "principle"),
            "principles": sorted(
                {t.principle for t in found.todo} | {t.principle for t, _, _ in found.done}
            ),
            "task": task
            and {
                "name": task.name(),
                "question": task.question,
                "turns": task.conversation,
                "shown": task.shown,
                "principle": task.principle,
            },
            "done": len(found.done),
            "left": len(found.todo),
            "sampled": view.is_large(view.run(one(parameters, "run"))["run"]),
            "others": agreement_of(rows, who),
            "again": again_of(rows, who),
            "people": Counter(known.annotator for known in human.latest(rows)).most_common(12),
        }
    words = ["label", "--run", data["run"], "--annotator", who, "--first", first]
    sql = "SELECT annotator, winner, count(*) AS n FROM human_labels WHERE winner IS NOT NULL GROUP BY ALL ORDER BY ALL"
    return Page("label.jinja", "Label", data, view.command(*words), sql)


def say(view: View, fields: Parameters) -> None:
    """Record what a person said of the comparison that was shown, or take the last label back.

    Raises: ConfigError when another comparison is next by now, or the word is none.
    """
    with _LOCK:
        found, _, _ = session(view, fields)
        said = one(fields, "said")
        if said == "undo":
            found.undo()
            return
        if said not in ("a", "b", "tie", "skip"):
            raise ConfigError(f"said: {said!r} is none of a, b, tie, skip, undo")
        if not found.todo or found.todo[0].name() != one(fields, "task"):
            raise ConfigError("this comparison was labelled already; here is the next one")
        found.say(cast("human.Said", said))


def agreement_of(rows: list[dict[str, Any]], who: str) -> list[dict[str, Any]]:
    """How often a person and each other one give the same label to the same comparison."""
    mine: dict[human.Place, str] = {}
    others: dict[str, dict[human.Place, str]] = {}
    for one_label in human.latest(rows):
        if one_label.winner != "skip":
            of = mine if one_label.annotator == who else others.setdefault(one_label.annotator, {})
            of[one_label.place] = one_label.winner_in_place
    found = []
    for name, theirs in sorted(others.items()):
        both = mine.keys() & theirs.keys()
        if both:
            same = [mine[place] == theirs[place] for place in both]
            share = clustered_share(same, [prompt for prompt, *_ in both])
            found.append({"who": name, "n": len(both), "share": asdict(share)})
    return found


def again_of(rows: list[dict[str, Any]], who: str) -> dict[str, Any] | None:
    """How often a person gives the same label again to a comparison that was labelled before."""
    undone = {value.get("undo") for value in rows}
    last: dict[human.Place, str] = {}
    same: list[bool] = []
    prompts: list[str] = []
    for value in rows:
        if value.get("annotator") != who or human.name_of(value) in undone:
            continue
        for one_label in human.latest([value]):
            if one_label.winner == "skip":
                continue
            if one_label.place in last:
                same.append(last[one_label.place] == one_label.winner_in_place)
                prompts.append(one_label.prompt)
            last[one_label.place] = one_label.winner_in_place
    return {"n": len(same), "share": asdict(clustered_share(same, prompts))} if same else None
