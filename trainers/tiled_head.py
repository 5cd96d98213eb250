"""The vocabulary head and its log-softmax in tiles: logits of all tokens never exist together.

The backward computes each tile's logits again, so that only the states, the log-normalisers and one
tile are held. It costs one more product with the head, and saves about twelve bytes for each token
and word of the vocabulary.
Axes: N tokens, H width, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def can_tile(head: Any) -> bool:
    """Whether a head is one matrix that lies in this process whole: not with adapters around it,
    and not sharded by FSDP or ZeRO-3, which gather it when it is called.
    """
    import torch

    return (
        type(head) is torch.nn.Linear
        and type(head.weight) is torch.nn.Parameter
        and not hasattr(head.weight, "ds_id")
    )


def tiled_logps(
    states_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    token_N: Tensor,
    at_once: int,
    compiled: bool = False,
) -> Tensor:
    """log softmax(states weight^T + bias) at each token, with at most about `at_once` logits in
    memory. Products are in autocast's precision where it is on; sums, exponents and the gradient of
    the weight in fp32 or better. `compiled`: what is done to a tile between its products is one
    kernel each way, which reads and writes it once.

    Shapes: N H, V H, V, N to N.
    """
    rows = max(1, at_once // weight_VH.shape[0])
    found = _function().apply(states_NH, weight_VH, bias_V, token_N, rows, compiled, False)
    logps_N: Tensor = found[0]
    return logps_N


def tiled_entropy(
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, token_N: Tensor, at_once: int
) -> tuple[Tensor, Tensor]:
    """As `tiled_logps`, with the entropy of each distribution in nats, N."""
    rows = max(1, at_once // weight_VH.shape[0])
    logps_N, entropy_N = _function().apply(states_NH, weight_VH, bias_V, token_N, rows, False, True)
    return logps_N, entropy_N


def _wide(tensor: Tensor) -> Tensor:
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _read(
    product_NV: Tensor, bias_V: Tensor | None, token_N: Tensor, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log of the normaliser, logit of the token, entropy where asked) of each row of a tile."""
    tile = _wide(product_NV)
    if bias_V is not None:
        tile = tile.add_(bias_V)
    normaliser, logit = tile.logsumexp(-1), tile.gather(-1, token_N[:, None])[:, 0]
    if not entropy:
        return normaliser, logit, None
    return normaliser, logit, normaliser - ((tile - normaliser[:, None]).exp_() * tile).sum(-1)


def _slope(
    product_NV: Tensor,
    bias_V: Tensor | None,
    token_N: Tensor,
    normaliser_N: Tensor,
    slope_N: Tensor,
    entropy_N: Tensor | None,
    entropy_slope_N: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of a tile's logits from that of its log-probabilities (and entropies), in the
    type of the product, and its sum over rows where there is a bias.
    """
    import torch

    tile, slope_N1 = _wide(product_NV), slope_N[:, None]
    if bias_V is not None:
        tile = tile.add_(bias_V)
    tile = tile.sub_(normaliser_N[:, None])
    if entropy_N is None or entropy_slope_N is None:
        tile = tile.exp_().mul_(-slope_N1)
    else:  # an entropy falls by p (log p + entropy) where a logit grows
        of_entropy = (tile + entropy_N[:, None]).mul_(-entropy_slope_N[:, None])
        tile = tile.exp_().mul_(of_entropy.sub_(slope_N1))
    if torch.compiler.is_compiling():  # a scattered addition would be a kernel of its own
        here = torch.arange(tile.shape[1], device=tile.device) == token_N[:, None]
        tile = tile + torch.where(here, slope_N1, 0.0)
    else:
        tile.scatter_add_(1, token_N[:, None], slope_N1.to(tile.dtype))
    return tile.to(product_NV.dtype), None if bias_V is None else tile.sum(0)


@cache
def _function() -> Any:
    """The autograd function; torch is imported only where it is used."""
    import torch

    class TiledLogps(torch.autograd.Function):
        """See `tiled_logps`."""

        @staticmethod
        def forward(
            ctx: Any,
            states: Any,
            weight: Any,
            bias: Any,
            token: Any,
            rows: int,
            compiled: bool,
            entropy: bool,
        ) -> Any:
            kind = states.device.type
            auto = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if auto else weight.dtype
            read = _compiled(_read) if compiled else _read
            found = []
            with torch.autocast(kind, enabled=False):
                low = weight.to(dtype)
                for some, tokens in zip(states.split(rows), token.split(rows), strict=True):
                    found.append(read(some.to(dtype) @ low.T, bias, tokens, entropy))
            normalisers, logits, entropies = zip(*found, strict=True)
            normaliser = torch.cat(normalisers)
            spread = torch.cat(entropies) if entropy else None
            ctx.set_materialize_grads(False)  # an entropy that is not trained on costs nothing
            ctx.save_for_backward(states, weight, bias, token, normaliser, spread)
            ctx.rows, ctx.dtype, ctx.compiled = rows, dtype, compiled
            return torch.cat(logits) - normaliser, spread

        @staticmethod
        def backward(ctx: Any, slope: Any, spread_slope: Any) -> Any:
            states, weight, bias, token, normaliser, spread = ctx.saved_tensors
            low, n, dtype = weight.to(ctx.dtype), ctx.rows, ctx.dtype
            slope = torch.zeros_like(normaliser) if slope is None else slope
            sloped = _compiled(_slope) if ctx.compiled else _slope
            wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
            to_states = torch.empty_like(states) if wants_states else None
            to_weight = torch.zeros_like(_wide(weight.detach())) if wants_weight else None
            to_bias = torch.zeros_like(_wide(bias.detach())) if wants_bias else None
            for start in range(0, len(token), n):
                at = slice(start, start + n)
                some = states[at].to(dtype)
                of_entropy = (
                    (None, None) if spread_slope is None else (spread[at], spread_slope[at])
                )
                small, summed = sloped(
                    some @ low.T, bias, token[at], normaliser[at], slope[at], *of_entropy
                )
                if to_bias is not None and summed is not None:
                    to_bias += summed
                if to_states is not None:
                    to_states[at] = small @ low
                if to_weight is not None:
                    to_weight += small.T @ some
            return (
                to_states,
                None if to_weight is None else to_weight.to(weight.dtype),
                None if to_bias is None else to_bias.to(bias.dtype),
                *[None] * 4,
            )

    return TiledLogps


@cache
def _compiled(function: Any) -> Any:
    """The function compiled, for tiles of any number of rows."""
    import torch

    return torch.compile(function, dynamic=True)
