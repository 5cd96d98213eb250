"""Plan a run: which calls it would make, which answers it would reuse, and why.

The recipe itself runs against a ledger that only looks answers up (`dry_run`). Of a source with
many prompts a random sample is counted, and the rest is extrapolated. Needs neither a server nor
torch.
"""

from __future__ import annotations

import asyncio
import sqlite3
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from heapq import heappush, heappushpop
from itertools import pairwise
from math import sqrt
from operator import attrgetter
from pathlib import Path
from typing import Any

from prefab.factory.console import Progress
from prefab.factory.errors import ConfigError
from prefab.factory.ledger import db
from prefab.factory.ledger import records as recorded
from prefab.factory.spec.constitution import (
    constitution_digest,
    parse_constitution,
    principle_digest,
    renamed,
)
from prefab.factory.types import Constitution, Engine, Principle, Prompt
from prefab.pipelines.config.loader import (
    ResolvedPipeline,
    make_engines,
    make_programs,
    models,
    resolve_pipeline,
)
from prefab.pipelines.config.prompts import Prompts
from prefab.pipelines.config.registries import RECIPES
from prefab.pipelines.run.context import Context, Counts
from prefab.pipelines.run.dry_run import ChangeReasons, DryRunLedger, Row, asked_before
from prefab.pipelines.run.roles import Role, roles_of

ALL_CALLS = 80_000  # if all prompts make no more, all are counted, which takes about 4 s
MOST_CALLS = 30_000  # else so many are counted, which takes 1.5 s
KEPT = 10_000  # prompts kept in memory to choose from
PILOT = 8  # prompts that tell how many calls a prompt needs
LEAST = 30  # prompts counted of each stratum
RATE_FROM = 20_000  # the last so many calls tell how fast a server answered
LONGEST_PAUSE_S = 600.0  # between two answers of one process; more is idle time


@dataclass(slots=True)
class PrinciplePlan:
    """A principle, with the number of comparisons that it is drawn for. `note` says why it is drawn
    for none, or why a change of it asks nothing.
    """

    principle: str
    digest: str
    comparisons: int
    ask: int
    reused: int
    note: str = ""


@dataclass(slots=True)
class Plan:
    """What a run would do.

    Attributes:
        rows: By role, principle and judge.
        prompts: Prompts of the source; `counted` of them were counted, the others extrapolated.
        read_one_in: Of a file with more than 200,000 rows one in so many was read, and `prompts`
            is extrapolated.
        ask: Calls to make, as expected; `ask_low` and `ask_high` are its 95% interval, which is
            the number itself where all prompts were counted.
        at_most: Calls to make at most: each missing critique names a fault, each comparison is
            put to the stronger judge, all drafts differ.
        tokens_at_most: New tokens of these calls, each as long as allowed.
        completion_tokens: New tokens as expected.
        seconds: Expected time at the speed of the store's last calls; None without any.
        constitution: Its id; `constitution_digest` changes with its meaning.
        before: The run that this one is compared with; `resumes`: it is this very run.
    """

    rows: list[Row]
    prompts: int
    counted: int
    reused: int
    ask: int
    ask_low: int
    ask_high: int
    estimated: int
    at_most: int
    refused: int
    prompt_tokens: int
    completion_tokens: int
    tokens_at_most: int
    seconds: float | None
    before: str
    resumes: bool
    changes: list[str]
    models: dict[str, str]
    roles: list[Role] = field(default_factory=list)
    principles: list[PrinciplePlan] = field(default_factory=list)
    constitution: str = ""
    constitution_digest: str = ""
    read_one_in: int = 1

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(slots=True)
class Stratum:
    """The prompts that the run before has asked about, or those that it has not: their number, and
    a random sample of them.
    """

    size: int = 0
    heap: list[tuple[int, int, Prompt]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)  # to make, of each prompt that was counted

    def add(self, prompt: Prompt, keep: int) -> None:
        """Keep the prompt if its digest is among the `keep` smallest ones."""
        self.size += 1
        place = -int.from_bytes(blake2b(prompt.id.encode(), digest_size=8).digest(), "big")
        entry = (place, -self.size, prompt)
        if len(self.heap) < keep:
            heappush(self.heap, entry)
        elif entry > self.heap[0]:
            heappushpop(self.heap, entry)

    def sample(self, n: int) -> list[Prompt]:
        """At most `n` prompts."""
        return [prompt for _, _, prompt in sorted(self.heap, reverse=True)[:n]]

    def variance(self) -> float:
        """Of the total number of calls, from the prompts that were counted.

        Source: Cochran 1977, equation 5.6 (stratified random sampling, finite population).
        """
        n = len(self.calls)
        if n < 2 or n >= self.size:
            return 0.0
        mean = sum(self.calls) / n
        spread = sum((calls - mean) ** 2 for calls in self.calls) / (n - 1)
        return self.size**2 * (1 - n / self.size) * spread / n


