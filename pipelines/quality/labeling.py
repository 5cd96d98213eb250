"""People label comparisons of a run: which ones first, and the terminal's loop.

Blind: a person sees the conversation, the principle's question and two answers in an order of
chance, and nothing of what judges said. Each answer is on disk before the next comparison is shown,
so a session can end at any moment.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TextIO

import orjson

from prefab.factory.console import say
from prefab.factory.errors import ConfigError
from prefab.factory.keys import digest
from prefab.factory.store.store import one_connection
from prefab.factory.tool_calls import shown_conversation, stored_messages
from prefab.factory.types import Order
from prefab.judges import registry
from prefab.judges.kinds import human
from prefab.pipelines.store.labels import recorded
from prefab.pipelines.store.selection import IN_SAMPLE, Selection

FIRST = ("unsure", "divided", "random")
First = Literal["unsure", "divided", "random"]
PLAIN_QUESTION = "Which answer is better?"  # for comparisons that were judged under no principle
HELP = "a or b: the better answer · t: a tie · s: skip · u: undo the last one · q: stop here"
_ORDERS: dict[str, str] = {
    "unsure": "coalesce(abs(p - 0.5), 0)",  # what no judge could score is as unsure as can be
    "divided": "-greatest(coalesce(between, 0), coalesce(slots, 0) / 2)",
    "random": "0",
}
_TASKS = f"""
WITH judged AS (
    SELECT prompt, a, b, principle, avg(p_a) AS p, stddev_pop(p_a) AS between, avg(abs(p_ab - p_ba)) AS slots
    FROM readings v WHERE run = $run AND ({IN_SAMPLE} OR prompt IN (SELECT prompt FROM human_labels)
      OR ($waits AND NOT EXISTS (SELECT 1 FROM preferences f
        WHERE f.run = $run AND f.prompt = v.prompt AND f.a = v.a AND f.b = v.b))) GROUP BY ALL)
SELECT j.prompt, j.a, j.b, j.principle, x.sample AS sample_a, x.text AS text_a, y.sample AS sample_b, y.text AS text_b,
    q.messages, r.compare, {{order}} AS rank, f.preference IS NOT NULL AS settled
