"""Print what a run did and the command to type next."""

from __future__ import annotations

from typing import Any

from prefab.factory.console import duration, fail, hint, table, warn
from prefab.factory.errors import BudgetError
from prefab.pipelines.cli.options import STOPPED


def report(result: Any) -> None:
    """What a run did, in a few lines."""
    tokens = result.prompt_tokens + result.completion_tokens
    rate = result.asked / result.seconds if result.seconds else 0.0
    rows = [
        ("prompts", result.prompts),
        ("calls asked", result.asked),
        ("answers reused", result.reused),
        ("calls a second", round(rate)),
        ("tokens", tokens),
        ("unscored", sum(result.unscored.values())),
        ("failed in transport", result.failed),
        ("drafts cut off by length", result.truncated),
        ("equal pairs, not asked", result.identical),
        ("prompt rows malformed", result.malformed),
        *_escalated(result),
    ]
    rows = [
        row for row in rows if row[1] or row[0] in ("calls asked", "answers reused", "unscored")
    ]
    table(
        f"{result.name}@{result.version} in {result.store} · {duration(result.seconds)}",
        ("", ""),
        rows,
        note=", ".join(f"{what}: {n:,}" for what, n in result.unscored.items()),
    )


def _escalated(result: Any) -> list[tuple[str, int]]:
    """How much a stronger judge was asked, and what asking it everything would have cost."""
    told = result.escalation
    reasons = [f"{why} {told[why]:,}" for why in ("unsure", "divided", "unscored") if told.get(why)]
    return [
        (
            f"escalated ({', '.join(reasons)})",
            sum(told.get(why, 0) for why in ("unsure", "divided", "unscored")),
        ),
        ("in doubt, over max_share", told.get("budget", 0)),
        ("the stronger judges' calls", told.get("calls", 0)),
        ("... if they were asked everything", told.get("calls_if_all", 0)),
        ("labels that people have not given yet", result.awaited),
    ]


def next_command(result: Any, again: str) -> int:
    """Print how the run ended and the next command; return the exit code."""
    if result.state == "stopped":
        warn("stopped; everything answered so far is kept. The same command goes on from here")
        hint(again)
        return STOPPED
    if result.state == "budget":
        return fail(BudgetError(result.reason))
    if result.failed:
        warn(f"{result.failed:,} calls got no answer; the same command asks them again")
    if result.awaited:
        warn(
            f"{result.awaited:,} labels are waited for: give them, then the same command takes them in"
        )
        hint(f"prefab label --store {result.store} --run {result.name}@{result.version}")
        hint(again)
    hint(f"prefab export --store {result.store} --format trl out")
    return 0
