"""`prefab audit judge`: the bias battery (`judges/bias_probes.py`) put to one judge of a pipeline,
on pairs whose truth is known.

Pairs come from the embedded world when the constitution is its own (the oracle is truth), or from a
store's decided preferences (truth is a person's label where there is one, else the judge's own
verdict before the edit). What is asked is kept in a ledger of its own, `STORE/audit`: a second
audit asks nothing, and no statistic or export ever meets an attacked answer.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import gcd
from pathlib import Path
from typing import Any

from prefab.factory import decision
from prefab.factory.console import Progress, warn
from prefab.factory.errors import ConfigError
from prefab.factory.numbers import counted
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.stats import Estimate, clustered_share
from prefab.factory.types import Comparison, Engine, Verdict
from prefab.judges import bias_probes
from prefab.judges.base import Judge
from prefab.pipelines.config.loader import ResolvedPipeline, find_judge
from prefab.pipelines.quality.probe_pairs import Case, Side, cases
from prefab.pipelines.run.asking import (
    AskingSession,
    RepeatedQuestion,
    asking_session,
    engine_for,
    judged,
    kinds_with_engine,
    record_evaluation,
)
from prefab.pipelines.store.run_page import judges_of_own_answers


@dataclass(slots=True)
class Report:
    """What an audit found. `right` is the judge's share of right verdicts on the unedited pairs,
    where truth is known from elsewhere; `asked` questions went to the engine, `reused` were
    known.
    """

    judge: str
    model: str
    truth: dict[str, int]
    pairs: int
    right: Estimate
    unscored: int
    findings: list[bias_probes.Finding] = field(default_factory=list)
    asked: int = 0
    reused: int = 0
    own_answers: list[str] = field(default_factory=list)  # where it judges its own model's answers

    def data(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def past(self, most: float) -> list[str]:
        """The probes whose flips are more than `most`, each with its share; the swap probe's are
        those of one order.
        """
        shares = [(f.probe, f.one_order if f.probe == "swap" else f.flips) for f in self.findings]
        return [
            f"{name} {share.value:.1%}"
            for name, share in shares
            if share.value is not None and share.value > most
        ]

    def unmeasured(self) -> list[str]:
        """The probes that found no pair to work on: for a gate they are no pass."""
        return [f.probe for f in self.findings if not f.n_right]


def audit(
    loaded: ResolvedPipeline,
    judge: str = "",
    n: int = 200,
    store: str | Path | None = None,
    run: str = "",
    probes: Sequence[str | bias_probes.Probe] = (),
    seed: int = 0,
    engines: Mapping[str, Engine] | None = None,
    quiet: bool = True,
) -> Report:
    """Test a judge for known biases: edit losing answers in ways that should not matter, and count
    how many verdicts flip.

    Args:
        loaded: The pipeline of the judge.
        judge: Its name in `panel.judges`; default: the first.
        n: Number of pairs for each probe.
        store: Take the pairs from the decided preferences of this store; default: the pipeline's
            store, or generated pairs for the embedded world's constitution.
        run: NAME or NAME@VERSION in that store; default: the latest run.
        probes: Names of probes, or your own `Probe` objects; empty: all.
        seed: Seed of the choice of pairs.
        engines: Engines to use in place of those that the pipeline would start, by name.
        quiet: Do not show progress.

    Raises:
        ConfigError: The judge, a probe or pairs do not exist.
        EngineError: An engine does not start or fails.
        StoreError: The store is missing or damaged.
    """
    store = Path(store) if store is not None else None
    config = find_judge(loaded, judge, kinds_with_engine("pair", "one", "all"))
    chosen = find_probes(probes)
    folder = Path(store or loaded.config.store)
    plan = cases(loaded, config, chosen, n, store, run, seed)
    engine = engine_for(loaded, config, engines)
    report = asyncio.run(_audit(loaded, config, plan, folder, engine, quiet))
    report.own_answers = judges_of_own_answers(loaded.resolved, report.judge)
    return report


def find_probes(names: Sequence[str | bias_probes.Probe]) -> list[bias_probes.Probe]:
    """The probes of these names; without any, all. Raises: ConfigError."""
    known = {probe.name: probe for probe in bias_probes.PROBES}
    for name in names:
        if isinstance(name, str) and name not in known:
            raise ConfigError(f'there is no probe "{name}"; {did_you_mean(name, known)}')
    return [known[name] if isinstance(name, str) else name for name in names] or list(
        bias_probes.PROBES
    )


# --- asking ---


async def _audit(
    loaded: ResolvedPipeline,
    judge: Judge[Any],
    plan: dict[bias_probes.Probe, list[Case]],
    folder: Path,
    engine: Engine,
    quiet: bool,
) -> Report:
    every = list(dict.fromkeys(case for some in plan.values() for case in some))
    total = 2 * len(every) + sum(len(some) for p, some in plan.items() if p.place != "swap")
    async with asking_session(
        loaded,
        judge,
        engine,
        folder / "audit",
        f"audit-{judge.name}",
        {"recipe": "audit"},
        [c.comparison.prompt for c in every],
        folder,
        quiet,
    ) as session:
        with Progress("audit", total, quiet, "comparisons") as progress:
            report = await _battery(plan, every, session, progress)
    report.asked, report.reused = session.asked, session.reused
    await record_evaluation(folder, _recorded(report))
    return report


PROBED = ("flips", "again", "one_order", "shift")  # figures of a probe that are recorded


def _recorded(report: Report) -> dict[str, Any]:
    """An audit as an evaluation of the store."""
    metrics = {
        f.probe: {
            "pairs": f.n_pairs,
            "right": f.n_right,
            **{
                name: {"value": e.value, "low": e.low, "high": e.high}
                for name in PROBED
                if (e := getattr(f, name)) is not None
            },
        }
        for f in report.findings
    }
    return {
        "name": "audit judge",
        "subject": report.judge,
        "model": report.model,
        "truth": report.truth,
        "metrics": metrics,
    }


async def _battery(
    plan: dict[bias_probes.Probe, list[Case]],
    every: list[Case],
    session: AskingSession,
    progress: Progress,
) -> Report:
    """Ask every pair as it is, once more, and as each probe edits it."""

    async def ask(questions: list[RepeatedQuestion]) -> list[tuple[Verdict, Verdict]]:
        return await judged(questions, session, progress)

    plain, repeated = [
        await ask([RepeatedQuestion(c.comparison, c.principle, repeat) for c in every])
        for repeat in (0, 1)
    ]
    before = dict(zip(every, plain, strict=True))
    again = dict(zip(every, repeated, strict=True))
    report = _begin(every, before, session)
    for probe, some in plan.items():
        principles = len({c.principle for c in some})
        turns = [
            (c, gold, _turn(i, principles, len(probe.phrasings)))
            for i, c in enumerate(some)
            if (gold := c.gold or _own(before[c]))
        ]
        if probe.place == "swap":
            after = [before[c] for c, _, _ in turns]
        else:
            edited = [(attacked(c.comparison, gold, probe, k), c) for c, gold, k in turns]
            after = await ask([RepeatedQuestion(pair, c.principle) for pair, c in edited])
        tried = [
            bias_probes.Tried(
                gold,
                before[c],
                again[c],
                verdicts,
                probe.phrasings[k % len(probe.phrasings)],
                c.comparison.prompt.group or c.comparison.prompt.id,
            )
            for (c, gold, k), verdicts in zip(turns, after, strict=True)
        ]
        report.findings.append(bias_probes.find(probe, tried))
    return report


def _turn(i: int, principles: int, phrasings: int) -> int:
    """Which phrasing the i-th pair gets: the principles take turns too, and each must meet every
    phrasing.
    """
    return i if gcd(principles, phrasings) == 1 else i + i // principles


def _begin(
    every: Sequence[Case], before: Mapping[Case, Sequence[Verdict]], session: AskingSession
) -> Report:
    known = [
        (c, decision.decide([decision.combine_orders(before[c])]).outcome) for c in every if c.gold
    ]
    scored = [(c, o == c.gold) for c, o in known if o != "unscored"]
    right = clustered_share(
        [hit for _, hit in scored],
        [c.comparison.prompt.group or c.comparison.prompt.id for c, _ in scored],
    )
    unscored = sum(v.p_a is None for pair in before.values() for v in pair)
    return Report(
        session.judge.name,
        session.engine.identity,
        dict(Counter(c.truth for c in every)),
        len(every),
        right,
        unscored,
    )


def _own(verdicts: Sequence[Verdict]) -> Side | None:
    """The judge's own verdict, where it is decided."""
    outcome = decision.decide([decision.combine_orders(verdicts)]).outcome
    return outcome if outcome in ("a", "b") else None


