"""Does training on the judges' labels make a better policy? The whole chain in the embedded world,
the oracle as gold.

    python -m benchmarks.policies --folder bench-policies          # hours on two cores; run again
    to go on python -m benchmarks.policies --folder /tmp/look --quick       # a few minutes: the
    machinery, not the figures python -m benchmarks.policies --folder bench-policies --do train
    --only 1 --threads 1     # one seed beside another

1. base answers prompts of train and val; revised by a sweep, compared by prefab-tiny (and once more
by prefab-nano).
2. per seed: SFT on the swept revisions, and one three times as long; DPO of base on base's own
   pairs; a mixture of base and SFT answers, compared; DPO of SFT, and a reward model, on base's
   pairs and those. With --ablation, reward models and DPO by judge (tiny, nano) and label: the mean
   of what principles say, their log-odds added up, and these made hard. With
   --online, PPO of SFT and of base and GRPO of base against that reward model, and DPO of base at a
   smaller beta, for the gold of each method at equal KL.
3. everything on prompts of topics that no training here saw (`grammar.prompts("held", ...)`: the
   test split and a third of the topics of train), intervals over seeds and groups; reward models on
   new pairs of the same topics against the oracle. Learning rate, beta and margin are arguments:
   choose them with `--split val`, then measure once. Everything is kept below --folder: answers in
   the ledger, models beside it, so a stopped run goes on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.common import table, words, write
from prefab.factory.keys import digest, model_identity, prompt_id
from prefab.factory.types import Completion, Engine, Prompt, Request
from prefab.pipelines.evaluation.policy_metrics import PolicyAnswer
from prefab.trainers.registry import STAGES

BASE = "prefab-tiny"


class Mixed(Engine):
    """Two policies as one engine: even samples are the first's, odd ones the second's. Keys hold
    both identities."""

    def __init__(self, one: Engine, other: Engine) -> None:
        self.both, self.identity = (one, other), digest("mixed", one.identity, other.identity)
        self.max_in_flight = one.max_in_flight
        self.max_model_len = one.max_model_len
        self.special_tokens = one.special_tokens

    async def start(self) -> None:
        """Start the second; the first also judges, and is started as that."""
        await self.both[1].start()

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The first number of a sample's `repeat` is its index."""
        return await self.both[request.repeat[0] % 2].complete(key, request)

    async def stop(self) -> None:
        """Stop the second."""
        await self.both[1].stop()


FAR, SFT, LONG = "DPO of base, far", "SFT on revisions", "SFT on revisions, longer"
LABELS = {
    "log-odds": ("-odds", "soft"),
    "mean": ("", "soft"),
    "hard": ("-odds", "hard"),
}  # the run's name ends so; labels
CORE = ("tiny", "log-odds")
MORE, REWARD = "more-tiny-odds", "tiny, log-odds, more and mixed pairs"


def pipeline(
    args: argparse.Namespace, name: str, judge: str, revise: bool, combine: str
) -> dict[str, Any]:
    """The data's configuration: every principle asked about, both orders, each answer of a prompt
    with the next."""
    value: dict[str, Any] = {
        "recipe": "rlaif",
        "name": name,
        "store": str(args.folder / "store"),
        "constitution": "constitutions/microworld.yaml",
        "prompts": {"source": str(args.folder / "prompts.jsonl")},
        "engines": {
            name: {"engine": args.engine, "model": model, "max_in_flight": 128}
            for name, model in {
                "policy": BASE,
                **({} if judge == BASE else {"judge": judge}),
            }.items()
        },
        "policy": {
            "engine": "policy",
            "samples": args.samples,
            "temperature": 1.0,
            "max_tokens": 96,
        },
        "critic": {"engine": "policy", "max_tokens": 32},
        "panel": {
            "judges": [
                {
                    "name": judge,
                    "kind": "pairwise",
                    "engine": "policy" if judge == BASE else "judge",
                }
            ],
            "selection": "all",
            "combine": combine,
        },
        "pairs": "adjacent",
        "budget": {"unscored": 0.5, "failed": 0.05},
        "seed": 0,
    }
    if revise:
        value["revise"] = {"rounds": 1, "select": "sweep", "temperature": 0.0}
    return value


