"""What a run would ask, what it would find answered, and why: the recipe itself, run against a
ledger that only looks.

Where a draft is not made yet, what follows from it is counted on a placeholder and called an
estimate: nobody can know which answers will be equal, or in which a critic will name a fault. Needs
neither a server nor torch.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import log
from operator import attrgetter
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.keys import request_key
from prefab.factory.ledger import db
from prefab.factory.ledger import records as recorded
from prefab.factory.ledger.ledger import LedgerStats
from prefab.factory.spec.constitution import parse_constitution, renamed
from prefab.factory.types import Completion, Constitution, Principle, Prompt, Request
from prefab.factory.uses import EscalationUse, IdenticalUse, Use, columns_of
from prefab.judges.kinds.critique import parse_critique
from prefab.pipelines.config.loader import (
    ResolvedPipeline,
    make_engines,
    make_programs,
    models,
    resolve_pipeline,
)
from prefab.pipelines.config.registries import RECIPES
from prefab.pipelines.run.context import PLACEHOLDER, Context
from prefab.pipelines.run.escalation import GUESS
from prefab.pipelines.store import verdicts

CHARS_PER_TOKEN = 4.0  # English in the tokenizers in use; only for a rough figure
FAULT_SHARE = 0.3  # of critiques that name a fault, until some are known
DOUBT_SHARE = 0.33  # of comparisons that a stronger judge is asked about, until some are known
RATE_FROM = 1000  # the last so many calls tell how fast a server answered


@dataclass(slots=True)
class Row:
    """The calls of one kind. `estimated` of those to ask hang on answers that are not there yet."""

    role: str
    principle: str
    judge: str
    reused: int = 0
    ask: int = 0
    estimated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    why: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """What a run would do. `rows` by role, principle and judge; `before` names the run it is
    compared with.
    """

    rows: list[Row]
    prompts: int
    reused: int
    ask: int
    estimated: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float | None
    before: str
    resumes: bool
    changes: list[str]
    models: dict[str, str]

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class DryRunLedger:
    """Stands where the ledger would: answers what is answered, and gives a placeholder for what is
    not.
    """

    def __init__(self, con: sqlite3.Connection | None) -> None:
        self.con = con
        self.stats = LedgerStats()
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.lengths: dict[str, list[int]] = defaultdict(
            lambda: [0, 0]
        )  # by role: completion tokens, answers
        self.critiques = self.faults = 0
        self.identical = 0
        self.decided = self.escalated = 0
        self.guessed: set[str] = (
            set()
        )  # prompts whose escalations hang on answers that are not there yet
        self.strong: Sequence[str] = ()
        self.guesses: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])

    async def ask_many(self, asks: Sequence[tuple[Request, Use]], engine: Any) -> list[Completion]:
        """The committed answers, and placeholders."""
        keys = [request_key(request) for request, _ in asks]
        found = db.lookup(self.con, keys) if self.con else {}
        return [
            self._count(request, use, found.get(key))
            for (request, use), key in zip(asks, keys, strict=True)
        ]

    def add_prompts(self, prompts: Iterable[Prompt]) -> None:
        """A plan records nothing."""

    def note(self, use: Use, call: bytes = b"") -> None:
        """Nothing would be asked."""
        self.identical += isinstance(use, IdenticalUse)
        if isinstance(use, EscalationUse) and use.reason == GUESS:
            self.guessed.add(use.prompt)
        elif isinstance(use, EscalationUse):
            self.decided += 1
            self.escalated += verdicts.escalated(use.reason)

    def _count(self, request: Request, use: Use, answer: Completion | None) -> Completion:
        place = (use.role, use.principle, use.judge)
        row = self.rows.get(place) or self.rows.setdefault(place, Row(*place))
        if answer is not None:
            row.reused += 1
            self._learn(use, answer)
            return answer
        guessed = use.judge in self.strong and use.prompt in self.guessed
        prompt_tokens = int(sum(len(m.content) for m in request.messages) / CHARS_PER_TOKEN)
        new_tokens = 1 if request.labels else request.sampling.max_tokens
        row.ask += 1
        row.estimated += guessed or any(PLACEHOLDER in m.content for m in request.messages)
        row.prompt_tokens += prompt_tokens
        row.completion_tokens += new_tokens
        if guessed:
            self.guesses[place] = [
                a + b
                for a, b in zip(self.guesses[place], (1, prompt_tokens, new_tokens), strict=True)
            ]
        return _placeholder(request, use)

    def _learn(self, use: Use, answer: Completion) -> None:
        length = self.lengths[use.role]
        length[0] += answer.completion_tokens
        length[1] += 1
        if use.role == "critique":
            read = parse_critique(answer)
            self.critiques += read.fault is not None
            self.faults += bool(read.fault)


def _placeholder(request: Request, use: Use) -> Completion:
    """An answer that keeps the recipe going: a draft unlike any other, a critique without a fault,
    an even read.
    """
    if request.labels:
        even = log(0.9 / len(request.labels))
        return Completion(PLACEHOLDER, "length", dict.fromkeys(request.labels, even))
    if use.role == "critique":
        return Completion("None.", "stop")
    return Completion(f"{PLACEHOLDER}{use.prompt}/{columns_of(use)}", "stop")


def plan(source: str | Path | dict[str, Any], sets: Iterable[str] = ()) -> Plan:
    """Which model calls a run would make, which answers it would reuse, and why. No model is
    called.

    Args:
        source: A pipeline file, the name of a preset, or a dictionary with the same content.
        sets: Overrides of fields, for example `["policy.samples=8"]`.

    Raises:
        ConfigError: Every mistake in the pipeline and in the files that it names.
    """
    loaded = resolve_pipeline(source, sets)
    file = Path(loaded.config.store) / db.FILE
    con = db.connect(file, readonly=True) if file.exists() else None
    try:
        return asyncio.run(_plan(loaded, con))
    finally:
        if con:
            con.close()


async def _plan(loaded: ResolvedPipeline, con: sqlite3.Connection | None) -> Plan:
    engines = {**make_programs(loaded), **make_engines(loaded)}
    dry_run = DryRunLedger(con)
    escalate = loaded.config.panel_settings().escalate
    dry_run.strong = escalate.to if escalate else ()
    free = loaded.config.budget.model_copy(
        update={"unscored": None, "failed": None, "calls": None, "tokens": None}
    )
    unlimited = replace(loaded, config=loaded.config.model_copy(update={"budget": free}))
    ctx = Context.of(unlimited, 0, dry_run, engines)
    pipeline = RECIPES[loaded.config.recipe]
    prompts = 0
    for prompt in loaded.prompts:
        await pipeline(prompt, ctx)
        prompts += 1
    if loaded.revises:
        _estimate_revisions(dry_run)
    if escalate:
        _estimate_escalations(dry_run, escalate.max_share)
    _shorten(dry_run)
    texts = {**loaded.texts, **models(engines)}
    before, resumes = _before(loaded, texts, con)
    changes = _changes(loaded, texts, before) if before and not resumes else []
    rows = sorted(
        dry_run.rows.values(), key=lambda row: (ROLES.index(row.role), row.principle, row.judge)
    )
    for row in rows:
        row.why = _why(row, changes, before, rows) if row.ask else []
    counted = ("reused", "ask", "estimated", "prompt_tokens", "completion_tokens")
    totals: dict[str, int] = {name: sum(map(attrgetter(name), rows)) for name in counted}
    rate = _rate(con)
    return Plan(
        rows,
        prompts,
        **totals,
        seconds=totals["ask"] / rate if rate else None,
        before=f"{before.name}@{before.version}" if before else "",
        resumes=resumes,
        changes=[text for _, _, text in changes],
        models={name: engine.identity for name, engine in engines.items()},
    )


ROLES = ("sample", "critique", "revise", "reason", "judge", "score", "rank")


def _estimate_revisions(dry_run: DryRunLedger) -> None:
    """A revision for each critique still to come that will name a fault, at the share seen so
    far.
    """
    share = dry_run.faults / dry_run.critiques if dry_run.critiques >= 50 else FAULT_SHARE
    for (role, principle, _), row in list(dry_run.rows.items()):
        if role == "critique" and row.ask:
            more = round(row.ask * share)
            place = ("revise", principle, "")
            revise = dry_run.rows.get(place) or dry_run.rows.setdefault(place, Row(*place))
            revise.ask += more
            revise.estimated += more
            revise.prompt_tokens += round(row.prompt_tokens * share)


def _estimate_escalations(dry_run: DryRunLedger, max_share: float) -> None:
    """Of the stronger judge's calls that hang on answers still to come, the share seen so far,
    within its cap.
    """
    share = min(
        max_share, dry_run.escalated / dry_run.decided if dry_run.decided >= 50 else DOUBT_SHARE
    )
    for place, counted in dry_run.guesses.items():
        row = dry_run.rows[place]
        calls, prompt_tokens, new_tokens = (round(n * (1 - share)) for n in counted)
        row.ask -= calls
        row.estimated -= calls
        row.prompt_tokens -= prompt_tokens
        row.completion_tokens -= new_tokens


def _shorten(dry_run: DryRunLedger) -> None:
    """Answers seen so far tell how long they are; until then the longest allowed is counted."""
    for row in dry_run.rows.values():
        tokens, answers = dry_run.lengths[row.role]
        if answers >= 20 and row.role not in ("judge", "score"):
            row.completion_tokens = round(row.ask * tokens / answers)


def _rate(con: sqlite3.Connection | None) -> float | None:
    """Calls a second over the last answers in the ledger."""
    if con is None:
        return None
    sql = f"SELECT count(*), max(at) - min(at) FROM (SELECT at FROM calls ORDER BY id DESC LIMIT {RATE_FROM})"
    n, seconds = con.execute(sql).fetchone()
    return n / seconds if n >= 100 and seconds else None


def _before(
    loaded: ResolvedPipeline, texts: dict[str, str], con: sqlite3.Connection | None
) -> tuple[recorded.RunRecord | None, bool]:
    """The run of this name that ran last (else the store's last), and whether it is this very
    run.
    """
    records = recorded.runs(con) if con else []
    same = [r for r in records if r.name == loaded.config.name]
    for record in same:
        if record.config == loaded.resolved and record.texts == texts:
            return record, True
    return max(same or records, key=lambda record: record.last_start, default=None), False


Change = tuple[str, str, str]  # role ("" for all), principle ("" for all), words


def _changes(
    loaded: ResolvedPipeline, texts: dict[str, str], before: recorded.RunRecord
) -> list[Change]:
    """What differs from the run before, with what it touches."""
    found: list[Change] = []
    try:
        old = parse_constitution(before.texts.get("constitution", ""), "")
    except ConfigError:
        old = None
    if old is not None:
        found += constitution_changes(old, loaded.constitution)
    roles = {"critique": "critique", "revise": "revise"}
    for name, text in texts.items():
        if name.startswith("model ") and before.texts.get(name, text) != text:
            found.append(
                ("", "", f"the {name} is another one than it was (other weights, name, or dtype)")
            )
        if name.startswith("template ") and before.texts.get(name) != text:
            role = roles.get(name.removeprefix("template "), "judge")
            what = "is new" if name not in before.texts else "changed"
            found.append((role, "", f"the {name} {what}"))
    return found + _config_changes(loaded.resolved, before.config)


_FIELD_ROLES = {
    "compare": "compare",
    "criterion": "score",
    "critique": "critique",
    "revise": "revise",
    "weight": "",
    "applies_when": "",
}
# What a change to a role touches: `judge` stands for all of a panel's calls, `compare` for those
# that show several answers.
_TOUCHES = {"judge": ("judge", "reason", "score", "rank"), "compare": ("judge", "reason", "rank")}


def constitution_changes(old: Constitution, new: Constitution) -> list[Change]:
    """What differs in meaning between two constitutions, with the calls that each change touches.
    A renamed principle is no change.
    """
    names = renamed(old, new)
    was = {names.get(p.id, p.id): p for p in old.principles}
    now = {p.id for p in new.principles if p.enabled}
    found: list[Change] = []
    for principle in new.principles:
        found += _principle_changes(was.get(principle.id), principle)
    found += [
        ("judge", "", f"principle {p.id} is gone; its draws fall to others")
        for p in old.principles
        if p.enabled and names.get(p.id, p.id) not in now
    ]
    if old.selection != new.selection:
        found.append(("judge", "", f"selection changed from {old.selection} to {new.selection}"))
    if old.examples != new.examples:
        found.append(("", "", "the constitution's few-shot examples changed"))
    return found


def _principle_changes(old: Principle | None, new: Principle) -> list[Change]:
    if old is None:
        return [("", new.id, f"principle {new.id} is new")]
    found = [
        (role, new.id, f"{name} of principle {new.id} changed")
        for name, role in _FIELD_ROLES.items()
        if getattr(old, name) != getattr(new, name)
    ]
    enabled = new.enabled and not old.enabled
    return [*found, ("", new.id, f"principle {new.id} was enabled")] if enabled else found


_SECTION_ROLES = {
    "policy": "sample",
    "critic": "critique",
    "revise": "revise",
    "panel": "judge",
    "pairs": "judge",
    "engines": "",
    "seed": "",
    "prompts": "sample",
    "recipe": "",
}
_ASKS_NOTHING = (
    "max_in_flight",
    "url",
    "urls",
    "base_url",
    "port",
    "timeout_s",
    "batch",
    "log_file",
    "threads",
    "tie_margin",
    "min_scored",
    "min_label_mass",
    "weights",
    "start_timeout_s",
    "kv_cache_gib",
)


def _config_changes(new: dict[str, Any], old: dict[str, Any]) -> list[Change]:
    found: list[Change] = []
    flat_new, flat_old = dict(_flat(new)), dict(_flat(old))
    for name in sorted(flat_new.keys() | flat_old.keys()):
        section, _, _ = name.partition(".")
        if flat_new.get(name) == flat_old.get(name) or section not in _SECTION_ROLES:
            continue
        if name.rpartition(".")[2] not in _ASKS_NOTHING:
            words = (
                f"{name}: {flat_old.get(name, 'nothing')} is now {flat_new.get(name, 'left out')}"
            )
            found.append((_SECTION_ROLES[section], "", words))
    return found


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{index}")
    else:
        yield name, value


def _why(
    row: Row, changes: Sequence[Change], before: recorded.RunRecord | None, rows: Sequence[Row]
) -> list[str]:
    """The changes that touch these calls, the answers they hang on, or simply that nobody asked
    yet.
    """
    if before is None:
        return ["not asked before"]
    why = [
        text
        for role, principle, text in changes
        if (not role or row.role in _TOUCHES.get(role, (role,)))
        and principle in ("", row.principle)
    ]
    if row.estimated:
        above = {
            "critique": ("sample",),
            "revise": ("critique", "sample"),
            "reason": ("sample",),
            "judge": ("sample", "reason"),
            "score": ("sample",),
            "rank": ("sample",),
        }.get(row.role, ())
        asked = [r.role for r in rows if r.role in above and r.ask]
        if asked:
            why.append(
                f"follows from {' and '.join(sorted({f'{role}s' for role in asked}))} still to come"
            )
    return why or ["new prompts, or the run before did not get so far"]
