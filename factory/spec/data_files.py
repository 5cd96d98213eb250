"""Rows of data files: JSONL, JSON, CSV, TSV and Parquet, plain or compressed, one at a time.

The one reader of training files, prompts, imports and benchmarks. `layouts` says what a
row holds.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.spec import bounded, yamlio

# Row number from 1, line in the file (0: the format has no lines), the value or a ValueError that
# says why it cannot be read.
Row = tuple[int, int, Any]
Reader = Callable[[Path], Iterator[Row]]
COMPRESSED = (".gz", ".zst", ".bz2")
MOST_ROWS = 200_000  # that a plan or a check reads of a large file
ROWS, ROWS_BYTES = 64, 128 << 20  # of a table that are in memory together
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as TextIOWrapper gives them
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


def rows(path: Path, text: bool = False, every: int = 1) -> Iterator[Row]:
    """The rows of a file, or of all data files in a folder or of a pattern (`shards/*.parquet`),
    in the order of their names.

    A folder is one that `datasets` saved, or one of Parquet or JSONL files, whose names begin with
    their split (`train-00000-of-00002.parquet`, `test.jsonl.gz`); rows get it as `split`.

    Args:
        path: The file, folder or pattern.
        text: Give the lines of a file of any other format.
        every: Give one row in so many, spread evenly (see `stride`).

    Raises:
        ConfigError: There is no such file, its format is unknown, or it cannot be read at all. A
            single row that cannot be read is a ValueError in its place.
    """
    if path.is_dir():
        return _folder(path, every)
    if found := matching(path):
        return rows_of_files(found, every)
    if not path.exists():
        yamlio.read_text(path)  # raises, and names a file of a similar name
    return _some(_reader(path, text), path, every)


def _reader(path: Path, text: bool = False) -> Reader:
    """The reader of a file by its name. Raises: ConfigError for an unknown format, unless the lines
    of any other file are wanted.
    """
    kind = suffix_of(path)
    if kind not in READERS and not text:
        known = f"{', '.join(READERS)}, each also with {', '.join(COMPRESSED)}"
        raise _problem(path, f"cannot read rows from {kind or 'this'}; {known}")
    return READERS.get(kind, _lines)


def _some(read: Reader, path: Path, every: int) -> Iterator[Row]:
    if every == 1:
        return read(path)
    if read in (_parquet, jsonl_rows):  # which skip rows without decoding them
        return read(path, every)
    return (row for row in read(path) if _chosen(row[0], every))


def _chosen(number: int, every: int) -> bool:
    """Whether a row is the one in so many. They are spread evenly, and never a period of the file:
    the multiples of the golden ratio modulo 1.
    """
    return (number * 0x9E3779B9 % 2**32) * every < 2**32


def stride(path: Path) -> int:
    """Of how many rows one is to be read, so that about `MOST_ROWS` are. 1 for a file that has no
    more, and for one of which that takes reading it (all but Parquet and plain JSON lines).
    """
    files = matching(path) or [path]
    if path.is_dir() and not _saved_by_datasets(path):
        files = data_files(path)
    return max(1, sum(_n_rows(file) for file in files if file.is_file()) // MOST_ROWS)


def _n_rows(path: Path) -> int:
    """About how many rows a file has, by its metadata or its first lines; 0 where unknown."""
    if path.suffix.lower() == ".parquet":
        with _parquet_file(path) as file:
            return int(file.metadata.num_rows)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return 0
    lengths = [len(data or b"") for _, data in islice(_raw_lines(path), 1000)]
    return path.stat().st_size * len(lengths) // max(1, sum(lengths))


def matching(path: Path) -> list[Path]:
    """The data files that a pattern stands for, in order; none where the path is no pattern, or is
    the name of a file.
    """
    if not glob.has_magic(str(path)) or path.exists():
        return []
    found = (Path(name) for name in sorted(glob.glob(str(path), recursive=True)))
    return [file for file in found if suffix_of(file) in READERS and file.is_file()]


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
    path = next(iter(matching(path)), path)
    kind = suffix_of(path)
    if path.is_dir() or kind not in (".csv", ".tsv", ".parquet"):
        return None
    if kind == ".parquet":
        with _parquet_file(path) as file:
            return list(file.schema_arrow.names)
    with _csv_file(path) as file:
        names = _csv_reader(path, file).fieldnames
        return list(names) if names else None


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
        file = bounded.open_regular(path)
        if path.suffix.lower() == ".gz":
            return io.BufferedReader(gzip.open(file))
        if path.suffix.lower() == ".bz2":
            return bz2.open(file)
        if path.suffix.lower() == ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
        return file
    except OSError as error:
        raise _problem(path, f"cannot be read: {error.strerror or error}") from None


def _most(path: Path) -> int:
    """How many bytes a file may unpack to."""
    if path.suffix.lower() not in COMPRESSED:
        return sys.maxsize
    return bounded.limit(max(bounded.MAX_UNPACKED, path.stat().st_size * bounded.MAX_RATIO))


def _unpacks_too_far(path: Path, line: int = 0) -> ConfigError:
    message = f"unpacks to more than {bounded.mb(_most(path))}{bounded.HOW}"
    return _problem(path, message, line, 1 if line else 0)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number, bytes) of each line; None in place of one that is longer than the limit."""
    most, left = bounded.limit(bounded.MAX_LINE), _most(path)
    with _open(path) as file:
        try:
            line = 0
            while data := file.readline(most + 1):
                line += 1
                left -= len(data)
                if len(data) > most:
                    while not data.endswith(b"\n") and (data := file.readline(most)) and left > 0:
                        left -= len(data)
                    yield line, None
                else:
                    yield line, data
                if left < 0:
                    raise _unpacks_too_far(path, line)
        except (OSError, EOFError, zlib.error) as error:  # a damaged compressed file
            raise _problem(path, f"cannot be decompressed: {error}") from None


