"""Several processes under `accelerate launch`: who writes, who waits, and rows that are even for
all.

Each process reads all data and takes its share of every step's rows, so that a step is the same
however many there are.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Literal

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def world_size() -> int:
    """How many processes train together, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def end_with_launcher() -> None:
    """Have the kernel kill this process when its launcher ends, however that ends (Linux alone has
    this).

    The launcher puts its processes into sessions of their own: after a `kill -9` they would train
    on, and write into the folder that the same command, run again, goes on from.
    """
    if world_size() > 1 and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def forget_earlier_runs() -> None:
    """Reset the state that accelerate shares between all objects of a process, so that a run may
    have another precision than an earlier one. Under a launcher a process trains one run.
    """
    if world_size() > 1:
        return
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    # transformers sets it for each run and accelerate reads it for the next one
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def accelerator_for(precision: Literal["fp32", "bf16"]) -> Any:
    """A fresh Accelerator of this precision, whatever was trained before in this process."""
    from accelerate import Accelerator

    forget_earlier_runs()
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")


def main_alone(work: Callable[[], None]) -> None:
    """Do `work` in the main process while the others wait for it."""
    if world_size() == 1:
        return work()
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    if is_main():
        work()
    state.wait_for_everyone()


class Padded:
    """A dataset whose length is a multiple of `batch`: rows past its end are its first row with
    nothing to learn.

    Without it accelerate fills the last, smaller step with rows of the epoch's beginning, which
    would then count twice.
    """

    def __init__(self, dataset: Any, batch: int) -> None:
        self.dataset = dataset
        self.extra = -len(dataset) % batch
        self.blank = blank(dataset[0])

    def __len__(self) -> int:
        return len(self.dataset) + self.extra

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.dataset[i] if i < len(self.dataset) else self.blank


def blank(row: dict[str, Any]) -> dict[str, Any]:
    """A row without a label (SFT, packed or not), or of weight 0."""

    def nothing(labels: list[Any]) -> list[Any]:
        return [nothing(one) if isinstance(one, list) else -100 for one in labels]

    return {**row, "labels": nothing(row["labels"])} if "labels" in row else {**row, "weight": 0.0}
