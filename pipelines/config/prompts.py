"""The prompts of a pipeline, from a data file or the microworld, one at a time.

A row that cannot be read is reported by its number and counted; it never vanishes and never stops
the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import copy
from math import isfinite
from pathlib import Path
from sys import maxsize
from typing import Any

from prefab.factory import keys, tool_calls
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.ledger.records import split_of
from prefab.factory.numbers import counted
from prefab.factory.spec import data_files, layouts, yamlio
from prefab.factory.spec.data_files import SPLITS, Row
from prefab.factory.spec.remote import fetch, is_remote
from prefab.factory.types import Message, Prompt
from prefab.pipelines.config.checks import MICROWORLD, locate
from prefab.pipelines.config.schema import PromptsConfig

KEPT_PROBLEMS = 20  # shown to people; all are counted
MICROWORLD_PROMPTS = 256  # when a pipeline sets no limit
MICROWORLD_MOST = 20_000
PLAIN = ("prompt", "conversation", "demonstration")  # layouts whose prompt is in a column


class Prompts:
    """The prompts of one source; iterate once or often. The counts are those of the latest
    iteration.

    `n_rows` read, `n_malformed` of them (`problems` has the first), `n_skipped` by the `split` that
    was asked for. Of a large file one row in `every` can be read, where that is enough.
    """

    def __init__(self, config: PromptsConfig, base: Path = Path()) -> None:
        self.config = config
        self.path = (
            Path(config.source) if config.source == MICROWORLD else locate(config.source, base)
        )
        self.n_rows = self.n_malformed = self.n_skipped = 0
        self.problems: list[Problem] = []
        self.every = 1

    def some(self) -> Prompts:
        """Of a file with more than 200,000 rows, prompts from about so many of them."""
        found = copy(self)
        most = data_files.MOST_ROWS
        if self.config.source != MICROWORLD and (self.config.limit or most) >= most:
            found.every = data_files.stride(self.path)
        return found

    def __iter__(self) -> Iterator[Prompt]:
        """Prompts in the order of the source.

        Raises: ConfigError when the source cannot be read, is empty, or has no row that can be
        used.
        """
        self.n_rows = self.n_malformed = self.n_skipped = 0
        self.problems = []
        given, found = _Ids(), 0
        for number, line, value in rows(self.config, self.path, self.every):
            self.n_rows += 1
            try:
                if isinstance(value, ValueError):
                    raise value
                prompt = parse_row(value, self.config)
                given.check(value, prompt, number)
            except ValueError as error:
                self._malformed(number, line, str(error))
                continue
            if self.config.split and split_of(prompt) not in self.config.split.split("+"):
                self.n_skipped += 1
                continue
            found += 1
            yield prompt
            if found * self.every >= (self.config.limit or maxsize):
                return
        if not found:
            raise ConfigError(self._nothing())

    def summary(self) -> str:
        """One line for people, empty when every row was used."""
        parts = (
            [f"{self.n_malformed:,} of {self.n_rows:,} rows malformed"] if self.n_malformed else []
        )
        parts += [f"{counted(self.n_skipped, 'row')} of other splits"] if self.n_skipped else []
        return f"{self.config.source}: {', '.join(parts)}" if parts else ""

    def _malformed(self, number: int, line: int, message: str) -> None:
        self.n_malformed += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(
                Problem(str(self.path), line, 1 if line else 0, f"row {number}", message)
            )

    def _nothing(self) -> list[Problem]:
        if self.n_malformed:
            message = f"no prompt could be read: {self.n_malformed:,} of {self.n_rows:,} rows are malformed"
            return [Problem(str(self.path), 0, 0, "", message), *self.problems]
        if self.n_skipped:
            split = str(self.config.split)
            message = (
                f"none of {self.n_rows:,} rows has the split {split}; add rows, or write "
                f'"split": "{split.split("+")[0]}" in some of them'
            )
            return [Problem(str(self.path), 0, 0, "", message)]
        return [
            Problem(
                str(self.path),
                0,
                0,
                "",
                'holds no prompts; write one a line, such as {"prompt": "..."}',
            )
        ]


class _Ids:
    """Ids that people chose name one prompt each. Kept as digests: 0.1 GB for a million rows with
    ids, else nothing.
    """

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def check(self, value: Any, prompt: Prompt, number: int) -> None:
        """Raises ValueError when the row's own id stands for another prompt already; a repeated row
        is no mistake.
        """
        if not isinstance(value, dict) or value.get("id") in (None, ""):
            return
        content = hash(prompt.messages)
        if self.seen.setdefault(hash(prompt.id), content) != content:
            raise ValueError(f'the id "{prompt.id}" already names another prompt')


def rows(config: PromptsConfig, path: Path, every: int = 1) -> Iterator[Row]:
    """The raw rows of a source with their numbers; a row that cannot even be decoded is a
    ValueError in its place.

    Raises: ConfigError when the source itself cannot be read, or is a table without a column that
    holds prompts.
    """
    if config.source == MICROWORLD:
        return _microworld(config)
    if is_remote(config.source):
        files = fetch(config.source)
        found = data_files.rows_of_files(files, every)
        names = data_files.columns(files[0])
    else:
        found = data_files.rows(path, every=every)
        names = data_files.columns(path)
    if names is not None:
        _check_columns(path, config.column, names)
    return found


def _check_columns(path: Path, column: str | None, names: Sequence[str]) -> None:
    """Raises: ConfigError for a table without a prompt's column: every row would be refused
    alike.
    """
    if column in names or (column is None and layouts.layout_of(dict.fromkeys(names, ""))):
        return
    wanted = column or " or ".join(layouts.PROMPTS)
    message = (
        f"no column {wanted}; the columns are: {', '.join(names)} (prompts.column names another)"
    )
    line = 0 if data_files.suffix_of(path) == ".parquet" else 1
    raise ConfigError([Problem(str(path), line, line, "", message)])


def parse_row(row: Any, config: PromptsConfig) -> Prompt:
    """The prompt of one row: text, a mapping of a layout that `factory.spec.layouts` reads, or a
    `Prompt` itself.

    Raises: ValueError with what is wrong, in words for the person who wrote the row.
    """
    if isinstance(row, Prompt):
        return row
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise ValueError(f"is {yamlio.describe(row)}; must be text or an object")
    messages = _messages(row, config)
    split = row.get("split")
    if split not in (None, "") and split not in SPLITS:
        raise ValueError(f"split is {yamlio.describe(split)}; must be train, val or test")
    name, group, rubric = row.get("id"), row.get("group"), _rubric(row.get("rubric"))
    try:
        content = keys.prompt_id(messages)
        keys.digest(*(text for text, _ in rubric))
    except ValueError:
        raise ValueError("holds half of a surrogate pair, which is not valid Unicode") from None
    return Prompt(
        id=_word(name, "id") or content,
        messages=messages,
        tags=_tags(row.get("tags")),
        group=_word(group, "group"),
        split=SPLITS[split] if split else None,
        rubric=rubric,
    )


def _messages(row: dict[str, Any], config: PromptsConfig) -> tuple[Message, ...]:
    """The conversation that waits for an answer."""
    layout = None if config.column else layouts.layout_of(row)
    if layout is not None and layout.name not in PLAIN:
        turns = layouts.parse(row).prompt
    else:
        turns = layouts.prompt_of(row, _column(row, config.column))
    while config.cut_answer and turns and turns[-1]["role"] == "assistant":
        turns.pop()
    try:
        layouts.check_prompt(turns)
    except ValueError as error:
        hint = " (prompts.cut_answer: true)" if "ends with the assistant" in str(error) else ""
        raise ValueError(f"{error}{hint}") from None
    return messages_of(turns, layouts.tools_of(row))


def _column(row: dict[str, Any], column: str | None) -> str:
    """The column that holds the prompt: as named, or the first of the usual ones that is filled."""
    wanted = (column,) if column else layouts.PROMPTS
    found = next((name for name in wanted if row.get(name) is not None), None)
    if found is None:
        if empty := [name for name in wanted if name in row]:
            raise ValueError(f"{empty[0]} is empty")
        raise ValueError(
            f"has no {' or '.join(wanted)}; its fields are: {', '.join(map(str, row)) or 'none'}"
        )
    return found


def messages_of(turns: layouts.Turns, tools: Sequence[Any] = ()) -> tuple[Message, ...]:
    """Turns as messages, with their tools and tool calls.

    Raises: ValueError where a turn has reasoning apart from its text, or a number in a call has no
        exact JSON text.
    """
    for number, turn in enumerate(turns, 1):
        if "reasoning_content" in turn:
            raise ValueError(
                f"turn {number} has reasoning_content: the prompts of a run hold answers alone"
            )
    return tool_calls.messages_of(turns, tools)


def _tags(value: Any) -> tuple[str, ...]:
    """Tags from a list, or from text that separates them by commas or semicolons (CSV)."""
    if value in (None, ""):
        return ()
    parts = re.split(r"[;,]", value) if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"tags are {yamlio.describe(value)}; must be a list of texts")
    return tuple(part.strip() for part in parts if part.strip())


def _rubric(value: Any) -> tuple[tuple[str, float], ...]:
    """A prompt's own rubric: [{criterion, points}, ...], points 1 when left out, below 0 for a
    pitfall.
    """
    if isinstance(value, str) and value.strip():  # CSV
        value = data_files.decode(value.encode())
    lines = value if isinstance(value, (list, tuple)) else [value] if value else []
    found = []
    for index, line in enumerate(lines, 1):
        text, points = (
            (line.get("criterion"), line.get("points", 1)) if isinstance(line, dict) else (line, 1)
        )
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f'rubric line {index} has no criterion; write {{"criterion": "...", "points": 1}}'
            )
        if (
            isinstance(points, bool)
            or not isinstance(points, (int, float))
            or not isfinite(points)
            or not points
        ):
            raise ValueError(
                f"rubric line {index} has the points {yamlio.describe(points)}; must be a number but 0"
            )
        found.append((text.strip(), float(points)))
    return tuple(found)


def _word(value: Any, name: str) -> str | None:
    """An id or group: text, or a number as text."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{name} is {yamlio.describe(value)}; must be text")
    return str(value)


def _microworld(config: PromptsConfig) -> Iterator[Row]:
    from prefab.factory.microworld import grammar

    limit = config.limit or MICROWORLD_PROMPTS
    if limit > MICROWORLD_MOST:  # drawing different ones takes ever longer as they run out
        message = f"the microworld has not {limit:,} different prompts; at most {MICROWORLD_MOST:,} are drawn"
        raise ConfigError([Problem("prompts.limit", 0, 0, "", message)])
    split = config.split or "train"
    n_val = limit // 5 if split == "train+val" else 0
    try:
        prompts = grammar.prompts(split.partition("+")[0], limit - n_val, config.seed)
        for k, prompt in enumerate(grammar.prompts("val", n_val, config.seed)):
            prompts.insert(5 * k + 4, prompt)
    except ValueError as error:
        raise ConfigError([Problem("prompts.limit", 0, 0, "", str(error))]) from None
    return ((number, 0, prompt) for number, prompt in enumerate(prompts, 1))
