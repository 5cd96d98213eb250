"""People label comparisons of a run: which ones first, the terminal's loop, queue files out and
answers back.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TextIO

import orjson

from prefab.factory.console import say
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.keys import digest
from prefab.factory.spec import data_files
from prefab.factory.tool_calls import shown_conversation, stored_messages
from prefab.factory.types import Order
from prefab.judges import registry
from prefab.judges.kinds import human
from prefab.pipelines.store.labels import recorded

FIRST = ("unsure", "divided", "random")
First = Literal["unsure", "divided", "random"]
PLAIN_QUESTION = "Which answer is better?"  # for comparisons that were judged under no principle
HELP = "a or b: the better answer · t: a tie · s: skip · u: undo the last one · q: stop here"
_ORDERS: dict[str, str] = {
    "unsure": "coalesce(abs(p - 0.5), 0)",  # what no judge could score is as unsure as can be
    "divided": "-greatest(coalesce(between, 0), coalesce(slots, 0) / 2)",
    "random": "0",
}
_TASKS = """
WITH judged AS (
    SELECT prompt, a, b, principle, avg(p_a) AS p, stddev_pop(p_a) AS between, avg(abs(p_ab - p_ba)) AS slots
    FROM readings WHERE run = ? GROUP BY ALL)
SELECT j.prompt, j.a, j.b, j.principle, x.sample AS sample_a, x.text AS text_a, y.sample AS sample_b, y.text AS text_b,
    q.messages, r.compare, {order} AS rank, f.preference IS NOT NULL AS settled
FROM judged j
JOIN samples x ON x.run = ? AND x.prompt = j.prompt AND x."index" = j.a
JOIN samples y ON y.run = ? AND y.prompt = j.prompt AND y."index" = j.b
JOIN prompts q ON q.prompt = j.prompt
LEFT JOIN preferences f ON f.run = x.run AND f.prompt = j.prompt AND f.a = j.a AND f.b = j.b
LEFT JOIN principles r ON r.constitution = ? AND r.principle = j.principle
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
    order: Order

    @property
    def place(self) -> human.Place:
        """Which comparison this is, for what is known of it already."""
        return human.place_of(self.prompt, self.a, self.b, self.principle)

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


def tasks(
    store: Path,
    run: str,
    annotator: str,
    first: First = "unsure",
    seed: int = 0,
    principles: Sequence[str] = (),
) -> list[Task]:
    """Every comparison of a run that judges were asked about, in the order in which people should
    be: what the run waits for, where people are in its panel, unless the order is random; then as
    `first` says.

    Raises: ConfigError for a run or a principle that is not there, or a run without comparisons.
    """
    from prefab.pipelines.store.export.base import find_run
    from prefab.pipelines.store.fill import query

    record = find_run(store, run)
    number, name = record["run"], f"{record['name']}@{record['version']}"
    rows = query(
        store, _TASKS.format(order=_ORDERS[first]), [number, number, number, record["constitution"]]
    ).to_dicts()
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
    waits = first != "random" and _asks_people(record["config"])
    rows.sort(key=lambda row: (waits and row["settled"], row["rank"], _luck(seed, row)))
    return [_task(name, row, seed, annotator) for row in rows]


def _asks_people(config: str) -> bool:
    """Whether a run's resolved configuration (JSON) has a judge that people answer."""
    by_people = {kind for kind in registry.JUDGES if registry.JUDGES[kind].shows == "people"}
    judges = (orjson.loads(config).get("panel") or {}).get("judges", ())
    return any(judge.get("kind") in by_people for judge in judges)


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
        human.shown_order(seed, annotator, place),
    )


