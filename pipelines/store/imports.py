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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.keys import digest
from prefab.factory.spec import yamlio
from prefab.factory.store import store
from prefab.factory.types import Prompt
from prefab.judges import panel
from prefab.pipelines.config import prompts
from prefab.pipelines.config.schema import PromptsConfig

if TYPE_CHECKING:
    import duckdb

RECIPE = "import"
SHOWN = 20  # problems that are told; all are counted
PAGE = 2000  # prompts of a filling's transaction
SCORES = (
    "fine-grained_score",
    "overall_score",
    "score",
)  # the mean of aspects first: the overall score has known errors
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLE = {"Human": "user", "Assistant": "assistant"}
BY = {"hh-rlhf": "people"}  # who labelled, where the format says it
Turns = list[dict[str, Any]]


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

    prompts: dict[str, Prompt] = field(default_factory=dict)
    answers: dict[str, dict[str, int]] = field(default_factory=dict)
    pairs: dict[str, list[tuple[int, int, float]]] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)
    identical: int = 0

    def add(self, row: Any) -> None:
        """Take in one row. Raises: ValueError with what is wrong with it."""
        shape, turns, texts, pairs = read_row(row)
        prompt = prompts.parse_row(
            {"messages": turns, "group": row.get("group"), "split": row.get("split")}, PLAIN
        )
        digest(*texts)  # refuses what is no text
        before = self.prompts.setdefault(prompt.id, prompt)
        if (before.group, before.split) != (prompt.group, prompt.split):
            raise ValueError(
                "an earlier row has the same prompt with another group or split; give both the same"
            )
        known = self.answers.setdefault(prompt.id, {})
        places = [known.setdefault(text, len(known)) for text in texts]
        self.formats.add(shape)
        kept = [(places[a], places[b], p) for a, b, p in pairs if places[a] != places[b]]
        self.identical += len(pairs) - len(kept)
        self.pairs.setdefault(prompt.id, []).extend(kept)


PLAIN = PromptsConfig(source="-")


def import_files(
    folder: Path, files: Sequence[Path], name: str = "", by: str = "", skip_bad: bool = False
) -> list[Imported]:
    """Read all files, then record each as a run: `name`, or the file's own.

    Raises: ConfigError with every row that cannot be read (`skip_bad` leaves them out and counts
    them), before anything is written; StoreError.
    """
    import asyncio

    from prefab.factory.ledger.ledger import Ledger

    read = [_read(path, skip_bad) for path in files]
    ledger = Ledger.open(folder)
    try:
        for (report, found, sha256), path in zip(read, files, strict=True):
            origin = {
                "file": path.name,
                "sha256": sha256,
                "format": report.format,
                "by": by or BY.get(report.format, "labeller not said"),
            }
            title = name or re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-.") or "imported"
            rows = [
                (prompt, {"answers": list(found.answers[i]), "pairs": found.pairs[i]})
                for i, prompt in found.prompts.items()
            ]
            run = ledger.add_import(
                title, {"recipe": RECIPE, "name": title, "origin": origin}, rows
            )
            report.run, report.new = f"{run.name}@{run.version}", not run.resumed
    finally:
        asyncio.run(ledger.close())
    return [report for report, *_ in read]


def _read(path: Path, skip_bad: bool) -> tuple[Imported, Found, str]:
    """All rows of a file, checked. Raises: ConfigError with each malformed row: where, what and how
    to mend.
    """
    found, problems, malformed = Found(), [], 0
    for number, line, row in _rows(path):
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
        more = f"{malformed:,} rows cannot be read, so nothing was imported; mend them, or leave them out with --skip-bad"
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
    with open(path, "rb") as file:
        return report, found, hashlib.file_digest(file, "sha256").hexdigest()


def _rows(path: Path) -> Iterator[prompts.Row]:
    if path.suffix == ".gz":
        raise ConfigError(f"{path}: is compressed; unpack it first: gunzip {path}")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name the files in it")
    return prompts.rows(PromptsConfig(source=str(path), column=prompts.ANY), path)


