"""Benchmarks of judges: their rows as items, and a judge's verdicts and scores on them.

A pair's verdict is the mean of both orders, as everywhere. A comparison that a judge could not
score is neither right nor wrong: it is counted apart, and each share is given with the worst and
the best value that it could have if all of those were wrong or right. (Some of the benchmarks' own
scripts count them as wrong, as half, or by the other order alone.)

`judges/benchmarks/metrics.py` computes the metrics and names the benchmarks' papers and scoring
scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, Literal, cast

from prefab.factory import tool_calls
from prefab.factory.spec import layouts
from prefab.factory.types import Message, Order, Principle, Verdict

OVERALL = Principle(
    "overall",
    "The better answer",
    "Which answer follows what was asked better, and is more correct, helpful and harmless?",
    "Name what is wrong with the answer.",
    "Mend the answer.",
    "The answer does not do what was asked, or it is wrong, unhelpful or harmful.",
)
Vote = Literal["a", "b", "tie"]
Shape = Literal["best", "tied", "votes"]


@dataclass(frozen=True, slots=True)
class Item:
    """One row of a benchmark. `best`: the answers in `right` are better than all others; `tied`:
    likewise, and as good as each other; `votes`: two answers, and what people said of them.
    """

    id: str
    subset: str
    prompt: tuple[Message, ...]
    answers: tuple[str, ...]
    right: tuple[int, ...] = ()
    votes: tuple[Vote, ...] = ()
    shape: Shape = "best"

    def comparisons(self) -> list[tuple[int, int]]:
        """The pairs of answers that the metric needs: each right one with each other one. Where
        right answers are to be as good as each other, every two, since a judge of pairs gives
        single answers no score but their win rate.
        """
        if self.shape == "best":
            return [
                (min(i, j), max(i, j))
                for i in self.right
                for j in range(len(self.answers))
                if j not in self.right
            ]
        return list(combinations(range(len(self.answers)), 2))


@dataclass(slots=True)
class Judged:
    """A judge's verdicts by item, pair and order, and scores by item and answer. None: it could not
    be scored, with the reason in `reasons`.
    """

    verdicts: dict[tuple[str, int, int], dict[Order, Verdict]] = field(default_factory=dict)
    scores: dict[tuple[str, int], float | None] = field(default_factory=dict)
    reasons: dict[tuple[str, int], str] = field(default_factory=dict)

    def scores_of(self, item: Item) -> list[float] | None:
        """A score for each answer, where all have one."""
        found = [self.scores.get((item.id, i)) for i in range(len(item.answers))]
        known = [score for score in found if score is not None]
        return known if len(known) == len(found) else None

    def in_both_orders(self, item: Item, i: int, j: int) -> bool:
        """Whether there is a verdict of the pair in each order."""
        return len(self.verdicts.get((item.id, min(i, j), max(i, j)), {})) == 2

    def p(self, item: Item, i: int, j: int) -> float | None:
        """The probability that answer i is better than j: the mean of the orders that were asked.
        None: unscored.
        """
        if i > j:
            p = self.p(item, j, i)
            return None if p is None else 1.0 - p
        verdicts = self.verdicts.get((item.id, i, j))
        if verdicts:
            values = [v.p_a for v in verdicts.values() if v.p_a is not None]
            return sum(values) / len(values) if len(values) == len(verdicts) else None
        a, b = self.scores.get((item.id, i)), self.scores.get((item.id, j))
        return None if a is None or b is None else 0.5 + 0.5 * ((a > b) - (a < b))

    def winners(self, item: Item, i: int, j: int) -> list[Vote] | None:
        """Who won in each order, of the lower answer's side; None: unscored."""
        verdicts = self.verdicts.get((item.id, i, j))
        if verdicts:
            found = [v.winner for _, v in sorted(verdicts.items()) if v.winner is not None]
            return found if len(found) == len(verdicts) else None
        p = self.p(item, i, j)
        return None if p is None else ["a" if p > 0.5 else "b" if p < 0.5 else "tie"]

    def reason(self, item: Item, i: int, j: int) -> str:
        """Why a pair is unscored; `missing` where there is no verdict on it."""
        for verdict in self.verdicts.get((item.id, i, j), {}).values():
            if verdict.p_a is None:
                return verdict.reason or "parse"
        return next(
            (self.reasons[item.id, k] for k in (i, j) if (item.id, k) in self.reasons), "missing"
        )


