"""People as judges: what a label is, in which order a person sees two answers, and what all labels
of a comparison say together.

A label is a JSON object in the ledger, which is append-only: a correction adds a label, an undo
adds `{"undo": digest of the label, ...}`. People give labels outside of runs (`prefab label`),
without seeing the judges' verdicts. Their labels are the ground truth of the statistics, and the
verdicts of a panel's judge of kind `human`: a run takes the labels that exist for an answer's text;
comparisons without a label stay open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import orjson

from prefab.factory.keys import canonical, digest
from prefab.factory.types import (
    Completion,
    Engine,
    Message,
    Order,
    Request,
    Sampling,
    Verdict,
    Winner,
)
from prefab.factory.uses import PairUse
from prefab.judges.base import (
    NO_ORDER,
    Ask,
    Decoded,
    Judge,
    JudgeConfig,
    Pair,
    Question,
    RequestContext,
    RubricLines,
    last_verdict,
)

MODEL = "human"  # the identity under which a run keeps people's word

Said = Literal["a", "b", "tie", "skip"]
KEYS: dict[str, Said] = {
    "a": "a",
    "b": "b",
    "t": "tie",
    "s": "skip",
}  # what a person types, by what it says of the answers as shown
WINNERS: tuple[Winner, ...] = ("a", "b", "tie")
Place = tuple[
    str, str, str, str
]  # prompt, answer, the other answer (the lesser name first), principle


class HumanConfig(JudgeConfig):
    """People, asked where a panel's other judges are in doubt (`escalate.to`). `annotators`: whose
    labels count; none: all.
    """

    kind: Literal["human"] = "human"
    annotators: list[str] = []


@dataclass(frozen=True, slots=True)
class Label:
    """The last label of one person on a comparison under a principle; `winner` speaks of `a` and
    `b` as named here.
    """

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
    """The same label when the two answers change places."""
    return {"a": "b", "b": "a"}.get(said, said)  # type: ignore[return-value]


def shown_order(seed: int, annotator: str, place: Place) -> Order:
    """Which answer a person sees first: pseudo-random, and the same when asked again."""
    text = "\0".join(("shown", str(seed), annotator, *place))
    return "ab" if sha256(text.encode()).digest()[0] % 2 == 0 else "ba"


def row(
    prompt: str,
    a: str,
    b: str,
    principle: str,
    said: Said,
    order: Order,
    annotator: str,
    at: float,
    **more: Any,
) -> dict[str, Any]:
    """The label to record. `said` is of the answers as shown in `order`; `winner` of `a` and `b` as
    named.
    """
    winner = said if order == "ab" else swapped(said)
    return {
        "prompt": prompt,
        "a": a,
        "b": b,
        "principle": principle,
        "winner": winner,
        "order": order,
        "annotator": annotator,
        "at": round(at, 6),
        **more,
    }


def undo(label: str, annotator: str, at: float) -> dict[str, Any]:
    """The row that takes back a label, named by its digest."""
    return {"undo": label, "annotator": annotator, "at": round(at, 6)}


def name_of(value: Mapping[str, Any]) -> str:
    """The digest under which the ledger keeps a label."""
    return digest(dict(value))


def latest(
    rows: Iterable[Mapping[str, Any]],
    placed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> list[Label]:
    """The labels that are in force, oldest first: none that were undone, and each person's last one
    on each comparison.

    `placed` gives a row with the names by which the reader knows answers and principle. Rows that
    are not labels (of another program, without a winner or answers) are skipped.
    """
    known = list(rows)
    undone = {value.get("undo") for value in known}
    found: dict[tuple[Place, str], Label] = {}
    for value in known:
        label = _label(placed(value), name_of(value))
        if label is not None and label.digest not in undone:
            found.pop(
                (label.place, label.annotator), None
            )  # the last word stands where it was last said
            found[label.place, label.annotator] = label
    return list(found.values())


def _label(value: Mapping[str, Any], name: str) -> Label | None:
    prompt, a, b, winner = (value.get(name) for name in ("prompt", "a", "b", "winner"))
    if not isinstance(prompt, str) or a is None or b is None or winner not in (*WINNERS, "skip"):
        return None
    return Label(
        name,
        prompt,
        str(a),
        str(b),
        str(value.get("principle") or ""),
        winner,
        str(value.get("annotator") or ""),
    )


def gold(labels: Iterable[Label]) -> dict[Place, Winner | None]:
    """The label of the majority on each comparison, in the order of its place; None where people
    are split evenly.
    """
    votes: dict[Place, Counter[str]] = {}
    for label in labels:
        if label.winner != "skip":
            votes.setdefault(label.place, Counter())[label.winner_in_place] += 1
    return {place: _most(counts) for place, counts in votes.items()}


def _most(counts: Counter[str]) -> Any:
    first, *rest = counts.most_common(2)
    return None if rest and rest[0][1] == first[1] else first[0]


# --- in a panel ---


def text_name(text: str) -> str:
    """The name of an answer by its text alone: a label on it holds in every run."""
    return digest("text", text)


Word = tuple[Winner | None, tuple[str, ...]]


def answers(rows: Iterable[Mapping[str, Any]], annotators: Sequence[str] = ()) -> dict[Place, Word]:
    """The majority's label now (of all people, or of these), by place with the answers'
    `text_name`s; None where people are split, have skipped, or took their label back. With it the
    digests of all labels that were ever given there.
    """
    known = [row for row in rows if not annotators or row.get("annotator") in annotators]
    ever: dict[Place, set[str]] = {}
    for row in known:
        label = _label(by_text(row), name_of(row))
        if label is not None:
            ever.setdefault(label.place, set()).add(label.digest)
    said = gold(latest(known, by_text))
    return {place: (said.get(place), tuple(sorted(names))) for place, names in ever.items()}


def by_text(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A label that names its answers by their texts' digests (`prefab label` writes those), or by
    the texts themselves.
    """
    texts = value.get("texts")
    if isinstance(texts, Mapping):
        return {**value, **{side: texts.get(side) for side in "ab"}}
    return {
        **value,
        **{side: text_name(text) for side in "ab" if isinstance(text := value.get(side), str)},
    }


