"""Find the principles behind labelled pairs: an inverse constitution.

Candidate principles are given in files, or proposed by a model that sees which answer of a pair was
preferred. Each is put to a judge on every pair, in both orders. On the half of the pairs that is
for fitting, principles are chosen one after another; the other half measures how well they explain
labels that did not choose them.

Source: Findeis et al. 2024, "Inverse Constitutional AI", section 3: propose, merge, test, filter.
Where we deviate: candidates are judged one by one in both orders with probabilities, near
repetitions are merged by their words, and the set is chosen by likelihood instead of by the share
of votes, so that a principle counts only for what the others do not explain.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from prefab.factory.console import Progress
from prefab.factory.errors import ConfigError
from prefab.factory.keys import prompt_id
from prefab.factory.numbers import counted, percent
from prefab.factory.spec.constitution import load_constitution, parse_constitution
from prefab.factory.spec.templates import Template, load_template
from prefab.factory.stats import Estimate, clustered_share, undefined
from prefab.factory.tool_calls import answer_in_context, stored_messages
from prefab.factory.types import (
    Comparison,
    Completion,
    Engine,
    Message,
    Principle,
    Prompt,
    Request,
    Sample,
    Sampling,
)
from prefab.factory.uses import PairUse
from prefab.judges.base import candidate, conversation, generated
from prefab.pipelines.config.loader import ResolvedPipeline, find_judge, resolve_pipeline
from prefab.pipelines.run.asking import (
    AskingSession,
    RepeatedQuestion,
    asking_session,
    engine_for,
    judged,
    kinds_with_engine,
)
from prefab.pipelines.store.export.base import find_run
from prefab.pipelines.store.fill import query
from prefab.pipelines.store.ground_truth import find_gold
from prefab.pipelines.store.imports import read_pairs
from prefab.pipelines.store.selection import select

if TYPE_CHECKING:
    from prefab.judges.stats.rating_table import FloatArray

LEVEL = 0.05  # of the likelihood-ratio test by which a principle is added, over all candidates
KEEP_LEVEL = 0.05  # of the test by which one that was added is dropped again
SUREST = 0.99  # no probability of a judge counts for more
RIDGE = 1e-3  # on the weights: labels that are explained without error have no largest likelihood
ALIKE = 0.9  # of the winners of two candidates that are the same, to call them alike
LEAST_PAIRS = 20
PROPOSED_FROM = 60  # pairs that the model is asked to explain
MOST_PROPOSED = 40  # different proposals that are tested
SAME_WORDS = 0.8  # shared words of all words, from which two proposals are one
PROPOSAL_TOKENS = 160


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Two answers to a prompt, of which `chosen` was preferred."""

    prompt: Prompt
    chosen: str
    rejected: str

    @property
    def comparison(self) -> Comparison:
        """The pair as judges are asked about it."""
        name = self.prompt.id
        return Comparison(self.prompt, Sample(name, 0, self.chosen), Sample(name, 1, self.rejected))


@dataclass(slots=True)
class FoundPrinciple:
    """A principle of the found set.

    Attributes:
        weight: Of its log-odds beside the others', scaled to a mean of 1.
        accuracy: Share of the held-out pairs that it decides in which it prefers the chosen
            answer.
        decides: Share of the held-out pairs in which it names a winner.
        gain: What it adds to the held-out accuracy of the set.
        same_as: Candidates to which the judge answers alike, so that the labels cannot tell them
            from this one.
        examples: Held-out pairs that it decides as labelled, the clearest first.
    """

    principle: Principle
    weight: float
    accuracy: Estimate
    decides: Estimate
    gain: float
    same_as: list[str] = field(default_factory=list)
    examples: list[LabelledPair] = field(default_factory=list)


@dataclass(slots=True)
class TestedCandidate:
    """A candidate on the held-out pairs, whether it was kept or not."""

    principle: str
    compare: str
    accuracy: Estimate
    decides: Estimate
    kept: bool


