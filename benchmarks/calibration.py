"""What calibrating `p_chosen` is worth, in the embedded world, the oracle as gold.

    python -m benchmarks.calibration --folder bench-calibration         # two hours on one core
    python -m benchmarks.calibration --folder /tmp/look --quick         # a minute: the machinery
    python -m benchmarks.calibration --folder F --store COPY --run demo --do policies   # an hour

Run it again to go on where it stopped. Base answers the demo's prompts, every fifth of them of
the validation split, and prefab-tiny and prefab-nano compare the answers under every principle in
both orders. Then

1. the probabilities of train pairs: the share of the vote, what the judges' second answers make of
   it (retest), and what the oracle's labels of the validation split make of it. The calibration
   never sees a train pair. Calibration error, log loss, and how many of the pairs that `audit data`
   marks below .6 are wrong. Intervals are a bootstrap over groups of prompts.
2. reward models and DPO of base trained on the same pairs with each of these as the target, and
   with hard labels, three seeds each: accuracy and log loss on new pairs of the test split, the
   policy's gold score on prompts of the test split. Intervals over groups, seeds pooled, and for
   policies also over seeds; differences are paired.

`--store` and `--run` name a finished run of prefab-tiny, such as the demo's, to use in place of
the benchmark's own. The calibrations are recorded in that store: give a copy."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import table, words, write
from prefab.factory.stats import Estimate, bootstrap
from prefab.judges.stats import calibration
from prefab.trainers.registry import STAGES

BASE = "prefab-tiny"
JUDGES = {"tiny": BASE, "nano": "prefab-nano"}
TARGETS = ("share", "retest", "oracle")
TRAINED = ("share", "oracle", "hard")
WEAKER = "oracle, beta 0.4"  # of DPO: about as far from base as with the share and BETA
BETA = 0.1
STAGES_OF = {"rewards": ("reward",), "policies": ("dpo",), "all": ("reward", "dpo")}
MARKED = 0.6  # of `audit data`'s rule low_margin
PAIR_COLUMNS = (
    'SELECT p.*, q.messages, q."group", q.split, c.text AS chosen_text, r.text AS rejected_text '
    "FROM preferences p JOIN prompts q USING (prompt) "
    'JOIN samples c ON c.run = p.run AND c.prompt = p.prompt AND c."index" = p.chosen '
    'JOIN samples r ON r.run = p.run AND r.prompt = p.prompt AND r."index" = p.rejected '
    "WHERE p.run = ? ORDER BY p.prompt, p.a, p.b"
)


def pipeline(args: argparse.Namespace, judge: str) -> dict[str, Any]:
    """The data's configuration: every principle, both orders, each answer with the next one."""
    model = JUDGES[judge]
    engine = {"engine": args.engine, "max_in_flight": 64}
    batch = {"batch": 32} if args.engine == "hf" else {}
    engines = {"policy": {**engine, **batch, "model": BASE}}
    if model != BASE:
        engines["judge"] = {**engine, **batch, "model": model}
    return {
        "recipe": "rlaif",
        "name": judge,
        "store": str(args.folder / "store"),
        "constitution": "constitutions/microworld.yaml",
        "prompts": {
            "source": "microworld",
            "split": "train+val",
            "limit": args.prompts,
            "seed": 1,
        },
        "engines": engines,
        "policy": {
            "engine": "policy",
            "samples": args.samples,
            "temperature": 1.0,
            "max_tokens": 96,
        },
        "panel": {
            "judges": [
                {
                    "name": judge,
                    "kind": "pairwise",
                    "engine": "policy" if model == BASE else "judge",
                }
            ],
            "selection": "all",
        },
        "pairs": "adjacent",
        "budget": {"unscored": 0.5, "failed": 0.05},
        "seed": 0,
    }


def data(args: argparse.Namespace) -> None:
    """Answers and verdicts of each judge; what is in the ledger is not asked."""
    from prefab.pipelines.run.runner import run

    for judge in [] if args.run else args.judges:
        began = time.monotonic()
        done = run(pipeline(args, judge))
        assert done.state == "done", done.reason
        print(f"{done.name}: {done.asked:,} calls, {time.monotonic() - began:.0f} s", flush=True)


