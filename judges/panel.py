"""Which comparisons are made under which principles, and what several readings of one say together.

A reading is one judge under one principle: the mean of both orders, un-swapped. Unscored is
carried, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations, pairwise
from math import exp, log, sqrt
from typing import Literal

from prefab.factory.types import Exactness, Order, Preference, Principle, UnscoredReason, Verdict

AGGREGATION_VERSION = 2
# of one principle in a sum of log-odds: two that are sure outweigh one that is surer still
SUREST = 0.99
_EPS = 1e-12  # 0.52 - 0.5 is a little more than 0.02 in floats; the margin is meant to be within
_WEAKEST: tuple[Exactness, ...] = ("exact", "bounds", "hard")


@dataclass(frozen=True, slots=True)
class Rule:
    """How readings become a preference. `lexicographic`: the first principle, in order, whose
    readings decide. `log_odds`: what principles say is added up as evidence, not averaged.
    """

    min_scored: float = 0.5
    tie_margin: float = 0.02
    lexicographic: bool = False
    log_odds: bool = False


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


def combine_orders(
    verdicts: Sequence[Verdict], weight: float = 1.0, principle: str = "", judge: str = ""
) -> Reading:
    """The mean of a comparison's verdicts: one an order (both speak of sample a), or one a repeat
    and order.

    Unscored when any of them is, with the first one's reason: half a reading leans to a slot.
    """
    exactness = max((v.exactness for v in verdicts), key=_WEAKEST.index, default="exact")
    unread = next((v for v in verdicts if v.p_a is None), None)
    if unread is not None or not verdicts:
        reason = unread.reason if unread else "transport"
        return Reading(None, 0.0, reason, weight, principle, judge, exactness)
    n = len(verdicts)
    p_a = sum(v.p_a for v in verdicts) / n
    tie = sum(v.tie_mass / v.mass if v.mass else v.tie_mass for v in verdicts) / n
    return Reading(p_a, tie, None, weight, principle, judge, exactness)


def decide(
    readings: Sequence[Reading], rule: Rule = Rule(), prompt: str = "", a: int = 0, b: int = 1
) -> Preference:
    """What the readings of `a` and `b` say together: the weighted mean (or the sum of log-odds),
    over at least `min_scored` of the weight. `spread` is the readings' weighted standard deviation
    about their mean.

    A tie lies within the margin of a half, or has most of its mass on tie under every principle:
    one that does not speak to a pair (of many, most do not) must not silence one that does.
    """
    if rule.lexicographic:
        return _first_decided(readings, rule, prompt, a, b)
    scored = [r for r in readings if r.p_a is not None and r.weight > 0]
    weight = sum(r.weight for r in scored)
    total = sum(r.weight for r in readings)
    exactness = max((r.exactness for r in scored), key=_WEAKEST.index, default="exact")
    if not scored or weight < rule.min_scored * total * (1 - _EPS):
        return Preference(
            prompt, a, b, "unscored", None, None, None, len(scored), len(readings), exactness
        )
    p = sum(r.weight * r.p_a for r in scored) / weight
    spread = sqrt(sum(r.weight * (r.p_a - p) ** 2 for r in scored) / weight)
    if rule.log_odds:
        p = _added_up(scored)
    outcome: Literal["a", "b", "tie"] = "a" if p > 0.5 else "b"
    if abs(p - 0.5) <= rule.tie_margin + _EPS or all(
        tie > 0.5 for tie in _tie_by_principle(scored)
    ):
        outcome = "tie"
    return Preference(
        prompt, a, b, outcome, p, max(p, 1.0 - p), spread, len(scored), len(readings), exactness
    )


def _added_up(scored: Sequence[Reading]) -> float:
    """The probability whose log-odds are the sum of the principles', each by its weight relative to
    their mean; judges of one principle are averaged first, since what they say is not
    independent.
    """
    sums: dict[str, list[float]] = {}
    for r in scored:
        total = sums.setdefault(r.principle, [0.0, 0.0])
        total[0] += r.weight * r.p_a
        total[1] += r.weight
    mean = sum(weight for _, weight in sums.values()) / len(sums)
    held = [
        (min(max(p / weight, 1 - SUREST), SUREST), weight / mean) for p, weight in sums.values()
    ]
    return 1 / (1 + exp(-sum(weight * log(p / (1 - p)) for p, weight in held)))


def _tie_by_principle(scored: Sequence[Reading]) -> list[float]:
    """The weighted mean share of mass on tie, over the judges of each principle."""
    sums: dict[str, list[float]] = {}
    for r in scored:
        total = sums.setdefault(r.principle, [0.0, 0.0])
        total[0] += r.weight * r.tie
        total[1] += r.weight
    return [tie / weight for tie, weight in sums.values()]


def identical(prompt: str = "", a: int = 0, b: int = 1) -> Preference:
    """The preference between equal texts: a tie by definition, which nobody is asked about."""
    return Preference(prompt, a, b, "tie", 0.5, 0.5, 0.0, 0, 0)


def _first_decided(
    readings: Sequence[Reading], rule: Rule, prompt: str, a: int, b: int
) -> Preference:
    """Ties fall through to the next principle; an unscored principle does not, since it might have
    decided.
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


