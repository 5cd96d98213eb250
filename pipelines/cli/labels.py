"""Commands about labels: agreement, labelling by people, imports, audits and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from prefab.factory.console import EXIT_FAILED, say, table, warn
from prefab.factory.errors import ConfigError
from prefab.factory.numbers import counted
from prefab.pipelines.cli.options import (
    Json,
    Map,
    Pipeline,
    Sets,
    Store,
    existing_store,
    hint_command,
    print_json,
    resumable,
)

if TYPE_CHECKING:
    from prefab.pipelines.quality.data_audit import Audit

app = typer.Typer()
audit_app = typer.Typer(
    no_args_is_help=True,
    help="Check a judge for known biases, or preference data for known defects.",
)
eval_app = typer.Typer(
    no_args_is_help=True, help="Evaluate a judge on a benchmark, or policies on held-out prompts."
)
app.add_typer(audit_app, name="audit")
app.add_typer(eval_app, name="eval")


@app.command()
def calibrate(
    store: Store = Path("store"),
    run: Annotated[str, typer.Option(help="NAME or NAME@VERSION. Default: the latest run.")] = "",
    source: Annotated[
        str,
        typer.Option(
            help="What tells which answer is better: human, oracle (embedded world only, "
            "validation split), retest (the judges' own second answers), auto (the first of these "
            "that suffices), or none (p_chosen is the share of the vote)."
        ),
    ] = "auto",
    method: Annotated[str, typer.Option(help="auto, temperature or isotonic.")] = "auto",
    as_json: Json = False,
) -> None:
    """Choose how p_chosen becomes a probability; the end of each run does this with `auto`."""
    from prefab.pipelines.store.calibrate import calibrate as learn

    found = learn(existing_store(store), run, source, method)
    if as_json:
        print_json({"run": found.run, "source": found.source, **found.calibration.data()})
    else:
        say(found.sentence().replace("`", ""))
        hint_command("agreement", "--store", store, "--run", found.run)
    if not found.fitted and source != "none":
        raise typer.Exit(EXIT_FAILED)


@app.command()
def agreement(
    store: Store = Path("store"),
    run: Annotated[str, typer.Option(help="NAME or NAME@VERSION. Default: the latest run.")] = "",
    principle: Annotated[
        list[str], typer.Option(help="Only this principle; may be repeated.")
    ] = [],
    tag: Annotated[
        list[str],
        typer.Option(help="Only principles or prompts with this tag; may be repeated."),
    ] = [],
    judge: Annotated[list[str], typer.Option(help="Only this judge; may be repeated.")] = [],
    gold: Annotated[
        str, typer.Option(help="Gold labels: auto, human, oracle (embedded world only) or none.")
    ] = "auto",
    examples: Annotated[
        int, typer.Option(min=0, help="Examples to show for each of the worst principles.")
    ] = 2,
    resamples: Annotated[
        int, typer.Option(min=0, help="Bootstrap resamples for intervals; 0 for none.")
    ] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    sample: Annotated[
        int,
        typer.Option(
            min=0,
            help="Read about this many prompts, chosen at random, when the run has more; 0: all.",
        ),
    ] = 0,
    as_json: Json = False,
) -> None:
    """Measure how reliable the labels are: each judge, agreement between judges, the panel, and
    the comparisons on which judges disagree.
    """
    from prefab.pipelines.quality import agreement as statistics
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
        sample,
    )
    if as_json:
        return print_json(found)
    show(found)
    worst = found["principles"][0]["name"]
    source = ("--store", store, "--run", found["run"])
    if worst and not principle:
        hint_command("agreement", *source, "--principle", worst, "--examples", 10)
    else:
        hint_command("export", *source, "out")


@app.command()
def label(
    store: Store = Path("store"),
    run: Annotated[str, typer.Option(help="NAME or NAME@VERSION. Default: the latest run.")] = "",
    annotator: Annotated[
        str, typer.Option(help="Your name, stored with your labels. Default: your login name.")
    ] = "",
    first: Annotated[
        str, typer.Option(help="Which comparisons to show first: unsure, divided or random.")
    ] = "unsure",
    principle: Annotated[
        list[str], typer.Option(help="Only this principle; may be repeated.")
    ] = [],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Stop after this number of labels.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the order in which two answers are shown.")
    ] = 0,
    queue: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Write the comparisons without a label to a file."),
    ] = None,
    export: Annotated[
        tuple[str, Path] | None,
        typer.Option(
            metavar="FORMAT FILE.json",
            help="Write them for another program instead: argilla or label-studio.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            "--import",
            metavar="FILE",
            help="Read the labels from such a file, or from what Argilla or Label Studio exported.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Label comparisons yourself. Judges' verdicts are not shown; one key for each label, with
    undo. You can stop and continue at any time. These labels count as gold labels.
    """
    from prefab.pipelines.quality import label_files
    from prefab.pipelines.quality import labeling as labelling

    if sum(1 for given in (queue, export, answers) if given) > 1:
        raise ConfigError(
            "--queue and --export write a file and --answers reads one: give only one of them"
        )
    form, written = export or ("prefab", queue)
    if first not in labelling.FIRST:
        raise ConfigError(f"--first {first}: did you mean {', '.join(labelling.FIRST)}?")
    wanted = cast("labelling.First", first)
    by = ("--annotator", annotator) if annotator else ()
    again = ("label", "--store", store, *(("--run", run) if run else ()), *by)
    with labelling.open_session(
        existing_store(store), run, annotator, wanted, seed, principle
    ) as session:
        if written:
            report = label_files.write_queue(session, written, limit, form)
        elif answers:
            report = label_files.read_answers(session, answers)
        else:
            report = labelling.terminal(session, limit)
    if as_json:
        return print_json(report.data())
    table(f"{report.run}, labelled by {report.annotator}", ("", ""), report.rows(bool(written)))
    if written:
        hint_command(*again, "--answers", written)
    else:
        done = ("agreement", "--store", store, "--gold", "human")
        hint_command(*(again if report.left else done))