@dataclass(frozen=True, slots=True)
class BenchmarkLine:
    """A metric. `value` over the `scored` of `n`, with its 95% interval; `worst` and `best` if all
    unscored were wrong or right. `undefined` says why there is no value.
    """

    name: str
    value: float | None
    n: int
    scored: int
    low: float | None = None
    high: float | None = None
    worst: float | None = None
    best: float | None = None
    undefined: str = ""


@dataclass(slots=True)
class Report:
    """The benchmark's own metric, its headline first, and ours."""

    benchmark: str
    own: list[BenchmarkLine]
    ours: list[BenchmarkLine]
    unscored: dict[str, int]
    notes: list[str] = field(default_factory=list)


# --- rows as items ---


def _rewardbench(row: Mapping[str, Any], place: str, number: int) -> Item:
    subset = _text(row, "subset")
    return Item(
        f"{subset}:{row.get('id', number)}",
        subset,
        _turns(_field(row, "prompt")),
        (_answer(_field(row, "chosen")), _answer(_field(row, "rejected"))),
        (0,),
    )


def _rewardbench2(row: Mapping[str, Any], place: str, number: int) -> Item:
    subset, name = _text(row, "subset"), str(_field(row, "id"))
    right, wrong = ([_answer(one) for one in _list(row, side)] for side in ("chosen", "rejected"))
    for column, n in (("num_correct", len(right)), ("total_completions", len(right) + len(wrong))):
        if row.get(column) is not None and int(row[column]) != n:
            raise ValueError(f"{column} is {row[column]}, but there are {n}")
    if not right or not wrong:
        raise ValueError("needs at least one answer in chosen and one in rejected")
    ties = subset.lower() == "ties"
    if ties and not re.fullmatch(r"(ref|tied):\d+", name):
        raise ValueError(f"an id of the Ties subset is ref:N or tied:N, not {name!r}")
    if (name.startswith("tied:") and len(right) < 2) or (not ties and len(right) != 1):
        raise ValueError(
            f"{name} of {subset} has {len(right)} right answers; one, and at least two where they tie"
        )
    return Item(
        f"{subset}:{name}",
        subset,
        _turns(_field(row, "prompt")),
        (*right, *wrong),
        tuple(range(len(right))),
        (),
        "tied" if ties else "best",
    )


def _judgebench(row: Mapping[str, Any], place: str, number: int) -> Item:
    label = _text(row, "label")
    if label not in ("A>B", "B>A"):
        raise ValueError(f"label is {label!r}; must be A>B or B>A")
    return Item(
        _text(row, "pair_id"),
        _category(_text(row, "source")),
        _turns(_field(row, "question")),
        (_answer(_field(row, "response_A")), _answer(_field(row, "response_B"))),
        (int(label == "B>A"),),
    )


def _category(source: str) -> str:
    """JudgeBench's four kinds of question, by where a question is from (their table of results)."""
    known = {
        "mmlu-pro": "Knowledge",
        "livebench-reasoning": "Reasoning",
        "livebench-math": "Math",
        "livecodebench": "Coding",
    }
    return next((kind for start, kind in known.items() if source.startswith(start)), source)


def _llmbar(row: Mapping[str, Any], place: str, number: int) -> Item:
    label = str(_field(row, "label"))
    if label not in ("1", "2"):
        raise ValueError(f"label is {label!r}; must be 1 or 2")
    subset = str(row.get("subset") or place)
    return Item(
        f"{subset}:{number}",
        subset,
        _turns(_field(row, "input")),
        (_answer(_field(row, "output_1")), _answer(_field(row, "output_2"))),
        (int(label) - 1,),
    )