def pairs(args: argparse.Namespace, judge: str) -> Any:
    """The decided pairs of a run with a probability of each kind, and gold: 1 where the oracle
    prefers the chosen answer, 0 the rejected one, 0.5 neither. A frame, one row a pair.
    """
    import polars as pl

    from prefab.factory.types import Message, Prompt
    from prefab.pipelines.evaluation.policy import gold_of
    from prefab.pipelines.store.calibrate import calibrate
    from prefab.pipelines.store.export.base import find_run
    from prefab.pipelines.store.fill import query

    store, name = args.store or args.folder / "store", args.run or judge
    number = find_run(store, name)["run"]
    frames = {}
    for source in ("retest", "oracle"):
        calibrate(store, name, source)
        frames[source] = query(store, PAIR_COLUMNS, [number])
    rows = frames["oracle"]
    known = [
        Prompt(row["prompt"], tuple(Message(r, c) for r, c in json.loads(row["messages"])))
        for row in rows.iter_rows(named=True)
    ]
    gaps = [
        gold_of(prompt, row["chosen_text"])["gold"] - gold_of(prompt, row["rejected_text"])["gold"]
        for prompt, row in zip(known, rows.iter_rows(named=True), strict=True)
    ]
    return rows.with_columns(
        pl.Series("gold", [0.5 + 0.5 * float(np.sign(gap)) for gap in gaps]),
        pl.col("vote_share").alias("share"),
        frames["retest"]["p_chosen"].alias("retest"),
        pl.col("p_chosen").alias("oracle"),
        pl.lit(1.0).alias("hard"),
    )


def errors(found: Any, draws: int) -> dict[str, dict[str, Any]]:
    """By target: calibration error, log loss and the audit's marks on pairs of the train split."""
    return {target: _errors_of(found, target, draws) for target in TARGETS}


def _errors_of(found: Any, target: str, draws: int) -> dict[str, Any]:
    p, y = found[target].to_numpy(), found["gold"].to_numpy()
    _, groups = np.unique(found["group"].to_numpy(), return_inverse=True)
    marked = p < MARKED
    wrong = 1.0 - y[marked]
    return {
        "pairs": len(p),
        "right": float(y.mean()),
        "mean probability": float(p.mean()),
        "ece": calibration.calibration_error(p, y, 10, groups),
        "log loss": resampled(
            lambda rows: calibration.log_loss(p[rows], y[rows]) or 0.0, groups, draws
        ),
        "marked": int(marked.sum()),
        "marked are wrong": bootstrap(wrong, groups[marked]) if marked.any() else None,
        "reliability": [asdict(b) for b in calibration.reliability(p, y, 10)],
    }


