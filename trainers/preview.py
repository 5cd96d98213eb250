"""The first row of a data file as a trainer would see it, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.spec import layouts
from prefab.trainers import data
from prefab.trainers.common import load_tokenizer


def kind_of(record: layouts.Record) -> data.Kind:
    """The kind of training rows that a row of a file gives."""
    if record.pairs:
        return "reward" if record.contexts else "preference"
    if record.label is not None:
        return "unpaired"
    return "sft" if record.talk or record.answers else "prompts"


def preview(value: Any, names: Mapping[str, str], model: str) -> dict[str, str]:
    """What a model reads and what it learns of one row, decoded with its own tokens.

    Args:
        value: The row.
        names: Columns to rename first.
        model: Whose tokenizer and chat template are used.

    Returns:
        Texts by name: `prompt`, and what is learnt (`chosen`, `rejected`, `completion`, or the
        whole conversation as `text` with `learnt`).

    Raises:
        ValueError: The row cannot be kept.
        ConfigError: There is no such model, or its chat template refuses the row.
    """
    record = layouts.parse(value, names)
    kind = kind_of(record)
    tokenizer = load_tokenizer(model)
    rows = data.rows_of(kind, value, names)
    found = data.Rows(train=[{**rows[0], "weight": 1.0}])
    config = data.DataConfig(sources=[data.Source(files=str(Path()))])
    if kind == "prompts":
        from prefab.trainers.chat import chat_text, shown

        return {"prompt": chat_text(tokenizer, shown(tokenizer, rows[0]["prompt"]), True)}
    made = next(iter(data.encoder(kind, tokenizer, found, config)(found.train[0])), None)
    if made is None:
        raise ConfigError("the row gives nothing to learn")
    return _decoded(tokenizer, made)


def _decoded(tokenizer: Any, made: Mapping[str, Any]) -> dict[str, str]:
    def text(ids: Sequence[int]) -> str:
        decoded: str = tokenizer.decode(ids, skip_special_tokens=False)
        return decoded

    if "labels" in made:
        learnt = [token for token in made["labels"] if token != -100]
        return {"text": text(made["input_ids"]), "learnt": text(learnt)}
    return {
        name.removesuffix("_ids"): text(ids) for name, ids in made.items() if name.endswith("_ids")
    }