def _byte_lines(path: Path) -> Iterator[tuple[int, bytes | ValueError]]:
    """(line number, bytes) of each line that is not blank."""
    for line, data in _raw_lines(path):
        if data is None:
            most = bounded.mb(bounded.limit(bounded.MAX_LINE))
            yield line, ValueError(f"the line is longer than {most}{bounded.HOW}")
            continue
        if line == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if data.strip():
            yield line, data


def jsonl_rows(path: Path, every: int = 1) -> Iterator[Row]:
    """The rows of a file with one JSON value a line, whatever its name; or one in so many."""
    for number, (line, data) in enumerate(_byte_lines(path), 1):
        if every == 1 or _chosen(number, every):
            yield number, line, data if isinstance(data, ValueError) else decode(data)


def _lines(path: Path) -> Iterator[Row]:
    for number, (line, data) in enumerate(_byte_lines(path), 1):
        if isinstance(data, ValueError):
            yield number, line, data
            continue
        try:
            yield number, line, data.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise _problem(path, f"not UTF-8 (byte {error.start} of line {line})") from None


def decode(data: bytes | str) -> Any:
    """The value of one line of JSON, or a ValueError that says what is wrong with it."""
    try:
        return bounded.read_json(data)
    except ValueError as error:
        return error


def _json(path: Path) -> Iterator[Row]:
    """A list of rows, an object that holds one under `examples`, `data` or `rows`, or one row."""
    most = min(bounded.limit(bounded.MAX_JSON), _most(path))
    try:
        with _open(path) as file:
            data = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _problem(path, f"cannot be decompressed: {error}") from None
    if len(data) > most:
        message = f"the file is longer than {bounded.mb(most)}; write one object a line (.jsonl)"
        raise _problem(path, message + bounded.HOW)
    try:
        text = data.decode("utf-8-sig")
        value = bounded.parse_json(text)
        bounded.check_json(value, text)
    except UnicodeDecodeError as error:
        raise _problem(path, f"not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _problem(path, "not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            error.msg = "more than one value; one object a line is .jsonl"
        raise _problem(path, f"not JSON: {error.msg}", error.lineno, error.colno) from None
    except ValueError as error:
        raise _problem(path, str(error)) from None
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


def _csv_lines(path: Path, file: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a table, each within the limit."""
    most, left, line = bounded.limit(bounded.MAX_LINE), _most(path), 0
    while text := file.readline(most + 1):
        line, left = line + 1, left - len(text)
        if len(text) > most:
            raise bounded.too_long(path, most, line)
        if left < 0:
            raise _unpacks_too_far(path, line)
        yield text


def _csv_reader(path: Path, file: io.TextIOWrapper) -> csv.DictReader[str]:
    """A reader of a table's rows by their header.

    Raises: ConfigError where the header cannot be read, or names a column twice.
    """
    csv.field_size_limit(bounded.limit(bounded.MAX_LINE))
    lines = _csv_lines(path, file)
    reader = csv.DictReader(lines, delimiter=_delimiter(path), strict=True)
    try:
        names = list(reader.fieldnames or ())
    except csv.Error as error:
        raise _problem(path, f"not CSV: {error}", 1, 1) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _problem(path, f"cannot be decompressed: {error}") from None
    if any(_NOT_UTF8.search(name) or "\0" in name for name in names):
        raise _problem(path, "not UTF-8; save the file as UTF-8 (not UTF-16)", 1, 1)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise _problem(path, f"names the column {twice[0]!r} twice", 1, 1)
    return reader


def _csv(path: Path) -> Iterator[Row]:
    """Rows by their header. Bytes that are not UTF-8 spoil their own row only."""
    with _csv_file(path) as file:
        reader = _csv_reader(path, file)
        number = 0
        while True:
            number += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, reader.line_num + 1, ValueError(f"not CSV: {error}")
            except (OSError, EOFError, zlib.error) as error:
                raise _problem(path, f"cannot be decompressed: {error}") from None
            else:
                yield number, reader.line_num, _csv_row(row)  # the line where it ends


def _csv_row(row: dict[Any, Any]) -> Any:
    if None in row:
        return ValueError(
            f"has {len(row[None])} fields more than the header; put text that holds a comma in quotes"
        )
    if any(isinstance(v, str) and _NOT_UTF8.search(v) for v in row.values()):
        return ValueError("not UTF-8")
    return _with_lists(row)


def _with_lists(row: dict[str, Any]) -> Any:
    """A row of a table with lists in place of the JSON texts of lists of objects."""
    for name in JSON_COLUMNS:
        value = row.get(name)
        if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
            found = decode(value)
            if not isinstance(found, ValueError):
                row[name] = found
            elif name in ("messages", "conversations"):  # which hold nothing else
                return found
    return row


def _parquet_file(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        bounded.open_regular(path).close()
        # as it is by default, a row group is read as a whole
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pyarrow.ArrowException, OSError) as error:
        raise _problem(path, f"not a Parquet file: {str(error).split('.')[0]}") from None
    most = bounded.limit(bounded.MAX_UNPACKED)
    lists = [
        file.schema.column(j).max_repetition_level > 0 for j in range(file.metadata.num_columns)
    ]
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        for j in range(group.num_columns):
            column = group.column(j)
            packed = max(column.total_compressed_size, 1)
            # a list of one row may hold all values of the row group, each of 8 bytes in memory
            unpacked = max(column.total_uncompressed_size, 8 * column.num_values * lists[j])
            if unpacked > max(most, packed * bounded.MAX_RATIO):
                raise _problem(
                    path, f"a column unpacks to more than {bounded.mb(most)}{bounded.HOW}"
                )
    return file


def _parquet(path: Path, every: int = 1) -> Iterator[Row]:
    with _parquet_file(path) as file:
        rows = _rows_at_once(path, file.metadata)
        yield from _batches(path, file.iter_batches(batch_size=rows), rows, every)


def _rows_at_once(path: Path, metadata: Any) -> int:
    """How many rows of a Parquet file are in memory together. A value that is stored once, in the
    dictionary of a row group, may be that of each row, so a few rows can be larger than the file.
    """
    largest = 1
    with bounded.open_regular(path) as file:
        for i in range(metadata.num_row_groups):
            group, size = metadata.row_group(i), 0
            for j in range(group.num_columns):
                column = group.column(j)
                if column.has_dictionary_page:
                    file.seek(column.dictionary_page_offset)
                    size += _page_bytes(file.read(16)) or column.total_uncompressed_size
                elif "DELTA_BYTE_ARRAY" in column.encodings:  # a value may repeat the one before
                    size += column.total_uncompressed_size
            largest = max(largest, size)
    return max(1, min(ROWS, ROWS_BYTES // largest))


def _page_bytes(header: bytes) -> int:
    """The unpacked bytes of a Parquet page, from the first fields of its header (Thrift's compact
    protocol: the page's type, then this size, both i32); 0 where it begins otherwise.
    """
    if len(header) < 4 or header[0] != 0x15 or header[1] > 0x7F or header[2] != 0x15:
        return 0
    number = 0
    for place, byte in enumerate(header[3:8]):
        number |= (byte & 0x7F) << (7 * place)
        if byte <= 0x7F:
            return number >> 1
    return 0


def _batches(path: Path, batches: Iterable[Any], rows: int = ROWS, every: int = 1) -> Iterator[Row]:
    """Rows of Arrow batches, in pieces: a `datasets` file may be one batch of a million rows."""
    import pyarrow

    number, left = (
        0,
        bounded.limit(max(bounded.MAX_UNPACKED, path.stat().st_size * bounded.MAX_RATIO)),
    )
    try:
        for batch in batches:
            for offset in range(0, batch.num_rows, rows):
                piece = batch.slice(offset, rows)
                left -= piece.nbytes
                if left < 0:
                    raise _problem(path, f"unpacks too far (at row {number + 1:,}){bounded.HOW}")
                numbers: Sequence[int] = range(number + 1, number + piece.num_rows + 1)
                if every > 1:
                    numbers = [n for n in numbers if _chosen(n, every)]
                    places = [n - number - 1 for n in numbers]
                    piece = piece.take(pyarrow.array(places, pyarrow.int64()))
                for n, row in zip(numbers, piece.to_pylist(), strict=True):
                    yield n, 0, _with_lists(row)
                number += min(rows, batch.num_rows - offset)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        message = f"cannot be read after row {number}: {str(error).split('.')[0]}"
        raise _problem(path, message) from None


READERS: dict[str, Reader] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _folder(path: Path, every: int = 1) -> Iterator[Row]:
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
    yield from _in_order(files, every)


def rows_of_files(files: Iterable[Path], every: int = 1) -> Iterator[Row]:
    """The rows of several data files, numbered through; they get the split of their file's name."""
    return _in_order(((file, split_in_name(file), _reader(file)) for file in files), every)


def _in_order(files: Iterable[tuple[Path, str | None, Reader]], every: int) -> Iterator[Row]:
    before = number = 0  # rows of the files before this one
    for file, split, read in files:
        for number, line, row in _some(read, file, every):
            if split and isinstance(row, dict) and row.get("split") is None:
                row["split"] = split
            yield before + number, line, row
        before, number = before + number, 0


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
    """(file, split) of a folder that `datasets` saved with save_to_disk; empty for another.

    Raises: ConfigError where it is damaged, or names files outside the folder.
    """
    index = path / "dataset_dict.json"
    if index.is_file():
        names = _names_in(index, "splits")
    elif (path / "state.json").is_file():
        names = [""]
    else:
        return []
    found = []
    for name in names:
        state = path / name / "state.json"
        for file in _names_in(state, "_data_files", "filename"):
            if not (state.parent / file).is_file():
                raise _problem(state, f"names the file {file}, which is not there")
            found.append((state.parent / file, SPLITS.get(name)))
    return found


def _names_in(file: Path, field: str, inner: str = "") -> list[str]:
    """The names of files or folders that a field of a JSON file lists."""
    value = decode(yamlio.read_text(file))
    if isinstance(value, ValueError):
        raise _problem(file, str(value))
    rows = value.get(field) if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows:
        raise _problem(file, f"has no list {field}; save the dataset again")
    names = []
    for row in rows:
        name = row.get(inner) if inner and isinstance(row, dict) else row
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]*[^/\\\0.][^/\\\0]*", name):
            raise _problem(file, f"{field} holds what is not the name of a file in this folder")
        names.append(name)
    return names


def _arrow(path: Path) -> Iterator[Row]:
    import pyarrow

    try:
        bounded.open_regular(path).close()
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            yield from _batches(path, stream)
    except (pyarrow.ArrowException, OSError) as error:
        raise _problem(path, f"cannot be read: {str(error).split('.')[0]}") from None
