"""What the ledger records besides answers and their uses: runs, prompts, splits, imports, human
labels, evaluations.

Each function takes a connection to `ledger.sqlite`; those that write are run by the ledger's
writer, in a transaction.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from prefab.factory import keys
from prefab.factory.errors import ConfigError
from prefab.factory.keys import canonical, digest, rubric_id
from prefab.factory.ledger.checksums import add_row, damaged, intact, row_crc
from prefab.factory.tool_calls import stored_text
from prefab.factory.types import Message, Prompt

Rubric = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """A resolved configuration under a name. `resumed` when the ledger already knew it."""

    id: int
    name: str
    version: int
    resumed: bool


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as it was recorded. `last_start` grows with every start: the greatest is what a name
    means without @N.
    """

    id: int
    name: str
    version: int
    config: dict[str, Any]
    texts: dict[str, str]
    last_start: int
    at: float


Deciding = Callable[[dict[str, Any]], dict[str, Any]]


def begin_run(
    con: sqlite3.Connection,
    name: str,
    config: dict[str, Any],
    texts: dict[str, str],
    deciding: Deciding | None = None,
) -> Run:
    """The run with this name, configuration and texts: found, or recorded as the name's next
    version. With `deciding`, which gives the part of a configuration that decides what is asked and
    answered, runs that differ in the rest only are the same run.
    """
    identity = digest(name, config, texts)
    row = con.execute(
        "SELECT id, version FROM runs WHERE name=? AND digest=?", (name, identity)
    ).fetchone()
    if row is None and deciding is not None:
        row = _same_run(con, name, deciding(config), texts, deciding)
    resumed = row is not None
    if row is None:
        version = con.execute(
            "SELECT coalesce(max(version), 0) + 1 FROM runs WHERE name=?", (name,)
        ).fetchone()[0]
        values = (
            name,
            version,
            identity,
            canonical(config).decode(),
            canonical(texts).decode(),
            time.time(),
        )
        row = (add_row(con, "runs", *values), version)
    add_row(con, "starts", row[0], time.time())
    return Run(row[0], name, row[1], resumed)


def _same_run(
    con: sqlite3.Connection,
    name: str,
    wanted: dict[str, Any],
    texts: dict[str, str],
    deciding: Deciding,
) -> tuple[int, int] | None:
    """The id and version of the latest run of a name that has these texts and this configuration,
    as far as it decides.
    """
    rows = con.execute("SELECT * FROM runs WHERE name = ? ORDER BY id DESC", (name,)).fetchall()
    words = canonical(texts).decode()
    for place, _, version, _, config, of_run, _ in intact(con, "runs", rows):
        if of_run == words and canonical(deciding(orjson.loads(config))) == canonical(wanted):
            return place, version
    return None


def runs(con: sqlite3.Connection) -> list[RunRecord]:
    """Every run, in the order they were first recorded. Raises: StoreError when one is damaged."""
    starts = dict(con.execute("SELECT run, max(id) FROM starts GROUP BY run").fetchall())
    rows = con.execute("SELECT * FROM runs ORDER BY id").fetchall()
    return [
        RunRecord(i, name, version, orjson.loads(config), orjson.loads(texts), starts.get(i, 0), at)
        for i, name, version, _, config, texts, at in intact(con, "runs", rows)
    ]


def add_prompts(con: sqlite3.Connection, prompts: Sequence[Prompt]) -> None:
    """Record prompts. Raises: ConfigError where a prompt's own split contradicts the one its group
    has.
    """
    for prompt in prompts:
        rubric = orjson.dumps(prompt.rubric).decode() if prompt.rubric else None
        if rubric:
            add_row(con, "rubrics", rubric_id(prompt.rubric), rubric, ignore=True)
        text, split = _text(prompt), _split(con, prompt)
        tags = orjson.dumps(list(prompt.tags)).decode()
        identity = digest(
            prompt.id,
            text,
            tags,
            prompt.group is not None,
            prompt.group or "",
            split,
            *filter(None, [rubric]),
        )
        row = (prompt.id, identity, text, tags, prompt.group, split, rubric)
        add_row(con, "prompts", *row, ignore=True)


def _text(prompt: Prompt) -> str:
    return stored_text(prompt.messages)


def rubrics(con: sqlite3.Connection, names: Sequence[str]) -> dict[str, Rubric]:
    """The rubrics of these names, each line with its points."""
    found = {}
    for name in names:
        rows = con.execute("SELECT * FROM rubrics WHERE digest = ?", (name,)).fetchall()
        for _, _, rubric in intact(con, "rubrics", rows):
            found[name] = tuple((text, points) for text, points in orjson.loads(rubric))
    return found


