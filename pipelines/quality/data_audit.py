"""`prefab audit data`: check a run's preferences with `data_rules`, and store the marks.

The audit is recorded in the ledger together with its marks, because its evaluation files may not
exist later. So a store that is rebuilt from the ledger has the same marks. Only the latest audit of
a run is used.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.spec import data_files
from prefab.factory.store.datasets import audited
from prefab.pipelines.quality import data_rules
from prefab.pipelines.store.export.base import find_run
from prefab.pipelines.store.run_page import judges_of_own_answers

if TYPE_CHECKING:
    import polars

NAME = "audit data"


@dataclass(slots=True)
class Finding:
    """The result of one rule. `fails`: more pairs are marked than its limit allows."""

    rule: data_rules.Rule
    threshold: float | None
    marks: polars.DataFrame
    share: float
    fails: bool
    examples: list[dict[str, str]] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """As plain data, without the marks."""
        rule = self.rule
        return {
            "rule": rule.name,
            "what": rule.what,
            "marked": self.marks.height,
            "share": self.share,
            "threshold": self.threshold,
            "source": rule.source,
            "limit": rule.limit,
            "fails": self.fails,
            "of_prompt": rule.of_prompt,
            "examples": self.examples,
        }


@dataclass(slots=True)
class Audit:
    """The results of all rules on a run's pairs.

    Attributes:
        run: The run, as NAME@VERSION.
        pairs: The number of decided pairs.
        comparisons: The number of all comparisons.
        clean: The number of pairs without a mark.
        findings: One result for each rule.
        evaluation: The evaluation files, with their digests.
        notes: What was not checked, or not completely.
    """

    run: str
    pairs: int
    comparisons: int
    clean: int
    findings: list[Finding]
    evaluation: list[dict[str, Any]]
    notes: list[str]

    @property
    def fails(self) -> bool:
        """Whether a rule fails."""
        return any(finding.fails for finding in self.findings)

    def data(self) -> dict[str, Any]:
        """As plain data, without the marks."""
        return {
            "run": self.run,
            "pairs": self.pairs,
            "comparisons": self.comparisons,
            "clean": self.clean,
            "fails": self.fails,
            "evaluation": self.evaluation,
            "notes": self.notes,
            "rules": [finding.data() for finding in self.findings],
        }


def audit(
    folder: str | Path,
    run: str = "",
    evaluation: Sequence[str | Path] = (),
    thresholds: Mapping[str, float] = {},
    examples: int = 2,
) -> Audit:
    """Check a run's preferences with every rule, and store the marks.

    Args:
        folder: The store.
        run: NAME or NAME@VERSION; default: the latest run that is not an import.
        evaluation: Files of evaluation texts that must not be in training data (JSONL, JSON, CSV,
            Parquet or plain text). Without any, contamination is not checked.
        thresholds: Other thresholds than the rules' own, by rule.
        examples: Examples to keep for each rule.

    Raises:
        ConfigError: A file, a rule or a threshold is wrong, or the run has no comparisons.
    """
    folder = Path(folder)
    _check(thresholds)
    record = find_run(folder, run)
    texts, files = _evaluation(evaluation)
    data, version = load_pairs(folder, record)
    found = look(data, texts if evaluation else None, thresholds, examples)
    marked = {name for finding in found for name in finding.marks["preference"]}
    clean = data.pairs.height - sum(name in marked for name in data.pairs["preference"])
    notes = data.notes + (
        []
        if evaluation
        else ["contamination was not checked: name the files that you evaluate on with --eval FILE"]
    )
    notes += judges_of_own_answers(json.loads(record["config"] or "{}"))
    result = Audit(
        f"{record['name']}@{record['version']}",
        data.pairs.height,
        data.comparisons,
        clean,
        found,
        files,
        notes,
    )
    _record(folder, record["run"], result, version)
    return result


def _check(thresholds: Mapping[str, float]) -> None:
    known = {rule.name: rule.threshold for rule in data_rules.RULES}
    for name, value in thresholds.items():
        if known.get(name) is None:
            there = ", ".join(name for name, threshold in known.items() if threshold is not None)
            raise ConfigError(
                f"--threshold {name}={value:g}: there is no rule of this name with a threshold; rules with one: {there}"
            )
        if value < 0:
            raise ConfigError(f"--threshold {name}={value:g}: must not be negative")
        if name == "contamination" and (value != int(value) or value < data_rules.SHORTEST):
            raise ConfigError(
                f"--threshold {name}={value:g}: must be a whole number of words, at least {data_rules.SHORTEST}"
            )


def load_pairs(folder: Path, record: Mapping[str, Any]) -> tuple[data_rules.Data, str]:
    """The decided pairs of a run, and a digest that identifies this set of preferences.

    Args:
        folder: The store.
        record: The run, as a row of the table `runs`.

    Raises:
        ConfigError: The run has no comparisons.
    """
    import polars as pl

    from prefab.pipelines.store.fill import query

    run = record["run"]
    preferences = query(
        folder,
        "SELECT preference, prompt, outcome, chosen, rejected, p_chosen, "
        "calibrated IS NOT NULL AS calibrated "
        f"FROM preferences WHERE run = {run} ORDER BY prompt, a, b",
    )
    if preferences.is_empty():
        raise ConfigError(f"{record['name']}@{record['version']} has no comparisons to audit")
    samples = query(
        folder, f'SELECT prompt, "index", text FROM samples WHERE run = {run} AND text IS NOT NULL'
    )
    prompts = query(
        folder,
        f'SELECT prompt, messages, "group", split FROM prompts WHERE prompt IN '
        f"(SELECT prompt FROM preferences WHERE run = {run})",
    )
    asked = pl.Series(
        "text",
        ["\n".join(turn[1] for turn in json.loads(m)) for m in prompts["messages"]],
        dtype=pl.String,
    )
    texts = pl.concat([asked, samples["text"]]).unique(maintain_order=True)
    number = pl.DataFrame({"text": texts, "n": range(len(texts))}, schema_overrides={"n": pl.Int64})
    prompts = (
        prompts.select("prompt", "group", "split")
        .with_columns(asked)
        .join(number, on="text")
        .select("prompt", "group", "split", pl.col("n").alias("question"))
    )
    samples = samples.join(number, on="text").select("prompt", pl.col("index"), "n")
    pairs = preferences.filter(pl.col("outcome").is_in(["a", "b"])).join(
        prompts, on="prompt", maintain_order="left"
    )
    for side in ("chosen", "rejected"):
        pairs = pairs.join(
            samples.rename({"n": f"{side}_text"}),
            left_on=["prompt", side],
            right_on=["prompt", "index"],
            maintain_order="left",
        )
    pairs = pairs.select(
        "preference",
        "prompt",
        "p_chosen",
        "calibrated",
        "group",
        "split",
        "question",
        pl.col("chosen_text").alias("chosen"),
        pl.col("rejected_text").alias("rejected"),
    )
    unscored = preferences.filter(pl.col("outcome") == "unscored")["preference"].to_list()
    return data_rules.indexed(texts, pairs, unscored, preferences.height), audited(preferences)


def look(
    data: data_rules.Data,
    evaluation: Sequence[tuple[str, str]] | None,
    thresholds: Mapping[str, float] = {},
    examples: int = 2,
) -> list[Finding]:
    """The results of all rules; contamination is only checked with evaluation texts."""
    found = []
    for rule in data_rules.RULES:
        value = thresholds.get(rule.name, rule.threshold)
        if rule.name == "contamination":
            if evaluation is None or value is None:
                continue
            marks = data_rules.contamination(data, evaluation, int(value))
        elif (
            value is None or rule.name == "unscored"
        ):  # whose threshold is of the share, not of a pair
            marks = getattr(data_rules, rule.name)(data)
        elif rule.name == "low_margin":
            marks = data_rules.low_margin(data, value, shares=rule.name in thresholds)
        else:
            marks = getattr(data_rules, rule.name)(data, value)
        share = marks.height / max(
            1, data.comparisons if rule.name == "unscored" else data.pairs.height
        )
        limit = value if rule.name == "unscored" else rule.limit
        fails = limit is not None and share > limit
        found.append(Finding(rule, value, marks, share, fails, _examples(data, marks, examples)))
    return found


def _examples(data: data_rules.Data, marks: polars.DataFrame, n: int) -> list[dict[str, str]]:
    """The texts of `n` marked pairs, evenly spaced over the run."""
    import polars as pl

    some = marks.gather_every(max(1, marks.height // max(1, n))).head(n)
    pairs = {
        row["preference"]: row
        for row in data.pairs.filter(
            pl.col("preference").is_in(some["preference"].to_list())
        ).iter_rows(named=True)
    }
    shown = []
    for preference, detail in some.iter_rows():
        row = pairs.get(preference)
        sides = (
            {}
            if row is None
            else {
                "prompt": data.texts[row["question"]][:200],
                "chosen": data.texts[row["chosen"]][:200],
                "rejected": data.texts[row["rejected"]][:200],
            }
        )
        shown.append({"preference": preference, "detail": detail, **sides})
    return shown


def _record(folder: Path, run: int, result: Audit, version: str) -> None:
    """Record an audit in the ledger and add it to the store, unless it is equal to the last one."""
    from prefab.pipelines.store.fill import fill, query

    last = query(
        folder,
        "SELECT eval FROM evals WHERE name = ? AND (value->>'$.run')::INTEGER = ? "
        "ORDER BY evaluated_at DESC LIMIT 1",
        [NAME, run],
    )
    rules = {
        finding.rule.name: {
            key: value for key, value in finding.data().items() if key != "examples"
        }
        for finding in result.findings
    }
    marks = {
        finding.rule.name: "\n".join(
            f"{preference} {_plain(detail)}" for preference, detail in finding.marks.iter_rows()
        )
        for finding in result.findings
    }
    said = {
        "name": NAME,
        "subject": result.run,
        "run": run,
        "audited": version,
        "pairs": result.pairs,
        "clean": result.clean,
        "evaluation": result.evaluation,
        "rules": rules,
        "marks": marks,
    }
    identity = hashlib.sha256(
        json.dumps(said, sort_keys=True).encode("utf-8", "replace")
    ).hexdigest()[:32]
    before = (
        query(
            folder,
            "SELECT value->>'$.content' AS content FROM evals WHERE eval = ?",
            [last["eval"][0]],
        )["content"][0]
        if last.height
        else None
    )
    if before != identity:
        asyncio.run(
            _add(
                folder,
                {**said, "content": identity, "after": last["eval"][0] if last.height else None},
            )
        )
        fill(folder)


def _plain(detail: str) -> str:
    """The text as one line of valid UTF-8."""
    return " ".join(detail.encode("utf-8", "replace").decode().split())


async def _add(folder: Path, value: dict[str, Any]) -> None:
    ledger = Ledger.open(folder)
    try:
        ledger.add_eval(value)
    finally:
        await ledger.close()


def _evaluation(files: Sequence[str | Path]) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """All (place, text) in the files, and the files with their digests.

    Raises:
        ConfigError: A file cannot be read, or has no text.
    """
    texts: list[tuple[str, str]] = []
    told = []
    for name in files:
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; --eval names the files that you evaluate on")
        before = len(texts)
        for number, line, value in data_files.rows(path, text=True):
            where = data_files.place(path, number, line)
            if isinstance(value, ValueError):
                raise ConfigError(f"{where}: {value}; every evaluation text must be readable")
            texts += [(where, text) for text in strings(value)]
        if len(texts) == before:
            raise ConfigError(f"{path}: has no text to look for")
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        told.append({"file": path.name, "sha256": digest, "texts": len(texts) - before})
    return texts, told


def strings(value: Any) -> Iterator[str]:
    """All texts inside a nested value."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings(inner)
