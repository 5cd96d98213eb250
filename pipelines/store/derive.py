"""From uses and answers to the rows of the store: pure functions, so that the store can always be
made again.

The unit is one prompt of one run: all of its rows are derived together from all of its uses.
`Derived.open` says that some of its calls have no answer yet (or "prompt too long", which a wider
server may mend): it is derived again when more calls have arrived. Whatever the moments of filling,
the last one shows what a rebuild shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefab.factory.keys import canonical, digest
from prefab.factory.ledger.records import RunRecord
from prefab.factory.types import Completion, Constitution, Preference
from prefab.judges import panel, registry
from prefab.judges.base import Decoded, Ranking, Score
from prefab.judges.kinds import critique
from prefab.pipelines.store import verdicts
from prefab.pipelines.store.verdicts import NOT_ASKED, Found, Heard, Pair, Place, Rules, UseRow

VERSIONS = {
    **{f"parse.{kind}": registry.JUDGES[kind].PARSER_VERSION for kind in registry.JUDGES},
    "parse.critique": critique.PARSER_VERSION,
    "aggregate": panel.AGGREGATION_VERSION,
}
FITS = ("bradley_terry", "davidson")


@dataclass(slots=True)
class Derived:
    """Rows by table, in the order of the tables' columns."""

    samples: list[tuple] = field(default_factory=list)
    critiques: list[tuple] = field(default_factory=list)
    scores: list[tuple] = field(default_factory=list)
    rankings: list[tuple] = field(default_factory=list)
    verdicts: list[tuple] = field(default_factory=list)
    preferences: list[tuple] = field(default_factory=list)
    strengths: list[tuple] = field(default_factory=list)
    open: bool = False


def rules(record: RunRecord, constitution: Constitution | None) -> Rules:
    """The rules of a run, from its resolved configuration and its constitution."""
    config = record.config
    settings = config.get("panel") or {}
    judges = {
        judge["name"]: registry.judge_of(registry.JUDGES[kind].Config.model_validate(judge))
        for judge in settings.get("judges", ())
        if (kind := judge.get("kind", "pairwise")) in registry.JUDGES
    }
    readers = {name: canonical(judge.reading()).decode() for name, judge in judges.items()}
    selection = settings.get("selection") or (constitution.selection if constitution else "all")
    rule = panel.Rule(
        settings.get("min_scored", 0.5),
        settings.get("tie_margin", 0.02),
        selection == "lexicographic",
        settings.get("combine", "mean") == "log_odds",
    )
    principles = constitution.principles if constitution else ()
    escalate = settings.get("escalate") or {}
    return Rules(
        record.id,
        judges,
        readers,
        settings.get("orders", "both"),
        config.get("seed", 0),
        rule,
        {p.id: p.weight for p in principles},
        {p.id: i for i, p in enumerate(principles)},
        tuple(escalate.get("to", ())),
        escalate.get("decides") == "all",
        method if (method := (config.get("choose") or {}).get("method")) in FITS else "",
    )


def derive(
    prompt: str,
    uses: Sequence[UseRow],
    answers: Mapping[bytes, Completion],
    rules: Rules,
    rubrics: Mapping[str, Any] = {},
) -> Derived:
    """All rows of one prompt in one run. `rubrics` by the names under which its scores were
    asked.
    """
    derived, decoded = Derived(), []
    for use in sorted(verdicts.latest(uses), key=lambda use: use.rowid):
        answer = answers.get(use.key)
        judge = rules.judges.get(use.judge)
        value = judge.decode(use, answer) if judge and answer else None
        decoded.append(Decoded(use, value, use.key.hex()))
        if use.role == "identical":
            equal = panel.identical(prompt, use.sample, use.other)
            derived.preferences.append(_preference(equal, (), rules, identical=True))
        if use.role in NOT_ASKED:
            continue
        derived.open |= answer is None or answer.finish == "context"
        if answer is None:
            continue
        if use.role == "critique":
            derived.critiques.append(_critique(prompt, use, answer, rules))
        elif use.role in ("sample", "revise"):
            derived.samples.append(_sample(prompt, use, answer, rules))
        elif isinstance(value, Ranking):
            derived.rankings.append(_ranking(prompt, use, value, rules))
    heard = verdicts.gather(decoded)
    _scores(prompt, heard, rules, rubrics, derived)
    for pair in heard.principles:
        _compare(prompt, pair, heard, rules, rubrics, derived)
    if rules.fit and not derived.open:
        derived.strengths = _strengths(prompt, derived.preferences, rules)
    return derived


def _sample(prompt: str, use: UseRow, answer: Completion, rules: Rules) -> tuple:
    if use.role == "revise":
        revision = critique.parse_revision(answer)
        text, reason, parent = revision.text, revision.reason, use.other
    else:
        reason = answer.finish if answer.finish in ("context", "refused") else None
        text, parent = None if reason else answer.text, -1
    call = use.key.hex()
    name = digest("sample", prompt, str(use.sample), str(parent), call)
    return (
        name,
        rules.run,
        prompt,
        use.sample,
        parent,
        use.round,
        use.principle,
        text,
        answer.finish,
        reason,
        call,
    )


def _critique(prompt: str, use: UseRow, answer: Completion, rules: Rules) -> tuple:
    read = critique.parse_critique(answer, prompt, use.sample, use.principle)
    call = use.key.hex()
    name = digest(
        "critique",
        prompt,
        str(use.sample),
        use.principle,
        str(use.round),
        call,
        str(critique.PARSER_VERSION),
    )
    return (
        name,
        rules.run,
        prompt,
        use.sample,
        use.principle,
        use.round,
        read.fault,
        read.reason,
        read.text,
        call,
    )


