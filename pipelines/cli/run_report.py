"""Print what a run did and the command to type next."""

from __future__ import annotations

from typing import Any

from prefab.factory.console import duration, fail, hint, table, warn
from prefab.factory.errors import BudgetError
from prefab.pipelines.cli.options import STOPPED


def report(result: Any) -> None:
    """Print what a run did."""
    tokens = result.prompt_tokens + result.completion_tokens
    rate = result.asked / result.seconds if result.seconds else 0.0
    rows = [
        ("prompts", result.prompts),
        ("model calls", result.asked),
        ("answers reused", result.reused),
        ("calls a second", round(rate)),
        ("tokens", tokens),
        ("unscored", sum(result.unscored.values())),
        ("failed calls", result.failed),
        ("drafts cut off at the length limit", result.truncated),
        ("identical answers, not compared", result.identical),
        ("malformed prompt rows", result.malformed),
        *_escalated(result),
    ]
    rows = [
        row for row in rows if row[1] or row[0] in ("model calls", "answers reused", "unscored")
    ]
    table(
        f"{result.name}@{result.version} in {result.store} · {duration(result.seconds)}",
        ("", ""),
        rows,
        note=", ".join(f"{what}: {n:,}" for what, n in result.unscored.items()),
    )


def _escalated(result: Any) -> list[tuple[str, int]]:
    """How many comparisons went to the stronger judges, and what all of them would have cost."""
    told = result.escalation
    reasons = [f"{why} {told[why]:,}" for why in ("unsure", "divided", "unscored") if told.get(why)]
    return [
        (
            f"escalated ({', '.join(reasons)})",
            sum(told.get(why, 0) for why in ("unsure", "divided", "unscored")),
        ),
        ("uncertain, not escalated (max_share)", told.get("budget", 0)),
        ("calls of the stronger judges", told.get("calls", 0)),
        ("... for all comparisons", told.get("calls_if_all", 0)),
        ("labels still missing from people", result.awaited),
    ]


def next_command(result: Any, again: str) -> int:
    """Print how the run ended and the next command; return the exit code."""
    if result.state == "stopped":
        warn("stopped; all answers so far are kept. The same command continues from here")
        hint(again)
        return STOPPED
    if result.state == "budget":
        return fail(BudgetError(result.reason))
    if result.failed:
        warn(f"{result.failed:,} calls failed; the same command makes them again")
    if result.awaited:
        warn(
            f"{result.awaited:,} labels from people are missing. Label, then run the same command again"
        )
        hint(f"prefab label --store {result.store} --run {result.name}@{result.version}")
        hint(again)
    hint(f"prefab export --store {result.store} --format trl out")
    return 0