class LabelingSession:
    """One person's labels of a list of tasks: what is to do, what was done, each step recorded
    before the next.
    """

    def __init__(
        self,
        todo: Sequence[Task],
        rows: Sequence[dict[str, Any]],
        annotator: str,
        seed: int,
        record: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.annotator, self.seed, self.record, self.clock = annotator, seed, record, clock
        mine = [label for label in human.latest(rows) if label.annotator == annotator]
        by_place = {task.place: task for task in todo}
        self.done: list[tuple[Task, str, str]] = [
            (by_place[label.place], label.digest, label.winner)
            for label in mine
            if label.place in by_place
        ]
        labelled = {task.place for task, _, _ in self.done}
        self.todo = [task for task in todo if task.place not in labelled]
        self.report = Report(todo[0].run if todo else "", annotator)

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
            texts={"a": human.text_name(task.text_a), "b": human.text_name(task.text_b)},
        )
        self.record(value)
        self.report.count(said)
        self.done = [known for known in self.done if known[0].place != task.place]
        self.done.append((task, human.name_of(value), value["winner"]))
        self.todo = [other for other in self.todo if other.place != task.place]

    def undo(self) -> Task | None:
        """Take the last label back (an earlier session's too) and show its comparison again; None:
        there is none.
        """
        if not self.done:
            return None
        task, name, _ = self.done.pop()
        self.record(human.undo(name, self.annotator, self.clock()))
        self.report.undone += 1
        self.todo.insert(0, task)
        return task


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
        yield LabelingSession(todo, recorded(store), annotator, seed, ledger.add_human_label)
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


def write_queue(session: LabelingSession, file: str | Path, limit: int | None = None) -> Report:
    """Write the comparisons without a label to a file, one JSON object in each line, with an empty
    `label` to fill in.

    Args:
        session: An open session.
        file: A new file.
        limit: At most this number of comparisons.

    Raises:
        ConfigError: The file exists.
    """
    file = Path(file)
    if file.exists():
        raise ConfigError(
            [
                Problem(
                    str(file),
                    0,
                    0,
                    "",
                    "exists already; give a new file, so that no labels are lost",
                )
            ]
        )
    some = session.todo[:limit]
    lines = [
        orjson.dumps(
            {
                "id": task.name(),
                "conversation": [{"role": r, "content": t} for r, t in task.conversation],
                "question": task.question,
                "answer_a": task.shown[0],
                "answer_b": task.shown[1],
                "label": "",
            }
        )
        for task in some
    ]
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    session.report.left = len(session.todo)
    session.report.unanswered = len(some)
    return session.report


def read_answers(session: LabelingSession, file: str | Path) -> Report:
    """Record the labels of a queue file. A label that is recorded already is not recorded again.

    Args:
        session: An open session.
        file: Lines with `id` and `label`: `a`, `b`, `tie`, `skip`, or empty for no label.

    Raises:
        ConfigError: Every mistake with its line; nothing is recorded then.
    """
    file = Path(file)
    tasks = [*session.todo, *(task for task, _, _ in session.done)]
    known: dict[str, tuple[Task, Order]] = {
        task.name(order): (task, order) for task in tasks for order in ("ab", "ba")
    }
    problems: list[Problem] = []
    answers: dict[human.Place, tuple[int, Task, Order, human.Said]] = {}
    for _, number, row in data_files.jsonl_rows(file):
        message = _answer(row, number, known, answers, session.report)
        problems += [Problem(str(file), number, 1, "", message)] if message else []
    if problems:
        raise ConfigError(problems)
    stands = {task.place: winner for task, _, winner in session.done}
    for place, (_, task, order, said) in answers.items():
        if stands.get(place) == (said if order == "ab" else human.swapped(said)):
            session.report.known += 1
        else:
            session.say(said, task, order)
    session.report.left = len(session.todo)
    return session.report


def _answer(
    row: Any,
    number: int,
    known: dict[str, tuple[Task, Order]],
    answers: dict[human.Place, tuple[int, Task, Order, human.Said]],
    report: Report,
) -> str:
    """Note one line's answer; gives what is wrong with it, if anything."""
    try:
        name, said = row["id"], row["label"]
    except (ValueError, KeyError, TypeError):
        return 'each line is an object with "id" and "label", as in the queue file'
    if not isinstance(name, str) or name not in known:
        return f"{name!r} is not a comparison of this run (is this the queue file of another run?)"
    if said in ("", None):
        report.unanswered += 1
        return ""
    words = human.KEYS | {choice: choice for choice in human.KEYS.values()}
    choice = words.get(said.strip().lower()) if isinstance(said, str) else None
    if choice is None:
        return f"the label {said!r} is not one of a, b, tie, skip"
    task, order = known[name]
    if task.place in answers:
        return f"this comparison already has a label in line {answers[task.place][0]}"
    answers[task.place] = (number, task, order, choice)
    return ""