def resampled(
    measure: Callable[[np.ndarray], float], groups: np.ndarray, draws: int
) -> dict[str, float]:
    """A measure of rows with the 95% interval of `draws` bootstrap samples of the groups."""
    rng = np.random.default_rng(0)
    rows_of = [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]
    drawn = [
        measure(np.concatenate([rows_of[g] for g in rng.integers(0, len(rows_of), len(rows_of))]))
        for _ in range(draws)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": measure(np.arange(len(groups))), "low": float(low), "high": float(high)}


def train(args: argparse.Namespace, seed: int, judge: str, target: str, found: Any) -> None:
    """A reward model and a DPO policy on these pairs, once, or one of the two."""
    file = args.folder / f"pairs-{judge}-{target}-{seed}.jsonl"
    beta, column = (0.4, "oracle") if target == WEAKER else (BETA, target)
    file.write_text("".join(_training_row(row, column) for row in found.iter_rows(named=True)))
    shared = {
        "model": args.model,
        "seed": seed,
        "batch_size": 32,
        "schedule": "cosine",
        "threads": args.threads,
        "data": {"sources": [{"files": str(file)}], "max_length": 512, "too_long": "drop"},
    }
    stages = {
        "reward": {"learning_rate": 3e-4, "epochs": args.epochs, "eval_every": 20, "patience": 4},
        "dpo": {"learning_rate": 1e-4, "epochs": args.dpo_epochs, "beta": beta},
    }
    for kind, settings in stages.items():
        if kind not in STAGES_OF[args.do]:
            continue
        out = str(args.folder / f"{kind}-{judge}-{target}-{seed}")
        began = time.monotonic()
        STAGES[kind].run(STAGES[kind].config.model_validate({**shared, **settings, "out": out}))
        print(f"{Path(out).name}: {time.monotonic() - began:.0f} s", flush=True)


def _training_row(row: dict[str, Any], target: str) -> str:
    turns = [{"role": role, "content": text} for role, text in json.loads(row["messages"])]
    value = {
        "prompt": turns,
        "chosen": row["chosen_text"],
        "rejected": row["rejected_text"],
        "p_chosen": row[target],
        "group": row["group"],
        "split": row["split"],
    }
    return json.dumps(value) + "\n"


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Every judge and target that models are trained on."""
    more = (WEAKER,) if args.do == "policies" else ()
    return ((judge, target) for judge in args.judges for target in (*TRAINED, *more))


def rewards(args: argparse.Namespace) -> dict[str, Any]:
    """Reward models on new pairs of base's answers to test prompts that gold decides."""
    from prefab.pipelines.evaluation.policy import PolicyEvalConfig, held_out, sample_all
    from prefab.trainers.offline.reward import scorer

    config = PolicyEvalConfig.model_validate(
        {
            "policies": {"base": BASE},
            "samples": 2,
            "seed": 99,
            "threads": args.threads,
            "prompts": {"limit": args.test * 2, "seed": 5},
        }
    )
    prompts = held_out(config)
    answers = sample_all(config, prompts)["base"]
    met = [
        (a, b)
        for a, b in zip(answers[::2], answers[1::2], strict=True)
        if a.gold["gold"] != b.gold["gold"]
    ]
    truth = np.array([a.gold["gold"] > b.gold["gold"] for a, b in met], dtype=float)
    turns = [
        [
            [
                *({"role": m.role, "content": m.content} for m in prompts[x.prompt].messages),
                {"role": "assistant", "content": x.text},
            ]
            for x in pair
        ]
        for pair in met
    ]
    scores: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for judge, target in cells(args):
        right, loss, error = [], [], []
        for seed in range(args.seeds):
            folder = args.folder / f"reward-{judge}-{target}-{seed}"
            deviation = json.loads((folder / "reward.json").read_text())["deviation"]
            score = scorer(str(folder))
            gap = (score([t[0] for t in turns]) - score([t[1] for t in turns])) * deviation
            right.append(((gap > 0) == truth).astype(float))
            loss.append(np.logaddexp(0.0, np.where(truth > 0, -gap, gap)))
            error.append(calibration.ece(1 / (1 + np.exp(-gap)), truth, 10))
        scores[judge, target] = {
            "accuracy": np.mean(right, axis=0),
            "log loss": np.mean(loss, axis=0),
            "ece by seed": np.array(error),
        }
    return _against_share(scores, [a.cluster for a, _ in met])


def policies(args: argparse.Namespace) -> dict[str, Any]:
    """Gold score of base and of each DPO policy on the same test prompts."""
    from prefab.pipelines.evaluation.policy import PolicyEvalConfig, held_out, sample_all

    flat = {"base": args.model} | {
        f"{judge} {target} {seed}": str(args.folder / f"dpo-{judge}-{target}-{seed}")
        for judge, target in cells(args)
        for seed in range(args.seeds)
    }
    config = PolicyEvalConfig.model_validate(
        {
            "policies": flat,
            "prompts": {"limit": args.test},
            "samples": args.answers,
            "store": str(args.store or args.folder / "store"),
            "threads": args.threads,
        }
    )
    found = sample_all(config, held_out(config))
    measures: dict[str, Callable[[Any], float]] = {
        "gold": lambda a: a.gold["gold"],
        "broken": lambda a: a.gold["broken"],
        "kl": lambda a: a.logp - a.ref_logp,
    }

    def by_seed(judge: str, target: str, name: str) -> np.ndarray:
        """A measure of every answer, a row a seed."""
        rows = [found[f"{judge} {target} {seed}"] for seed in range(args.seeds)]
        return np.array([[measures[name](a) for a in row] for row in rows], dtype=float)

    scores = {
        (judge, target): {name: by_seed(judge, target, name).mean(0) for name in measures}
        for judge, target in cells(args)
    }
    of = [a.cluster for a in found["base"]]
    base = {
        name: bootstrap(np.array([measures[name](a) for a in found["base"]], dtype=float), of)
        for name in ("gold", "broken")
    }
    made = {"base": base, **_against_share(scores, of)}
    for judge, target in cells(args):
        row = made[f"{judge}, {target}"]
        for name in ("gold", "broken"):
            seeds = by_seed(judge, target, name).mean(1)
            row[f"{name} by seed"] = seeds.tolist()
            if target != "share":
                gap = seeds - by_seed(judge, "share", name).mean(1)
                row[f"{name}, difference over seeds"] = over_seeds(gap)
    return made


def over_seeds(values: np.ndarray) -> dict[str, float]:
    """The mean of one value a seed, with its 95% interval by Student's t."""
    from scipy.stats import t

    mean = float(values.mean())
    if len(values) < 2:
        return {"value": mean, "low": float("-inf"), "high": float("inf")}
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return {"value": mean, "low": mean - half, "high": mean + half}


def _against_share(
    scores: dict[tuple[str, str], dict[str, np.ndarray]], groups: list[Any]
) -> dict[str, Any]:
    """Each measure with its interval over groups, and its difference from the target `share`."""
    made: dict[str, Any] = {}
    for (judge, target), measures in scores.items():
        row: dict[str, Any] = {}
        for name, values in measures.items():
            if len(values) != len(groups):
                row[name] = values.tolist()
                continue
            row[name] = bootstrap(values, groups)
            if target != "share":
                row[f"{name}, difference"] = bootstrap(
                    values - scores[judge, "share"][name], groups
                )
        made[f"{judge}, {target}"] = row
    return made


def show(found: dict[str, Any], reward: dict[str, Any], policy: dict[str, Any]) -> None:
    """The tables."""
    columns = ["right", "mean probability", "ece", "log loss", "marked", "marked are wrong"]
    table(
        ["judge", "p_chosen", "pairs", *columns],
        [
            [judge, target, row["pairs"], *(_cell(row[c]) for c in columns)]
            for judge, rows in found.items()
            for target, row in rows.items()
        ],
    )
    for title, rows, columns in (
        ("reward model", reward, ["accuracy", "accuracy, difference", "log loss", "ece by seed"]),
        (
            "DPO of base",
            policy,
            [
                "gold",
                "gold, difference",
                "gold, difference over seeds",
                "broken",
                "broken, difference over seeds",
                "kl",
            ],
        ),
    ):
        table(
            [title, *columns],
            [[name, *(_cell(row.get(c)) for c in columns)] for name, row in rows.items()],
        )


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
    if isinstance(value, list):
        return ", ".join(f"{v:.3f}" for v in value)
    if value is None or isinstance(value, Estimate):
        return words(value) if value is not None else ""
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def plain(value: Any) -> Any:
    """Nested results as JSON data."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return asdict(value) if isinstance(value, Estimate) else value


def main() -> None:
    """Data, probabilities, training, measurement, tables."""
    import polars as pl

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--engine", default="hf", choices=["vllm", "hf"])
    parser.add_argument("--do", default="all", choices=["data", "labels", *STAGES_OF])
    parser.add_argument("--store", type=Path, help="Of a finished run, a copy.")
    parser.add_argument("--run", default="", help="The finished run in it.")
    parser.add_argument("--judges", nargs="+", default=list(JUDGES), choices=list(JUDGES))
    parser.add_argument("--prompts", type=int, default=320, help="Every fifth of val.")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test", type=int, default=150, help="Held-out prompts.")
    parser.add_argument("--answers", type=int, default=1)
    parser.add_argument("--draws", type=int, default=2000, help="Of a bootstrap.")
    parser.add_argument("--model", default=BASE, help="What is trained.")
    parser.add_argument("--epochs", type=int, default=3, help="Of reward models.")
    parser.add_argument("--dpo-epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.samples, args.seeds = 30, 4, 1
        args.test, args.draws, args.judges = 12, 50, ["tiny"]
    args.folder.mkdir(parents=True, exist_ok=True)
    data(args)
    if args.do == "data":
        return
    frames = {judge: pairs(args, judge) for judge in args.judges}
    found = {
        judge: errors(frame.filter(pl.col("split") == "train"), args.draws)
        for judge, frame in frames.items()
    }
    reward: dict[str, Any] = {}
    policy: dict[str, Any] = {}
    if args.do != "labels":
        for judge, target in cells(args):
            for seed in range(args.seeds):
                train(args, seed, judge, target, frames[judge])
        reward = rewards(args) if "reward" in STAGES_OF[args.do] else {}
        policy = policies(args) if "dpo" in STAGES_OF[args.do] else {}
    show(found, reward, policy)
    write(
        "calibration_dpo" if args.do == "policies" else "calibration",
        args.quick,
        arguments={k: str(v) for k, v in vars(args).items() if k not in ("folder", "store")},
        labels=plain(found),
        rewards=plain(reward),
        policies=plain(policy),
    )


if __name__ == "__main__":
    main()