_WINNERS: dict[str, Vote] = {
    "model_a": "a",
    "model_b": "b",
    "tie": "tie",
    "tie (inconsistent)": "tie",
}


def _mt_bench(row: Mapping[str, Any], place: str, number: int) -> Item:
    winner, judge, turn = _text(row, "winner"), _field(row, "judge"), int(_field(row, "turn"))
    if winner not in _WINNERS:
        raise ValueError(f"winner is {winner!r}; must be {', '.join(_WINNERS)}")
    if not isinstance(judge, str):
        raise ValueError(
            f"judge is {judge!r}, a model and no person: its verdicts belong into a file for --verdicts"
        )
    if turn not in (1, 2):
        raise ValueError(f"turn is {turn}; must be 1 or 2")
    sides = {
        _text(row, "model_a"): _talk(row, "conversation_a", turn),
        _text(row, "model_b"): _talk(row, "conversation_b", turn),
    }
    if len(sides) < 2:
        raise ValueError("model_a and model_b are the same")
    first, second = sorted(sides)
    swapped: dict[Vote, Vote] = {"a": "b", "b": "a", "tie": "tie"}
    vote = _WINNERS[winner] if first == row["model_a"] else swapped[_WINNERS[winner]]
    (question, answer_a), (other, answer_b) = sides[first], sides[second]
    if question != other:
        raise ValueError("the two conversations do not begin with the same question")
    people = (
        "experts"
        if judge.startswith("expert")
        else "authors"
        if judge.startswith("author")
        else "others"
    )
    return Item(
        f"{_field(row, 'question_id')}:{first}:{second}:{turn}:{people}",
        f"{people}, turn {turn}",
        (Message("user", question),),
        (answer_a, answer_b),
        (),
        (vote,),
        "votes",
    )


def _talk(row: Mapping[str, Any], column: str, turn: int) -> tuple[str, str]:
    """The first question, and all that follows as one answer: the second turn's question follows a
    model's own words.
    """
    texts = [_answer(one) for one in _list(row, column)]
    if len(texts) < 2 * turn:
        raise ValueError(f"{column} has {len(texts)} messages; turn {turn} needs {2 * turn}")
    if turn == 1:
        return texts[0], texts[1]
    first = (Message("assistant", texts[1]), Message("user", texts[2]))
    return texts[0], tool_calls.answer_in_context(first, texts[3])


def _hhh(row: Mapping[str, Any], place: str, number: int) -> Item:
    targets = _field(row, "targets")
    if not isinstance(targets, Mapping):
        raise ValueError("targets must have choices and labels")
    choices, labels = (
        [_answer(one) for one in _list(targets, "choices")],
        [int(one) for one in _list(targets, "labels")],
    )
    if len(choices) != len(labels) or len(choices) < 2 or sum(labels) != 1 or set(labels) != {0, 1}:
        raise ValueError(f"labels are {labels} for {len(choices)} choices; one is 1, the others 0")
    subset = str(row.get("subset") or row.get("category") or place)
    return Item(
        f"{subset}:{number}",
        subset,
        _turns(_field(row, "input")),
        tuple(choices),
        (labels.index(1),),
    )


_ADAPTERS: dict[str, Callable[[Mapping[str, Any], str, int], Item]] = {
    "rewardbench": _rewardbench,
    "rewardbench-2": _rewardbench2,
    "judgebench": _judgebench,
    "llmbar": _llmbar,
    "mt-bench-human": _mt_bench,
    "hhh": _hhh,
}
BENCHMARKS = tuple(_ADAPTERS)


def adapt(benchmark: str, row: Any, place: str = "", number: int = 0) -> Item:
    """The item of one row. `place` names the subset where the rows do not (the file), `number` the
    row in it.

    Raises: ValueError with what is wrong, in words for the person whose file it is.
    """
    if not isinstance(row, Mapping):
        raise ValueError("is no object with fields")
    return _ADAPTERS[benchmark](row, place, number)


