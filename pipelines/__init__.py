"""The recipes and the commands. From Python: `from pipelines import run`, then `run("pipeline.yaml").preferences`."""
from __future__ import annotations

from typing import Any


def run(source: Any, sets: Any = (), quiet: bool = True, engines: Any = None) -> Any:
    """Make the data that a pipeline file (or dictionary) describes, and hand back a `RunResult` with polars frames.

    `sets` are overrides such as `"policy.samples=8"`. Raises: ConfigError, EngineError, StoreError.
    """
    from pipelines.runner import run as run_

    return run_(source, sets, quiet, engines)