def prompt_rows(con: sqlite3.Connection, after: int, limit: int) -> Iterator[tuple[Any, ...]]:
    """The prompts recorded after this row: row, id, messages, tags, group, split and the prompt's
    own rubric, the latest form of a prompt last. Messages, tags and rubric are JSON; no group and
    no rubric are None.
    """
    rows = con.execute("SELECT * FROM prompts WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
    for row in rows:
        for place, prompt, _, *rest in intact(con, "prompts", [row]):
            yield place, prompt, *rest


def split_of(prompt: Prompt) -> str:
    """The prompt's own split, else the one that its group has by digest, or its text when it has no
    group.
    """
    return prompt.split or keys.split_of(_text(prompt) if prompt.group is None else prompt.group)


def _split(con: sqlite3.Connection, prompt: Prompt) -> str:
    """The first split recorded for a prompt's group (without one: for its id) stands."""
    group = "group " + prompt.group if prompt.group is not None else "prompt " + prompt.id
    rows = con.execute("SELECT * FROM splits WHERE grp=?", (group,)).fetchall()
    for _, split in intact(con, "splits", rows):
        if prompt.split is not None and prompt.split != split:
            raise ConfigError(
                f"prompt {prompt.id}: split {prompt.split!r}, but {group!r} is recorded as "
                f"{split!r}. What belongs together stays on one side: correct the prompts file, or "
                "use a new store"
            )
        return str(split)
    split = split_of(prompt)
    con.execute("INSERT INTO splits VALUES (?, ?, ?)", (group, split, row_crc((group, split))))
    return split


def add_object(con: sqlite3.Connection, table: str, value: dict[str, Any]) -> None:
    """Record a JSON object in `human_labels` or `evals`; the same object twice is recorded once."""
    row = (digest(value), canonical(value).decode(), time.time())
    add_row(con, table, *row, ignore=True)


def add_import(
    con: sqlite3.Connection,
    name: str,
    config: dict[str, Any],
    prompts: Sequence[tuple[Prompt, dict[str, Any]]],
) -> Run:
    """Record a file of preferences as a run, with the answers and pairs of each prompt. A file that
    is already recorded adds nothing.

    `config["origin"]["sha256"]` tells files apart. A prompt whose text is recorded already takes
    over its group and split.
    Raises: ConfigError where a prompt's own split contradicts the recorded one.
    """
    for row in con.execute("SELECT id, name, version, config FROM runs ORDER BY id").fetchall():
        if orjson.loads(row[3]).get("origin", {}).get("sha256") == config["origin"]["sha256"]:
            return Run(row[0], row[1], row[2], resumed=True)
    known = _sides(con, [prompt.messages for prompt, _ in prompts])
    run = begin_run(con, name, config, {})
    for prompt, value in prompts:
        group, split = known.get(prompt.messages, (None, None))
        if split and prompt.split and split != prompt.split:
            raise ConfigError(
                f"{prompt.messages[-1].content[:60]!r} has the split {prompt.split!r}, but stands in this store "
                f"as {split!r}. What belongs together stays on one side: correct the file, or use a new store"
            )
        add_prompts(
            con, [replace(prompt, group=prompt.group or group, split=split or prompt.split)]
        )
        add_row(con, "imports", run.id, prompt.id, orjson.dumps(value).decode())
    return run


def add_answers(
    con: sqlite3.Connection, run: int, answers: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
    """Record answers that no model call gave as those of a run: by prompt, each with its context
    (see `samples` in the store's schema; empty: none).
    """
    for prompt, given in answers.items():
        value = {"answers": [text for text, _ in given], "pairs": list[Any]()}
        if any(context for _, context in given):
            value["contexts"] = [context for _, context in given]
        add_row(con, "imports", run, prompt, orjson.dumps(value).decode(), ignore=True)


def _sides(
    con: sqlite3.Connection, wanted: Sequence[tuple[Message, ...]]
) -> dict[tuple[Message, ...], tuple[str | None, str]]:
    """(group, split) of those prompts that are recorded already, whatever their id."""
    texts = {stored_text(messages): messages for messages in wanted}
    rows = con.execute("SELECT messages, grp, split FROM prompts ORDER BY id")
    return {texts[text]: (group, split) for text, group, split in rows if text in texts}


def request_json(con: sqlite3.Connection, key: bytes) -> dict[str, Any] | None:
    """What was asked under a key, as it was digested; None when it was never answered.

    Raises: StoreError when it is damaged.
    """
    row = con.execute(
        "SELECT r.request FROM calls c JOIN requests r ON r.id = c.id WHERE c.key=?", (key,)
    ).fetchone()
    if row is None:
        return None
    if keys.key_of(row[0]) != key:
        raise damaged(con, f"the request with the key {key.hex()}")
    request: dict[str, Any] = orjson.loads(row[0])
    return request