@dataclass(slots=True)
class Induction:
    """The principles that explain labelled pairs.

    Attributes:
        fitted, held_out: Pairs of each half.
        accuracy: Of the whole set on the held-out pairs; a pair that it does not decide counts as
            a half.
        stop: Why no further principle was added.
    """

    __test__ = False

    pairs: int
    fitted: int
    held_out: int
    judge: str
    principles: list[FoundPrinciple]
    candidates: list[TestedCandidate]
    accuracy: Estimate
    stop: str
    unscored: int
    asked: int
    reused: int

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def induce(
    pairs: Sequence[LabelledPair],
    pipeline: str | Path | dict[str, Any],
    candidates: Sequence[str | Path] = (),
    sets: Sequence[str] = (),
    judge: str = "",
    store: str | Path | None = None,
    most: int = 10,
    seed: int = 0,
    engines: Mapping[str, Engine] | None = None,
    quiet: bool = True,
) -> Induction:
    """Find the smallest set of principles that explains labelled pairs.

    Answers are kept in `STORE/induce`, so that a second call with the same pairs asks nothing.

    Args:
        pairs: From `pairs_of_file`, `pairs_of_people` or `pairs_of_runs`.
        pipeline: The pipeline whose judge is asked.
        candidates: Constitution files with the principles to test; without one, the judge's model
            proposes principles.
        sets: Overrides of the pipeline's fields.
        judge: Its name in `panel.judges`; default: the first.
        store: The store; default: the pipeline's.
        most: Keep at most this many principles.
        seed: Seed of the division into two halves.
        engines: Engines to use in place of those that the pipeline would start, by name.
        quiet: Do not show progress.

    Raises:
        ConfigError: Too few pairs, a candidate file has a mistake, or nothing was proposed.
        EngineError: An engine does not start or fails.
    """
    if len(pairs) < LEAST_PAIRS:
        raise ConfigError(
            f"too few labelled pairs to find principles: {len(pairs):,}; give {LEAST_PAIRS} or more"
        )
    loaded = resolve_pipeline(pipeline, sets)
    asked = find_judge(loaded, judge, kinds_with_engine("pair"))
    given = _given(candidates)
    engine, folder = engine_for(loaded, asked, engines), Path(store or loaded.config.store)
    return asyncio.run(_induce(loaded, asked, engine, folder, pairs, given, most, seed, quiet))


def _given(files: Sequence[str | Path]) -> list[Principle]:
    """The principles of the candidate files, by their ids; the same id in two files gets the
    constitution's name before it.
    """
    found: dict[str, Principle] = {}
    for file in files:
        constitution = load_constitution(file)
        for principle in constitution.principles:
            same = found.get(principle.id)
            if same is not None and same.compare == principle.compare:
                continue
            name = principle.id if same is None else f"{constitution.id}-{principle.id}"[:64]
            found[name] = replace(principle, id=name, enabled=True, applies_when=(), formerly=())
    return list(found.values())


async def _induce(
    loaded: ResolvedPipeline,
    judge: Any,
    engine: Engine,
    folder: Path,
    pairs: Sequence[LabelledPair],
    given: Sequence[Principle],
    most: int,
    seed: int,
    quiet: bool,
) -> Induction:
    prompts = {pair.prompt.id: pair.prompt for pair in pairs}.values()
    held_out = _held_out(pairs, seed)
    described = {"recipe": "induce"}
    async with asking_session(
        loaded, judge, engine, folder / "induce", "induce", described, prompts, folder, quiet
    ) as session:
        fitting = [pair for pair, out in zip(pairs, held_out, strict=True) if not out]
        tested = list(given) or await _proposed(session, fitting, quiet)
        p, unscored = await _judged(session, pairs, tested, quiet)
        counts = session.asked, session.reused
    odds = _log_odds(p)
    kept, weights, stop = choose(odds[~held_out], most)
    clusters = np.array([pair.prompt.group or pair.prompt.id for pair in pairs])[held_out]
    rows = [_candidate(tested[k], p[held_out, k], clusters, k in kept) for k in range(len(tested))]
    whole = odds[held_out][:, kept] @ weights
    found = []
    for place, k in enumerate(kept):
        rest = whole - odds[held_out, k] * weights[place]
        found.append(
            FoundPrinciple(
                tested[k],
                float(weights[place] / weights.mean()),
                rows[k].accuracy,
                rows[k].decides,
                _right(whole) - _right(rest),
                [tested[other].id for other in alike(odds, k)],
                _clearest(pairs, p[:, k], held_out),
            )
        )
    return Induction(
        len(pairs),
        len(fitting),
        int(held_out.sum()),
        judge.name,
        found,
        sorted(rows, key=lambda row: (not row.kept, -(row.accuracy.value or 0.0))),
        _accuracy(whole, clusters) if kept else undefined("no principle was found"),
        stop,
        unscored,
        *counts,
    )


