"""From uses and answers to the rows of the store: pure functions, so that the store can always be
made again.

The unit is one prompt of one run: all of its rows are derived together from all of its uses.
`Derived.open` says that some of its calls have no answer yet (or "prompt too long", which a wider
server may mend): it is derived again when more calls have arrived. Whatever the moments of filling,
the last one shows what a rebuild shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefab.factory import decision
from prefab.factory.keys import canonical, digest
from prefab.factory.ledger.records import RunRecord
from prefab.factory.spec.templates import critique_labels
from prefab.factory.steps import step_spans
from prefab.factory.thinking import policy_answer, split_thinking
from prefab.factory.types import LONGEST_TEXT, Completion, Constitution, Preference
from prefab.factory.uses import (
    CritiqueUse,
    DraftUse,
    IdenticalUse,
    RankUse,
    RevisionUse,
    ScoreUse,
    StepUse,
)
from prefab.judges import registry
from prefab.judges.base import Decoded, Judge, Pair, Ranking, RubricLines, Score
from prefab.judges.kinds import critique
from prefab.pipelines.store import verdicts
from prefab.pipelines.store.calibrations import Learned
from prefab.pipelines.store.verdicts import (
    NOT_ASKED,
    Found,
    Heard,
    Place,
    RecordedUse,
    Rules,
    calibrated,
)

VERSIONS = {
    **{f"parse.{kind}": registry.JUDGES[kind].PARSER_VERSION for kind in registry.JUDGES},
    "parse.critique": critique.PARSER_VERSION,
    "aggregate": decision.AGGREGATION_VERSION,
}
FITS = ("bradley_terry", "davidson")


Row = tuple[Any, ...]  # the values of one of the store's tables, in the order of its columns


@dataclass(slots=True)
class Derived:
    """Rows by table, in the order of the tables' columns."""

    samples: list[Row] = field(default_factory=list)
    critiques: list[Row] = field(default_factory=list)
    scores: list[Row] = field(default_factory=list)
    steps: list[Row] = field(default_factory=list)
    rankings: list[Row] = field(default_factory=list)
    verdicts: list[Row] = field(default_factory=list)
    preferences: list[Row] = field(default_factory=list)
    strengths: list[Row] = field(default_factory=list)
    open: bool = False


def rules(
    record: RunRecord, constitution: Constitution | None, learned: Learned | None = None
) -> Rules:
    """The rules of a run, from its resolved configuration, its constitution and the calibration
    that was learned for it.
    """
    config = record.config
    settings = config.get("panel") or {}
    judges = _judges(settings)
    readers = {name: canonical(judge.reading()).decode() for name, judge in judges.items()}
    rule = decision.rule_of(settings, constitution.selection if constitution else "all")
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
        learned if learned is not None and learned.fitted else None,
        critique_labels(record.texts.get("template critique", "")),
        (config.get("critic") or {}).get("min_label_mass", 0.5),
        (config.get("steps") or {}).get("by", "line"),
    )


def _judges(panel: Mapping[str, Any]) -> dict[str, Judge[Any]]:
    """The judges of a panel by name; those of other packages that are not here are left out."""
    return {
        judge["name"]: registry.judge_of(registry.JUDGES[kind].Config.model_validate(judge))
        for judge in panel.get("judges", ())
        if (kind := judge.get("kind", "pairwise")) in registry.JUDGES
    }


def derive(
    prompt: str,
    uses: Sequence[RecordedUse],
    answers: Mapping[bytes, Completion],
    rules: Rules,
    rubrics: Mapping[str, RubricLines] = {},
) -> Derived:
    """All rows of one prompt in one run. `rubrics` by the names under which its scores were
    asked.
    """
    derived, decoded = Derived(), []
    for recorded in verdicts.latest(uses):
        use, call, answer = recorded.use, recorded.key.hex(), answers.get(recorded.key)
        judge = rules.judges.get(use.judge)
        value = judge.decode(use, answer) if judge and answer else None
        decoded.append(Decoded(use, value, call))
        if isinstance(use, NOT_ASKED):
            continue
        derived.open |= answer is None or answer.finish == "context"
        if answer is None:
            continue
        if isinstance(use, CritiqueUse):
            derived.critiques.append(_critique(use, call, answer, rules))
        elif isinstance(use, DraftUse | RevisionUse):
            derived.samples.append(_sample(use, call, answer, rules))
        elif isinstance(use, RankUse) and isinstance(value, Ranking):
            derived.rankings.append(_ranking(use, call, value, rules))
    heard = verdicts.gather(decoded)
    _scores(prompt, heard, rules, rubrics, derived)
    _steps(decoded, rules, derived)
    identical = _identical(prompt, decoded, derived, rules)
    for pair in heard.principles:
        if pair in identical:
            continue
        _compare(prompt, pair, heard, rules, rubrics, derived)
    if rules.fit and not derived.open:
        derived.strengths = _strengths(prompt, derived.preferences, rules)
    return derived


def _identical(
    prompt: str, decoded: Iterable[Decoded], derived: Derived, rules: Rules
) -> set[tuple[int, int]]:
    """Derive the preferences of pairs that were recorded as identical, and give these pairs. Where
    a sample was forgotten and asked again, so that its text is another one, the pair is none of
    them.
    """
    texts = {row[_INDEX]: row[_TEXT] for row in derived.samples}
    pairs = [one.use.pair for one in decoded if isinstance(one.use, IdenticalUse)]
    same = [(a, b) for a, b in pairs if texts.get(a) == texts.get(b)]
    for pair in same:
        equal = decision.identical(prompt, *pair)
        derived.preferences.append(_preference(equal, (), rules, identical=True))
    return set(same)


