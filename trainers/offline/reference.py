"""Log-probabilities of answers under a frozen reference, computed once and cached by content.

The key is what decides them: the reference's weights and precision, the prompt's tokens, the
answer's. So another epoch, another seed, another learning rate or another selection of the same
rows costs no forward pass.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefab.factory.keys import model_identity
from prefab.trainers import collate
from prefab.trainers.common import model_folder

Pair = tuple[list[int], list[int]]  # prompt and answer


def weights_of(model: Any, name: str) -> str:
    """What identifies a loaded reference: its weights at `name`, and their precision in memory."""
    return model_identity(model_folder(name), str(next(model.parameters()).dtype))


def cache_folder(named: str | None, out: str) -> Path:
    """The folder of cached log-probabilities: as named, else `reference/` beside the output."""
    return Path(named) if named else Path(out).parent / "reference"


def reference_logps(
    model: Any, identity: str, pairs: Sequence[Pair], cache: Path, batch: int, pad: int
) -> list[float]:
    """The summed log-probability of each answer after its prompt, in the order of `pairs`.

    `model` needs the scored forward (`collate.add_scored_forward`), and is read in evaluation mode.
    """
    keys = [_key(pair) for pair in pairs]
    file = Path(cache) / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.parquet"
    known = _read(file)
    missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}
    if missing:
        known |= dict(
            zip(missing, compute_logps(model, list(missing.values()), batch, pad), strict=True)
        )
        _write(file, known)
    return [known[key] for key in keys]


def _key(pair: Pair) -> str:
    return hashlib.sha256(repr(pair).encode()).hexdigest()[:32]


def compute_logps(model: Any, pairs: Sequence[Pair], batch: int, pad: int) -> list[float]:
    """The summed log-probability of each answer after its prompt, without gradient, in the order of
    `pairs`.

    About `batch` answers a forward; those to one prompt share it where the model can. The longest
    first, so that memory that does not suffice is met at once.
    """
    import torch

    device, dtype, was = (
        next(model.parameters()).device,
        next(model.parameters()).dtype,
        model.training,
    )
    share = collate.can_share(model, getattr(model.config, "_attn_implementation", ""), device)
    found = [0.0] * len(pairs)
    model.eval()
    with torch.no_grad():
        for groups in _batches(_groups(pairs, share), batch):
            order = [i for group in groups for i in group]
            at = {i: k for k, i in enumerate(order)}
            laid = collate.lay_out(
                [[(pairs[group[0]][0], [(at[i], pairs[i][1]) for i in group])] for group in groups],
                pad,
            )
            laid = {name: value.to(device) for name, value in laid.items()}
            logps, _ = collate.answer_logps(model, laid, dtype)
            for i, value in zip(order, logps.tolist(), strict=True):
                found[i] = value
    model.train(was)
    return found


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


def _batches(groups: Sequence[list[int]], batch: int) -> Iterator[list[list[int]]]:
    """Rows of about `batch` pairs together, at least one."""
    some: list[list[int]] = []
    for group in groups:
        if some and sum(map(len, some)) + len(group) > batch:
            yield some
            some = []
        some.append(group)
    yield from [some] if some else []


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
