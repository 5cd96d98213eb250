"""Commands about labels: how far they can be trusted, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from prefab.factory.console import hint, table, warn
from prefab.factory.errors import ConfigError
from prefab.pipelines.cli.options import (
    Json,
    Pipeline,
    Sets,
    Store,
    existing_store,
    pipeline_path,
    print_json,
    resumable,
)

app = typer.Typer()
audit_app = typer.Typer(
    no_args_is_help=True, help="Gates: how a judge can be fooled, what is wrong with data."
)
eval_app = typer.Typer(
    no_args_is_help=True, help="A judge on a benchmark, a policy on held-out prompts."
)
app.add_typer(audit_app, name="audit")
app.add_typer(eval_app, name="eval")


@app.command()
def agreement(
    store: Store = Path("store"),
    run: Annotated[
        str, typer.Option(help="NAME or NAME@VERSION; left out: the run that ran last.")
    ] = "",
    principle: Annotated[list[str], typer.Option(help="Only this one; may be given again.")] = [],
    tag: Annotated[
        list[str],
        typer.Option(help="Only principles or prompts with this tag; may be given again."),
    ] = [],
    judge: Annotated[list[str], typer.Option(help="Only this one; may be given again.")] = [],
    gold: Annotated[
        str, typer.Option(help="auto, human, oracle (of the embedded world) or none.")
    ] = "auto",
    examples: Annotated[
        int, typer.Option(min=0, help="Comparisons shown of each of the worst principles.")
    ] = 2,
    resamples: Annotated[int, typer.Option(min=0, help="Of the bootstrap; 0: none.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """How far labels can be trusted: each judge, judges between themselves, the panel, and what
    divides them.
    """
    try:
        from prefab.pipelines.quality import agreement as statistics
    except ImportError as error:
        raise ConfigError(
            f"`prefab agreement` needs {error.name}: pip install -e '.[stats]'"
        ) from error
    from prefab.pipelines.quality.agreement_tables import show

    found = statistics.measure(
        existing_store(store),
        run,
        tuple(principle),
        tuple(judge),
        tuple(tag),
        gold,
        examples,
        resamples,
        seed,
    )
    if as_json:
        return print_json(found)
    show(found)
    worst = found["principles"][0]["name"]
    hint(
        f"prefab agreement --store {store} --run {found['run']} --principle {worst} --examples 10"
        if worst and not principle
        else f"prefab export --store {store} --run {found['run']} out"
    )


@app.command()
def label(
    store: Store = Path("store"),
    run: Annotated[
        str, typer.Option(help="NAME or NAME@VERSION; left out: the run that ran last.")
    ] = "",
    annotator: Annotated[
        str, typer.Option(help="Your name beside your labels; left out: your login.")
    ] = "",
    first: Annotated[
        str, typer.Option(help="unsure, divided or random: which comparisons come first.")
    ] = "unsure",
    principle: Annotated[
        list[str], typer.Option(help="Only under this one; may be given again.")
    ] = [],
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the order in which two answers are shown.")
    ] = 0,
    queue: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Write what is not labelled to a file."),
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Read such a file back, filled in.")
    ] = None,
    as_json: Json = False,
) -> None:
    """People label comparisons, blind to the judges: one key an answer, with undo; go on any time.
    Labels are gold.
    """
    import getpass

    from prefab.pipelines.quality import labeling as labelling

    if queue and answers:
        raise ConfigError("--queue writes a file and --answers reads one: give one of the two")
    if first not in labelling.FIRST:
        raise ConfigError(f"--first {first}: did you mean {', '.join(labelling.FIRST)}?")
    wanted = cast("labelling.First", first)
    again = f"prefab label --store {store}" + (f" --run {run}" if run else "")
    with labelling.open_session(
        existing_store(store), run, annotator or getpass.getuser(), wanted, seed, principle
    ) as session:
        if queue:
            report = labelling.write_queue(session, queue, limit)
        elif answers:
            report = labelling.read_answers(session, answers)
        else:
            report = labelling.terminal(session, limit)
    if as_json:
        return print_json(report.data())
    table(f"{report.run}, labelled by {report.annotator}", ("", ""), report.rows(bool(queue)))
    hint(
        f"{again} --answers {queue}"
        if queue
        else again
        if report.left
        else f"prefab agreement --store {store} --gold human"
    )


@app.command("import-preferences")
def import_preferences(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="TRL, HH-RLHF or UltraFeedback rows: .jsonl, .parquet."
        ),
    ],
    store: Store = Path("store"),
    name: Annotated[str, typer.Option(help="Of the run they become; left out: the file's.")] = "",
    by: Annotated[
        str, typer.Option(help="Who labelled them, such as people or gpt-4; it is kept with them.")
    ] = "",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out rows that cannot be read, and count them.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Pairs that others labelled, into a store with their origin, to train on beside a judge's
    own.
    """
    from dataclasses import asdict

    from prefab.pipelines.store.imports import import_files

    done = import_files(store, files, name, by, skip_bad)
    if as_json:
        return print_json({"store": str(store), "imported": [asdict(report) for report in done]})
    table(
        f"imported into {store}",
        ("file", "run", "format", "prompts", "pairs", "ties", "identical", "skipped", ""),
        [
            (
                r.file,
                r.run,
                r.format,
                r.prompts,
                r.pairs,
                r.ties,
                r.identical,
                r.skipped,
                "" if r.new else "was there already",
            )
            for r in done
        ],
    )
    hint(f"prefab export --store {store} --run {done[0].run} out")


