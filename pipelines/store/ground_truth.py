"""Gold labels of a run's comparisons: from people, or from the embedded world's oracle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefab.factory.errors import ConfigError
from prefab.factory.numbers import counted
from prefab.factory.store.store import one_connection
from prefab.factory.types import Winner
from prefab.judges.kinds import human

if TYPE_CHECKING:
    import numpy as np
    import polars

    from prefab.factory.microworld import oracle
    from prefab.pipelines.store.selection import Selection

CHOICES = ("auto", "human", "oracle", "none")
_EPS = 1e-9  # gold scores differ by rounding if their weights are added in another order
_SIDE = {"a": 1.0, "b": 0.0, "tie": 0.5, None: float("nan")}


@dataclass(frozen=True, slots=True)
class People:
    """People's labels of a run's comparisons.

    Attributes:
        said: The majority's label by comparison; None if people are split.
        names: The name of an answer in `said`, by prompt and index.
        annotators: Who labelled a comparison.
    """

    said: Mapping[human.Place, Winner | None]
    names: Mapping[tuple[str, Any], str]
    annotators: Mapping[human.Place, frozenset[str]]

    def place(self, prompt: str, a: int, b: int, principle: str) -> human.Place:
        """The comparison of answers `a` and `b` as `said` and `annotators` name it."""
        name_a, name_b = (self.names.get((prompt, index), "") for index in (a, b))
        return human.place_of(prompt, name_a, name_b, principle)

    def winner(self, prompt: str, a: int, b: int, principle: str) -> Winner | None:
        """The majority's label of answers `a` and `b`; None without labels, or if people are
        split.
        """
        place = self.place(prompt, a, b, principle)
        said = self.said.get(place)
        other: dict[Winner, Winner] = {"a": "b", "b": "a", "tie": "tie"}
        in_order = place[1] == self.names.get((prompt, a), "")
        return said if said is None or in_order else other[said]


@one_connection()
def people(store: Path, run: int) -> People:
    """People's labels of a run's comparisons; for each person the latest one.

    A label names its answers by sample id, text or index. A label without a principle is
    about the principle under which the run judged the comparison where that is exactly one; else it
    says which answer is better over all (the principle "").
    """
    from prefab.pipelines.store.fill import query

    rows = [
        json.loads(value)
        for value in query(store, "SELECT value FROM human_labels ORDER BY labelled_at, rowid")[
            "value"
        ]
    ]
    if not rows:
        return People({}, {}, {})
    samples = query(
        store,
        'SELECT prompt, "index", sample, text FROM samples WHERE run = ? ORDER BY "index" DESC',
        [run],
    )
    names = {
        (prompt, key): str(index)
        for prompt, index, *more in samples.iter_rows()
        for key in (*more, index)
    }
    alone = {
        human.place_of(prompt, a, b, "")[:3]: principle
        for prompt, a, b, principle in query(
            store,
            "SELECT prompt, a, b, min(principle) FROM verdicts WHERE run = ? GROUP BY ALL "
            "HAVING count(DISTINCT principle) = 1",
            [run],
        ).iter_rows()
    }

    def placed(value: Mapping[str, Any]) -> Mapping[str, Any]:
        a, b = (names.get((value.get("prompt"), value.get(side))) for side in "ab")
        place = human.place_of(value.get("prompt", ""), a, b, "")[:3]
        principle = value.get("principle") or alone.get(place, "")
        return {**value, "a": a, "b": b, "principle": principle}

    labels = human.latest(rows, placed)
    annotators: dict[human.Place, frozenset[str]] = {}
    for label in labels:
        annotators[label.place] = annotators.get(label.place, frozenset()) | {label.annotator}
    return People(human.gold(labels), names, annotators)


def find_gold(
    selection: Selection, items: polars.DataFrame, choice: str = "auto"
) -> tuple[np.ndarray, str]:
    """The gold label of each comparison, and its source in words.

    Args:
        selection: The run.
        items: Comparisons, with columns prompt, a, b and principle (empty: better over all).
        choice: `human`, `oracle`, `none`, or `auto` for the first of these that exists.

    Returns:
        1 if a is better, 0 if b is, 0.5 for a tie, NaN if unknown (shape: N); and the source.

    Raises:
        ConfigError: The choice is unknown, or there is no oracle for these prompts.
    """
    import numpy as np

    if choice not in CHOICES:
        raise ConfigError(f"--gold {choice}: did you mean auto, human, oracle or none?")
    microworld = (selection.config.get("prompts") or {}).get("source") == "microworld"
    if choice == "oracle" and not microworld:
        raise ConfigError(
            f"--gold oracle: the prompts of {selection.name} are not from the embedded world; only that world has "
            "an oracle"
        )
    if choice in ("auto", "human"):
        known = people(selection.folder, selection.run["run"])
        gold, source = _human(known, items)
        if source or choice == "human":
            return gold, source or "0 comparisons labelled by 0 people"
    if choice in ("auto", "oracle") and microworld:
        return _oracle(selection, items), "the embedded world's oracle"
    return np.full(items.height, np.nan), ""


def _human(known: People, items: polars.DataFrame) -> tuple[np.ndarray, str]:
    """People's label of each comparison, and how many there are of how many people; no words where
    there is none.
    """
    import numpy as np

    gold = np.full(items.height, np.nan)
    persons: set[str] = set()
    places = items.select("prompt", "a", "b", "principle").iter_rows() if known.said else ()
    for row, place in enumerate(places):
        if (winner := known.winner(*place)) is not None:
            gold[row] = _SIDE[winner]
            persons |= known.annotators[known.place(*place)]
    n = int((~np.isnan(gold)).sum())
    told = f"{counted(n, 'comparison')} labelled by {counted(len(persons), 'person', 'people')}"
    return gold, told if n else ""


def truth(a: oracle.Assessment, b: oracle.Assessment, principle: str) -> Winner | None:
    """The oracle's label of two answers under a principle; without a principle, by the gold score.

    Returns:
        None for a principle that the oracle does not know.
    """
    from prefab.factory.microworld import grammar

    difference: float
    if principle in grammar.PRINCIPLES:
        difference = (principle in b.broken) - (principle in a.broken)
    elif principle:
        return None
    else:
        difference = a.score - b.score if abs(a.score - b.score) > _EPS else 0
    return "tie" if difference == 0 else "a" if difference > 0 else "b"


def _oracle(selection: Selection, items: polars.DataFrame) -> np.ndarray:
    """The oracle's label of each comparison, as in `find_gold`."""
    import numpy as np

    from prefab.factory.microworld import oracle
    from prefab.factory.tool_calls import stored_messages

    talks = {
        prompt: stored_messages(messages)
        for prompt, messages in selection.query("SELECT prompt, messages FROM prompts").iter_rows()
    }
    texts = selection.query(
        'SELECT prompt, "index", text FROM samples WHERE run = $run AND text IS NOT NULL'
    )
    known = {
        (prompt, index): oracle.assess(talks[prompt], text)
        for prompt, index, text in texts.iter_rows()
    }
    gold = np.full(items.height, np.nan)
    for row, (prompt, a, b, principle) in enumerate(
        items.select("prompt", "a", "b", "principle").iter_rows()
    ):
        if (prompt, a) in known and (prompt, b) in known:
            gold[row] = _SIDE[truth(known[prompt, a], known[prompt, b], principle)]
    return gold
