"""The files of an export in a folder that may hold other things: what this export wrote is listed,
nothing else is touched.

The list is `prefab-export.json`. A new export is written beside the former one, in a hidden folder
of the same file system, and moved in file by file once all of it is there. Nothing is removed that
the list does not name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from prefab.factory.errors import ConfigError

if TYPE_CHECKING:
    import polars
    from pyarrow import parquet

MANIFEST = "prefab-export.json"
# All that an export writes. The threat: a list that names files of somebody else, with an absolute
# path or with `..`.
OURS = re.compile(
    r"README\.md|report\.html|source/(constitution|pipeline)\.yaml"
    r"|dataset_info\.json|axolotl\.yaml"
    r"|[a-z_]+/(train|validation|test)(-\d{5,}-of-\d{5,}\.parquet|\.(parquet|jsonl|json|csv))"
)
STAGE = re.compile(r"\.prefab-export-(\d+)-\w+")  # the folder of a running export: its process
SHARD_BYTES = 512 << 20
MEND = "Nothing was written. Choose another folder, or move it away"


class ShardedFile:
    """A Parquet file that is written part by part. What is longer than SHARD_BYTES becomes several
    files, which `datasets` reads as one.
    """

    def __init__(self, path: Path) -> None:
        """`path` is that of the file, without its suffix; its folder is made."""
        self.rows = 0
        self._path = path
        self._shards: list[Path] = []
        self._writer: parquet.ParquetWriter | None = None
        path.parent.mkdir(exist_ok=True)

    def write(self, rows: polars.DataFrame) -> None:
        """Append rows, all with the same columns. Raises: OSError, as of a full disk."""
        import polars as pl
        from pyarrow import parquet

        table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._shards.append(self._path.with_name(f"{self._path.name}.{len(self._shards)}"))
            self._writer = parquet.ParquetWriter(self._shards[-1], table.schema, compression="zstd")
        self._writer.write_table(table)
        self.rows += rows.height
        if self._shards[-1].stat().st_size > SHARD_BYTES:
            self.close()

    def close(self) -> None:
        """Write the end of the file that is open."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def finish(self) -> str:
        """Give the files their names. Returns: the file, or the pattern of several, relative to the
        export.
        """
        name, count = self._path.name, len(self._shards)
        if count == 1:
            self._shards[0].rename(self._path.with_name(f"{name}.parquet"))
            return f"{self._path.parent.name}/{name}.parquet"
        for i, shard in enumerate(self._shards):
            shard.rename(self._path.with_name(f"{name}-{i:05}-of-{count:05}.parquet"))
        return f"{self._path.parent.name}/{name}-*.parquet"


