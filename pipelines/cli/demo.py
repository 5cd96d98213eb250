"""`prefab demo`: make data from the embedded world with vLLM, train policies on it, and compare
both with the oracle.

The oracle reads only text, and nothing is trained on its answers, so it gives independent gold
labels.
"""

from __future__ import annotations

import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefab.factory.console import duration, hint, say, table, warn
from prefab.factory.errors import ConfigError
from prefab.factory.paths import PACKAGE
from prefab.factory.tool_calls import stored_messages
from prefab.factory.types import Message, Winner
from prefab.pipelines.cli.options import hint_command
from prefab.pipelines.store.ground_truth import truth

NO_PRINCIPLE = "(none: the gold score)"
PRESET = PACKAGE / "pipelines" / "presets" / "demo.yaml"


@dataclass(frozen=True, slots=True)
class AnswerQuality:
    """The oracle's figures for a set of answers.

    Attributes:
        n: Number of answers.
        broken: Share that break at least one principle.
        faults: Mean number of principles broken.
        helps: Share that help.
        coherent: Share that are coherent.
        words: Mean number of words.
    """

    n: int
    broken: float
    faults: float
    helps: float
    coherent: float
    words: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Labels of one principle compared with the oracle's.

    Attributes:
        readings: Number of readings.
        decided: Pairs for which the oracle prefers one answer; 0 for an unknown principle.
        right: Share of decided pairs with the right label.
        ties: Pairs that are ties for the oracle; 0 for an unknown principle.
        ties_seen: Share of these that are labelled as ties.
        consistent: Share of readings in which both orders give the same label; None without both.
    """

    principle: str
    readings: int
    decided: int
    right: float | None
    ties: int
    ties_seen: float | None
    consistent: float | None


def demo(
    store: Path,
    prompts: int,
    sets: Sequence[str],
    train: bool,
    as_json: bool,
    write: Callable[[Any], None],
) -> int:
    """Run the preset, train on its data, print the tables, and return the exit code."""
    from prefab.pipelines.cli import demo_training
    from prefab.pipelines.cli.run_report import next_command, report
    from prefab.pipelines.evaluation.report import show as show_policies
    from prefab.pipelines.run.runner import run
    from prefab.pipelines.training.stages import show_gold

    chosen, began, took = (
        [f"store={store}", f"prompts.limit={prompts}", *sets],
        time.monotonic(),
        {},
    )
    say(
        f"{prompts:,} prompts of the embedded world: a small model on vLLM samples, criticises, revises and "
        "compares answers.\nThe model knows only this world and is for tests alone. The server takes minutes "
        "to start the first time, because it compiles the model, and less after that.",
        stderr=True,
    )
    result = run(PRESET, chosen, quiet=False)
    if result.state != "done":
        again = shlex.join(["prefab", "demo", "--store", str(store), "--prompts", str(prompts)])
        return next_command(result, again)
    took["data"] = time.monotonic() - began
    measured = measure(result)
    if not as_json:
        report(result)
        show(result, measured)
    policies = told = None
    if train:
        try:
            models, told = demo_training.train(store, result.run, as_json)
            took["training"] = time.monotonic() - began - took["data"]
            policies = demo_training.measure(store, models, as_json)
        except ConfigError as error:  # too few prompts: a split is empty
            warn(f"no training: {error}. Use more --prompts, or --no-train")
    took["in all"] = time.monotonic() - began
    if as_json:
        write(
            {
                "run": result.summary(),
                **measured,
                "policies": policies.data() if policies else None,
                "ppo": told,
                "seconds": took,
            }
        )
    elif policies:
        show_policies(policies)
        if told is not None:
            show_gold(told)
    if not as_json:
        say(" · ".join(f"{part} {duration(seconds)}" for part, seconds in took.items()))
    hint_command("export", "--store", store, "--format", "trl", "demo-out")
    select = "SELECT principle, avg(fault::INT) AS faults FROM critiques GROUP BY 1"
    hint_command("sql", "--store", store, select)
    hint("prefab init my-project    # your own constitution, prompts and model")
    return 0


def measure(result: Any) -> dict[str, Any]:
    """The oracle's figures for a run on the embedded world."""
    from prefab.pipelines.store.fill import query

    prompts = {
        name: stored_messages(messages)
        for name, messages in query(
            result.store, "SELECT prompt, messages FROM prompts"
        ).iter_rows()
    }
    samples = {(row["prompt"], row["index"]): row for row in result.samples.iter_rows(named=True)}
    drafts = [row for row in samples.values() if row["parent"] < 0 and row["text"] is not None]
    final = _final(samples)
    readings = query(result.store, f"SELECT * FROM readings WHERE run = {result.run}")
    changed = sum(final[row["prompt"], row["index"]]["text"] != row["text"] for row in drafts)
    return {
        "drafts": _quality([(prompts[row["prompt"]], row["text"]) for row in drafts]),
        "revised": _quality(
            [(prompts[row["prompt"]], final[row["prompt"], row["index"]]["text"]) for row in drafts]
        ),
        "changed": changed,
        "accuracy": _accuracy(readings.iter_rows(named=True), prompts, samples),
        "preferences": _preferences(result.preferences.iter_rows(named=True), prompts, samples),
    }