@audit_app.command("judge")
def audit_judge(
    pipeline: Pipeline,
    judge: Annotated[
        str, typer.Option(metavar="NAME", help="One of panel.judges; left out: the first.")
    ] = "",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Pairs a probe.")] = 200,
    probe: Annotated[
        list[str], typer.Option(help="Only this probe; may be given again. Left out: all.")
    ] = [],
    max_flips: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit 1 where a probe flips a greater share.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Take the pairs from this store's decided preferences.")
    ] = None,
    run: Annotated[
        str,
        typer.Option(help="NAME or NAME@VERSION in that store; left out: the run that ran last."),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of pairs.")] = 0,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """How a judge can be fooled: minimal edits of losing answers that change nothing, and how many
    verdicts they flip.
    """
    from prefab.pipelines.config.loader import resolve_pipeline
    from prefab.pipelines.quality import judge_audit as audit

    loaded = resolve_pipeline(pipeline_path(pipeline), sets)
    with resumable():
        report = audit.audit(loaded, judge, n, store, run, probe, seed, quiet=as_json)
    if as_json:
        print_json(report.data())
    else:
        table(
            f"{report.judge}: how it can be fooled",
            audit.COLUMNS,
            audit.rows(report),
            note=audit.notes(report),
        )
        hint(f"prefab agreement --store {store or loaded.config.store}")
    raise typer.Exit(audit.print_report(report, max_flips, probe))


@audit_app.command("data")
def audit_data(
    store: Store = Path("store"),
    run: Annotated[
        str, typer.Option(help="NAME or NAME@VERSION; left out: the run that ran last.")
    ] = "",
    evaluation: Annotated[
        list[Path],
        typer.Option(
            "--eval",
            metavar="FILE",
            help="What you evaluate on, not to be trained on; may be given again.",
        ),
    ] = [],
    threshold: Annotated[
        list[str], typer.Option(metavar="RULE=VALUE", help="Another threshold; may be given again.")
    ] = [],
    examples: Annotated[int, typer.Option(min=0, help="Marked pairs shown of each rule.")] = 2,
    as_json: Json = False,
) -> None:
    """What is wrong with a run's pairs, rule by rule. Marks are kept in the store; exports leave
    them out when told to.
    """
    try:
        import numpy  # noqa: F401
        import rensa  # noqa: F401

        from prefab.pipelines.quality.data_audit import audit
    except ImportError as error:
        raise ConfigError(
            f"`prefab audit data` needs {error.name}: pip install -e '.[stats]'"
        ) from error
    found = audit(existing_store(store), run, evaluation, _thresholds(threshold), examples)
    if as_json:
        print_json(found.data())
        raise typer.Exit(1 if found.fails else 0)
    table(
        f"{found.run} in {store}: {found.pairs:,} pairs, {found.clean:,} of them without a mark",
        ("rule", "marked", "share", "threshold", "", "what, and where the threshold comes from"),
        [
            (
                f.rule.name,
                f.marks.height,
                f.share,
                f.threshold,
                "fails" if f.fails else "",
                f"{f.rule.what}: {f.rule.source}",
            )
            for f in found.findings
        ],
    )
    for finding in found.findings:
        for example in finding.examples:
            table(
                f"{finding.rule.name}: {example['detail']}",
                ("", ""),
                [row for row in example.items() if row[0] != "detail"],
            )
    for note in found.notes:
        warn(note)
    worst = ",".join(
        f.rule.name for f in found.findings if f.marks.height and f.rule.name != "unscored"
    )
    hint(
        f"prefab export --store {store} --run {found.run}{f' --without {worst}' if worst else ''} out"
    )
    raise typer.Exit(1 if found.fails else 0)


def _thresholds(texts: list[str]) -> dict[str, float]:
    """RULE=VALUE by rule. Raises: ConfigError for anything else."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f"--threshold {text}: write RULE=VALUE, such as low_margin=0.55"
            ) from None
    return found