def plan(
    source: str | Path | dict[str, Any],
    sets: Iterable[str] = (),
    sample: int | None = None,
    quiet: bool = True,
) -> Plan:
    """Which model calls a run would make, which answers it would reuse, and why. No model is
    called.

    Args:
        source: A pipeline file, the name of a preset, or a dictionary with the same content.
        sets: Overrides of fields, for example `["policy.samples=8"]`.
        sample: Count so many prompts, chosen at random, and extrapolate; 0: count all. Default:
            all, or a sample where all would make more than 80,000 calls.
        quiet: Do not show progress.

    Raises:
        ConfigError: Every mistake in the pipeline and in the files that it names.
    """
    loaded = resolve_pipeline(source, sets)
    file = Path(loaded.config.store) / db.FILE
    con = db.connect(file, readonly=True) if file.exists() else None
    try:
        return asyncio.run(_plan(loaded, con, sample, quiet))
    finally:
        if con:
            con.close()


async def _plan(
    loaded: ResolvedPipeline, con: sqlite3.Connection | None, sample: int | None, quiet: bool
) -> Plan:
    engines = {**make_programs(loaded), **make_engines(loaded)}
    texts = {**loaded.texts, **models(engines)}
    before, resumes = _before(loaded, texts, con)
    changes = _changes(loaded, texts, before) if before and not resumes else []
    with Progress("planning", None, quiet, "prompts") as progress:
        counted = _Counted(loaded, con, engines, before.id if before else None, changes)
        await counted.count(sample, progress)
    return _totalled(loaded, con, counted, before, resumes)


def _totalled(
    loaded: ResolvedPipeline,
    con: sqlite3.Connection | None,
    counted: _Counted,
    before: recorded.RunRecord | None,
    resumes: bool,
) -> Plan:
    """The plan with its totals."""
    dry_run, strata, engines = counted.dry_run, counted.strata, counted.engines
    escalate = loaded.config.panel_settings().escalate
    longest = loaded.config.policy.max_tokens
    rows = dry_run.rows(_width(loaded), escalate.max_share if escalate else 1.0, longest)
    summed = [name for name in Row.__slots__ if name in Plan.__slots__]
    totals: dict[str, int] = {name: sum(map(attrgetter(name), rows)) for name in summed}
    ask = totals["ask"]
    spread = 1.96 * sqrt(sum(stratum.variance() for stratum in strata))
    spread *= ask / max(1, totals["at_most"])
    rate = _rate(con, [engine.identity for engine in engines.values()])
    return Plan(
        rows,
        sum(stratum.size for stratum in strata),
        sum(len(stratum.calls) for stratum in strata),
        **totals,
        ask_low=max(0, round(ask - spread)),
        ask_high=round(ask + spread),
        seconds=ask / rate if rate else None,
        before=f"{before.name}@{before.version}" if before else "",
        resumes=resumes,
        changes=[text for _, _, text in counted.changes],
        models={name: engine.identity for name, engine in engines.items()},
        roles=roles_of(loaded, engines),
        principles=_principles(loaded, dry_run, rows, counted.changes),
        constitution=loaded.constitution.id,
        constitution_digest=constitution_digest(loaded.constitution),
        read_one_in=counted.every,
    )