def _held_out(pairs: Sequence[LabelledPair], seed: int) -> np.ndarray:
    """Which pairs are held out: about half of them, whole groups of prompts drawn by `seed`."""
    groups = [pair.prompt.group or pair.prompt.id for pair in pairs]
    sizes = Counter(groups)

    def place(group: str) -> bytes:
        return blake2b(f"{seed}\0{group}".encode()).digest()

    chosen, n = set[str](), 0
    for group in sorted(sizes, key=place):
        if n + sizes[group] / 2 <= len(pairs) / 2:
            chosen.add(group)
            n += sizes[group]
    return np.array([group in chosen for group in groups])


async def _judged(
    session: AskingSession,
    pairs: Sequence[LabelledPair],
    tested: Sequence[Principle],
    quiet: bool,
) -> tuple[FloatArray, int]:
    """P(chosen is better) by pair and candidate, a half where the judge cannot be read, and how
    many those are.
    """
    questions = [
        RepeatedQuestion(pair.comparison, principle) for pair in pairs for principle in tested
    ]
    with Progress("judging candidates", len(questions), quiet, "questions") as progress:
        verdicts = await judged(questions, session, progress)
    values, unscored = [], 0
    for both in verdicts:
        read = [verdict.p_a for verdict in both if verdict.p_a is not None]
        unscored += len(read) < 2
        values.append(sum(read) / 2 if len(read) == 2 else 0.5)
    return np.array(values).reshape(len(pairs), len(tested)), unscored


def _log_odds(p: FloatArray) -> FloatArray:
    held = np.clip(p, 1 - SUREST, SUREST)
    odds: FloatArray = np.log(held / (1 - held))
    return odds


def choose(odds: FloatArray, most: int) -> tuple[list[int], FloatArray, str]:
    """The columns whose weighted sum explains that every row is positive.

    Columns are added one at a time, each the one that raises the likelihood of a logistic model
    without intercept and with weights of at least 0 most, or the first of those that are `alike`
    and explain the rows about as well (their likelihoods differ by less than a test at 5% tells);
    until no column raises it significantly
    (likelihood-ratio test at 5%, divided by the number of columns), or there are `most`. One that
    the later ones have made needless (not significant at 5%) is dropped.

    Shapes: odds N pairs x K candidates, log-odds that the chosen answer is better.

    Returns:
        The columns in the order they were added, their weights, and why it stopped.
    """
    from scipy.stats import chi2

    n_candidates = odds.shape[1]
    needed = float(chi2.isf(LEVEL / max(1, n_candidates), 1)) / 2
    kept: list[int] = []
    weights, likelihood = np.zeros(0), -len(odds) * log(2)
    stop = f"{counted(most, 'principle is', 'principles are')} the most that were asked for"
    while len(kept) < most:
        tried = {k: _fit(odds[:, [*kept, k]]) for k in range(n_candidates) if k not in kept}
        best = max(tried, key=lambda k: tried[k][1], default=None)
        if best is None or tried[best][1] - likelihood < needed:
            stop = (
                f"no other candidate explains the labels better (likelihood-ratio test at "
                f"{LEVEL:.0%}, divided by {n_candidates} candidates)"
            )
            break
        best = min([best, *_equals(odds, best, tried)])
        kept.append(best)
        weights, likelihood = tried[best]
        kept, weights, likelihood = _without_needless(odds, kept, weights, likelihood)
    return kept, weights, stop


def alike(odds: FloatArray, column: int) -> list[int]:
    """The other columns with the same sign in 90% of the rows in which either names a winner."""
    winners = np.where(np.abs(odds) > _EVEN_ODDS, np.sign(odds), 0.0)
    this = winners[:, [column]]
    either = (winners != 0) | (this != 0)
    same = ((winners == this) & either).sum(axis=0) / np.maximum(1, either.sum(axis=0))
    return [int(k) for k in np.flatnonzero(same >= ALIKE) if k != column]


def _equals(
    odds: FloatArray, best: int, tried: Mapping[int, tuple[FloatArray, float]]
) -> list[int]:
    """The columns that are like the best one and explain the rows about as well."""
    from scipy.stats import chi2

    margin = float(chi2.isf(KEEP_LEVEL, 1)) / 2
    return [k for k in alike(odds, best) if k in tried and tried[best][1] - tried[k][1] < margin]


