"""Count what a run would ask: the ledger of a plan, which looks answers up and asks nothing.

The recipe itself runs against it. Where an answer is missing it gets a placeholder that leads to
the most questions: a draft unlike any other, a critique that names a fault. So the counts are upper
bounds, and the expected number is estimated from the shares that the store's answers show.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import log
from typing import Literal, NamedTuple

from prefab.factory.errors import RequestRefused
from prefab.factory.keys import request_key
from prefab.factory.ledger import db
from prefab.factory.ledger.ledger import LedgerStats
from prefab.factory.types import Completion, Engine, Prompt, Request
from prefab.factory.uses import (
    ComparisonUse,
    CritiqueUse,
    EscalationUse,
    PairUse,
    RevisionUse,
    Use,
    columns_of,
)
from prefab.judges.kinds.critique import parse_critique
from prefab.pipelines.run.context import PLACEHOLDER, Ask, Response
from prefab.pipelines.run.escalation import GUESS
from prefab.pipelines.store import verdicts

CHARS_PER_TOKEN = 4.0  # English in the tokenizers in use; only for a rough figure
FAULT_SHARE = 0.3  # of critiques that name a fault, until 50 are known
DOUBT_SHARE = 0.33  # of comparisons that a stronger judge is asked about, until 50 are known
KNOWN_FROM = 50  # answers from which a share is taken from the store
LENGTHS_FROM = 20  # answers of a role from which their mean length is used
FAULT = f"Fault: {PLACEHOLDER}"
LOOKED_UP = 100_000  # failed calls whose keys are kept
# what the answers to a role's questions decide, for the reason of what is still to come
ABOVE = {
    "critique": ("sample",),
    "revise": ("critique", "sample"),
    "reason": ("sample",),
    "judge": ("sample", "reason"),
    "score": ("sample",),
    "step": ("sample",),
    "rank": ("sample",),
}
Place = tuple[str, str, str]  # role, principle, judge


class Condition(NamedTuple):
    """What must happen for a call to be made: `sure` (nothing), a `fault` found in a critique, an
    earlier revision in a `round`, or a `doubt` of the first judges.
    """

    kind: Literal["sure", "fault", "round", "doubt"]
    round: int = 0


@dataclass(slots=True)
class Row:
    """The calls of one role under one principle to one judge.

    Attributes:
        reused: Answers that the ledger has.
        ask: Calls to make, as expected; `estimated` of them depend on answers that are missing.
        at_most: Calls to make at most.
        refused: Calls that a server refused for good; a run does not ask them again.
        prompt_tokens: Of the calls to make, about.
        completion_tokens: Of the calls to make, as expected by the length of earlier answers.
        tokens_at_most: New tokens of `at_most` calls, each as long as allowed.
        why: Each reason with the number of calls to make.
    """

    role: str
    principle: str
    judge: str
    reused: int = 0
    ask: int = 0
    estimated: int = 0
    at_most: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_at_most: int = 0
    why: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Tally:
    """The calls of one place under one condition, weighted where prompts are sampled."""

    reused: float = 0.0
    refused: float = 0.0
    calls: float = 0.0
    hanging: float = 0.0
    characters: float = 0.0
    drafts: float = 0.0  # texts in the questions that are not written yet
    tokens: float = 0.0
    why: dict[str, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(slots=True)
class Shares:
    """Weighted counts from which a share is estimated."""

    hits: float = 0.0
    total: float = 0.0

    def add(self, hit: bool, weight: float) -> None:
        """Count one."""
        self.hits += hit * weight
        self.total += weight

    def share(self, default: float) -> float:
        """The share of hits; `default` until enough are known."""
        return self.hits / self.total if self.total >= KNOWN_FROM else default


class DryRunLedger:
    """Takes the ledger's place: gives the answers that are recorded, and placeholders for the rest.

    `weight` is how many prompts of the source the prompt at work stands for.
    """

    def __init__(
        self, con: sqlite3.Connection | None, before: int | None, reasons: ChangeReasons
    ) -> None:
        self.con, self.before, self.reasons = con, before, reasons
        self.stats = LedgerStats()
        self.weight = 1.0
        self.tallies: dict[tuple[Place, Condition], Tally] = defaultdict(Tally)
        self.draws: dict[str, float] = defaultdict(float)
        self.per_prompt = 0  # calls of the prompt at work
        self.to_make = 0
        self.lengths: dict[str, Shares] = defaultdict(Shares)
        self.faults, self.doubts = Shares(), Shares()
        self.strong: Sequence[str] = ()
        self._guessed: set[str] = set()  # prompts whose escalations depend on missing answers
        self._drawn: set[tuple[int, int, str]] = set()
        self._seen: set[bytes] = set()
        self._new = True  # the prompt at work is not in the run before
        self._failed = _failed_keys(con)

    def begin(self, prompt: str, weight: float = 1.0) -> None:
        """Count the calls of the next prompt."""
        self.weight, self.per_prompt, self.to_make = weight, 0, 0
        self._drawn.clear()
        self._guessed.clear()
        self._new = not asked_before(self.con, self.before, prompt)

    async def ask_many(self, asks: Sequence[Ask], engine: Engine) -> list[Response]:
        """The recorded answers, placeholders for what would be asked, and the recorded refusals."""
        keys = [request_key(request) for request, _ in asks]
        found = db.lookup(self.con, keys) if self.con else {}
        missing = [key for key in keys if key not in found]
        refused = db.refusals(self.con, missing) if self.con and missing else {}
        self.per_prompt += len(asks)
        return [
            self._answer(request, use, key, found.get(key), refused.get(key))
            for (request, use), key in zip(asks, keys, strict=True)
        ]

    def add_prompts(self, prompts: Iterable[Prompt]) -> None:
        """A plan records nothing."""

    def drop_queued(self, error: Exception) -> None:
        """In a plan nothing waits."""

    def note(self, use: Use, call: bytes = b"") -> None:
        """Learn from what is decided without asking."""
        if isinstance(use, ComparisonUse):
            self._draw(*use.pair, use.principle)
        elif isinstance(use, EscalationUse) and use.reason == GUESS:
            self._guessed.add(use.prompt)
        elif isinstance(use, EscalationUse):
            self.doubts.add(verdicts.escalated(use.reason), self.weight)

    def _draw(self, a: int, b: int, principle: str) -> None:
        if (a, b, principle) not in self._drawn:
            self._drawn.add((a, b, principle))
            self.draws[principle] += self.weight

    def _answer(
        self, request: Request, use: Use, key: bytes, answer: Completion | None, refused: str | None
    ) -> Response:
        if isinstance(use, PairUse) and use.principle:
            self._draw(*use.pair, use.principle)
        place = (use.role, use.principle, use.judge)
        condition = self._condition(request, use)
        tally = self.tallies[place, condition]
        if answer is not None:
            tally.reused += self.weight
            self._learn(request, use, answer)
            return answer
        if refused is not None:
            tally.refused += self.weight
            return RequestRefused(refused)
        placeholder = _placeholder(request, use)
        if key in self._seen:  # asked once, whoever asks it again
            tally.reused += self.weight
            return placeholder
        self._seen.add(key)
        self.to_make += 1
        self._count(tally, request, use, key, condition)
        return placeholder

    def _condition(self, request: Request, use: Use) -> Condition:
        if isinstance(use, PairUse) or use.judge:
            doubted = use.judge in self.strong and use.prompt in self._guessed
            return Condition("doubt") if doubted else Condition("sure")
        if isinstance(use, RevisionUse) and any(FAULT in m.content for m in request.messages):
            return Condition("fault", use.round)
        if isinstance(use, CritiqueUse) and use.round:
            written = any(PLACEHOLDER in m.content for m in request.messages)
            return Condition("round", use.round) if written else Condition("sure")
        return Condition("sure")

    def _count(
        self, tally: Tally, request: Request, use: Use, key: bytes, condition: Condition
    ) -> None:
        text = "\n".join(m.content for m in request.messages)
        drafts = text.count(PLACEHOLDER)
        hangs = drafts > 0 or condition.kind == "doubt"
        tally.calls += self.weight
        tally.hanging += hangs * self.weight
        tally.characters += (len(text) - drafts * len(PLACEHOLDER)) * self.weight
        tally.drafts += drafts * self.weight
        tally.tokens += request.sampling.max_tokens * self.weight
        tally.why[self._why(use, key, hangs)] += self.weight

    def _why(self, use: Use, key: bytes, hangs: bool) -> str:
        """Why the ledger has no answer to this question."""
        if key in self._failed:
            return "failed before"
        if self.before is None:
            return "not asked before"
        if self._new:
            return "new prompt"
        if changed := self.reasons.of(use.role, use.principle):
            return changed
        if hangs:
            above = [role for role in ABOVE.get(use.role, ()) if self._is_asked(role)]
            return f"follows from {' and '.join(f'{role}s' for role in above) or 'answers'} still to come"
        return "the run before did not get so far"

    def _is_asked(self, role: str) -> bool:
        return any(place[0] == role and tally.calls for (place, _), tally in self.tallies.items())

    def _learn(self, request: Request, use: Use, answer: Completion) -> None:
        self.lengths[use.role].hits += answer.completion_tokens * self.weight
        self.lengths[use.role].total += self.weight
        if use.role == "critique":
            read = parse_critique(answer, labels=request.labels[:2])
            if read.fault is not None:
                self.faults.add(read.fault, self.weight)

    def rows(self, width: int, max_share: float, max_tokens: int) -> list[Row]:
        """What was counted, as expected and at most.

        Args:
            width: Principles under which a draft is criticised in a round.
            max_share: Of comparisons, that stronger judges may be asked about.
            max_tokens: Of a draft.
        """
        fault = self.faults.share(FAULT_SHARE)
        again = 1.0 - (1.0 - fault) ** width  # a draft is revised in a round
        factors = {"sure": 1.0, "fault": fault, "round": 1.0}
        factors["doubt"] = min(max_share, self.doubts.share(DOUBT_SHARE))
        length = self._length("sample", max_tokens)
        found: dict[Place, Row] = {}
        for (place, condition), tally in self.tallies.items():
            row = found.setdefault(place, Row(*place))
            factor = factors[condition.kind] * again**condition.round
            row.reused += round(tally.reused)
            row.refused += round(tally.refused)
            row.at_most += round(tally.calls)
            row.ask += round(tally.calls * factor)
            row.estimated += round(tally.calls * factor if factor < 1 else tally.hanging)
            prompt_tokens = tally.characters / CHARS_PER_TOKEN + tally.drafts * length
            row.prompt_tokens += round(prompt_tokens * factor)
            row.tokens_at_most += round(tally.tokens)
            each = tally.tokens / tally.calls if tally.calls else 0.0
            row.completion_tokens += round(
                tally.calls * factor * self._length(place[0], each, labels=each <= 1)
            )
            for why, n in tally.why.items():
                row.why[why] = row.why.get(why, 0) + round(n * factor)
        for row in found.values():
            row.why = {why: n for why, n in row.why.items() if n}
        return sorted(
            found.values(), key=lambda row: (ROLES.index(row.role), row.principle, row.judge)
        )

    def _length(self, role: str, longest: float, labels: bool = False) -> float:
        """The mean length of a role's answers in tokens; until some are known, the longest
        allowed.
        """
        known = self.lengths.get(role)
        if known is None or known.total < LENGTHS_FROM or labels:
            return longest
        return min(longest, known.hits / known.total)


ROLES = ("sample", "critique", "revise", "reason", "judge", "score", "step", "rank")


class ChangeReasons:
    """The changes since the run before, by the calls that they touch."""

    def __init__(self, changes: Sequence[tuple[str, str, str]]) -> None:
        self.changes = changes  # role ("" for all), principle ("" for all), words
        self._known: dict[tuple[str, str], str] = {}

    def of(self, role: str, principle: str) -> str:
        """The changes that touch a role's calls under a principle, in words; empty without one."""
        known = self._known.get((role, principle))
        if known is None:
            known = self._known[role, principle] = "; ".join(
                words
                for touched, about, words in self.changes
                if (not touched or role in TOUCHES.get(touched, (touched,)))
                and about in ("", principle)
            )
        return known