def _ranking(prompt: str, use: UseRow, read: Ranking, rules: Rules) -> tuple:
    shown = tuple(map(int, use.order.split(",")))
    call = use.key.hex()
    name = digest(
        "ranking",
        prompt,
        use.principle,
        use.judge,
        str(use.repeat),
        str(use.round),
        use.order,
        call,
        str(rules.judges[use.judge].PARSER_VERSION),
    )
    return (
        name,
        rules.run,
        prompt,
        use.principle,
        use.judge,
        use.repeat,
        use.round,
        shown,
        read.order,
        read.reason,
        call,
    )


def _scores(
    prompt: str, heard: Heard, rules: Rules, rubrics: Mapping[str, Any], derived: Derived
) -> None:
    """What each answer got from the judges that read one at a time."""
    for (judge, principle, repeat), some in heard.answers.items():
        own = rubrics.get(heard.rubric_of.get(judge, "")) if not principle else None
        for one in some:
            read, sample, line = one.value, one.use.sample, one.use.round
            if not isinstance(read, Score):
                continue
            name = digest(
                "score",
                prompt,
                str(sample),
                principle,
                judge,
                str(repeat),
                str(line),
                one.call,
                rules.readers[judge],
                str(rules.judges[judge].PARSER_VERSION),
            )
            criterion, points = own[line] if own and line < len(own) else (None, None)
            derived.scores.append(
                (
                    name,
                    rules.run,
                    prompt,
                    sample,
                    principle,
                    judge,
                    repeat,
                    criterion,
                    points,
                    read.value,
                    read.reason,
                    read.mass,
                    read.exactness,
                    one.call,
                )
            )


def _compare(
    prompt: str,
    pair: Pair,
    heard: Heard,
    rules: Rules,
    rubrics: Mapping[str, Any],
    derived: Derived,
) -> None:
    """The verdicts of one comparison, and its preference if none that counts is still awaited."""
    found = verdicts.verdicts(prompt, pair, heard, rules, rubrics)
    names: dict[Place, str] = {}
    for place, one in found.items():
        names[place] = verdicts.name_of(prompt, pair, place, one, rules)
        derived.verdicts.append(_verdict(names[place], prompt, pair, place, one, rules))
    judges = verdicts.counted(pair, heard, rules)
    places = verdicts.expected(prompt, pair, heard, rules, judges or ())
    decided = verdicts.preference(prompt, pair, found, places, rules)
    if decided is None:
        derived.open |= bool(rules.judges)
        return
    counted = [name for place, name in names.items() if place in places]
    decision = heard.decisions.get(pair)
    escalation = (decision or "settled") if decision is not None and rules.strong else None
    derived.preferences.append(_preference(decided[0], counted, rules, escalation=escalation))


def _verdict(name: str, prompt: str, pair: Pair, place: Place, found: Found, rules: Rules) -> tuple:
    verdict = found.verdict
    principle, judge, repeat, order = place
    return (
        name,
        rules.run,
        prompt,
        *pair,
        principle,
        judge,
        order,
        repeat,
        verdict.p_a,
        verdict.winner,
        verdict.reason,
        verdict.mass,
        verdict.tie_mass,
        verdict.exactness,
        found.call or None,
    )


def _strengths(prompt: str, preferences: Sequence[tuple], rules: Rules) -> list[tuple]:
    """How strong each answer is, by a fit of all the prompt's scored comparisons: each counts as
    p_a of a win and the rest of a loss; for Davidson a tie is a tie. Why there is no fit stands in
    its place.
    """
    import numpy as np

    from prefab.judges.stats import aggregate

    met = [(row[3], row[4], row[5], row[8]) for row in preferences if row[8] is not None]
    answers = sorted({i for a, b, _, _ in met for i in (a, b)})
    place, k = {i: n for n, i in enumerate(answers)}, len(answers)
    wins, ties = np.zeros((k, k)), np.zeros((k, k))
    for a, b, outcome, p in met:
        i, j = place[a], place[b]
        if outcome == "tie" and rules.fit == "davidson":
            ties[i, j] += 1
            ties[j, i] += 1
        else:
            wins[i, j] += p
            wins[j, i] += 1 - p
    fit = (
        aggregate.davidson(wins, ties) if rules.fit == "davidson" else aggregate.bradley_terry(wins)
    )
    if fit.undefined:
        return [(rules.run, prompt, i, rules.fit, None, None, fit.undefined) for i in answers]
    return [
        (rules.run, prompt, i, rules.fit, float(fit.log_worth[n]), float(fit.se[n]), None)
        for i, n in place.items()
    ]


def _preference(
    p: Preference,
    verdicts: Sequence[str],
    rules: Rules,
    identical: bool = False,
    escalation: str | None = None,
) -> tuple:
    rule = rules.rule
    name = digest(
        "preference",
        p.prompt,
        str(p.a),
        str(p.b),
        *verdicts,
        repr(rule),
        str(panel.AGGREGATION_VERSION),
    )
    chosen, rejected = {"a": (p.a, p.b), "b": (p.b, p.a)}.get(p.outcome, (None, None))
    return (
        name,
        rules.run,
        p.prompt,
        p.a,
        p.b,
        p.outcome,
        chosen,
        rejected,
        p.p_a,
        p.p_chosen,
        p.spread,
        p.n_scored,
        p.n_readings,
        p.exactness,
        identical,
        escalation,
    )