def _without_needless(
    odds: FloatArray, kept: list[int], weights: FloatArray, likelihood: float
) -> tuple[list[int], FloatArray, float]:
    """Drop what the others have made needless; never the one that was added last."""
    from scipy.stats import chi2

    needed = float(chi2.isf(KEEP_LEVEL, 1)) / 2
    for k in kept[:-1]:
        rest = [other for other in kept if other != k]
        found = _fit(odds[:, rest])
        if likelihood - found[1] < needed:
            kept, (weights, likelihood) = rest, found
    return kept, weights, likelihood


def _fit(odds: FloatArray) -> tuple[FloatArray, float]:
    """The weights of at least 0 with the greatest likelihood, and its logarithm."""
    from scipy.optimize import minimize

    def loss(w: FloatArray) -> tuple[float, FloatArray]:
        z = odds @ w
        slope = -odds.T @ (1 / (1 + np.exp(np.clip(z, -500, 500)))) + 2 * RIDGE * w
        return float(np.logaddexp(0.0, -z).sum() + RIDGE * w @ w), slope

    start = np.full(odds.shape[1], 0.5)
    done = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start))
    return np.asarray(done.x), -float(done.fun)


_EVEN = 0.02  # P(chosen) so close to a half names no winner
_EVEN_ODDS = log((0.5 + _EVEN) / (0.5 - _EVEN))


def _candidate(
    principle: Principle, p: FloatArray, clusters: np.ndarray, kept: bool
) -> TestedCandidate:
    decided = np.abs(p - 0.5) > _EVEN
    accuracy = (
        clustered_share((p > 0.5)[decided], clusters[decided])
        if decided.any()
        else undefined("names no winner")
    )
    decides = clustered_share(decided, clusters)
    return TestedCandidate(principle.id, principle.compare, accuracy, decides, kept)


def _right(sums: FloatArray) -> float:
    """The share of pairs with a positive sum; a sum of 0 counts as a half."""
    return float(np.where(sums > 0, 1.0, np.where(sums < 0, 0.0, 0.5)).mean()) if len(sums) else 0.0


def _accuracy(sums: FloatArray, clusters: np.ndarray) -> Estimate:
    decided = sums != 0
    if decided.all():
        return clustered_share(sums > 0, clusters)
    found = clustered_share(np.where(decided, sums > 0, False), clusters)
    return replace(found, value=_right(sums), low=None, high=None)


def _clearest(
    pairs: Sequence[LabelledPair], p: FloatArray, held_out: np.ndarray, n: int = 3
) -> list[LabelledPair]:
    """The held-out pairs that a principle decides as labelled, the surest and shortest first."""
    places = [i for i in np.flatnonzero(held_out) if p[i] > 0.5 + _EVEN]
    places.sort(key=lambda i: (-round(float(p[i]), 2), len(pairs[i].chosen + pairs[i].rejected)))
    return [pairs[i] for i in places[:n]]


# --- proposals ---


async def _proposed(
    session: AskingSession, pairs: Sequence[LabelledPair], quiet: bool
) -> list[Principle]:
    """Principles that the judge's model proposes for some of the pairs, the most frequent first."""
    template = load_template("propose")
    some = sorted(pairs, key=lambda pair: blake2b(pair.prompt.id.encode()).digest())
    asked = some[:PROPOSED_FROM]
    rules: list[str] = []
    with Progress("asking for principles", len(asked), quiet, "pairs") as progress:

        async def one(item: LabelledPair) -> None:
            request = _proposal(session, template, item)
            use = PairUse(
                session.ctx.run, item.prompt.id, "reason", 0, 1, "", session.judge.name, "ab"
            )
            (answer,) = await session.ctx.ask([(request, use)], session.judge.engine)
            if isinstance(answer, Completion):
                text, _ = generated(answer)
                rules.extend(rules_in(text))

        await progress.over(asked, one, 64)
    found = [principle_of(rule) for rule in merge(rules)[:MOST_PROPOSED]]
    if not found:
        raise ConfigError(
            f"the model proposed no rule that can be read for {len(asked):,} pairs; name files "
            "with principles to test with --candidates"
        )
    return list({principle.id: principle for principle in found}.values())


