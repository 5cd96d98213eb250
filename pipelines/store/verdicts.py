"""From the uses and answers of one prompt to its verdicts and scores: what each kind of judge said
of a comparison.

A judge of pairs is read in two orders. A judge of single answers gives scores, and two answers'
scores a verdict; one that ranks gives rankings, and those a verdict. Such a verdict was asked in no
order: its order is `-`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prefab.factory import decision
from prefab.factory.keys import digest
from prefab.factory.steps import Separator
from prefab.factory.types import Preference, Verdict
from prefab.factory.uses import (
    NO_ESCALATION,
    ComparisonUse,
    EscalationUse,
    IdenticalUse,
    PairUse,
    RankUse,
    ScoreUse,
    Use,
)
from prefab.judges import panel
from prefab.judges.base import NO_ORDER, Decoded, Judge, Pair, RubricLines
from prefab.pipelines.store.calibrations import Learned

Place = tuple[
    str, str, int, str
]  # principle, judge, repeat, order: where in a comparison's readings
Asked = tuple[str, str, int]  # judge, principle, repeat
NOT_ASKED = (IdenticalUse, ComparisonUse, EscalationUse)  # uses that stand on no call


@dataclass(slots=True)
class RecordedUse:
    """A use as the ledger keeps it: a later one has a greater `rowid`; `key` is its call's."""

    rowid: int
    use: Use
    key: bytes


@dataclass(slots=True)
class Rules:
    """What a run's configuration says about reading its answers. `strong`: judges asked about some
    comparisons only; `joined` says that the others' readings count beside theirs. `fit`: how
    answers' strengths are found, if at all. `learned`: how readings become a probability, where
    that was learned from known outcomes. `steps`: what a step of an answer is.
    """

    run: int
    judges: dict[str, Judge[Any]]
    readers: dict[
        str, str
    ]  # by judge: what of its configuration decides a verdict, for the verdict's id
    orders: Literal["both", "random", "first"]
    seed: int
    rule: decision.Rule
    weights: dict[str, float]
    positions: dict[str, int]
    strong: tuple[str, ...]
    joined: bool
    fit: str
    learned: Learned | None
    critique_labels: tuple[str, ...]
    critique_mass: float
    steps: Separator


@dataclass(slots=True)
class Heard:
    """The decoded answers of one prompt by what they are for. `principles` of each comparison that
    was made; `rubric_of` a judge that was shown the prompt's own rubric, which one.
    """

    principles: dict[Pair, set[str]] = field(default_factory=dict)
    pairs: dict[Pair, dict[Place, list[Decoded]]] = field(default_factory=dict)
    answers: dict[Asked, list[Decoded]] = field(default_factory=dict)  # scores and rankings
    decisions: dict[Pair, str] = field(default_factory=dict)  # why escalated; "" or budget: not
    rubric_of: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Found:
    """A verdict, the call it stands on (empty where it stands on several), and what else its id
    digests.
    """

    verdict: Verdict
    call: str
    calls: tuple[str, ...]


def latest(uses: Iterable[RecordedUse]) -> list[RecordedUse]:
    """One use a place, by its row: where code changed under a run, what it asked last."""
    last: dict[Use, RecordedUse] = {}
    for recorded in sorted(uses, key=lambda recorded: recorded.rowid):
        last[_place_of(recorded.use)] = recorded
    return sorted(last.values(), key=lambda recorded: recorded.rowid)


def _place_of(use: Use) -> Use:
    """The use without what an answer to the same question may differ in: the order in which answers
    were shown to be ranked, and the reason of a decision.
    """
    if isinstance(use, RankUse):
        return replace(use, shown=())
    return replace(use, reason="") if isinstance(use, EscalationUse) else use


def gather(decoded: Iterable[Decoded]) -> Heard:
    """The answers that make verdicts, by what they are for. The order is that in which they were
    asked: of several rubrics, the one that was asked about last counts.
    """
    heard, by_rubric = Heard(), dict[str, list[tuple[ScoreUse, Decoded]]]()
    for one in decoded:
        match one.use:
            case ComparisonUse(pair=pair, principle=principle):
                heard.principles.setdefault(pair, set()).add(principle)
            case EscalationUse(pair=pair, reason=reason):
                heard.decisions[pair] = reason
            case ScoreUse() as use if use.rubric:
                by_rubric.setdefault(use.judge, []).append((use, one))
            case ScoreUse() | RankUse() as use:
                asked = (use.judge, use.principle, use.repeat)
                heard.answers.setdefault(asked, []).append(one)
            case PairUse(pair=pair) as use:
                heard.principles.setdefault(pair, set()).add(use.principle)
                place = (use.principle, use.judge, use.repeat, use.order)
                heard.pairs.setdefault(pair, {}).setdefault(place, []).append(one)
    for judge, some in by_rubric.items():
        heard.rubric_of[judge] = some[-1][0].rubric
        for use, one in some:
            if use.rubric == heard.rubric_of[judge]:
                heard.answers.setdefault((judge, "", use.repeat), []).append(one)
    return heard