# What a change to a role touches: `judge` stands for all of a panel's calls, `compare` for those
# that show several answers.
TOUCHES = {
    "judge": ("judge", "reason", "score", "step", "rank"),
    "compare": ("judge", "reason", "rank"),
}


def asked_before(con: sqlite3.Connection | None, run: int | None, prompt: str) -> bool:
    """Whether a run has asked anything about a prompt."""
    if con is None or run is None:
        return False
    sql = (
        "SELECT EXISTS (SELECT 1 FROM uses WHERE run = ? AND prompt = "
        "(SELECT id FROM names WHERE name = ?))"
    )
    return bool(con.execute(sql, (run, prompt)).fetchone()[0])


def _failed_keys(con: sqlite3.Connection | None) -> set[bytes]:
    if con is None:
        return set()
    sql = "SELECT DISTINCT key FROM failures ORDER BY id DESC LIMIT ?"
    return {bytes(key) for (key,) in con.execute(sql, (LOOKED_UP,))}


def _placeholder(request: Request, use: Use) -> Completion:
    """An answer that leads to the most questions: a draft unlike any other, a critique that names a
    fault, an even reading.
    """
    if request.labels and use.role != "critique":
        even = log(0.9 / len(request.labels))
        return Completion(PLACEHOLDER, "length", dict.fromkeys(request.labels, even))
    if use.role == "critique":
        word = request.labels[1] if request.labels else "Fault"
        return Completion(FAULT.replace("Fault", word), "stop")
    unlike = blake2b(f"{use.prompt}\0{columns_of(use)}".encode(), digest_size=8).hexdigest()
    return Completion(f"{PLACEHOLDER}{unlike}", "stop")
