"""What formats share whose rows are those of `trl` in the layout of another tool, as JSON lines.

Each of these formats is one file of this folder: a function a dataset, which takes a row of `trl`
and gives the row of the tool's loader, or None where that layout cannot hold it. Such rows are
counted and said.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prefab.pipelines.store.export.base import ExportSource, Part, Rows

Row = dict[str, Any]
Turn = dict[str, Any]
Make = Callable[[Row], Row | None]
Settings = Callable[[Mapping[str, str]], dict[str, str]]
TURN_COLUMNS = ("prompt", "chosen", "rejected", "completion")
TEXT_ROLES = ("system", "user", "assistant")
ONE_TURN = "this layout holds one question with at most one system text, and no calls of tools"
QUESTION = "this layout holds one question without a system text, and no calls of tools"
TURNS = "this layout holds system, user and assistant turns of text, and no calls of tools"


@dataclass(frozen=True, slots=True)
class Layout:
    """One dataset of a format: from which of `trl`'s datasets, by what function, and what a row
    lacks for which it gives None.
    """

    source: str
    make: Make
    holds: str = ""


@dataclass(frozen=True, slots=True)
class LayoutFormat:
    """A format as layouts by the name of the dataset.

    `settings` gives the files that stand beside the data by their name: what the tool is told to
    find the data. It takes the files of the datasets by dataset/split.
    """

    layouts: Mapping[str, Layout]
    settings: Settings | None = None
    suffix: str = "jsonl"
    by_split: bool = True

    def datasets(self, source: ExportSource) -> Iterator[Part]:
        """The rows of each part of the run that has any.

        Raises: ConfigError as `trl` does.
        """
        left_out: Counter[str] = Counter()
        for part in source.parts():
            made: dict[str, Rows] = {}
            for name, layout in self.layouts.items():
                if layout.source not in part:
                    continue
                rows = []
                for row in part[layout.source].iter_rows(named=True):
                    new = layout.make(_without_nulls(row))
                    if new is None:
                        left_out[name] += 1
                    else:
                        rows.append({**new, "split": row["split"]})
                made[name] = rows
            yield made
        source.notes.extend(
            f"{n:,} {'row' if n == 1 else 'rows'} of {name} left out: {self.layouts[name].holds}"
            for name, n in left_out.items()
        )


def _without_nulls(row: Row) -> Row:
    """The row, its turns with the fields they have: in Parquet those that are missing are null."""
    turns = {
        name: [{field: of for field, of in turn.items() if of is not None} for turn in row[name]]
        for name in TURN_COLUMNS
        if name in row
    }
    return {**row, **turns}


def only_text(turns: list[Turn]) -> bool:
    """Whether the turns are texts of system, user and assistant alone."""
    return all(
        turn["role"] in TEXT_ROLES
        and not turn.get("tool_calls")
        and turn.get("content") is not None
        for turn in turns
    )


def plain(row: Row, *answers: str) -> bool:
    """Whether the prompt and these answers are text alone, and there are no tools."""
    turns = row["prompt"] + [turn for answer in answers for turn in row[answer]]
    return not row.get("tools") and only_text(turns)


def one_turn(row: Row) -> tuple[str, str] | None:
    """The system text ("" without one) and the question of a prompt that has one turn."""
    turns = row["prompt"]
    if not plain(row):
        return None
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    rest = turns[1:] if turns[0]["role"] == "system" else turns
    if [turn["role"] for turn in rest] != ["user"]:
        return None
    return system, rest[0]["content"]


def text(answer: list[Turn]) -> str | None:
    """The text of an answer of one turn without calls of tools."""
    return str(answer[0]["content"]) if len(answer) == 1 and only_text(answer) else None


def messages(row: Row, answer: str = "completion") -> Row:
    """A whole conversation as chat templates take it, with its tools where it has some."""
    tools = {"tools": json.loads(row["tools"])} if row.get("tools") else {}
    return {"messages": row["prompt"] + row[answer], **tools}


def text_messages(row: Row) -> Row | None:
    """As `messages`, of conversations of text alone."""
    return messages(row) if plain(row, "completion") else None
