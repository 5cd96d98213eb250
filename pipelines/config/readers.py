"""Rows of a table in a file, whatever its format, each with where it stands; a row that cannot be
read is one too.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError

Row = tuple[
    int, int, Any
]  # number from 1, line in the file (0: it has none), the value or a ValueError
_READERS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}


def rows(path: Path, text: bool = False) -> Iterator[Row]:
    """The rows of a JSONL, JSON, CSV, TSV or Parquet file as mappings. With `text`, any other file
    gives its lines.

    Raises: ConfigError when there is no such file, or it cannot be read at all.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    kind = _READERS.get(path.suffix.lower(), "lines" if text else "")
    if not kind:
        raise ConfigError(
            f"{path}: cannot read rows from {path.suffix or 'this'}; {', '.join(_READERS)}"
        )
    if kind == "parquet":
        yield from _parquet(path)
        return
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from None
    yield from {"jsonl": _jsonl, "json": _json, "csv": _csv, "lines": _lines}[kind](path, content)


def _jsonl(path: Path, content: str) -> Iterator[Row]:
    number = 0
    for line, text in enumerate(content.split("\n"), 1):
        if text.strip():
            number += 1
            yield number, line, _parsed(text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {getattr(error, 'msg', 'nested too deeply')}")


def _json(path: Path, content: str) -> Iterator[Row]:
    """A list of rows, or an object that holds one under `examples` or `data`."""
    value = _parsed(content)
    if isinstance(value, ValueError):
        raise ConfigError(f"{path}: {value}; one object a line is .jsonl")
    if isinstance(value, dict):
        value = next(
            (
                value[name]
                for name in ("examples", "data", "rows")
                if isinstance(value.get(name), list)
            ),
            [value],
        )
    if not isinstance(value, list):
        raise ConfigError(f"{path}: must be a list of rows")
    yield from ((number, 0, row) for number, row in enumerate(value, 1))


def _csv(path: Path, content: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(
        content.splitlines(keepends=True), delimiter="\t" if path.suffix.lower() == ".tsv" else ","
    )
    header, number = next(lines, []), 0
    for fields in lines:
        number += 1  # noqa: SIM113
        whole = len(fields) == len(header)
        row = (
            dict(zip(header, fields, strict=True))
            if whole
            else ValueError(
                f"has {len(fields)} fields, the header {len(header)}; put text that holds a comma in quotes"
            )
        )
        yield number, lines.line_num, row


def _parquet(path: Path) -> Iterator[Row]:
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    yield from ((number, 0, row) for number, row in enumerate(frame.iter_rows(named=True), 1))


def _lines(path: Path, content: str) -> Iterator[Row]:
    yield from (
        (number, number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()
    )


def place(path: Path, number: int, line: int) -> str:
    """Where a row stands, for people: `bench.jsonl:3`, or its number where the format has no
    lines.
    """
    return f"{path.name}:{line}" if line else f"{path.name} row {number}"
