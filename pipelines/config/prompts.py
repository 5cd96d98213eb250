"""Prompts from JSONL, JSON, CSV, Parquet, a `datasets` folder or the microworld, one at a time.

A row that cannot be read is reported by its number and counted; it never vanishes and never stops
the rest.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

from prefab.factory import keys
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.ledger.records import split_of
from prefab.factory.spec import yamlio
from prefab.factory.types import Message, Prompt
from prefab.pipelines.config.checks import MICROWORLD, locate
from prefab.pipelines.config.schema import PromptsConfig

KEPT_PROBLEMS = 20  # shown to people; all are counted
MICROWORLD_PROMPTS = 256  # when a pipeline sets no limit
MICROWORLD_MOST = 20_000
COLUMNS = ("prompt", "messages", "conversations")
ANY = "*"  # as a column: whatever there is, for readers of other rows
ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}
SPLITS = {
    "train": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "test": "test",
}

Row = tuple[
    int, int, Any
]  # row number from 1, line in the file (0: it has none), value or a ValueError


class Prompts:
    """The prompts of one source; iterate once or often. The counts are those of the latest
    iteration.

    `n_rows` read, `n_malformed` of them (`problems` has the first), `n_skipped` by the `split` that
    was asked for.
    """

    def __init__(self, config: PromptsConfig, base: Path = Path()) -> None:
        self.config = config
        self.path = (
            Path(config.source) if config.source == MICROWORLD else locate(config.source, base)
        )
        self.n_rows = self.n_malformed = self.n_skipped = 0
        self.problems: list[Problem] = []

    def __iter__(self) -> Iterator[Prompt]:
        """Prompts in the order of the source.

        Raises: ConfigError when the source cannot be read, is empty, or has no row that can be
        used.
        """
        self.n_rows = self.n_malformed = self.n_skipped = 0
        self.problems = []
        given, found = _Ids(), 0
        for number, line, value in rows(self.config, self.path):
            self.n_rows += 1
            try:
                if isinstance(value, ValueError):
                    raise value
                prompt = parse_row(value, self.config)
                given.check(value, prompt, number)
            except ValueError as error:
                self._malformed(number, line, str(error))
                continue
            if self.config.split and split_of(prompt) != self.config.split:
                self.n_skipped += 1
                continue
            found += 1
            yield prompt
            if found == self.config.limit:
                return
        if not found:
            raise ConfigError(self._nothing())

    def summary(self) -> str:
        """One line for people, empty when every row was used."""
        parts = (
            [f"{self.n_malformed:,} of {self.n_rows:,} rows malformed"] if self.n_malformed else []
        )
        parts += [f"{self.n_skipped:,} rows of other splits"] if self.n_skipped else []
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
            message = f"none of {self.n_rows:,} rows has the split {self.config.split}"
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


def rows(config: PromptsConfig, path: Path) -> Iterator[Row]:
    """The raw rows of a source with their numbers; a row that cannot even be decoded is a
    ValueError in its place.

    Raises: ConfigError when the source itself cannot be read.
    """
    if config.source == MICROWORLD:
        return _microworld(config)
    if path.is_dir():
        return _dataset_folder(path)
    if not path.exists():
        yamlio.read_text(path)  # says what is missing, and what is near
    readers = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(readers)
        raise ConfigError(
            [
                Problem(
                    str(path),
                    0,
                    0,
                    "",
                    f"cannot read prompts from {path.suffix or 'this'}; {known}",
                )
            ]
        )
    return reader(path, config.column)


def parse_row(row: Any, config: PromptsConfig) -> Prompt:
    """The prompt of one row: text, a mapping with `prompt`, `messages` or `conversations`, or a
    `Prompt` itself.

    Raises: ValueError with what is wrong, in words for the person who wrote the row.
    """
    if isinstance(row, Prompt):
        return row
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise ValueError(f"is {yamlio.describe(row)}; must be text or an object")
    messages = _messages(_value(row, config.column), config.cut_answer)
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


def _value(row: dict[str, Any], column: str | None) -> Any:
    """What the row asks: the named column, or the first of the usual ones that is filled."""
    wanted = (column,) if column else COLUMNS
    for name in wanted:
        if row.get(name) is not None:
            return row[name]
    present = [name for name in wanted if name in row]
    if present:
        raise ValueError(f"{present[0]} is empty")
    raise ValueError(
        f"has no {' or '.join(wanted)}; its fields are: {', '.join(map(str, row)) or 'none'}"
    )


def _messages(value: Any, cut_answer: bool) -> tuple[Message, ...]:
    """A conversation that ends with the user, from text or from a list of turns (OpenAI's or
    ShareGPT's names).
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"the prompt is {yamlio.describe(value)}; must be text or a list of turns")
    messages = [_message(turn, index) for index, turn in enumerate(value)]
    while cut_answer and messages and messages[-1].role == "assistant":
        messages.pop()
    if not messages:
        raise ValueError("the conversation has no turns")
    for index, message in enumerate(messages):
        if message.role == "system" and index:
            raise ValueError(f"turn {index + 1} is a system message; only the first turn may be")
    if messages[-1].role == "assistant":
        raise ValueError(
            "ends with the assistant's turn; a prompt ends with the user's (prompts.cut_answer: true)"
        )
    if messages[-1].role != "user":
        raise ValueError("has no user turn")
    return tuple(messages)


