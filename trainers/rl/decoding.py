"""Answers drawn token by token with a cache of fixed size, through one compiled forward.

A cache that grows makes every token's forward another one, which no compiler and no CUDA graph can
keep. Here the cache has room for the longest prompt and answer from the start, and batches with
fewer rows are filled up, so that one compiled forward serves a whole run. Weights are read where
they stand: an update in place changes what the compiled forward computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prefab.factory.console import say
from prefab.trainers.collate import compute_dtype
from prefab.trainers.rl import noise

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = 128  # a cache has a multiple of so many
GROWTH = 1.5  # by which a cache that is too short becomes longer at least
RECOMPILES = 16  # sizes and states of one model; torch's own 8 are those of all models together
BACKEND = "inductor"  # of torch.compile
ATTENTION = ("eager", "sdpa")  # those that take a mask of a fixed size
GROUPED = "prefab_grouped"  # the name of `_grouped_attention` in transformers


class CannotCompile(Exception):
    """The forward cannot be compiled on this machine; the message says why."""


class StaticDecoder:
    """The cache of one model, and the compiled forward that uses it."""

    def __init__(self, backend: str | Callable[..., Any] | None) -> None:
        """`backend` is torch.compile's; None: not compiled."""
        self.rows = self.columns = 0
        self.failed = False
        self.autocast = False  # the type of what the cache holds follows from it
        self.cache: Any = None
        self.forward: Callable[..., Any] = _next_logits
        self.next_hashed: Callable[..., Any] = noise.next_hashed
        if backend is not None:
            import torch

            # CUDA graphs, which need the mode, are inductor's alone
            mode = "reduce-overhead" if backend == "inductor" else None
            compiler: Any = torch.compile  # its overloads lack the last two arguments
            self.forward = compiler(
                _next_logits,
                dynamic=False,
                backend=backend,
                mode=mode,
                recompile_limit=RECOMPILES,
                isolate_recompiles=True,
            )
            self.next_hashed = compiler(noise.next_hashed, dynamic=False, backend=backend)

    def reserve(self, model: Any, rows: int, columns: int) -> None:
        """Make room for so many rows of so many tokens, prompt and answer together. The room never
        shrinks: another size would be compiled anew.
        """
        import torch

        autocast = torch.is_autocast_enabled(next(model.parameters()).device.type)
        if rows <= self.rows and columns <= self.columns and autocast == self.autocast:
            return
        if columns > self.columns:
            least = max(columns, int(self.columns * GROWTH))
            self.columns = -(-least // COLUMNS) * COLUMNS
        self.autocast = autocast
        self.rows = max(self.rows, 1 << (rows - 1).bit_length())
        self.cache = _static_cache(model, self.columns)

    def prefill(
        self,
        model: Any,
        ids_GP: Tensor,
        attention_GP: Tensor,
        positions_GP: Tensor,
        of_B: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits after each prompt B V; the mask of the tokens to come, B 1 1 columns, for
        `decode`). The forward of prompts is not compiled: their lengths differ. `of_B` is the
        number of each row's prompt; None: each row has its own.
        """
        import torch

        self.cache.reset()
        out = model(
            input_ids=ids_GP,
            attention_mask=attention_GP,
            position_ids=positions_GP,
            past_key_values=self.cache if of_B is None else None,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV, attention_BP = out.logits[:, -1], attention_GP
        if of_B is not None:
            logits_BV, attention_BP = (x.index_select(0, of_B) for x in (logits_BV, attention_GP))
            # under autocast a cache that grows holds values in the keys' type
            dtype = compute_dtype(ids_GP.device, next(model.parameters()).dtype)
            for layer, held in zip(self.cache.layers, out.past_key_values.layers, strict=True):
                layer.update(*(x.to(dtype).index_select(0, of_B) for x in (held.keys, held.values)))
        mask_BC = torch.zeros(
            len(attention_BP), self.columns, dtype=torch.bool, device=attention_BP.device
        )
        mask_BC[:, : attention_BP.shape[1]] = attention_BP.bool()
        if _plain(model).config._attn_implementation == "eager":  # adds its mask
            lowest = torch.finfo(torch.float32).min
            return logits_BV, torch.where(mask_BC, 0.0, lowest)[:, None, None]
        return logits_BV, mask_BC[:, None, None]

    def decode(
        self, model: Any, ids_B1: Tensor, mask_B11C: Tensor, positions_B1: Tensor, column: int
    ) -> Tensor:
        """The logits after one more token of each row, B V; `column` is its place in the cache,
        which the mask shows from now on. They hold until the next call.

        Raises: CannotCompile.
        """
        import torch

        mask_B11C[..., column] = mask_B11C.dtype == torch.bool  # else 0.0 is what is added
        torch.compiler.cudagraph_mark_step_begin()
        with _cannot_compile(), _grouped_heads(_plain(model).config):
            found: Tensor = self.forward(model, self.cache, ids_B1, mask_B11C, positions_B1)
        return found

    def next_tokens(
        self, logits_BV: Tensor, draws: noise.Noise, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(token, its log-probability) of each row, each B.

        Raises: CannotCompile.
        """
        if not isinstance(draws, noise.HashedNoise):
            return noise.next_tokens(logits_BV, draws.rows(logits_BV.shape[1]), temperature)
        with _cannot_compile():
            found: tuple[Tensor, Tensor] = self.next_hashed(
                logits_BV, draws.key_B2, draws.step, temperature
            )
        draws.step += 1
        return found

    def give_up(self, error: CannotCompile) -> None:
        """Be used no more, and say why."""
        self.failed, self.cache = True, None
        _say_without(str(error))


@contextmanager
def _grouped_heads(config: Any) -> Iterator[None]:
    """In the block, what is computed by `sdpa` is computed by `_grouped_attention`."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    was = config._attn_implementation
    if was != "sdpa":
        yield
        return
    if GROUPED not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(GROUPED, _grouped_attention)
    config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = was


def _grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of one token a row to its cache. Query heads that share keys are multiplied with
    them together: scaled_dot_product_attention with a mask would get a copy of the cache for each.

    Shapes: query B H 1 D, key and value B K C D, mask B 1 1 C (True: seen) to B 1 H D.
    """
    B, H, _one, D = query.shape
    grouped = query.reshape(B, key.shape[1], -1, D)
    scores = (grouped @ key.transpose(-1, -2)).float() * scaling
    share = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype)
    return (share @ value).reshape(B, 1, H, D), None


