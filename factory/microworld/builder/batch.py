"""From units to tensors: chats to tokens, trees of branches packed into rows, and where attention
should look.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from prefab.factory.microworld import grammar, tasks
from prefab.factory.microworld.grammar import inventory
from prefab.factory.types import Message

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Offsets = Sequence[tuple[int, int]]  # where each token's characters begin and end
NO_TARGET = -100
HELPFUL, OVERALL = tasks.ASKED.index("helpful"), tasks.ASKED.index("overall")


def chat_text(messages: tuple[Message, ...]) -> str:
    """The messages as the embedded chat template writes them, up to where the assistant begins."""
    return (
        "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in messages)
        + "<|im_start|>assistant\n"
    )


@dataclass(slots=True)
class Tree:
    """A unit in tokens. Arrays over its tokens: ids, position, branch (0 is the trunk), target (the
    next token or -100), weight, asked (index into ASKED or -1); `faults`: column -> 11 marks, NaN
    where one cannot be known there yet; `look`: (layers below the label's, head, column) -> the
    columns that attention should meet; `count`: column of an overall grade -> the columns that head
    0 should meet alike (one a fault, and one more).
    """

    ids: list[int]
    position: list[int]
    branch: list[int]
    target: list[int]
    weight: list[float]
    asked: list[int]
    faults: dict[int, np.ndarray]
    look: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)
    count: dict[int, list[int]] = field(default_factory=dict)


def tree(unit: tasks.Unit, tokenizer: Tokenizer) -> Tree:
    """The unit as one tree. `tokenizer` is a `tokenizers.Tokenizer`."""
    prompts = [chat_text(b.messages) for b in unit.branches]
    coded = tokenizer.encode_batch(prompts, add_special_tokens=False)
    replies = tokenizer.encode_batch(
        [b.reply + "<|im_end|>" for b in unit.branches], add_special_tokens=False
    )
    trunk = _common(coded) if len(coded) > 1 else 0
    first = coded[0]
    t = Tree(
        list(first.ids[:trunk]),
        list(range(trunk)),
        [0] * trunk,
        [NO_TARGET] * trunk,
        [0.0] * trunk,
        [-1] * trunk,
        {},
    )
    for number, (branch, prompt, reply) in enumerate(
        zip(unit.branches, coded, replies, strict=True), 1
    ):
        at = len(t.ids)
        ids = list(prompt.ids[trunk:]) + list(reply.ids)
        start = len(prompt.ids) - trunk  # of the reply, within this branch
        t.ids += ids[:-1]
        t.position += range(trunk, trunk + len(ids) - 1)
        t.branch += [number] * (len(ids) - 1)
        t.target += [NO_TARGET] * (start - 1) + list(reply.ids)
        t.weight += [0.0] * (start - 1) + [branch.weight] + [branch.rest] * (len(reply.ids) - 1)
        t.asked += (
            [-1] * (start - 1)
            + [tasks.ASKED.index(branch.asked) if branch.asked else -1]
            + [-1] * (len(reply.ids) - 1)
        )
        where = [
            _Placed(text, answer, prompts[number - 1], prompt.offsets, trunk, at)
            for text, answer in unit.answers
        ]
        topic = _Topic(unit.situation, prompts[number - 1], prompt.offsets, trunk, at, where)
        _mark(t, where, topic)
        _look(t, branch, where, prompt, reply, topic, at, start)
    return t


def _common(coded: Sequence[Encoding]) -> int:
    shortest = min(len(c.ids) for c in coded)
    n = 0
    while n < shortest - 1 and all(c.ids[n] == coded[0].ids[n] for c in coded):
        n += 1
    return n


class _Placed:
    """Where an answer's sentences stand among the tree's columns, seen from one branch."""

    def __init__(
        self,
        fenced: str,
        answer: grammar.WorldAnswer,
        prompt: str,
        offsets: Offsets,
        trunk: int,
        at: int,
    ) -> None:
        self.answer, self.fenced = answer, fenced
        begin = prompt.rindex(fenced)
        text_at = begin + fenced.index("\n") + 1
        self.sentences: list[list[int]] = []
        self.starts: list[int] = []
        for sentence in answer.sentences:
            self.sentences.append(
                _columns(offsets, text_at, text_at + len(sentence.text), trunk, at)
            )
            self.starts.append(text_at)
            text_at += len(sentence.text) + 1
        self.end = _columns(offsets, text_at, begin + len(fenced), trunk, at)


def _columns(offsets: Offsets, low: int, high: int, trunk: int, at: int) -> list[int]:
    """The tree's columns of the tokens whose characters begin in [low, high)."""
    first, last = _bisect(offsets, low), _bisect(offsets, high)
    return [i if i < trunk else at + i - trunk for i in range(first, last)]


def _bisect(offsets: Offsets, value: int) -> int:
    low, high = 0, len(offsets)
    while low < high:
        middle = (low + high) // 2
        if offsets[middle][1] <= value:
            low = middle + 1
        else:
            high = middle
    return low


class _Topic:
    """Where the prompt, and the help in each answer, name the verb and the object: columns seen
    from one branch.
    """

    def __init__(
        self,
        situation: grammar.Situation,
        prompt: str,
        offsets: Offsets,
        trunk: int,
        at: int,
        where: list[_Placed],
    ) -> None:
        end = min((prompt.rindex(p.fenced) for p in where), default=len(prompt))
        self.words = (situation.object, situation.verb)
        self.asked = [self._columns(prompt, w, 0, end, offsets, trunk, at) for w in self.words]
        self.said: list[
            list[tuple[bool, list[int]]]
        ] = []  # by answer with help: (is it the word asked for, its columns)
        for placed in where:
            core = next(
                (k for k, x in enumerate(placed.answer.sentences) if x.kind == "core"), None
            )
            known = core is not None and inventory().get(placed.answer.sentences[core].text)
            if core is None or not known or known[0] != "help":
                self.said.append([])
                continue
            low = placed.starts[core]
            high = low + len(placed.answer.sentences[core].text)
            self.said.append(
                [
                    (w == word, self._columns(prompt, w, low, high, offsets, trunk, at))
                    for w, word in zip((known[2], known[1]), self.words, strict=True)
                ]
            )

    @staticmethod
    def _columns(
        prompt: str, word: str, low: int, high: int, offsets: Offsets, trunk: int, at: int
    ) -> list[int]:
        found = (
            prompt.rfind(" " + word, low, high) if low == 0 else prompt.find(" " + word, low, high)
        )
        return _columns(offsets, found + 1, found + 1 + len(word), trunk, at) if found >= 0 else []


def _mark(t: Tree, where: list[_Placed], topic: _Topic) -> None:
    """Which principle each sentence breaks, and at an answer's end all that it breaks. Whether help
    is on topic shows at its object (verb and object are compared with the prompt's there) and
    nowhere else; without help, at the last token.
    """
    for placed, said in zip(where, topic.said, strict=True):
        for sentence, columns in zip(placed.answer.sentences, placed.sentences, strict=True):
            row = np.zeros(len(grammar.PRINCIPLES), np.float32)
            for p in _faults(sentence):
                row[grammar.PRINCIPLES.index(p)] = 1.0
            t.faults |= {c: _without_helpful(row) for c in columns}
            if sentence.kind == "core":
                t.faults[said[0][1][-1] if said else columns[-1]] = row
        whole = np.array([p in placed.answer.broken for p in grammar.PRINCIPLES], np.float32)
        t.faults |= {c: _without_helpful(whole) for c in placed.end}
        if not said:
            t.faults[placed.end[0]] = whole


def _without_helpful(row: np.ndarray) -> np.ndarray:
    row = row.copy()
    row[HELPFUL] = np.nan
    return row


def _faults(sentence: grammar.Sentence) -> set[str]:
    both = {"refusal", "helpful"} if sentence.fault == "refusal" else set()
    return both | ({sentence.fault} if sentence.fault else set())


def _look(
    t: Tree,
    branch: tasks.Branch,
    where: list[_Placed],
    prompt: Encoding,
    reply: Encoding,
    topic: _Topic,
    at: int,
    start: int,
) -> None:
    """Attention targets: the label looks at what decides it, copied words at their source, and, two
    layers below, an answer's verb and object at the same word in the prompt, or at the first token
    where the prompt has another.
    """
    label = at + start - 1
    for head, number, asked in branch.spans:
        placed, name, said = where[number], tasks.ASKED[asked], topic.said[number]
        if name == "overall" and head == 0:
            t.count[label] = _counted(placed, said)
        t.look[0, head, label] = _deciding(placed, name, head, said) or placed.end
    for said in topic.said:
        for head, ((same, columns), wanted) in enumerate(zip(said, topic.asked, strict=False)):
            t.look |= {(2, head, c): wanted if same else [0] for c in columns if wanted}
    if branch.copies:
        _look_copies(t, where[0], reply, branch.reply, label)
    elif not branch.asked:
        _look_words(t, topic, reply, branch.reply, label)


def _deciding(
    placed: _Placed, name: str, head: int, said: list[tuple[bool, list[int]]]
) -> list[int]:
    """The columns of the sentences that decide the label under the principle `name`."""
    if name == "overall" and head == 1:
        return []
    columns = [
        c
        for s, cs in zip(placed.answer.sentences, placed.sentences, strict=True)
        if name in _faults(s) or (name == "overall" and s.fault)
        for c in cs
    ]
    return said[0][1][-1:] if name == "helpful" and said and columns else columns


def _look_words(t: Tree, topic: _Topic, reply: Encoding, said: str, at: int) -> None:
    """Verb and object in the reply look at the same words in the prompt."""
    for word, columns in zip(topic.words, topic.asked, strict=True):
        found = said.find(" " + word)
        if found < 0 or not columns:
            continue
        begin, end = found + 1, found + 1 + len(word)
        for k in range(_bisect(reply.offsets, begin), _bisect(reply.offsets, end)):
            t.look |= {(0, head, at + k): columns for head in (2, 3)}


def _counted(placed: _Placed, said: list[tuple[bool, list[int]]]) -> list[int]:
    """One column for each principle broken, and the answer's end: its share of even attention tells
    their number.
    """
    columns = [placed.end[0]]
    for sentence, cs in zip(placed.answer.sentences, placed.sentences, strict=True):
        if sentence.fault:
            columns += (
                said[0][1][-1:] if sentence.fault == "helpful" else cs[-len(_faults(sentence)) :]
            )
    missing = (
        len(placed.answer.broken) + 1 - len(columns)
    )  # no core sentence: nothing stands for `helpful`
    return columns + placed.end[1 : 1 + missing]


def _look_copies(t: Tree, placed: _Placed, reply: Encoding, said: str, at: int) -> None:
    """Each sentence of the reply that stands in the answer looks at its words there."""
    for sentence, columns in zip(placed.answer.sentences, placed.sentences, strict=True):
        begin = said.find(sentence.text)
        if begin < 0:
            continue
        tokens = range(
            _bisect(reply.offsets, begin), _bisect(reply.offsets, begin + len(sentence.text))
        )
        if len(tokens) == len(columns):
            t.look |= {
                (0, head, at + k): [column]
                for k, column in zip(tokens, columns, strict=True)
                for head in (2, 3)
            }


@dataclass(slots=True)
class Batch:
    """Rows of packed trees. Shapes: B rows, T tokens; `tree` and `branch` decide who sees whom;
    `look_*` over N targets; `count` rows are (row, column that looks, column looked at, how many
    such).
    """

    ids_BT: np.ndarray
    position_BT: np.ndarray
    tree_BT: np.ndarray
    branch_BT: np.ndarray
    target_BT: np.ndarray
    weight_BT: np.ndarray
    asked_BT: np.ndarray
    faults: tuple[np.ndarray, np.ndarray, np.ndarray]
    look_N4: np.ndarray
    look_NT: np.ndarray
    count_N4: np.ndarray


def make_batch(
    seed: str,
    tokenizer: Tokenizer,
    rows: int,
    width: int,
    shots: float = 0.1,
    noise_share: float = 0.0,
    phase: int = 0,
) -> Batch:
    """One batch, a function of its seed alone: rows of trees, first fit, trees longer than `width`
    left out.
    """
    rng = random.Random(seed)
    filled: list[list[Tree]] = [[] for _ in range(rows)]
    room, misses = [width] * rows, 0
    while misses < 6:
        made = tree(tasks.unit(rng, "train", shots, noise_share, phase), tokenizer)
        row = next((r for r in range(rows) if room[r] >= len(made.ids)), None)
        if row is None:
            misses += 1
            continue
        filled[row].append(made)
        room[row] -= len(made.ids)
    return _stack(filled, rows, width, phase > 0)


def _stack(filled: list[list[Tree]], rows: int, width: int, late: bool = False) -> Batch:
    ints = {k: np.zeros((rows, width), np.int64) for k in ("ids", "position", "branch")}
    tree_BT, asked = np.full((rows, width), -1), np.full((rows, width), -1)
    target, weight = np.full((rows, width), NO_TARGET), np.zeros((rows, width), np.float32)
    fault_rows, fault_cols, fault_values, looks, counts = [], [], [], [], []
    for r, trees in enumerate(filled):
        at = 0
        for number, t in enumerate(trees):
            here = slice(at, at + len(t.ids))
            ints["ids"][r, here], ints["position"][r, here], ints["branch"][r, here] = (
                t.ids,
                t.position,
                t.branch,
            )
            tree_BT[r, here], target[r, here], weight[r, here], asked[r, here] = (
                number,
                t.target,
                t.weight,
                t.asked,
            )
            fault_rows += [r] * len(t.faults)
            fault_cols += [at + c for c in t.faults]
            fault_values += list(t.faults.values())
            looks += [
                (r, below, head, at + position, [at + c for c in columns])
                for (below, head, position), columns in t.look.items()
                if not (late and (below, head) == (0, 0) and position in t.count)
            ]
            counts += (
                [(r, at + q, at + c, len(cs)) for q, cs in t.count.items() for c in cs]
                if late
                else []
            )
            at += len(t.ids)
    mask = np.zeros((len(looks), width), bool)
    for i, (*_, columns) in enumerate(looks):
        mask[i, columns] = True
    look = np.array([row for *row, _ in looks], np.int64).reshape(-1, 4)
    faults = (np.array(fault_rows), np.array(fault_cols), np.array(fault_values, np.float32))
    return Batch(
        ints["ids"],
        ints["position"],
        tree_BT,
        ints["branch"],
        target,
        weight,
        asked,
        faults,
        look,
        mask,
        np.array(counts, np.int64).reshape(-1, 4),
    )
