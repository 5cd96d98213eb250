"""Decided pairs to audit a judge with, and who says which side is better: the oracle, a person, or
the judge itself.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import orjson

from prefab.factory.errors import ConfigError
from prefab.factory.tool_calls import stored_messages
from prefab.factory.types import Comparison, Principle, Prompt, Sample
from prefab.judges import bias_probes
from prefab.pipelines.config.loader import ResolvedPipeline
from prefab.pipelines.store.ground_truth import people

Side = Literal["a", "b"]


@dataclass(frozen=True, slots=True)
class Case:
    """A decided pair under one principle. `truth` is oracle, human or judge (the judge's own:
    `gold` is then None).
    """

    comparison: Comparison
    principle: Principle
    gold: Side | None
    truth: str


def cases(
    loaded: ResolvedPipeline,
    judge: Any,
    probes: Sequence[bias_probes.Probe],
    n: int,
    store: Path | None,
    run: str,
    seed: int,
) -> dict[bias_probes.Probe, list[Case]]:
    """The pairs of each probe, at most `n`, under the principles that it leaves alone. Raises:
    ConfigError.
    """
    if store is None and loaded.constitution.id == "microworld":
        plan = {
            probe: world_cases(loaded.constitution.principles, probe, n, seed) for probe in probes
        }
    else:
        from prefab.pipelines.store.export.base import find_run

        folder = Path(store or loaded.config.store)
        stored = stored_cases(
            folder, find_run(folder, run), loaded.constitution.principles, judge, seed
        )
        plan = {
            probe: list(islice((c for c in stored if bias_probes.allowed(probe, c.principle)), n))
            for probe in probes
        }
    if not any(plan.values()):
        raise ConfigError(
            "there is no decided pair to audit with: make some with `prefab run`, or name a store that has "
            "some with --store DIR"
        )
    return plan


def world_cases(
    principles: Sequence[Principle], probe: bias_probes.Probe, n: int, seed: int = 0
) -> list[Case]:
    """Pairs of the embedded world's test split, as many a principle as another, each side better as
    often.
    """
    from prefab.factory.microworld import grammar

    asked = [
        p
        for p in principles
        if p.enabled and p.id in grammar.PRINCIPLES and bias_probes.allowed(probe, p)
    ]
    return [
        _world_case(asked[i % len(asked)], i // len(asked), seed) for i in range(n if asked else 0)
    ]


@lru_cache(maxsize=65536)
def _world_case(principle: Principle, k: int, seed: int) -> Case:
    from prefab.factory.microworld import grammar, oracle, tasks

    rng = random.Random(f"audit {seed} {principle.id} {k}")
    gold: Side = "b" if k % 2 else "a"
    while True:
        s = grammar.situation(rng, "test")
        a, b = (tasks.candidate(rng, s, 0.0).text for _ in "ab")
        if a != b and oracle.compare(s.prompt.messages, a, b, principle.id) == gold:
            return Case(_comparison(s.prompt, 0, a, 1, b), principle, gold, "oracle")


def _comparison(prompt: Prompt, i: int, a: str, j: int, b: str) -> Comparison:
    return Comparison(prompt, Sample(prompt.id, i, a), Sample(prompt.id, j, b))


STORED = """
SELECT p.prompt, q.messages, q.tags, q.rubric, p.a, p.b, sa.text AS text_a, sb.text AS text_b, r.principle
FROM preferences p
JOIN (SELECT DISTINCT run, prompt, a, b, principle FROM verdicts
      WHERE p_a IS NOT NULL AND (judge = $judge OR $judge NOT IN (SELECT judge FROM verdicts WHERE run = $run))) r
    ON r.run = p.run AND r.prompt = p.prompt AND r.a = p.a AND r.b = p.b
JOIN samples sa ON sa.run = p.run AND sa.prompt = p.prompt AND sa."index" = p.a
JOIN samples sb ON sb.run = p.run AND sb.prompt = p.prompt AND sb."index" = p.b
JOIN prompts q ON q.prompt = p.prompt
WHERE p.run = $run AND p.outcome IN ('a', 'b') AND sa.text IS NOT NULL AND sb.text IS NOT NULL
ORDER BY hash(p.prompt, p.a, p.b, r.principle, $seed)
"""


def stored_cases(
    store: Path,
    run: Mapping[str, Any],
    principles: Sequence[Principle],
    judge: Any,
    seed: int = 0,
) -> list[Case]:
    """A run's decided preferences under each principle they were judged by, in a seeded order.

    What people said is truth where it speaks of that principle, or the pair was judged by one
    alone; else, and where they are split, the judge. What they call a tie is left out.
    """
    from prefab.pipelines.store.fill import query

    by_id = {p.id: p for p in principles}
    sql = STORED.replace("$judge", "?").replace("$run", "?").replace("$seed", "?")
    rows = query(store, sql, [judge.name, judge.name, run["run"], run["run"], seed]).to_dicts()
    known = people(store, run["run"])
    found = []
    for row in rows:
        principle = by_id.get(row["principle"])
        if principle is None:
            continue  # gone from the constitution since
        rubric = tuple((text, points) for text, points in orjson.loads(row["rubric"] or "[]"))
        prompt = Prompt(
            row["prompt"], stored_messages(row["messages"]), tuple(row["tags"] or ()), rubric=rubric
        )
        said = known.winner(row["prompt"], row["a"], row["b"], row["principle"])
        if said == "tie":
            continue
        pair = _comparison(prompt, row["a"], row["text_a"], row["b"], row["text_b"])
        found.append(Case(pair, principle, said, "human" if said else "judge"))
    return found
