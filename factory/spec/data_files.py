"""Rows of data files: JSONL, JSON, CSV, TSV and Parquet, plain or compressed, one at a time.

The one reader of training files, prompts, imports and benchmarks. `layouts` says what a
row holds.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.spec import yamlio

# Row number from 1, line in the file (0: the format has no lines), the value or a ValueError that
# says why it cannot be read.
Row = tuple[int, int, Any]
COMPRESSED = (".gz", ".zst", ".bz2")
SPLITS = {
    "train": "train",
    "val": "val",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "test": "test",
}
# Columns of a table whose text may be a list of turns or answers, written as JSON.
JSON_COLUMNS = (
    "prompt",
    "messages",
    "conversations",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "answers",
    "context",
    "conversation_a",
    "conversation_b",
)


def rows(path: Path, text: bool = False) -> Iterator[Row]:
    """The rows of a file, or of all data files in a folder, in order.

    A folder is one that `datasets` saved, or one of Parquet or JSONL files, whose names begin with
    their split (`train-00000-of-00002.parquet`, `test.jsonl.gz`); rows get it as `split`.

    Args:
        path: The file or folder.
        text: Give the lines of a file of any other format.

    Raises:
        ConfigError: There is no such file, its format is unknown, or it cannot be read at all. A
            single row that cannot be read is a ValueError in its place.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        yamlio.read_text(path)  # raises, and names a file of a similar name
    kind = suffix_of(path)
    if kind not in READERS and not text:
        known = f"{', '.join(READERS)}, each also with {', '.join(COMPRESSED)}"
        raise _problem(path, f"cannot read rows from {kind or 'this'}; {known}")
    return READERS.get(kind, _lines)(path)


