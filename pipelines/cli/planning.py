"""Commands that show what a pipeline would ask before it asks it: plan, render and preview."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefab.factory.console import console, duration, say, table
from prefab.factory.numbers import counted
from prefab.factory.printable import printable
from prefab.pipelines.cli.options import (
    Json,
    Pipeline,
    Sets,
    hint_command,
    print_json,
    resumable,
)
from prefab.pipelines.cli.run_report import say_roles

if TYPE_CHECKING:
    from prefab.pipelines.run.dry_run import Row
    from prefab.pipelines.run.plan import Plan
    from prefab.pipelines.run.preview import Preview
    from prefab.pipelines.run.rendering import RenderedCall

app = typer.Typer()


@app.command()
def plan(
    pipeline: Pipeline,
    sets: Sets = [],
    sample: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Count so many prompts, chosen at random, and extrapolate; 0: count all. Default: "
            "all, or a sample where all would make more than 80,000 calls.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which model calls a run would make, which answers it would reuse, and why; each
    principle with its comparisons; tokens and time. No model is called.
    """
    from prefab.pipelines.run.plan import plan as make_plan

    with resumable("a plan changes nothing"):
        found = make_plan(pipeline, sets, sample, quiet=as_json)
    if as_json:
        return print_json(found.data())
    _show_plan(str(pipeline), found)
    _show_shards(pipeline, sets, found)
    hint_command("run", pipeline, *(word for text in sets for word in ("--set", text)))


def _read(found: Plan) -> str:
    every = found.read_one_in
    return f"about: one row in {every:,} was read, --sample 0 reads all; " if every > 1 else ""


def _show_shards(pipeline: Path, sets: list[str], found: Plan) -> None:
    """How a run over shards would be divided, where the pipeline has a section `scale`."""
    from prefab.pipelines.config.loader import resolve_pipeline
    from prefab.pipelines.scale.driver import SEGMENT_BYTES, number_of_shards

    loaded = resolve_pipeline(pipeline, sets)
    if (scale := loaded.config.scale) is not None and found.prompts:
        shards = scale.shards or number_of_shards(loaded, scale.workers or 2, found.prompts)
        size = found.ask * SEGMENT_BYTES / 1e6
        say(
            f"with --on or --shard: {shards:,} shards of about {found.ask / shards:,.0f} new calls; "
            f"about {size:,.1f} MB are published"
        )


def _show_plan(name: str, found: Plan) -> None:
    part = (
        f" ({_read(found)}{found.counted:,} of them counted, chosen at random; the rest is "
        "extrapolated)"
        if found.counted < found.prompts
        else ""
    )
    table(
        f"{name} · {counted(found.prompts, 'prompt')}{part}",
        ("stage", "principle", "judge", "reused", "ask", "at most", "new tokens"),
        _stages(found.rows),
        note="ask: calls as expected; at most: if every missing critique names a fault and no two "
        "drafts are equal; new tokens: at most"
        if found.ask
        else "",
    )
    for stage, reason, n in _reasons(found.rows):
        say(f"  {stage}: {counted(n, 'call')}: {reason}")
    if any(p.comparisons or p.ask or p.reused for p in found.principles):
        table(
            f"principles of {found.constitution} ({found.constitution_digest[:8]})",
            ("principle", "version", "comparisons", "reused", "ask", "note"),
            [
                (p.principle, p.digest[:8], p.comparisons, p.reused, p.ask, p.note)
                for p in found.principles
            ],
        )
    say_roles(found.roles)
    for line in _summary(found):
        say(line)