_INDEX, _TEXT = 3, 7  # of a row of `samples`


def _sample(use: DraftUse | RevisionUse, call: str, answer: Completion, rules: Rules) -> Row:
    if isinstance(use, RevisionUse):
        revision = critique.parse_revision(answer)
        text, reason, parent, round = revision.text, revision.reason, use.parent, use.round
    else:
        text, _, reason = policy_answer(answer)
        parent, round = -1, 0
    name = digest("sample", use.prompt, str(use.sample), str(parent), call)
    return (
        name,
        rules.run,
        use.prompt,
        use.sample,
        parent,
        round,
        use.principle,
        text,
        answer.finish,
        reason,
        call,
        _thinking(answer),
        None,
    )


def _thinking(answer: Completion) -> str | None:
    if len(answer.text) > LONGEST_TEXT:
        return None
    return split_thinking(answer.text).thinking or None


def _critique(use: CritiqueUse, call: str, answer: Completion, rules: Rules) -> Row:
    read = critique.parse_critique(
        answer,
        use.prompt,
        use.sample,
        use.principle,
        rules.critique_labels,
        rules.critique_mass,
    )
    name = digest(
        "critique",
        use.prompt,
        str(use.sample),
        use.principle,
        str(use.round),
        call,
        str(critique.PARSER_VERSION),
    )
    return (
        name,
        rules.run,
        use.prompt,
        use.sample,
        use.principle,
        use.round,
        read.fault,
        read.reason,
        read.text,
        call,
        _thinking(answer),
        read.p_fault,
        read.mass,
        read.exactness,
    )


def _ranking(use: RankUse, call: str, read: Ranking, rules: Rules) -> Row:
    name = digest(
        "ranking",
        use.prompt,
        use.principle,
        use.judge,
        str(use.repeat),
        str(use.permutation),
        ",".join(map(str, use.shown)),
        call,
        str(rules.judges[use.judge].PARSER_VERSION),
    )
    return (
        name,
        rules.run,
        use.prompt,
        use.principle,
        use.judge,
        use.repeat,
        use.permutation,
        use.shown,
        read.order,
        read.reason,
        call,
    )


def _scores(
    prompt: str, heard: Heard, rules: Rules, rubrics: Mapping[str, RubricLines], derived: Derived
) -> None:
    """What each answer got from the judges that read one at a time."""
    for (judge, principle, repeat), some in heard.answers.items():
        own = rubrics.get(heard.rubric_of.get(judge, "")) if not principle else None
        for one in some:
            read, use = one.value, one.use
            if not (isinstance(read, Score) and isinstance(use, ScoreUse)):
                continue
            sample, line = use.sample, use.line
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


def _steps(decoded: Iterable[Decoded], rules: Rules, derived: Derived) -> None:
    """What the judges say of each step of the answers."""
    texts = {row[_INDEX]: row[_TEXT] for row in derived.samples}
    spans: dict[int, list[tuple[int, int]]] = {}
    for one in decoded:
        use, read = one.use, one.value
        if not (isinstance(use, StepUse) and isinstance(read, Score)):
            continue
        text = texts.get(use.sample) or ""
        if use.sample not in spans:
            spans[use.sample] = step_spans(text, rules.steps)
        span = next(iter(spans[use.sample][use.step : use.step + 1]), None)
        judge = rules.judges[use.judge]
        reward = judge.reward(read)
        place = (use.prompt, str(use.sample), str(use.step), use.principle, use.judge)
        read_by = (rules.readers[use.judge], str(judge.PARSER_VERSION))
        derived.steps.append(
            (
                digest("step", *place, str(use.repeat), one.call, *read_by),
                rules.run,
                use.prompt,
                use.sample,
                use.step,
                text[slice(*span)] if span else None,
                use.principle,
                use.judge,
                use.repeat,
                None if reward is None else (reward + 1.0) / 2.0,
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
    rubrics: Mapping[str, RubricLines],
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
    derived.preferences.append(
        _preference(decided[0], counted, rules, decided[1], escalation=escalation)
    )


def _verdict(name: str, prompt: str, pair: Pair, place: Place, found: Found, rules: Rules) -> Row:
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


def _strengths(prompt: str, preferences: Sequence[Row], rules: Rules) -> list[Row]:
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


def decided_by(rules: Rules, learned: Learned | None) -> tuple[str, ...]:
    """What makes a preference of its verdicts, for its id: the rule, and the calibration if any."""
    words = repr(rules.rule), str(decision.AGGREGATION_VERSION)
    return (*words, learned.kind, learned.calibration.rule) if learned else words


def preference_id(
    prompt: str, a: int, b: int, verdicts: Iterable[str], decided: Iterable[str]
) -> str:
    """The id of a preference: of the comparison, the verdicts it stands on, and `decided_by`."""
    return digest("preference", prompt, str(a), str(b), *verdicts, *decided)


def _preference(
    p: Preference,
    verdicts: Sequence[str],
    rules: Rules,
    readings: Sequence[decision.Reading] = (),
    identical: bool = False,
    escalation: str | None = None,
) -> Row:
    share, p = p.p_chosen, calibrated(p, readings, rules)
    learned = rules.learned if readings else None
    name = preference_id(p.prompt, p.a, p.b, verdicts, decided_by(rules, learned))
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
        share,
        learned.kind if learned and p.p_a is not None else None,
    )