@contextmanager
def _cannot_compile() -> Iterator[None]:
    """Raises: CannotCompile instead of an error of the compiler."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise CannotCompile(" ".join(str(error).split())[:200]) from error


_decoders: WeakKeyDictionary[Any, StaticDecoder | None] = WeakKeyDictionary()


def decoder_of(model: Any) -> StaticDecoder | None:
    """The decoder of this model, made once; None where it cannot have one, which is said once."""
    if model not in _decoders:
        why = why_not(model)
        _decoders[model] = None if why else StaticDecoder(BACKEND)
        if why:
            _say_without(why)
    found = _decoders[model]
    return None if found is None or found.failed else found


def _say_without(why: str) -> None:
    say(f"sampling without compiled decoding (compile_sampling: false): {why}", stderr=True)


def forget(model: Any) -> None:
    """Free the memory of a model's cache."""
    _decoders.pop(model, None)


def why_not(model: Any) -> str | None:
    """Why this model cannot decode with a cache of fixed size, compiled; None where it can."""
    plain = _plain(model)
    name, attention = type(plain).__name__, plain.config._attn_implementation
    if not getattr(plain, "_can_compile_fullgraph", False):
        return f"transformers does not compile {name}"
    if attention not in ATTENTION:
        return f"attention: {attention} takes no mask of a fixed size; sdpa does"
    quantizer = getattr(plain, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_compileable:
        return "weights quantised in this way are not compiled"
    if any(type(layer) is not _layer_class() for layer in _static_cache(model, 1).layers):
        return f"{name} has layers that do not attend to all tokens"
    return None


def _plain(model: Any) -> Any:
    """The model without its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _next_logits(
    model: Any, cache: Any, ids_B1: Tensor, mask_B11C: Tensor, positions_B1: Tensor
) -> Any:
    return model(
        input_ids=ids_B1,
        attention_mask=mask_B11C,
        position_ids=positions_B1,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]


def _static_cache(model: Any, columns: int) -> Any:
    """A cache of fixed size for this model."""
    from transformers.cache_utils import StaticCache, StaticLayer

    found = StaticCache(_plain(model).config, columns)
    found.layers = [
        _layer_class()(columns) if type(layer) is StaticLayer else layer for layer in found.layers
    ]
    return found


@cache
def _layer_class() -> Any:
    """transformers' layer with keys and values in one type: under autocast keys come in fp32, since
    they are rotated, and attention computes with them in the values' type.
    """
    from transformers.cache_utils import StaticLayer

    class Layer(StaticLayer):
        """A cache's layer of fixed size."""

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any
        ) -> tuple[Tensor, Tensor]:
            """Write keys and values of new tokens; gives all that are held."""
            found: tuple[Tensor, Tensor] = super().update(
                key_states.to(value_states.dtype), value_states, *args, **more
            )
            return found

    return Layer
