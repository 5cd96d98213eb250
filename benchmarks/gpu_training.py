"""Our DPO and reward stages against TRL's on a GPU: seconds a step, tokens, peak memory, and model
FLOP utilisation.

    python -m benchmarks.gpu_training            # needs a GPU: 0.5B and 1.5B, random weights
    python -m benchmarks.gpu_training --quick    # a tiny model, on a CPU too: does it work?

The contenders are those of `benchmarks.train_speed` (same rows, batches, weights and AdamW; losses
are compared), in mixed precision (bf16 autocast, weights fp32), one after another, since two do not
fit beside each other. Utilisation is what the plain method must compute, whoever saves some of it,
over what the device could have computed in the time: tokens of both sides with their prompts, 6 N +
12 layers x width x length FLOPs each (Chowdhery et al. 2022, appendix B), and for DPO a third of
that again for the reference's forward. The head counts for DPO, and not for a reward model.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import train_speed
from benchmarks.common import write

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
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "4090": 165.0,
}  # dense bf16, from the data sheets


def make_model(folder: Path, shape: str) -> str:
    """A Llama of this shape with random weights, and the embedded model's tokenizer and
    template."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prefab.factory.engines.base import resolve_model

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
    LlamaForCausalLM(config).save_pretrained(folder / shape)
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


def measure(
    stage: str,
    name: str,
    folder: Path,
    model: str,
    steps: int,
    batch: int,
    peak_tflops: float | None,
) -> dict[str, Any]:
    """One contender: losses, the median step's seconds (without the first two), and what follows
    from them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    side = train_speed.contender(stage, name, folder, model, steps, batch)
    side.model.to(device)
    seconds, losses = [], []
    for parts in side.batches:
        began, whole = time.perf_counter(), torch.zeros((), device=device)
        for part in parts:
            on = {k: v.to(device, non_blocking=True) for k, v in part.items()}
            with torch.autocast(device, torch.bfloat16):
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
    step_s = statistics.median(seconds[2:]) + side.before_s / steps
    found = {
        "contender": name,
        "step_s": step_s,
        "reference_s_of_it": side.before_s / steps,
        "tokens_a_second": tokens / steps / step_s,
        "mfu": work / steps / step_s / (peak_tflops * 1e12) if peak_tflops else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "losses": losses,
    }
    del side
    gc.collect()
    return found


def compare(
    stage: str,
    shape: str,
    steps: int,
    batch: int,
    answers: int,
    peak_tflops: float | None,
    contenders: Sequence[str],
) -> dict[str, Any]:
    """All contenders of a stage on one model, ours first (it draws the reward model's head)."""
    folder = Path(tempfile.mkdtemp())
    model = make_model(folder, shape)
    long_pairs(folder, int(steps * batch * 1.2) + 64, answers)
    train_speed.token_rows(stage, folder, model, steps, batch)
    found = [
        measure(stage, name, folder, model, steps, batch, peak_tflops)
        for name in reversed(contenders)
    ]
    ours = next(f for f in found if f["contender"].startswith("ours"))
    gap = max(abs(a - b) for f in found for a, b in zip(f["losses"], ours["losses"], strict=True))
    return {
        "stage": stage,
        "shape": shape,
        "steps": steps,
        "batch": batch,
        "losses_differ_by_at_most": gap,
        "times": {f["contender"]: f["step_s"] / ours["step_s"] for f in found},
        "contenders": found,
    }


def main() -> None:
    """Compare, print, and write. Without a GPU only `--quick` runs."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["0.5B", "1.5B"], choices=list(SHAPES))
    parser.add_argument("--stages", nargs="+", default=["dpo", "reward"], choices=["dpo", "reward"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--answers",
        type=int,
        default=8,
        help="Length of prompt and of each side: so many short answers.",
    )
    parser.add_argument(
        "--peak-tflops", type=float, help="Dense bf16 of the device; left out: known for a few."
    )
    parser.add_argument(
        "--quick", action="store_true", help="A tiny model, on the CPU as well: 3 steps of 2 pairs."
    )
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu is None and not args.quick:
        parser.error(
            "this benchmark needs a GPU and there is none here; --quick shows on a CPU that the "
            "script works"
        )
    if args.quick:
        args.shapes, args.steps, args.batch, args.answers = ["tiny"], 3, 2, 1
    peak = args.peak_tflops or next(
        (t for name, t in PEAK_TFLOPS.items() if gpu and name in gpu), None
    )
    results = []
    for shape in args.shapes:
        for stage in args.stages:
            sides = ("trl", "ours, halves") if args.quick else train_speed.CONTENDERS[stage]
            results.append(compare(stage, shape, args.steps, args.batch, args.answers, peak, sides))
            print(json.dumps(results[-1], indent=1), flush=True)
    write("gpu_training", args.quick, gpu=gpu, peak_tflops=peak, results=results)


if __name__ == "__main__":
    main()
