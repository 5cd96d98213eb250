"""Commands for people who edit constitutions: what an edit changes, tests, and why a preference is
as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefab.factory.console import (
    EXIT_FAILED,
    duration,
    fail,
    say,
)
from prefab.factory.errors import ConfigError
from prefab.factory.numbers import counted
from prefab.pipelines.cli.options import (
    STOPPED,
    Json,
    Sets,
    Store,
    existing_store,
    hint_command,
    print_json,
    resumable,
)

if TYPE_CHECKING:
    from prefab.pipelines.quality.constitution_tests import TestReport
    from prefab.pipelines.run.diff import Diff

app = typer.Typer()
Run = Annotated[
    str,
    typer.Option(help="The run with the comparisons, NAME or NAME@VERSION. Default: the latest."),
]
PipelineOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PIPELINE.yaml",
        help="Ask this pipeline's judges. Default: those of the run; for imported pairs "
        "pipeline.yaml beside the constitution.",
    ),
]


@app.command()
def diff(
    old: Annotated[
        str,
        typer.Argument(
            metavar="OLD",
            help="A constitution file, one in a git revision (HEAD~1:constitution.yaml), or a run.",
        ),
    ],
    new: Annotated[
        str,
        typer.Argument(
            metavar="[NEW]",
            help="The other version. Left out: OLD is the new one, compared with the constitution "
            "of the run.",
        ),
    ] = "",
    store: Store = Path("store"),
    run: Run = "",
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Judge the pairs of this file, in any layout of `import-preferences`; it is "
            "imported into the store.",
        ),
    ] = None,
    pipeline: PipelineOption = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Only so many comparisons, chosen at random.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of this choice.")] = 0,
    only: Annotated[
        str, typer.Option(metavar="flips", help="`flips`: show only the flipped preferences.")
    ] = "",
    examples: Annotated[int, typer.Option(min=0, help="Comparisons to show in full.")] = 10,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Also write a page that needs no other file."),
    ] = None,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """Compare two versions of a constitution: which preferences flip, and under which principles.
    Only questions that the edit changes are asked.
    """
    from prefab.pipelines.cli.diff_report import show_diff, write_diff
    from prefab.pipelines.run.diff import diff as compare

    if only not in ("", "flips"):
        raise ConfigError(f"--only {only}: did you mean flips?")
    with resumable():
        where = store if pairs else existing_store(store)
        found = compare(
            old, new, where, run, pipeline, sets, sample, seed, quiet=as_json, pairs=pairs
        )
    if html:
        write_diff(found, html, only)
    if as_json:
        return print_json(found.data(only))
    show_diff(found, only, examples)
    if found.moved:
        hint_command("why", found.moved[0].preference[:12], "--store", store)


@app.command()
def watch(
    file: Annotated[Path, typer.Argument(metavar="CONSTITUTION.yaml", help="A constitution file.")],
    store: Store = Path("store"),
    run: Run = "",
    pipeline: PipelineOption = None,
    sample: Annotated[int, typer.Option(min=1, help="Comparisons to judge at each save.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of comparisons.")] = 0,
    examples: Annotated[int, typer.Option(min=0, help="Moved comparisons to show.")] = 3,
    sets: Sets = [],
) -> None:
    """Judge the same comparisons again each time the constitution is saved, and show what moved
    since the last save and since the start. The model's server stays up. Ctrl-C ends it.
    """
    from prefab.pipelines.cli.diff_report import sentences, show_diff
    from prefab.pipelines.run.watch import watch as follow

    def show(last: Diff | None, start: Diff | None, seconds: float) -> None:
        if last is None or start is None:
            return say(f"the comparisons are judged ({duration(seconds)}): edit {file} and save it")
        say(f"since the last save ({duration(seconds)}):", "", "bold")
        show_diff(last, examples=examples)
        say(f"since the start: {sentences(start)[0]}")

    try:
        follow(file, existing_store(store), show, fail, run, pipeline, sets, sample, seed)
    except KeyboardInterrupt:
        raise typer.Exit(STOPPED) from None


@app.command("test")
def test_constitution(
    file: Annotated[Path, typer.Argument(metavar="CONSTITUTION.yaml", help="A constitution file.")],
    pipeline: Annotated[
        Path | None,
        typer.Option(
            metavar="PIPELINE.yaml",
            help="Whose judge is asked. Default: pipeline.yaml beside the constitution; the preset "
            "demo for the embedded world.",
        ),
    ] = None,
    judge: Annotated[
        str, typer.Option(metavar="NAME", help="One of panel.judges. Default: the first.")
    ] = "",
    principle: Annotated[
        list[str], typer.Option(help="Only tests of this principle; may be repeated.")
    ] = [],
    add: Annotated[
        str,
        typer.Option(
            metavar="PREFERENCE", help="Ask nothing: add this preference of the store as a test."
        ),
    ] = "",
    prefer: Annotated[
        str, typer.Option(help="With --add: the outcome to expect, a, b or tie.")
    ] = "",
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE.xml", help="Also write JUnit XML.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="The store. Default: the pipeline's, or `store`.")
    ] = None,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """Ask a constitution's own tests of a judge, in both orders. Exit code 1 when one fails."""
    from prefab.pipelines.quality import constitution_tests as tests

    if add:
        if len(principle) > 1:
            raise ConfigError("--add takes one --principle, or none")
        where = existing_store(store or Path("store"))
        added = tests.add_test(file, where, add, prefer, principle[0] if principle else "")
        if as_json:
            return print_json({"file": added.file, "number": added.number, "test": added.test})
        say(f"{file}: test {added.number} added, which expects {added.test['prefer']}")
        return hint_command("test", file, *(("--store", store) if store else ()))
    with resumable():
        report = tests.run_tests(file, pipeline, sets, judge, principle, store, quiet=as_json)
    if junit:
        junit.write_text(tests.junit(report), encoding="utf-8")
    if as_json:
        print_json(report.data())
    else:
        _show_tests(report)
    raise typer.Exit(EXIT_FAILED if report.failures else 0)


