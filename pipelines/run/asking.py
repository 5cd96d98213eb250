"""Ask one judge apart from a run: audits, benchmarks, win rates and rewards.

Answers are kept in a ledger of their own, so that no statistic or export of the store's runs meets
them, and a second call asks nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefab.factory.console import Progress
from prefab.factory.engines.base import make
from prefab.factory.engines.lifecycle import lazily, started_engines
from prefab.factory.ledger import db
from prefab.factory.ledger.cached_engine import CachedEngine
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.types import Comparison, Engine, Principle, Prompt, Verdict
from prefab.judges.base import Judge
from prefab.judges.registry import JUDGES
from prefab.pipelines.config.loader import ResolvedPipeline
from prefab.pipelines.run import judging
from prefab.pipelines.run.context import Context

CHUNK = 256  # questions that are in work together


@dataclass(frozen=True, slots=True)
class RepeatedQuestion:
    """A comparison under a principle, for the `repeat`-th time."""

    comparison: Comparison
    principle: Principle
    repeat: int = 0


@dataclass(slots=True)
class AskingSession:
    """An open side ledger, the judge's running engine, and the context to ask through."""

    judge: Judge[Any]
    ctx: Context
    ledger: Ledger
    engine: CachedEngine

    @property
    def asked(self) -> int:
        """Questions that went to the engine."""
        return self.ledger.stats.asked - self.engine.found

    @property
    def reused(self) -> int:
        """Questions that were known, here or in the run's ledger."""
        return self.ledger.stats.reused + self.engine.found


def kinds_with_engine(*shows: str) -> tuple[str, ...]:
    """The kinds of judges whose questions a model of the pipeline answers, that show one of
    these.
    """
    return tuple(kind for kind, cls in JUDGES.items() if not cls.own and cls.shows in shows)


def engine_for(
    loaded: ResolvedPipeline, judge: Judge[Any], engines: Mapping[str, Engine] | None
) -> Engine:
    """The engine of a judge, not yet started; `engines` stand in for the pipeline's."""
    if engines:
        return engines[judge.engine]
    made: Engine = lazily(make(loaded.config.engines[judge.engine], judge.engine))
    return made


@asynccontextmanager
async def asking_session(
    loaded: ResolvedPipeline,
    judge: Judge[Any],
    engine: Engine,
    folder: Path,
    run: str,
    described: Mapping[str, Any],
    prompts: Iterable[Prompt] = (),
    behind: Path | None = None,
    quiet: bool = True,
) -> AsyncIterator[AskingSession]:
    """Open the ledger in `folder`, start the engine, begin a run and record the prompts.

    `described` is the run's configuration beside the judge. `behind` is a store whose ledger is
    looked into before the engine is asked. Every pair is asked in both orders. There is no budget
    of unscored answers: their number is a result.
    """
    cached = CachedEngine(engine, behind or folder / "none")
    ledger = Ledger.open(folder)
    try:
        labels = {judge.engine: {judge.labels()}} if judge.labels() else {}
        async with started_engines({judge.engine: engine}, quiet, labels):
            texts = {**loaded.texts, f"model {judge.engine}": cached.identity}
            settings = {**described, "judge": judge.config.model_dump(mode="json")}
            record = ledger.begin_run(run[:64], settings, texts)
            ledger.probe_first([engine])
            ledger.add_prompts({prompt.id: prompt for prompt in prompts}.values())
            panel = loaded.config.panel_settings().model_copy(update={"orders": "both"})
            budget = loaded.config.budget.model_copy(update={"unscored": None})
            config = loaded.config.model_copy(update={"budget": budget, "panel": panel})
            asking = replace(loaded, config=config, judges=[judge])
            ctx = Context.of(asking, record.id, ledger, {judge.engine: cached})
            yield AskingSession(judge, ctx, ledger, cached)
    finally:
        await ledger.close()
        cached.close()


async def record_evaluation(store: Path, value: dict[str, Any]) -> None:
    """Put a result into the ledger of a store, whose pages show it. The calls that it took stay in
    the ledger that `asking_session` opened. Nothing where there is no store.
    """
    if (store / db.FILE).exists():
        ledger = Ledger.open(store)
        try:
            ledger.add_eval(value)
        finally:
            await ledger.close()


async def judged(
    questions: list[RepeatedQuestion], session: AskingSession, progress: Progress
) -> list[tuple[Verdict, Verdict]]:
    """A verdict in each order for every question; a judge of single answers has one, which stands
    for both. A prompt's own rubric is left out: the question is about the principle.
    """
    judge, found = session.judge.in_every_order(), dict[int, tuple[Verdict, Verdict]]()

    async def one(item: tuple[int, RepeatedQuestion]) -> None:
        i, asked = item
        pair = asked.comparison
        if pair.prompt.rubric:
            bare = Prompt(pair.prompt.id, pair.prompt.messages, pair.prompt.tags)
            pair = Comparison(bare, pair.a, pair.b)
        question = (pair, [asked.principle])
        heard = await judging.judge(judge, [question], session.ctx, (asked.repeat,))
        found[i] = judging.verdicts_by_order(judge, heard, question, asked.principle)

    await progress.over(enumerate(questions), one, CHUNK)
    return [found[i] for i in range(len(questions))]
