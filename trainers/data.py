"""From the store, or files of the shape that `prefab export` writes, to tokens: the one way data
reaches a trainer.

The test split never does: it is not read from a store, rows that carry its name are refused, and so
is any row whose prompt stands in the test split of one of the sources. What is left out is counted
and told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from prefab.factory.errors import ConfigError
from prefab.factory.keys import digest, split_of
from prefab.factory.spec.templates import neutralise
from prefab.factory.store import datasets, store
from prefab.trainers.common import Strict, answered, chat_text, conversation_ids, ids_of

if TYPE_CHECKING:
    import polars
    from datasets import Dataset

# Models whose answers a run used, in the tables named.
USED = """
WITH used AS (
    SELECT 'verdicts' AS source, run, call FROM verdicts UNION ALL SELECT 'scores', run, call FROM scores
    UNION ALL SELECT 'rankings', run, call FROM rankings UNION ALL SELECT 'samples', run, call FROM samples
    UNION ALL SELECT 'critiques', run, call FROM critiques)
SELECT DISTINCT c.model, coalesce(m.name, c.model) FROM used JOIN calls c USING (call) LEFT JOIN models m ON m.model = c.model
WHERE used.run = ? AND used.source IN {} ORDER BY 1
"""
Kind = Literal["preference", "unpaired", "sft", "prompts"]
Encoder = Callable[[Mapping[str, Any]], Iterable[dict[str, Any]]]
HUB = {"train": "train", "val": "validation", "test": "test"}


class Source(Strict):
    """A run of a store, or files. `weight` multiplies the loss of its rows (people's preferences
    beside a judge's).
    """

    store: str | None = Field(None, description="The folder of ledger.sqlite and prefab.duckdb.")
    run: str = Field("", description="NAME or NAME@VERSION; left out: the run that ran last.")
    files: str | None = Field(
        None, description="A folder that `prefab export` wrote, or one .parquet or .jsonl file."
    )
    weight: float = Field(1.0, gt=0)
    judges: list[str] = Field([], description="Decide by these judges' readings alone.")
    principles: list[str] = Field(
        [], description="Decide by the readings under these principles alone."
    )
    margin: float = Field(
        0.0, ge=0, lt=0.5, description="Keep pairs whose p_chosen is at least this far from a half."
    )
    exclude: str | None = Field(
        None, description="A file of preference, sample or prompt ids to leave out, one a line."
    )
    without: list[str] = Field(
        [], description="Rules of `prefab audit data`: pairs that they mark are left out."
    )
    truncated: bool = Field(False, description="Keep answers that were cut off by length.")
    revisions: Literal["", "all", "last"] = Field(
        "",
        description="Demonstrations: all revisions or the last text of each "
        "draft; left out: as the run revised.",
    )

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.store is None) == (self.files is None):
            raise ValueError("name a store, or files, and not both")
        return self


class DataConfig(Strict):
    """Where rows come from and what becomes of them."""

    sources: list[Source] = Field(min_length=1)
    labels: Literal["soft", "hard"] = Field(
        "soft", description="soft: p_chosen is the target; hard: 1 is."
    )
    max_length: int = Field(1024, ge=8, description="In tokens, prompt and answer together.")
    too_long: Literal["error", "drop"] = Field(
        "error", description="Of rows longer than that; never cut silently."
    )
    val_share: float = Field(
        0.05, gt=0, lt=1, description="Of prompts, where the sources have no validation rows."
    )
    limit: int | None = Field(
        None, ge=1, description="Train on so many rows, drawn by digest; left out: all."
    )
    template_kwargs: dict[str, Any] = Field(
        {}, description="For the chat template; the policy's of the run come first."
    )


@dataclass(slots=True)
class Rows:
    """What was read, before tokens: a list of dictionaries a split, what was left out, and where it
    came from.
    """

    train: list[dict[str, Any]] = field(default_factory=list)
    val: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def read_rows(kind: Kind, config: DataConfig) -> Rows:
    """The rows of the train and validation splits of all sources.

    Raises: ConfigError where there are none, a split ends empty, or a row belongs to a test split.
    """
    found, tests = Rows(), set()
    for source in config.sources:
        frame, held_out = (
            _from_store(kind, source, found) if source.store else _from_files(kind, source)
        )
        tests |= held_out
        where = source.store or source.files or ""
        if not frame.is_empty():
            _refuse_test(frame, where)
            _take(found, _filtered(frame, source, found.notes), source)
    _refuse_leaks(found, tests)
    _split_off(found, config)
    if not found.train:
        raise ConfigError(
            f"nothing to train on: no {kind} rows in {', '.join(_names(config))}"
            + "".join(f"; {note}" for note in found.notes)
        )
    if not found.val:
        raise ConfigError(
            "the validation split is empty: there is only one prompt. More prompts are needed"
        )
    mean = sum(row["weight"] for row in found.train) / len(found.train)
    for row in (*found.train, *found.val):
        row["weight"] /= mean
    if config.limit:
        found.train = sorted(
            found.train, key=lambda row: digest("limit", row["prompt"], _text(row))
        )[: config.limit]
    found.template_kwargs = {**found.template_kwargs, **config.template_kwargs}
    return found


def _names(config: DataConfig) -> list[str]:
    return [source.store or source.files or "" for source in config.sources]


def _text(row: Mapping[str, Any]) -> Any:
    return [row.get(name) for name in ("chosen", "rejected", "completion", "messages")]


def _from_store(kind: Kind, source: Source, found: Rows) -> tuple[polars.DataFrame, set[str]]:
    """Rows of a run whose split is train or val, and the digests of the prompts of the store's test
    split.
    """
    import polars as pl

    folder = Path(source.store or "")
    ask: datasets.Read = partial(store.read_frame, folder)
    record = datasets.find_run(folder, ask, source.run)
    select = {"all": "draw", "last": "sweep", "": ""}[source.revisions]
    marks = {"without": source.without} if source.without else {}
    frames = datasets.datasets(
        ask,
        record,
        found.notes,
        source.truncated,
        source.judges,
        source.principles,
        select,
        **marks,
    )
    test = ask("SELECT messages FROM prompts WHERE split = 'test'", ())["messages"].to_list()
    config = json.loads(record["config"])
    labellers = dict(
        ask(USED.format("('verdicts', 'scores', 'rankings')"), (record["run"],)).iter_rows()
    )
    models = labellers | dict(
        ask(USED.format("('samples', 'critiques')"), (record["run"],)).iter_rows()
    )
    found.template_kwargs.update((config.get("policy") or {}).get("template_kwargs") or {})
    found.lineage.append(
        {
            "store": str(folder),
            "run": f"{record['name']}@{record['version']}",
            "recipe": record["recipe"],
            "constitution": record["constitution"],
            "models": models,
            "labelled_by": list(labellers),
            "config": config,
        }
    )
    frame = frames.get(kind, pl.DataFrame())
    if not frame.is_empty():
        frame = frame.filter(pl.col("split").is_in(["train", "val"]))
    return frame, {
        _prompt_digest([{"role": r, "content": c} for r, c in json.loads(text)]) for text in test
    }


def _from_files(kind: Kind, source: Source) -> tuple[polars.DataFrame, set[str]]:
    """Rows of train and validation files, and the digests of the prompts of a test file beside
    them.

    Raises: ConfigError where there is no such file, or it lacks the columns.
    """
    import polars as pl

    place = Path(source.files or "")
    if place.is_file():
        frame = _file(place)
        return _needed(
            kind,
            frame if "split" in frame.columns else frame.with_columns(split=pl.lit("train")),
            place,
        ), set()
    if not place.is_dir():
        raise ConfigError(f"{place}: no such file or folder")
    folder = place / kind if (place / kind).is_dir() else place
    parts = {
        split: _file(folder / f"{name}.parquet")
        for split, name in HUB.items()
        if (folder / f"{name}.parquet").exists()
    }
    if "train" not in parts:
        raise ConfigError(
            f"{folder}: no train.parquet here. `prefab export OUT` writes {kind}/train.parquet; or name one "
            ".parquet or .jsonl file"
        )
    tests = (
        {_prompt_digest(turns) for turns in parts["test"]["prompt"].to_list()}
        if "test" in parts
        else set()
    )
    frame = pl.concat(
        [
            part.with_columns(split=part["split"] if "split" in part.columns else pl.lit(split))
            for split, part in parts.items()
            if split != "test"
        ],
        how="diagonal",
    )
    return _needed(kind, frame, folder), tests


def _file(path: Path) -> polars.DataFrame:
    import polars as pl

    if not path.stat().st_size:
        raise ConfigError(f"{path}: the file is empty")
    try:
        return (
            pl.read_parquet(path)
            if path.suffix == ".parquet"
            else pl.read_ndjson(path, infer_schema_length=None)
        )
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ConfigError(
            f"{path}: cannot be read as {path.suffix or 'a file of rows'}: {error}"
        ) from error


COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "preference": (("prompt", "chosen", "rejected"),),
    "unpaired": (("prompt", "completion", "label"),),
    "sft": (("prompt", "completion"), ("messages",), ("prompt", "chosen")),
    "prompts": (("prompt",),),
}


def _needed(kind: Kind, frame: polars.DataFrame, place: Path) -> polars.DataFrame:
    """The frame, with its prompts and answers as turns. Raises: ConfigError where columns are
    missing.
    """
    shape = next((shape for shape in COLUMNS[kind] if set(shape) <= set(frame.columns)), None)
    if shape is None:
        raise ConfigError(
            f"{place}: {kind} rows need {' or '.join(', '.join(s) for s in COLUMNS[kind])}; there are: "
            f"{', '.join(frame.columns)}"
        )
    return frame


def _refuse_test(frame: polars.DataFrame, where: str) -> None:
    bad = frame["split"].is_in(["train", "val", "validation"]).not_().sum()
    if bad:
        names = ", ".join(
            sorted({str(s) for s in frame["split"].to_list()} - {"train", "val", "validation"})
        )
        raise ConfigError(
            f"{where}: {bad:,} rows of the split {names}. A trainer takes train and val only: what is measured "
            "on rows that were trained on is no measurement"
        )


def _filtered(frame: polars.DataFrame, source: Source, notes: list[str]) -> polars.DataFrame:
    """Without pairs inside the margin and without ids that are excluded; both counted."""
    import polars as pl

    for column in ("p_chosen", "p_win"):
        if source.margin and column in frame.columns:
            kept = frame.filter((pl.col(column) - 0.5).abs() >= source.margin)
            notes.append(
                f"{frame.height - kept.height:,} of {frame.height:,} rows lie within {source.margin} of a half"
            )
            frame = kept
    if source.exclude:
        from prefab.factory.spec.yamlio import read_text

        ids = {line.strip() for line in read_text(source.exclude).splitlines() if line.strip()}
        columns = [
            c
            for c in ("preference", "sample", "chosen_sample", "rejected_sample", "prompt_id")
            if c in frame.columns
        ]
        kept = (
            frame.filter(~pl.any_horizontal(pl.col(c).is_in(list(ids)) for c in columns))
            if columns
            else frame
        )
        notes.append(
            f"{frame.height - kept.height:,} of {frame.height:,} rows are left out as {source.exclude} says"
        )
        frame = kept
    return frame


def _take(found: Rows, frame: polars.DataFrame, source: Source) -> None:
    """Rows as dictionaries with plain texts. Raises: ConfigError for a probability that is none."""
    same = 0
    for i, row in enumerate(frame.iter_rows(named=True)):
        p = row.get("p_chosen")
        if p is not None and not 0 <= p <= 1:
            raise ConfigError(
                f"{source.store or source.files}: row {i} has p_chosen {p}; it is a probability, from 0 to 1"
            )
        weight = row.get("weight")
        row["weight"] = source.weight * (weight if isinstance(weight, float) else 1.0)
        row["prompt"] = _turns(row["prompt"], "user") if row.get("prompt") is not None else []
        for name in ("chosen", "rejected", "completion"):
            if row.get(name) is not None:
                row[name] = _turns(row[name], "assistant")[-1]["content"]
        if row.get("chosen") is not None and row.get("chosen") == row.get("rejected"):
            same += 1
            continue
        (found.train if row["split"] == "train" else found.val).append(row)
    if same:
        found.notes.append(f"{same:,} pairs of equal answers are left out")


def _turns(value: Any, role: str) -> list[dict[str, str]]:
    return (
        [{"role": role, "content": value}]
        if isinstance(value, str)
        else [dict(turn) for turn in value]
    )


def _prompt_digest(value: Any) -> str:
    """Two rows have the same prompt when its turns say the same, however they are stored."""
    return digest(
        "prompt", [[t["role"], " ".join(t["content"].split())] for t in _turns(value, "user")]
    )


def prompt_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row's prompt; of a whole conversation, what stands before its first answer."""
    if row.get("prompt"):
        result: list[dict[str, str]] = row["prompt"]
        return result
    turns = [dict(turn) for turn in row.get("messages") or ()]
    first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
    return turns[:first]


def _refuse_leaks(found: Rows, tests: set[str]) -> None:
    """Raises: ConfigError for a row whose prompt is in a test split. Train rows whose prompt is in
    val are left out.
    """
    leaked = [row for row in (*found.train, *found.val) if _prompt_digest(prompt_of(row)) in tests]
    if leaked:
        raise ConfigError(
            f"{len(leaked):,} rows have a prompt of the test split, the first: "
            f"{prompt_of(leaked[0])[-1]['content'][:80]!r}. Leave them out of the files"
        )
    held = {_prompt_digest(prompt_of(row)) for row in found.val}
    kept = [row for row in found.train if _prompt_digest(prompt_of(row)) not in held]
    if len(kept) < len(found.train):
        found.notes.append(
            f"{len(found.train) - len(kept):,} train rows share a prompt with validation and are left out"
        )
    found.train = kept


def _split_off(found: Rows, config: DataConfig) -> None:
    """Where no source has validation rows: a share of the prompts, by digest, so that the same ones
    are always held out.
    """
    if found.val or not found.train:
        return
    share, names = (
        config.val_share,
        {id(row): _prompt_digest(prompt_of(row)) for row in found.train},
    )
    held = {
        name for name in names.values() if split_of("val " + name, (1 - share, share, 0.0)) == "val"
    }
    held = held or {min(names.values())}
    found.val = [row for row in found.train if names[id(row)] in held]
    found.train = [row for row in found.train if names[id(row)] not in held]
    found.notes.append(
        f"no validation rows in the data: {len(held):,} prompts ({len(found.val):,} rows) were held out of train"
    )


def tokenised(
    rows_: Sequence[Mapping[str, Any]],
    encode: Encoder,
    config: DataConfig,
    notes: list[str],
    what: str,
) -> Dataset:
    """Each row through `encode` (which gives one or more token rows with their `length`), as a
    dataset.

    Rows that are too long are an error, or left out and counted; they are never cut.
    Raises: ConfigError naming the first that is too long, or where none is left.
    """
    from datasets import Dataset

    made = [{**item, "row": i} for i, row in enumerate(rows_) for item in encode(row)]
    long = [item for item in made if item["length"] > config.max_length]
    if long and config.too_long == "error":
        row = rows_[long[0]["row"]]
        raise ConfigError(
            f"{len(long):,} of {len(made):,} {what} rows are longer than max_length: {config.max_length} tokens, "
            f"the longest {max(item['length'] for item in long):,}; the first: "
            f"{prompt_of(row)[-1]['content'][:60]!r}. Raise data.max_length, or write data.too_long: drop"
        )
    if long:
        notes.append(
            f"{len(long):,} of {len(made):,} {what} rows are longer than {config.max_length} tokens: left out"
        )
        made = [item for item in made if item["length"] <= config.max_length]
    if not made:
        raise ConfigError(
            f"the {what} split ends up empty: every row is longer than max_length: {config.max_length} tokens"
        )
    merged = sum(item.pop("merged", 0) for item in made)
    if merged:
        notes.append(
            f"in {merged:,} {what} rows the tokenizer would join tokens across prompt and answer; they stay apart, "
            "as they are at sampling"
        )
    return Dataset.from_list(made)


def encoder(
    kind: Kind,
    tokenizer: Any,
    found: Rows,
    config: DataConfig,
    reward: bool = False,
    every_turn: bool = True,
) -> Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]]:
    """How a row of this kind becomes tokens. With `reward`, whole conversations; `every_turn`: see
    `_sft_rows`.
    """
    specials = [token.content for token in tokenizer.added_tokens_decoder.values()]
    kwargs = found.template_kwargs

    def clean(turns: Any) -> list[dict[str, str]]:
        return [{**turn, "content": neutralise(turn["content"], specials)} for turn in turns]

    def pair(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        prompt, p = clean(row["prompt"]), row.get("p_chosen")
        sides = {
            side: clean([{"role": "assistant", "content": row[side]}])
            for side in ("chosen", "rejected")
        }
        made: dict[str, Any] = {"p": 1.0 if p is None else float(p), "weight": row["weight"]}
        made["target"] = made["p"] if config.labels == "soft" else 1.0
        if reward:
            made |= {
                f"{side}_ids": conversation_ids(tokenizer, prompt + turn, kwargs)
                for side, turn in sides.items()
            }
            made["length"] = max(len(made["chosen_ids"]), len(made["rejected_ids"]))
        else:
            both = {
                side: answered(tokenizer, prompt, turn[0]["content"], kwargs)
                for side, turn in sides.items()
            }
            made |= {
                "prompt_ids": both["chosen"].prompt,
                "merged": any(a.merged for a in both.values()),
            }
            made |= {f"{side}_ids": a.answer for side, a in both.items()}
            made["length"] = len(made["prompt_ids"]) + max(len(a.answer) for a in both.values())
        yield made

    def single(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        a = answered(
            tokenizer,
            clean(row["prompt"]),
            clean([{"content": row["completion"]}])[0]["content"],
            kwargs,
        )
        yield {
            "prompt_ids": a.prompt,
            "completion_ids": a.answer,
            "label": bool(row["label"]),
            "weight": row["weight"],
            "length": len(a.prompt) + len(a.answer),
            "merged": a.merged,
        }

    def demonstration(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        text = row.get("completion") if row.get("completion") is not None else row.get("chosen")
        turns = clean(
            row["messages"]
            if row.get("messages")
            else [*row["prompt"], {"role": "assistant", "content": text}]
        )
        last = len(turns) - 1 if not row.get("messages") or not every_turn else None
        for ids, labels in _sft_rows(tokenizer, turns, kwargs, last):
            yield {"input_ids": ids, "labels": labels, "weight": row["weight"], "length": len(ids)}

    return {"preference": pair, "unpaired": single, "sft": demonstration}[kind]


def _sft_rows(
    tokenizer: Any, turns: Sequence[Mapping[str, str]], kwargs: Mapping[str, Any], only: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, labels) of a conversation: labels are -100 but for the assistant's tokens, of turn
    `only` or of all.

    One sequence for all turns where the template writes each as it did at sampling, shown by
    comparing tokens; otherwise (templates that strip reasoning from earlier turns) one a turn, each
    after its history as the policy would see it.
    """
    places = [
        i for i, turn in enumerate(turns) if turn["role"] == "assistant" and only in (None, i)
    ]
    if not places:
        raise ConfigError(
            f"a conversation without an answer of the assistant: {turns[-1]['content'][:60]!r}"
        )
    parts = [answered(tokenizer, turns[:i], turns[i]["content"], kwargs) for i in places]
    whole = ids_of(tokenizer, chat_text(tokenizer, turns[: places[-1] + 1], False, kwargs))
    starts = [len(part.prompt) for part in parts]
    fits = all(
        whole[start : start + len(part.answer)] == part.answer and whole[:start] == part.prompt
        for start, part in zip(starts, parts, strict=True)
    )
    if not fits or len(parts) == 1:
        yield from (([*p.prompt, *p.answer], [-100] * len(p.prompt) + p.answer) for p in parts)
        return
    end = starts[-1] + len(parts[-1].answer)
    labels = [-100] * end
    for start, part in zip(starts, parts, strict=True):
        labels[start : start + len(part.answer)] = part.answer
    yield whole[:end], labels
