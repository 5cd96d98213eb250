"""The random numbers that draw tokens: a row for each answer, a function of the answer's seed and
of the token's place alone, whichever rows stand beside it.

On a CPU each row has a generator. On a GPU that would launch a kernel for each row of each token,
so there the numbers are a hash of seed, place and token, computed for all rows together.
Axes: B rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Generator, Tensor

HASHED = ("cuda",)  # kinds of device whose noise is hashed


class Noise(Protocol):
    """Exponential noise for the rows of a batch, from the first token on."""

    def rows(self, n: int) -> Tensor:
        """Noise for the next token of each row, B n."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""


def noise_for(seeds: Sequence[int], device: Any) -> Noise:
    """Noise for a row of each seed, on this device."""
    import torch

    kind = torch.device(device).type
    return HashedNoise(seeds, device) if kind in HASHED else GeneratorNoise(seeds, device)


class GeneratorNoise:
    """A generator a row."""

    def __init__(self, seeds: Sequence[int], device: Any) -> None:
        import torch

        self.draws: list[Generator] = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def rows(self, n: int) -> Tensor:
        """See `Noise.rows`."""
        import torch

        noise = torch.empty(len(self.draws), n, device=self.draws[0].device)
        for row, draw in zip(noise, self.draws, strict=True):
            row.exponential_(generator=draw)
        return noise

    def keep(self, rows: Sequence[int]) -> None:
        """See `Noise.keep`."""
        self.draws = [self.draws[b] for b in rows]


class HashedNoise:
    """A key of 64 bits a row; `step` counts tokens and stands on the device."""

    def __init__(self, seeds: Sequence[int], device: Any) -> None:
        import torch

        keys = [random.Random(seed).getrandbits(64) for seed in seeds]
        halves = [[_signed(key >> 32), _signed(key & (2**32 - 1))] for key in keys]
        self.key_B2 = torch.tensor(halves, dtype=torch.int32, device=device)
        self.step = torch.zeros((), dtype=torch.int32, device=device)

    def rows(self, n: int) -> Tensor:
        """See `Noise.rows`."""
        found = hashed(self.key_B2, self.step, n)
        self.step += 1
        return found

    def keep(self, rows: Sequence[int]) -> None:
        """See `Noise.keep`."""
        self.key_B2 = self.key_B2[list(rows)]


def hashed(key_B2: Tensor, step: Tensor, n: int) -> Tensor:
    """Exponential noise of mean 1 from the keys of rows, the token's place and the columns, B n.

    Two rounds of a 32-bit hash, each with another half of the key: with one round, rows whose keys
    agree in their high bits would hold the same numbers in another order.
    """
    import torch

    first_B1, second_B1 = _mixed(key_B2 + _mixed(step + 1)).split(1, -1)
    bits = _mixed(torch.arange(n, dtype=torch.int32, device=key_B2.device) + first_B1)
    uniform = (_mixed(bits ^ second_B1) & 0x7FFFFFFF).float() * 2.0**-31 + 2.0**-32
    return -torch.log1p(-uniform)


def drawn(all_BV: Tensor, noise_BV: Tensor) -> Tensor:
    """Tokens with the probabilities e^logps, ... V to ...: the largest p / noise."""
    return (all_BV.exp() / noise_BV).argmax(-1)


def next_tokens(logits_BV: Tensor, noise_BV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(token, its log-probability) of each row, each B."""
    all_BV = (logits_BV.float() / temperature).log_softmax(-1)
    token_B = drawn(all_BV, noise_BV)
    return token_B, all_BV.gather(1, token_B[:, None])[:, 0]


def next_hashed(
    logits_BV: Tensor, key_B2: Tensor, step: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `next_tokens`, with hashed noise: one function, for a compiler to make few kernels of."""
    return next_tokens(logits_BV, hashed(key_B2, step, logits_BV.shape[1]), temperature)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers whose bits all depend on all bits (the constants are those of
    Wellons, "Prospecting for hash functions", 2018, lowbias32).
    """
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(bits: int) -> int:
    """The integer of 32 bits with a sign that has these bits."""
    return bits - 2**32 if bits >= 2**31 else bits