def suffix_of(path: Path) -> str:
    """The suffix that names the format, below that of a compression: `.jsonl` of `x.jsonl.gz`."""
    suffixes = [s.lower() for s in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def columns(path: Path) -> list[str] | None:
    """The column names of a table (CSV, TSV, Parquet); None of other formats, and of an empty
    file.
    """
    kind = suffix_of(path)
    if path.is_dir() or kind not in (".csv", ".tsv", ".parquet"):
        return None
    if kind == ".parquet":
        with _parquet_file(path) as file:
            return list(file.schema_arrow.names)
    with _csv_file(path) as file:
        names = csv.DictReader(file, delimiter=_delimiter(path)).fieldnames
        return list(names) if names is not None else None


def place(path: Path, number: int, line: int) -> str:
    """Where a row stands, for people: `bench.jsonl:3`, or its number where the format has no
    lines.
    """
    return f"{path.name}:{line}" if line else f"{path.name} row {number}"


def _problem(path: Path, message: str, line: int = 0, column: int = 0) -> ConfigError:
    return ConfigError([Problem(str(path), line, column, "", message)])


def _open(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed as its name says."""
    try:
        if path.suffix.lower() == ".gz":
            return io.BufferedReader(gzip.open(path))
        if path.suffix.lower() == ".bz2":
            return bz2.open(path)
        if path.suffix.lower() == ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
        return open(path, "rb")
    except OSError as error:
        raise _problem(path, f"cannot be read: {error.strerror or error}") from None


def _byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of each line that is not blank."""
    with _open(path) as file:
        try:
            for line, data in enumerate(file, 1):
                if line == 1:
                    data = data.removeprefix(b"\xef\xbb\xbf")
                if data.strip():
                    yield line, data
        except (OSError, EOFError) as error:  # a damaged compressed file
            raise _problem(path, f"cannot be decompressed: {error}") from None


def _jsonl(path: Path) -> Iterator[Row]:
    for number, (line, data) in enumerate(_byte_lines(path), 1):
        yield number, line, decode(data)


def _lines(path: Path) -> Iterator[Row]:
    for number, (line, data) in enumerate(_byte_lines(path), 1):
        try:
            yield number, line, data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _problem(path, f"not UTF-8 (byte {error.start} of line {line})") from None


def decode(data: bytes) -> Any:
    """The value of one line of JSON, or a ValueError that says what is wrong with it."""
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte 0x{data[error.start]:02x} at column {error.start + 1})")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return ValueError("not JSON: nested too deeply")


def _json(path: Path) -> Iterator[Row]:
    """A list of rows, an object that holds one under `examples`, `data` or `rows`, or one row."""
    with _open(path) as file:
        data = file.read()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _problem(path, f"not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _problem(path, "not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            error.msg = "more than one value; one object a line is .jsonl"
        raise _problem(path, f"not JSON: {error.msg}", error.lineno, error.colno) from None
    if isinstance(value, dict):
        lists = (value.get(name) for name in ("examples", "data", "rows"))
        value = next((found for found in lists if isinstance(found, list)), [value])
    if not isinstance(value, list):
        raise _problem(path, f"must be a list of rows, not {yamlio.describe(value)}", 1, 1)
    yield from ((number, 0, row) for number, row in enumerate(value, 1))


def _delimiter(path: Path) -> str:
    return "\t" if suffix_of(path) == ".tsv" else ","


def _csv_file(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _csv(path: Path) -> Iterator[Row]:
    """Rows by their header. Bytes that are not UTF-8 spoil their own row only."""
    csv.field_size_limit(2**31 - 1)
    with _csv_file(path) as file:
        reader = csv.DictReader(file, delimiter=_delimiter(path), strict=True)
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
    if any(isinstance(v, str) and re.search("[\udc80-\udcff]", v) for v in row.values()):
        return ValueError("not UTF-8")
    return _with_lists(row)


def _with_lists(row: dict[str, Any]) -> Any:
    """A row of a table with lists in place of the JSON texts of lists of objects."""
    for name in JSON_COLUMNS:
        value = row.get(name)
        if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
            found = decode(value.encode())
            if not isinstance(found, ValueError):
                row[name] = found
            elif name in ("messages", "conversations"):  # which hold nothing else
                return found
    return row


def _parquet_file(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _problem(path, f"not a Parquet file: {str(error).split('.')[0]}") from None


def _parquet(path: Path) -> Iterator[Row]:
    with _parquet_file(path) as file:
        yield from _batches(file.iter_batches(batch_size=1024))


def _batches(batches: Iterable[Any]) -> Iterator[Row]:
    """Rows of Arrow batches, in pieces: a `datasets` file may be one batch of a million rows."""
    number = 0
    for batch in batches:
        for offset in range(0, batch.num_rows, 1024):
            for row in batch.slice(offset, 1024).to_pylist():
                number += 1
                yield number, 0, _with_lists(row)


Reader = Callable[[Path], Iterator[Row]]
READERS: dict[str, Reader] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _folder(path: Path) -> Iterator[Row]:
    files: list[tuple[Path, str | None, Reader]] = [
        (file, split, _arrow) for file, split in _saved_by_datasets(path)
    ]
    files = files or [
        (file, split_in_name(file), READERS[suffix_of(file)]) for file in data_files(path)
    ]
    if not files:
        raise _problem(
            path,
            "is a folder without data: neither one that `datasets` saved (state.json), nor with "
            f"{', '.join(READERS)} files in it",
        )
    number = 0
    for file, split, read in files:
        for _, line, row in read(file):
            number += 1
            if split and isinstance(row, dict) and row.get("split") is None:
                row["split"] = split
            yield number, line, row


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder and of its `data` folder: Parquet where there is any, else JSONL,
    else of another format; in the order of their names.
    """
    found = sorted(
        file
        for place in (folder, folder / "data")
        if place.is_dir()
        for file in place.iterdir()
        if file.is_file() and not file.name.startswith(".") and suffix_of(file) in READERS
    )
    for kinds in ((".parquet",), (".jsonl", ".ndjson"), (".csv", ".tsv")):
        if some := [file for file in found if suffix_of(file) in kinds]:
            return some
    return [file for file in found if not file.name.endswith(("_info.json", "_infos.json"))]


def split_in_name(file: Path) -> str | None:
    """The split that a file's name begins with: `val` of `validation-00000-of-00001.parquet`,
    `train` of `train_prefs-00000-of-00001.parquet`; None where it begins with another word.
    """
    return SPLITS.get(re.split(r"[-_.]", file.name.lower(), maxsplit=1)[0])


def _saved_by_datasets(path: Path) -> list[tuple[Path, str | None]]:
    """(file, split) of a folder that `datasets` saved with save_to_disk; empty for another."""
    names: list[str | None] = [None]
    index = path / "dataset_dict.json"
    if index.is_file():
        names = json.loads(yamlio.read_text(index))["splits"]
    elif not (path / "state.json").is_file():
        return []
    return [
        (folder / file["filename"], SPLITS.get(name or ""))
        for name in names
        for folder in [path / name if name else path]
        for file in json.loads(yamlio.read_text(folder / "state.json"))["_data_files"]
    ]


def _arrow(path: Path) -> Iterator[Row]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            yield from _batches(stream)
    except (pyarrow.ArrowException, OSError) as error:
        raise _problem(path, f"cannot be read: {str(error).split('.')[0]}") from None
