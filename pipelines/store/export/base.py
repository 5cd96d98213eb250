"""Exports: one run of a store as Parquet files with a dataset card, in one of several formats.

A format is one file in this folder that keeps the protocol `ExportFormat`; it is named in
`pipelines/config/registries.py`, or in another package's entry points (`prefab.exports`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prefab.factory.errors import ConfigError
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.store import datasets
from prefab.factory.store.store import Read, one_connection
from prefab.pipelines.config.registries import FORMATS
from prefab.pipelines.store.export.card import BESIDE, PAGE_EXAMPLES, ExportReport, write_beside
from prefab.pipelines.store.export.files import (
    CountedRows,
    LinesFile,
    ShardedFile,
    check,
    replacing,
)
from prefab.pipelines.store.fill import read_filled
from prefab.pipelines.store.run_page import run_page

if TYPE_CHECKING:
    import polars

SPLITS = ("train", "val", "test")
HUB_SPLIT = {
    "train": "train",
    "val": "validation",
    "test": "test",
}  # as `datasets` users expect them


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Which rows of a run are exported; `export` says what each field means."""

    truncated: bool = False
    pairs: datasets.PairSelection = datasets.ALL_PAIRS
    without: Sequence[str] = ()
    splits: Sequence[str] = ()
    judges: Sequence[str] = ()
    principles: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What a format makes its datasets from.

    Attributes:
        store: The folder of the store.
        record: The run's row of the table `runs`.
        options: Which rows are wanted.
        notes: Takes a line for each kind of row that is left out, with their number.
        query: Gives rows of the store, of the same state in each call: `query(sql, parameters)`.
    """

    store: Path
    record: dict[str, Any]
    options: ExportOptions
    notes: list[str]
    query: Read

    def parts(self) -> Iterator[dict[str, polars.DataFrame]]:
        """The datasets that TRL's trainers take, in parts that fit into memory.

        Raises: ConfigError as `datasets.dataset_parts`.
        """
        of = self.options
        return datasets.dataset_parts(
            self.query,
            self.record,
            self.notes,
            of.truncated,
            of.without,
            of.judges,
            of.principles,
            pairs=of.pairs,
        )


Rows = list[dict[str, Any]]
RowsFile = ShardedFile | LinesFile | CountedRows
Part = Mapping[str, "polars.DataFrame | Rows"]


class ExportFormat(Protocol):
    """A way to lay a run out as datasets.

    A format may also have `suffix` (`parquet`, the default, `jsonl` or `csv`) and
    `settings(files)`, which gives the text of files that stand beside the data by their name.
    """

    @property
    def by_split(self) -> bool:
        """Whether datasets with a column `split` (train, val, test) become one file a split."""

    def datasets(self, source: ExportSource) -> Part | Iterable[Part]:
        """The datasets by name (small letters and _), as frames or as lists of rows: all at once,
        or part by part, so that no more than one part is in memory. The parts of a dataset have the
        same columns.

        Raises: ConfigError for options that the format does not have.
        """


@one_connection()
def export(
    folder: str | Path,
    out: str | Path,
    format: str = "trl",
    run: str = "",
    truncated: bool = False,
    without: Sequence[str] = (),
    *,
    method: str = "",
    margin: float | None = None,
    per_prompt: int = 0,
    balance_length: bool = False,
    weights: datasets.Weights = "none",
    splits: Sequence[str] = (),
    judges: Sequence[str] = (),
    principles: Sequence[str] = (),
    dry_run: bool = False,
) -> ExportReport:
    """Write a run of a store as training data, with a dataset card.

    An earlier export in `out` is replaced once the new one is complete; other files are kept.

    Args:
        folder: The store.
        out: The output folder.
        format: One of the names in `registries.FORMATS` (docs/exports.md), or a format of another
            package.
        run: NAME or NAME@VERSION; default: the latest run that is not an import.
        truncated: Include answers that were cut off at the length limit.
        without: Rules of `prefab audit data`; pairs that they marked are left out.
        method: How decided comparisons become pairs: compared, best_worst, bradley_terry or
            davidson; empty: as the run's `choose` says.
        margin: p_chosen must be above a half by at least this; None: as the run's `choose` says.
        per_prompt: At most this many pairs of each prompt, by p_chosen; 0: all.
        balance_length: Leave pairs out until the chosen answer is as often the longer one as the
            rejected answer (`datasets.PairSelection`).
        weights: A column `weight`: one over the number of the prompt's pairs (prompt), or
            2 p_chosen - 1 (confidence).
        splits: Of train, val and test, those that are written; empty: all.
        judges: Preferences are decided by the verdicts of these judges alone; empty: all.
        principles: Likewise.
        dry_run: Write nothing: only count the rows, and keep one of each dataset as an example.

    Raises:
        ConfigError: The format or run does not exist, `out` holds a file in the way that no export
            wrote or lies within the store, a rule was not checked by an audit, the format has no
            place for what is asked for, or there is nothing to write.
    """
    folder, out = Path(folder), Path(out)
    if format not in FORMATS:
        raise ConfigError(
            f"there is no export format {format!r}; {did_you_mean(format, list(FORMATS))}"
        )
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(
            f"{out} is in the store {folder}, which holds Prefab's own files only. "
            "Choose a folder outside it"
        )
    pairs = datasets.PairSelection(method, margin, per_prompt, balance_length, weights)
    names = (tuple(some) for some in (without, splits, judges, principles))
    options = ExportOptions(truncated, pairs, *names)
    if wrong := [name for name in splits if name not in SPLITS]:
        raise ConfigError(f"{wrong[0]!r} is no split; there are: {', '.join(SPLITS)}")
    check(out, BESIDE)  # before the work of the page and of the rows
    writer: ExportFormat = FORMATS[format]
    record = find_run(folder, run)
    page = None if dry_run else run_page(folder, record, PAGE_EXAMPLES)

    def write(read: Read) -> ExportReport:
        report = ExportReport(f"{record['name']}@{record['version']}", format, out, dry_run)
        source = ExportSource(folder, record, options, report.notes, read)
        if page is None:
            _write_datasets(writer, source, None, report)
        else:
            with replacing(out, BESIDE) as stage:
                _write_datasets(writer, source, stage, report)
                write_beside(stage, page, record, report)
        return report

    return read_filled(folder, write)


def find_run(folder: Path, run: str = "") -> dict[str, Any]:
    """The run that NAME, NAME@VERSION or nothing (the last) stands for, as a row of the table
    `runs`.

    Raises: ConfigError with the runs there are.
    """
    from prefab.pipelines.store.fill import query

    return datasets.find_run(folder, partial(query, folder), run)


def _write_datasets(
    writer: ExportFormat, source: ExportSource, stage: Path | None, report: ExportReport
) -> None:
    """Write the files of all datasets into `stage`, or none without it; count the rows of each in
    the report.
    """
    suffix = getattr(writer, "suffix", "parquet")
    made = writer.datasets(source)
    files: dict[tuple[str, str], RowsFile] = {}
    try:
        for part in [made] if isinstance(made, Mapping) else made:
            for name, rows in part.items():
                for split, of_split in _splits(rows, writer.by_split, source.options.splits):
                    if len(of_split):
                        if (name, split) not in files:
                            files[name, split] = _file(stage, name, split, suffix)
                        _write(files[name, split], of_split)
                        if name not in report.examples:
                            report.examples[name] = _first(of_split)
    finally:
        for file in files.values():
            file.close()
    places = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in files))}
    order = list(HUB_SPLIT.values())
    for name, split in sorted(files, key=lambda key: (places[key[0]], order.index(key[1]))):
        file = files[name, split]
        report.counts.setdefault(name, {})[split] = file.rows
        report.files[f"{name}/{split}"] = file.finish()
    _check_report(report, source.options)
    if stage:
        _write_settings(writer, stage, report)


def _write_settings(writer: ExportFormat, stage: Path, report: ExportReport) -> None:
    """Write the files that the format has beside its data; scripts can be run."""
    settings = getattr(writer, "settings", None)
    for name, text in settings(report.files).items() if settings else ():
        (stage / name).write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            (stage / name).chmod(0o755)


def _check_report(report: ExportReport, options: ExportOptions) -> None:
    """Raises: ConfigError where nothing was written, or a column `weight` that was asked for is
    in no dataset.
    """
    if not report.counts:
        told = "; ".join(report.notes) or "no rows"
        raise ConfigError(f"{report.run} has nothing to export yet: {told}")
    weighted = any("weight" in row for row in report.examples.values())
    if options.pairs.weights != "none" and not weighted:
        raise ConfigError(
            f"this export in the format {report.format} has no pairs with a column for weights. The "
            "formats trl, jsonl, text and csv have one"
        )


def _file(stage: Path | None, name: str, split: str, suffix: str) -> RowsFile:
    if stage is None:
        return CountedRows(f"{name}/{split}.{suffix}")
    path = stage / name / split
    return ShardedFile(path) if suffix == "parquet" else LinesFile(path, suffix)


def _write(file: RowsFile, rows: polars.DataFrame | Rows) -> None:
    import polars as pl

    if isinstance(file, CountedRows):
        file.rows += len(rows)
    elif isinstance(file, ShardedFile):
        file.write(pl.DataFrame(rows, infer_schema_length=None) if isinstance(rows, list) else rows)
    else:
        file.write(rows if isinstance(rows, list) else rows.to_dicts())


def _first(rows: polars.DataFrame | Rows) -> dict[str, Any]:
    return rows[0] if isinstance(rows, list) else rows.row(0, named=True)


def _splits(
    rows: polars.DataFrame | Rows, by_split: bool, wanted: Sequence[str] = ()
) -> Iterator[tuple[str, polars.DataFrame | Rows]]:
    """Rows by split, or all of them as `train`. Lists of rows lose `split`, which the file says."""
    import polars as pl

    splits = [split for split in SPLITS if split in wanted or not wanted]
    if isinstance(rows, list):
        for split in splits if by_split else ():
            some = [row for row in rows if row["split"] == split]
            yield HUB_SPLIT[split], [{k: v for k, v in row.items() if k != "split"} for row in some]
    elif not by_split or "split" not in rows.columns:
        yield HUB_SPLIT["train"], rows
    else:
        for split in splits:
            yield HUB_SPLIT[split], rows.filter(pl.col("split") == split)