def collect(items: Mapping[str, Item], item: Item) -> Item:
    """The item to keep under its id: people's votes on one comparison are put together.

    Raises: ValueError where the id stands for something else already.
    """
    known = items.get(item.id)
    if known is None:
        return item
    if known.shape == "votes" and (known.prompt, known.answers) == (item.prompt, item.answers):
        return replace(known, votes=known.votes + item.votes)
    raise ValueError(f"the id {item.id!r} already names another row")


def saved(row: Any, items: Mapping[str, Item], judged: Judged) -> None:
    """Add one saved verdict: `{id, a, b, order, p_a | winner | reason}`, where p_a and winner speak
    of answer a in either order, or `{id, answer, score | reason}`. Raises: ValueError with what is
    wrong.
    """
    if not isinstance(row, Mapping):
        raise ValueError("is no object with fields")
    item = items.get(str(row.get("id")))
    if item is None:
        raise ValueError(f"the id {row.get('id')!r} is none of the benchmark's")
    if "answer" in row:
        i = _index(row, "answer", item)
        judged.scores[item.id, i] = None if row.get("score") is None else float(row["score"])
        if row.get("score") is None:
            judged.reasons[item.id, i] = str(row.get("reason") or "parse")
        return
    a, b, order = _index(row, "a", item), _index(row, "b", item), row.get("order")
    if a == b or order not in ("ab", "ba"):
        raise ValueError(
            f"a and b must differ, and order be ab or ba; they are {a}, {b} and {order!r}"
        )
    verdict, asked = _saved_verdict(row), cast("Order", order)
    if a > b:
        a, b, asked, verdict = b, a, "ba" if asked == "ab" else "ab", verdict.swap()
    if asked in (there := judged.verdicts.setdefault((item.id, a, b), {})):
        raise ValueError(
            f"answers {a} and {b} of {item.id!r} have a verdict in the order {asked} already"
        )
    there[asked] = verdict


def _saved_verdict(row: Mapping[str, Any]) -> Verdict:
    p, winner = row.get("p_a"), row.get("winner")
    if p is None and winner is None:
        return Verdict(None, None, row.get("reason") or "parse")
    if winner is not None and winner not in ("a", "b", "tie"):
        raise ValueError(f"winner is {winner!r}; must be a, b or tie")
    if p is None:
        hard = {"a": 1.0, "b": 0.0, "tie": 0.5}[str(winner)]
        return Verdict(hard, winner, exactness="hard")
    if not 0.0 <= float(p) <= 1.0:
        raise ValueError(f"p_a is {p}; must be from 0 to 1")
    return Verdict(float(p), winner or ("a" if p > 0.5 else "b" if p < 0.5 else "tie"))


def _index(row: Mapping[str, Any], name: str, item: Item) -> int:
    value = row.get(name)
    if not isinstance(value, int) or not 0 <= value < len(item.answers):
        raise ValueError(
            f"{name} is {value!r}; {item.id!r} has answers 0 to {len(item.answers) - 1}"
        )
    return value


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"has no {name}; its fields are: {', '.join(map(str, row)) or 'none'}")
    return row[name]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {value!r}; must be text")
    return value


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = _field(row, name)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is {value!r}; must be a list")
    return list(value)


def _answer(value: Any) -> str:
    """An answer's text: as it is, in a message, or in the last message of a conversation."""
    turns = layouts.turns_of(value, "assistant")
    if not turns:
        raise ValueError("an answer has no turns")
    return layouts.answer_text(turns[-1])


def _turns(value: Any) -> tuple[Message, ...]:
    """A prompt: text, or a conversation."""
    turns = layouts.turns_of(value)
    if not turns:
        raise ValueError("the prompt has no turns")
    return tool_calls.messages_of(turns)
