"""Does adaptive KL hold its target, and is an ensemble of reward models safer than one? PPO of base
in the embedded world.

    python -m benchmarks.policies --folder bench-policies --do data     # the pairs: 10 minutes
    python -m benchmarks.leash --threads 1    # an hour and a half on a core; run again to go on
    python -m benchmarks.leash --quick        # the machinery

Adaptive: the mean KL of the steps behind the first quarter, against the target, for each seed.
Ensemble: reward models that differ by seed alone, on the same few pairs; one of them, and all of
them by mean minus deviation, at the same beta; gold on the same prompts at equal KL
(`prefab.pipelines.training.sweep.at_equal_kl`), paired by seed. Each seed has pairs of its own."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.alarm import all_but
from benchmarks.common import asked, table, words, write

if TYPE_CHECKING:
    from prefab.pipelines.training.sweep import Point

GOAL = 0.2  # of the target


def shared(args: argparse.Namespace, prompts: Path) -> dict[str, Any]:
    """What all runs have in common."""
    return {
        "model": "prefab-tiny",
        "store": None,
        "threads": args.threads,
        "epochs": 2,
        "value": "shared",
        "data__sources": [{"store": str(args.store), "run": args.run}, {"files": str(prompts)}],
    }


def reward_models(args: argparse.Namespace, seed: int, pairs: int, members: int) -> list[str]:
    """Folders of an ensemble on `pairs` pairs that the seed draws."""
    from prefab.trainers.offline import reward

    out = args.folder / f"reward-{pairs}-{members}-{seed}"
    args.pairs = pairs
    reward.run(
        reward.RewardTrainingConfig.model_validate(
            {
                "model": "prefab-tiny",
                "out": str(out),
                "seed": 100 * seed,
                "learning_rate": 3e-4,
                "batch_size": 16,
                "epochs": 3,
                "members": members,
                "threads": args.threads,
                "data": {
                    "sources": [
                        {
                            "store": str(args.store),
                            "run": args.run,
                            "exclude": str(all_but(args, seed)),
                        }
                    ],
                    "max_length": 512,
                },
            }
        ),
        quiet=True,
    )
    return [str(out / f"member-{k}") for k in range(members)] if members > 1 else [str(out)]


def adaptive(args: argparse.Namespace) -> list[dict[str, Any]]:
    """By seed: the KL that was held, and beta's way."""
    from prefab.pipelines.cli.demo_training import overrides, watched
    from prefab.pipelines.training.stages import train
    from prefab.trainers.rl.checkpoint import METRICS, read_metrics

    found, prompts = [], watched(args.folder)
    for seed in range(args.seeds):
        out = args.folder / f"adaptive-{seed}"
        rewards = [
            {
                "name": "preference",
                "kind": "model",
                "paths": reward_models(args, seed, args.many, 1),
            }
        ]
        train(
            "ppo",
            Path("ppo"),
            overrides(
                **shared(args, prompts),
                out=str(out),
                seed=seed,
                steps=args.steps,
                kl="adaptive",
                kl_target=args.target,
                kl_horizon=args.horizon,
                gold=None,
                rewards=rewards,
            ),
            quiet=False,
        )
        steps = [m for m in read_metrics(out / METRICS) if m["step"] > 0]
        late = [m["kl"] for m in steps if m["step"] > args.steps / 4]
        found.append(
            {
                "kl": fmean(late),
                "off": fmean(late) / args.target - 1,
                "by_step": [m["kl"] for m in steps],
                "beta": [m["beta"] for m in steps],
            }
        )
    return found