def escalated(reason: str) -> bool:
    """Whether a comparison with this reason is put to the stronger judges."""
    return reason not in NO_ESCALATION


def counted(pair: Pair, heard: Heard, rules: Rules) -> list[str] | None:
    """The judges whose word makes this comparison's preference; None while nobody has decided
    whether a stronger one is asked.
    """
    return judges_of(heard.decisions.get(pair), rules)


def judges_of(decision: str | None, rules: Rules) -> list[str] | None:
    """The judges whose word makes a preference, by the decision whether a stronger one is asked
    (None: not made yet).
    """
    if not rules.strong:
        return list(rules.judges)
    if decision is None:
        return None
    cheap = [name for name in rules.judges if name not in rules.strong]
    if not escalated(decision):
        return cheap
    return [*cheap, *rules.strong] if rules.joined else list(rules.strong)


def expected(
    prompt: str, pair: Pair, heard: Heard, rules: Rules, judges: Iterable[str]
) -> set[Place]:
    """Every place that must be read before a preference is decided, under the principles that were
    asked about.
    """
    orders = panel.orders(rules.orders, rules.seed, prompt, *pair)
    places = set()
    for name in judges:
        judge = rules.judges[name]
        free = not judge.per_principle or name in heard.rubric_of
        places |= {
            (principle, name, repeat, order)
            for principle in ([""] if free else heard.principles.get(pair, set()) - {""})
            for repeat in range(judge.repeats)
            for order in (orders if judge.ordered else (NO_ORDER,))
        }
    return places


def verdicts(
    prompt: str,
    pair: Pair,
    heard: Heard,
    rules: Rules,
    rubrics: Mapping[str, RubricLines] = {},
) -> dict[Place, Found]:
    """What every judge of the run has said of one comparison; a verdict that is still awaited is
    left out.
    """
    places = dict(heard.pairs.get(pair, {}))
    single = [name for name, judge in rules.judges.items() if judge.shows in ("one", "all")]
    for place in expected(prompt, pair, heard, rules, single):
        principle, name, repeat, _ = place
        places[place] = heard.answers.get((name, principle, repeat), [])
    found: dict[Place, Found] = {}
    for place in sorted(places):
        principle, name, _, _ = place
        judge = rules.judges.get(name)
        if judge is None:
            continue
        lines = judge.lines(principle, rubrics.get(heard.rubric_of.get(name, "")))
        made = judge.verdict(places[place], pair, lines)
        if made is not None:
            verdict, calls = made
            stands_on_one = judge.shows in ("pair", "people")
            found[place] = Found(verdict, calls[0] if stands_on_one else "", calls)
    return found


def readings(found: Mapping[Place, Found], rules: Rules) -> list[decision.Reading]:
    """One reading a judge and principle, the principles in their constitution's order (what needs
    none comes first).
    """
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for (principle, judge, _, _), one in found.items():
        groups.setdefault((principle, judge), []).append(one.verdict)
    return [
        decision.combine_orders(groups[place], weight, *place)
        for place, weight in weighed(groups, rules).items()
    ]


def weighed(places: Iterable[tuple[str, str]], rules: Rules) -> dict[tuple[str, str], float]:
    """The weights of readings (principle and judge), in the order in which they are combined."""
    ordered = sorted(
        places, key=lambda place: (rules.positions.get(place[0], 0) if place[0] else -1, place)
    )
    return {
        (principle, judge): rules.weights.get(principle, 1.0) * rules.judges[judge].weight
        for principle, judge in ordered
    }


def name_of(prompt: str, pair: Pair, place: Place, found: Found, rules: Rules) -> str:
    """The id of a verdict: of the comparison, the place, the calls it stands on, and how they were
    read.
    """
    principle, judge, repeat, order = place
    version = rules.judges[judge].PARSER_VERSION
    return digest(
        "verdict",
        prompt,
        *map(str, pair),
        principle,
        judge,
        str(repeat),
        order,
        *found.calls,
        rules.readers[judge],
        str(version),
    )


def preference(
    prompt: str, pair: Pair, found: Mapping[Place, Found], places: set[Place], rules: Rules
) -> tuple[Preference, list[decision.Reading]] | None:
    """What the verdicts at these places say together, and their readings; None while one of them is
    awaited.
    """
    if not places or not places <= found.keys():
        return None
    said = readings({place: one for place, one in found.items() if place in places}, rules)
    return decision.decide(said, rules.rule, prompt, *pair), said


def calibrated(decided: Preference, said: Sequence[decision.Reading], rules: Rules) -> Preference:
    """The preference with its calibrated probability. The more probable answer is chosen; a tie
    stays a tie. Unchanged where it is unscored, or the run has no calibration.
    """
    if rules.learned is None or decided.p_a is None:
        return decided
    p = rules.learned.calibration.probability([r.p_a for r in said], [r.weight for r in said])
    if p is None:
        return decided
    outcome = decided.outcome
    if outcome != "tie":
        outcome = "a" if p > 0.5 else "b"
    return replace(decided, outcome=outcome, p_a=p, p_chosen=max(p, 1.0 - p))
