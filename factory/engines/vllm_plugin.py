"""A plugin of vLLM's (entry point `vllm.general_plugins`), loaded in each of its processes: on a
CPU a second start reads the compiled model of the first.

vLLM 0.32 writes what it compiled on a CPU and reads it at the next start, but then asks the
function that it has read to `finalize_loading`, which only its GPU backend's functions can. It
takes the failure for a damaged file and compiles again. Here such a function is given that method,
which has nothing to do. Measured: benchmarks/vllm_start.py.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Let compiled functions that need no finishing be loaded. Does nothing on a GPU, or twice."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch

    load = torch.compiler.load_compiled_function
    if getattr(load, "by_prefab", False):
        return

    def load_whole(*args: Any, **kwargs: Any) -> Any:
        loaded: Any = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda config: None
        return loaded

    load_whole.by_prefab = True  # type: ignore[attr-defined]
    torch.compiler.load_compiled_function = load_whole
