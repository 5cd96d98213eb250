"""`prefab check FILE` of data files: layout, what each column is taken for, rows that cannot be
kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer

from prefab.factory.console import say, table
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.extras import missing_package
from prefab.factory.numbers import counted
from prefab.factory.spec import data_files, layouts
from prefab.pipelines.cli.options import hint_command, print_json
from prefab.pipelines.config.prompts import Prompts
from prefab.pipelines.config.schema import PromptsConfig

SHOWN = 20  # problems that are printed; all are counted
UNUSED = "not read"
WHAT = {
    "pairs": "pairs to compare or to train on",
    "labelled": "single answers with a label",
    "demonstrations": "answers to learn from",
    "prompts": "prompts",
}


@dataclass(slots=True)
class DataReport:
    """What one data file holds: rows by layout and by kind, columns, and problems. Of a file with
    more than 200,000 rows one in `read_one_in` was read and counted.
    """

    file: str
    rows: int = 0
    read_one_in: int = 1
    bad: int = 0
    by_layout: dict[str, int] = field(default_factory=dict)
    by_kind: dict[str, int] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    shown: dict[str, str] = field(default_factory=dict)

    def add(self, record: layouts.Record, columns: Iterable[str]) -> None:
        """Count a row that can be kept. A column that some row uses is used."""
        kind = _kind(record)
        self.by_layout[record.layout] = self.by_layout.get(record.layout, 0) + 1
        self.by_kind[kind] = self.by_kind.get(kind, 0) + 1
        for name in columns:
            if self.columns.get(name, UNUSED) == UNUSED:
                self.columns[name] = record.columns.get(name, UNUSED)

    def refuse(self, number: int, line: int, error: ValueError) -> None:
        """Count a row that cannot be kept."""
        self.bad += 1
        if len(self.problems) < SHOWN:
            where = (self.file, line, 1 if line else 0, f"row {number}")
            self.problems.append(Problem(*where, str(error)))


def is_data(path: Path) -> bool:
    """Whether a path is a data file, or a folder of them."""
    if path.is_dir():
        saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
        return saved or any(file.suffix == ".parquet" for file in data_files.data_files(path))
    return data_files.suffix_of(path) in data_files.READERS


def check_data(paths: Sequence[Path], columns: Sequence[str], model: str, as_json: bool) -> None:
    """Print what data files hold. `model` (with --show): print the first row with its tokens.

    Raises: ConfigError with the rows that cannot be kept; with `as_json` they are printed, and the
        exit code is 2.
    """
    names = layouts.mapping(columns)
    reports = [read_report(path, names, model) for path in paths]
    problems = [problem for report in reports for problem in report.problems]
    if as_json:
        print_json(
            {
                "checked": [str(path) for path in paths],
                "files": [asdict(report) for report in reports],
                "problems": [str(problem) for problem in problems],
            }
        )
        raise typer.Exit(2 if problems else 0)
    for report in reports:
        _print(report)
    if problems:
        raise ConfigError(problems)
    kinds, file = reports[0].by_kind, paths[0]
    if "pairs" in kinds:
        hint_command("import-preferences", file)
    elif "demonstrations" in kinds:
        hint_command("train", "sft", "sft", "--set", f"data.sources=[{{files: {file}}}]")
    else:
        hint_command("plan", "rlaif-2023", "--set", f"prompts.source={file}")


def read_report(
    path: str | Path, names: Mapping[str, str] | None = None, model: str = ""
) -> DataReport:
    """Check a data file: its layout, what each column is taken for, and rows that cannot be kept.

    Args:
        path: A data file, or a folder of them.
        names: Columns to read under another name: `{"chosen": "good"}`.
        model: Also show the first row as a trainer of this model reads it.

    Raises:
        ConfigError: The file cannot be read at all.
    """
    path, names = Path(path), names or {}
    report = DataReport(str(path))
    report.read_one_in = data_files.stride(path)
    for number, line, value in data_files.rows(path, every=report.read_one_in):
        report.rows += 1
        try:
            if isinstance(value, ValueError):
                raise value
            record = layouts.parse(value, names)
            if model and not report.shown:
                report.shown = _preview(value, names, model)
        except ValueError as error:  # what a chat template refuses is a ValueError too
            report.refuse(number, line, error)
        else:
            row = layouts.rename(value, names) if isinstance(value, dict) else ["prompt"]
            report.add(record, row)
    if set(report.by_kind) == {"prompts"} and not names:
        _check_prompts(path, report)
    if not report.rows:
        report.problems.append(Problem(str(path), 0, 0, "", "holds no rows"))
    if report.bad > SHOWN:
        more = f"{report.bad:,} of {report.rows:,} rows cannot be kept"
        report.problems.append(Problem(str(path), 0, 0, "", more))
    return report


def _check_prompts(path: Path, report: DataReport) -> None:
    """Check the ids, tags and splits of prompts as a pipeline does."""
    prompts = Prompts(PromptsConfig(source=str(path.resolve()))).some()
    for _ in prompts:
        pass
    known = {(p.path, p.message) for p in report.problems}
    report.problems += [p for p in prompts.problems if (p.path, p.message) not in known]


def _preview(value: Any, names: Mapping[str, str], model: str) -> dict[str, str]:
    from prefab.trainers.preview import preview

    try:
        return preview(value, names, model)
    except ModuleNotFoundError as error:
        raise missing_package(error.name, "`prefab check --show`") from error


def _kind(record: layouts.Record) -> str:
    if record.pairs:
        return "pairs"
    if record.label is not None:
        return "labelled"
    return "demonstrations" if record.talk or record.answers else "prompts"


def _print(report: DataReport) -> None:
    kinds = ", ".join(f"{counted(n, 'row')} of {WHAT[kind]}" for kind, n in report.by_kind.items())
    if report.read_one_in > 1:
        kinds = f"of one row in {report.read_one_in:,} (the file is large): {kinds}"
    table(
        f"{report.file}: layout {' and '.join(report.by_layout) or 'unknown'}",
        ("column", "taken for"),
        list(report.columns.items()),
        f"{kinds}; {report.bad:,} of {report.rows:,} rows cannot be kept" if report.bad else kinds,
    )
    for name, text in report.shown.items():
        say(f"--- {name}")
        say(text)