def _proposal(session: AskingSession, template: Template, pair: LabelledPair) -> Request:
    engine = session.engine
    specials, messages = tuple(engine.special_tokens), pair.prompt.messages
    shown = template.render(
        specials,
        conversation=conversation(messages, specials),
        answer_a=candidate(messages, pair.chosen, specials),
        answer_b=candidate(messages, pair.rejected, specials),
    )
    kwargs = session.judge.config.ordered_kwargs()
    return Request(engine.identity, shown, Sampling(PROPOSAL_TOKENS), (), kwargs)


_RULE = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+(.{8,240}?)\s*$", re.M)


def rules_in(text: str) -> list[str]:
    """The rules of a list, one a line, without marks."""
    return [match[1].strip("*_` ") for match in _RULE.finditer(text)]


def merge(rules: Sequence[str]) -> list[str]:
    """Rules without near repetitions, the most frequent first. Two are one where they share 80% of
    their words.
    """
    groups: list[tuple[frozenset[str], list[str]]] = []
    for rule in rules:
        words = frozenset(re.findall(r"\w+", rule.casefold()))
        for known, members in groups:
            if len(words & known) >= SAME_WORDS * len(words | known):
                members.append(rule)
                break
        else:
            groups.append((words, [rule]))
    groups.sort(key=lambda group: -len(group[1]))
    return [members[0] for _, members in groups]


def principle_of(rule: str) -> Principle:
    """A rule as a principle: its question for judges, critics and revisers."""
    rule = rule.rstrip(". ")
    words = re.findall(r"[a-z0-9]+", rule.casefold())
    name = (
        "-".join(words)[:40].strip("-")
        or f"rule-{blake2b(rule.encode(), digest_size=4).hexdigest()}"
    )
    return Principle(
        name,
        rule,
        f"Which answer follows this rule better: {rule}?",
        f"Say where the answer breaks this rule: {rule}.",
        f"Rewrite the answer so that it follows this rule: {rule}.",
        f"The answer breaks this rule: {rule}.",
    )


# --- labelled pairs ---


def pairs_of_file(file: str | Path, names: Mapping[str, str] = {}) -> list[LabelledPair]:
    """The decided pairs of a preference file, in any layout that `prefab import-preferences` reads.

    Args:
        file: The file.
        names: Columns to read under another name: `{"chosen": "good"}`.

    Raises:
        ConfigError: A row cannot be read, or the file has no pair.
    """
    _, found, _ = read_pairs(Path(file), names=names)
    pairs = []
    for name, prompt in found.prompts.items():
        texts = [
            answer_in_context(stored_messages(context or "[]"), text)
            for text, context in found.answers[name]
        ]
        for a, b, p in found.pairs[name]:
            if p != 0.5:
                better, worse = (a, b) if p > 0.5 else (b, a)
                pairs.append(LabelledPair(prompt, texts[better], texts[worse]))
    return pairs


_DECIDED = """
SELECT p.prompt, q.messages, q.tags, coalesce(nullif(q."group", ''), p.prompt), x.text, y.text,
  p.outcome, p.a, p.b, x.context, y.context
FROM preferences p JOIN prompts q ON q.prompt = p.prompt
JOIN samples x ON x.run = p.run AND x.prompt = p.prompt AND x."index" = p.a
JOIN samples y ON y.run = p.run AND y.prompt = p.prompt AND y."index" = p.b
WHERE p.run = $run AND NOT p.identical ORDER BY p.prompt, p.a, p.b"""


def _comparisons(store: Path, run: int) -> Iterator[tuple[Prompt, str, str, str, int, int]]:
    rows = query(store, _DECIDED, {"run": run}).iter_rows()
    for name, messages, tags, group, text_a, text_b, outcome, i, j, *contexts in rows:
        a, b = (
            answer_in_context(stored_messages(context or "[]"), text)
            for text, context in zip((text_a, text_b), contexts, strict=True)
        )
        prompt = Prompt(name, tuple(stored_messages(messages)), tuple(tags), group)
        yield prompt, a, b, outcome, i, j


