"""Our DPO and reward stages against TRL's on a GPU: seconds a step, tokens, peak memory, model FLOP
utilisation, and the reference pass by precision.

    python -m benchmarks.gpu_training            # needs a GPU; under 8 minutes
    python -m benchmarks.gpu_training --quick    # a tiny model, on a CPU too: does it work?

Each contender takes the same rows and batches from the same weights with the same AdamW (fused on
a GPU); losses of every step are compared. They run one after another, since two do not fit beside
each other; TRL's in mixed precision (bf16 autocast, weights fp32), ours as its name says. A part
of a step is as large as fits, by the stage's own measurement. A case that fails is recorded, and
the next one runs; what the time does not allow is left out and named. Results are written after
every case, to the folder that $OUT names where it is set.

Utilisation is what the plain method must compute, whoever saves some of it, over what the device
could have computed in the time: tokens of both sides with their prompts, 6 N + 12 layers x width x
length FLOPs each (Chowdhery et al. 2022, appendix B), and for DPO a third of that again for the
reference's forward. The head counts for DPO, and not for a reward model.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import train_speed
from benchmarks.common import NEEDS_GPU, write
from prefab.trainers import collate
from prefab.trainers.common import default_device
from prefab.trainers.offline.gpus import data_sheet
from prefab.trainers.offline.reference import compute_logps

# The shapes of Qwen2.5 0.5B and 1.5B. Rows of the embedding beyond the small tokenizer's are never
# looked up, but the head pays for them, as a real one would.
SHAPES = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}
# What is measured, the most telling first: (stage, shape, pairs a step, contenders).
OURS = ("ours, bf16_weights, compiled", "ours, bf16", "ours, bf16_weights")
SMALL = "ours, bf16_weights, compiled, parts of 4"  # in less memory
TRL = ("trl", "trl, no checkpointing")
CASES = [
    ("dpo", "0.5B", 16, (*OURS, SMALL, *TRL)),
    ("reward", "0.5B", 16, (*OURS, SMALL, *TRL)),
    ("dpo", "1.5B", 16, (OURS[0], SMALL, *TRL)),
    ("reward", "1.5B", 16, (OURS[0], SMALL, *TRL)),
    ("dpo", "0.5B", 64, (OURS[0], TRL[1])),
    ("dpo", "0.5B", 8, ("ours, fp32", "ours, tf32")),
]
QUICK = [
    ("dpo", "tiny", 2, ("ours, fp32", "trl")),
    ("reward", "tiny", 2, ("ours, bf16_weights, parts of 1",)),
]
REFERENCE = ("fp32", "tf32", "bf16")
PASSES = 2  # over the batches; what the first one compiles is not measured


def make_model(folder: Path, shape: str) -> str:
    """A Llama of this shape with random weights, and the embedded model's tokenizer and
    template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prefab.factory.engines.base import resolve_model

    if (folder / shape / "config.json").exists():
        return str(folder / shape)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("prefab-tiny"))
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(default_device()):  # drawing 1.5B numbers takes a minute on a CPU
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder / shape)
    del model
    tokenizer.save_pretrained(folder / shape)
    return str(folder / shape)


def long_pairs(folder: Path, n: int, answers: int) -> None:
    """Pairs whose prompt and sides are each as long as so many answers of the embedded world
    together."""
    from prefab.factory.microworld import grammar

    rng, rows = random.Random(0), []

    def text(s: Any) -> str:
        return " ".join(grammar.answer(rng, s).text for _ in range(answers))

    while len(rows) < n:
        s = grammar.situation(rng, "train")
        rows.append({"prompt": f"{len(rows)} {text(s)}", "chosen": text(s), "rejected": text(s)})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def flops(stage: str, model: Any, rows: list[dict[str, Any]]) -> tuple[int, float]:
    """(tokens, model FLOPs) that the plain method takes for these rows: forward and backward, and
    DPO's reference."""
    config = model.config
    embedding = model.get_input_embeddings().weight.numel()
    weights = (
        sum(p.numel() for p in model.parameters())
        - embedding
        + (embedding if stage == "dpo" else 0)
    )
    lengths = [
        len(row.get("prompt_ids", ())) + len(row[f"{side}_ids"])
        for row in rows
        for side in ("chosen", "rejected")
    ]
    work = sum(
        t * (6 * weights + 12 * config.num_hidden_layers * config.hidden_size * t) for t in lengths
    )
    return sum(lengths), work * (4 / 3 if stage == "dpo" else 1.0)


