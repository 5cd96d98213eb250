"""Prefab: an RLAIF and Constitutional-AI preference-data factory.

The public Python API. Importing this package is cheap: each name below is imported when it is first
used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefab.factory.spec.constitution import load_constitution
    from prefab.pipelines.config.schema import load_pipeline
    from prefab.pipelines.run.plan import plan
    from prefab.pipelines.run.runner import run
    from prefab.pipelines.store.export.base import export
    from prefab.pipelines.store.fill import query

_HOME = {
    "export": "prefab.pipelines.store.export.base",
    "load_constitution": "prefab.factory.spec.constitution",
    "load_pipeline": "prefab.pipelines.config.schema",
    "plan": "prefab.pipelines.run.plan",
    "query": "prefab.pipelines.store.fill",
    "run": "prefab.pipelines.run.runner",
}
__all__ = ["export", "load_constitution", "load_pipeline", "plan", "query", "run"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'prefab' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
