"""`prefab demo`: make data from the embedded world with vLLM, train policies on it, and compare
both with the oracle; step by step, each step on one screen.

The oracle reads only text, and nothing is trained on its answers, so it gives independent gold
labels.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefab.factory.console import duration, heading, hint, say, table, warn
from prefab.factory.errors import ConfigError
from prefab.factory.numbers import p_value
from prefab.factory.paths import PACKAGE
from prefab.factory.tool_calls import stored_messages
from prefab.factory.types import Engine, Message, Winner
from prefab.pipelines.cli.options import hint_command
from prefab.pipelines.store.ground_truth import truth

if TYPE_CHECKING:
    from prefab.pipelines.config.loader import ResolvedPipeline
    from prefab.pipelines.run.runner import RunResult

PROMPTS, FULL_PROMPTS = 96, 320
FIRST, FIRST_NAME = 4, "demo-first"  # prompts that are run first, to show one of them
NO_PRINCIPLE = "(none: the gold score)"
PRESET = PACKAGE / "pipelines" / "presets" / "demo.yaml"
_REVISED = """
SELECT p.messages, d.text AS draft, c.principle, c.text AS critique, r.text AS revision
FROM samples d JOIN prompts p USING (prompt)
JOIN samples r ON r.run = d.run AND r.prompt = d.prompt AND r.parent = d."index"
JOIN critiques c ON c.run = d.run AND c.prompt = d.prompt AND c."index" = d."index"
  AND c.principle = r.principle
