"""From the uses and answers of one prompt to its verdicts and scores: what each kind of judge said
of a comparison.

A judge of pairs is read in two orders. A judge of single answers gives scores, and two answers'
scores a verdict; one that ranks gives rankings, and those a verdict. Such a verdict was asked in no
order: its order is `-`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefab.factory.keys import digest
from prefab.factory.types import Completion, Preference, Verdict
from prefab.judges import panel, registry
from prefab.judges.base import Score
from prefab.judges.kinds import human, listwise, pairwise, pointwise, rubric
from prefab.pipelines.run.judging import NO_ORDER

Pair = tuple[int, int]  # the indices of samples a and b
Place = tuple[
    str, str, int, str
]  # principle, judge, repeat, order: where in a comparison's readings
Asked = tuple[str, str, int]  # judge, principle, repeat
DECISIONS = ("escalate", "settle")
NOT_ASKED = ("identical", "pair", *DECISIONS)  # roles of uses that stand on no call


@dataclass(slots=True)
class UseRow:
    """A use as the ledger keeps it, its names spelt out; `rowid` tells a later one from an
    earlier.
    """

    rowid: int
    role: str
    sample: int
    other: int
    round: int
    principle: str
    judge: str
    order: str
    repeat: int
    key: bytes


@dataclass(slots=True)
class Rules:
    """What a run's configuration says about reading its answers. `strong`: judges asked about some
    comparisons only; `joined` says that the others' readings count beside theirs. `fit`: how
    answers' strengths are found, if at all.
    """

    run: int
    judges: dict[str, Any]
    readers: dict[
        str, str
    ]  # by judge: what of its configuration decides a verdict, for the verdict's id
    orders: str
    seed: int
    rule: panel.Rule
    weights: dict[str, float]
    positions: dict[str, int]
    strong: tuple[str, ...] = ()
    joined: bool = False
    fit: str = ""


@dataclass(slots=True)
class Heard:
    """The uses of one prompt by what they are for. `principles` of each comparison that was made;
    `rubric_of` a judge that was shown the prompt's own rubric, which one.
    """

    principles: dict[Pair, set[str]] = field(default_factory=dict)
    pairs: dict[Pair, dict[Place, dict[str, UseRow]]] = field(default_factory=dict)
    scores: dict[Asked, dict[int, dict[int, UseRow]]] = field(
        default_factory=dict
    )  # by sample, by line of a rubric
    ranks: dict[Asked, dict[int, UseRow]] = field(default_factory=dict)  # by permutation
    decisions: dict[Pair, UseRow] = field(default_factory=dict)
    rubric_of: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Found:
    """A verdict, the call it stands on (empty where it stands on several), and what else its id
    digests.
    """

    verdict: Verdict
    call: str
    calls: tuple[str, ...]


def latest(uses: Iterable[UseRow]) -> list[UseRow]:
    """One use a place: where code changed under a run, what it asked last."""
    last: dict[tuple, UseRow] = {}
    for use in uses:
        place: tuple = (
            use.role,
            use.sample,
            use.other,
            use.round,
            use.principle,
            use.judge,
            "" if use.role == "rank" else use.order,
            use.repeat,
        )
        if use.role in DECISIONS:
            place = ("decision", use.sample, use.other)
        if place not in last or last[place].rowid < use.rowid:
            last[place] = use
    return list(last.values())


def gather(uses: Iterable[UseRow]) -> Heard:
    """The uses that make verdicts, by what they are for."""
    heard, shown = Heard(), {}
    for use in latest(uses):
        pair, asked = (use.sample, use.other), (use.judge, use.principle, use.repeat)
        if use.role in ("judge", "reason"):
            heard.principles.setdefault(pair, set()).add(use.principle)
            place = (use.principle, use.judge, use.repeat, use.order)
            heard.pairs.setdefault(pair, {}).setdefault(place, {})[use.role] = use
        elif use.role == "pair":
            heard.principles.setdefault(pair, set()).add(use.principle)
        elif use.role in DECISIONS:
            heard.decisions[pair] = use
        elif use.role == "score" and use.order:
            shown.setdefault(use.judge, []).append(use)
        elif use.role == "score":
            heard.scores.setdefault(asked, {}).setdefault(use.sample, {})[0] = use
        elif use.role == "rank":
            heard.ranks.setdefault(asked, {})[use.round] = use
    for judge, some in shown.items():  # of several rubrics, the one that was asked about last
        heard.rubric_of[judge] = max(some, key=lambda use: use.rowid).order
        for use in some:
            if use.order == heard.rubric_of[judge]:
                lines = heard.scores.setdefault((judge, "", use.repeat), {}).setdefault(
                    use.sample, {}
                )
                lines[use.round] = use
    return heard


def counted(pair: Pair, heard: Heard, rules: Rules) -> list[str] | None:
    """The judges whose word makes this comparison's preference; None while nobody has decided
    whether a stronger one is asked.
    """
    if not rules.strong:
        return list(rules.judges)
    decision = heard.decisions.get(pair)
    if decision is None:
        return None
    cheap = [name for name in rules.judges if name not in rules.strong]
    if decision.role == "settle":
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
        free = registry.is_program(judge) or name in heard.rubric_of
        places |= {
            (principle, name, repeat, order)
            for principle in ([""] if free else heard.principles.get(pair, set()) - {""})
            for repeat in range(registry.repeats(judge))
            for order in (orders if registry.shows(judge) == "pair" else (NO_ORDER,))
        }
    return places


def verdicts(
    prompt: str,
    pair: Pair,
    heard: Heard,
    answers: Mapping[bytes, Completion],
    rules: Rules,
    rubrics: Mapping[str, Any] = {},
) -> dict[Place, Found]:
    """What every judge of the run has said of one comparison; a verdict that is still awaited is
    left out.
    """
    found: dict[Place, Found | None] = {}
    for place, uses in heard.pairs.get(pair, {}).items():
        if place[1] in rules.judges:
            found[place] = _of_pair(uses, place[3], rules.judges[place[1]], answers)
    unordered = [
        name for name, config in rules.judges.items() if registry.shows(config) in ("one", "all")
    ]
    for place in expected(prompt, pair, heard, rules, unordered):
        principle, judge, repeat, _ = place
        config, asked = rules.judges[judge], (judge, principle, repeat)
        if registry.shows(config) == "all":
            found[place] = _of_ranks(heard.ranks.get(asked, {}), pair, config, answers)
        else:
            lines = _lines(judge, principle, heard, rules, rubrics)
            found[place] = _of_scores(heard.scores.get(asked, {}), pair, config, lines, answers)
    return {place: one for place, one in sorted(found.items()) if one is not None}


def _of_pair(
    uses: Mapping[str, UseRow], order: str, config: Any, answers: Mapping[bytes, Completion]
) -> Found | None:
    """A judge that reasons first is unscored where its reasoning came to nothing: it is then not
    asked to score.
    """
    judged = uses.get("judge")
    if judged is not None:
        answer = answers.get(judged.key)
        read = (
            None
            if answer is None
            else human.parse(answer)
            if config.kind == "human"
            else (pairwise.parse(answer, order, config))
        )
        return None if read is None else _found(read, judged)
    reasoned = uses["reason"]
    answer = answers.get(reasoned.key)
    if answer is None:
        return None
    _, reason = pairwise.parse_reasoning(answer)
    return None if reason is None else _found(pairwise.unscored(reason, answer), reasoned)


def _found(verdict: Verdict, use: UseRow) -> Found:
    return Found(verdict, use.key.hex(), (use.key.hex(),))


def _lines(
    judge: str, principle: str, heard: Heard, rules: Rules, rubrics: Mapping[str, Any]
) -> list[rubric.Criterion]:
    """The criteria of a rubric judge: the prompt's own, or the principle's fault as a pitfall."""
    if rules.judges[judge].kind != "rubric":
        return []
    own = rubrics.get(heard.rubric_of.get(judge, ""))
    return (
        [rubric.Criterion(text, points) for text, points in own]
        if own
        else [rubric.Criterion(principle, -1.0)]
    )


def read_score(use: UseRow, config: Any, answers: Mapping[bytes, Completion]) -> Score | None:
    """What one answer got, or None while it is awaited."""
    answer = answers.get(use.key)
    return None if answer is None else registry.module(config.kind).parse(answer, config)


def _of_scores(
    samples: Mapping[int, Mapping[int, UseRow]],
    pair: Pair,
    config: Any,
    lines: Sequence[rubric.Criterion],
    answers: Mapping[bytes, Completion],
) -> Found | None:
    a, b = ([samples.get(i, {}).get(line) for line in range(len(lines) or 1)] for i in pair)
    if None in a or None in b:
        return None
    scores = [[read_score(use, config, answers) for use in side] for side in (a, b)]
    if None in scores[0] or None in scores[1]:
        return None
    if config.kind == "pointwise":
        verdict = pointwise.verdict(scores[0][0], scores[1][0])
    elif config.kind == "rubric":
        verdict = rubric.verdict(scores[0], scores[1], lines)
    else:
        verdict = registry.module(config.kind).verdict(scores[0][0], scores[1][0], config)
    return Found(verdict, "", tuple(use.key.hex() for use in (*a, *b)))


def _of_ranks(
    ranks: Mapping[int, UseRow], pair: Pair, config: Any, answers: Mapping[bytes, Completion]
) -> Found | None:
    rankings, calls = [], []
    for number in range(config.permutations):
        use = ranks.get(number)
        answer = answers.get(use.key) if use else None
        shown = shown_of(use) if use else ()
        if answer is None or not set(pair) <= set(shown):
            return None
        rankings.append(listwise.parse(answer, shown))
        calls.append(use.key.hex())
    return Found(listwise.verdict(rankings, *pair), "", tuple(calls))


def shown_of(use: UseRow) -> tuple[int, ...]:
    """The samples' indices in the order in which a ranking judge was shown them."""
    return tuple(map(int, use.order.split(",")))


def readings(found: Mapping[Place, Found], rules: Rules) -> list[panel.Reading]:
    """One reading a judge and principle, the principles in their constitution's order (what needs
    none comes first).
    """
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for (principle, judge, _, _), one in found.items():
        groups.setdefault((principle, judge), []).append(one.verdict)
    ordered = sorted(
        groups, key=lambda place: (rules.positions.get(place[0], 0) if place[0] else -1, place)
    )
    return [
        panel.combine_orders(
            groups[principle, judge],
            rules.weights.get(principle, 1.0) * rules.judges[judge].weight,
            principle,
            judge,
        )
        for principle, judge in ordered
    ]


def name_of(prompt: str, pair: Pair, place: Place, found: Found, rules: Rules) -> str:
    """The id of a verdict: of the comparison, the place, the calls it stands on, and how they were
    read.
    """
    principle, judge, repeat, order = place
    version = registry.version(rules.judges[judge])
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
) -> tuple[Preference, list[panel.Reading]] | None:
    """What the verdicts at these places say together, and their readings; None while one of them is
    awaited.
    """
    if not places or not places <= found.keys():
        return None
    said = readings({place: one for place, one in found.items() if place in places}, rules)
    return panel.decide(said, rules.rule, prompt, *pair), said