def prompts_files(args: argparse.Namespace) -> None:
    """Prompts of train and val with their splits, every eleventh of val; topics that are measured
    on are never written here.

    `more.jsonl` goes on where `prompts.jsonl` ends.
    """
    import orjson

    from prefab.factory.microworld import grammar

    train, val = (
        grammar.prompts("seen", args.prompts + args.more, 7),
        grammar.prompts("val", max(4, args.prompts // 10) + max(4, args.more // 10), 7),
    )
    middle = max(4, args.prompts // 10)
    for name, found, others in (
        ("prompts", train[: args.prompts], val[:middle]),
        ("more", train[args.prompts :], val[middle:]),
    ):
        for k, prompt in enumerate(others):
            found.insert(11 * k, prompt)
        lines = [
            orjson.dumps(
                {
                    "id": p.id,
                    "messages": [{"role": m.role, "content": m.content} for m in p.messages],
                    "tags": list(p.tags),
                    "group": p.group,
                    "split": p.split,
                }
            )
            for p in found
        ]
        (args.folder / f"{name}.jsonl").write_bytes(b"\n".join(lines) + b"\n")


def data(args: argparse.Namespace) -> None:
    """Base's answers with revisions and labels by tiny, then the same answers by nano: only
    judgments are asked anew.

    And labels by tiny of answers to more prompts, for the reward model.
    """
    from prefab.pipelines.run.runner import run

    prompts_files(args)
    if not args.brief:
        more = pipeline(args, MORE, BASE, False, "log_odds")
        more["prompts"]["source"] = str(args.folder / "more.jsonl")
        done = run(more, quiet=False)
        assert done.state == "done", done.reason
    for judge in (BASE, "prefab-nano") if args.ablation else (BASE,):
        for end, combine in (("-odds", "log_odds"), ("", "mean")):  # the second asks nothing again
            done = run(
                pipeline(
                    args,
                    f"base-{judge.removeprefix('prefab-')}{end}",
                    judge,
                    judge == BASE,
                    combine,
                ),
                quiet=False,
            )
            assert done.state == "done", done.reason


def mixture(args: argparse.Namespace, seed: int) -> str:
    """Answers of base and of this seed's SFT to the same prompts, compared by tiny; gives the run's
    name."""
    from prefab.factory.engines.base import make
    from prefab.factory.engines.lifecycle import lazily
    from prefab.pipelines.run.runner import run

    name = f"mixed-{seed}"
    value = pipeline(args, name, BASE, False, "log_odds")
    value["prompts"]["limit"] = args.mixed
    value["engines"]["judge"] = value["engines"]["policy"]
    value["panel"]["judges"][0]["engine"] = "judge"
    base = lazily(make(value["engines"]["policy"], "base"))
    tuned = lazily(
        make({**value["engines"]["policy"], "model": str(args.folder / f"sft-{seed}")}, "tuned")
    )
    done = run(value, quiet=False, engines={"policy": Mixed(base, tuned), "judge": base})
    assert done.state == "done", done.reason
    return name


def stage(
    args: argparse.Namespace, kind: str, name: str, runs: Sequence[str], seed: int, **more: Any
) -> str:
    """One training, not repeated when it has ended; gives its folder."""
    module = STAGES[kind]
    margin = more.pop("margin", 0.0)
    sources = [{"store": str(args.folder / "store"), "run": run, "margin": margin} for run in runs]
    config = {
        "model": BASE,
        "out": str(args.folder / name),
        "seed": seed,
        "batch_size": 32,
        "schedule": "cosine",
        "data": {
            "sources": sources,
            "labels": more.pop("labels", "soft"),
            "max_length": 512,
            "too_long": "drop",
        },
        "threads": args.threads,
        **more,
    }
    module.run(STAGES[kind].config.model_validate(config))
    return str(args.folder / name)


def train(args: argparse.Namespace) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(policies, reward models) by what they are, one folder a seed."""
    from prefab.pipelines.store.fill import fill

    policies: dict[str, list[str]] = {}
    rewards: dict[str, list[str]] = {}
    for seed in range(args.seeds) if args.only is None else [args.only]:
        fill(args.folder / "store")
        long = [] if args.brief else [(LONG, "sft-long", 3 * args.sft_epochs)]
        for name, where, epochs in ((SFT, "sft", args.sft_epochs), *long):
            policies.setdefault(name, []).append(
                stage(
                    args,
                    "sft",
                    f"{where}-{seed}",
                    ["base-tiny"],
                    seed,
                    learning_rate=args.sft_lr,
                    epochs=epochs,
                    keep="best",
                )
            )
        sft = policies[SFT][-1]
        tune = {
            "learning_rate": args.dpo_lr,
            "beta": args.beta,
            "epochs": args.dpo_epochs,
            "margin": args.margin,
        }
        reward = {
            "learning_rate": args.reward_lr,
            "epochs": args.reward_epochs,
            "eval_every": 20,
            "patience": 4,
        }
        for judge, label in (
            [(j, k) for j in ("tiny", "nano") for k in args.labels] if args.ablation else [CORE]
        ):
            end, labels = LABELS[label]
            policies.setdefault(f"DPO of base ({judge}, {label})", []).append(
                stage(
                    args,
                    "dpo",
                    f"dpo-{judge}-{label}-{seed}",
                    [f"base-{judge}{end}"],
                    seed,
                    labels=labels,
                    **tune,
                )
            )
            if args.brief:
                continue
            rewards.setdefault(f"{judge}, {label}", []).append(
                stage(
                    args,
                    "reward",
                    f"reward-{judge}-{label}-{seed}",
                    [f"base-{judge}{end}"],
                    seed,
                    labels=labels,
                    **reward,
                )
            )
        pairs = ["base-tiny-odds"]
        if not args.brief:
            pairs += [MORE, mixture(args, seed)]
            fill(args.folder / "store")
            rewards.setdefault(REWARD, []).append(
                stage(args, "reward", f"reward-{seed}", pairs, seed, **reward)
            )
        policies.setdefault("SFT, then DPO", []).append(
            stage(
                args,
                "dpo",
                f"sft-dpo-{seed}",
                pairs,
                seed,
                model=sft,
                **{**tune, "learning_rate": args.sft_dpo_lr, "beta": args.sft_dpo_beta},
            )
        )
        if args.online:
            policies.setdefault(FAR, []).append(
                stage(
                    args,
                    "dpo",
                    f"dpo-far-{seed}",
                    ["base-tiny-odds"],
                    seed,
                    **{**tune, "beta": args.beta / 4},
                )
            )
            for name, method, start in (
                ("SFT, then PPO", "ppo", sft),
                ("PPO of base", "ppo", BASE),
                ("GRPO of base", "grpo", BASE),
            ):
                policies.setdefault(name, []).append(
                    online(args, method, start, rewards[REWARD][-1], seed)
                )
    return policies, rewards


def online(args: argparse.Namespace, method: str, start: str, reward: str, seed: int) -> str:
    """PPO or GRPO against a reward model, by its preset; gives the policy's folder."""
    from prefab.pipelines.cli.demo_training import overrides, watched
    from prefab.pipelines.training.stages import train

    out = args.folder / f"{method}-{'base' if start == BASE else 'sft'}-{seed}"
    train(
        method,
        Path(method),
        overrides(
            model=start,
            out=str(out),
            store=None,
            seed=seed,
            threads=args.threads,
            steps=args.rl_steps,
            beta=args.rl_beta,
            eval_every=max(1, args.rl_steps // 6),
            rewards=[{"name": "preference", "kind": "model", "paths": [reward]}],
            data__sources=[
                {"store": str(args.folder / "store"), "run": "base-tiny"},
                {"files": str(watched(args.folder))},
            ],
            **({"epochs": 2, "value": "shared"} if method == "ppo" else {}),
        ),
        quiet=False,
    )
    return str(out / "policy")


def numbered(args: argparse.Namespace, policies: dict[str, list[str]]) -> dict[str, str]:
    """Every trained policy, by its name and seed."""
    seeds = range(args.seeds) if args.only is None else [args.only]
    return {
        f"{name} #{seed}": folder
        for name, folders in policies.items()
        for seed, folder in zip(seeds, folders, strict=True)
    }


def answers_file(
    args: argparse.Namespace, name: str, folder: str, prompts: Sequence[Prompt]
) -> Path:
    """Where a policy's answers to the prompts are kept: another file for other weights."""
    from prefab.factory.engines.base import resolve_model

    asked = [str(args.answers), *(prompt_id(p.messages) for p in prompts)]
    of = digest(model_identity(resolve_model(folder)), name, *asked)
    return Path(args.folder / "answers" / f"{of}.json")


def answers(
    args: argparse.Namespace, policies: dict[str, str], prompts: Sequence[Prompt]
) -> dict[str, list[PolicyAnswer]]:
    """Each policy's answers to the prompts, kept below --folder. The oracle reads them anew each
    time, so a changed oracle asks no policy again."""
    import orjson

    from prefab.pipelines.evaluation.policy import PolicyEvalConfig, gold_of, sample_all

    found = {}
    for name, folder in policies.items():
        kept = answers_file(args, name, folder, prompts)
        if not kept.exists():
            config = PolicyEvalConfig.model_validate(
                {
                    "policies": {name: folder},
                    "reference": BASE,
                    "samples": args.answers,
                    "threads": args.threads,
                }
            )
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(orjson.dumps(sample_all(config, prompts)[name]))
        found[name] = [
            replace(a, gold=gold_of(prompts[a.prompt], a.text))
            for a in (PolicyAnswer(**row) for row in orjson.loads(kept.read_bytes()))
        ]
    return found


def evaluated(args: argparse.Namespace, policies: dict[str, list[str]]) -> dict[str, Any]:
    """Every policy on the same held-out prompts. A method is its seeds: intervals are over another
    seed and another group of prompts (`over_seeds`)."""
    from prefab.factory.microworld import grammar
    from prefab.pipelines.evaluation import policy_metrics

    prompts = grammar.prompts(args.split, args.test)
    found = answers(args, {"base": BASE} | numbered(args, policies), prompts)
    harmful = ["harmful" in p.tags for p in prompts]
    made: dict[str, Any] = {}
    for name, folders in {"base": [BASE], **policies}.items():
        per = (
            [found["base"]]
            if name == "base"
            else [[replace(a, seed=k) for a in found[f"{name} #{k}"]] for k in range(len(folders))]
        )
        pooled = [a for some in per for a in some]
        made[name] = {
            "figures": policy_metrics.figures(pooled, harmful),
            "seeds": [
                {k: v.value for k, v in policy_metrics.figures(some, harmful).items()}
                for some in per
            ],
        }
        others = {"base": [found["base"]] * len(per)} if name != "base" else {}
        if name.startswith("SFT, then"):
            others[SFT] = [found[f"{SFT} #{k}"] for k in range(len(per))]
        for other, theirs in others.items():
            pool = [a for some in theirs for a in some]
            made[name][f"against {other}"] = policy_metrics.against(
                _in_order(pooled), _in_order(pool), lambda a: a.gold["gold"]
            )
            made[name][f"broken against {other}"] = policy_metrics.against(
                _in_order(pooled), _in_order(pool), lambda a: -a.gold["broken"]
            ).difference
    return made


def at_equal_kl(args: argparse.Namespace, policies: dict[str, list[str]]) -> dict[str, Any]:
    """Gold gained over base at the same KL by method, on the same prompts of the validation split,
    over seeds.

    PPO and GRPO tell it all along their way; DPO has two ends. Between points a straight line over
    sqrt(KL), from no gain at no distance. An interval is Student's over seeds; a distance that a
    seed did not reach is left out."""
    import numpy as np

    from prefab.factory.stats import student
    from prefab.pipelines.evaluation.policy import PolicyEvalConfig, held_out, sample_all
    from prefab.trainers.rl.checkpoint import METRICS, read_metrics
    from prefab.trainers.rl.overoptimization import gained_at

    ends = [name for name in policies if name.startswith("DPO of base (tiny") or name == FAR]
    flat = {"base": BASE} | {
        f"{name} #{k}": folder for name in ends for k, folder in enumerate(policies[name])
    }
    config = PolicyEvalConfig.model_validate(
        {
            "policies": flat,
            "samples": 2,
            "threads": args.threads,
            "prompts": {"source": "microworld", "split": "val", "limit": 256, "seed": 1},
        }
    )
    mean = {
        name: (
            float(np.mean([a.logp - a.ref_logp for a in some])),
            float(np.mean([a.gold["gold"] for a in some])),
        )
        for name, some in sample_all(config, held_out(config)).items()
    }
    paths: dict[str, list[list[tuple[float, float]]]] = {
        "DPO of base": [
            [(mean[f"{name} #{k}"][0], mean[f"{name} #{k}"][1] - mean["base"][1]) for name in ends]
            for k in range(len(policies[FAR]))
        ]
    }
    for method in ("PPO", "GRPO"):
        told = [
            [m for m in read_metrics(Path(p).parent / METRICS) if "eval/gold" in m]
            for p in policies[f"{method} of base"]
        ]
        paths[f"{method} of base"] = [
            [(m["eval/kl"], m["eval/gold"] - run[0]["eval/gold"]) for m in run] for run in told
        ]
    made: dict[str, Any] = {}
    for name, runs in paths.items():
        for kl in (0.1, 0.2, 0.5, 1.0, 2.0):
            gains = [gained_at(run, kl) for run in runs]
            if None not in gains:
                made[f"{name} at {kl} nats"] = student(gains)
    return made


def _in_order(pooled: Sequence[Any]) -> list[Any]:
    """Answers in the order of their prompts, so that answer k of a prompt meets answer k of the
    other's."""
    return sorted(pooled, key=lambda a: a.prompt)


def rewards_measured(args: argparse.Namespace, rewards: dict[str, list[str]]) -> dict[str, Any]:
    """Reward models on fresh pairs of base's answers to held-out prompts, where gold decides:
    accuracy and ECE."""
    import numpy as np

    from prefab.factory.microworld import grammar
    from prefab.factory.stats import over_seeds
    from prefab.judges.stats.calibration import calibration_error
    from prefab.pipelines.evaluation.policy import PolicyEvalConfig, sample_all
    from prefab.trainers.offline.reward import scorer

    if not rewards:
        return {}

    config = PolicyEvalConfig.model_validate(
        {
            "policies": {"base": BASE},
            "samples": 2,
            "seed": 99,
            "threads": args.threads,
        }
    )
    prompts = grammar.prompts(args.split, args.test * 2, 5)
    answers = sample_all(config, prompts)["base"]
    pairs = [
        (a, b)
        for a, b in zip(answers[::2], answers[1::2], strict=True)
        if a.gold["gold"] != b.gold["gold"]
    ]
    talks = [
        [
            [
                *({"role": m.role, "content": m.content} for m in prompts[x.prompt].messages),
                {"role": "assistant", "content": x.text},
            ]
            for x in pair
        ]
        for pair in pairs
    ]
    truth = np.array([a.gold["gold"] > b.gold["gold"] for a, b in pairs])
    made = {}
    for name, folders in rewards.items():
        right, errors = [], []
        for folder in folders:
            deviation = json.loads((Path(folder) / "reward.json").read_text())["deviation"]
            score = scorer(folder)
            gap = (score([t[0] for t in talks]) - score([t[1] for t in talks])) * deviation
            right.append((gap > 0) == truth)
            groups = np.array([a.cluster for a, _ in pairs])
            p = 1 / (1 + np.exp(-gap))
            errors.append(calibration_error(p, truth.astype(float), 15, groups).value)
        made[name] = {
            "accuracy": over_seeds(
                np.concatenate(right).astype(float),
                np.repeat(np.arange(len(right)), len(pairs)),
                [a.cluster for a, _ in pairs] * len(right),
                bounds=(0.0, 1.0),
            ),
            "ece": errors,
            "pairs": len(pairs),
        }
    return made


COMPARED = (
    "SELECT p.outcome, p.p_chosen, q.messages, a.text AS a, b.text AS b FROM preferences p "
    "JOIN prompts q USING (prompt) "
    'JOIN samples a ON a.run = p.run AND a.prompt = p.prompt AND a."index" = p.a '
    'JOIN samples b ON b.run = p.run AND b.prompt = p.prompt AND b."index" = p.b '
    "WHERE p.run = (SELECT max(run) FROM runs WHERE name = ?)"
)


def labels_measured(args: argparse.Namespace) -> dict[str, Any]:
    """The panel's outcomes against gold, by judge and margin: of all comparisons that gold decides,
    how many the panel decides rightly and wrongly, and how many it leaves undecided (a tie,
    unscored, or below the margin)."""
    from prefab.factory.types import Message, Prompt
    from prefab.pipelines.evaluation.policy import gold_of
    from prefab.pipelines.store.fill import query

    made: dict[str, Any] = {}
    for judge in ("tiny", "tiny-odds", "nano", "nano-odds")[: 4 if args.ablation else 2]:
        gaps, outcomes, margins = [], [], []
        for row in query(args.folder / "store", COMPARED, [f"base-{judge}"]).iter_rows(named=True):
            if row["a"] is None or row["b"] is None:
                continue
            talk = tuple(Message(r, c) for r, c in json.loads(row["messages"]))
            gold = [gold_of(Prompt("", talk), row[side])["gold"] for side in "ab"]
            if gold[0] != gold[1]:
                gaps.append("a" if gold[0] > gold[1] else "b")
                outcomes.append(row["outcome"])
                margins.append((row["p_chosen"] or 0.5) - 0.5)
        for margin in sorted({0.0, 0.03, 0.06, 0.1, args.margin}):
            decided = [
                (out == gold)
                for out, gold, m in zip(outcomes, gaps, margins, strict=True)
                if out in ("a", "b") and m >= margin
            ]
            made[f"{judge}, margin {margin}"] = {
                "right": sum(decided) / max(1, len(decided)),
                "right_of_all": sum(decided) / max(1, len(gaps)),
                "decided": len(decided),
                "gold_decides": len(gaps),
                "wrong": len(decided) - sum(decided),
            }
    return made


def main() -> None:
    """Data, training, measurement, tables."""
    from prefab.factory.microworld import grammar

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--engine", default="vllm", choices=["vllm", "hf"])
    parser.add_argument(
        "--do", default="all", choices=["data", "train", "all"], help="Go no further than this."
    )
    parser.add_argument("--ablation", action="store_true", help="Also by judge and label.")
    parser.add_argument(
        "--labels", nargs="+", default=list(LABELS), choices=list(LABELS), help="Of the ablation."
    )
    parser.add_argument("--online", action="store_true", help="Also PPO and GRPO.")
    parser.add_argument(
        "--brief",
        action="store_true",
        help="SFT, DPO of base and SFT then DPO on base's pairs alone; no reward models.",
    )
    parser.add_argument("--rl-steps", type=int, default=24)
    parser.add_argument("--rl-beta", type=float, default=0.3)
    parser.add_argument(
        "--only", type=int, help="Train this seed alone, and sample its answers; no tables."
    )
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument(
        "--more", type=int, default=500, help="Further prompts, for the reward model alone."
    )
    parser.add_argument(
        "--mixed",
        type=int,
        default=100,
        help="Prompts of these whose answers by base and SFT are compared.",
    )
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--split", default="held", choices=["held", "test", "val"])
    parser.add_argument("--test", type=int, default=500, help="Held-out prompts.")
    parser.add_argument(
        "--answers", type=int, default=4, help="To each of them, a policy and seed."
    )
    parser.add_argument("--sft-lr", type=float, default=5e-4)
    parser.add_argument(
        "--sft-epochs",
        type=float,
        default=1.0,
        help="Before DPO, PPO and GRPO; the longer one has three times.",
    )
    parser.add_argument("--sft-dpo-lr", type=float, default=3e-5)
    parser.add_argument("--sft-dpo-beta", type=float, default=0.5)
    parser.add_argument("--dpo-lr", type=float, default=1e-4)
    parser.add_argument("--dpo-epochs", type=float, default=1.0)
    parser.add_argument("--reward-lr", type=float, default=3e-4)
    parser.add_argument("--reward-epochs", type=float, default=3.0)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument(
        "--margin",
        type=float,
        default=0.03,
        help="Of 11 principles, one that decides makes about 0.045.",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.samples, args.seeds, args.test, args.answers, args.margin = (
            16,
            2,
            1,
            16,
            2,
            0.0,
        )
        args.more, args.mixed, args.rl_steps = 16, 16, 2
    args.folder.mkdir(parents=True, exist_ok=True)
    data(args)
    if args.do == "data":
        return
    policies, rewards = train(args)
    if args.only is not None:
        answers(args, numbered(args, policies), grammar.prompts(args.split, args.test))
    if args.do == "train" or args.only is not None:
        return
    labels = labels_measured(args)
    found, scores = evaluated(args, policies), rewards_measured(args, rewards)
    show(labels, found, scores)
    equal = at_equal_kl(args, policies) if args.online else {}
    table(
        ["at equal KL", "gold gained over base (over seeds)"],
        [[n, words(e)] for n, e in equal.items()],
    )
    write(
        "policies",
        args.quick,
        arguments={k: str(v) for k, v in vars(args).items() if k != "folder"},
        labels=labels,
        equal_kl=_plain(equal),
        policies={n: {k: _plain(v) for k, v in some.items()} for n, some in found.items()},
        rewards={n: {k: _plain(v) for k, v in some.items()} for n, some in scores.items()},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


def show(labels: dict[str, Any], found: dict[str, Any], scores: dict[str, Any]) -> None:
    """The tables, as they stand in the README."""
    table(
        ["labels", "gold decides", "both decide", "right of these", "right of all"],
        [
            [n, *(x[k] for k in ("gold_decides", "decided", "right", "right_of_all"))]
            for n, x in labels.items()
        ],
    )
    names = ["broken", "gold", "helps_harmless", "coherent", "words", "kl"]
    table(
        ["policy", *names],
        [[n, *(words(some["figures"].get(k)) for k in names)] for n, some in found.items()],
    )
    table(
        [
            "against",
            "decided",
            "win rate of decided",
            "length-controlled",
            "difference of gold",
            "p",
        ],
        [
            [
                f"{n} {k}",
                words(a.decided),
                words(a.win_rate),
                words(a.length_controlled),
                words(a.difference),
                f"{a.p:.4f}",
            ]
            for n, some in found.items()
            for k, a in some.items()
            if k.startswith("against")
        ],
    )
    table(
        ["reward model", "accuracy", "ECE by seed", "pairs"],
        [
            [n, words(s["accuracy"]), ", ".join(f"{e:.3f}" for e in s["ece"]), s["pairs"]]
            for n, s in scores.items()
        ],
    )


if __name__ == "__main__":
    main()
