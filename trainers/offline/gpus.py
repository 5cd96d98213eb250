"""What GPUs can compute, by their data sheets."""

from __future__ import annotations

from typing import Any

from prefab.trainers.common import Precision

# Dense bf16 FLOP/s of the data sheets, in units of 1e12, and memory in GiB.
GPUS: dict[str, tuple[float, float]] = {
    "H200": (989.0, 141.0),
    "H100": (989.0, 80.0),
    "A100": (312.0, 80.0),
    "L40S": (362.0, 48.0),
    "L4": (121.0, 24.0),
    "A10G": (70.0, 24.0),
    "RTX 4090": (165.0, 24.0),
    "RTX 3090": (71.0, 24.0),
    "T4": (65.0, 16.0),
}
OF_BF16 = {"bf16": 1.0, "bf16_weights": 1.0, "tf32": 0.5, "fp32": 1 / 15}


def data_sheet(name: str) -> tuple[float, float] | None:
    """(FLOP/s in bf16 in units of 1e12, GiB) of a GPU by its name; None where it is not known."""
    matches = [found for known, found in GPUS.items() if known.lower() in name.lower()]
    return matches[0] if matches else None


def peak_flops(device: Any, precision: Precision) -> float | None:
    """FLOP/s of a device in a precision; None for a CPU and for GPUs that are not known."""
    if device.type != "cuda":
        return None
    import torch

    sheet = data_sheet(torch.cuda.get_device_name(device))
    return sheet[0] * 1e12 * OF_BF16[precision] if sheet else None