FROM judged j
JOIN samples x ON x.run = $run AND x.prompt = j.prompt AND x."index" = j.a
JOIN samples y ON y.run = $run AND y.prompt = j.prompt AND y."index" = j.b
JOIN prompts q ON q.prompt = j.prompt
LEFT JOIN preferences f ON f.run = x.run AND f.prompt = j.prompt AND f.a = j.a AND f.b = j.b
LEFT JOIN principles r ON r.constitution = $constitution AND r.principle = j.principle
WHERE x.text IS NOT NULL AND y.text IS NOT NULL
"""


@dataclass(frozen=True, slots=True)
class Task:
    """One comparison under one principle, to be put to a person; `order` says which answer is shown
    first.
    """

    run: str
    prompt: str
    a: str
    b: str
    principle: str
    question: str
    conversation: tuple[tuple[str, str], ...]
    text_a: str
    text_b: str
    names: tuple[str, str]  # of the two texts (`human.text_name`)
    order: Order

    @property
    def place(self) -> human.Place:
        """The comparison by the ids of its answers."""
        return human.place_of(self.prompt, self.a, self.b, self.principle)

    @property
    def key(self) -> human.Place:
        """The comparison by the texts of its answers. People are asked once for each key: answers
        with equal texts are one answer to them, whatever draft or run they come from.
        """
        return human.place_of(self.prompt, *self.names, self.principle)

    @property
    def shown(self) -> tuple[str, str]:
        """The two answers as a person sees them."""
        return (self.text_a, self.text_b) if self.order == "ab" else (self.text_b, self.text_a)

    def name(self, order: Order | None = None) -> str:
        """Its id in a queue file: of the comparison and the order shown, so that an answer can be
        read back.
        """
        return digest("label", self.run, *self.place, self.a, order or self.order)


@dataclass(slots=True)
class Report:
    """What a session did: labels recorded and taken back, what is left, and counts by word."""

    run: str
    annotator: str
    left: int = 0
    undone: int = 0
    unanswered: int = 0
    known: int = 0
    said: dict[str, int] = field(default_factory=dict)

    def count(self, word: str, n: int = 1) -> None:
        """So many more (or fewer) labels of this word."""
        self.said[word] = self.said.get(word, 0) + n

    def rows(self, queue: bool = False) -> list[tuple[str, int]]:
        """As lines of a table, those that say something."""
        told = [
            ("written, to be answered" if queue else "lines not answered", self.unanswered),
            *sorted(self.said.items()),
            ("taken back", self.undone),
            ("known already", self.known),
        ]
        return [line for line in told if line[1]] + [("left to label", self.left)]

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "run": self.run,
            "annotator": self.annotator,
            "labelled": sum(self.said.values()),
            "said": self.said,
            "undone": self.undone,
            "unanswered": self.unanswered,
            "known": self.known,
            "left": self.left,
        }


@one_connection()
def tasks(
    store: Path,
    run: str,
    annotator: str,
    first: First = "unsure",
    seed: int = 0,
    principles: Sequence[str] = (),
    sample: int = 0,
) -> list[Task]:
    """Every comparison of a run that judges were asked about, each pair of texts once under a
    principle, in the order in which people should be asked: what the run waits for and nobody has
    labelled, where people are in its panel, unless the order is random; then as `first` says. With
    a `sample`, of a run with more prompts: what the run waits for, what is labelled, and the
    comparisons of about so many prompts.

    Raises: ConfigError for a run or a principle that is not there, or a run without comparisons.
    """
    from prefab.pipelines.store.export.base import find_run

    record = find_run(store, run)
    name, rows = f"{record['name']}@{record['version']}", _judged(store, record, first, sample)
    there = sorted({row["principle"] for row in rows})
    unknown = [principle for principle in principles if principle not in there]
    if unknown:
        raise ConfigError(
            f"{name} judged nothing under {unknown[0]!r}; it did under: {', '.join(there) or 'nothing'}"
        )
    if not rows:
        raise ConfigError(
            f"{name} has no comparisons to label: its recipe has no panel, or nothing was judged yet"
        )
    rows = [row for row in rows if not principles or row["principle"] in principles]
    rows.sort(key=lambda row: (row["prompt"], row["principle"], row["a"], row["b"]))
    by_key: dict[human.Place, tuple[Task, dict[str, Any]]] = {}
    for row in rows:  # of pairs with equal texts the first: in queue files it stands for all
        task = _task(name, row, seed, annotator)
        by_key.setdefault(task.key, (task, row))
    unsettled = {key for key, (_, row) in by_key.items() if not row["settled"]}
    waiting = set() if first == "random" else _waiting(store, record["config"], unsettled)

    def turn(item: tuple[Task, dict[str, Any]]) -> tuple[Any, ...]:
        return item[0].key not in waiting, item[1]["rank"], _luck(seed, item[1])

    return [task for task, _ in sorted(by_key.values(), key=turn)]


def _judged(store: Path, record: dict[str, Any], first: First, sample: int) -> list[dict[str, Any]]:
    """The comparisons of a run that people may be asked about, as rows."""
    from prefab.pipelines.store.fill import query

    at = {
        "run": record["run"],
        "constitution": record["constitution"],
        "of_groups": Selection(store, record).sampled(sample).of_groups if sample else 1,
        "waits": first != "random" and bool(_people(record["config"])),
    }
    return query(store, _TASKS.format(order=_ORDERS[first]), at).to_dicts()


def _waiting(store: Path, config: str, unsettled: set[human.Place]) -> set[human.Place]:
    """Those of the comparisons without a preference on which people's label is missing by now: of a
    run's resolved configuration (JSON), for any judge that people answer. Where they are split, it
    is missing too.
    """
    asked = _people(config)
    rows = recorded(store) if asked else []
    answers = [human.answers(rows, judge.get("annotators") or ()) for judge in asked]
    missing = (None, ())
    return {key for key in unsettled if any(not said.get(key, missing)[0] for said in answers)}


def _people(config: str) -> list[dict[str, Any]]:
    """The judges of a run's resolved configuration (JSON) that people answer."""
    by_people = {kind for kind in registry.JUDGES if registry.JUDGES[kind].shows == "people"}
    panel = orjson.loads(config).get("panel") or {}
    return [judge for judge in panel.get("judges", ()) if judge.get("kind") in by_people]


