"""Whether `prefab induce` names the principles behind labels, on the embedded world.

    python -m benchmarks.induce --out benchmarks/results/induce.json

In each draw three principles of the embedded world are hidden; the better answer of a pair is the
one that breaks fewer of them, by the oracle. The candidates are all of the world's principles and
those of other constitutions as decoys; the embedded model judges. All draws use the same pairs, so
each question is asked once. A draw counts as found where exactly the hidden three are named."""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from prefab.factory.microworld import grammar, oracle, tasks
from prefab.factory.types import Prompt
from prefab.pipelines.quality.induction import Induction, LabelledPair, induce

DECOYS = ("front-desk", "hhh")
Texts = tuple[Prompt, str, str]


def pairs(n: int, seed: int = 0) -> list[Texts]:
    """Prompts with two different answers each, of mixed manners."""
    rng, found = random.Random(f"induce {seed}"), list[Texts]()
    while len(found) < n:
        situation = grammar.situation(rng)
        a, b = tasks.pair(rng, situation)
        if a.text != b.text:
            found.append((situation.prompt, a.text, b.text))
    return found


def labelled(found: list[Texts], hidden: set[str]) -> list[LabelledPair]:
    """The pairs in which one answer breaks fewer of the hidden principles."""
    rows = []
    for prompt, a, b in found:
        broken = [len(hidden & oracle.assess(prompt.messages, text).broken) for text in (a, b)]
        if broken[0] != broken[1]:
            rows.append(LabelledPair(prompt, *((a, b) if broken[0] < broken[1] else (b, a))))
    return rows


def pipeline(store: Path, engine: str, model: str) -> dict[str, Any]:
    """The embedded model as a pairwise judge."""
    return {
        "recipe": "rlaif",
        "name": "induce",
        "store": str(store),
        "constitution": "constitutions/microworld.yaml",
        "prompts": {"source": "microworld", "limit": 1},
        "engines": {"local": {"engine": engine, "model": model}},
        "policy": {"engine": "local"},
        "panel": {"judges": [{"name": "judge", "kind": "pairwise"}]},
    }


def row(hidden: list[str], found: Induction) -> dict[str, Any]:
    """One draw."""
    named = [one.principle.id for one in found.principles]
    return {
        "hidden": sorted(hidden),
        "named": named,
        "exactly": sorted(named) == sorted(hidden),
        "all_three": set(hidden) <= set(named),
        "pairs": found.pairs,
        "held_out": found.held_out,
        "accuracy": found.accuracy.value,
        "low": found.accuracy.low,
        "high": found.accuracy.high,
        "asked": found.asked,
        "reused": found.reused,
        "unscored": found.unscored,
    }


def main() -> None:
    """Run the draws and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--model", default="prefab-tiny")
    parser.add_argument("--store", type=Path, default=Path("induce-store"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent / "constitutions"
    files = [root / f"{name}.yaml" for name in ("microworld", *DECOYS)]
    rng, texts = random.Random(0), pairs(args.pairs)
    started, rows = time.monotonic(), []
    value = pipeline(args.store, args.engine, args.model)
    for _ in range(args.draws):
        hidden = rng.sample(sorted(grammar.PRINCIPLES), 3)
        found = induce(labelled(texts, set(hidden)), value, files, quiet=False)
        rows.append(row(hidden, found))
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "model": args.model,
        "texts": args.pairs,
        "candidates": len(found.candidates),
        "exactly": sum(r["exactly"] for r in rows),
        "all_three": sum(r["all_three"] for r in rows),
        "draws": len(rows),
        "seconds": round(time.monotonic() - started, 1),
        "rows": rows,
    }
    print(f"exactly the hidden three in {result['exactly']} of {len(rows)} draws")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