def _message(turn: Any, index: int) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {index + 1} is {yamlio.describe(turn)}; must have role and content")
    role = turn.get("role", turn.get("from"))
    content = turn.get("content", turn.get("value"))
    if role not in ROLES:
        known = "system, user or assistant"
        raise ValueError(f"turn {index + 1} has the role {yamlio.describe(role)}; must be {known}")
    if isinstance(content, list) and all(
        isinstance(p, dict) and p.get("type") == "text" for p in content
    ):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"turn {index + 1} has {yamlio.describe(content)} as content; must be text"
        )
    if not content.strip():
        raise ValueError("the prompt is empty" if index == 0 else f"turn {index + 1} is empty")
    return Message(ROLES[role], content)


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
        value = _decode(value.encode())
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
    try:
        prompts = grammar.prompts(config.split or "train", limit, config.seed)
    except ValueError as error:
        raise ConfigError([Problem("prompts.limit", 0, 0, "", str(error))]) from None
    return ((number, 0, prompt) for number, prompt in enumerate(prompts, 1))


def _jsonl(path: Path, column: str | None) -> Iterator[Row]:
    with _open(path) as file:
        number = 0
        for line, data in enumerate(file, 1):
            if line == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if data.strip():
                number += 1
                yield number, line, _decode(data)


def _decode(data: bytes) -> Any:
    """The value of one line, or a ValueError that says what is wrong with it."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte 0x{data[error.start]:02x} at column {error.start + 1})")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return ValueError("not JSON: nested too deeply")


def _json(path: Path, column: str | None) -> Iterator[Row]:
    text = yamlio.read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            error.msg = "more than one value; one object a line is .jsonl"
        raise ConfigError(
            [Problem(str(path), error.lineno, error.colno, "", f"not JSON: {error.msg}")]
        ) from None
    if not isinstance(value, list):
        raise ConfigError(
            [
                Problem(
                    str(path), 1, 1, "", f"must be a list of prompts, not {yamlio.describe(value)}"
                )
            ]
        )
    return ((number, 0, row) for number, row in enumerate(value, 1))


def _csv(path: Path, column: str | None) -> Iterator[Row]:
    """Rows by their header. Bytes that are not UTF-8 spoil their own row only."""
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with _open(path, mode="r", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        if reader.fieldnames is None:
            return
        _column(path, column, list(reader.fieldnames), 1)
        number = 0
        while True:
            number += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, reader.line_num + 1, ValueError(f"not CSV: {error}")
            else:
                yield number, reader.line_num, _csv_row(row)  # the line where it ends


def _csv_row(row: dict[Any, Any]) -> Any:
    if None in row:
        return ValueError(
            f"has {len(row[None])} fields more than the header; put text that holds a comma in quotes"
        )
    if any(isinstance(v, str) and any("\udc80" <= c <= "\udcff" for c in v) for v in row.values()):
        return ValueError("not UTF-8")
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), str) and row[name].lstrip().startswith("["):
            row[name] = _decode(row[name].encode())
            if isinstance(row[name], ValueError):
                return row[name]
    return row


def _parquet(path: Path, column: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split(".")[0]
        raise ConfigError([Problem(str(path), 0, 0, "", f"not a Parquet file: {reason}")]) from None
    with file:
        _column(path, column, file.schema_arrow.names)
        yield from _batches(file.iter_batches(batch_size=1024), 0)


def _dataset_folder(path: Path) -> Iterator[Row]:
    """A folder that `datasets` saved with save_to_disk, read without that library. Its splits name
    the rows' splits.
    """
    names = [None]
    index = path / "dataset_dict.json"
    if index.is_file():
        names = json.loads(yamlio.read_text(index))["splits"]
    elif not (path / "state.json").is_file():
        message = (
            "is a directory, but not one that `datasets` saved (no state.json); name a file in it"
        )
        raise ConfigError([Problem(str(path), 0, 0, "", message)])
    number = 0
    for name in names:
        folder = path / name if name else path
        for file in json.loads(yamlio.read_text(folder / "state.json"))["_data_files"]:
            for row_number, _, row in _arrow(folder / file["filename"], number):
                number = row_number
                if name in SPLITS:
                    row.setdefault("split", name)
                yield number, 0, row


def _arrow(path: Path, start: int) -> Iterator[Row]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            yield from _batches(stream, start)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            [Problem(str(path), 0, 0, "", f"cannot be read: {str(error).split('.')[0]}")]
        ) from None


def _batches(batches: Any, start: int) -> Iterator[Row]:
    """Rows of Arrow batches, in pieces: a datasets file may be one batch of a million rows."""
    for batch in batches:
        for offset in range(0, batch.num_rows, 1024):
            for row in batch.slice(offset, 1024).to_pylist():
                start += 1
                yield start, 0, row


def _column(path: Path, column: str | None, names: list[str], line: int = 0) -> None:
    """The header has a column to read. Raises ConfigError: without one every row would be malformed
    alike.
    """
    wanted = (column,) if column else COLUMNS
    if column != ANY and not any(name in names for name in wanted):
        message = f"no column {' or '.join(wanted)}; the columns are: {', '.join(names)} (prompts.column names another)"
        raise ConfigError([Problem(str(path), line, line, "", message)])


def _open(path: Path, mode: str = "rb", **options: Any) -> Any:
    try:
        return open(path, mode, **options)
    except OSError as error:
        raise ConfigError(
            [Problem(str(path), 0, 0, "", f"cannot be read: {error.strerror}")]
        ) from None
