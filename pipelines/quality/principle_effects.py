"""What each principle of a constitution does in a run: a report from stored verdicts alone.

Nothing is asked. A principle's rating of a comparison is the weighted mean of the judges that were
asked under it. Intervals are 95%, over the prompts' groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefab.factory import decision
from prefab.factory.stats import Estimate, clustered_share, undefined
from prefab.judges.stats import judge_metrics
from prefab.judges.stats.aggregate import mean_probability
from prefab.pipelines.quality.agreement import UnscoredError
from prefab.pipelines.quality.rating_matrix import RatingMatrix, load_matrix
from prefab.pipelines.store.ground_truth import find_gold
from prefab.pipelines.store.selection import Selection, select

if TYPE_CHECKING:
    from prefab.judges.stats.rating_table import FloatArray

MET = 20  # comparisons under both principles, before they are called the same or contrary
SAME = 0.8  # the lower bound of `together` from which two principles say the same
_EPS = 1e-12


@dataclass(slots=True)
class PrincipleEffect:
    """One principle in a run.

    Attributes:
        comparisons: Judged under it; `scored` of these could be read.
        decisive: Share of the scored in which it names a winner.
        strength: Mean of |2 P(a) - 1| over the scored: 0 undecided, 1 certain.
        position_consistency: Share with the same winner in both orders.
        flips: Share of comparisons, judged under other principles too, whose outcome changes when
            it is left out. `alone`: comparisons judged under no other principle.
        accuracy: Share of its winners that are those of the gold labels about this principle.
        overall: The same with gold labels of the better answer over all.
        faults: Share of critiques under it that name a fault.
    """

    principle: str
    title: str
    comparisons: int = 0
    scored: int = 0
    decisive: Estimate = field(default_factory=lambda: undefined("not applied"))
    strength: float | None = None
    position_consistency: Estimate = field(default_factory=lambda: undefined("not applied"))
    flips: Estimate = field(default_factory=lambda: undefined("not applied"))
    alone: int = 0
    accuracy: Estimate = field(default_factory=lambda: undefined("not applied"))
    overall: Estimate = field(default_factory=lambda: undefined("not applied"))
    critiques: int = 0
    faults: Estimate = field(default_factory=lambda: undefined("no critiques"))


@dataclass(slots=True)
class PrinciplePair:
    """Two principles on the comparisons that were judged under both.

    Attributes:
        comparisons: Scored under both.
        decided: Of these, where both name a winner.
        agree: Share of `decided` with the same winner.
        together: Of the comparisons in which either names a winner, the share in which both name
            the same.
        relation: `same` where the lower bound of `together` is at least 0.8, `contrary` where the
            upper bound of `agree` is below 0.5, each from 20 comparisons on; else empty.
    """

    first: str
    second: str
    comparisons: int
    decided: int
    agree: Estimate
    together: Estimate
    relation: str = ""


@dataclass(slots=True)
class UnseparatedPrompt:
    """A prompt none of whose comparisons any principle separates."""

    prompt: str
    text: str
    comparisons: int


@dataclass(slots=True)
class PrincipleReport:
    """The principles of a run's constitution.

    Attributes:
        gold: Where the gold labels come from; empty without any.
        separated: Share of comparisons in which some principle names a winner.
        unseparated: Prompts without such a comparison; all of them, `n_unseparated`, are counted.
    """

    run: str
    gold: str
    comparisons: int
    prompts: int
    selection: str
    principles: list[PrincipleEffect]
    pairs: list[PrinciplePair]
    separated: Estimate
    n_unseparated: int
    unseparated: list[UnseparatedPrompt]

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def principle_effects(
    store: str | Path, run: str = "", gold: str = "auto", examples: int = 10
) -> PrincipleReport:
    """How often each principle of a run was applied, and what it did. Asks nothing.

    Args:
        store: The store.
        run: NAME or NAME@VERSION; default: the latest run.
        gold: Gold labels to compare with: `human`, `oracle` (embedded world only), `none`, or
            `auto` for the first of these that exists.
        examples: Prompts without a separated comparison to list.

    Raises:
        ConfigError: There is no such run, or it has no verdicts.
        UnscoredError: No verdict of the run could be read.
    """
    selection = select(Path(store), run)
    data, source = load_matrix(selection, gold)
    if np.isnan(data.p).all():
        raise UnscoredError(f"{selection.name}: none of its verdicts could be read")
    ratings = _Ratings.of(data)
    known = _constitution(selection)
    effects = [
        _effect(name, title, selection, data, ratings, gold) for name, title in known.items()
    ]
    _leave_out(effects, selection, data)
    _add_critiques(effects, selection)
    separated, lost = _coverage(data, ratings)
    return PrincipleReport(
        selection.name,
        source,
        len(separated),
        int(data.prompts.max()) + 1,
        _rule(selection)[1],
        effects,
        _pairs(list(known), data, ratings),
        clustered_share([hit for hit, _ in separated.values()], [g for _, g in separated.values()]),
        len(lost),
        _texts(selection, lost, examples),
    )


def _constitution(selection: Selection) -> dict[str, str]:
    """The titles of all principles of the run's constitution, and of those that it no longer
    has.
    """
    sql = "SELECT principle, title FROM principles WHERE constitution = $constitution ORDER BY position"
    found: dict[str, str] = dict(selection.query(sql).iter_rows())
    asked = selection.query("SELECT DISTINCT principle FROM verdicts WHERE run = $run ORDER BY ALL")
    return found | {name: "" for name in asked["principle"] if name not in found}


@dataclass(slots=True)
class _Ratings:
    """Of each comparison under a principle: the judges' mean P(a), and the winner (1 a, 0 b, 0.5
    neither); NaN where unscored. Shape: N.
    """

    p: FloatArray
    winner: FloatArray

    @classmethod
    def of(cls, data: RatingMatrix) -> _Ratings:
        p = mean_probability(data.p, data.weights).p
        tie = mean_probability(data.tie, data.weights).p
        even = (np.abs(p - 0.5) <= data.tie_margin + _EPS) | (tie > 0.5)
        winner = np.where(np.isnan(p), np.nan, np.where(even, 0.5, np.where(p > 0.5, 1.0, 0.0)))
        return cls(p, winner)


def _effect(
    name: str,
    title: str,
    selection: Selection,
    data: RatingMatrix,
    ratings: _Ratings,
    gold: str,
) -> PrincipleEffect:
    import polars as pl

    here = (data.items["principle"] == name).to_numpy()
    found = PrincipleEffect(name, title, int(here.sum()))
    if not found.comparisons:
        return found
    some, p, winner = data.take(here), ratings.p[here], ratings.winner[here]
    scored = ~np.isnan(winner)
    found.scored = int(scored.sum())
    found.decisive = clustered_share(winner[scored] != 0.5, some.groups[scored])
    found.strength = float(np.abs(2 * p[scored] - 1).mean()) if found.scored else None
    n_judges = len(data.judges)
    found.position_consistency = judge_metrics.position_consistency(
        some.won_ab.ravel(), some.won_ba.ravel(), np.repeat(some.groups, n_judges)
    )
    found.accuracy = judge_metrics.accuracy(winner, some.gold, some.groups)
    if name:
        whole, _ = find_gold(selection, some.items.with_columns(principle=pl.lit("")), gold)
        found.overall = judge_metrics.accuracy(winner, whole, some.groups)
    return found


def _rule(selection: Selection) -> tuple[decision.Rule, str]:
    """How the run's readings become a preference, and its selection of principles."""
    settings = selection.config.get("panel") or {}
    sql = "SELECT selection FROM constitutions WHERE constitution = $constitution"
    rows = selection.query(sql)["selection"]
    chosen = settings.get("selection") or (rows[0] if len(rows) else "all")
    return decision.rule_of(settings, chosen), chosen