def settings(name: str) -> dict[str, Any]:
    """The fields of our stage that a contender's name tells: `ours, bf16_weights, compiled, parts
    of 4` (pairs that are in memory at once; else as many as fit).
    """
    words = name.split(", ")
    as_fits = "auto" if default_device() != "cpu" else None
    parts = [int(word.removeprefix("parts of ")) for word in words if word.startswith("parts of ")]
    return {
        "precision": words[1] if words[0] == "ours" else "fp32",
        "compile": "compiled" in words,
        "micro_batch": parts[0] if parts else as_fits,
    }


def measure(case: Case, name: str, folder: Path, peak_tflops: float | None) -> dict[str, Any]:
    """One contender: losses, the median step's seconds in the second pass over the batches, and
    what follows from them. In the first pass kernels are chosen and compiled for each length.
    """
    import torch

    device, began = default_device(), time.perf_counter()
    clear(device)
    stage, model, steps = case.stage, case.model, case.steps
    side = train_speed.contender(
        stage, name, folder, model, steps, case.batch, settings(name), device != "cpu"
    )
    side.model.to(device)
    autocast = name.startswith("trl") or name == "ours, bf16"
    ready_s = time.perf_counter() - began
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for parts in side.batches * PASSES:
        began, whole = time.perf_counter(), torch.zeros((), device=device)
        for part in parts:
            on = collate.to_device(part, device)
            with torch.autocast(device, torch.bfloat16, enabled=autocast and device == "cuda"):
                loss = side.trainer.compute_loss(side.model, on) / len(parts)
            loss.backward()
            whole += loss.detach()
        torch.nn.utils.clip_grad_norm_(side.model.parameters(), 1.0)
        side.optimiser.step()
        side.optimiser.zero_grad()
        losses.append(whole.item())  # waits for the device
        seconds.append(time.perf_counter() - began)
    rows = json.loads((folder / f"{stage}.json").read_text())
    tokens, work = flops(stage, side.model, rows)
    reference_s = side.before_s / steps
    step_s = statistics.median(seconds[-steps:]) + reference_s
    peak = peak_tflops * 1e12 if peak_tflops else None
    return {
        "contender": name,
        "step_s": step_s,
        "reference_s_of_it": reference_s,
        "first_pass_step_s": statistics.median(seconds[:steps]) + reference_s,
        "parts_a_step": len(side.batches[0]),
        "tokens_a_step": tokens / steps,
        "tokens_a_second": tokens / steps / step_s,
        "mfu": work / steps / step_s / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "ready_s": ready_s,
        "losses": losses[:steps],
    }


@dataclass(frozen=True, slots=True)
class Case:
    """A stage on a model: `batch` pairs a step."""

    stage: str
    model: str
    steps: int
    batch: int


