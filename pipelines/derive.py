"""From uses and answers to the rows of the store: pure functions, so that the store can always be made again.

The unit is one prompt of one run: all of its rows are derived together from all of its uses. `Derived.open` says that
some of its calls have no answer yet (or "prompt too long", which a wider server may mend): it is derived again when
more calls have arrived. Whatever the moments of filling, the last one shows what a rebuild shows.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from factory.keys import canonical, digest
from factory.recorded import RunRecord
from factory.types import Completion, Constitution, Preference, Verdict
from judges import critique, pairwise, panel

VERSIONS = {"parse.pairwise": pairwise.PARSER_VERSION, "parse.critique": critique.PARSER_VERSION,
            "aggregate": panel.AGGREGATION_VERSION}
Comparison = tuple[int, int]  # the indices of samples a and b
Place = tuple[str, str, int, str]  # principle, judge, repeat, order: where in a comparison's readings


@dataclass(slots=True)
class UseRow:
    """A use as the ledger keeps it, its names spelt out; `rowid` tells a later one from an earlier."""

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
    """What a run's configuration says about reading its answers."""

    run: int
    judges: dict[str, pairwise.Config]
    readers: dict[str, str]  # by judge: what of its configuration decides a verdict, for the verdict's id
    orders: str
    seed: int
    rule: panel.Rule
    weights: dict[str, float]
    positions: dict[str, int]


@dataclass(slots=True)
class Derived:
    """Rows by table, in the order of the tables' columns."""

    samples: list[tuple] = field(default_factory=list)
    critiques: list[tuple] = field(default_factory=list)
    verdicts: list[tuple] = field(default_factory=list)
    preferences: list[tuple] = field(default_factory=list)
    open: bool = False


def rules(record: RunRecord, constitution: Constitution | None) -> Rules:
    """The rules of a run, from its resolved configuration and its constitution."""
    config = record.config
    settings = config.get("panel") or {}
    judges = {judge["name"]: pairwise.Config.model_validate(judge) for judge in settings.get("judges", ())
              if judge.get("kind", "pairwise") == "pairwise"}
    readers = {name: canonical([judge.ties, judge.reasoning, judge.min_label_mass, judge.clamp]).decode()
               for name, judge in judges.items()}
    selection = settings.get("selection") or (constitution.selection if constitution else "all")
    rule = panel.Rule(settings.get("min_scored", 0.5), settings.get("tie_margin", 0.02), selection == "lexicographic")
    principles = constitution.principles if constitution else ()
    return Rules(record.id, judges, readers, settings.get("orders", "both"), config.get("seed", 0), rule,
                 {p.id: p.weight for p in principles}, {p.id: i for i, p in enumerate(principles)})


def derive(prompt: str, uses: Sequence[UseRow], answers: Mapping[bytes, Completion], rules: Rules) -> Derived:
    """All rows of one prompt in one run."""
    derived = Derived()
    comparisons: dict[Comparison, dict[Place, dict[str, UseRow]]] = {}
    for use in _latest(uses):
        answer = answers.get(use.key)
        derived.open |= use.role != "identical" and (answer is None or answer.finish == "context")
        if use.role in ("judge", "reason"):
            places = comparisons.setdefault((use.sample, use.other), {})
            places.setdefault((use.principle, use.judge, use.repeat, use.order), {})[use.role] = use
        elif use.role == "identical":
            derived.preferences.append(_preference(panel.identical(prompt, use.sample, use.other), (), rules, True))
        elif answer is None:
            continue
        elif use.role == "critique":
            derived.critiques.append(_critique(prompt, use, answer, rules))
        elif use.role in ("sample", "revise"):
            derived.samples.append(_sample(prompt, use, answer, rules))
    for (a, b), places in comparisons.items():
        _compare(prompt, a, b, places, answers, rules, derived)
    return derived


def _latest(uses: Sequence[UseRow]) -> list[UseRow]:
    """One use a place: where code changed under a run, what it asked last."""
    latest: dict[tuple, UseRow] = {}
    for use in uses:
        place = (use.role, use.sample, use.other, use.round, use.principle, use.judge, use.order, use.repeat)
        if place not in latest or latest[place].rowid < use.rowid:
            latest[place] = use
    return list(latest.values())