_WEIGHTS = "SELECT principle, weight FROM principles WHERE constitution = $constitution"


def _leave_out(
    effects: Sequence[PrincipleEffect], selection: Selection, data: RatingMatrix
) -> None:
    """For each principle the share of outcomes that change without its readings."""
    weights = dict(selection.query(_WEIGHTS).iter_rows())
    order = {effect.principle: i for i, effect in enumerate(effects)}
    rule, strong = _rule(selection)[0], _strong(selection)
    groups, readings = _readings(data, weights, strong)
    flips: dict[str, list[tuple[bool, int]]] = {name: [] for name in order}
    for place, here in readings.items():
        here.sort(key=lambda reading: order[reading.principle])
        outcome = decision.decide(here, rule).outcome
        for name in {reading.principle for reading in here}:
            rest = [reading for reading in here if reading.principle != name]
            if rest:
                changed = decision.decide(rest, rule).outcome != outcome
                flips[name].append((changed, groups[place]))
            else:
                effects[order[name]].alone += 1
    for effect in (effect for effect in effects if effect.comparisons):
        found = flips[effect.principle]
        effect.flips = clustered_share([hit for hit, _ in found], [group for _, group in found])
        if not found:
            effect.flips = undefined("no comparison was judged under another principle too")


def _strong(selection: Selection) -> set[str]:
    """Stronger judges whose word replaces that of the others where they were asked."""
    escalate = (selection.config.get("panel") or {}).get("escalate") or {}
    return set() if escalate.get("decides") == "all" else set(escalate.get("to", ()))


_Place = tuple[str, int, int]


