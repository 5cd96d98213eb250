"""People's labels: how far people agree, how near a judge comes to them, and what training on their
preferences does.

    python -m benchmarks.human --xstest DIR --llmbar DIR --hh FILE [--size all] [--judge FILE.yaml]

The files are read where they lie, and stay there: `DIR/*.csv` of XSTest's annotated answers (with
`prompts.csv`), `DIR/*.json` of LLMBar, and HH-RLHF's `harmless-base` test pairs (`.jsonl.gz`). A
part whose files are not named is left out, and its earlier results are kept. `--judge` is a
pipeline file whose first judge is measured in place of smollm2-135m's. `--size` is quick (the
machinery), middle (what is committed: 56 minutes on two busy cores), cpu (all of LLMBar, six times
as many pairs to train on, each up to twice as long: by middle's times about six hours on two busy
cores, so it was not run) or all (a GPU). Intervals are over prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import gzip
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from prefab.factory.stats import Estimate, bootstrap
from prefab.judges.benchmarks import adapters
from prefab.judges.benchmarks.adapters import Item, Judged

MODEL = "smollm2-135m"
PIPELINE = Path(__file__).with_name("human.yaml")
TURNS = re.compile(r"\n\n(Human|Assistant): ?")
CATEGORIES = {"1_full_compliance": 1.0, "2_full_refusal": 2.0, "3_partial_refusal": 3.0}
BETA = 0.1
BINS = 10  # of a reliability diagram


@dataclass(frozen=True)
class Size:
    """How much is done. None: all there is. `longest` is of a pair used for training, in tokens,
    prompt and one answer; `refusals` the prompts asked of each policy.
    """

    llmbar: int | None
    judged: int | None
    trained: int | None
    tested: int | None
    longest: int
    epochs: int
    refusals: int | None
    against_trl: int


SIZES = {
    "quick": Size(12, 8, 12, 8, 96, 1, 6, 4),
    "middle": Size(120, 60, 64, 64, 128, 2, 60, 8),
    "cpu": Size(None, 200, 384, 256, 256, 2, 200, 32),
    "all": Size(None, None, None, None, 1024, 2, None, 32),
}


@dataclass(frozen=True)
class Pair:
    """Two answers to a conversation, of which people preferred `chosen`."""

    turns: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str

    @property
    def prompt(self) -> str:
        """A digest of the conversation: pairs with the same one never cross from train to test."""
        return hashlib.sha256(json.dumps(self.turns).encode()).hexdigest()

    def messages(self) -> list[dict[str, str]]:
        """The conversation as a chat template takes it."""
        return [{"role": role, "content": text} for role, text in self.turns]

    def row(self) -> dict[str, Any]:
        """As `prefab export` writes a pair, and as Prefab and TRL train on it."""
        answers = {"chosen": self.chosen, "rejected": self.rejected}
        return {
            "prompt": self.messages(),
            **{k: [{"role": "assistant", "content": v}] for k, v in answers.items()},
        }


def some(rows: Sequence[Any], n: int | None, name: Callable[[Any], str]) -> list[Any]:
    """`n` of the rows, drawn by the digest of their name; None: all."""
    order = sorted(rows, key=lambda row: hashlib.sha256(name(row).encode()).hexdigest())
    return order if n is None else order[:n]


# --- people among themselves ---


def annotators(folder: Path) -> dict[str, Any]:
    """Agreement of XSTest's two annotators on five models' answers, with every coefficient, and of
    a model's labels and of the pattern that `prefab eval policy` counts refusals with.
    """
    from prefab.judges.stats.agreement import panel_coefficients
    from prefab.pipelines.evaluation.policy_metrics import REFUSES

    rows = [row for file in answered_files(folder) for row in read_csv(file)]
    prompts = np.array([row["prompt"] for row in rows])
    labels = {
        column: np.array([CATEGORIES.get(row.get(column, ""), np.nan) for row in rows])
        for column in ("annotation_1", "annotation_2", "final_label", "gpt4_label")
    }
    people = np.stack([labels["annotation_1"], labels["annotation_2"]], 1)
    found = panel_coefficients(people, clusters=prompts, categories=(1.0, 2.0, 3.0))
    refused = labels["final_label"] == 2.0
    pattern = np.array([bool(REFUSES.search(row["completion"])) for row in rows])
    plain = labels["final_label"] != 3.0
    machine = ~np.isnan(labels["gpt4_label"])
    return {
        "answers": len(rows),
        "prompts": len(set(prompts.tolist())),
        "labelled by both": int((~np.isnan(people)).all(1).sum()),
        "coefficients": plain_data(found),
        "a model's labels are people's": share(
            (labels["gpt4_label"] == labels["final_label"])[machine], prompts[machine]
        ),
        "the pattern sees a full refusal": share(pattern[refused], prompts[refused]),
        "the pattern is right on full refusals and compliance": share(
            (pattern == refused)[plain], prompts[plain]
        ),
    }


def answered_files(folder: Path) -> list[Path]:
    """The files of answers, without that of the prompts."""
    return sorted(file for file in folder.glob("*.csv") if file.name != "prompts.csv")


def read_csv(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8", newline="") as handle:
        return list(csv.DictReader(handle))


def share(hits: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """A share with its interval over prompts, as plain data."""
    return asdict(bootstrap(np.asarray(hits, dtype=float), prompts))


def plain_data(found: dict[str, Estimate]) -> dict[str, Any]:
    """Estimates as plain data."""
    return {name: asdict(estimate) for name, estimate in found.items()}


# --- judges against people ---


def read_pairs(file: Path) -> list[Pair]:
    """HH-RLHF's pairs: whole conversations that differ in their last answer. A row whose
    conversations differ earlier is left out.
    """
    opener = gzip.open if file.suffix == ".gz" else open
    pairs = []
    with opener(file, "rt", encoding="utf-8") as handle:
        for line in handle:
            row = json.loads(line)
            good, bad = talk(row["chosen"]), talk(row["rejected"])
            same = good[:-1] == bad[:-1] and good[-1] != bad[-1]
            if same and good[-1][0] == "assistant" and good[-1][1] and bad[-1][1]:
                pairs.append(Pair(tuple(good[:-1]), good[-1][1], bad[-1][1]))
    return pairs


def talk(text: str) -> list[tuple[str, str]]:
    """The turns of a conversation that is written with "Human:" and "Assistant:"."""
    parts = TURNS.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [(roles[parts[i]], parts[i + 1].strip()) for i in range(0, len(parts) - 1, 2)]


def judge(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    """A judge on LLMBar and on HH pairs: accuracy, position consistency, unscored, calibration."""
    from prefab.pipelines.config.loader import resolve_pipeline
    from prefab.pipelines.quality import judge_benchmark

    groups = judged_items(args, size)
    items = {item.id: item for group in groups.values() for item in group}
    loaded = resolve_pipeline(args.judge or PIPELINE, [f"store={args.work / 'store'}"])
    bench = judge_benchmark.Bench("llmbar", items, len(items), [], [])
    out = args.work / "verdicts.jsonl"
    result = judge_benchmark.evaluate(loaded, bench, store=args.work, out=out, quiet=False)
    judged = Judged()
    for line in out.read_text(encoding="utf-8").splitlines():
        adapters.saved(json.loads(line), items, judged)
    found = {name: against_people(group, judged) for name, group in groups.items() if group}
    return {"judge": result.judge, "model": result.model, "sets": found}


def judged_items(args: argparse.Namespace, size: Size) -> dict[str, list[Item]]:
    """What is judged, by the name of its set."""
    from prefab.pipelines.quality.judge_benchmark import read_benchmark

    groups: dict[str, list[Item]] = {}
    if args.llmbar:
        every = list(read_benchmark("llmbar", sorted(args.llmbar.glob("*.json"))).items.values())
        kept = some(every, size.llmbar, lambda item: item.id)
        groups["LLMBar"] = kept
        groups["LLMBar Natural"] = [item for item in kept if item.subset == "Natural"]
        groups["LLMBar Adversarial"] = [item for item in kept if item.subset != "Natural"]
    if args.hh:
        pairs = some(read_pairs(args.hh), size.judged, lambda pair: pair.prompt)
        groups["HH harmless"] = [item_of(i, pair) for i, pair in enumerate(pairs)]
    return groups


def item_of(number: int, pair: Pair) -> Item:
    """A pair as a benchmark's item; which answer stands first is drawn by its prompt."""
    from prefab.factory.types import Message

    first = int(pair.prompt, 16) % 2
    answers = (pair.chosen, pair.rejected) if first == 0 else (pair.rejected, pair.chosen)
    prompt = tuple(Message(role, text) for role, text in pair.turns)  # type: ignore[arg-type]
    return Item(f"hh:{number}", "HH harmless", prompt, answers, (first,))


