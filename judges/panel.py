"""Which pairs are compared, under which principles, and in which orders."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from itertools import combinations, pairwise
from math import log
from typing import Literal

from prefab.factory.types import Order, Principle


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


def _uniform(text: str, context: blake2b = blake2b(digest_size=8)) -> float:  # noqa: B008
    """A number strictly between 0 and 1, a function of the text (after what `context` has hashed)
    alone.
    """
    state = context.copy()
    state.update(text.encode())
    return (int.from_bytes(state.digest(), "big") // 4096 + 0.5) / 2**52


def pairs(k: int, shape: Literal["all", "adjacent"] = "all") -> list[tuple[int, int]]:
    """Which of K answers are compared: every two, or each with the next one."""
    return list(combinations(range(k), 2) if shape == "all" else pairwise(range(k)))