def _readings(
    data: RatingMatrix, weights: dict[str, float], strong: set[str]
) -> tuple[dict[_Place, int], dict[_Place, list[decision.Reading]]]:
    """The readings of each comparison that count, and the comparison's group."""
    groups: dict[_Place, int] = {}
    found: dict[_Place, list[decision.Reading]] = {}
    rows = data.items.select("prompt", "a", "b", "principle").iter_rows()
    for i, (prompt, a, b, principle) in enumerate(rows):
        place = (prompt, a, b)
        groups[place] = int(data.groups[i])
        for j in np.flatnonzero(data.asked[i]):
            p, weight = data.p[i, j], weights.get(principle, 1.0) * float(data.weights[j])
            reading = (
                decision.Reading(None, 0.0, "parse", weight, principle, data.judges[j])
                if np.isnan(p)
                else decision.Reading(
                    float(p), float(data.tie[i, j]), None, weight, principle, data.judges[j]
                )
            )
            found.setdefault(place, []).append(reading)
    for place, here in found.items():
        if any(reading.judge in strong for reading in here):
            found[place] = [reading for reading in here if reading.judge in strong]
    return groups, found


def _pairs(names: Sequence[str], data: RatingMatrix, ratings: _Ratings) -> list[PrinciplePair]:
    """Every two principles that judged comparisons in common; the related ones come first."""
    import polars as pl

    wide = (
        data.items.select("prompt", "a", "b", "principle")
        .with_columns(winner=pl.Series(ratings.winner), group=pl.Series(data.groups))
        .pivot(on="principle", index=["prompt", "a", "b", "group"], values="winner")
    )
    columns = {n: wide[n].fill_null(np.nan).to_numpy() for n in names if n in wide.columns}
    groups, found = wide["group"].to_numpy(), []
    for first, second in combinations(columns, 2):
        x, y = columns[first], columns[second]
        both = ~np.isnan(x) & ~np.isnan(y)
        if both.any():
            found.append(_pair(first, second, x[both], y[both], groups[both]))
    return sorted(found, key=lambda pair: (not pair.relation, -(pair.together.value or 0.0)))


def _pair(
    first: str, second: str, x: FloatArray, y: FloatArray, groups: np.ndarray
) -> PrinciplePair:
    decided, either = (x != 0.5) & (y != 0.5), (x != 0.5) | (y != 0.5)
    agree = clustered_share((x == y)[decided], groups[decided])
    together = clustered_share((decided & (x == y))[either], groups[either])
    relation = ""
    if int(decided.sum()) >= MET:
        relation = "same" if (together.low or 0.0) >= SAME else ""
        relation = "contrary" if agree.high is not None and agree.high < 0.5 else relation
    return PrinciplePair(first, second, len(x), int(decided.sum()), agree, together, relation)


def _coverage(
    data: RatingMatrix, ratings: _Ratings
) -> tuple[dict[_Place, tuple[bool, int]], dict[str, int]]:
    """Of each comparison whether some principle names a winner, with its group; and the number of
    comparisons of each prompt that has no separated one.
    """
    found: dict[_Place, tuple[bool, int]] = {}
    rows = data.items.select("prompt", "a", "b").iter_rows()
    for i, place in enumerate(rows):
        hit = ratings.winner[i] in (0.0, 1.0)
        found[place] = (hit or found.get(place, (False, 0))[0], int(data.groups[i]))
    prompts: dict[str, int] = {}
    for prompt, _, _ in found:
        prompts[prompt] = prompts.get(prompt, 0) + 1
    for (prompt, _, _), (hit, _) in found.items():
        if hit:
            prompts.pop(prompt, None)
    return found, prompts


def _texts(selection: Selection, lost: dict[str, int], examples: int) -> list[UnseparatedPrompt]:
    shown = sorted(lost)[:examples]
    sql = "SELECT prompt, text FROM prompts WHERE prompt IN (SELECT unnest($shown))"
    texts = dict(selection.query(sql, {"shown": shown}).iter_rows()) if shown else {}
    return [UnseparatedPrompt(name, texts.get(name) or "", lost[name]) for name in shown]


def _add_critiques(effects: Sequence[PrincipleEffect], selection: Selection) -> None:
    """How many critiques name a fault, by principle."""
    sql = """
SELECT c.principle, c.fault, coalesce(nullif(q."group", ''), c.prompt) AS "group"
FROM critiques c LEFT JOIN prompts q ON q.prompt = c.prompt
WHERE c.run = $run AND c.fault IS NOT NULL"""
    rows = selection.query(sql)
    for effect in effects:
        here = rows.filter(rows["principle"] == effect.principle)
        effect.critiques = here.height
        if here.height:
            effect.faults = clustered_share(here["fault"].to_numpy(), here["group"].to_numpy())