def against_people(items: Sequence[Item], judged: Judged) -> dict[str, Any]:
    """A judge's verdicts against people's on one set. An unscored pair is counted, and is neither
    right nor wrong.
    """
    from prefab.judges.stats import calibration, judge_metrics

    p_ab, p_ba = (
        np.array([nan(judged.verdicts.get((item.id, 0, 1), {}).get(order)) for item in items])
        for order in ("ab", "ba")
    )
    p, gold = (p_ab + p_ba) / 2, np.array([float(item.right == (0,)) for item in items])
    prompts = np.array([item.prompt[-1].content for item in items])
    read = ~np.isnan(p)
    p, y, who = p[read], gold[read], prompts[read]
    half = np.array([int(hashlib.sha256(name.encode()).hexdigest(), 16) % 2 for name in who], bool)
    temperature = calibration.fit_temperature(p[half], y[half]) if half.any() else None
    fitted = calibration.apply_temperature(p[~half], temperature) if temperature else p[~half]
    return {
        "pairs": len(items),
        "unscored": int((~read).sum()),
        "reasons": reasons(items, judged),
        "right, mean of both orders": asdict(judge_metrics.accuracy(p, y, who)),
        "right, as they stand": asdict(judge_metrics.accuracy(p_ab, gold, prompts)),
        "right, swapped": asdict(judge_metrics.accuracy(p_ba, gold, prompts)),
        "the same answer in both orders": asdict(
            judge_metrics.position_consistency(p_ab, p_ba, prompts)
        ),
        "picks the first": asdict(judge_metrics.first_slot_share(p_ab, p_ba, prompts)),
        **calibrated(p, y),
        "brier": brier(p, y, who),
        "temperature, fitted on half": temperature,
        "brier of the other half": brier(p[~half], y[~half], who[~half]),
        "... with the temperature": brier(fitted, y[~half], who[~half]),
        "reliability": [asdict(b) for b in calibration.reliability(p, y, BINS)],
    }


