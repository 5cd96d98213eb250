"""Compare `prefab.duckdb` with the ledger that it was filled from."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from prefab.factory.ledger import db
from prefab.factory.store.store import FILE, read_frame

PAGE = 20_000
_COLUMNS = "key, finish, exactness, prompt_tokens, completion_tokens, limit_tokens"
_CALLS = """
SELECT call, finish, exactness, prompt_tokens, completion_tokens, limit_tokens FROM calls
ORDER BY call"""


def compare(folder: Path) -> list[str]:
    """How the calls in the store differ from the ledger's answers; nothing where there is no store
    yet.

    Raises: StoreError when either file is damaged, HeldError when another program holds the store.
    """
    if not (folder / FILE).exists():
        return []
    rows = read_frame(folder, _CALLS).rows()
    with closing(db.connect(folder / db.FILE, readonly=True)) as con:
        lost = differ = 0
        for start in range(0, len(rows), PAGE):
            page = rows[start : start + PAGE]
            found = _answers(con, [bytes.fromhex(row[0]) for row in page])
            for call, *rest in page:
                answers = found.get(call)
                lost += answers is None
                differ += answers is not None and tuple(rest) not in answers
    words = {
        "calls of prefab.duckdb have no answer in the ledger": lost,
        "calls of prefab.duckdb differ from the ledger": differ,
    }
    return [f"{n:,} {text}" for text, n in words.items() if n]


def _answers(con: Any, keys: list[bytes]) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = {}
    for rows in db.select_in(con, f"SELECT {_COLUMNS} FROM calls WHERE key IN", keys):
        for key, *rest in rows:
            found.setdefault(key.hex(), []).append(tuple(rest))
    return found
