"""Log-probabilities of answers under a frozen reference, computed once and cached by content.

The key is what decides them: the reference's weights and precision, the prompt's tokens, the
answer's. So another epoch, another seed, another learning rate or another selection of the same
rows costs no forward pass.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefab.factory.keys import model_identity
from prefab.trainers import collate
from prefab.trainers.common import FLASH, Precision, autocast_for, model_folder

Pair = tuple[list[int], list[int]]  # prompt and answer
COLUMNS = 32_768  # places of a forward on a GPU, padding included
TOLD = 16  # answers whose log-probabilities are also computed in fp32, to tell the difference
EXACT: Precision = "fp32"


def weights_of(model: Any, name: str, precision: Precision = "fp32") -> str:
    """What identifies a loaded reference: its weights at `name`, and the precision of the weights
    in memory and of the computation.
    """
    dtype = str(next(model.parameters()).dtype)
    if getattr(model, "is_quantized", False):
        dtype += f" {model.config.quantization_config.to_json_string()}"
    return model_identity(
        model_folder(name), dtype if precision == "fp32" else f"{dtype} {precision}"
    )


def cache_folder(named: str | None, out: str) -> Path:
    """The folder of cached log-probabilities: as named, else `reference/` beside the output."""
    return Path(named) if named else Path(out).parent / "reference"


def reference_logps(
    model: Any,
    identity: str,
    pairs: Sequence[Pair],
    cache: Path,
    batch: int,
    pad: int,
    precision: Precision = "fp32",
    notes: list[str] | None = None,
) -> list[float]:
    """The summed log-probability of each answer after its prompt, in the order of `pairs`.

    Args:
        model: With the scored forward (`collate.add_scored_forward`); it is read in evaluation
            mode.
        identity: See `weights_of`.
        pairs: Tokens of prompts and answers.
        cache: The folder of earlier results.
        batch: See `compute_logps`.
        pad: The padding token.
        precision: The training's.
        notes: Where the difference from fp32 is told, measured on a few answers.
    """
    keys = [_key(pair) for pair in pairs]
    file = Path(cache) / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.parquet"
    known = _read(file)
    missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
    if missing:
        left = list(missing.values())
        known |= dict(zip(missing, compute_logps(model, left, batch, pad, precision), strict=True))
        _write(file, known)
        if notes is not None and precision in ("tf32", "bf16"):
            some = left[:: -(-len(left) // TOLD)]
            notes.append(_difference(model, some, batch, pad, precision))
    return [known[key] for key in keys]


def _difference(
    model: Any, pairs: Sequence[Pair], batch: int, pad: int, precision: Precision
) -> str:
    """How far the log-probabilities of this precision are from those of fp32."""
    here, exact = (compute_logps(model, pairs, batch, pad, p) for p in (precision, EXACT))
    gap = sum(abs(a - b) for a, b in zip(here, exact, strict=True)) / len(pairs)
    return (
        f"the reference's log-probabilities are computed in {precision}, as in training; on "
        f"{len(pairs)} answers they differ from fp32's by {gap:.2g} nats an answer on the mean"
    )


def _key(pair: Pair) -> str:
    return hashlib.sha256(repr(pair).encode()).hexdigest()[:32]


def compute_logps(
    model: Any, pairs: Sequence[Pair], batch: int, pad: int, precision: Precision = "fp32"
) -> list[float]:
    """The summed log-probability of each answer after its prompt, without gradient, in the order of
    `pairs`.

    Those to one prompt share it where the model can. On a CPU about `batch` answers a forward; on a
    GPU rows of `COLUMNS` places together, half as many where memory runs out. The longest first, so
    that memory that does not suffice is met at once. Results are read from the device at the end.
    """
    import torch

    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    attention, was = getattr(model.config, "_attn_implementation", ""), model.training
    share = collate.can_share(model, attention, device)
    layout: dict[str, Any] = {"flat": attention in FLASH, "multiple": 1}
    columns = 0
    if device.type != "cpu":
        layout["multiple"], columns = 8, COLUMNS
    groups, order, logps = _groups(pairs, share), [], []
    model.eval()
    with torch.no_grad(), autocast_for(precision, device), _matmuls(precision):
        while groups:
            some = _together(groups, pairs, batch, columns)
            members = [i for group in some for i in group]
            try:
                logps.append(_read_groups(model, some, pairs, pad, layout, device, dtype))
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                torch.cuda.empty_cache()
                batch, columns = max(1, len(members) // 2), columns // 2
                continue
            order += members
            del groups[: len(some)]
        values = torch.cat(logps).tolist() if logps else []
    model.train(was)
    found = dict(zip(order, values, strict=True))
    return [found[i] for i in range(len(pairs))]


def _read_groups(
    model: Any,
    groups: Sequence[Sequence[int]],
    pairs: Sequence[Pair],
    pad: int,
    layout: dict[str, Any],
    device: Any,
    dtype: Any,
) -> Any:
    """The log-probabilities of the answers of these groups, in their order. Shapes: A."""
    at = {i: k for k, i in enumerate(i for group in groups for i in group)}
    rows = [[(pairs[group[0]][0], [(at[i], pairs[i][1]) for i in group])] for group in groups]
    laid = collate.to_device(collate.lay_out(rows, pad, **layout), device)
    return collate.answer_logps(model, laid, dtype)[0]


@contextmanager
def _matmuls(precision: Precision) -> Iterator[None]:
    """Products of fp32 in full precision or in TF32, as named."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _groups(pairs: Sequence[Pair], share: bool) -> list[list[int]]:
    """Numbers of pairs that stand in one row, the longest row first: answers to one prompt, no more
    than make the row twice as long as the longest pair, since its mask is that length squared.
    """
    most = 2 * max(len(prompt) + len(answer) for prompt, answer in pairs)
    groups: list[list[int]] = []
    lengths: list[int] = []
    open_at: dict[tuple[int, ...], int] = {}
    for i, (prompt, answer) in enumerate(pairs):
        at = open_at.get(tuple(prompt)) if share else None
        if at is None or lengths[at] + len(answer) > most:
            at = open_at[tuple(prompt)] = len(groups)
            groups.append([])
            lengths.append(len(prompt))
        groups[at].append(i)
        lengths[at] += len(answer)
    return [groups[k] for k in sorted(range(len(groups)), key=lambda k: -lengths[k])]


def _together(
    groups: Sequence[list[int]], pairs: Sequence[Pair], batch: int, columns: int
) -> list[list[int]]:
    """The first groups that go into one forward, at least one: of about `batch` pairs, or, where
    `columns` is given, padded to no more places than that.
    """
    longest = len(pairs[groups[0][0]][0]) + sum(len(pairs[i][1]) for i in groups[0])
    n, answers = 1, len(groups[0])
    for group in groups[1:]:
        answers += len(group)
        if ((n + 1) * longest > columns) if columns else answers > batch:
            break
        n += 1
    return list(groups[:n])


def _read(file: Path) -> dict[str, float]:
    import polars as pl

    if not file.exists():
        return {}
    try:
        frame = pl.read_parquet(file, glob=False)
    except (pl.exceptions.PolarsError, OSError):
        return {}  # cut off while written by an older version: computed again
    return dict(zip(frame["key"], frame["logp"], strict=True))


def _write(file: Path, known: dict[str, float]) -> None:
    """Whole or not at all; a second process that writes at the same time may cost its rows, never a
    wrong one.
    """
    import polars as pl

    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    pl.DataFrame({"key": list(known), "logp": list(known.values())}).write_parquet(part)
    os.replace(part, file)