def nan(verdict: Any) -> float:
    """The probability that the first answer is better; NaN where it was not scored."""
    return np.nan if verdict is None or verdict.p_a is None else float(verdict.p_a)


def reasons(items: Sequence[Item], judged: Judged) -> dict[str, int]:
    """Why verdicts are unscored, by reason; a pair has two."""
    found: dict[str, int] = {}
    for item in items:
        for verdict in judged.verdicts.get((item.id, 0, 1), {}).values():
            if verdict.p_a is None:
                found[verdict.reason or "parse"] = found.get(verdict.reason or "parse", 0) + 1
    return found


def brier(p: np.ndarray, y: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """The Brier score with its interval over prompts; .25 is what saying a half always gets."""
    return share((p - y) ** 2, prompts)


def calibrated(p: np.ndarray, y: np.ndarray, draws: int = 500) -> dict[str, float | None]:
    """The expected calibration error, and the mean one of outcomes drawn from these very
    probabilities: with few pairs a calibrated judge has one too, and resampling only adds to it.
    """
    from prefab.judges.stats.calibration import ece

    if not len(p):
        return {"ece": None, "ece of a calibrated judge": None}
    rng = np.random.default_rng(0)
    drawn = [ece(p, (rng.random(len(p)) < p).astype(float), BINS) or 0.0 for _ in range(draws)]
    return {"ece": ece(p, y, BINS), "ece of a calibrated judge": float(np.mean(drawn))}


# --- training on people's preferences ---


def training(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    """A reward model and DPO on half of the prompts, tested on the other half."""
    from prefab.trainers.common import load_tokenizer

    tokenizer = load_tokenizer(args.model)
    fits = [pair for pair in read_pairs(args.hh) if length(tokenizer, pair) <= size.longest]
    halves: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in fits:
        halves[int(pair.prompt[:8], 16) % 2].append(pair)
    train = some(halves[0], size.trained, lambda pair: pair.prompt + pair.chosen)
    test = some(halves[1], size.tested, lambda pair: pair.prompt + pair.chosen)
    file = args.work / "people.jsonl"
    file.write_text("".join(json.dumps(pair.row()) + "\n" for pair in train), encoding="utf-8")
    found: dict[str, Any] = {
        "pairs that fit": len(fits),
        "trained on": len(train),
        "tested on": len(test),
        "longest": size.longest,
    }
    found["reward model"] = reward_model(args, size, file, train, test)
    found["dpo"] = dpo(args, size, file, train, test)
    found["trl"] = against_trl(args, train[: size.against_trl])
    return found


def length(tokenizer: Any, pair: Pair) -> int:
    """Tokens of the conversation with the longer answer, about."""
    text = " ".join(text for _, text in pair.turns)
    longer = max(pair.chosen, pair.rejected, key=len)
    return len(tokenizer(text + " " + longer)["input_ids"]) + 8 * (len(pair.turns) + 2)


def run_stage(
    stage: str, args: argparse.Namespace, size: Size, file: Path, **more: Any
) -> dict[str, Any]:
    """Train a stage by its preset, with LoRA, on a file of pairs."""
    from prefab.pipelines.cli.demo_training import overrides
    from prefab.pipelines.training import stages

    changes = overrides(
        model=args.model,
        out=str(args.work / stage),
        data={"sources": [{"files": str(file)}], "labels": "hard", "max_length": size.longest * 2},
        lora={"rank": 16, "alpha": 32.0},
        epochs=size.epochs,
        batch_size=16,
        micro_batch=4,
        keep="last",
        **more,
    )
    return stages.train(stage, Path(stage), changes, False)


def reward_model(
    args: argparse.Namespace, size: Size, file: Path, train: list[Pair], test: list[Pair]
) -> dict[str, Any]:
    """How often a reward model of people's preferences prefers what people prefer."""
    began = time.monotonic()
    run_stage("reward", args, size, file, learning_rate=2e-4, patience=None)
    took = time.monotonic() - began
    found: dict[str, Any] = {"seconds": round(took)}
    for name, pairs in (("on the prompts trained on", train), ("held out", test)):
        scores = rewards(args.work / "reward", pairs)
        margins = scores[0::2] - scores[1::2]
        found[name] = right_of(margins, pairs)
        if name == "held out":
            p = 1 / (1 + np.exp(-margins))
            found["held-out log loss"] = float(-np.log(np.clip(p, 1e-9, 1)).mean())
            longer = np.array([len(pair.chosen) > len(pair.rejected) for pair in pairs])
            found["held out, a rule: the shorter answer"] = share(~longer, names(pairs))
    return found


def names(pairs: Iterable[Pair]) -> np.ndarray:
    """The pairs' prompts."""
    return np.array([pair.prompt for pair in pairs])


def right_of(margins: np.ndarray, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The share of pairs with a margin for people's choice, and the mean margin."""
    return {
        "right": share(margins > 0, names(pairs)),
        "margin": share(margins, names(pairs)),
    }


def rewards(folder: Path, pairs: Sequence[Pair]) -> np.ndarray:
    """The reward (a logit, up to a constant) of each pair's chosen and rejected answer, in turn."""
    from prefab.trainers.offline.reward import FILE, scorer

    ended = [
        [*pair.messages(), {"role": "assistant", "content": text}]
        for pair in pairs
        for text in (pair.chosen, pair.rejected)
    ]
    deviation = json.loads((folder / FILE).read_text())["deviation"]
    return scorer(folder)(ended) * float(deviation)


def dpo(
    args: argparse.Namespace, size: Size, file: Path, train: list[Pair], test: list[Pair]
) -> dict[str, Any]:
    """Whether the reward that DPO's policy implies moves towards people's choice on held-out
    prompts. Before training it is zero for every answer.

    Source: Rafailov et al. 2023, beta times the log-ratio of policy and reference.
    """
    began = time.monotonic()
    run_stage("dpo", args, size, file, learning_rate=1e-4, beta=BETA)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - began), "beta": BETA}
    for name, pairs in (("on the prompts trained on", train), ("held out", test)):
        base, policy = (logps(model, pairs) for model in (args.model, str(args.work / "dpo")))
        implied = BETA * (policy - base)
        found[name] = right_of(implied[0::2] - implied[1::2], pairs)
        if name == "held out":
            for what, values in (("before", base), ("after", policy)):
                found[f"held out, more likely {what}"] = share(
                    values[0::2] > values[1::2], names(pairs)
                )
    return found


def logps(model: str, pairs: Sequence[Pair]) -> np.ndarray:
    """The log-probability of each pair's chosen and rejected answer, in turn."""
    from prefab.trainers import collate
    from prefab.trainers.chat import answered
    from prefab.trainers.common import load_policy, load_tokenizer
    from prefab.trainers.offline.reference import compute_logps

    loaded, tokenizer = load_policy(model), load_tokenizer(model)
    collate.add_scored_forward(loaded)
    made = [
        answered(tokenizer, pair.messages(), text)
        for pair in pairs
        for text in (pair.chosen, pair.rejected)
    ]
    rows = [(one.prompt, one.answer) for one in made]
    return np.array(compute_logps(loaded, rows, 8, tokenizer.pad_token_id))


def against_trl(args: argparse.Namespace, pairs: list[Pair]) -> dict[str, Any]:
    """One file of people's pairs, one epoch of full DPO in its order, by Prefab and by TRL: the
    loss at each step. TRL also trains on what the template writes behind the end of the turn, which
    is never sampled; it is cut here.
    """
    file = args.work / "same.jsonl"
    file.write_text("".join(json.dumps(pair.row()) + "\n" for pair in pairs), encoding="utf-8")
    ours, order = prefab_losses(args, file)
    theirs = trl_losses(args, file, order)
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return {"pairs": len(pairs), "prefab": ours, "trl": theirs, "largest gap": max(gaps)}


STEP = 4  # pairs a step of `against_trl`


def prefab_losses(args: argparse.Namespace, file: Path) -> tuple[list[float], list[list[int]]]:
    """The loss at each step of Prefab's DPO, and the chosen answers' tokens in the order trained;
    a prompt that it keeps for validation is not among them.
    """
    from prefab.trainers.offline import dpo as stage

    config = stage.DpoConfig.model_validate(
        {
            "model": args.model,
            "out": str(args.work / "same-prefab"),
            "data": {"sources": [{"files": str(file)}], "labels": "hard", "val_share": 1e-9},
            "batch_size": STEP,
            "schedule": "constant",
            "warmup": 0.0,
            "learning_rate": 1e-5,
            "beta": BETA,
        }
    )
    trainer, *_ = stage.prepare(config)
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    return train_by_hand(trainer, rows), [list(row["chosen_ids"]) for row in rows]


def trl_losses(args: argparse.Namespace, file: Path, order: list[list[int]]) -> list[float]:
    """The loss at each step of TRL's DPO, on the pairs of `order` in that order."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from prefab.factory.engines.base import resolve_model

    path = resolve_model(args.model)
    cpu = not _has_cuda()
    config = DPOConfig(
        output_dir=str(args.work / "same-trl"),
        use_cpu=cpu,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        per_device_train_batch_size=STEP,
        learning_rate=1e-5,
        beta=BETA,
        max_length=None,
    )
    dataset = datasets.load_dataset(
        "json", data_files=str(file), cache_dir=str(args.work / "cache")
    )["train"]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype="float32") for _ in range(2)
    )
    trainer = DPOTrainer(
        policy,
        reference,
        config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(path),
    )
    rows = [
        {**row, **{f"{side}_ids": row[f"{side}_ids"][:-1] for side in ("chosen", "rejected")}}
        for row in trainer.train_dataset
    ]
    found = {tuple(row["chosen_ids"]): row for row in rows}
    return train_by_hand(trainer, [found[tuple(ids)] for ids in order])


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def train_by_hand(trainer: Any, rows: Sequence[Any]) -> list[float]:
    """The trainer's own loss over its own batches in the rows' order, with one optimiser for both
    libraries.
    """
    import torch

    model = trainer.model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    losses = []
    for at in range(0, len(rows), STEP):
        batch = trainer._prepare_inputs(trainer.data_collator(list(rows[at : at + STEP])))
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


# --- over-refusal ---


def refusals(args: argparse.Namespace, size: Size) -> dict[str, Any]:
    """How often the policy refuses safe and unsafe prompts of XSTest, before and after DPO, by the
    pattern whose agreement with people `annotators` measures.
    """
    from prefab.pipelines.evaluation.policy_metrics import REFUSES

    rows = some(read_csv(args.xstest / "prompts.csv"), size.refusals, lambda row: row["prompt"])
    prompts = np.array([row["prompt"] for row in rows])
    safe = np.array([row["label"] == "safe" for row in rows])
    found: dict[str, Any] = {"prompts": len(rows), "safe": int(safe.sum())}
    refused = {}
    for name, model in (("before", args.model), ("after", str(args.work / "dpo"))):
        texts = asyncio.run(answers(model, prompts.tolist()))
        refused[name] = np.array([bool(REFUSES.search(text)) for text in texts], float)
        found[name] = {
            "refuses safe": share(refused[name][safe], prompts[safe]),
            "refuses unsafe": share(refused[name][~safe], prompts[~safe]),
            "words": float(np.mean([len(text.split()) for text in texts])),
        }
    change = refused["after"] - refused["before"]
    found["change, safe"] = share(change[safe], prompts[safe])
    found["change, unsafe"] = share(change[~safe], prompts[~safe])
    return found


async def answers(model: str, prompts: Sequence[str]) -> list[str]:
    """The first words of a greedy answer to each prompt, from vLLM."""
    from prefab.factory.engines.base import make
    from prefab.factory.keys import request_key
    from prefab.factory.types import Message, Request, Sampling

    engine = make(
        {"engine": "vllm", "model": model, "max_model_len": 1024, "args": ["--enforce-eager"]}, "h"
    )
    await engine.start()
    try:
        asked = [Request(model, (Message("user", p),), Sampling(max_tokens=40)) for p in prompts]
        done = await asyncio.gather(*(engine.complete(request_key(r), r) for r in asked))
        return [one.text for one in done]
    finally:
        await engine.stop()


def main() -> None:
    """Measure what files are named for, and write the results beside the earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--xstest", type=Path)
    parser.add_argument("--llmbar", type=Path)
    parser.add_argument("--hh", type=Path)
    parser.add_argument("--judge", type=Path, help="A pipeline file; its first judge is measured.")
    parser.add_argument("--model", default=MODEL, help="What is trained.")
    parser.add_argument("--size", choices=list(SIZES), default="middle")
    parser.add_argument("--work", type=Path, default=Path("bench-human"))
    parts = ("annotators", "judge", "training", "refusals")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    args = parser.parse_args()
    size = SIZES[args.size]
    args.work.mkdir(parents=True, exist_ok=True)
    wanted = {
        "annotators": (args.xstest, lambda: annotators(args.xstest)),
        "judge": (args.llmbar or args.hh, lambda: judge(args, size)),
        "training": (args.hh, lambda: training(args, size)),
        "refusals": (args.xstest and args.hh, lambda: refusals(args, size)),
    }
    for name, (files, measure) in wanted.items():
        if name in args.parts and files:
            began = time.monotonic()
            part = {**measure(), "size": args.size, "took_s": round(time.monotonic() - began)}
            found = {**earlier(args.size), name: part}
            common.write("human", args.size == "quick", **found)
            if args.size != "quick":
                PAGE.write_text(page(found), encoding="utf-8")


def earlier(size: str) -> dict[str, Any]:
    """The results that are there, but for where they were measured."""
    file = common.RESULTS / ("human.quick.json" if size == "quick" else "human.json")
    found = json.loads(file.read_text()) if file.exists() else {}
    return {name: value for name, value in found.items() if name != "where"}


# --- the page ---

TITLES = {
    "annotators": "Two people on one answer (XSTest)",
    "judge": "A judge against people",
    "training": "Training on people's preferences (HH-RLHF, harmless-base)",
    "refusals": "Over-refusal before and after DPO (XSTest's prompts)",
}
PAGE = Path(__file__).with_suffix(".md")


def page(found: dict[str, Any]) -> str:
    """The results as Markdown: a table a part, its rows named as in the JSON."""
    lines = [
        "# Prefab and people's labels",
        "",
        "Made by `python -m benchmarks.human` (see its help); the numbers are those of "
        "`benchmarks/results/human.json`. In brackets: 95% intervals over prompts.",
    ]
    lines += ["", "## What was found", "", *(f"- {line}" for line in sentences(found))]
    for name, title in TITLES.items():
        if name in found:
            lines += ["", f"## {title}", "", f"Size `{found[name]['size']}`.", ""]
            lines += ["| | |", "|---|---|", *rows_of(found[name])]
    return "\n".join(lines) + "\n"


def sentences(found: dict[str, Any]) -> list[str]:
    """What the figures say, in a sentence each; an interval that holds .5 says nothing for sure."""
    lines = []
    if people := found.get("annotators"):
        alpha = people["coefficients"]["krippendorff_alpha nominal"]
        pattern = people["the pattern is right on full refusals and compliance"]
        lines.append(
            f"Two people label an answer alike with an alpha of {common.words(alpha)}. The pattern "
            f"that counts refusals is right on {common.words(pattern)} of the clear answers."
        )
    for name, group in (found.get("judge") or {"sets": {}})["sets"].items():
        right, same = group["right, mean of both orders"], group["the same answer in both orders"]
        lines.append(
            f"{found['judge']['judge']} on {name}: {group['unscored']} of {group['pairs']} pairs could "
            f"not be read; right on {common.words(right)} of the others{beyond(right)}; the same "
            f"answer in both orders in {common.words(same)}."
        )
    if trained := found.get("training"):
        for what, part in (
            ("A reward model", "reward model"),
            ("The reward that DPO implies", "dpo"),
        ):
            right = trained[part]["held out"]["right"]
            lines.append(
                f"{what}, trained on {trained['trained on']} pairs, agrees with people on "
                f"{common.words(right)} of {trained['tested on']} held-out pairs{beyond(right)}, and on "
                f"{common.words(trained[part]['on the prompts trained on']['right'])} of its own."
            )
        if "trl" in trained:
            lines.append(
                f"Prefab and TRL train on the same file of {trained['trl']['pairs']} pairs to the same "
                f"loss at each step, within {trained['trl']['largest gap']:.1e}."
            )
    if refused := found.get("refusals"):
        changes = [common.words(refused[f"change, {kind}"]) for kind in ("safe", "unsafe")]
        lines.append(
            f"After DPO the share of refusals changes by {changes[0]} on safe prompts and by "
            f"{changes[1]} on unsafe ones."
        )
    return lines


def beyond(share: dict[str, Any]) -> str:
    """Whether an interval tells a share from chance."""
    if share["low"] is None:
        return ""
    sure = share["low"] > 0.5 or share["high"] < 0.5
    return "" if sure else " (not told from chance)"


def rows_of(value: dict[str, Any], under: str = "") -> list[str]:
    """The figures of a part and of its own parts; bins and steps stand in the JSON alone."""
    lines = []
    for name, inner in value.items():
        label = f"{under}: {name}" if under else name
        if isinstance(inner, dict) and "value" in inner and "n_items" in inner:
            lines.append(f"| {label} | {common.words(inner) or inner['undefined']} |")
        elif isinstance(inner, dict):
            lines += rows_of(inner, label)
        elif isinstance(inner, float):
            lines.append(f"| {label} | {inner:.4g} |")
        elif not isinstance(inner, list) and name not in ("size", "model", "took_s"):
            lines.append(f"| {label} | {inner} |")
    return lines


if __name__ == "__main__":
    main()
