"""Commands for people who edit constitutions: what an edit changes, tests, and why a preference is
as it is.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefab.factory.console import (
    EXIT_FAILED,
    PrintableConsole,
    console,
    duration,
    fail,
    say,
    table,
)
from prefab.factory.errors import ConfigError
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
    from rich.tree import Tree

    from prefab.pipelines.quality.constitution_tests import TestReport
    from prefab.pipelines.quality.why import Node
    from prefab.pipelines.run.diff import Diff, Moved

app = typer.Typer()
Run = Annotated[
    str,
    typer.Option(help="The run with the comparisons, NAME or NAME@VERSION. Default: the latest."),
]
PipelineOption = Annotated[
    Path | None,
    typer.Option(
        metavar="PIPELINE.yaml", help="Ask this pipeline's judges. Default: those of the run."
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
    pipeline: PipelineOption = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Only so many comparisons, chosen at random.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that choice.")] = 0,
    only: Annotated[
        str, typer.Option(metavar="flips", help="`flips`: show only the flipped preferences.")
    ] = "",
    examples: Annotated[int, typer.Option(min=0, help="Comparisons to show in full.")] = 10,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """Compare two versions of a constitution: which preferences flip, and under which principles.
    Only questions that the edit changes are asked.
    """
    from prefab.pipelines.run.diff import diff as compare

    if only not in ("", "flips"):
        raise ConfigError(f"--only {only}: did you mean flips?")
    with resumable():
        found = compare(
            old, new, existing_store(store), run, pipeline, sets, sample, seed, quiet=as_json
        )
    if as_json:
        return print_json(found.data())
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
    seed: Annotated[int, typer.Option(min=0, help="Seed of their choice.")] = 0,
    examples: Annotated[int, typer.Option(min=0, help="Moved comparisons to show.")] = 3,
    sets: Sets = [],
) -> None:
    """Judge the same comparisons again each time the constitution is saved, and show what moved
    since the last save and since the start. The model's server stays up. Ctrl-C ends it.
    """
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
        return hint_command("test", file)
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
        f"{passed} of {len(report.results)} tests passed, asked of {report.judge} "
        f"({report.reused:,} answers reused, {report.asked:,} asked)"
    )


def show_diff(found: Diff, only: str = "", examples: int = 10) -> None:
    """Print the difference of two versions."""
    title = f"{found.old.name} ({found.old.digest}) -> {found.new.name} ({found.new.digest})"
    if not only:
        for change in found.changes or ["no principle changed its meaning"]:
            say(f"  {change}")
        lines = [line for line in found.principles if line.why or line.mean_move or line.only_new]
        table(
            title,
            ("principle", "compared", "moved", "flipped", "mean move"),
            [(p.principle, p.compared, p.moved, p.flips, p.mean_move) for p in lines],
            note="moved: P(a) by more than .05; mean move: of P(a)" if lines else "nothing moved",
        )
    for line in sentences(found):
        say(line)
    shown = (found.flips if only else found.moved)[:examples]
    for number, one in enumerate(shown, 1):
        _show_moved(number, one)
    left = len(found.flips if only else found.moved) - len(shown)
    if left:
        say(f"{left:,} more; --examples N shows more, --json all")


def sentences(found: Diff) -> list[str]:
    """What a person should know first."""
    n, flips = found.comparisons, len(found.flips)
    other = sum(one.changed for one in found.moved) - flips
    asked = sum(side.asked for side in (found.old, found.new))
    reused = sum(side.reused for side in (found.old, found.new))
    lines = [
        f"{flips:,} of {n:,} preferences flip{_interval(found.flip_rate)}; {other:,} more change "
        "between a winner, a tie and unscored",
        f"agreement between the versions: alpha {_value(found.alpha)}, AC1 {_value(found.ac1)}",
    ]
    if asked or reused:
        lines.append(f"{reused:,} answers reused, {asked:,} asked")
    failed = found.old.failed + found.new.failed
    if failed:
        lines.append(
            f"{failed:,} calls failed, so some comparisons are left out; the same command asks again"
        )
    return lines


def _interval(share: Any) -> str:
    if share.value is None:
        return ""
    if share.low is None:
        return f" ({share.value:.1%})"
    return f" ({share.value:.1%}, 95% interval {share.low:.1%} to {share.high:.1%})"


def _value(estimate: Any) -> str:
    if estimate.value is None:
        return f"undefined ({estimate.undefined})"
    if estimate.low is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _probability(p: float | None) -> str:
    return "none" if p is None else f"{p:.2f}"


def _show_moved(number: int, one: Moved) -> None:
    """One comparison in full: the prompt, both answers side by side, and what moved."""
    from rich import box
    from rich.table import Table

    outcome = {"a": "A wins", "b": "B wins", "tie": "tie", "unscored": "unscored"}
    console().print("")
    say(f"{one.text}", f"{number}. {one.prompt}", "bold")
    view = Table(box=box.SIMPLE_HEAD, expand=True, show_edge=False)
    for name, side in (("A", "a"), ("B", "b")):
        mark = " (preferred before)" if one.old == side else ""
        mark += " (preferred now)" if one.new == side else ""
        style = "green" if one.new == side else "red" if one.old == side else ""
        view.add_column(name + mark, ratio=1, header_style=style, overflow="fold")
    view.add_row(one.answer_a, one.answer_b)
    console().print(view)
    say(
        f"  {outcome[one.old]}, P(A) {_probability(one.p_old)} -> "
        f"{outcome[one.new]}, P(A) {_probability(one.p_new)}"
    )
    for name, was, now in one.principles[:5]:
        say(f"    {name}: P(A) {_probability(was)} -> {_probability(now)}")


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
    from prefab.pipelines.quality.why import why as find

    found = find(existing_store(store), preference, run)
    if html:
        _write_page(_tree(found.root, calls=True), html)
    if as_json:
        return print_json(found.data())
    console().print(_tree(found.root, calls), soft_wrap=False, overflow="fold")
    hint_command("test", "CONSTITUTION.yaml", "--add", found.preference[:12], "--store", store)


def _tree(node: Node, calls: bool) -> Tree:
    """A node and all below it, for the terminal."""
    from rich.text import Text
    from rich.tree import Tree

    def line(node: Node) -> Text:
        facts = ", ".join(
            f"{name} {_fact(value)}" for name, value in node.facts.items() if value is not None
        )
        text = Text.assemble((node.title, "bold"), f"  {facts}" if facts else "")
        if node.text:
            text.append("\n" + node.text, "dim" if node.facts.get("finish") is None else "")
        if calls and node.call:
            call = node.call
            sampling = ", ".join(f"{name} {value}" for name, value in call.sampling.items())
            text.append(f"\ncall {call.key[:12]} of {call.model}: {sampling}", "cyan")
            for role, content in call.messages:
                text.append(f"\n{role}:", "cyan")
                text.append("\n" + content)
        return text

    def grow(tree: Tree, node: Node) -> None:
        for below in node.below:
            grow(tree.add(line(below)), below)

    tree = Tree(line(node))
    grow(tree, node)
    return tree


def _fact(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _write_page(shown: Any, path: Path) -> None:
    """What the terminal shows, as a page of its own that needs no other file."""
    page = PrintableConsole(record=True, width=110, file=io.StringIO())
    page.print(shown)
    page.save_html(str(path))
