"""Exports: one run of a store as Parquet files with a dataset card, in one of several formats.

A format is one file in this folder that keeps the protocol `ExportFormat`; it is named in
`pipelines/config/registries.py`, or in another package's entry points (`prefab.exports`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prefab.factory.errors import ConfigError
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.store import datasets
from prefab.pipelines.config.registries import FORMATS
from prefab.pipelines.store.calibrations import NOT_LEARNED, calibration_of
from prefab.pipelines.store.export.files import replacing

if TYPE_CHECKING:
    import polars

SPLITS = ("train", "val", "test")
HUB_SPLIT = {
    "train": "train",
    "val": "validation",
    "test": "test",
}  # as `datasets` users expect them
CARD = "README.md"


@dataclass(frozen=True, slots=True)
class ExportSource:
    """What a format makes its datasets from.

    `record` is the run's row of the table `runs`; `without` are rules of `prefab audit data`, whose
    marked rows are left out; with `truncated`, answers that were cut off by length are kept. Every
    row that a format leaves out is counted in a line of `notes`.
    """

    store: Path
    record: dict[str, Any]
    truncated: bool
    without: Sequence[str]
    notes: list[str]

    def query(self, sql: str, parameters: Any = None) -> polars.DataFrame:
        """Rows of the store, caught up with its ledger."""
        from prefab.pipelines.store.fill import query

        return query(self.store, sql, parameters)


class ExportFormat(Protocol):
    """A way to lay a run out as datasets."""

    @property
    def by_split(self) -> bool:
        """Whether datasets with a column `split` (train, val, test) become one file a split."""

    def datasets(self, source: ExportSource) -> dict[str, polars.DataFrame]:
        """The datasets by name (small letters and _).

        Raises: ConfigError for options that the format does not have.
        """


@dataclass(slots=True)
class ExportReport:
    """What was written: rows by dataset and split, and what was left out and why."""

    run: str
    format: str
    out: Path
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str, int]]:
        """One row a file."""
        return [
            (name, split, n) for name, splits in self.counts.items() for split, n in splits.items()
        ]

    def first(self) -> str:
        """A dataset that there is."""
        return next(iter(self.counts), "")

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "out": str(self.out)}


def export(
    folder: str | Path,
    out: str | Path,
    format: str = "trl",
    run: str = "",
    truncated: bool = False,
    without: Sequence[str] = (),
) -> ExportReport:
    """Write a run of a store as training data, with a dataset card.

    An earlier export in `out` is replaced once the new one is complete; other files are kept.

    Args:
        folder: The store.
        out: The output folder.
        format: `trl` or `parquet`, or a format of another package.
        run: NAME or NAME@VERSION; default: the latest run that is not an import.
        truncated: Include answers that were cut off at the length limit.
        without: Rules of `prefab audit data`; pairs that they marked are left out.

    Raises:
        ConfigError: The format or run does not exist, `out` holds a file in the way that no export
            wrote or lies within the store, a rule was not checked by an audit, or there is nothing
            to write.
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
    record = find_run(folder, run)
    report = ExportReport(f"{record['name']}@{record['version']}", format, out)
    writer: ExportFormat = FORMATS[format]
    frames = writer.datasets(ExportSource(folder, record, truncated, without, report.notes))
    files = {
        file: part
        for name, frame in frames.items()
        for file, part in _parts(name, frame, writer.by_split, report)
    }
    if not files:
        raise ConfigError(
            f"{report.run} has nothing to export yet: {'; '.join(report.notes) or 'no rows'}"
        )
    with replacing(out, [*files, CARD]) as stage:
        for file, part in files.items():
            part.write_parquet(stage / file)
        (stage / CARD).write_text(_card(record, report, folder), encoding="utf-8")
    return report


def find_run(folder: Path, run: str = "") -> dict[str, Any]:
    """The run that NAME, NAME@VERSION or nothing (the last) stands for, as a row of the table
    `runs`.

    Raises: ConfigError with the runs there are.
    """
    from prefab.pipelines.store.fill import query

    return datasets.find_run(folder, partial(query, folder), run)


def _parts(
    name: str, frame: polars.DataFrame, by_split: bool, report: ExportReport
) -> Iterator[tuple[str, polars.DataFrame]]:
    """A file's path and its rows: one file a split, or all rows as `train`."""
    import polars as pl

    parts = {"train": frame}
    if by_split and "split" in frame.columns:
        parts = {split: frame.filter(pl.col("split") == split) for split in SPLITS}
    for split, part in parts.items():
        if not part.is_empty():
            report.counts.setdefault(name, {})[HUB_SPLIT[split]] = part.height
            yield f"{name}/{HUB_SPLIT[split]}.parquet", part


_WHAT = {
    "preference": "decided pairs (DPO, reward models): `prompt`, `chosen`, `rejected`, `p_chosen`; `method` chose the pair",
    "unpaired": "single answers with a thumb up or down (KTO): `prompt`, `completion`, `label`, `p_win`",
    "prompts": "prompts alone (GRPO, PPO): `prompt`",
    "sft": "demonstrations (SFT): `prompt`, `completion`; `revised` says whether the text was rewritten",
}


def _card(record: dict[str, Any], report: ExportReport, folder: Path) -> str:
    """A dataset card: the configurations that `datasets` reads, then what a person should know."""
    from prefab.pipelines.store.fill import query

    config = json.loads(record["config"])
    principles = query(
        folder,
        "SELECT principle, title, digest FROM principles WHERE constitution = ? AND enabled "
        "ORDER BY position",
        [record["constitution"] or ""],
    )
    models = query(folder, "SELECT model, name FROM models")
    named = config.get("constitution")
    names = "`, `".join(named) if isinstance(named, list) else named
    learned = calibration_of(folder, record["run"])
    lines = ["---", "configs:"]
    for name, splits in report.counts.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [
            line
            for split in splits
            for line in (f"  - split: {split}", f"    path: {name}/{split}.parquet")
        ]
    made = (
        f"Made by Prefab's recipe `{record['recipe']}` under the constitution "
        f"`{names}`. The answers, critiques and judgments are a model's, "
        "not people's."
        if not config.get("origin")
        else "Made elsewhere, and imported by Prefab: a line below says from what file."
    )
    lines += [
        "tags: [prefab, rlaif, preference]",
        "---",
        "",
        f"# {report.run}",
        "",
        made,
        "",
        "| dataset | split | rows |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {split} | {n:,} |" for name, split, n in report.rows()]
    lines += [
        "",
        *(f"- `{name}`: {_WHAT.get(name, 'a table of the store')}" for name in report.counts),
        "",
    ]
    lines += [
        "```python",
        "from datasets import load_dataset",
        f'data = load_dataset("{report.out.name}", "{report.first()}", split="train")',
        "```",
        "",
        learned.sentence() if learned else NOT_LEARNED,
        "",
        "`prompt_id`, `preference`, `chosen_sample`, `rejected_sample`, `sample` and `run` lead "
        "back to the store. Rows that share a group never stand in two splits.",
        "",
    ]
    lines += [f"- {note}" for note in report.notes]
    lines += [
        "",
        "Models in the store: " + ", ".join(f"`{name}`" for _, name in models.iter_rows()),
        "",
        "| principle | title | digest |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {title} | {digest[:12]} |" for name, title, digest in principles.iter_rows()
    ]
    return "\n".join(lines) + "\n"
