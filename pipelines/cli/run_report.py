"""Print what a run did and the command to type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefab.factory.console import EXIT_FAILED, console, duration, fail, hint, say, table, warn
from prefab.factory.errors import BudgetError
from prefab.factory.numbers import counted

if TYPE_CHECKING:
    from prefab.pipelines.run.roles import Role


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
        ("comparisons decided", sum(result.outcomes.get(side, 0) for side in "ab")),
        ("comparisons tied", result.outcomes.get("tie", 0)),
        ("comparisons unscored", result.outcomes.get("unscored", 0)),
        *_agreement(result),
        ("verdicts on hard labels, without a probability", sum(result.hard.values())),
        ("faults found", sum(result.faults.values())),
        ("critiques with P(fault) between 0.2 and 0.8", result.unsure_critiques),
        ("unscored answers", sum(result.unscored.values())),
        ("failed calls", result.failed),
        ("drafts cut off at the length limit", result.truncated),
        ("drafts without any text", result.empty),
        ("identical answers, not compared", result.identical),
        ("malformed prompt rows", result.malformed),
        *_escalated(result),
    ]
    rows = [
        row
        for row in rows
        if row[1] or row[0] in ("model calls", "answers reused", "unscored answers")
    ]
    notes = [
        f"{title}: " + ", ".join(f"{what} {n:,}" for what, n in counts.items())
        for title, counts in (("unscored", result.unscored), ("faults", result.faults))
        if counts
    ]
    table(
        f"{result.name}@{result.version} in {result.store} · {duration(result.seconds)}",
        ("", ""),
        rows,
        note=". ".join(notes),
    )
    say_roles(result.roles)
    for line in result.own_answers:
        warn(line)
    if result.p_chosen:
        console().print(result.p_chosen.replace("`", ""), markup=False)
    if result.best_of:
        table(
            "mean score of the best of n answers, and the most KL that choosing it costs",
            ("judge", "n", "score", "KL, nats an answer", "prompts"),
            [
                (row["judge"], row["n"], row["score"], row["kl"], row["prompts"])
                for row in result.best_of
            ],
            "The more the best is chosen by this score, the less the score says of it: measure the "
            "gain by another judge",
        )
    _tell_servers(result)


def say_roles(roles: Sequence[Role]) -> None:
    """Print each role with its model, and where it is the policy's."""
    for role in roles:
        say(f"  {role.role}: {role.model or role.engine}{f' ({role.note})' if role.note else ''}")


def _tell_servers(result: Any) -> None:
    """What each server did, where there are several or one failed."""
    servers = result.servers
    if len(servers) > 1 or any(server.failures for server in servers):
        table(
            "servers",
            ("address", "calls", "failures", "asked of another too", "state"),
            [(s.url, s.calls, s.failures, s.hedged, s.state) for s in servers],
        )


def _agreement(result: Any) -> list[tuple[str, str]]:
    """How often a judge named the same winner in both orders."""
    of = result.in_both_orders
    share = f"{result.same_in_both_orders / of:.1%} of {of:,}" if of else ""
    return [("same winner in both orders", share)]


def _tell_failures(result: Any) -> None:
    """Each reason why calls failed, with its number and an example."""
    for reason, failures in sorted(result.failures.items(), key=lambda item: -item[1].n):
        warn(f"{counted(failures.n, 'call')} failed: {reason}")
        if failures.example.strip() != reason:
            warn(f"  for example: {failures.example}")


# by the end of "role reason"
REMEDIES = {
    "judge low_label_mass": "the judge does not begin with a label. Where it writes a form such as "
    "`Answer: A`: panel.judges: [{..., answer_tokens: 16}]",
    "sample truncated": "drafts end before their answer begins: raise policy.max_tokens, or "
    "engines.NAME.thinking_tokens for a model that thinks",
    "critique parse": 'critiques begin with neither Fault nor None: see `prefab sql "SELECT text FROM '
    'critiques WHERE fault IS NULL"`, and ask for that form in the critique template',
}


def _tell_remedies(result: Any) -> None:
    """What mends the most frequent reason of unscored answers, where it is known."""
    if result.unscored:
        most = max(result.unscored, key=lambda why: result.unscored[why])
        if most in REMEDIES:
            warn(REMEDIES[most])


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
    """Print how the run ended, why calls failed, and the next command.

    Args:
        result: What `prefab.run` gives.
        again: The command that ran, quoted for a shell.

    Returns:
        The exit code: 1 where a budget was passed or calls are missing.
    """
    if result.state == "stopped":
        warn(f"{result.reason}: all answers so far are kept. The same command goes on")
        hint(again)
        return int(128 + result.signal)
    _tell_failures(result)
    if result.state == "budget":
        _tell_remedies(result)
        code = fail(BudgetError(result.reason))
        hint(again)
        return code
    if result.failed:
        if made_again := result.failed - result.refused:
            warn(
                f"{counted(made_again, 'call is', 'calls are')} missing; the same command makes what is missing"
            )
            hint(again)
        if result.refused:
            warn(
                f"{counted(result.refused, 'call was', 'calls were')} refused for good, and only made again when told "
                "to: mend the cause first"
            )
            hint(f"{again} --retry-refused")
        return EXIT_FAILED
    if result.awaited:
        warn(
            f"{counted(result.awaited, 'label from people is', 'labels from people are')} missing. Label, then run the same command again"
        )
        run = f"{result.name}@{result.version}"
        hint(shlex.join(["prefab", "label", "--store", str(result.store), "--run", run]))
        hint(again)
    store = ["--store", str(result.store)]
    if result.trainable:
        hint(shlex.join(["prefab", "export", *store, "--format", "trl", "out"]))
    elif result.outcomes:
        warn("no comparison was decided, so there are no pairs to train on")
        hint(shlex.join(["prefab", "agreement", *store]))
    else:
        warn("nothing was answered, so there is nothing to export")
    return 0
