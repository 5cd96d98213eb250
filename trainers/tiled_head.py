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
    states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, token_N: Tensor, at_once: int
) -> Tensor:
    """log softmax(states weight^T + bias) at each token, with at most about `at_once` logits in
    memory. Products are in autocast's precision where it is on; sums, exponents and the gradient of
    the weight in fp32 or better.

    Shapes: N H, V H, V, N to N.
    """
    rows = max(1, at_once // weight_VH.shape[0])
    found: Tensor = _function().apply(states_NH, weight_VH, bias_V, token_N, rows)
    return found


@cache
def _function() -> Any:
    """The autograd function; torch is imported only where it is used."""
    import torch

    def wide(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made = wide(states @ weight.T)
        return made if bias is None else made.add_(bias)

    class TiledLogps(torch.autograd.Function):
        """See `tiled_logps`."""

        @staticmethod
        def forward(ctx: Any, states: Any, weight: Any, bias: Any, token: Any, rows: int) -> Any:
            kind = states.device.type
            auto = torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if auto else weight.dtype
            normalisers, picked = [], []
            with torch.autocast(kind, enabled=False):
                low = weight.to(dtype)
                for some, tokens in zip(states.split(rows), token.split(rows), strict=True):
                    tile = logits(some.to(dtype), low, bias)
                    normalisers.append(tile.logsumexp(-1))
                    picked.append(tile.gather(-1, tokens[:, None])[:, 0])
            normaliser = torch.cat(normalisers)
            ctx.save_for_backward(states, weight, bias, token, normaliser)
            ctx.rows, ctx.dtype = rows, dtype
            return torch.cat(picked) - normaliser

        @staticmethod
        def backward(ctx: Any, slope: Any) -> Any:
            states, weight, bias, token, normaliser = ctx.saved_tensors
            low, n, dtype = weight.to(ctx.dtype), ctx.rows, ctx.dtype
            wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
            to_states = torch.empty_like(states) if wants_states else None
            to_weight = torch.zeros_like(wide(weight.detach())) if wants_weight else None
            to_bias = torch.zeros_like(wide(bias.detach())) if wants_bias else None
            for start in range(0, len(token), n):
                at = slice(start, start + n)
                some = states[at].to(dtype)
                tile = logits(some, low, bias).sub_(normaliser[at, None]).exp_()
                tile.mul_(-slope[at, None])
                tile.scatter_add_(1, token[at, None], slope[at, None].to(tile.dtype))
                if to_bias is not None:
                    to_bias += tile.sum(0)
                small = tile.to(dtype)
                if to_states is not None:
                    to_states[at] = small @ low
                if to_weight is not None:
                    to_weight += small.T @ some
            return (
                to_states,
                None if to_weight is None else to_weight.to(weight.dtype),
                None if to_bias is None else to_bias.to(bias.dtype),
                None,
                None,
            )

    return TiledLogps