WHERE d.run = ? AND d.parent < 0 AND c.fault AND r.text <> d.text
ORDER BY length(d.text), d.prompt LIMIT 1
"""
_COMPARED = """
SELECT q.messages, a.text AS answer_a, b.text AS answer_b, x.principle, x.p_a
FROM readings x JOIN prompts q USING (prompt)
JOIN samples a ON a.run = x.run AND a.prompt = x.prompt AND a."index" = x.a
JOIN samples b ON b.run = x.run AND b.prompt = x.prompt AND b."index" = x.b
WHERE x.run = ? AND x.p_a IS NOT NULL
ORDER BY abs(x.p_a - 0.5) DESC, length(a.text) + length(b.text), x.prompt LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class AnswerQuality:
    """The oracle's figures for a set of answers.

    Attributes:
        n: Number of answers.
        broken: Share that break a principle or are incoherent.
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
    prompts: int | None,
    full: bool,
    sets: Sequence[str],
    train: bool,
    as_json: bool,
    write: Callable[[Any], None],
    engines: dict[str, Engine] | None = None,
) -> int:
    """Show the whole way from prompts to trained policies on the embedded world, in steps.

    Args:
        store: Where the answers are kept; the same command continues a demo that was stopped.
        prompts: How many prompts of the embedded world; default: `PROMPTS`, or `FULL_PROMPTS`.
        full: More prompts, and longer PPO.
        sets: Overrides of the preset, as `--set` takes them.
        train: Whether to train and evaluate policies too.
        as_json: Print one JSON object instead of tables.
        write: Prints that object.
        engines: Engines to use in place of those that the preset would start, by name.

    Returns:
        The exit code.
    """
    from prefab.pipelines.cli.run_report import next_command

    began, took, steps = time.monotonic(), dict[str, float](), 5 if train else 3
    n = prompts or (FULL_PROMPTS if full else PROMPTS)
    if not as_json:
        _introduce(n)
    first, result = asyncio.run(_make_data(store, n, sets, as_json, steps, engines))
    took["data"] = time.monotonic() - began
    if result is None or result.state != "done":
        return next_command(result or first, _again(store, prompts, full, sets, train))
    measured = measure(result)
    if not as_json:
        heading(f"What {result.prompts:,} prompts gave", 2, steps)
        show_data(result)
        heading("How many labels are right", 3, steps)
        show(measured)
    found = _train(store, result, full, as_json, steps, took) if train else {}
    took["in all"] = time.monotonic() - began
    if as_json:
        policies = found["policies"].data() if found else None
        told = {"policies": policies, "ppo": found.get("ppo"), "seconds": took}
        write({"run": result.summary(), **measured, **told})
    else:
        say("\n" + " · ".join(f"{part} {duration(seconds)}" for part, seconds in took.items()))
    _next_commands(store)
    return 0


def _again(store: Path, prompts: int | None, full: bool, sets: Sequence[str], train: bool) -> str:
    """The command that goes on with a demo that was stopped."""
    words = ["prefab", "demo", "--store", str(store)]
    words += ["--prompts", str(prompts)] if prompts else []
    words += ["--full"] if full else []
    words += [word for text in sets for word in ("--set", text)]
    return shlex.join([*words, *([] if train else ["--no-train"])])


def _introduce(prompts: int) -> None:
    """What will happen, to read while the server starts."""
    say(
        "The demo makes preference data in a small artificial world, in which a program (the oracle)\n"
        "knows the truth about every answer. So each step can be checked:\n"
        f"  1. A small model answers {FIRST} prompts. It criticises and revises its answers under\n"
        "     eleven principles, and compares them. You see one of them in full.\n"
        f"  2. The same for {prompts:,} prompts.\n"
        "  3. The oracle says how many of the labels are right.\n"
        "  4. Policies are trained on the data: SFT, a reward model, DPO, PPO.\n"
        "  5. The oracle says whether the policies are better than before.\n"
        "The model knows this world alone, so use it for nothing else. vLLM serves it; the first\n"
        "start compiles the model, which takes one to two minutes.",
        stderr=True,
    )


async def _make_data(
    store: Path,
    prompts: int,
    sets: Sequence[str],
    as_json: bool,
    steps: int,
    engines: dict[str, Engine] | None,
) -> tuple[RunResult, RunResult | None]:
    """A run of a few prompts, one of which is shown, and then the run of all: on one server.

    Returns:
        Both runs; of the second, None where the first did not come to its end.
    """
    from prefab.factory.engines.lifecycle import KeptEngine
    from prefab.pipelines.config.loader import make_engines, resolve_pipeline
    from prefab.pipelines.run.runner import run_async

    def pipeline(limit: int, *more: str) -> ResolvedPipeline:
        return resolve_pipeline(PRESET, [f"store={store}", f"prompts.limit={limit}", *sets, *more])

    loaded = pipeline(prompts)
    kept = {
        name: KeptEngine(getattr(engine, "engine", engine))
        for name, engine in (engines or make_engines(loaded)).items()
    }
    used: dict[str, Engine] = {**kept}
    try:
        first = await run_async(pipeline(min(FIRST, prompts), f"name={FIRST_NAME}"), as_json, used)
        if first.state != "done":
            return first, None
        if not as_json:
            heading("One prompt from beginning to end", 1, steps)
            show_first(first)
        return first, await run_async(loaded, as_json, used)
    finally:
        for engine in kept.values():
            await engine.end()


def _train(
    store: Path,
    result: RunResult,
    full: bool,
    as_json: bool,
    steps: int,
    took: dict[str, float],
) -> dict[str, Any]:
    """Train and evaluate; the evaluation and PPO's result, or nothing where a split is empty."""
    from prefab.pipelines.cli import demo_training
    from prefab.pipelines.training.stages import show_gold

    began = time.monotonic()
    if not as_json:
        heading("Training on the data", 4, steps)
        say(demo_training.ABOUT)
    try:
        models, told = demo_training.train(store, result.run, full, as_json)
        took["training"] = time.monotonic() - began
        if not as_json:
            show_gold(told)
        policies = demo_training.measure(store, models, as_json)
    except ConfigError as error:  # too few prompts: a split is empty
        warn(f"no training: {error}. Use more --prompts, or --no-train")
        return {}
    took["evaluation"] = time.monotonic() - began - took["training"]
    if not as_json:
        heading("Are the policies better than before?", 5, steps)
        demo_training.show_policies(policies)
    return {"policies": policies, "ppo": told}


