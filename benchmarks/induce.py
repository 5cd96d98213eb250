"""Whether `prefab induce` names the principles behind labels, on the embedded world.

    prefab run demo --set prompts.limit=400 --set store=world-store
    python -m benchmarks.induce --store world-store

The pairs are comparisons of the store's latest run whose answers differ in at least two of the
principles that they break. In each draw three of the world's principles are hidden; the better
answer is the one that breaks fewer of them, by the oracle. The candidates are all of the world's
principles and those of other constitutions as decoys. The embedded model judges; what the run asked
already is not asked again. A draw counts as found where exactly the hidden three are named."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import write
from prefab.factory.microworld import grammar, oracle
from prefab.factory.types import Engine, Prompt
from prefab.pipelines.quality.induction import Induction, LabelledPair, induce
from prefab.pipelines.run.rejudge import panel_of

ROOT = Path(__file__).resolve().parent.parent
DECOYS = ("everyday",)
Texts = tuple[Prompt, str, str]


def pairs(store: Path, n: int, seed: int = 0) -> list[Texts]:
    """Comparisons of the latest run, with answers that differ in two principles or more."""
    found = []
    for prompt in panel_of(store).prompts:
        texts = {sample.index: sample.text for sample in prompt.samples}
        broken = {i: oracle.assess(prompt.messages, text).broken for i, text in texts.items()}
        found += [
            (prompt, texts[a], texts[b]) for a, b in prompt.pairs if len(broken[a] ^ broken[b]) >= 2
        ]
    random.Random(seed).shuffle(found)
    return found[:n]


def candidates(store: Path, decoys: list[str], folder: Path) -> list[Path]:
    """The world's principles as the store's run has them, and the decoys, as files."""
    value = yaml.safe_load(panel_of(store).constitution.source)
    rows = [p for p in value["principles"] if p["id"] in grammar.PRINCIPLES]
    file = folder / "candidates.yaml"
    file.write_text(yaml.safe_dump({**value, "principles": rows, "tests": []}, sort_keys=False))
    return [file, *(ROOT / "constitutions" / f"{name}.yaml" for name in decoys)]


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
        "alike": {one.principle.id: one.same_as for one in found.principles if one.same_as},
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


def summary(
    rows: list[dict[str, Any]], found: Induction, args: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """The figures of the draws so far."""
    return {
        "model": args.model,
        "texts": args.pairs,
        "seed": args.seed,
        "decoys": list(args.decoys),
        "candidates": len(found.candidates),
        "exactly": sum(r["exactly"] for r in rows),
        "all_three": sum(r["all_three"] for r in rows),
        "draws": len(rows),
        "seconds": round(seconds, 1),
        "rows": rows,
    }


def draws(args: argparse.Namespace, engines: Mapping[str, Engine] | None = None) -> dict[str, Any]:
    """All draws, and their figures."""
    texts, rng = pairs(args.store, args.pairs), random.Random(args.seed)
    files = candidates(args.store, args.decoys, args.store)
    value = pipeline(args.store, args.engine, args.model)
    started, rows = time.monotonic(), list[dict[str, Any]]()
    for _ in range(args.draws):
        hidden = rng.sample(sorted(grammar.PRINCIPLES), 3)
        labels = labelled(texts, set(hidden))
        found = induce(labels, value, files, engines=engines, quiet=False)
        rows.append(row(hidden, found))
        print(json.dumps(rows[-1]), flush=True)
    return summary(rows, found, args, time.monotonic() - started)


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoys", nargs="*", default=DECOYS)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--model", default="prefab-tiny")
    parser.add_argument("--quick", action="store_true", help="Two draws on 40 pairs.")
    return parser.parse_args()


def main() -> None:
    """Run the draws and write the figures."""
    args = arguments()
    if args.quick:
        args.draws, args.pairs = 2, 40
    result = draws(args)
    print(f"exactly the hidden three in {result['exactly']} of {result['draws']} draws")
    write("induce", args.quick, results=[result])


if __name__ == "__main__":
    main()
