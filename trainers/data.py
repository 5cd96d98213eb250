"""From a store, or data files, to tokens: the one way data reaches a trainer.

The test split never does: it is not read from a store, rows that carry its name are refused, and so
is any row whose prompt is in the test split of one of the sources. What is left out is counted, in
the notes.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.keys import digest, split_of
from prefab.factory.numbers import counted
from prefab.factory.spec import data_files, layouts
from prefab.factory.store import datasets, store
from prefab.factory.tool_calls import message_turn, stored_messages
from prefab.trainers.chat import (
    Turns,
    answered,
    chat_text,
    check_tools,
    conversation_ids,
    dialect,
    ids_of,
    shown,
    turn_of,
)
from prefab.trainers.common import Strict
from prefab.trainers.row_file import Row, RowFile, StoredRows

if TYPE_CHECKING:
    from datasets import Dataset

# Models whose answers a run used, in the tables named.
USED = """
WITH used AS (
    SELECT 'verdicts' AS source, run, call FROM verdicts UNION ALL SELECT 'scores', run, call FROM scores
    UNION ALL SELECT 'steps', run, call FROM steps
    UNION ALL SELECT 'rankings', run, call FROM rankings UNION ALL SELECT 'samples', run, call FROM samples
    UNION ALL SELECT 'critiques', run, call FROM critiques)
