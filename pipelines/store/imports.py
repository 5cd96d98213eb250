"""`prefab import-preferences`: pairs that others labelled, into the store beside a judge's own.

A file becomes a run of the recipe `import`: the ledger keeps each prompt's answers and pairs
(nothing could compute them again), and the store gets samples and preferences from them, so that
training, export and audits need not know the difference. All files of a command are read before
anything is written; a file is written in one transaction.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from prefab.factory import decision
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.keys import digest
from prefab.factory.numbers import counted
from prefab.factory.spec import data_files, layouts
from prefab.factory.store import store
from prefab.factory.store.shared import refuse_shards
from prefab.factory.tool_calls import messages_of, stored_text
from prefab.factory.types import Prompt
from prefab.pipelines.config import prompts
from prefab.pipelines.config.schema import PromptsConfig

if TYPE_CHECKING:
    import duckdb

RECIPE = "import"
SHOWN = 20  # problems that are printed; all are counted
PAGE = 2000  # prompts of a filling's transaction
BY = {"hh-rlhf": "people"}  # who labelled, where the format says it


@dataclass(slots=True)
class Imported:
    """What one file gave. `new` is false where the store had it already; `skipped` rows were
    malformed.
    """

    file: str
    run: str = ""
    format: str = ""
    new: bool = True
    prompts: int = 0
    pairs: int = 0
    ties: int = 0
    identical: int = 0
    skipped: int = 0


@dataclass(slots=True)
class Found:
    """The rows of a file by prompt: answers in order of appearance, and (a, b, p_a) of each
    pair.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    answers: dict[str, dict[tuple[str, str], int]] = field(default_factory=dict)  # (text, context)
    pairs: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)
    identical: int = 0

    def add(self, row: Any) -> None:
        """Take in one row. Raises: ValueError with what is wrong with it."""
        record = layouts.parse(row, self.names)
        if not record.pairs:
            raise ValueError(
                f"compares no answers: read as {record.layout}; needs chosen and rejected, or "
                f"another layout of pairs; its fields are: {', '.join(map(str, row)) or 'none'}"
            )
        prompt = prompts.parse_row(
            {
                "messages": record.prompt,
                "tools": record.tools,
                "group": row.get("group"),
                "split": row.get("split"),
            },
            PLAIN,
        )
        texts = [layouts.answer_text(answer) for answer in record.answers]
        contexts = [stored_text(messages_of(turns)) for turns in record.contexts]
        digest(*texts, *contexts)  # refuses half of a surrogate pair
        before = self.prompts.setdefault(prompt.id, prompt)
        if (before.group, before.split) != (prompt.group, prompt.split):
            raise ValueError(
                "an earlier row has the same prompt with another group or split; give both the same"
            )
        known = self.answers.setdefault(prompt.id, {})
        both = zip(texts, contexts or [""] * len(texts), strict=True)
        places = [known.setdefault(answer, len(known)) for answer in both]
        self.formats.add(record.layout)
        kept = [(places[a], places[b], p) for a, b, p in record.pairs if places[a] != places[b]]
        self.identical += len(record.pairs) - len(kept)
        self.pairs.setdefault(prompt.id, []).extend(kept)

    def value(self, prompt: str) -> dict[str, Any]:
        """What the ledger keeps of a prompt. `contexts` is left out where no answer has one."""
        texts, contexts = zip(*self.answers[prompt], strict=True)
        value: dict[str, Any] = {"answers": list(texts), "pairs": self.pairs[prompt]}
        return {**value, "contexts": list(contexts)} if any(contexts) else value


PLAIN = PromptsConfig(source="-")


def import_files(
    folder: str | Path,
    files: Sequence[str | Path],
    name: str = "",
    by: str = "",
    skip_bad: bool = False,
    names: Mapping[str, str] | None = None,
) -> list[Imported]:
    """Import preference pairs that others labelled. Each file becomes a run of the store.

    Args:
        folder: The store; created if it does not exist.
        files: Data files, or folders of them.
        name: Name of the new runs; default: the file's name.
        by: Who labelled the pairs, for example `people`; stored with them.
        skip_bad: Skip rows that cannot be read, and count them.
        names: Columns to read under another name: `{"chosen": "good"}`.

    Raises:
        ConfigError: Every row that cannot be read; nothing is written then.
        StoreError: The store is damaged.
    """
    folder, paths = Path(folder), [Path(file) for file in files]
    refuse_shards(folder)
    import asyncio

    from prefab.factory.ledger.ledger import Ledger

    read = [read_pairs(path, skip_bad, names or {}) for path in paths]
    ledger = Ledger.open(folder)
    try:
        for (report, found, sha256), path in zip(read, paths, strict=True):
            origin = {
                "file": path.name,
                "sha256": sha256,
                "format": report.format,
                "by": by or BY.get(report.format, "labeller not said"),
            }
            stem = path.name.removesuffix(path.suffix)
            if path.suffix in data_files.COMPRESSED:
                stem = Path(stem).stem
            title = name or re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-.") or "imported"
            rows = [(prompt, found.value(i)) for i, prompt in found.prompts.items()]
            run = ledger.add_import(
                title, {"recipe": RECIPE, "name": title, "origin": origin}, rows
            )
            report.run, report.new = f"{run.name}@{run.version}", not run.resumed
    finally:
        asyncio.run(ledger.close())
    return [report for report, *_ in read]


