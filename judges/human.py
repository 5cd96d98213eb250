"""People as judges: what a label is, in which order a person sees two answers, and what all labels together say.

A label is a JSON object in the ledger, which only grows: correcting oneself adds a label, an undo adds
`{"undo": digest of the label, ...}`. People are asked apart from runs (`prefab label`), blind to what judges said; what
they say is gold for the statistics. This module only reads and makes such objects.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

from factory.keys import digest
from factory.types import Order, Verdict, Winner

KEYS = {"a": "a", "b": "b", "t": "tie", "s": "skip"}  # what a person types, by what it says of the answers as shown
WINNERS = ("a", "b", "tie")
Said = Literal["a", "b", "tie", "skip"]
Place = tuple[str, str, str, str]  # prompt, answer, the other answer (the lesser name first), principle


@dataclass(frozen=True, slots=True)
class Label:
    """What one person last said of a comparison under a principle; `winner` speaks of `a` and `b` as named here."""

    digest: str
    prompt: str
    a: str
    b: str
    principle: str
    winner: Said
    annotator: str

    @property
    def place(self) -> Place:
        """Which comparison this is, whatever the order of its answers."""
        return place_of(self.prompt, self.a, self.b, self.principle)

    @property
    def winner_in_place(self) -> Said:
        """The winner in the order of `place`."""
        return self.winner if (self.a, self.b) == self.place[1:3] else swapped(self.winner)


def place_of(prompt: str, a: Any, b: Any, principle: str) -> Place:
    """Which comparison this is, whatever the order of its answers."""
    low, high = sorted((str(a), str(b)))
    return prompt, low, high, principle


def swapped(said: Said) -> Said:
    """The same word when the answers change places."""
    return {"a": "b", "b": "a"}.get(said, said)  # type: ignore[return-value]


def shown_order(seed: int, annotator: str, place: Place) -> Order:
    """Which answer a person sees first: as good as random, and the same when asked again."""
    text = "\0".join(("shown", str(seed), annotator, *place))
    return "ab" if sha256(text.encode()).digest()[0] % 2 == 0 else "ba"


def row(prompt: str, a: str, b: str, principle: str, said: Said, order: Order, annotator: str, at: float,
        **more: Any) -> dict[str, Any]:
    """The label to record. `said` is of the answers as shown in `order`; `winner` of `a` and `b` as named."""
    winner = said if order == "ab" else swapped(said)
    return {"prompt": prompt, "a": a, "b": b, "principle": principle, "winner": winner, "order": order,
            "annotator": annotator, "at": round(at, 6), **more}


def undo(label: str, annotator: str, at: float) -> dict[str, Any]:
    """The row that takes back a label, named by its digest."""
    return {"undo": label, "annotator": annotator, "at": round(at, 6)}


def name_of(value: Mapping[str, Any]) -> str:
    """The digest under which the ledger keeps a label."""
    return digest(dict(value))


def latest(rows: Iterable[Mapping[str, Any]], placed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict) -> list[Label]:
    """What stands of all labels, oldest first: no undone ones, each person's last word on each comparison.

    `placed` gives a row with the names by which the reader knows answers and principle. Rows that are no labels then
    (another program's, without a winner or answers) are passed over.
    """
    known = list(rows)
    undone = {value.get("undo") for value in known}
    found: dict[tuple[Place, str], Label] = {}
    for value in known:
        label = _label(placed(value), name_of(value))
        if label is not None and label.digest not in undone:
            found.pop((label.place, label.annotator), None)  # the last word stands where it was last said
            found[label.place, label.annotator] = label
    return list(found.values())


def _label(value: Mapping[str, Any], name: str) -> Label | None:
    prompt, a, b, winner = (value.get(name) for name in ("prompt", "a", "b", "winner"))
    if not isinstance(prompt, str) or a is None or b is None or winner not in (*WINNERS, "skip"):
        return None
    return Label(name, prompt, str(a), str(b), str(value.get("principle") or ""), winner,
                 str(value.get("annotator") or ""))


def gold(labels: Iterable[Label]) -> dict[Place, Winner | None]:
    """What most people said of each comparison, in the order of its place; None where they are split evenly."""
    votes: dict[Place, Counter[str]] = {}
    for label in labels:
        if label.winner != "skip":
            votes.setdefault(label.place, Counter())[label.winner_in_place] += 1
    return {place: _most(counts) for place, counts in votes.items()}


def _most(counts: Counter[str]) -> Any:
    first, *rest = counts.most_common(2)
    return None if rest and rest[0][1] == first[1] else first[0]


def verdict(label: Label) -> Verdict | None:
    """A label as a verdict: hard, with no probability but 0, a half or 1; None for a skip, which says nothing."""
    if label.winner == "skip":
        return None
    return Verdict({"a": 1.0, "b": 0.0, "tie": 0.5}[label.winner], label.winner, None, 1.0,
                   float(label.winner == "tie"), "hard")