SELECT DISTINCT c.model, coalesce(m.name, c.model) FROM used JOIN calls c USING (call) LEFT JOIN models m ON m.model = c.model
WHERE used.run = ? AND used.source IN {} ORDER BY 1
"""
# `reward` has pairs as `preference`, and also those whose answers follow different turns
Kind = Literal["preference", "reward", "unpaired", "sft", "prompts", "process"]
DATASETS = {"reward": ("preference", "conversations")}  # of an export; of other kinds: the kind's
Encoder = Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]]


class Source(Strict):
    """A run of a store, or files. `weight` multiplies the loss of its rows (people's preferences
    beside a judge's).
    """

    store: str | None = Field(None, description="The folder of ledger.sqlite and prefab.duckdb.")
    run: str = Field("", description="NAME or NAME@VERSION; left out: the run that ran last.")
    files: str | None = Field(
        None,
        description="A data file in a layout that `prefab check FILE` names, or a folder: of such "
        "files, or one that `prefab export` wrote.",
    )
    map: dict[str, str] = Field(
        {},
        description="Of files: columns to read under another name, such as {prompt: question}.",
        exclude_if=lambda value: not value,
    )
    weight: float = Field(1.0, gt=0)
    judges: list[str] = Field([], description="Decide by these judges' readings alone.")
    principles: list[str] = Field(
        [], description="Decide by the readings under these principles alone."
    )
    margin: float = Field(
        0.0, ge=0, lt=0.5, description="Keep pairs whose p_chosen is at least this far from a half."
    )
    exclude: str | None = Field(
        None, description="A file of preference, sample or prompt ids to leave out, one a line."
    )
    without: list[str] = Field(
        [], description="Rules of `prefab audit data`: pairs that they mark are left out."
    )
    truncated: bool = Field(False, description="Keep answers that were cut off by length.")
    revisions: Literal["", "all", "last"] = Field(
        "",
        description="Demonstrations: all revisions or the last text of each "
        "draft; left out: as the run revised.",
    )
    _written_as: str = PrivateAttr("data.sources")

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.store is None) == (self.files is None):
            raise ValueError("name a store, or files, and not both")
        return self


class DataConfig(Strict):
    """Where rows come from and what becomes of them."""

    sources: list[Source] = Field(min_length=1)
    labels: Literal["soft", "hard"] = Field(
        "soft", description="soft: p_chosen is the target; hard: 1 is."
    )
    max_length: int = Field(1024, ge=8, description="In tokens, prompt and answer together.")
    too_long: Literal["error", "drop"] = Field(
        "error", description="Of rows longer than that; never cut silently."
    )
    bad_rows: Literal["error", "drop"] = Field(
        "error",
        description="Of rows of files that cannot be kept whole; drop: left out and counted.",
        exclude_if=lambda value: value == "error",
    )
    val_share: float = Field(
        0.05, gt=0, lt=1, description="Of prompts, where the sources have no validation rows."
    )
    limit: int | None = Field(
        None, ge=1, description="Train on so many rows, drawn by digest; left out: all."
    )
    template_kwargs: dict[str, Any] = Field(
        {}, description="For the chat template; the policy's of the run come first."
    )
    _written_as: str = PrivateAttr("data")

    @model_validator(mode="after")
    def _places(self) -> DataConfig:
        for number, source in enumerate(self.sources):
            source._written_as = f"data.sources.{number}"
        return self

    def written_as(self, data: str, sources: str) -> None:
        """Have messages name these places, where a user wrote the fields of the data and of its
        sources, in a configuration that this one is made from.
        """
        self._written_as = data
        for source in self.sources:
            source._written_as = sources


@dataclass(slots=True)
class Rows:
    """What was read, before tokens: the rows of each split, what was left out, and where it came
    from.
    """

    train: Sequence[Row] = ()
    val: Sequence[Row] = ()
    notes: list[str] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def read_rows(kind: Kind, config: DataConfig) -> Rows:
    """The rows of the train and validation splits of all sources. They lie in a temporary file.

    Raises: ConfigError where there are none, a split ends empty, or a row belongs to a test split.
    """
    found, taken = Rows(), _Taken()
    for source in config.sources:
        if source.store:
            _from_store(kind, source, found, taken)
        else:
            _from_files(kind, source, config, found.notes, taken)
    _refuse_leaks(found, taken)
    _split_off(found, taken, config)
    if not taken.train:
        raise ConfigError(
            f"nothing to train on: no {kind} rows in {', '.join(_names(config))}"
            + "".join(f"; {note}" for note in found.notes)
        )
    if not taken.val:
        raise ConfigError(
            "the validation split is empty: there is only one prompt. More prompts are needed"
        )
    mean = sum(taken.weights[i] for i in taken.train) / len(taken.train)
    weights = array("d", (weight / mean for weight in taken.weights))
    if config.limit:
        names = {i: _limit_digest(taken.file.get(i)) for i in taken.train}
        taken.train = array("q", sorted(taken.train, key=names.__getitem__)[: config.limit])
    found.train = StoredRows(taken.file, taken.train, weights)
    found.val = StoredRows(taken.file, taken.val, weights)
    found.template_kwargs = {**found.template_kwargs, **config.template_kwargs}
    return found


def _limit_digest(row: Row) -> str:
    return digest("limit", row["prompt"], _text(row))


@dataclass(slots=True)
class _Taken:
    """Rows of all sources in a file. In memory are of each row its weight and the digest of its
    prompt, and the numbers of those of each split.
    """

    file: RowFile = field(default_factory=RowFile)
    weights: array[float] = field(default_factory=lambda: array("d"))
    prompts: list[bytes] = field(default_factory=list)
    train: array[int] = field(default_factory=lambda: array("q"))
    val: array[int] = field(default_factory=lambda: array("q"))
    tests: set[bytes] = field(default_factory=set)

    def cut(self, length: int) -> None:
        """Forget all rows but the first `length`."""
        self.file.cut(length)
        del self.weights[length:], self.prompts[length:]
        self.train = array("q", (i for i in self.train if i < length))
        self.val = array("q", (i for i in self.val if i < length))

    def take(self, rows: Iterable[Row], source: Source, where: str, notes: list[str]) -> None:
        """Take the rows of a source that is called `where` in messages. Those within the margin,
        with ids that are excluded, and pairs of equal answers are left out and counted, with the
        setting that leaves them out.

        Raises: ConfigError where there are rows of a split that no trainer takes.
        """
        excluded, total = _excluded(source), 0
        near = out = same = bad = 0
        splits: set[str] = set()
        for row in rows:
            total += 1
            if row["split"] not in ("train", "val"):
                splits, bad = splits | {row["split"]}, bad + 1
            elif source.margin and _is_near(row, source.margin):
                near += 1
            elif excluded and any(row.get(name) in excluded for name in IDS):
                out += 1
            elif _is_same(row):
                same += 1
            else:
                self._add(row, source.weight)
        if bad:
            raise ConfigError(
                f"{where}: {counted(bad, 'row')} of the split {', '.join(sorted(splits))}. A trainer takes "
                "train and val only: what is measured on rows that were trained on is no measurement"
            )
        for count, of, why, setting in (
            (near, total, f"below the margin {source.margin:g}", "margin"),
            (out, total - near, f"listed in {source.exclude}", "exclude"),
        ):
            if count:
                notes.append(
                    f"{count:,} of {of:,} rows are {why} and are left out, {of - count:,} stay; the "
                    f"setting is {source._written_as}.{setting}"
                )
        if same:
            notes.append(
                f"{counted(same, 'pair of equal answers is', 'pairs of equal answers are')} left out"
            )

    def _add(self, row: Row, weight: float) -> None:
        own = row.get("weight")
        (self.train if row["split"] == "train" else self.val).append(len(self.file))
        self.weights.append(weight * (own if isinstance(own, float) else 1.0))
        self.prompts.append(_prompt_digest(prompt_of(row)))
        self.file.append(row)


def _is_near(row: Row, margin: float) -> bool:
    """Whether a row's probability is within the margin of a half."""
    return any(abs(row[name] - 0.5) < margin for name in ("p_chosen", "p_win") if name in row)


def _is_same(row: Row) -> bool:
    """Whether a row is a pair of equal answers."""
    chosen, rejected = ((row.get(x), row.get(f"{x}_context")) for x in ("chosen", "rejected"))
    return chosen[0] is not None and chosen == rejected


def _excluded(source: Source) -> set[str]:
    """The ids that a source leaves out."""
    if not source.exclude:
        return set()
    from prefab.factory.spec.bounded import MAX_LIST
    from prefab.factory.spec.yamlio import read_text

    lines = read_text(source.exclude, MAX_LIST).splitlines()
    return {line.strip() for line in lines if line.strip()}


IDS = ("preference", "sample", "chosen_sample", "rejected_sample", "prompt_id")


def _names(config: DataConfig) -> list[str]:
    return [source.store or source.files or "" for source in config.sources]


def _text(row: Mapping[str, Any]) -> Any:
    return [row.get(name) for name in ("chosen", "rejected", "completion", "messages")]


def _from_store(kind: Kind, source: Source, found: Rows, taken: _Taken) -> None:
    """Take the rows of a run whose split is train or val, and the digests of the prompts of the
    store's test split.
    """
    folder, before = Path(source.store or ""), len(taken.file)
    datasets.check_store(folder)

    def work(read: store.Read) -> tuple[list[str], dict[str, Any]]:
        taken.cut(before)  # what is there of a first try with less memory
        notes: list[str] = []
        record = datasets.find_run(folder, read, source.run)
        if kind == "process" and record["recipe"] != "process":
            raise ConfigError(_no_steps(folder, read, record, source._written_as))
        told: list[str] = []
        rows = _stored(kind, source, read, record, notes)
        taken.take(rows, source, str(folder), told)
        test = read("SELECT messages FROM prompts WHERE split = 'test'", ())["messages"]
        for text in test:
            taken.tests.add(_prompt_digest([message_turn(m) for m in stored_messages(text)]))
        return notes + told, _lineage(folder, read, record)

    notes, line = store.read_store(folder, work)
    found.notes += notes
    found.lineage.append(line)
    found.template_kwargs.update((line["config"].get("policy") or {}).get("template_kwargs") or {})


def _no_steps(folder: Path, read: store.Read, record: dict[str, Any], place: str) -> str:
    """That a run has no labels of steps, and which runs have some or how to make one."""
    there = read("SELECT name, version FROM runs WHERE recipe = 'process' ORDER BY last_start", ())
    names = [f"{name}@{version}" for name, version in there.iter_rows()]
    mend = (
        f"Name one that has: set {place}.run to {' or '.join(names)}"
        if names
        else "Make such a run with `prefab run process` (a preset), or with `recipe: process` in "
        f"a pipeline file, and name its store in {place}.store"
    )
    return (
        f"{folder}: {record['name']}@{record['version']} is a run of the recipe {record['recipe']}, "
        f"whose answers have no labels of their steps. {mend}"
    )


def _lineage(folder: Path, read: store.Read, record: dict[str, Any]) -> dict[str, Any]:
    """Where the rows of a run come from."""
    run = (record["run"],)
    labellers = dict(
        read(USED.format("('verdicts', 'scores', 'steps', 'rankings')"), run).iter_rows()
    )
    models = labellers | dict(read(USED.format("('samples', 'critiques')"), run).iter_rows())
    return {
        "store": str(folder),
        "run": f"{record['name']}@{record['version']}",
        "recipe": record["recipe"],
        "constitution": record["constitution"],
        "models": models,
        "labelled_by": list(labellers),
        "config": json.loads(record["config"]),
    }


def _stored(
    kind: Kind, source: Source, read: store.Read, record: dict[str, Any], notes: list[str]
) -> Iterator[Row]:
    """The rows of a run whose split is train or val, part by part."""
    if kind == "process":
        labelled = (source.truncated, source.judges, source.principles)
        steps = datasets.step_rows(read, record, notes, *labelled)
        yield from (row for row in steps if row["split"] in ("train", "val"))
        return
    select = {"all": "draw", "last": "sweep", "": ""}[source.revisions]
    readers = source.judges, source.principles, select
    for part in datasets.dataset_parts(
        read, record, notes, source.truncated, source.without, *readers
    ):
        for name in DATASETS.get(kind, (kind,)):
            for row in part[name].iter_rows(named=True) if name in part else ():
                if row["split"] not in ("train", "val"):
                    continue
                _read_turns(row)
                if kind == "prompts" and row.get("tools"):
                    raise ConfigError(f"{source.store}: {NO_TOOLS}")
                yield row


def _read_turns(row: Row) -> None:
    """A row of a store's dataset with its prompt and answers as a row of a file has them."""
    if "prompt" not in row:
        row |= next(_pairs(layouts.parse(row), row))
    row["prompt"] = layouts.turns_of(row["prompt"])
    for name in ("chosen", "rejected", "completion"):
        if isinstance(row.get(name), list):
            row[name] = _answer(layouts.turns_of(row[name])[-1])
    tools = layouts.tools_of(row)
    row.pop("tools", None)
    if tools:
        row["tools"] = tools


NO_TOOLS = "has tools, which are not passed on where answers are sampled"


def _from_files(
    kind: Kind, source: Source, config: DataConfig, notes: list[str], taken: _Taken
) -> None:
    """Take the rows of train and validation files, and the digests of the prompts of a test file
    beside them.

    Raises: ConfigError where there is no such file, or with the rows that cannot be kept.
    """
    place = Path(source.files or "")
    folders = _folders_of(kind, place)
    if not place.exists():
        raise ConfigError(f"{place}: no such file or folder")
    if place.is_file() and not place.stat().st_size:
        raise ConfigError(f"{place}: the file is empty")
    found, told = _FileRows(taken.tests), list[str]()
    rows = found.rows(kind, folders, source.map)
    taken.take(rows, source, source.files or "", told)
    notes += [*found.finished(place, config), *told]


def _folders_of(kind: Kind, place: Path) -> list[Path]:
    """The folders of an export that have rows of this kind; of any other place, the place."""
    found = [place / name for name in DATASETS.get(kind, (kind,)) if (place / name).is_dir()]
    return found or [place]


BY_ROW = "by row"  # of a folder that `datasets` saved: each row's split is that of its part


def _files_of(place: Path) -> list[tuple[Path, str | None]]:
    """(file, the split that its name says) of a file, or of the files of a folder."""
    if place.is_file():
        return [(place, None)]
    files = data_files.data_files(place)
    return [(file, data_files.split_in_name(file)) for file in files] or [(place, BY_ROW)]


@dataclass(slots=True)
class _FileRows:
    """Rows of the files of a source: digests of the prompts of test files, and what is left out."""

    tests: set[bytes]
    problems: list[Problem] = field(default_factory=list)
    ties: int = 0
    kept: int = 0

    def rows(self, kind: Kind, places: Sequence[Path], names: Mapping[str, str]) -> Iterator[Row]:
        """The rows that can be kept and are no test rows, each with its split."""
        for file, split in (one for place in places for one in _files_of(place)):
            for number, line, value in data_files.rows(file):
                try:
                    made = rows_of(kind, value, names)
                except ValueError as error:
                    where = (str(file), line, 1 if line else 0, f"row {number}")
                    self.problems.append(Problem(*where, str(error)))
                    continue
                for row in made:
                    yield from self._kept(row, row["split"] if split == BY_ROW else split)

    def _kept(self, row: Row, split: str | None) -> Iterator[Row]:
        """A row of a file of this split (None: the rows say it), unless it is a tie or of a test
        file.
        """
        if split == "test":
            self.tests.add(_prompt_digest(prompt_of(row)))
        elif row.pop("tie", False):
            self.ties += 1
        else:
            self.kept += 1
            yield {**row, "split": row["split"] or split or "train"}

    def finished(self, place: Path, config: DataConfig) -> list[str]:
        """What is left out, in words. Raises: ConfigError with the rows that cannot be kept."""
        notes, bad = [], f"{counted(len(self.problems), 'row')} cannot be kept"
        if self.problems and (config.bad_rows == "error" or not self.kept):
            mend = f"{bad}; mend them, or leave them out with {config._written_as}.bad_rows: drop"
            raise ConfigError([*self.problems[:SHOWN], Problem(str(place), 0, 0, "", mend)])
        if self.problems:
            notes.append(f"{place}: {bad}, the first: {self.problems[0]}")
        if self.ties:
            notes.append(
                f"{place}: {counted(self.ties, 'pair is a tie and is', 'pairs are ties and are')} left out"
            )
        return notes


SHOWN = 20  # problems that are printed; all are counted
# Columns beside prompt and answers that training uses or names rows by.
KEPT = (
    "preference",
    "sample",
    "chosen_sample",
    "rejected_sample",
    "prompt_id",
    "run",
    "weight",
    "p_chosen",
    "p_win",
)
NEEDED = {
    "preference": "prompt, chosen, rejected, or another layout of pairs",
    "reward": "prompt, chosen, rejected, or another layout of pairs",
    "unpaired": "prompt, completion, label",
    "sft": "prompt and completion, messages, or chosen",
    "prompts": "prompt or messages",
    "process": "prompt, completions (the steps) and labels",
}


def rows_of(kind: Kind, value: Any, names: Mapping[str, str]) -> list[Row]:
    """The training rows of one row of a file. Raises: ValueError where it cannot be kept, or is of
    another kind.
    """
    if isinstance(value, ValueError):
        raise value
    columns = value if isinstance(value, Mapping) else {}
    split = str(columns.get("split") or "")
    if kind == "process":
        return [_stepwise(columns, names, data_files.split_in_name(Path(split)) or split)]
    record = layouts.parse(value, names)
    base: Row = {name: columns[name] for name in KEPT if columns.get(name) is not None}
    base["split"] = data_files.split_in_name(Path(split)) or split
    if record.tools:
        base["tools"] = record.tools
    made = [{**base, **row} for row in _CONTENT[kind](record, base)]
    if not made:
        raise ValueError(
            f"is no {kind} row (it is read as {record.layout}): these need {NEEDED[kind]}; there "
            f"are: {', '.join(map(str, columns))}"
        )
    return made


STEPWISE = ("prompt", "completions", "labels")


def _all_of(values: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether it is a list with something in it, and that of this kind."""
    return isinstance(values, list) and bool(values) and all(isinstance(v, kind) for v in values)


def _stepwise(columns: Mapping[str, Any], names: Mapping[str, str], split: str) -> Row:
    """A row of TRL's stepwise supervision: the steps are joined by line breaks. Raises: ValueError
    where it is none.
    """
    named = {name: columns.get(names.get(name, name)) for name in STEPWISE}
    prompt: Any = named["prompt"]
    steps: Any = named["completions"]
    labels: Any = named["labels"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not turns or not _all_of(steps, str) or not isinstance(labels, list):
        raise ValueError(f"is no process row: these need {NEEDED['process']}")
    if not all(step.strip() for step in steps):
        raise ValueError("is no process row: a step is empty")
    known = _all_of(labels, (bool, int, float)) and all(0 <= p <= 1 for p in labels)
    if len(labels) != len(steps) or not known:
        raise ValueError("labels: one for each step, true or false, or a probability")
    ends = list(accumulate(len(step) + 1 for step in steps))
    return {
        "prompt": layouts.turns_of(turns),
        "completion": "\n".join(steps),
        "steps": [[end - 1, float(p)] for end, p in zip(ends, labels, strict=True)],
        "split": split,
    }


def _pairs(record: layouts.Record, base: Row) -> Iterator[Row]:
    answers = [_answer(turn) for turn in record.answers]
    for a, b, p in record.pairs:
        tie = p == 0.5 and "p_chosen" not in base
        if p < 0.5 and "p_chosen" not in base:
            a, b = b, a
        row = {"prompt": record.prompt, "chosen": answers[a], "rejected": answers[b], "tie": tie}
        if record.contexts:
            row |= {"chosen_context": record.contexts[a], "rejected_context": record.contexts[b]}
        yield row


def _pairs_of_one_prompt(record: layouts.Record, base: Row) -> Iterator[Row]:
    if record.contexts:
        raise ValueError(TWO_CONTEXTS.format(n=len(record.prompt) + 1))
    return _pairs(record, base)


TWO_CONTEXTS = (
    "the two conversations part before their last turn (at turn {n}): each answer follows its own "
    "model's earlier answer, so there is no common prompt, which DPO's loss needs. A reward model "
    "can be trained on such rows (`prefab train reward`), and `prefab eval judge` judges them "
    "(--benchmark mt-bench-human: turn 2 of MT-Bench)"
)


def _labelled(record: layouts.Record, base: Row) -> Iterator[Row]:
    if record.label is not None:
        answer = _answer(record.answers[0])
        yield {"prompt": record.prompt, "completion": answer, "label": record.label}


def _demonstrations(record: layouts.Record, base: Row) -> Iterator[Row]:
    if record.talk:
        yield {"prompt": [], "messages": record.talk}
    elif record.answers:
        wins = [0.0] * len(record.answers)
        for a, b, p in record.pairs:
            wins[a], wins[b] = wins[a] + p, wins[b] + 1 - p
        best = wins.index(max(wins))
        context = record.contexts[best] if record.contexts else []
        yield {"prompt": [*record.prompt, *context], "completion": _answer(record.answers[best])}


def _asked(record: layouts.Record, base: Row) -> Iterator[Row]:
    if record.tools:
        raise ValueError(NO_TOOLS)
    yield {"prompt": record.prompt or _before_answer(record.talk)}


_CONTENT: dict[Kind, Callable[[layouts.Record, Row], Iterator[Row]]] = {
    "preference": _pairs_of_one_prompt,
    "reward": _pairs,
    "unpaired": _labelled,
    "sft": _demonstrations,
    "prompts": _asked,
}


def _answer(turn: layouts.Turn) -> str | layouts.Turn:
    """A text where the turn is nothing else, the turn where it calls tools or thinks apart."""
    text: str = turn["content"]
    return turn if turn.keys() - {"role", "content", "name"} else text


def _prompt_digest(turns: Turns) -> bytes:
    """Two rows have the same prompt when its turns say the same, however they are stored."""
    name = digest(
        "prompt",
        [[t["role"], " ".join(t["content"].split()), *t.get("tool_calls", ())] for t in turns],
    )
    return bytes.fromhex(name)


def prompt_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row's prompt; of a whole conversation, what stands before its first answer."""
    prompt: list[dict[str, Any]] = row.get("prompt") or _before_answer(row.get("messages") or ())
    return prompt


def _before_answer(turns: Turns) -> list[dict[str, Any]]:
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    return [dict(turn) for turn in turns[:first]]


def _refuse_leaks(found: Rows, taken: _Taken) -> None:
    """Raises: ConfigError for a row whose prompt is in a test split. Train rows whose prompt is in
    val are left out.
    """
    leaked = [i for i in chain(taken.train, taken.val) if taken.prompts[i] in taken.tests]
    if leaked:
        raise ConfigError(
            f"{counted(len(leaked), 'row has', 'rows have')} a prompt of the test split, the first: "
            f"{prompt_of(taken.file.get(leaked[0]))[-1]['content'][:80]!r}. Leave them out of the "
            "files"
        )
    held = {taken.prompts[i] for i in taken.val}
    kept = array("q", (i for i in taken.train if taken.prompts[i] not in held))
    if len(kept) < len(taken.train):
        found.notes.append(
            f"{counted(len(taken.train) - len(kept), 'train row shares', 'train rows share')} a "
            "prompt with validation: left out"
        )
    taken.train = kept


def _split_off(found: Rows, taken: _Taken, config: DataConfig) -> None:
    """Where no source has validation rows: a share of the prompts, by digest, so that the same ones
    are always held out.
    """
    if taken.val or not taken.train:
        return
    shares = (1 - config.val_share, config.val_share, 0.0)
    names = {taken.prompts[i] for i in taken.train}
    held = {name for name in names if split_of("val " + name.hex(), shares) == "val"}
    held = held or {min(names)}
    taken.val = array("q", (i for i in taken.train if taken.prompts[i] in held))
    taken.train = array("q", (i for i in taken.train if taken.prompts[i] not in held))
    found.notes.append(
        f"no validation rows in the data: {counted(len(held), 'prompt')} held out of train "
        f"({counted(len(taken.val), 'row')})"
    )


def tokenised(
    rows_: Sequence[Mapping[str, Any]],
    encode: Encoder,
    config: DataConfig,
    notes: list[str],
    what: str,
) -> Dataset:
    """Each row through `encode` (which gives one or more token rows with their `length`), as a
    dataset.

    Rows that are too long are an error, or left out and counted; they are never cut.
    Raises: ConfigError naming the first that is too long, or where none is left.
    """
    counts = _Counts()
    items = _encoded(rows_, encode, config, notes, what, counts)
    dataset = _arrow_dataset(item for item in items if counts.fits(item, config.max_length))
    if counts.long and config.too_long == "error":
        raise ConfigError(
            f"{counts.long:,} of {counts.made:,} {what} rows are longer than max_length: "
            f"{config.max_length} tokens, the longest {counts.longest:,}; the first: "
            f"{prompt_of(rows_[counts.first_long])[-1]['content'][:60]!r}. Raise "
            f"{config._written_as}.max_length, or write {config._written_as}.too_long: drop"
        )
    if counts.long:
        notes.append(
            f"{counts.long:,} of {counts.made:,} {what} rows are longer than {config.max_length} "
            "tokens: left out"
        )
    if dataset is None:
        raise ConfigError(
            f"the {what} split ends up empty: every row is longer than max_length: "
            f"{config.max_length} tokens"
        )
    if counts.merged:
        notes.append(
            f"in {counts.merged:,} {what} rows the tokenizer would join tokens across prompt and "
            "answer; they stay apart, as they are at sampling"
        )
    return dataset


@dataclass(slots=True)
class _Counts:
    """What became of rows while they were made tokens."""

    made: int = 0
    merged: int = 0
    long: int = 0
    longest: int = 0
    first_long: int = 0

    def fits(self, item: dict[str, Any], most: int) -> bool:
        """Count an item, from which `merged` is removed. Returns: Whether it has at most `most`
        tokens.
        """
        self.made += 1
        merged = item.pop("merged", 0)
        if item["length"] <= most:
            self.merged += merged
            return True
        self.first_long = item["row"] if not self.long else self.first_long
        self.long, self.longest = self.long + 1, max(self.longest, item["length"])
        return False


ITEMS_AT_ONCE = 512


def _arrow_dataset(items: Iterable[dict[str, Any]]) -> Dataset | None:
    """The items as a dataset in a temporary file that is mapped into memory; None without items.
    The file has no name once this returns, so its space is free when the process ends.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.fingerprint import generate_random_fingerprint
    from datasets.table import InMemoryTable

    kinds = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}

    def kind(value: Any) -> Any:
        if isinstance(value, list):
            return pa.list_(kinds[type(value[0])] if value else pa.int64())
        return kinds[type(value)]

    items = iter(items)
    first = next(items, None)
    if first is None:
        return None
    schema = pa.schema([(name, kind(value)) for name, value in first.items()])
    rest = chain([first], items)
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with pa.ipc.new_stream(file, schema) as writer:
            while some := list(islice(rest, ITEMS_AT_ONCE)):
                writer.write_batch(pa.RecordBatch.from_pylist(some, schema))
        file.flush()
        table = pa.ipc.open_stream(pa.memory_map(file.name)).read_all()
    # without a fingerprint the whole table would be read to make one
    return Dataset(InMemoryTable(table), fingerprint=generate_random_fingerprint())


def _encoded(
    rows_: Sequence[Mapping[str, Any]],
    encode: Encoder,
    config: DataConfig,
    notes: list[str],
    what: str,
    counts: _Counts,
) -> Iterator[dict[str, Any]]:
    """The token rows of all rows, with the number of each.

    Raises: ConfigError for rows that the chat template refuses.
    """
    refused, first = 0, ""
    for i, row in enumerate(rows_):
        try:
            yield from ({**item, "row": i} for item in list(encode(row)))
        except ConfigError as error:
            first = first or f"{prompt_of(row)[-1]['content'][:60]!r}: {error}"
            refused += 1
    if refused:
        told = f"{refused:,} of {len(rows_):,} {what} rows cannot be tokens, the first: {first}"
        if config.bad_rows == "error" or not counts.made:
            raise ConfigError(f"{told}. Mend them, or write {config._written_as}.bad_rows: drop")
        notes.append(told)


def encoder(
    kind: Kind,
    tokenizer: Any,
    found: Rows,
    config: DataConfig,
    every_turn: bool = True,
) -> Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]]:
    """How a row of this kind becomes tokens: whole conversations for `reward`. `every_turn`: see
    `_sft_rows`.
    """
    if not dialect(tokenizer, found.template_kwargs).has_system:
        first = (prompt_of(row)[:1] for row in chain(found.train, found.val))
        if n := sum(turns[0]["role"] == "system" for turns in first if turns):
            found.notes.append(
                f"the chat template has no system turn: {n:,} system texts begin the first user's turn"
            )

    def begin(row: Mapping[str, Any]) -> tuple[Turns, dict[str, Any]]:
        """The prompt as the model is shown it, and the template's arguments."""
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        kwargs = {**found.template_kwargs, **tools}
        prompt = shown(tokenizer, row["prompt"], kwargs)
        if tools or any(turn.get("tool_calls") or turn["role"] == "tool" for turn in prompt):
            _check_tools(tokenizer, prompt, kwargs)
        return prompt, kwargs

    def target(answer: Any, kwargs: Mapping[str, Any]) -> Any:
        """The answer, in which nothing ends the turn before its end."""
        (turn,) = shown(tokenizer, [turn_of(answer)], kwargs)
        return turn

    def pair(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        (prompt, kwargs), p = begin(row), row.get("p_chosen")
        sides = {side: target(row[side], kwargs) for side in ("chosen", "rejected")}
        made: dict[str, Any] = {"p": 1.0 if p is None else float(p), "weight": row["weight"]}
        made["target"] = made["p"] if config.labels == "soft" else 1.0
        if kind == "reward":
            made |= {
                f"{side}_ids": conversation_ids(
                    tokenizer,
                    [*prompt, *shown(tokenizer, row.get(f"{side}_context") or [], kwargs), turn],
                    kwargs,
                )
                for side, turn in sides.items()
            }
            made["length"] = max(len(made["chosen_ids"]), len(made["rejected_ids"]))
        else:
            both = {side: answered(tokenizer, prompt, turn, kwargs) for side, turn in sides.items()}
            made |= {
                "prompt_ids": both["chosen"].prompt,
                "merged": any(a.merged for a in both.values()),
            }
            made |= {f"{side}_ids": a.answer for side, a in both.items()}
            made["length"] = len(made["prompt_ids"]) + max(len(a.answer) for a in both.values())
        yield made

    def single(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        prompt, kwargs = begin(row)
        a = answered(tokenizer, prompt, target(row["completion"], kwargs), kwargs)
        yield {
            "prompt_ids": a.prompt,
            "completion_ids": a.answer,
            "label": bool(row["label"]),
            "weight": row["weight"],
            "length": len(a.prompt) + len(a.answer),
            "merged": a.merged,
        }

    def demonstration(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        answer = row.get("completion") if row.get("completion") is not None else row.get("chosen")
        talk = row.get("messages") or [*row["prompt"], turn_of(answer or "")]
        turns, kwargs = begin({**row, "prompt": talk})
        last = len(turns) - 1 if not row.get("messages") or not every_turn else None
        for ids, labels in _sft_rows(tokenizer, turns, kwargs, last):
            yield {"input_ids": ids, "labels": labels, "weight": row["weight"], "length": len(ids)}

    return {"preference": pair, "reward": pair, "unpaired": single, "sft": demonstration}[kind]


def _check_tools(tokenizer: Any, prompt: Turns, kwargs: Mapping[str, Any]) -> None:
    """Raises: ConfigError where the template writes no tools, calls or results."""
    text = chat_text(tokenizer, prompt, False, kwargs)
    check_tools(prompt, text)
    names = [tool.get("function", tool).get("name", "") for tool in kwargs.get("tools", ())]
    if any(name not in text for name in names):
        raise ConfigError(
            "the chat template writes no tools; train a model whose template has them"
        )


def _sft_rows(
    tokenizer: Any, turns: Turns, kwargs: Mapping[str, Any], only: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, labels) of a conversation: labels are -100 but for the assistant's tokens, of turn
    `only` or of all.

    One sequence for all turns where the template writes each as it did at sampling, shown by
    comparing tokens; otherwise (templates that strip reasoning from earlier turns) one a turn, each
    after its history as the policy would see it.
    """
    places = [
        i for i, turn in enumerate(turns) if turn["role"] == "assistant" and only in (None, i)
    ]
    if not places:
        raise ConfigError(
            f"a conversation without an answer of the assistant: {turns[-1]['content'][:60]!r}"
        )
    parts = [answered(tokenizer, turns[:i], turns[i], kwargs) for i in places]
    whole = ids_of(tokenizer, chat_text(tokenizer, turns[: places[-1] + 1], False, kwargs))
    starts = [len(part.prompt) for part in parts]
    fits = all(
        whole[start : start + len(part.answer)] == part.answer and whole[:start] == part.prompt
        for start, part in zip(starts, parts, strict=True)
    )
    if not fits or len(parts) == 1:
        yield from (([*p.prompt, *p.answer], [-100] * len(p.prompt) + p.answer) for p in parts)
        return
    end = starts[-1] + len(parts[-1].answer)
    labels = [-100] * end
    for start, part in zip(starts, parts, strict=True):
        labels[start : start + len(part.answer)] = part.answer
    yield whole[:end], labels