def request(
    known: Mapping[Place, Word], prompt: str, a: str, b: str, principle: str
) -> Request | None:
    """The request that is answered by people's labels about the texts `a` and `b`; None where
    nobody ever gave one.

    It holds the labels, so that after one is corrected or taken back it is another request.
    """
    names = text_name(a), text_name(b)
    place = place_of(prompt, *names, principle)
    if place not in known:
        return None
    winner, labels = known[place]
    said = "" if winner is None else winner if names[0] == place[1] else swapped(winner)
    job = {
        "prompt": prompt,
        "principle": principle,
        "a": names[0],
        "b": names[1],
        "said": said,
        "labels": list(labels),
    }
    return Request(MODEL, (Message("user", canonical(job).decode()),), Sampling(max_tokens=1))


class Clerk(Engine):
    """The engine: each request holds people's label."""

    identity, max_in_flight = MODEL, 1024

    async def complete(self, key: bytes, request: Request) -> Completion:
        """The label that the request holds."""
        return Completion(orjson.loads(request.messages[-1].content)["said"], "stop", None, "hard")


class HumanJudge(Judge[HumanConfig]):
    """People. A run takes the labels that were given before it; the other comparisons stay open."""

    Config = HumanConfig
    shows = "people"
    own = True

    def own_engine(self) -> Engine:
        """The engine that gives people's recorded answers."""
        return Clerk()

    def requests(
        self,
        role: str,
        questions: Sequence[Question],
        context: RequestContext,
        earlier: Sequence[Decoded],
    ) -> list[Ask]:
        """The comparisons on which people have given a label."""
        asks: list[Ask] = []
        for comparison, principles in questions:
            prompt, a, b = comparison.prompt.id, comparison.a, comparison.b
            for principle in principles:
                found = request(context.people, prompt, a.text, b.text, principle.id)
                at = (context.run, prompt, role, a.index, b.index)
                use = PairUse(*at, principle.id, self.name, NO_ORDER)
                if found is not None:
                    asks.append((found, use))
        return asks

    def n_calls(self, questions: Sequence[Question], context: RequestContext) -> int:
        """One label a comparison and principle."""
        return sum(len(principles) for _, principles in questions)

    def decode(self, use: Any, completion: Completion) -> Verdict | None:
        """People's label as a verdict on a and b; None where they are split, skipped, or took it
        back.
        """
        if not completion.text:
            return None
        winner = next((w for w in WINNERS if w == completion.text), None)
        if winner is None:
            return Verdict(None, None, "parse")
        p_a = {"a": 1.0, "b": 0.0, "tie": 0.5}[winner]
        return Verdict(p_a, winner, None, 1.0, float(winner == "tie"), "hard")

    def verdict(
        self, answers: Sequence[Decoded], pair: Pair, lines: RubricLines
    ) -> tuple[Verdict, tuple[str, ...]] | None:
        """People's verdict."""
        return last_verdict(answers, self.passes)
