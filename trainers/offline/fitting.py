"""Rows in memory at once: chosen for a CPU, measured on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from prefab.trainers.common import TrainError

GIB = 2**30
ROWS_ON_CPU = 8  # the fastest of 4, 8, 16 and 32 there


def divisors(rows: int) -> list[int]:
    """The sizes into which `rows` can be cut evenly, the smallest first."""
    return [n for n in range(1, rows + 1) if rows % n == 0]


def first_micro_batch(wanted: int | Literal["auto"] | None, rows: int, device: str) -> int:
    """The micro-batch of a process that has `rows` of each step. For `auto` on a GPU it is all of
    them, until `largest_that_fits` has measured.
    """
    if wanted == "auto" and device == "cpu":
        return max(n for n in divisors(rows) if n <= ROWS_ON_CPU)
    return rows if wanted in (None, "auto") else min(int(wanted), rows)


def largest_that_fits(
    sizes: Sequence[int], attempt: Callable[[int], int | None], budget: int
) -> int | None:
    """The largest size whose peak memory is within the budget.

    Memory is taken to grow by a constant a row: two measurements predict the others, and what is
    predicted is tried before it is taken.

    Args:
        sizes: The possible sizes, ascending.
        attempt: Peak bytes of a step of such a size, or None where memory ran out.
        budget: Bytes that may be used.

    Returns:
        The size, or None where not even the smallest fits.
    """
    peaks: dict[int, int] = {}
    low, high = -1, len(sizes)  # sizes[low] fits, sizes[high] does not
    at = 0
    while low + 1 < high:
        peak = attempt(sizes[at])
        if peak is None or peak > budget:
            high = at
        else:
            low, peaks[sizes[at]] = at, peak
        if low + 1 >= high:
            break
        at = min(_predicted(sizes, peaks, budget), high - 1)
        if at <= low:
            break
    return sizes[low] if low >= 0 else None


def _predicted(sizes: Sequence[int], peaks: dict[int, int], budget: int) -> int:
    """The index of the largest size that should fit, by the two largest measurements; with fewer
    the next one.
    """
    known = sorted(peaks)[-2:]
    if len(known) < 2:
        return sizes.index(known[0]) + 1 if known else 0
    small, large = known
    a_row = max(1, peaks[large] - peaks[small]) / (large - small)
    most = large + (budget - peaks[large]) / a_row
    return max(i for i, size in enumerate(sizes) if size <= max(most, large))


def fitted(
    trainer: Any, micro_batch: int | Literal["auto"] | None, checkpointing: bool | Literal["auto"]
) -> dict[str, Any]:
    """The largest micro-batch that fits on the trainer's GPU, and whether activations must be
    computed twice for it. Several processes agree on what fits on all of them.

    Raises: TrainError where not even the smallest fits.
    """
    import torch

    args = trainer.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    sizes = divisors(rows) if micro_batch == "auto" else [args.per_device_train_batch_size]
    tries = {True: [True], False: [False], "auto": [False, True]}[checkpointing]
    budget = _budget(trainer, args.device)
    for twice in tries:
        found = largest_that_fits(sizes, partial(_peak, trainer, twice), budget) or 0
        if args.world_size > 1:
            mine = torch.tensor([found], device=args.device)
            found = int(trainer.accelerator.gather(mine).min())
        if found:
            return {"micro_batch": found, "gradient_checkpointing": twice}
    raise TrainError(
        f"not even {sizes[0]} of the longest rows fit on the GPU (of {budget / GIB:.1f} GiB that "
        "can be used after optimiser and gradients). " + remedies(trainer.stage)
    )


def remedies(config: Any, micro_batch: int = 1) -> str:
    """What takes less memory than this configuration, in the order in which to try it.
    `micro_batch`: what fits, where it is known.
    """
    tried = [
        (
            f"micro_batch: {micro_batch} (the result stays the same)",
            config.micro_batch not in (1, "auto"),
        ),
        ("gradient_checkpointing: true", config.gradient_checkpointing is False),
        ("precision: bf16", config.precision in ("fp32", "tf32")),
        ("lora: {rank: 16}", config.lora is None),
        ("lora: {bits: 4}", config.lora is not None and config.lora.bits is None),
        ("a smaller data.max_length", True),
    ]
    return "Try " + ", ".join(words for words, possible in tried if possible)


def memory_advice(trainer: Any) -> str:
    """What to change where memory ran out: what was used, and what takes less."""
    args, config = trainer.args, trainer.stage
    rows = int(args.per_device_train_batch_size)
    told = f"{rows} rows were in memory at once"
    if args.device.type == "cuda":
        import torch

        free, whole = torch.cuda.mem_get_info(args.device)
        others = whole - free - torch.cuda.memory_reserved(args.device)
        peak = torch.cuda.max_memory_allocated(args.device)
        told += (
            f"; the peak was {peak / GIB:.1f} of {whole / GIB:.1f} GiB, and other programs and the "
            f"driver hold {others / GIB:.1f}"
        )
    half = next((n for n in reversed(divisors(rows)) if n <= rows // 2), 1)
    return f"{told}. {remedies(config, half)}"


def _budget(trainer: Any, device: Any) -> int:
    """Bytes that a step may use at its peak: what is free or ours, less the optimiser's state and a
    reserve of a twentieth for fragments.
    """
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    state = 12 if trainer.stage.precision == "bf16_weights" else 8
    return int(0.95 * (free + ours)) - state * int(trained)


def _peak(trainer: Any, checkpointing: bool, rows: int) -> int | None:
    """Peak bytes of forward and backward on the longest rows, without a trace in the training; None
    where memory runs out.
    """
    import torch

    device, model, data = trainer.args.device, trainer.model, trainer.train_dataset
    longest = sorted(range(len(data)), key=data["length"].__getitem__)[-rows:]
    batch = trainer.data_collator([data[i] for i in longest])
    switch = "gradient_checkpointing_enable" if checkpointing else "gradient_checkpointing_disable"
    getattr(model, switch)()
    if checkpointing and hasattr(model, "peft_config"):
        model.enable_input_require_grads()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    places = trainer.places
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.train()
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
            loss.backward()
        return int(torch.cuda.max_memory_allocated(device))
    except torch.OutOfMemoryError:
        return None
    finally:
        trainer.places = places
        trainer.sums["train"].clear()
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