def _final(samples: dict[tuple[str, int], dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Each draft's last revision that could be read, or the draft itself."""
    child = {
        (row["prompt"], row["parent"]): row
        for row in samples.values()
        if row["parent"] >= 0 and row["text"] is not None
    }
    final = {}
    for place, row in samples.items():
        if row["parent"] < 0:
            while (row["prompt"], row["index"]) in child:
                row = child[row["prompt"], row["index"]]
            final[place] = row
    return final


def _quality(answers: Sequence[tuple[Sequence[Message], str]]) -> AnswerQuality:
    from prefab.factory.microworld import oracle

    read = [oracle.assess(messages, text) for messages, text in answers]
    n = max(1, len(read))
    return AnswerQuality(
        len(read),
        sum(bool(r.broken) for r in read) / n,
        sum(len(r.broken) for r in read) / n,
        sum(r.helps for r in read) / n,
        sum(r.coherent for r in read) / n,
        sum(len(text.split()) for _, text in answers) / n,
    )


def _accuracy(
    readings: Any, prompts: dict[str, Any], samples: dict[tuple[str, int], dict[str, Any]]
) -> list[Accuracy]:
    """One row for each principle; the last row is for all of them."""
    from prefab.factory.microworld import oracle

    known = {
        (prompt, index): oracle.assess(prompts[prompt], row["text"])
        for (prompt, index), row in samples.items()
        if row["text"] is not None
    }
    groups: dict[str, list[tuple[Winner | None, dict[str, Any]]]] = defaultdict(list)
    for row in readings:
        a, b = (known[row["prompt"], row[side]] for side in ("a", "b"))
        groups[row["principle"] or NO_PRINCIPLE].append((truth(a, b, row["principle"]), row))
    everything = [pair for pairs in groups.values() for pair in pairs]
    return [
        _accuracy_of(name, pairs) for name, pairs in (*sorted(groups.items()), ("all", everything))
    ]


def _accuracy_of(principle: str, pairs: Sequence[tuple[Winner | None, dict[str, Any]]]) -> Accuracy:
    known = [(gold, row) for gold, row in pairs if row["p_a"] is not None and gold is not None]
    decided = [(gold, row["p_a"]) for gold, row in known if gold != "tie"]
    ties = [row for gold, row in known if gold == "tie"]
    orders = [(row["winner_ab"], row["winner_ba"]) for _, row in pairs]
    return Accuracy(
        principle,
        len(pairs),
        len(decided),
        _share([(p > 0.5) == (gold == "a") and p != 0.5 for gold, p in decided]),
        len(ties),
        _share([_labelled_tie(row) for row in ties]),
        _share([ab == ba for ab, ba in orders if ab is not None and ba is not None]),
    )


def _labelled_tie(row: dict[str, Any]) -> bool:
    """Whether a reading is a tie, or both of its orders are."""
    return row["winner"] == "tie" or bool(row["winner_ab"] == row["winner_ba"] == "tie")


def _share(truths: Sequence[bool]) -> float | None:
    return sum(truths) / len(truths) if truths else None


def _preferences(
    rows: Any, prompts: dict[str, Any], samples: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, Any]:
    """The panel's preferences compared with the gold score: helpfulness minus the share of
    principles broken.
    """
    from prefab.factory.microworld import oracle

    outcomes: dict[str, int] = defaultdict(int)
    right: list[bool] = []
    for row in rows:
        outcomes[row["outcome"]] += 1
        if row["outcome"] not in ("a", "b"):
            continue
        a, b = (
            oracle.assess(prompts[row["prompt"]], samples[row["prompt"], row[side]]["text"]).score
            for side in ("a", "b")
        )
        if a != b:
            right.append((row["outcome"] == "a") == (a > b))
    return {"outcomes": dict(outcomes), "gold_decided": len(right), "right": _share(right)}


def show(result: Any, measured: dict[str, Any]) -> None:
    """Print the tables of the oracle's figures."""
    drafts, revised = measured["drafts"], measured["revised"]
    rows = [
        (what, getattr(drafts, name), getattr(revised, name))
        for what, name in (
            ("break at least one principle", "broken"),
            ("principles broken, mean", "faults"),
            ("help", "helps"),
            ("coherent", "coherent"),
            ("words, mean", "words"),
        )
    ]
    table(
        f"The oracle on {drafts.n:,} drafts ({measured['changed']:,} of them revised)",
        ("", "drafts", "after revision"),
        rows,
    )
    table(
        "Labels against the oracle, both orders together",
        ("principle", "readings", "decided", "right", "ties", "seen as ties", "both orders agree"),
        [
            (a.principle, a.readings, a.decided, a.right, a.ties, a.ties_seen, a.consistent)
            for a in measured["accuracy"]
        ],
        note="decided: pairs in which the oracle finds the fault in only one answer; right: the share of them "
        "whose label prefers the other answer; ties: pairs that are equal for the oracle",
    )
    told = measured["preferences"]
    words = ", ".join(f"{name}: {n:,}" for name, n in sorted(told["outcomes"].items()))
    if told["right"] is not None:
        words += f"; right for {told['right']:.1%} of the {told['gold_decided']:,} with different gold scores"
    say(f"Preferences over all principles: {words}")
    if result.asked and result.seconds:
        tokens = (result.prompt_tokens + result.completion_tokens) / result.seconds
        say(
            f"{result.asked:,} calls in {duration(result.seconds)}: {result.asked / result.seconds:,.0f} "
            f"calls/s, {tokens:,.0f} tokens/s"
        )
    else:
        say("no model calls: every answer was in the ledger")