def orders(
    mode: Literal["both", "random", "first"], seed: int, prompt_id: str, a: int, b: int
) -> tuple[Order, ...]:
    """The orders a comparison is asked in. `random` is drawn from its identity, so that a rerun
    asks the same.
    """
    if mode == "both":
        return ("ab", "ba")
    if mode == "random":
        return ("ab",) if _uniform(f"order\0{seed}\0{prompt_id}\0{a}\0{b}") < 0.5 else ("ba",)
    if mode == "first":
        return ("ab",)
    raise ValueError(f"orders must be both, random or first, not {mode!r}")


def applicable(principles: Iterable[Principle], tags: Iterable[str] = ()) -> list[Principle]:
    """The enabled principles that apply to a prompt with these tags."""
    tags = set(tags)
    return [
        p
        for p in principles
        if p.enabled and (not p.applies_when or not tags.isdisjoint(p.applies_when))
    ]


def draw(
    principles: Iterable[Principle],
    selection: Literal["sample_one", "all", "weighted", "lexicographic"],
    seed: int,
    prompt_id: str,
    samples: Iterable[int] = (),
    round: int = 0,
    tags: Iterable[str] = (),
) -> list[Principle]:
    """The principles that judge a comparison (or critique a sample in a round): one drawn, or all
    in their order.

    Drawn by (weighted) rendezvous hashing: adding, removing or disabling a principle moves only the
    draws that it wins, an edit of a text moves none, and a renamed principle keeps its draws by its
    first `formerly` id. The order of `samples` does not matter: one draw serves both orders and all
    judges.
    Source: Thaler and Ravishankar 1998; weights by -w / ln(u), Schindelhauer and Schomaker 2005.
    """
    choice = applicable(principles, tags)
    if selection in ("all", "lexicographic"):
        return choice
    if selection not in ("sample_one", "weighted"):
        raise ValueError(f"unknown selection {selection!r}")
    context = blake2b(
        f"{seed}\0{prompt_id}\0{','.join(map(str, sorted(samples)))}\0{round}\0".encode(),
        digest_size=8,
    )
    best: tuple[float, str] | None = None
    drawn: Principle | None = None
    for principle in choice:
        key = principle.formerly[0] if principle.formerly else principle.id
        score = _uniform(key, context)
        if selection == "weighted":
            if principle.weight <= 0:
                continue
            score = -principle.weight / log(score)
        if best is None or (score, key) > best:
            best, drawn = (score, key), principle
    return [] if drawn is None else [drawn]


def _uniform(text: str, context=blake2b(digest_size=8)) -> float:  # noqa: B008
    """A number strictly between 0 and 1 that only the text (after what `context` has hashed)
    decides.
    """
    state = context.copy()
    state.update(text.encode())
    return (int.from_bytes(state.digest(), "big") // 4096 + 0.5) / 2**52


def pairs(
    k: int,
    shape: Literal["all", "best_worst", "adjacent"] = "all",
    scores: Sequence[float | None] | None = None,
) -> list[tuple[int, int]]:
    """Which of K answers are compared: every two, or by their scores (pointwise, or `win_rates`)
    the best with the worst, or each with the next one down. Unscored answers are left out of the
    latter two.

    Raises: ValueError: best_worst without scores. `adjacent` without scores takes the answers as
        they come.
    """
    if shape == "all":
        return list(combinations(range(k), 2))
    if shape == "best_worst" and scores is None:
        raise ValueError("best_worst needs scores: judge all pairs first, and give their win_rates")
    if shape not in ("adjacent", "best_worst"):
        raise ValueError(f"pairs must be all, best_worst or adjacent, not {shape!r}")
    ranked = list(range(k))
    if scores is not None:
        ranked = sorted((i for i in ranked if scores[i] is not None), key=lambda i: -scores[i])
    if shape == "adjacent":
        return list(pairwise(ranked))
    return [(ranked[0], ranked[-1])] if len(ranked) > 1 else []


def win_rates(k: int, preferences: Iterable[Preference]) -> list[float | None]:
    """Each answer's mean probability of winning its scored comparisons; None where it has none."""
    sums, counts = [0.0] * k, [0] * k
    for preference in preferences:
        if preference.p_a is None:
            continue
        for i, p in ((preference.a, preference.p_a), (preference.b, 1.0 - preference.p_a)):
            sums[i] += p
            counts[i] += 1
    return [s / n if n else None for s, n in zip(sums, counts, strict=False)]