@app.command("import-preferences")
def import_preferences(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Files or folders with pairs in any layout that `prefab check FILE` names.",
        ),
    ],
    store: Store = Path("store"),
    name: Annotated[str, typer.Option(help="Name of the new run. Default: the file's name.")] = "",
    by: Annotated[
        str,
        typer.Option(help="Who labelled the pairs, for example people or gpt-4. Stored with them."),
    ] = "",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip rows that cannot be read, and count them.")
    ] = False,
    columns: Map = [],
    as_json: Json = False,
) -> None:
    """Import pairs that others labelled into a store, with their origin, to train on them together
    with a judge's pairs.
    """
    from dataclasses import asdict

    from prefab.factory.spec import layouts
    from prefab.pipelines.store.imports import import_files

    done = import_files(store, files, name, by, skip_bad, layouts.mapping(columns))
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
                "" if r.new else "already imported",
            )
            for r in done
        ],
    )
    hint_command("export", "--store", store, "--run", done[0].run, "out")


@audit_app.command("judge")
def audit_judge(
    pipeline: Pipeline,
    judge: Annotated[
        str, typer.Option(metavar="NAME", help="One of panel.judges. Default: the first.")
    ] = "",
    n: Annotated[
        int, typer.Option("--n", "-n", min=1, help="Number of pairs for each probe.")
    ] = 200,
    probe: Annotated[
        list[str], typer.Option(help="Only this probe; may be repeated. Default: all.")
    ] = [],
    max_flips: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Exit with code 1 when a probe flips a larger share of verdicts than this (0 to 1).",
        ),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Take the pairs from the decided preferences of this store.")
    ] = None,
    run: Annotated[
        str,
        typer.Option(help="NAME or NAME@VERSION in that store. Default: the latest run."),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of pairs.")] = 0,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """Test a judge for known biases: edit losing answers in ways that should not matter, and count
    how many verdicts flip.
    """
    from prefab.pipelines.config.loader import resolve_pipeline
    from prefab.pipelines.quality import judge_audit as audit

    loaded = resolve_pipeline(pipeline, sets)
    with resumable():
        report = audit.audit(loaded, judge, n, store, run, probe, seed, quiet=as_json)
    if as_json:
        print_json(report.data())
    else:
        table(
            f"{report.judge}: verdicts flipped by edits that should not matter",
            audit.COLUMNS,
            audit.rows(report),
            note=audit.notes(report),
        )
        for line in report.own_answers:
            warn(line)
        hint_command("agreement", "--store", store or loaded.config.store)
    raise typer.Exit(audit.print_report(report, max_flips, probe))


@audit_app.command("data")
def audit_data(
    store: Store = Path("store"),
    run: Annotated[str, typer.Option(help="NAME or NAME@VERSION. Default: the latest run.")] = "",
    evaluation: Annotated[
        list[Path],
        typer.Option(
            "--eval",
            metavar="FILE",
            help="A file of evaluation texts that must not be in training data; may be repeated.",
        ),
    ] = [],
    threshold: Annotated[
        list[str], typer.Option(metavar="RULE=VALUE", help="Change a threshold; may be repeated.")
    ] = [],
    examples: Annotated[int, typer.Option(min=0, help="Examples to show for each rule.")] = 2,
    as_json: Json = False,
) -> None:
    """Check a run's pairs with eleven rules. Marks are stored; `prefab export --without RULE`
    leaves marked pairs out.
    """
    import rensa  # noqa: F401  before the work that needs it

    from prefab.pipelines.quality.data_audit import audit

    found = audit(existing_store(store), run, evaluation, _thresholds(threshold), examples)
    if as_json:
        print_json(found.data())
    else:
        _show_data_audit(found, store)
    raise typer.Exit(1 if found.fails else 0)


def _show_data_audit(found: Audit, store: Path) -> None:
    """Print the table of rules, examples of marked pairs, notes and the next command."""
    table(
        f"{found.run} in {store}: {counted(found.pairs, 'pair')}, {found.clean:,} of them without a mark",
        ("rule", "marked", "share", "threshold", "", "meaning, and source of the threshold"),
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
            rows = [row for row in example.items() if row[0] != "detail"]
            table(f"{finding.rule.name}: {example['detail']}", ("", ""), rows)
    for note in found.notes:
        warn(note)
    marked = [f.rule.name for f in found.findings if f.marks.height and f.rule.name != "unscored"]
    without = ("--without", ",".join(marked)) if marked else ()
    hint_command("export", "--store", store, "--run", found.run, *without, "out")


def _thresholds(texts: list[str]) -> dict[str, float]:
    """The thresholds of RULE=VALUE texts, by rule.

    Raises:
        ConfigError: A text has another form.
    """
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ConfigError(
                f"--threshold {text}: write RULE=VALUE, for example low_margin=0.55"
            ) from None
    return found


@eval_app.command("judge")
def eval_judge(
    pipeline: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PIPELINE.yaml]", help="The pipeline of the judge. Not with --verdicts."
        ),
    ] = None,
    benchmark: Annotated[
        str,
        typer.Option(help="rewardbench, rewardbench-2, judgebench, llmbar, mt-bench-human or hhh."),
    ] = "",
    data: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="A local file of the benchmark; may be repeated."),
    ] = [],
    judge: Annotated[
        str, typer.Option(metavar="NAME", help="One of panel.judges. Default: the first.")
    ] = "",
    principle: Annotated[
        str,
        typer.Option(
            help="A principle of the constitution. Default: which answer is better overall."
        ),
    ] = "",
    verdicts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Score saved verdicts instead; no model is called."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Save the verdicts, for --verdicts.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="The store whose folder eval/ keeps the calls. Default: the pipeline's."),
    ] = None,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """Evaluate a judge on a benchmark from local files, with the benchmark's own metric and
    ours.
    """
    from prefab.pipelines.config.loader import resolve_pipeline
    from prefab.pipelines.quality import judge_benchmark as evaluation

    if not data or not benchmark:
        raise ConfigError("--benchmark NAME and --data FILE are both needed")
    if (pipeline is None) == (verdicts is None):
        raise ConfigError(
            "give either a PIPELINE.yaml, whose judge is called, or --verdicts FILE with saved verdicts"
        )
    bench = evaluation.read_benchmark(benchmark, data)
    if verdicts is not None:
        found = evaluation.score_saved(bench, verdicts)
    else:
        assert pipeline is not None  # one of the two is given
        with resumable():
            found = evaluation.evaluate(
                resolve_pipeline(pipeline, sets),
                bench,
                judge,
                principle,
                store,
                out,
                quiet=as_json,
            )
    if as_json:
        return print_json(found.data())
    title = f"{found.judge} on {benchmark}: {counted(len(bench.items), 'item')}"
    table(title, evaluation.COLUMNS, evaluation.shown(found.report.own))
    table(
        "Our metrics",
        evaluation.COLUMNS,
        evaluation.shown(found.report.ours),
        note=", ".join(f"unscored, {reason}: {n:,}" for reason, n in found.report.unscored.items()),
    )
    for problem in found.problems[:5]:
        warn(str(problem))
    if found.problems:
        warn(
            f"{counted(len(found.problems), 'row')} could not be used, and no figure counts such rows"
        )
    for note in found.report.notes:
        warn(note)
    hint_command(*(("audit", "judge", pipeline) if pipeline else ("eval", "judge", "--help")))
