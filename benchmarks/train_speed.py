"""Our DPO and reward stages against TRL's trainers: same pairs, model, optimiser and batches,
interleaved, in fp32.

    python -m benchmarks.train_speed
    python -m benchmarks.train_speed --quick        # a look

Each contender takes the same batches from the same weights with the same AdamW; the losses of every
step are compared, because a faster step that learns something else is no step. `trl` is TRL as it
comes (sdpa, gradient checkpointing, the reference model beside the policy), but in fp32; `trl, no
checkpointing` without that; `ours, quarters` holds a quarter of a batch at once (`micro_batch`, as
in the presets). Reference log-probabilities that ours computes beforehand are paid for: their time
over just these batches is added to ours in `times_trl`. Peak memory is taken in a process of each
contender's own, from the start of Python to the last step."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import write
from prefab.trainers.offline import dpo, reward
from prefab.trainers.offline.fitting import fitted
from prefab.trainers.offline.master_weights import master_adamw

MODULES = {"dpo": dpo, "reward": reward}

PARTS = {
    "ours": 1,
    "ours, halves": 2,
    "ours, quarters": 4,
}  # of a batch; the presets hold a quarter at once
CONTENDERS = dict.fromkeys(("dpo", "reward"), ("trl", "trl, no checkpointing", *PARTS))
LEARNING_RATE = 1e-4


def pairs_file(folder: Path, n: int) -> Path:
    """Pairs of the embedded world's grammar, as a file that both sides read; the oracle's word is
    not needed here."""
    from prefab.factory.microworld import grammar

    rng, rows = random.Random(0), []
    while len(rows) < n:
        s = grammar.situation(rng, "train")
        a, b = grammar.answer(rng, s).text, grammar.answer(rng, s).text
        if a != b:
            rows.append(
                {
                    "prompt": [{"role": m.role, "content": m.content} for m in s.prompt.messages],
                    "chosen": a,
                    "rejected": b,
                }
            )
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Contender:
    """A trainer, its batches, and an AdamW of the same settings; a step is forward, backward, clip,
    update."""

    def __init__(
        self,
        trainer: Any,
        batches: list[list[Any]],
        before_s: float = 0.0,
        fused: bool = False,
        precision: str = "fp32",
    ) -> None:
        """Each batch is in parts, whose gradients are added up. `fused`: AdamW in one kernel."""
        import torch

        self.trainer, self.batches, self.before_s = trainer, batches, before_s
        self.model = trainer.model.train()
        kind = master_adamw() if precision == "bf16_weights" else torch.optim.AdamW
        self.optimiser = kind(
            [p for p in self.model.parameters() if p.requires_grad], LEARNING_RATE, fused=fused
        )
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, k: int) -> None:
        """One step on batch k, timed."""
        import torch

        parts = [{name: value.clone() for name, value in part.items()} for part in self.batches[k]]
        began, whole = time.perf_counter(), 0.0
        for part in parts:
            loss = self.trainer.compute_loss(self.model, part) / len(parts)
            loss.backward()
            whole += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.seconds.append(time.perf_counter() - began)
        self.losses.append(whole)


def contender(
    stage: str,
    name: str,
    folder: Path,
    model: str,
    steps: int,
    batch: int,
    more: dict[str, Any] | None = None,
    fused: bool = False,
) -> Contender:
    """One side, ready to step. The rows and their order are those of our buckets, for both; see
    `token_rows`. `more`: fields of our stage; `fused`: see `Contender`."""
    more = more or {}
    rows = json.loads((folder / f"{stage}.json").read_text())
    cut = [rows[k : k + batch] for k in range(0, len(rows), batch)]
    if name.startswith("trl"):
        theirs = _trl(stage, name, folder, model, rows[:2], batch)
        batches = [[theirs.data_collator([_plain(row) for row in some])] for some in cut]
        return Contender(theirs, batches, fused=fused)
    trainer, before_s = ours(stage, folder, model, batch, more)[0], 0.0
    if stage == "dpo":
        before_s = _reference_s(trainer, rows, batch)
    part = max(1, batch // PARTS.get(name, 1))
    if (wanted := more.get("micro_batch")) is not None:
        part = fitted(trainer, "auto", False)["micro_batch"] if wanted == "auto" else wanted
    batches = [
        [trainer.data_collator(some[k : k + part]) for k in range(0, len(some), part)]
        for some in cut
    ]
    side = Contender(trainer, batches, before_s, fused, more.get("precision", "fp32"))
    if stage == "reward":
        import torch

        weight = trainer.model.score.weight
        if not (folder / "head.pt").exists():
            torch.save(weight.data.float(), folder / "head.pt")
        # every round and side begins with one fresh head
        weight.data = torch.load(folder / "head.pt").to(weight.dtype).to(weight.device)
    return side


def ours(
    stage: str, folder: Path, model: str, batch: int, more: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """(trainer, tokenizer) of our stage; `more`: other fields of its configuration."""
    module = MODULES[stage]
    config = module.STAGE.config.model_validate(
        {
            "model": model,
            "out": str(folder / stage),
            "batch_size": batch,
            "patience": None,
            "keep": "last",
            "data": {
                "sources": [{"files": str(folder / "pairs.jsonl")}],
                "labels": "hard",
                "val_share": 0.01,
            },
            **({"reference_cache": str(folder / "cache")} if stage == "dpo" else {"centre": 0.0}),
            **(more or {}),
        }
    )
    trainer, _, tokenizer = module.prepare(config)
    return trainer, tokenizer


def _reference_s(trainer: Any, rows: list[Any], batch: int) -> float:
    """What the reference's log-probabilities of these rows cost, computed anew."""
    from prefab.trainers.offline.reference import compute_logps

    pairs = [
        (row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")
    ]
    began = time.perf_counter()
    pad, precision = trainer.processing_class.pad_token_id, trainer.stage.precision
    compute_logps(trainer.model, pairs, 2 * batch, pad, precision)
    return time.perf_counter() - began


def token_rows(stage: str, folder: Path, model: str, steps: int, batch: int) -> None:
    """Write the rows that both sides step through, as tokens, in the order of our buckets."""
    trainer, _ = ours(stage, folder, model, batch)
    rows = [trainer.train_dataset[i] for i in _order(trainer.train_dataset["length"], steps, batch)]
    (folder / f"{stage}.json").write_text(json.dumps(rows))


def _order(lengths: list[int], steps: int, batch: int) -> list[int]:
    from prefab.trainers import collate

    return list(collate.buckets(lengths, batch, 0, 0))[: steps * batch]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in row}


