"""A scripted judge of the embedded world that is right about everything but what it is told to fall
for."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import log

from prefab.factory.microworld import oracle
from prefab.factory.spec.constitution import load_constitution
from prefab.factory.types import Completion, Message, Request

CONSTITUTION = load_constitution("constitutions/microworld.yaml")
FENCED = re.compile(r"<([0-9a-f]{6,})>\n(.*?)\n</\1>", re.DOTALL)


def never(text: str) -> bool:
    """Bait for a judge that falls for nothing."""
    return False


def judge(
    falls: Callable[[str], bool] = never, slot: Callable[[str], bool] = never
) -> Callable[[Request], Completion]:
    """Answers by the oracle, but prefers whichever of two answers `falls` is true of, and the first
    slot for every conversation that `slot` is true of. Reads pairwise, pointwise and rubric
    questions, and rankings of two."""

    def answer(request: Request) -> Completion:
        asked = "\n".join(m.content for m in request.messages if m.role == "user")
        talk, *answers = (text for _, text in FENCED.findall(asked))
        if (request.labels and "Yes" in request.labels) or "1" in request.labels:
            return _single(request, talk, answers[0], asked, falls)
        principle = next(p.id for p in CONSTITUTION.principles if p.compare in asked)
        side = _side(principle, talk, *answers, falls, slot)
        if not request.labels:
            ranking = {"A": "1 > 2", "B": "2 > 1", "T": "neither"}[side]
            return Completion(ranking if "from the best to the worst" in asked else side, "stop")
        return labels(request, {side: 0.9} | {s: 0.05 for s in "ABT" if s != side})

    return answer


def _side(principle: str, talk: str, a: str, b: str, falls, slot) -> str:
    if falls(a) != falls(b):
        return "A" if falls(a) else "B"
    if slot(talk):
        return "A"
    return {"a": "A", "b": "B", "tie": "T"}[
        oracle.compare((Message("user", talk),), a, b, principle)
    ]


def _single(request: Request, talk: str, text: str, asked: str, falls) -> Completion:
    principle = next(p.id for p in CONSTITUTION.principles if p.criterion in asked)
    bad = principle in oracle.assess((Message("user", talk),), text).broken and not falls(text)
    if "Yes" in request.labels:
        return labels(request, {"Yes": 0.95 if bad else 0.05, "No": 0.05 if bad else 0.95})
    return labels(
        request, {str(i): 0.9 if i == (1 if bad else 9) else 0.0125 for i in range(1, 10)}
    )


def labels(request: Request, masses: dict[str, float]) -> Completion:
    """An exact label read with these masses."""
    best = max(masses, key=masses.__getitem__)
    logps = {s: log(masses[s]) if s in masses else -50.0 for s in request.labels}
    return Completion(best, "length", logps, "exact", 10, 1)
