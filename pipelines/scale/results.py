"""The results of shards, put together as that of one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefab.factory.types import ServerReport
from prefab.pipelines.run.context import Failures
from prefab.pipelines.run.runner import RunResult

NUMBERS = (
    *("prompts", "asked", "reused", "failed", "truncated", "identical", "prompt_tokens"),
    *("completion_tokens", "empty", "unsure_critiques", "same_in_both_orders", "in_both_orders"),
    *("refused", "awaited"),
)
BY_NAME = ("unscored", "escalation", "outcomes", "faults", "hard")


def sum_counts(ended: Sequence[dict[str, Any]], record: dict[str, Any], folder: Path) -> RunResult:
    """The result of a run from those of its shards (`RunResult.summary`).

    Args:
        ended: The results.
        record: The run, as the shared folder has it.
        folder: The shared folder.
    """
    fields: dict[str, Any] = {
        **{name: sum(counts[name] for counts in ended) for name in NUMBERS},
        **{name: _together(ended, name) for name in BY_NAME},
    }
    return RunResult(
        name=record["name"],
        version=record["version"],
        run=record["id"],
        store=folder,
        resumed=record["resumed"],
        state="done",
        reason="",
        malformed=0,
        seconds=0.0,
        failures=_failures(ended),
        servers=_servers(ended),
        **fields,
    )


def _together(ended: Sequence[dict[str, Any]], name: str) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counts in ended:
        total.update(counts[name])
    if name == "faults":  # the most frequent first, as of one run
        return dict(total.most_common())
    return dict(sorted(total.items()))


def _failures(ended: Sequence[dict[str, Any]]) -> dict[str, Failures]:
    found: dict[str, Failures] = {}
    for counts in ended:
        for reason, told in counts["failures"].items():
            found.setdefault(reason, Failures(0, told["example"])).n += told["n"]
    return found


def _servers(ended: Sequence[dict[str, Any]]) -> list[ServerReport]:
    """The last report of each server, since workers keep their engines from shard to shard."""
    return list(
        {told["url"]: ServerReport(**told) for c in ended for told in c["servers"]}.values()
    )
