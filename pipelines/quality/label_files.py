"""Comparisons out to files for people, and their labels back: Prefab's own queue files, and the
files of Argilla and Label Studio.

Blind: a file holds the conversation, the question and two answers in an order of chance, and
nothing of what judges said. Labels come back by the comparison's id, which also says in which order
the answers were shown; a label that is recorded already is not recorded again.

Source: Argilla 2, `Record.to_dict` and `Record.from_dict` (argilla/records/_resource.py); Label
Studio, "Label Studio JSON format of annotated tasks" (guide/task_format).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.spec import data_files
from prefab.factory.types import Order
from prefab.judges.kinds import human
from prefab.pipelines.quality.labeling import LabelingSession, Report, Task

LABEL = "label"  # the name of the question in Argilla, and of the control tag in Label Studio
CHOICES = (*human.WINNERS, "skip")
ROW = 'each line is an object with "id" and "label", as in the queue file'


@dataclass(frozen=True, slots=True)
class FileLabel:
    """A label in a file.

    Attributes:
        id: Of the comparison as it was shown (`Task.name`).
        said: As it stands in the file; empty or None: not labelled.
        person: Who gave it, as the file names people; empty: the file does not say.
    """

    id: Any
    said: Any
    person: str = ""


def _queue_row(task: Task) -> dict[str, Any]:
    return {
        "id": task.name(),
        "conversation": _turns(task),
        "question": task.question,
        "answer_a": task.shown[0],
        "answer_b": task.shown[1],
        "label": "",
    }


def _turns(task: Task) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in task.conversation]


def _queue_labels(row: Any) -> Iterator[FileLabel]:
    yield FileLabel(row["id"], row["label"])


def _argilla_row(task: Task) -> dict[str, Any]:
    fields = {k: v for k, v in _queue_row(task).items() if k not in ("id", "label")}
    return {
        "id": task.name(),
        "fields": {**fields, "conversation": _turns(task)},
        "metadata": {},
        "suggestions": {},
        "responses": {},
        "vectors": {},
    }


def _argilla_labels(row: Any) -> Iterator[FileLabel]:
    """Submitted responses; those that were discarded are skips, and drafts are no labels."""
    said = {"discarded": "skip", "draft": ""}
    for response in row["responses"].get(LABEL) or [{"value": ""}]:
        value = said.get(response.get("status"), response["value"])
        yield FileLabel(row["id"], value, str(response.get("user_id", "")))


def _label_studio_row(task: Task) -> dict[str, Any]:
    row = _queue_row(task)
    turns = [{"author": role, "text": text} for role, text in task.conversation]
    texts = {name: row[name] for name in ("question", "answer_a", "answer_b")}
    return {"data": {"comparison": row["id"], "conversation": turns, **texts}}


def _label_studio_labels(row: Any) -> Iterator[FileLabel]:
    """The choices of each annotation; those that were cancelled are skips."""
    name = row["data"]["comparison"]
    for annotation in row.get("annotations") or [{"result": []}]:
        by = annotation.get("completed_by", "")
        person = str(by.get("email") or by.get("id")) if isinstance(by, Mapping) else str(by)
        chosen = [r["value"]["choices"] for r in annotation["result"] if r["from_name"] == LABEL]
        said = chosen[0][0] if chosen and chosen[0] else ""
        yield FileLabel(name, "skip" if annotation.get("was_cancelled") else said, person)


def _label_studio_min_labels(row: Any) -> Iterator[FileLabel]:
    """The choice of one annotation: JSON-MIN has a row for each, and none for those cancelled."""
    said = row.get(LABEL) or ""
    said = said["choices"][0] if isinstance(said, Mapping) else said
    yield FileLabel(row["comparison"], said, str(row.get("annotator", "")))


@dataclass(frozen=True, slots=True)
class LabelFormat:
    """A format of files.

    Attributes:
        write: Gives the row of a task.
        read: Gives the labels of a row. Raises: KeyError, TypeError or others where it is no row.
        mark: A field that rows of this format have and others have not.
        told: What a row is, for messages.
    """

    write: Callable[[Task], dict[str, Any]]
    read: Callable[[Any], Iterator[FileLabel]]
    mark: str
    told: str


FORMATS = {
    "argilla": LabelFormat(
        _argilla_row, _argilla_labels, "fields", "each record has id, fields and responses"
    ),
    "label-studio": LabelFormat(
        _label_studio_row,
        _label_studio_labels,
        "data",
        "each task has data, with comparison in it, and annotations",
    ),
    "prefab": LabelFormat(_queue_row, _queue_labels, "id", ROW),
}

# Formats that are only read; looked for first, since their rows have an `id` too.
READ_ONLY = (
    LabelFormat(
        _label_studio_row,
        _label_studio_min_labels,
        "annotation_id",
        "each row has comparison and label, as Label Studio writes JSON-MIN",
    ),
)


def write_queue(
    session: LabelingSession, file: str | Path, limit: int | None = None, format: str = "prefab"
) -> Report:
    """Write the comparisons without a label to a file.

    Args:
        session: An open session.
        file: A new file.
        limit: At most this number of comparisons.
        format: `prefab` (one JSON object in each line, with an empty `label` to fill in), `argilla`
            or `label-studio` (one JSON list, for the import of that program).

    Raises:
        ConfigError: The file exists, or the format is unknown.
    """
    file = Path(file)
    if format not in FORMATS:
        raise ConfigError(f"{format!r} is no format of label files: {', '.join(sorted(FORMATS))}")
    if format != "prefab" and file.suffix != ".json":
        raise ConfigError(f"{file}: the name of a file for {format} ends with .json")
    if file.exists():
        message = "exists already; give a new file, so that no labels are lost"
        raise ConfigError([Problem(str(file), 0, 0, "", message)])
    some = session.todo[:limit]
    rows = [FORMATS[format].write(task) for task in some]
    lines = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    listed = orjson.dumps(rows, option=orjson.OPT_INDENT_2)
    file.write_bytes(lines if format == "prefab" else listed)
    session.report.left = len(session.todo)
    session.report.unanswered = len(some)
    return session.report


def read_answers(session: LabelingSession, file: str | Path) -> Report:
    """Record the labels of a file in any of `FORMATS`, each under the name of the person that the
    file gives. A label that is recorded already is not recorded again.

    Args:
        session: An open session. Labels without a person, or all of a file with one person, are
            its annotator's.
        file: A queue file with `label` filled in (`a`, `b`, `tie`, `skip`, or empty for no label),
            the records that Argilla wrote, or what Label Studio exported as JSON or JSON-MIN.

    Raises:
        ConfigError: Every mistake with its line; nothing is recorded then.
    """
    file = Path(file)
    known: dict[str, tuple[Task, Order]] = {
        task.name(order): (task, order) for task in session.tasks for order in ("ab", "ba")
    }
    found = _Answers(known, session.report)
    problems = []
    rows = data_files.rows if data_files.suffix_of(file) == ".json" else data_files.jsonl_rows
    for number, line, row in rows(file):
        where = (str(file), line, 1, "") if line else (str(file), 0, 0, f"row {number}")
        problems += [Problem(*where, text) for text in found.take(row, where[1])]
    if problems:
        raise ConfigError(problems)
    people = {person for person, _ in found.labels}
    sessions = {
        person: session if len(people) == 1 or not person else session.of(person)
        for person in people
    }
    for (person, key), (_, task, order, said) in found.labels.items():
        _record(sessions[person], session.report, key, task, order, said)
    session.refresh()
    session.report.left = len(session.todo)
    return session.report


def _record(
    session: LabelingSession,
    report: Report,
    key: human.Place,
    task: Task,
    order: Order,
    said: human.Said,
) -> None:
    """Record a label, unless the person's last one on this comparison says the same."""
    stands = {done.key: winner for done, _, winner in session.done}
    if stands.get(key) == (said if order == "ab" else human.swapped(said)):
        report.known += 1
        return
    session.say(said, task, order)
    if session.report is not report:
        report.count(said)


