"""The embedded world with scripted judges of known faults: so right, so unsure, so drawn to the
first slot."""

from __future__ import annotations

import random
import re
from hashlib import blake2b
from math import exp, log
from pathlib import Path
from typing import Any

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.microworld import grammar, oracle
from prefab.factory.spec.constitution import load_constitution
from prefab.factory.types import Completion, Message, Request

CONSTITUTION = load_constitution("constitutions/microworld.yaml")
FENCED = re.compile(r"<([0-9a-f]{6,})>\n(.*?)\n</\1>", re.DOTALL)


def seeded(*words: object) -> random.Random:
    """The same words, the same random numbers, in every process."""
    return random.Random(
        int.from_bytes(blake2b(repr(words).encode(), digest_size=8).digest(), "big")
    )


def policy(request: Request) -> Completion:
    """On topic, and with one or two vices half of the time."""
    rng = seeded(request.messages[-1].content, request.repeat)
    verb, obj = oracle.topic(request.messages)
    parts = [grammar.help_sentence(rng, verb, obj)] if verb and rng.random() < 0.8 else []
    vices = rng.sample(sorted(grammar.VICES), rng.choice((0, 0, 1, 2)))
    parts += [grammar.phrase(rng, vice, obj or "a lamp").text for vice in vices]
    return Completion(" ".join(parts) or "Yes.", "stop", None, "exact", 5, 9)


def judge(
    name: str,
    right: float = 0.9,
    first: float = 0.0,
    sure: float = 0.9,
    mean: bool = False,
    pull: float = 0.0,
):
    """Right on a share of questions and else on the other side (`mean`: with its answers turned
    round), drawn to the first slot on another share, with `sure` of the mass on what it says (less
    where it errs), and `pull` (in log-odds) more on the first slot."""

    def answer(request: Request) -> Completion:
        if not request.labels:
            return policy(request)
        asked = "\n".join(m.content for m in request.messages if m.role == "user")
        talk, a, b = (text for _, text in FENCED.findall(asked))
        principle = next(p.id for p in CONSTITUTION.principles if p.compare in asked)
        gold = oracle.compare((Message("user", talk),), a, b, principle)
        rng = seeded(name, talk, min(a, b), max(a, b), principle)
        errs, drawn = rng.random() > right, rng.random() < first
        side = {"a": "A", "b": "B", "tie": "T"}[gold]
        if errs or mean:
            side = {"A": "B", "B": "A", "T": "T"}[side]
        side = "A" if drawn else side
        mass = sure - 0.3 * rng.random() * errs
        masses = {label: mass if label == side else (1 - mass) / 2 for label in "ABT"}
        masses["A"] *= exp(pull)
        masses = {label: m / sum(masses.values()) for label, m in masses.items()}
        logps = {
            label: log(masses[label]) if label in masses else -50.0 for label in request.labels
        }
        return Completion(side, "length", logps, "exact", 20, 1)

    return answer


def pipeline(
    folder: Path, judges: dict[str, dict[str, Any]], prompts: int = 40, **changes: Any
) -> tuple[dict[str, Any], dict[str, Scripted]]:
    """A pipeline over the embedded world with these judges, and its engines."""
    engines = {
        name: Scripted(ScriptedConfig(model=name), judge(name, **how))
        for name, how in judges.items()
    }
    value = {
        "recipe": "rlaif",
        "name": "world",
        "store": str(folder / "store"),
        "constitution": "constitutions/microworld.yaml",
        "prompts": {"source": "microworld", "limit": prompts, "seed": 3},
        "engines": {name: {"engine": "scripted", "model": name} for name in judges},
        "policy": {
            "engine": next(iter(judges)),
            "samples": 3,
            "temperature": 1.0,
            "max_tokens": 64,
        },
        "panel": {
            "judges": [{"name": name, "kind": "pairwise", "engine": name} for name in judges]
        },
        "pairs": "adjacent",
        **changes,
    }
    return value, engines
