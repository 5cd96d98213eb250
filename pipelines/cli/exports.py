"""The command `prefab export`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prefab.factory.console import hint, say, table, warn
from prefab.factory.errors import ConfigError
from prefab.pipelines.cli.options import Json, existing_store, hint_command, print_json, resumable

if TYPE_CHECKING:
    from prefab.pipelines.config.schema import ExportConfig
    from prefab.pipelines.store.export.card import ExportReport

app = typer.Typer()


def _names(text: str | None, default: list[str] | None = None) -> list[str]:
    """The names in `a, b`; where the option was not given, the default."""
    if text is None:
        return default or []
    return [name.strip() for name in text.split(",") if name.strip()]


@app.command()
def export(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="PIPELINE.yaml|OUT",
            help="A pipeline file (its store, name and `export:` are the defaults), or the output "
            "folder. An earlier export in that folder is replaced; other files are kept.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="The output folder, after a pipeline file."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="The folder of the store. Default: the pipeline's, or `store`."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            help="The trainer that reads it: trl, axolotl, llama_factory, llama_factory_alpaca, nemo_rl, openrlhf, "
            "torchtune, verl, argilla; or jsonl, text, csv, parquet (docs/exports.md). Default: "
            "the pipeline's, or trl."
        ),
    ] = "",
    run: Annotated[
        str,
        typer.Option(help="NAME or NAME@VERSION. Default: the pipeline's, or the latest run."),
    ] = "",
    truncated: Annotated[
        bool | None,
        typer.Option(
            "--truncated/--no-truncated",
            help="Include answers that were cut off at the length limit.",
        ),
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(
            metavar="RULE,...",
            help="Leave out pairs that `prefab audit data` marked by these rules.",
        ),
    ] = None,
    method: Annotated[
        Literal["compared", "best_worst", "bradley_terry", "davidson"] | None,
        typer.Option(
            help="How decided comparisons become pairs. Default: the run's `choose.method`."
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.5,
            help="Only pairs whose p_chosen is above a half by this. Default: the run's "
            "`choose.margin`.",
        ),
    ] = None,
    per_prompt: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="At most this many pairs of each prompt, those with the highest p_chosen; 0: all.",
        ),
    ] = None,
    balance_length: Annotated[
        bool | None,
        typer.Option(
            "--balance-length/--no-balance-length",
            help="Leave pairs out until the chosen answer is as often the longer one as the "
            "rejected answer.",
        ),
    ] = None,
    weights: Annotated[
        Literal["none", "prompt", "confidence"] | None,
        typer.Option(
            help="A column `weight`: one over the number of the prompt's pairs (prompt), or "
            "2 p_chosen - 1 (confidence)."
        ),
    ] = None,
    splits: Annotated[
        str | None, typer.Option(metavar="SPLIT,...", help="Only these of train, val, test.")
    ] = None,
    judges: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Decide by the verdicts of these judges alone."),
    ] = None,
    principles: Annotated[
        str | None,
        typer.Option(metavar="ID,...", help="Decide by the verdicts on these principles alone."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Write nothing: print the counts, and one row of each dataset as the format has "
            "it.",
        ),
    ] = False,
    push_to_hub: Annotated[
        str,
        typer.Option(
            metavar="OWNER/NAME",
            help="Also upload the export to this dataset repository of the hub.",
        ),
    ] = "",
    private: Annotated[
        bool, typer.Option("--private/--public", help="Of a repository that --push-to-hub creates.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write training data from the store: preference, unpaired, prompt-only and SFT datasets, with
    a dataset card.
    """
    from prefab.pipelines.config.schema import ExportConfig, load_pipeline
    from prefab.pipelines.store.export.base import export as write

    default = ExportConfig()
    if target.suffix in (".yaml", ".yml"):
        pipeline, _ = load_pipeline(target)
        default, run = pipeline.export, run or pipeline.name
        store, out = store or Path(pipeline.store), out or Path(default.folder)
    elif out is not None:
        raise ConfigError(
            f"{target} is not a pipeline file (.yaml), so a second argument is not allowed"
        )
    if dry_run and push_to_hub:
        raise ConfigError("--dry-run writes nothing, so there is nothing for --push-to-hub")
    out = out or target
    options = _merged(default, truncated, per_prompt, balance_length, weights)
    with resumable(f"an earlier export in {out} is as it was"):
        report = write(
            existing_store(store or Path("store")),
            out,
            format or default.format,
            run,
            options.truncated,
            _names(without, default.without),
            method=method or "",
            margin=margin,
            per_prompt=options.per_prompt,
            balance_length=options.balance_length,
            weights=options.weights,
            splits=_names(splits, list(default.splits)),
            judges=_names(judges),
            principles=_names(principles),
            dry_run=dry_run,
        )
        if push_to_hub:
            from prefab.pipelines.store.export.hub import push_to_hub as push

            report.repository = push(out, push_to_hub, private)
    if as_json:
        return print_json(report.data())
    _show(report)


def _merged(
    default: ExportConfig,
    truncated: bool | None,
    per_prompt: int | None,
    balance_length: bool | None,
    weights: str | None,
) -> ExportConfig:
    """The pipeline's `export:` with the options that were given."""
    given = {
        "truncated": truncated,
        "per_prompt": per_prompt,
        "balance_length": balance_length,
        "weights": weights,
    }
    return default.model_copy(update={k: v for k, v in given.items() if v is not None})


def _show(report: ExportReport) -> None:
    """Print the counts, what was left out, examples after a dry run, and the next command."""
    from prefab.pipelines.store.export.card import shortened

    told = f"{report.run} as {report.format} " + (
        "would have" if report.dry_run else f"in {report.out}"
    )
    table(told, ("dataset", "split", "rows"), report.rows())
    for note in report.notes:
        warn(note)
    if report.dry_run:
        for name, row in report.examples.items():
            say(f"a row of {name}:")
            say(json.dumps(shortened(row), indent=1, ensure_ascii=False, default=str))
        return hint_command(*(word for word in sys.argv[1:] if word != "--dry-run"))
    if report.repository:
        say(f"pushed: {report.repository}")
    code = f"import datasets; print(datasets.load_dataset({str(report.out)!r}))"
    hint(shlex.join(["python", "-c", code]))