@eval_app.command("judge")
def eval_judge(
    pipeline: Annotated[
        Path | None,
        typer.Argument(metavar="[PIPELINE.yaml]", help="Whose judge; not with --verdicts."),
    ] = None,
    benchmark: Annotated[
        str,
        typer.Option(help="rewardbench, rewardbench-2, judgebench, llmbar, mt-bench-human or hhh."),
    ] = "",
    data: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="The benchmark's local file; may be given again."),
    ] = [],
    judge: Annotated[
        str, typer.Option(metavar="NAME", help="One of panel.judges; left out: the first.")
    ] = "",
    principle: Annotated[
        str, typer.Option(help="One of the constitution's; left out: which is better overall.")
    ] = "",
    verdicts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Score these saved verdicts, without any model."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Keep the verdicts, for --verdicts.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Whose folder eval/ keeps the calls; left out: the pipeline's."),
    ] = None,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """A judge on a benchmark of judges, from a local file: the benchmark's own metric, and ours."""
    from prefab.pipelines.config.loader import resolve_pipeline
    from prefab.pipelines.quality import judge_benchmark as evaluation

    if not data or not benchmark:
        raise ConfigError("name the benchmark and its file: --benchmark NAME --data FILE")
    if (pipeline is None) == (verdicts is None):
        raise ConfigError(
            "name either a PIPELINE.yaml, whose judge is asked, or --verdicts FILE, which are scored as they are"
        )
    bench = evaluation.read_benchmark(benchmark, data)
    if verdicts is not None:
        found = evaluation.score_saved(bench, verdicts)
    else:
        assert pipeline is not None  # one of the two is given
        with resumable():
            found = evaluation.evaluate(
                resolve_pipeline(pipeline_path(pipeline), sets),
                bench,
                judge,
                principle,
                store,
                out,
                quiet=as_json,
            )
    if as_json:
        return print_json(found.data())
    title = f"{found.judge} on {benchmark}: {len(bench.items):,} items"
    table(title, evaluation.COLUMNS, evaluation.shown(found.report.own))
    table(
        "Ours",
        evaluation.COLUMNS,
        evaluation.shown(found.report.ours),
        note=", ".join(f"unscored, {reason}: {n:,}" for reason, n in found.report.unscored.items()),
    )
    for problem in found.problems[:5]:
        warn(str(problem))
    if found.problems:
        warn(f"{len(found.problems):,} rows could not be used, and are in no figure")
    for note in found.report.notes:
        warn(note)
    hint(f"prefab audit judge {pipeline}" if pipeline else "prefab eval judge --help")
