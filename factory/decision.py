"""How the readings of a pair become a preference.

A reading is one judge under one principle: the mean of both orders, both told as P(a is better). An
unscored reading stays unscored; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any, Literal

from prefab.factory.types import Exactness, Preference, UnscoredReason, Verdict

AGGREGATION_VERSION = 2
# of one principle in a sum of log-odds: two that are sure outweigh one that is surer still
SUREST = 0.99
_EPS = 1e-12  # 0.52 - 0.5 is a little more than 0.02 in floats; the margin is meant to be within


@dataclass(frozen=True, slots=True)
class Rule:
    """How readings become a preference. `lexicographic`: the first principle, in the constitution's
    order, whose readings decide. `log_odds`: the principles' log-odds are added up instead of
    averaging their probabilities.
    """

    min_scored: float = 0.5
    tie_margin: float = 0.02
    lexicographic: bool = False
    log_odds: bool = False


def rule_of(panel: Mapping[str, Any], selection: str) -> Rule:
    """The rule of a run with these settings of its panel. `selection` is the constitution's, used
    where the panel has none of its own.
    """
    return Rule(
        panel.get("min_scored", 0.5),
        panel.get("tie_margin", 0.02),
        (panel.get("selection") or selection) == "lexicographic",
        panel.get("combine", "mean") == "log_odds",
    )


@dataclass(frozen=True, slots=True)
class Reading:
    """One judge under one principle. Either `p_a` is set, with `tie` the share of the mass on tie,
    or `reason` is.
    """

    p_a: float | None
    tie: float = 0.0
    reason: UnscoredReason | None = None
    weight: float = 1.0
    principle: str = ""
    judge: str = ""
    exactness: Exactness = "exact"


def weakest(found: Iterable[Exactness]) -> Exactness:
    """The least exact of these; exact for none."""
    names = set(found)
    return "hard" if "hard" in names else "bounds" if "bounds" in names else "exact"


def combine_orders(
    verdicts: Sequence[Verdict], weight: float = 1.0, principle: str = "", judge: str = ""
) -> Reading:
    """The mean of a comparison's verdicts: one an order (both give P(a)), or one a repeat and
    order.

    Unscored when any of them is, with the first one's reason: half a reading would carry the
    judge's position bias.
    """
    exactness = weakest(v.exactness for v in verdicts)
    reason: UnscoredReason | None = None if verdicts else "transport"
    known: list[float] = []
    for verdict in verdicts:
        if verdict.p_a is None:
            reason = reason or verdict.reason
        else:
            known.append(verdict.p_a)
    if reason is not None:
        return Reading(None, 0.0, reason, weight, principle, judge, exactness)
    n = len(verdicts)
    p_a = sum(known) / n
    tie = sum(v.tie_mass / v.mass if v.mass else v.tie_mass for v in verdicts) / n
    return Reading(p_a, tie, None, weight, principle, judge, exactness)


def decide(
    readings: Sequence[Reading], rule: Rule = Rule(), prompt: str = "", a: int = 0, b: int = 1
) -> Preference:
    """The preference between `a` and `b`: the weighted mean of the readings (or the sum of
    log-odds), over at least `min_scored` of the weight. `spread` is the readings' weighted standard
    deviation about their mean.

    The rule for ties: the outcome is `tie` when the probability lies within `tie_margin` of a half,
    or when under every principle more than half of the mass (the weighted mean over its judges) is
    on the label tie. One principle with less is enough for a winner: of many principles most have
    nothing to say about a pair, and they must not outvote one that does.
    """
    if rule.lexicographic:
        return _first_decided(readings, rule, prompt, a, b)
    scored = scored_readings(readings)
    weight = sum(r.weight for r, _ in scored)
    total = sum(r.weight for r in readings)
    exactness = weakest(r.exactness for r, _ in scored)
    counts = len(scored), len(readings)
    if not scored or weight < rule.min_scored * total * (1 - _EPS):
        return Preference(prompt, a, b, "unscored", None, None, None, *counts, exactness)
    p = sum(r.weight * p_a for r, p_a in scored) / weight
    spread = sqrt(sum(r.weight * (p_a - p) ** 2 for r, p_a in scored) / weight)
    principles = by_principle(scored)
    if rule.log_odds:
        p = _added_up(principles)
    outcome: Literal["a", "b", "tie"] = "a" if p > 0.5 else "b"
    even = abs(p - 0.5) <= rule.tie_margin + _EPS
    if even or all(tie / weight > 0.5 for _, tie, weight in principles):
        outcome = "tie"
    return Preference(prompt, a, b, outcome, p, max(p, 1.0 - p), spread, *counts, exactness)


def scored_readings(readings: Sequence[Reading]) -> list[tuple[Reading, float]]:
    """The scored readings that have a weight, each with its probability."""
    return [(r, r.p_a) for r in readings if r.p_a is not None and r.weight > 0]


def by_principle(scored: Sequence[tuple[Reading, float]]) -> list[tuple[float, float, float]]:
    """For each principle the weighted sums, over its judges, of P(a) and of the share of mass on
    tie, and the sum of the weights.
    """
    sums: dict[str, list[float]] = {}
    for r, p_a in scored:
        total = sums.setdefault(r.principle, [0.0, 0.0, 0.0])
        for i, value in enumerate((p_a, r.tie, 1.0)):
            total[i] += r.weight * value
    return [(p, tie, weight) for p, tie, weight in sums.values()]


def _added_up(principles: Sequence[tuple[float, float, float]]) -> float:
    """The probability whose log-odds are the sum of the principles', each by its weight relative to
    their mean; judges of one principle are averaged first, since their readings are not
    independent.
    """
    mean = sum(weight for _, _, weight in principles) / len(principles)
    odds = 0.0
    for p, _, weight in principles:
        held = min(max(p / weight, 1 - SUREST), SUREST)
        odds += weight / mean * log(held / (1 - held))
    return 1 / (1 + exp(-odds))


def identical(prompt: str, a: int, b: int) -> Preference:
    """The preference between equal texts: a tie by definition, which no judge is asked about."""
    return Preference(prompt, a, b, "tie", 0.5, 0.5, 0.0, 0, 0)


def _first_decided(
    readings: Sequence[Reading], rule: Rule, prompt: str, a: int, b: int
) -> Preference:
    """A tie falls through to the next principle; an unscored principle does not, since it might
    have decided.
    """
    flat = Rule(rule.min_scored, rule.tie_margin, log_odds=rule.log_odds)
    by_principle: dict[str, list[Reading]] = {}
    for reading in readings:
        by_principle.setdefault(reading.principle, []).append(reading)
    preference = decide((), flat, prompt, a, b)
    for group in by_principle.values():
        preference = decide(group, flat, prompt, a, b)
        if preference.outcome != "tie":
            break
    return preference
