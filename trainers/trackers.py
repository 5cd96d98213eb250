"""Experiment trackers: metrics of a training, also sent to where `report` names.

Nothing is sent anywhere unless it is asked for. TensorBoard and Trackio write files on this
machine; Weights & Biases sends to its server. The packages are optional.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from prefab.factory.errors import ConfigError

Tracker = Literal["tensorboard", "wandb", "trackio"]
PACKAGES: dict[Tracker, tuple[str, ...]] = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
PROJECT = "prefab"


class Sink(Protocol):
    """One open tracker."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""

    def image(self, step: int, name: str, file: Path) -> None:
        """Send a picture (PNG)."""

    def close(self) -> None:
        """Send what is left."""


class Trackers:
    """All trackers of one training. Use it as a context manager."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self.sinks = sinks

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the finite numbers among the metrics of a step."""
        if not self.sinks:
            return
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for sink in self.sinks:
            sink.log(step, numbers)

    def image(self, step: int, name: str, file: Path) -> None:
        """Send a picture (PNG)."""
        for sink in self.sinks:
            sink.image(step, name, file)

    def close(self) -> None:
        """Close all of them."""
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises: ConfigError where the package of a tracker is not installed."""
    for name in names:
        if not any(find_spec(package) for package in PACKAGES[name]):
            raise ConfigError(
                f"report: {name} is not installed: pip install {PACKAGES[name][0]}; or leave it out"
            )


def open_trackers(
    names: Sequence[Tracker], out: Path, config: Mapping[str, Any], step: int = 0
) -> Trackers:
    """Open trackers for the training in `out`, which goes on after `step`.

    Args:
        names: Which; none is allowed.
        out: The output folder. TensorBoard's files are written to `tensorboard/` in it.
        config: The training's settings, which Weights & Biases and Trackio show.
        step: The last step of an earlier start; what was written after it is replaced.

    Raises:
        ConfigError: A package is missing.
    """
    check_trackers(names)
    opened: dict[Tracker, Callable[[Path, Mapping[str, Any], int], Sink]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
        "trackio": _Trackio,
    }
    return Trackers([opened[name](Path(out), config, step) for name in names])


class _TensorBoard:
    def __init__(self, out: Path, _: Mapping[str, Any], step: int) -> None:
        package = "torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX"
        self.writer = import_module(package).SummaryWriter(
            str(out / "tensorboard"), purge_step=step + 1 if step else None
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, file: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, out: Path, config: Mapping[str, Any], _: int) -> None:
        import wandb

        self.module = wandb
        self.run = wandb.init(
            project=PROJECT,
            name=out.name,
            id=hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16],
            dir=str(out),
            config=dict(config),
            resume="allow",  # a training that goes on is the same run there
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def image(self, step: int, name: str, file: Path) -> None:
        self.run.log({name: self.module.Image(str(file))}, step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, out: Path, config: Mapping[str, Any], _: int) -> None:
        import trackio

        self.module = trackio
        trackio.init(project=PROJECT, name=out.name, config=dict(config), resume="allow")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.module.log(dict(metrics), step=step)

    def image(self, step: int, name: str, file: Path) -> None:
        self.module.log({name: self.module.Image(str(file))}, step=step)

    def close(self) -> None:
        self.module.finish()