def pairs_of_people(store: str | Path, run: str = "") -> list[LabelledPair]:
    """The pairs of a run that people labelled (without a principle: better over all).

    Args:
        store: The store.
        run: NAME or NAME@VERSION; default: the latest run.

    Raises:
        ConfigError: There is no such run, or nobody labelled its pairs.
    """
    import polars as pl

    selection = select(Path(store), run)
    rows = list(_comparisons(Path(store), selection.run["run"]))
    items = pl.DataFrame(
        {
            "prompt": [row[0].id for row in rows],
            "a": [row[4] for row in rows],
            "b": [row[5] for row in rows],
            "principle": [""] * len(rows),
        }
    )
    gold, _ = find_gold(selection, items, "human")
    pairs = [
        LabelledPair(prompt, *((a, b) if label == 1 else (b, a)))
        for (prompt, a, b, *_), label in zip(rows, gold, strict=True)
        if label in (0.0, 1.0)
    ]
    if not pairs:
        raise ConfigError(
            f"{store}: nobody labelled a pair of {selection.name}; `prefab label` asks people"
        )
    return pairs


def pairs_of_runs(store: str | Path, run: str, against: str) -> list[LabelledPair]:
    """The pairs on which two runs of a store disagree, as labelled by `run`.

    Args:
        store: The store.
        run: NAME or NAME@VERSION of the run whose labels count.
        against: The other run.

    Raises:
        ConfigError: There is no such run, or they disagree on no pair.
    """
    folder = Path(store)
    new, old = ((find_run(folder, name))["run"] for name in (run, against))
    sides = {"a": 0, "b": 1}
    before = {
        (prompt.id, a, b): (a, b)[sides[outcome]]
        for prompt, a, b, outcome, _, _ in _comparisons(folder, old)
        if outcome in sides
    }
    pairs = []
    for prompt, a, b, outcome, _, _ in _comparisons(folder, new):
        was = before.get((prompt.id, a, b)) or before.get((prompt.id, b, a))
        if outcome in sides and was is not None:
            chosen, rejected = (a, b) if outcome == "a" else (b, a)
            if was != chosen:
                pairs.append(LabelledPair(prompt, chosen, rejected))
    if not pairs:
        raise ConfigError(
            f"{store}: {run} and {against} disagree on no pair of the same answers; `prefab diff` "
            "compares two runs"
        )
    return pairs


# --- the result as a constitution ---


def constitution_text(found: Induction, name: str = "induced") -> str:
    """The found principles as a constitution file to edit, with their figures as comments and
    their examples as tests.

    Args:
        found: From `induce`.
        name: The constitution's id.

    Raises:
        ConfigError: No principle was found.
    """
    if not found.principles:
        raise ConfigError("no principle explains the labels, so there is no constitution to write")
    head = [
        "# yaml-language-server: $schema=constitution.schema.json",
        f"# Found from {found.fitted:,} labelled pairs with the judge {found.judge}; explains "
        f"{percent(found.accuracy)} of {found.held_out:,} held-out pairs.",
        "# Read and edit each principle: it is what the labels have in common, not what anyone meant.",
        *_dumped({"id": name, "title": "Found from labelled pairs", "licence": "CC0-1.0"}),
        "selection: all",
        "principles:",
    ]
    lines, tests = list(head), []
    for one in found.principles:
        p = one.principle
        lines.append(
            f"  # right in {percent(one.accuracy)} of the held-out pairs that it decides, "
            f"{percent(one.decides)} of them"
        )
        value = {name: getattr(p, name) for name in _TEXTS} | {
            "weight": round(max(one.weight, 0.01), 2)
        }
        lines += [f"  {line}" for line in _dumped([value])]
        tests += _tests(one)
    if tests:
        lines += ["tests:", *(f"  {line}" for line in _dumped(tests))]
    text = "\n".join(lines) + "\n"
    parse_constitution(text, name)
    return text


_TEXTS = ("id", "title", "compare", "critique", "revise", "criterion")


def _tests(one: FoundPrinciple) -> list[dict[str, str]]:
    """The examples that have a single question."""
    return [
        {
            "prompt": pair.prompt.messages[0].content,
            "a": pair.chosen,
            "b": pair.rejected,
            "prefer": "a",
            "principle": one.principle.id,
        }
        for pair in one.examples[:2]
        if len(pair.prompt.messages) == 1
    ]


def _dumped(value: Any) -> list[str]:
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000)
    return text.rstrip("\n").split("\n")


def as_pairs(rows: Iterable[tuple[Sequence[Message], str, str]]) -> list[LabelledPair]:
    """Labelled pairs from (messages, chosen, rejected)."""
    return [
        LabelledPair(Prompt(prompt_id(tuple(messages)), tuple(messages)), chosen, rejected)
        for messages, chosen, rejected in rows
    ]