class LinesFile:
    """A file of JSON lines, of a JSON list, or of CSV with a header, that is written part by
    part.
    """

    def __init__(self, path: Path, suffix: str) -> None:
        """`path` is that of the file, without its suffix; its folder is made."""
        self.rows = 0
        self._name = f"{path.parent.name}/{path.name}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        self._suffix = suffix
        self._file = path.with_name(f"{path.name}.{suffix}").open("wb")

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows, all with the same columns. Raises: OSError, as of a full disk."""
        if self._suffix == "csv":
            import polars as pl

            frame = pl.DataFrame(rows, infer_schema_length=None)
            frame.write_csv(self._file, include_header=not self.rows)
        elif self._suffix == "json":
            for row in rows:
                self._file.write((b",\n" if self.rows else b"[\n") + orjson.dumps(row))
                self.rows += 1
            return
        else:
            self._file.writelines(
                orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows
            )
        self.rows += len(rows)

    def close(self) -> None:
        """Write the end of the file."""
        if self._suffix == "json" and not self._file.closed:
            self._file.write(b"\n]\n" if self.rows else b"[]\n")
        self._file.close()

    def finish(self) -> str:
        """The file, relative to the export."""
        return self._name


class CountedRows:
    """The number of rows that a file would have: nothing is written."""

    def __init__(self, name: str) -> None:
        """`name` is that of the file, relative to the export."""
        self.rows = 0
        self._name = name

    def close(self) -> None:
        """Nothing is open."""

    def finish(self) -> str:
        """The file, relative to the export."""
        return self._name


@contextmanager
def replacing(out: Path, files: Sequence[str] = ()) -> Iterator[Path]:
    """An empty folder to write files into. At the end they take the place of the former export in
    `out`, of which the files that are no longer written are removed. After an error the former
    export is as it was.

    Args:
        out: The folder of the export.
        files: Files that will be written, as far as they are known, relative to it.

    Raises: ConfigError when a file stands in the way that no export wrote, or the list of the
    former export is damaged.
    """
    check(out, files)
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    _remove_stages_of_the_dead(out)
    stage = Path(tempfile.mkdtemp(prefix=f".prefab-export-{os.getpid()}-", dir=out))
    try:
        yield stage
        written = sorted(
            str(path.relative_to(stage)) for path in stage.rglob("*") if not path.is_dir()
        )
        _swap(stage, out, check(out, written), written)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if new:
            _remove_empty(out)


def check(out: Path, files: Sequence[str]) -> list[str]:
    """The files of the former export in `out`, once it is sure that writing `files` there takes
    nobody's file.

    Raises: as `replacing`.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a folder. {MEND}")
    former = listed(out)
    for name in sorted({*former, *files}):
        path = out / name
        if path.parent != out and (
            path.parent.is_symlink() or (path.parent.exists() and not path.parent.is_dir())
        ):
            raise ConfigError(
                f"{path.parent} is no plain folder, and the export has a folder of that name. {MEND}"
            )
        if path.is_symlink() or path.is_dir():
            raise ConfigError(
                f"{path} is no plain file, and the export has a file of that name. {MEND}"
            )
        if name not in former and path.exists():
            raise ConfigError(f"{path} is there already, and no earlier export wrote it. {MEND}")
    return former


def listed(out: Path) -> list[str]:
    """What the export in `out` says it wrote; without one, nothing.

    Raises: ConfigError where the list is damaged.
    """
    path = out / MANIFEST
    if path.is_symlink():
        raise ConfigError(f"{path} is a symbolic link. {MEND}")
    if not path.exists():
        return []
    try:
        names = json.loads(path.read_bytes())["files"]
        wrong = [name for name in names if not OURS.fullmatch(name)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not the list of files of an export. {MEND}") from error
    if wrong:
        raise ConfigError(f"{path} names {wrong[0]!r}, which no export writes. {MEND}")
    return list(names)


def _swap(stage: Path, out: Path, former: Sequence[str], files: Sequence[str]) -> None:
    """Move the new files in, then remove what is left of the former export. While that lasts the
    list names the files of both: whatever stops it, the next export can go on.
    """
    _list(stage, out, sorted({*former, *files}))
    for name in files:
        (out / name).parent.mkdir(exist_ok=True)
        os.replace(stage / name, out / name)
    for name in former:
        if name not in files:
            (out / name).unlink(missing_ok=True)
            if (out / name).parent != out:
                _remove_empty((out / name).parent)
    _list(stage, out, files)


def _list(stage: Path, out: Path, files: Sequence[str]) -> None:
    text = json.dumps({"written_by": "prefab export", "files": list(files)}, indent=1) + "\n"
    (stage / MANIFEST).write_text(text, encoding="utf-8")
    os.replace(stage / MANIFEST, out / MANIFEST)


def _remove_stages_of_the_dead(out: Path) -> None:
    """Remove the hidden folders of exports that were killed. One that holds anything else than an
    export's files stays.
    """
    for stage in out.glob(".prefab-export-*"):
        process = STAGE.fullmatch(stage.name)
        if process is None or stage.is_symlink() or Path(f"/proc/{process[1]}").exists():
            continue
        files = [path.relative_to(stage) for path in stage.rglob("*") if not path.is_dir()]
        if all(str(file) == MANIFEST or OURS.fullmatch(str(file)) for file in files):
            shutil.rmtree(stage, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    """Remove a folder that holds nothing; any other stays."""
    try:  # noqa: SIM105
        folder.rmdir()
    except OSError:
        pass  # not empty, or gone