class _Counted:
    """The counts of a plan, from all prompts or a sample of them."""

    def __init__(
        self,
        loaded: ResolvedPipeline,
        con: sqlite3.Connection | None,
        engines: Mapping[str, Engine],
        before: int | None,
        changes: Sequence[Change],
    ) -> None:
        self.loaded, self.con, self.engines, self.before = loaded, con, engines, before
        self.changes, self.strata = changes, list[Stratum]()
        self.dry_run = self._ledger()
        self.every = 1

    def _ledger(self) -> DryRunLedger:
        made = DryRunLedger(self.con, self.before, ChangeReasons(self.changes))
        escalate = self.loaded.config.panel_settings().escalate
        made.strong = escalate.to if escalate else ()
        return made

    async def count(self, sample: int | None, progress: Progress) -> None:
        """Count `sample` prompts; 0: all, None: all or as many as make `MOST_CALLS` calls. Of a
        large file only some rows are read, but for 0.
        """
        if sample == 0:
            self.strata = [Stratum()]
            await self._each(self.loaded.prompts, self.strata[0], None, progress)
            return
        self.strata = [Stratum(), Stratum()]
        source = self.loaded.prompts
        if isinstance(source, Prompts):
            source = source.some()
            self.every = source.every
        for prompt in source:
            known = asked_before(self.con, self.before, prompt.id)
            self.strata[known].add(prompt, sample or KEPT)
            progress.advance()
        for stratum in self.strata:
            stratum.size *= self.every
        total = sum(stratum.size for stratum in self.strata)
        wanted = sample or await self._affordable(total)
        for stratum in self.strata:
            n = min(stratum.size, max(LEAST, round(wanted * stratum.size / total)))
            chosen = stratum.sample(n)
            weight = stratum.size / len(chosen) if chosen else 1.0
            await self._each(chosen, stratum, weight, progress)

    async def _affordable(self, total: int) -> int:
        """How many prompts are counted, by the calls of a few of them."""
        if total <= LEAST:
            return total
        pilot, first = self._ledger(), [p for s in self.strata for p in s.sample(PILOT)]
        calls, ctx = 0, self._context(pilot)
        for prompt in first:
            await self._ask_about(prompt, pilot, ctx)
            calls += pilot.per_prompt
        each = calls / len(first)
        return total if each * total <= ALL_CALLS else max(LEAST, round(MOST_CALLS / each))

    async def _each(
        self, prompts: Iterable[Prompt], stratum: Stratum, weight: float | None, progress: Progress
    ) -> None:
        ctx = self._context(self.dry_run)
        for prompt in prompts:
            await self._ask_about(prompt, self.dry_run, ctx, weight or 1.0)
            stratum.calls.append(self.dry_run.to_make)
            if weight is None:
                stratum.size += 1
                progress.advance()

    async def _ask_about(
        self, prompt: Prompt, ledger: DryRunLedger, ctx: Context, weight: float = 1.0
    ) -> None:
        ledger.begin(prompt.id, weight)
        await (self.loaded.recipe or RECIPES[self.loaded.config.recipe])(prompt, ctx)

    def _context(self, ledger: DryRunLedger) -> Context:
        free = self.loaded.config.budget.model_copy(
            update={"unscored": None, "failed": None, "calls": None, "tokens": None}
        )
        config = self.loaded.config.model_copy(update={"budget": free})
        ctx = Context.of(replace(self.loaded, config=config), 0, ledger, self.engines)
        ctx.counts = Counts(answers=1)  # recorded refusals alone do not stop a plan
        return ctx


def _width(loaded: ResolvedPipeline) -> int:
    """Principles under which a draft is criticised in a round."""
    if loaded.revise is None or loaded.revise.select == "draw":
        return 1
    return sum(principle.enabled for principle in loaded.constitution.principles)


def _principles(
    loaded: ResolvedPipeline, dry_run: DryRunLedger, rows: Sequence[Row], changes: Sequence[Change]
) -> list[PrinciplePlan]:
    """Every principle of the constitution, also those that nothing is asked under."""
    found = []
    for principle in loaded.constitution.principles:
        here = [row for row in rows if row.principle == principle.id]
        drawn = round(dry_run.draws.get(principle.id, 0.0))
        ask = sum(row.ask for row in here)
        notes = [] if drawn or not loaded.compares else [_undrawn(principle, bool(here))]
        if not ask and any(about == principle.id for _, about, _ in changes):
            notes.append("changed, and nothing is asked under what changed")
        found.append(
            PrinciplePlan(
                principle.id,
                principle_digest(principle),
                drawn,
                ask,
                sum(row.reused for row in here),
                "; ".join(notes),
            )
        )
    return found


def _undrawn(principle: Principle, used: bool) -> str:
    if not principle.enabled:
        return "disabled"
    if used:
        return "drawn for no comparison"
    if principle.applies_when:
        return f"no prompt has a tag of {', '.join(principle.applies_when)}"
    return "no comparison drew it"


def _rate(con: sqlite3.Connection | None, identities: Sequence[str]) -> float | None:
    """Calls a second over the last answers of these models in the ledger, without the time in which
    no run was at work.
    """
    if con is None:
        return None
    starts = [at for (at,) in con.execute("SELECT at FROM starts ORDER BY at")]
    marks = ", ".join("?" * len(identities))
    sql = (
        f"SELECT at FROM calls WHERE model IN (SELECT id FROM names WHERE name IN ({marks})) "
        "ORDER BY id DESC LIMIT ?"
    )
    times = sorted(at for (at,) in con.execute(sql, (*identities, RATE_FROM)))
    busy = 0.0
    for earlier, later in pairwise(times):
        begun = bisect_right(starts, later)
        pause = begun != bisect_right(starts, earlier)
        if not pause and later - earlier <= LONGEST_PAUSE_S:
            busy += later - earlier
    return len(times) / busy if len(times) >= 100 and busy else None


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
    "gather_s",
    "poll_s",
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