def read_pairs(
    path: Path, skip_bad: bool = False, names: Mapping[str, str] = {}
) -> tuple[Imported, Found, str]:
    """All rows of a file, checked. Raises: ConfigError with each malformed row: where, what and how
    to mend.
    """
    found, malformed = Found(names), 0
    problems: list[Problem] = []
    for number, line, row in data_files.rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            found.add(row)
        except ValueError as error:
            malformed += 1
            if len(problems) < SHOWN:
                problems.append(
                    Problem(str(path), line, 1 if line else 0, f"row {number}", str(error))
                )
    if malformed and not skip_bad:
        more = f"{counted(malformed, 'row')} cannot be read, so nothing was imported; mend what is wrong, or leave it out with --skip-bad"
        raise ConfigError([*problems, Problem(str(path), 0, 0, "", more)])
    decided = [p for pairs in found.pairs.values() for p in _together(pairs).values()]
    if not decided:
        raise ConfigError(
            [Problem(str(path), 0, 0, "", "holds no pair of different answers"), *problems]
        )
    ties = sum(_decide("", 0, 1, votes).outcome == "tie" for votes in decided)
    report = Imported(
        str(path),
        format=" and ".join(sorted(found.formats)),
        prompts=len(found.prompts),
        pairs=len(decided) - ties,
        ties=ties,
        identical=found.identical,
        skipped=malformed,
    )
    return report, found, _sha256(path)


def _sha256(path: Path) -> str:
    """The digest of a file, or of all data files of a folder in their order."""
    files = data_files.data_files(path) if path.is_dir() else [path]
    digests = []
    for name in files:
        with open(name, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def _together(pairs: Sequence[Sequence[Any]]) -> dict[tuple[int, int], list[float]]:
    """The votes on each comparison, as P(the answer of the lesser index is better)."""
    votes: dict[tuple[int, int], list[float]] = {}
    for a, b, p in pairs:
        votes.setdefault((min(a, b), max(a, b)), []).append(p if a < b else 1 - p)
    return votes


def _decide(prompt: str, a: int, b: int, votes: Sequence[float]) -> Any:
    """The mean of what was said, by the panel's own rule. 0, a half and 1 are hard labels; who gave
    others is not known.
    """
    return decision.decide(
        [decision.Reading(p, exactness="hard") for p in votes], decision.Rule(), prompt, a, b
    )


def copy(con: duckdb.DuckDBPyConnection, ledger: sqlite3.Connection, report: Any) -> None:
    """New imports of the ledger as samples and preferences of the store, a page a transaction."""
    if not ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'imports'").fetchone():
        return  # an older ledger
    sql = "SELECT id, run, prompt, value FROM imports WHERE id > ? ORDER BY id LIMIT ?"
    while page := ledger.execute(sql, (store.watermark(con, "imports"), PAGE)).fetchall():
        samples, preferences = [], []
        for _, run, prompt, text in page:
            value = orjson.loads(text)
            contexts = value.get("contexts") or [""] * len(value["answers"])
            samples += [
                (
                    digest("imported", prompt, answer, *([context] if context else ())),
                    run,
                    prompt,
                    i,
                    -1,
                    0,
                    "",
                    answer,
                    "stop",
                    None,
                    None,
                    None,
                    context or None,
                )
                for i, (answer, context) in enumerate(zip(value["answers"], contexts, strict=True))
            ]
            for (a, b), votes in _together(value["pairs"]).items():
                p = _decide(prompt, a, b, votes)
                name = digest(
                    "imported pair", run, prompt, a, b, votes, decision.AGGREGATION_VERSION
                )
                chosen, rejected = {"a": (a, b), "b": (b, a)}.get(p.outcome, (None, None))
                preferences.append(
                    (
                        name,
                        run,
                        prompt,
                        a,
                        b,
                        p.outcome,
                        chosen,
                        rejected,
                        p.p_a,
                        p.p_chosen,
                        p.spread,
                        p.n_scored,
                        p.n_readings,
                        p.exactness,
                        False,
                        None,
                        p.p_chosen,
                        None,
                    )
                )
        with store.transaction(con):
            store.insert(con, "samples", samples)
            store.insert(con, "preferences", preferences)
            store.set_watermark(con, "imports", page[-1][0])
        report.add("samples", len(samples))
        report.add("preferences", len(preferences))