def _show_tests(report: TestReport) -> None:
    """Print each test with its state, and the answers of those that did not pass."""
    from prefab.pipelines.quality.constitution_tests import sentence

    colour = {"passed": "green", "failed": "red", "unstable": "yellow", "unscored": "red"}
    for result in report.results:
        about = f"{result.number}. {result.principle or 'all principles'}: {result.prompt}"
        say(about, f"{result.state:8}", colour[result.state])
        if result.state != "passed":
            say(f"           {sentence(result)}")
            say(f"           A: {result.a}")
            say(f"           B: {result.b}")
    passed = len(report.results) - len(report.failures)
    say(
        f"{passed} of {counted(len(report.results), 'test')} passed, asked of {report.judge} "
        f"({counted(report.reused, 'answer')} reused, {report.asked:,} asked)"
    )


@app.command()
def why(
    preference: Annotated[
        str, typer.Argument(metavar="PREFERENCE", help="A preference's id, or its beginning.")
    ],
    store: Store = Path("store"),
    run: Annotated[
        str, typer.Option(help="NAME or NAME@VERSION, where several runs share the preference.")
    ] = "",
    calls: Annotated[
        bool, typer.Option("--calls", help="Also print the messages of every model call.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write the tree as a page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how a preference came about: prompt, answers, each judge's verdicts under each
    principle, the rule that combined them, and the model calls.
    """
    from prefab.pipelines.cli.why_report import show_why, write_why
    from prefab.pipelines.quality.why import why as find

    found = find(existing_store(store), preference, run)
    if html:
        write_why(found, html)
    if as_json:
        return print_json(found.data())
    show_why(found, calls)
    hint_command("test", "CONSTITUTION.yaml", "--add", found.preference[:12], "--store", store)
