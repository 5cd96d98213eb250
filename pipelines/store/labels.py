"""What people said, read from the ledger: for `prefab label`, and for a run whose panel has
people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from prefab.factory.ledger import db
from prefab.judges.kinds import human
from prefab.pipelines.config.loader import ResolvedPipeline


def recorded(store: Path) -> list[dict[str, Any]]:
    """Every label and undo in the ledger, oldest first. Raises: StoreError."""
    file = store / db.FILE
    con = db.connect(file, readonly=True)
    try:
        with db.translate_errors(file):
            return [
                orjson.loads(value)
                for (value,) in con.execute("SELECT value FROM human_labels ORDER BY id")
            ]
    finally:
        con.close()


def people(loaded: ResolvedPipeline) -> dict[str, Any]:
    """By each judge of a loaded pipeline that people answer, what they have said so far
    (`human.answers`).
    """
    judges = [judge for judge in loaded.judges if judge.shows == "people"]
    store = Path(loaded.config.store)
    rows = recorded(store) if judges and (store / db.FILE).exists() else []
    return {judge.name: human.answers(rows, judge.config.annotators) for judge in judges}