def clear(device: str) -> None:
    """Free the memory of the contender before."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def reference_pass(case: Case, folder: Path) -> dict[str, Any]:
    """Seconds a step of the reference's log-probabilities by precision, and how far they are from
    those of fp32, in nats an answer on the mean.
    """
    trainer = train_speed.ours("dpo", folder, case.model, case.batch)[0]
    rows = json.loads((folder / "dpo.json").read_text())
    pairs = [(r["prompt_ids"], r[f"{side}_ids"]) for r in rows for side in ("chosen", "rejected")]
    pad, found, exact = trainer.processing_class.pad_token_id, {}, []
    trainer.model.to(default_device())
    for precision in REFERENCE if default_device() == "cuda" else REFERENCE[:1]:
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            logps = compute_logps(trainer.model, pairs, 2 * case.batch, pad, precision)
        seconds = (time.perf_counter() - began) / case.steps
        exact = exact or logps
        gap = statistics.fmean(abs(a - b) for a, b in zip(logps, exact, strict=True))
        found[precision] = {"seconds_a_step": seconds, "difference": gap}
    return found


def run_case(
    found: dict[str, Any],
    case: Case,
    contenders: Sequence[str],
    folder: Path,
    answers: int,
    peak_tflops: float | None,
    late: Callable[[], bool],
) -> None:
    """All contenders of a case, ours first (it draws the reward model's head). What fails is
    recorded.
    """
    long_pairs(folder, int(case.steps * case.batch * 1.2) + 64, answers)
    train_speed.token_rows(case.stage, folder, case.model, case.steps, case.batch)
    sides: list[dict[str, Any]] = []
    found |= {"contenders": sides, "errors": {}, "left_out": []}
    for name in contenders:
        if late():
            found["left_out"].append(name)
            continue
        try:
            sides.append(measure(case, name, folder, peak_tflops))
            print(json.dumps(sides[-1]), flush=True)
        except Exception as error:  # out of memory, a kernel that is missing: the next one runs
            found["errors"][name] = "".join(traceback.format_exception(error))[-1500:]
            print(f"{name} failed: {error!r}"[:400], flush=True)
    if sides:
        first = sides[0]
        for f in sides:
            f["losses_differ_by_at_most"] = {
                other["contender"]: max(
                    abs(a - b) for a, b in zip(f["losses"], other["losses"], strict=True)
                )
                for other in sides
            }
        found["times"] = {f["contender"]: f["step_s"] / first["step_s"] for f in sides}
    if case.stage == "dpo" and not late():
        found["reference"] = reference_pass(case, folder)
        print(json.dumps(found["reference"]), flush=True)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compare, print, and write; the results. Without a GPU only `--quick` runs."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--answers",
        type=int,
        default=8,
        help="Length of prompt and of each side: so many short answers.",
    )
    parser.add_argument("--seconds", type=float, default=440, help="What begins later is left out.")
    parser.add_argument(
        "--peak-tflops", type=float, help="Dense bf16 of the device; left out: known for a few."
    )
    parser.add_argument(
        "--quick", action="store_true", help="A tiny model, on the CPU as well: 3 steps of 2 pairs."
    )
    args = parser.parse_args(arguments)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu is None and not args.quick:
        parser.error(NEEDS_GPU)
    cases = QUICK if args.quick else CASES
    if args.quick:
        args.steps, args.answers = 3, 1
    sheet = data_sheet(gpu) if gpu else None
    peak, began, results = args.peak_tflops or (sheet[0] if sheet else None), time.monotonic(), []
    with tempfile.TemporaryDirectory() as models:
        for stage, shape, batch, contenders in cases:
            found: dict[str, Any] = {"stage": stage, "shape": shape, "batch": batch}
            results.append(found)
            folder = Path(models) / f"{len(results)}"
            folder.mkdir()
            try:
                case = Case(stage, make_model(Path(models), shape), args.steps, batch)
                run_case(
                    found,
                    case,
                    contenders,
                    folder,
                    args.answers,
                    peak,
                    lambda: time.monotonic() - began > args.seconds,
                )
            except Exception as error:
                found["error"] = "".join(traceback.format_exception(error))[-1500:]
            found["at_s"] = round(time.monotonic() - began, 1)
            write("gpu_training", args.quick, gpu=gpu, peak_tflops=peak, results=results)
    return results


if __name__ == "__main__":
    main()