def _next_commands(store: Path) -> None:
    """What to look at next, on the data that was made."""
    say("\nLook further:", stderr=True)
    hint_command("view", store)
    hint_command("report", "demo", "--store", store, "--out", f"{store}-report.html")
    hint_command("agreement", "--store", store)
    select = "SELECT principle, avg(fault::INT) AS faults FROM critiques GROUP BY 1"
    hint_command("sql", "--store", store, select)
    hint_command("export", "--store", store, "--format", "trl", f"{store}-out")
    hint("prefab init my-project    # your own constitution, prompts and model")


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
        sum(r.faulty for r in read) / n,
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
    gold_decided = 0
    for row in rows:
        outcomes[row["outcome"]] += 1
        a, b = (
            oracle.assess(prompts[row["prompt"]], samples[row["prompt"], row[side]]["text"]).score
            for side in ("a", "b")
        )
        gold_decided += a != b
        if a != b and row["outcome"] in ("a", "b"):
            right.append((row["outcome"] == "a") == (a > b))
    return {
        "outcomes": dict(outcomes),
        "gold_decided": gold_decided,
        "both_decided": len(right),
        "right": _share(right),
        "right_of_all": sum(right) / gold_decided if gold_decided else None,
    }


def show_first(result: RunResult) -> None:
    """One prompt of a run: a draft, its fault, its revision, and the verdicts on a comparison."""
    from prefab.pipelines.store.fill import query

    rows = query(result.store, _REVISED, [result.run]).rows(named=True)
    for row in rows:
        question = json.loads(row["messages"])[-1][1]
        say(f"prompt    {question}")
        say(f"draft     {row['draft']}")
        say(f"critique  {row['critique']} (principle: {row['principle']})")
        say(f"revision  {row['revision']}")
    rows = query(result.store, _COMPARED, [result.run]).rows(named=True)
    for row in rows:
        say(f"\nA compared pair of answers to: {json.loads(row['messages'])[-1][1]}")
        say(f"A         {row['answer_a']}")
        say(f"B         {row['answer_b']}")
        p = row["p_a"]
        better = "A" if p > 0.5 else "B"
        say(
            f"verdict   {row['principle']}: {better} is better, P(A) {p_value(p)} (mean of both orders)"
        )
    say("Look at: what the critique names, what the revision changed, which principle decided.")


def show_data(result: RunResult) -> None:
    """What a run made, in a few sentences."""
    n = result.outcomes
    decided = n.get("a", 0) + n.get("b", 0)
    faults = ", ".join(f"{name} {count:,}" for name, count in list(result.faults.items())[:4])
    say(f"{sum(result.faults.values()):,} faults were found; most often: {faults}")
    say(
        f"{sum(n.values()):,} comparisons of two answers: {decided:,} decided, {n.get('tie', 0):,} "
        f"tied, {n.get('unscored', 0):,} unscored"
    )
    if result.p_chosen:
        say(result.p_chosen.replace("`", ""))
    if result.asked and result.seconds:
        tokens = (result.prompt_tokens + result.completion_tokens) / result.seconds
        say(
            f"{result.asked:,} model calls in {duration(result.seconds)}: "
            f"{result.asked / result.seconds:,.0f} calls/s, {tokens:,.0f} tokens/s"
        )
    else:
        say("no model calls: every answer was in the ledger")


def show(measured: dict[str, Any]) -> None:
    """Print the oracle's figures: the headline first, then a table of drafts and one of labels."""
    told = measured["preferences"]
    if told["right"] is not None:
        say(
            f"{told['gold_decided']:,} comparisons differ for the oracle. The preferences name the better "
            f"answer in {told['right_of_all']:.1%} of them ({told['right']:.1%} of the "
            f"{told['both_decided']:,} that they decide)."
        )
    drafts, revised = measured["drafts"], measured["revised"]
    rows = [
        (what, getattr(drafts, name), getattr(revised, name), mark)
        for what, name, mark in (
            ("break a principle or are incoherent", "broken", "▼"),
            ("principles broken, mean", "faults", "▼"),
            ("help", "helps", "▲"),
            ("coherent", "coherent", "▲"),
            ("words, mean", "words", ""),
        )
    ]
    table(
        f"Revision removes faults: {drafts.n:,} drafts, {measured['changed']:,} of them revised",
        ("share of answers that", "drafts", "revised", "better is"),
        rows,
        note="better is: ▲ more, ▼ less",
    )
    table(
        "Labels under each principle, both orders together, against the oracle",
        ("principle", "labels", "decided", "right", "ties", "seen as ties", "same both ways"),
        [
            (a.principle, a.readings, a.decided, a.right, a.ties, a.ties_seen, a.consistent)
            for a in measured["accuracy"]
        ],
        note="decided: only one of the two answers has the fault; right: the label prefers the "
        "other one.\nties: both answers are equal under this principle",
    )