def _stages(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """One row for each kind of call; principles with the same reasons share a row."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.role, row.judge, tuple(row.why), bool(row.ask)), []).append(row)
    shown = []
    for (role, judge, _, _), same in groups.items():
        sums = [
            sum(getattr(row, name) for row in same)
            for name in ("reused", "ask", "at_most", "tokens_at_most")
        ]
        principle = same[0].principle if len(same) == 1 else f"{len(same)} principles"
        shown.append((role, principle, judge, *sums))
    return shown


def _reasons(rows: Sequence[Row]) -> list[tuple[str, str, int]]:
    """The reasons for new calls of each stage with their number."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for reason, n in row.why.items():
            counts[row.role, reason] = counts.get((row.role, reason), 0) + n
    return [(stage, reason, n) for (stage, reason), n in counts.items()]


def _summary(found: Plan) -> list[str]:
    """The plan's totals, and what is estimated."""
    about = "about " if found.estimated or found.counted < found.prompts else ""
    interval = (
        f" (95% interval {found.ask_low:,} to {found.ask_high:,})"
        if found.ask_low < found.ask_high
        else ""
    )
    most = f", at most {found.at_most:,}" if found.at_most > found.ask else ""
    lines = [
        f"{counted(found.reused, 'answer')} reused, {about}{counted(found.ask, 'new call')}{interval}{most}",
    ]
    if found.ask:
        lines.append(
            f"about {found.prompt_tokens:,} prompt tokens; about {found.completion_tokens:,} and "
            f"at most {found.tokens_at_most:,} new tokens"
        )
    if found.refused:
        lines.append(
            f"{counted(found.refused, 'call was', 'calls were')} refused by the server; `prefab run "
            "--retry-refused` asks again"
        )
    if found.seconds and found.ask:
        lines.append(f"about {duration(found.seconds)} at the speed of the store's last calls")
    if found.before and found.resumes:
        lines.append(f"continues {found.before}")
    elif found.before:
        lines += [f"changed since {found.before}: {change}" for change in found.changes]
        lines += [] if found.changes else [f"compared with {found.before}"]
    if found.estimated:
        lines.append(
            f"{found.estimated:,} of the calls depend on answers that do not exist yet: identical "
            "drafts are not compared, and the number of faults is extrapolated from the answers "
            "so far"
        )
    return lines


@app.command()
def render(
    template: Annotated[
        str,
        typer.Argument(
            metavar="TEMPLATE",
            help="A template's file name (pairwise.jinja), a stage (policy, critique, revise), or a "
            "judge's name.",
        ),
    ],
    pipeline: Pipeline = Path("pipeline.yaml"),
    sample: Annotated[
        int, typer.Option(min=1, help="Number of requests to show, each of another prompt.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of prompts.")] = 0,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """Show what a model is really asked: the messages of a template as the model's chat template
    writes them, control tokens marked, with their length in tokens. No model is called.
    """
    from prefab.pipelines.run.rendering import render_calls

    found = render_calls(template, pipeline, sample, sets, seed)
    if as_json:
        return print_json([call.data() for call in found])
    for call in found:
        _show_call(call)
    again = (word for text in sets for word in ("--set", text))
    hint_command("preview", pipeline, *again)


def _show_call(call: RenderedCall) -> None:
    """One request: what it is for, the text with control tokens marked, what is read."""
    about = ", ".join(
        part
        for part in (
            f"judge {call.judge}" if call.judge else "",
            f"principle {call.principle}" if call.principle else "",
            f"prompt {call.prompt[:12]}",
        )
        if part
    )
    say(about, f"{call.template or call.stage}:", "bold")
    if call.text is None:
        for role, content in call.messages:
            say("", f"[{role}]", "cyan")
            console().print(printable(content), markup=False, highlight=False, soft_wrap=True)
        say("the model's tokenizer is not on this machine, so its chat template is not shown")
    else:
        _show_marked(call.text, call.control_tokens)
    length = f"{call.tokens:,} tokens" if call.text is not None else f"about {call.tokens:,} tokens"
    read = f"reads {' '.join(map(repr, call.labels))}" if call.labels else "free text"
    state = "answered" if call.answered else "not asked yet"
    say(
        f"{length}; at most {call.max_tokens:,} new tokens at temperature {call.temperature:g}; "
        f"{read}; call {call.call[:12]}, {state}"
    )
    if call.waits:
        say("it shows answers that do not exist yet: (not written yet) stands for each")
    console().print("")


def _show_marked(text: str, control_tokens: list[str]) -> None:
    """A text whose control tokens are in reverse video; without colours, between brackets."""
    from rich.text import Text

    from prefab.pipelines.run.rendering import split_control

    plain = not console().is_terminal or console().no_color
    shown = Text()
    for part, control in split_control(text, control_tokens):
        words = printable(part)
        shown.append(f"[{words}]" if control and plain else words, "reverse" if control else "")
    console().print(shown, soft_wrap=True)


@app.command()
def preview(
    pipeline: Pipeline,
    prompts: Annotated[int, typer.Option("-n", "--prompts", min=1, help="How many prompts.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of prompts.")] = 0,
    sets: Sets = [],
    as_json: Json = False,
) -> None:
    """Run a few prompts into a store of their own (STORE/preview), and show every step: drafts,
    critiques, revisions, verdicts and preferences.
    """
    from prefab.pipelines.run.preview import preview as make_preview

    with resumable("the answers so far are kept"):
        found = make_preview(pipeline, prompts, sets, seed, quiet=as_json)
    if as_json:
        return print_json(found.data())
    _show_preview(found)
    hint_command("plan", pipeline, *(word for text in sets for word in ("--set", text)))


def _show_preview(found: Preview) -> None:
    from rich.text import Text
    from rich.tree import Tree

    for prompt in found.prompts:
        tree = Tree(Text.assemble((f"prompt {prompt.prompt[:12]}", "bold"), "\n", prompt.text))
        for step in prompt.steps:
            facts = ", ".join(
                f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in step.facts.items()
                if value is not None
            )
            line = Text.assemble((step.title, "bold"), f"  {facts}" if facts else "")
            tree.add(line.append(f"\n{step.text}" if step.text else ""))
        console().print(tree, soft_wrap=False, overflow="fold")
    say(
        f"{counted(len(found.prompts), 'prompt')} in {found.store}: {counted(found.reused, 'answer')} reused, "
        f"{found.asked:,} asked"
    )
    for reason, n in found.unscored.items():
        say(f"  {counted(n, 'answer')} could not be read: {reason}", "unscored", "yellow")
    if found.failed:
        say(f"{counted(found.failed, 'call')} failed; the same command asks again", "failed", "red")