def _trl(stage: str, name: str, folder: Path, model: str, rows: list[Any], batch: int) -> Any:
    """TRL's trainer at its defaults, in fp32."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from prefab.factory.engines.base import resolve_model

    more = {} if name == "trl" else {"gradient_checkpointing": False}
    settings = {
        "output_dir": str(folder / "trl"),
        "bf16": False,
        "report_to": "none",
        "per_device_train_batch_size": batch,
        **more,
    }
    path = resolve_model(model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if stage == "reward":
        loaded = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype="float32"
        )
        loaded.score.weight.data = torch.load(folder / "head.pt").float()
        some = Dataset.from_list([_plain(row) for row in rows])
        made = trl.RewardTrainer(
            loaded,
            trl.RewardConfig(**_cpu(settings)),
            train_dataset=some,
            processing_class=tokenizer,
        )
    else:
        turns = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
        loaded, reference = (
            AutoModelForCausalLM.from_pretrained(path, dtype="float32") for _ in range(2)
        )
        made = trl.DPOTrainer(
            loaded,
            reference,
            trl.DPOConfig(**_cpu(settings)),
            train_dataset=turns,
            processing_class=tokenizer,
        )
    if made.args.gradient_checkpointing:
        made.model.gradient_checkpointing_enable({"use_reentrant": False})
    return made


def _cpu(settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    return {**settings, "use_cpu": not torch.cuda.is_available()}


def compare(
    stage: str,
    folder: Path,
    model: str,
    steps: int,
    batch: int,
    rounds: int,
    names: Sequence[str],
) -> dict[str, Any]:
    """All contenders step by step in turn, so that whatever else the machine does falls on all
    alike."""
    token_rows(stage, folder, model, steps, batch)
    sides: dict[str, list[Contender]] = {name: [] for name in names}
    for r in range(rounds):
        made = {
            name: contender(stage, name, folder, model, steps, batch) for name in reversed(names)
        }
        for k in range(steps):
            for name in sorted(made, key=lambda n: random.Random(f"{r} {k} {n}").random()):
                made[name].step(k)
        for name, side in made.items():
            sides[name].append(side)
    theirs = sides["trl"][0].losses
    gap = max(
        abs(a - b)
        for name in sides
        for side in sides[name]
        for a, b in zip(side.losses, theirs, strict=True)
    )
    seconds = {name: [sum(side.seconds[1:]) for side in some] for name, some in sides.items()}
    before = statistics.median(side.before_s for side in sides["ours"]) * (steps - 1) / steps
    ratio = {
        name: statistics.median(
            a / (b + (before if name.startswith("ours") else 0))
            for a, b in zip(seconds["trl"], s, strict=True)
        )
        for name, s in seconds.items()
    }
    return {
        "stage": stage,
        "steps": steps,
        "batch": batch,
        "rounds": rounds,
        "losses_differ_by_at_most": gap,
        "first_loss": theirs[0],
        "last_loss": theirs[-1],
        "seconds": seconds,
        "reference_s": before,
        "times_trl": ratio,
    }


def peak_here_mb() -> float:
    """This process's peak. Not `ru_maxrss`: that begins with the peak of whoever started it."""
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def peak_mb(
    stage: str, name: str, folder: Path, model: str, steps: int, batch: int, threads: int
) -> float:
    """Peak resident memory of a few steps, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_speed",
        "--peak",
        stage,
        name,
        "--folder",
        str(folder),
        "--model",
        model,
        "--steps",
        str(min(steps, 4)),
        "--batch",
        str(batch),
        "--threads",
        str(threads),
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(out.strip().splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compare, print, and write; the results."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="prefab-tiny")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--stages", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument(
        "--quick", action="store_true", help="A look: 3 steps of 8 pairs, two contenders."
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--peak", nargs=2, metavar=("STAGE", "NAME"))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.quick:
        args.steps, args.batch, args.rounds, args.model = 3, 8, 1, "prefab-nano"
    if args.peak:
        side = contender(*args.peak, args.folder, args.model, args.steps, args.batch)
        for k in range(args.steps):
            side.step(k)
        print(peak_here_mb())
        return []
    folder = Path(tempfile.mkdtemp())
    pairs_file(folder, int(args.steps * args.batch * 1.2) + 64)
    results = []
    for stage in args.stages:
        names = ("trl", "ours") if args.quick else CONTENDERS[stage]
        found = compare(stage, folder, args.model, args.steps, args.batch, args.rounds, names)
        found["peak_mb"] = {
            name: peak_mb(stage, name, folder, args.model, args.steps, args.batch, args.threads)
            for name in (() if args.quick else names)  # each is a process of its own
        }
        results.append(found)
        print(json.dumps(found, indent=1), flush=True)
    write("train_speed", args.quick, threads=args.threads, model=args.model, results=results)
    return results


if __name__ == "__main__":
    main()