def read_row(row: Any) -> tuple[str, Turns, list[str], list[tuple[int, int, float]]]:
    """(format, the prompt's turns, answers, pairs of them with P(the first is better)) of one row,
    by what it holds.

    Raises: ValueError in words for the person whose row it is.
    """
    if not isinstance(row, dict):
        raise ValueError(f"is {yamlio.describe(row)}; must be an object with chosen and rejected")
    if row.get("completions") is not None:
        return "ultrafeedback", *_scored(row)
    if row.get("chosen") is None or row.get("rejected") is None:
        raise ValueError(
            "needs chosen and rejected (TRL, HH-RLHF), or instruction and completions (UltraFeedback); its fields "
            f"are: {', '.join(map(str, row)) or 'none'}"
        )
    sides = {name: _turns(row[name], "assistant") for name in ("chosen", "rejected")}
    given = row.get("prompt")
    prompt = _turns(given, "user") if given is not None else sides["chosen"][:-1]
    if (
        prompt
        and prompt[-1].get("role") == "assistant"
        and not str(prompt[-1].get("content")).strip()
    ):
        prompt = prompt[:-1]  # a transcript that stops where the answer begins
    if not prompt:
        raise ValueError('has no prompt: give "prompt", or conversations in chosen and rejected')
    for name, turns in sides.items():
        whole = turns[: len(prompt)] == prompt
        if not (
            (whole and len(turns) == len(prompt) + 1) or (given is not None and len(turns) == 1)
        ):
            raise ValueError(
                f"{name} must be one answer to the prompt, or the prompt and one answer; here the two "
                "conversations part before their last turn, or go on after it"
            )
        if turns[-1].get("role") != "assistant":
            raise ValueError(
                f"{name} ends with the turn of {yamlio.describe(turns[-1].get('role'))}; the last must be the assistant's"
            )
    transcript = isinstance(row["chosen"], str) and TURN.match(row["chosen"])
    return (
        "hh-rlhf" if transcript else "trl",
        prompt,
        [_answer(sides[n][-1], n) for n in sides],
        [(0, 1, _p_chosen(row))],
    )


def _turns(value: Any, role: str) -> Turns:
    """A conversation from turns, from a transcript ("\\n\\nHuman: ...\\n\\nAssistant: ..."), or
    from one text of `role`.
    """  # noqa: D301
    if isinstance(value, str):
        if not TURN.match(value):
            return [{"role": role, "content": value}]
        parts = TURN.split(value)[1:]
        return [
            {"role": ROLE[who], "content": text.strip()}
            for who, text in zip(parts[::2], parts[1::2], strict=True)
        ]
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(turn, dict) for turn in value)
    ):
        raise ValueError(
            f"holds {yamlio.describe(value)} for a conversation; must be text or a list of turns with role and content"
        )
    return [{"role": turn.get("role"), "content": turn.get("content")} for turn in value]


def _answer(turn: Mapping[str, Any], name: str) -> str:
    text = turn.get("content")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"the answer of {name} is {'empty' if isinstance(text, str) else yamlio.describe(text)}; must be text"
        )
    return text


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"{name} is {yamlio.describe(value)}; must be a number")
    return float(value)


def _p_chosen(row: Mapping[str, Any]) -> float:
    """The probability of a pair: its own, else 1; a half where both have the same score
    (UltraFeedback, binarized).
    """
    if row.get("p_chosen") is not None:
        p = _number(row["p_chosen"], "p_chosen")
        if not 0 <= p <= 1:
            raise ValueError(f"p_chosen is {p}; a probability is from 0 to 1")
        return p
    if row.get("score_chosen") is None or row.get("score_rejected") is None:
        return 1.0
    up, down = (_number(row[name], name) for name in ("score_chosen", "score_rejected"))
    if up < down:
        raise ValueError(f"chosen has the lower score ({up:g} against {down:g}); exchange the two")
    return 0.5 if up == down else 1.0


def _scored(row: Mapping[str, Any]) -> tuple[Turns, list[str], list[tuple[int, int, float]]]:
    """UltraFeedback: every two completions are a pair that the higher score wins; equal scores are
    a tie.
    """
    texts, scores = [], []
    if not isinstance(row["completions"], list) or len(row["completions"]) < 2:
        raise ValueError("completions must be a list of two or more")
    field_ = next(
        (
            name
            for name in SCORES
            if all(isinstance(c, dict) and c.get(name) is not None for c in row["completions"])
        ),
        None,
    )
    if field_ is None:
        raise ValueError(
            f"completions need a score each, all by the same name: {', '.join(SCORES)}"
        )
    for i, completion in enumerate(row["completions"], 1):
        texts.append(_answer({"content": completion.get("response")}, f"completion {i}"))
        scores.append(_number(completion[field_], f"{field_} of completion {i}"))
    pairs = [
        (a, b, 0.5 if scores[a] == scores[b] else float(scores[a] > scores[b]))
        for a in range(len(texts))
        for b in range(a + 1, len(texts))
    ]
    instruction = row.get("instruction", row.get("prompt"))
    return _turns(instruction, "user"), texts, pairs


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
    return panel.decide(
        [panel.Reading(p, exactness="hard") for p in votes], panel.Rule(), prompt, a, b
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
            samples += [
                (
                    digest("imported", prompt, answer),
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
                )
                for i, answer in enumerate(value["answers"])
            ]
            for (a, b), votes in _together(value["pairs"]).items():
                p = _decide(prompt, a, b, votes)
                name = digest("imported pair", run, prompt, a, b, votes, panel.AGGREGATION_VERSION)
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
                    )
                )
        with store.transaction(con):
            store.insert(con, "samples", samples)
            store.insert(con, "preferences", preferences)
            store.set_watermark(con, "imports", page[-1][0])
        report.add("samples", len(samples))
        report.add("preferences", len(preferences))