def _luck(seed: int, row: dict[str, Any]) -> bytes:
    """A place in a random order that only the seed and the comparison decide."""
    return sha256(
        f"{seed}\0{row['prompt']}\0{row['a']}\0{row['b']}\0{row['principle']}".encode()
    ).digest()


def _task(run: str, row: dict[str, Any], seed: int, annotator: str) -> Task:
    place = human.place_of(row["prompt"], row["sample_a"], row["sample_b"], row["principle"] or "")
    messages = stored_messages(row["messages"])
    talk = tuple((m.role, shown_conversation([m]) if m.more else m.content) for m in messages)
    return Task(
        run,
        row["prompt"],
        row["sample_a"],
        row["sample_b"],
        row["principle"] or "",
        row["compare"] or PLAIN_QUESTION,
        talk,
        row["text_a"],
        row["text_b"],
        (human.text_name(row["text_a"]), human.text_name(row["text_b"])),
        human.shown_order(seed, annotator, place),
    )


class LabelingSession:
    """One person's labels of a list of tasks: what is to do and what was done. Each step is
    recorded before the next.

    Args:
        tasks: What people are asked, in this order.
        read: Gives every label and undo that is recorded, oldest first.
        annotator: The person.
        seed: Seed of the order in which two answers are shown.
        record: Records a label or an undo.
        clock: Gives the time of a label, in seconds since 1970.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        read: Callable[[], Sequence[dict[str, Any]]],
        annotator: str,
        seed: int,
        record: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.tasks, self.read, self.record, self.clock = list(tasks), read, record, clock
        self.annotator, self.seed = annotator, seed
        self.todo, self.done = self.tasks, list[tuple[Task, str, str]]()
        self.report = Report(tasks[0].run if tasks else "", annotator)
        self._seen = -1  # labels and undos that `todo` and `done` take into account
        self._text_names = {
            (task.prompt, answer): name
            for task in self.tasks
            for answer, name in zip((task.a, task.b), task.names, strict=True)
        }
        self.refresh()

    def of(self, annotator: str) -> LabelingSession:
        """A session of another person on the same tasks."""
        return LabelingSession(self.tasks, self.read, annotator, self.seed, self.record, self.clock)

    def refresh(self) -> None:
        """Take in what this person has labelled or taken back elsewhere: on another page, in
        another terminal, under another run.
        """
        rows = self.read()
        if len(rows) == self._seen:
            return
        self._seen = len(rows)
        by_key = {task.key: task for task in self.tasks}
        mine = [
            (by_key[label.place], label)
            for label in human.latest(rows, self._by_text)
            if label.annotator == self.annotator and label.place in by_key
        ]
        self.done = [
            (task, label.digest, _winner(label.winner_in_place, task)) for task, label in mine
        ]
        labelled = {task.key for task, _ in mine}
        waiting = {task.key for task in self.todo}
        taken_back = [task for task in self.tasks if task.key not in labelled | waiting]
        self.todo = taken_back + [task for task in self.todo if task.key not in labelled]

    def _by_text(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        """A label whose answers are named by their texts, also where it names them by their ids."""
        named = human.by_text(value)
        ids = {
            side: self._text_names.get((str(value.get("prompt")), str(value.get(side))))
            for side in "ab"
        }
        return {**named, **{side: name for side, name in ids.items() if name}}

    def say(self, said: human.Said, task: Task | None = None, order: Order | None = None) -> None:
        """Record what was said of a task (the next one) as shown."""
        task = self.todo[0] if task is None else task
        value = human.row(
            task.prompt,
            task.a,
            task.b,
            task.principle,
            said,
            order or task.order,
            self.annotator,
            self.clock(),
            run=task.run,
            seed=self.seed,
            texts=dict(zip("ab", task.names, strict=True)),
        )
        self.record(value)
        self._seen += 1
        self.report.count(said)
        self.done = [known for known in self.done if known[0].key != task.key]
        self.done.append((task, human.name_of(value), value["winner"]))
        self.todo = [other for other in self.todo if other.key != task.key]

    def undo(self) -> Task | None:
        """Take the last label back (an earlier session's too) and show its comparison again; None:
        there is none.
        """
        if not self.done:
            return None
        task, name, _ = self.done.pop()
        self.record(human.undo(name, self.annotator, self.clock()))
        self._seen += 1
        self.report.undone += 1
        self.todo.insert(0, task)
        return task


def _winner(in_place: human.Said, task: Task) -> human.Said:
    """A winner in the order of a task's key, as a winner of its `a` and `b`."""
    return in_place if task.key[1] == task.names[0] else human.swapped(in_place)


def talk(
    session: LabelingSession,
    keys: Iterator[str],
    show: Callable[[str], None],
    limit: int | None = None,
) -> Report:
    """The loop: show a comparison, take a key, record it; until all are labelled, `limit` are, or q
    or the end of keys.
    """
    begun = len(session.done)
    show(HELP)
    while session.todo and (limit is None or len(session.done) - begun < limit):
        task = session.todo[0]
        show(page(task, len(session.done) + 1, len(session.done) + len(session.todo)))
        if not _one_key(session, keys, show):
            break
        session.refresh()
    session.report.left = len(session.todo)
    return session.report


def _one_key(session: LabelingSession, keys: Iterator[str], show: Callable[[str], None]) -> bool:
    """Take keys until one means something; False: stop."""
    for key in keys:
        key = key.lower()
        if key in ("q", "\x03", "\x04"):
            return False
        if key in human.KEYS:
            session.say(human.KEYS[key])
            return True
        if key == "u":
            show("undone; here it is again" if session.undo() else "there is nothing to undo")
            return True
        show(HELP)
    return False


def page(task: Task, number: int, total: int) -> str:
    """A comparison as a person sees it: nothing of judges, runs or sample numbers."""
    first, second = task.shown
    lines = [f"── {number:,} of {total:,} " + "─" * 40]
    lines += [f"{role}: {text}" for role, text in task.conversation]
    lines += [
        "",
        "── A " + "─" * 20,
        first,
        "── B " + "─" * 20,
        second,
        "",
        f"{task.question}  [a b t s u q]",
    ]
    return harmless("\n".join(lines))


def harmless(text: str) -> str:
    """Without control characters: a model's answer must not be able to move the cursor or rewrite
    what is shown.
    """
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


@contextlib.contextmanager
def single_keys(stream: TextIO) -> Iterator[Iterator[str]]:
    """Keys as they are typed, without Enter, where the stream is a terminal; else its characters
    but white space.
    """
    if not stream.isatty():
        yield (c for line in stream for c in line if not c.isspace())
        return
    import termios
    import tty

    fd = stream.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield iter(lambda: _typed(fd), "")
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _typed(fd: int) -> str:
    """The next key. A select comes first, since polars' handler of Ctrl-C lets a read go on that it
    interrupts.
    """
    select.select([fd], [], [])
    return os.read(fd, 1).decode("latin-1")


@contextlib.contextmanager
def open_session(
    store: str | Path,
    run: str = "",
    annotator: str = "",
    first: First = "unsure",
    seed: int = 0,
    principles: Sequence[str] = (),
) -> Iterator[LabelingSession]:
    """A context in which one person labels the comparisons of a run.

    Args:
        store: The store; it is open for writing inside the context.
        run: NAME or NAME@VERSION; default: the latest run that is not an import.
        annotator: The person's name, stored with the labels; default: the login name.
        first: Which comparisons come first: `unsure`, `divided` or `random`.
        seed: Seed of the order in which two answers are shown.
        principles: Only these; empty: all.

    Raises:
        ConfigError: The run or a principle does not exist, or the run has no comparisons.
        StoreError: The store is missing or damaged.
    """
    import asyncio
    import getpass

    from prefab.factory.ledger.ledger import Ledger

    store, annotator = Path(store), annotator or getpass.getuser()
    todo = tasks(store, run, annotator, first, seed, principles)
    ledger = Ledger.open(store)
    try:
        yield LabelingSession(
            todo, lambda: recorded(store), annotator, seed, ledger.add_human_label
        )
    finally:
        asyncio.run(ledger.close())


def terminal(
    session: LabelingSession, limit: int | None = None, stream: TextIO | None = None
) -> Report:
    """Label in this terminal. Ctrl-C ends it as q does."""

    def show(text: str) -> None:
        say(text, stderr=True)

    with single_keys(stream or sys.stdin) as keys:
        try:
            return talk(session, keys, show, limit)
        except KeyboardInterrupt:
            session.report.left = len(session.todo)
            return session.report