def attacked(pair: Comparison, better: Side, probe: bias_probes.Probe, k: int) -> Comparison:
    """The pair with its losing answer edited, in the probe's k-th phrasing."""
    if better == "a":
        return replace(pair, b=replace(pair.b, text=bias_probes.edited(probe, pair.b.text, k)))
    return replace(pair, a=replace(pair.a, text=bias_probes.edited(probe, pair.a.text, k)))


# --- showing ---


def share(e: Estimate) -> str:
    """`1.5% (0.4-4.3)`, a dash where there is none, and no interval where all pairs are of one
    prompt.
    """
    if e.value is None or e.low is None or e.high is None:
        return "-" if e.value is None else f"{e.value:.1%}"
    return f"{e.value:.1%} ({100 * e.low:.1f}-{100 * e.high:.1f})"


def rows(report: Report) -> list[tuple[Any, ...]]:
    """A row a probe, for `console.table`: COLUMNS says what stands in it."""
    return [
        (
            f.probe,
            f.n_pairs,
            f.n_right,
            f.flips,
            f.again,
            f.one_order,
            f.shift,
            f.ties,
            f.silenced,
        )
        for f in report.findings
    ]


COLUMNS = (
    "probe",
    "pairs",
    "right",
    "flips",
    "asked again",
    "one order",
    "shift",
    "to tie",
    "unscored",
)


def notes(report: Report) -> str:
    """What a reader of the table must know: whose truth it is, and what stood before any edit."""
    truth = ", ".join(f"{name} {count:,}" for name, count in sorted(report.truth.items()))
    right = (
        f"right before any edit: {share(report.right)} of those whose truth is not its own. "
        if report.right.n_items
        else ""
    )
    return (
        f"{report.judge} on {counted(report.pairs, 'pair')}. Truth: {truth}. {right}"
        f"{counted(report.asked, 'question')} asked, {report.reused:,} known"
    )


def print_report(report: Report, most: float | None, named: Sequence[str]) -> int:
    """The exit code for a gate of at most `most` flips, and why it fails. A named probe that
    measured nothing fails.
    """
    if most is None:
        return 0
    bad = report.past(most)
    empty = list(report.unmeasured())
    for name in empty:
        warn(f"{name}: no verdict was right before the edit, so nothing was measured")
    if bad:
        warn(f"more than {most:.1%} flips: {', '.join(bad)}")
    return int(bool(bad) or any(name in named for name in empty))
