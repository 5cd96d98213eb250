"""Commands that show what a pipeline would ask before it asks it: plan, render and preview."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefab.factory.console import duration, say, table
from prefab.pipelines.cli.options import (
    Json,
    Pipeline,
    Sets,
    hint_command,
    print_json,
    resumable,
)

if TYPE_CHECKING:
    from prefab.pipelines.run.dry_run import Row
    from prefab.pipelines.run.plan import Plan

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
    hint_command("run", pipeline, *(word for text in sets for word in ("--set", text)))


def _show_plan(name: str, found: Plan) -> None:
    counted = (
        f" ({found.counted:,} of them counted, chosen at random; the rest is extrapolated)"
        if found.counted < found.prompts
        else ""
    )
    table(
        f"{name} · {found.prompts:,} prompts{counted}",
        ("stage", "principle", "judge", "reused", "ask", "at most", "new tokens"),
        _stages(found.rows),
        note="ask: calls as expected; at most: if every missing critique names a fault and no two "
        "drafts are equal; new tokens: at most"
        if found.ask
        else "",
    )
    for stage, reason, n in _reasons(found.rows):
        say(f"  {stage}: {n:,} calls: {reason}")
    if any(p.comparisons or p.ask or p.reused for p in found.principles):
        table(
            "principles",
            ("principle", "comparisons", "reused", "ask", "note"),
            [(p.principle, p.comparisons, p.reused, p.ask, p.note) for p in found.principles],
        )
    for role in found.roles:
        say(f"  {role.role}: {role.model or role.engine}{f' ({role.note})' if role.note else ''}")
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
        f"{found.reused:,} answers reused, {about}{found.ask:,} new calls{interval}{most}",
    ]
    if found.ask:
        lines.append(
            f"about {found.prompt_tokens:,} prompt tokens; about {found.completion_tokens:,} and "
            f"at most {found.tokens_at_most:,} new tokens"
        )
    if found.refused:
        lines.append(
            f"{found.refused:,} calls were refused by the server; `prefab run --retry-refused` "
            "asks them again"
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