def _sample(prompt: str, use: UseRow, answer: Completion, rules: Rules) -> tuple:
    if use.role == "revise":
        revision = critique.parse_revision(answer)
        text, reason, parent = revision.text, revision.reason, use.other
    else:
        reason = answer.finish if answer.finish in ("context", "refused") else None
        text, parent = None if reason else answer.text, -1
    call = use.key.hex()
    name = digest("sample", prompt, str(use.sample), str(parent), call)
    return (name, rules.run, prompt, use.sample, parent, use.round, use.principle, text, answer.finish, reason, call)


def _critique(prompt: str, use: UseRow, answer: Completion, rules: Rules) -> tuple:
    read = critique.parse_critique(answer, prompt, use.sample, use.principle)
    call = use.key.hex()
    name = digest("critique", prompt, str(use.sample), use.principle, str(use.round), call,
                  str(critique.PARSER_VERSION))
    return (name, rules.run, prompt, use.sample, use.principle, use.round, read.fault, read.reason, read.text, call)


def _compare(prompt: str, a: int, b: int, places: Mapping[Place, Mapping[str, UseRow]],
             answers: Mapping[bytes, Completion], rules: Rules, derived: Derived) -> None:
    """The verdicts of one comparison, and its preference if none of them is still awaited."""
    verdicts: dict[Place, Verdict] = {}
    names: list[str] = []
    for place in sorted(places):
        principle, judge, repeat, order = place
        config = rules.judges.get(judge)
        if config is None:
            continue  # another kind of judge, whose scores are no verdicts
        read = _verdict(places[place], order, config, answers)
        if read is None:
            continue
        verdict, call = read
        name = digest("verdict", prompt, str(a), str(b), principle, judge, str(repeat), order, call,
                      rules.readers[judge], str(pairwise.PARSER_VERSION))
        verdicts[place] = verdict
        names.append(name)
        derived.verdicts.append((name, rules.run, prompt, a, b, *place[:2], order, repeat, verdict.p_a, verdict.winner,
                                 verdict.reason, verdict.mass, verdict.tie_mass, verdict.exactness, call))
    expected = _expected(prompt, a, b, {place[0] for place in places}, rules)
    if not expected or not expected <= verdicts.keys():
        derived.open |= bool(rules.judges)
        return
    preference = panel.decide(_readings(verdicts, rules), rules.rule, prompt, a, b)
    derived.preferences.append(_preference(preference, names, rules, False))


def _verdict(uses: Mapping[str, UseRow], order: str, config: pairwise.Config,
             answers: Mapping[bytes, Completion]) -> tuple[Verdict, str] | None:
    """The verdict at one place and the call it stands on; None while it is awaited.

    A judge that reasons first is unscored where its reasoning came to nothing: it is then not asked to score.
    """
    judged = uses.get("judge")
    if judged is not None:
        answer = answers.get(judged.key)
        return None if answer is None else (pairwise.parse(answer, order, config), judged.key.hex())
    reasoned = uses["reason"]
    answer = answers.get(reasoned.key)
    if answer is None:
        return None
    _, reason = pairwise.parse_reasoning(answer)
    return None if reason is None else (pairwise.unscored(reason, answer), reasoned.key.hex())


def _expected(prompt: str, a: int, b: int, principles: set[str], rules: Rules) -> set[Place]:
    """Every place that must be read before a preference is decided, under the principles that were asked about."""
    orders = panel.orders(rules.orders, rules.seed, prompt, a, b)
    return {(principle, name, repeat, order) for principle in principles for name, judge in rules.judges.items()
            for repeat in range(judge.repeats) for order in orders}


def _readings(verdicts: Mapping[Place, Verdict], rules: Rules) -> list[panel.Reading]:
    """One reading a judge and principle, the principles in their constitution's order."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for (principle, judge, _, _), verdict in verdicts.items():
        groups.setdefault((principle, judge), []).append(verdict)
    ordered = sorted(groups, key=lambda place: (rules.positions.get(place[0], 0), place))
    return [panel.read(groups[principle, judge], rules.weights.get(principle, 1.0) * rules.judges[judge].weight,
                       principle, judge) for principle, judge in ordered]


def _preference(p: Preference, verdicts: Sequence[str], rules: Rules, identical: bool) -> tuple:
    rule = rules.rule
    name = digest("preference", p.prompt, str(p.a), str(p.b), *verdicts, repr(rule), str(panel.AGGREGATION_VERSION))
    chosen, rejected = {"a": (p.a, p.b), "b": (p.b, p.a)}.get(p.outcome, (None, None))
    return (name, rules.run, p.prompt, p.a, p.b, p.outcome, chosen, rejected, p.p_a, p.p_chosen, p.spread, p.n_scored,
            p.n_readings, p.exactness, identical)