class _Answers:
    """The labels of a file: at most one of each person on each comparison."""

    def __init__(self, known: Mapping[str, tuple[Task, Order]], report: Report) -> None:
        self.known, self.report = known, report
        self.labels: dict[tuple[str, human.Place], tuple[int, Task, Order, human.Said]] = {}

    def take(self, row: Any, number: int) -> Iterator[str]:
        """Take a row's labels; gives what is wrong with it, if anything."""
        is_object = isinstance(row, Mapping)
        formats = (*READ_ONLY, *FORMATS.values())
        kind = next((one for one in formats if is_object and one.mark in row), None)
        try:
            labels = list((kind or FORMATS["prefab"]).read(row))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            yield (kind or FORMATS["prefab"]).told
            return
        for label in labels:
            if message := self._take(label, number):
                yield message

    def _take(self, label: FileLabel, number: int) -> str:
        if not isinstance(label.id, str) or label.id not in self.known:
            return (
                f"{label.id!r} is not a comparison of this run (is this the queue file of another "
                "run?)"
            )
        if label.said in ("", None):
            self.report.unanswered += 1
            return ""
        words = human.KEYS | {choice: choice for choice in human.KEYS.values()}
        said = label.said
        choice = words.get(said.strip().lower()) if isinstance(said, str) else None
        if choice is None:
            return f"the label {said!r} is not one of {', '.join(CHOICES)}"
        task, order = self.known[label.id]
        place = (label.person, task.key)
        if place in self.labels:
            where = f"line {self.labels[place][0]}" if self.labels[place][0] else "this file"
            return f"this comparison already has a label in {where}"
        self.labels[place] = (number, task, order, choice)
        return ""