def ensembles(args: argparse.Namespace) -> tuple[list[Point], list[dict[str, Any]]]:
    """Every evaluation of one reward model's runs and of an ensemble's on the same pairs; and how
    each run ended."""
    from prefab.pipelines.cli.demo_training import overrides, watched
    from prefab.pipelines.training.stages import load_config
    from prefab.pipelines.training.sweep import Point, trained
    from prefab.trainers.rl import ppo

    points, ends, folder = [], [], args.folder / "ensemble"
    folder.mkdir(exist_ok=True)
    prompts = watched(folder, args.prompts)
    for seed in range(args.seeds):
        paths = reward_models(args, seed, args.few, args.members)
        arms = {
            "one reward model": {"paths": paths[:1]},
            f"ensemble of {args.members}": {"paths": paths, "combine": "mean_minus_sd"},
        }
        for arm, some in arms.items():
            out = folder / f"{len(some['paths'])}-members-{seed}"
            config = load_config(
                Path("ppo"),
                ppo.PpoConfig,
                overrides(
                    **shared(args, prompts),
                    out=str(out),
                    seed=seed,
                    steps=args.ensemble_steps,
                    beta=args.beta,
                    eval_prompts=args.prompts,
                    eval_every=max(1, args.ensemble_steps // 8),
                    rewards=[{"name": "preference", "kind": "model", **some}],
                ),
            )
            start, *later = trained(config, f"{arm}, seed {seed}", quiet=False)["evaluations"]
            points += [
                Point(
                    arm,
                    args.beta,
                    seed,
                    e["step"],
                    e["kl"],
                    e["proxy"],
                    e["gold"],
                    e["gold"] - start["gold"],
                )
                for e in later
            ]
            ends.append(
                {
                    "reward": arm,
                    "seed": seed,
                    "gold": later[-1]["gold"],
                    "gained": later[-1]["gold"] - start["gold"],
                    "kl": later[-1]["kl"],
                    "alarm at": next((e["step"] for e in later if e["alarm"]), None),
                }
            )
    return points, ends


def main() -> None:
    """Train, tell, write."""
    from prefab.pipelines.training.sweep import at_equal_kl

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("bench-policies/store"))
    parser.add_argument("--run", default="more-tiny-odds")
    parser.add_argument("--folder", type=Path, default=Path("bench-leash"))
    parser.add_argument("--only", choices=["adaptive", "ensemble"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=72, help="Of adaptive KL's runs.")
    parser.add_argument("--ensemble-steps", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=700, help="On which gold is watched.")
    parser.add_argument("--target", type=float, default=0.5, help="Nats an answer, of adaptive KL.")
    parser.add_argument(
        "--horizon",
        type=float,
        default=320.0,
        help="Answers; the preset's 10,000 is for longer runs.",
    )
    parser.add_argument("--beta", type=float, default=0.05, help="Of the ensemble's runs.")
    parser.add_argument(
        "--few", type=int, default=96, help="Pairs of the ensemble's reward models."
    )
    parser.add_argument(
        "--many", type=int, default=10**6, help="Pairs of adaptive KL's reward model."
    )
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        (
            args.seeds,
            args.steps,
            args.ensemble_steps,
            args.prompts,
            args.few,
            args.many,
            args.members,
        ) = 2, 4, 4, 64, 32, 32, 2
    args.folder.mkdir(parents=True, exist_ok=True)
    held = adaptive(args) if args.only != "ensemble" else []
    table(
        [
            "adaptive KL, seed",
            "mean after the first quarter",
            f"off the target of {args.target}",
            "beta at the end",
        ],
        [[k, h["kl"], f"{h['off']:+.1%}", h["beta"][-1]] for k, h in enumerate(held)],
    )
    points, ends = ensembles(args) if args.only != "adaptive" else ([], [])
    equal = at_equal_kl(points) if points else []
    table(
        ["KL", "reward", "gold gained", "more than one model"],
        [[f"{r['kl']:.2f}", r["arm"], words(r["gained"]), words(r["more"])] for r in equal],
    )
    table(list(ends[0]) if ends else [], [list(end.values()) for end in ends])
    write(
        "leash",
        args.quick,
        goal=GOAL,
        arguments=asked(args),
        adaptive=held,
        equal_kl=equal,
        ends=ends,
        ensembles=[asdict(p) for p in points],
    )


if __name__ == "__main__":
    main()
