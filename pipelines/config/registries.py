"""Recipes and export formats by name; other packages add theirs with entry points."""

from __future__ import annotations

from typing import Any, Protocol

from prefab.factory.plugins import Registry
from prefab.factory.types import Prompt


class Recipe(Protocol):
    """An async function of one prompt, which asks for model calls through the context (a
    `prefab.pipelines.run.context.Context`).

    It is run again to resume: calls that are answered return at once, so it must ask the same
    calls for the same prompt and hold no state of its own between prompts.
    """

    async def __call__(self, prompt: Prompt, context: Any, /) -> None:
        """Ask everything that this prompt needs."""


RECIPES = Registry(
    "prefab.recipes",
    {
        "rlaif": "prefab.pipelines.run.rlaif:pipeline",
        "cai": "prefab.pipelines.run.cai:pipeline",
        "best_of_n": "prefab.pipelines.run.best_of_n:pipeline",
        "process": "prefab.pipelines.run.process:pipeline",
    },
)
# Each keeps the protocol ExportFormat in pipelines/store/export/base.py.
FORMATS = Registry(
    "prefab.exports",
    {
        "trl": "prefab.pipelines.store.export.trl:TRL",
        "parquet": "prefab.pipelines.store.export.parquet:PARQUET",
        "jsonl": "prefab.pipelines.store.export.jsonl:JSONL",
        "csv": "prefab.pipelines.store.export.csv:CSV",
        "text": "prefab.pipelines.store.export.text:TEXT",
        "argilla": "prefab.pipelines.store.export.argilla:ARGILLA",
        "axolotl": "prefab.pipelines.store.export.axolotl:AXOLOTL",
        "llama_factory": "prefab.pipelines.store.export.llama_factory:LLAMA_FACTORY",
        "llama_factory_alpaca": "prefab.pipelines.store.export.llama_factory:LLAMA_FACTORY_ALPACA",
        "nemo_rl": "prefab.pipelines.store.export.nemo_rl:NEMO_RL",
        "openrlhf": "prefab.pipelines.store.export.openrlhf:OPENRLHF",
        "torchtune": "prefab.pipelines.store.export.torchtune:TORCHTUNE",
        "verl": "prefab.pipelines.store.export.verl:VERL",
    },
)
