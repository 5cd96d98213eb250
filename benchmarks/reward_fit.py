"""How long should a reward model train? Too short, about right and too long on a few pairs, and
what best-of-n makes of each.

    python -m benchmarks.policies --folder bench-policies --do data     # the pairs: 10 minutes
    python -m benchmarks.reward_fit            # half an hour on two cores
    python -m benchmarks.reward_fit --quick    # the machinery

Every reward model reads the same answers of the base policy to held-out prompts: how often it
agrees with the oracle on two answers to one prompt, how far its probabilities are off, and the gold
score of the answer that it likes best of n. Best-of-n is the simplest over-optimisation: the harder
one selects, the more a reward model's mistakes count. Intervals are for another seed (each has
pairs of its own) and another group of prompts. `--split held` asks about 75 topics, which
benchmarks.policies leaves out of its data; `--split test` about 20, for a run of any prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.alarm import all_but
from benchmarks.common import table, words, write
from prefab.factory.stats import Estimate, over_seeds


def main() -> None:
    """Train, read, tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("bench-policies/store"))
    parser.add_argument("--run", default="more-tiny-odds")
    parser.add_argument("--folder", type=Path, default=Path("bench-reward-fit"))
    parser.add_argument("--pairs", type=int, default=192, help="That a reward model sees.")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3, 12])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--split", default="held", choices=["test", "held"], help="Of prompts.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.seeds, args.prompts, args.samples, args.pairs = [1, 2], 1, 8, 4, 32
    args.folder.mkdir(parents=True, exist_ok=True)
    prompts, answers = base_answers(args)
    groups = [p.group or p.id for p in prompts]
    found = {
        epochs: [
            read(args, trained(args, epochs, seed), prompts, answers) for seed in range(args.seeds)
        ]
        for epochs in args.epochs
    }
    rows, told = [], {}
    for epochs, seeds in found.items():
        told[epochs] = {
            name: asdict(
                over_both(
                    [s[name] for s in seeds], groups, (0.0 if name == "accuracy" else -1.0, 1.0)
                )
            )
            for name in seeds[0]
            if name not in ("ece", "loss")
        }
        told[epochs] |= {name: [s[name] for s in seeds] for name in ("ece", "loss")}
        rows.append(
            [
                epochs,
                *(words(e) for e in told[epochs].values() if isinstance(e, dict)),
                *(f"{np.mean(told[epochs][n]):.3f}" for n in ("ece", "loss")),
            ]
        )
    names = [n for n, e in next(iter(told.values())).items() if isinstance(e, dict)]
    table(["epochs", *names, "calibration error", "log loss"], rows)
    write(
        "reward_fit",
        args.quick,
        arguments={k: str(v) for k, v in vars(args).items() if k not in ("store", "folder")},
        by_epochs=told,
    )


def over_both(
    seeds: list[list[float]], groups: Sequence[str], bounds: tuple[float, float]
) -> Estimate:
    """The mean over seeds and prompts of values within `bounds`, for another seed and another group
    of prompts; a prompt of which a figure says nothing is left out."""
    values = np.concatenate(seeds)
    known = ~np.isnan(values)
    return over_seeds(
        values[known],
        np.repeat(np.arange(len(seeds)), len(groups))[known],
        np.array(list(groups) * len(seeds))[known],
        bounds=bounds,
    )


def trained(args: argparse.Namespace, epochs: int, seed: int) -> str:
    """A reward model on `args.pairs` pairs, others for each seed; its folder."""
    from prefab.trainers.offline import reward

    out = args.folder / f"reward-{epochs}-{seed}"
    source = {"store": str(args.store), "run": args.run, "exclude": str(all_but(args, seed))}
    reward.run(
        reward.RewardTrainingConfig.model_validate(
            {
                "model": "prefab-tiny",
                "out": str(out),
                "data": {"sources": [source], "max_length": 512},
                "seed": seed,
                "learning_rate": 3e-4,
                "batch_size": 16,
                "epochs": epochs,
                "patience": None,
                "keep": "last",
                "threads": args.threads,
            }
        ),
        quiet=True,
    )
    return str(out)


def base_answers(args: argparse.Namespace) -> tuple[Any, Any]:
    """The base policy's answers to held-out prompts, with gold."""
    from prefab.factory.microworld import grammar
    from prefab.pipelines.evaluation.policy import PolicyEvalConfig, sample_all

    config = PolicyEvalConfig.model_validate(
        {
            "policies": {"base": "prefab-tiny"},
            "samples": args.samples,
            "threads": args.threads,
        }
    )
    prompts = grammar.prompts(args.split, args.prompts, 11)
    return prompts, sample_all(config, prompts)["base"]


def read(args: argparse.Namespace, folder: str, prompts: Any, answers: Any) -> dict[str, Any]:
    """By prompt: agreement with gold over its decided pairs (no number where there is none), gold
    of the best of n."""
    from prefab.judges.stats.calibration import ece
    from prefab.pipelines.evaluation.policy_metrics import best_of
    from prefab.trainers.offline.reward import scorer

    deviation = json.loads((Path(folder) / "reward.json").read_text())["deviation"]
    talks = [
        [
            *({"role": m.role, "content": m.content} for m in prompts[a.prompt].messages),
            {"role": "assistant", "content": a.text},
        ]
        for a in answers
    ]
    logits = scorer(folder)(talks) * deviation
    scored = [replace(a, proxy=float(x)) for a, x in zip(answers, logits, strict=True)]
    agree: dict[int, list[float]] = {k: [] for k in range(args.prompts)}
    gaps, truth = [], []
    for k in range(0, len(scored), 2):
        a, b = scored[k], scored[k + 1]
        if a.gold["gold"] != b.gold["gold"]:
            gaps.append(a.proxy - b.proxy)
            truth.append(a.gold["gold"] > b.gold["gold"])
            agree[a.prompt].append(float((gaps[-1] > 0) == truth[-1]))
    p, y = 1 / (1 + np.exp(-np.array(gaps))), np.array(truth, dtype=float)
    made: dict[str, Any] = {
        "accuracy": [float(np.mean(x)) if x else np.nan for x in agree.values()]
    }
    for n in sorted({1, max(2, args.samples // 4), args.samples}):
        made[f"gold, best of {n}"] = [a.gold["gold"] for a in best_of(scored, n)[0]]
    made["ece"], made["loss"] = (
        float(ece(p, y)),
        float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p))),
    )
    return made


if __name__ == "__main__":
    main()
