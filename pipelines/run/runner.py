"""Run a recipe over its prompts: a bounded number in work at once, everything durable, and always a
way to go on.

Memory is flat at any size: prompts are read as they are needed, and what is answered lives in the
ledger.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from prefab.factory.console import LOG, Progress, warn
from prefab.factory.engines.lifecycle import started_engines
from prefab.factory.errors import BudgetError, ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.ledger.records import Run
from prefab.factory.numbers import counted
from prefab.factory.store.shared import is_shared
from prefab.factory.store.store import HeldError, one_connection, read_frame
from prefab.factory.telemetry import stage
from prefab.factory.tracing import tracing_by_environment
from prefab.factory.types import Engine, Prompt, ServerReport
from prefab.pipelines.config.loader import (
    ResolvedPipeline,
    deciding,
    labels,
    make_engines,
    make_programs,
    models,
    resolve_pipeline,
)
from prefab.pipelines.config.registries import RECIPES
from prefab.pipelines.run.best_of_n import BestOf, curve
from prefab.pipelines.run.context import Asker, Context, Failures, Stopped
from prefab.pipelines.run.interrupts import Interrupted, heeded, name_of
from prefab.pipelines.run.metrics import serving_metrics
from prefab.pipelines.run.roles import Role, roles_of
from prefab.pipelines.store.calibrate import calibrate_ended

T = TypeVar("T")

MAX_AT_WORK = 2048  # prompts in work at once: bounds memory where a prompt asks one call
IN_BATCHES = 32_768  # the same, where the answers of all come together hours later
READ_AHEAD = 256  # prompts recorded in one transaction
COUNT_UP_TO = (
    64 << 20
)  # bytes of a prompts file that are read once beforehand, for the time left and bad rows


@dataclass(slots=True)
class RunResult:
    """What a run did, and its rows as polars frames (read from the store when first looked at)."""

    name: str
    version: int
    run: int
    store: Path
    resumed: bool
    state: str  # done, budget or stopped
    reason: str
    prompts: int
    asked: int
    reused: int
    failed: int
    truncated: int
    identical: int
    prompt_tokens: int
    completion_tokens: int
    unscored: dict[str, int]
    malformed: int
    seconds: float
    escalation: dict[str, int] = field(
        default_factory=dict
    )  # comparisons by why, and the stronger judges' calls
    failures: dict[str, Failures] = field(
        default_factory=dict
    )  # calls without an answer, by reason
    outcomes: dict[str, int] = field(default_factory=dict)  # of the run's comparisons
    faults: dict[str, int] = field(
        default_factory=dict
    )  # critiques that name a fault, by principle
    empty: int = 0  # drafts without any text
    unsure_critiques: int = 0  # whose probability of a fault is between 0.2 and 0.8
    same_in_both_orders: int = 0  # verdict pairs that name the same winner in both orders
    in_both_orders: int = 0  # verdict pairs that were read in both orders
    hard: dict[str, int] = field(default_factory=dict)  # verdicts without a probability, by judge
    refused: int = 0  # of the failed calls: refused by the server for good
    awaited: int = 0  # labels that the panel's people have not given yet
    signal: int = 0  # that stopped it
    behind: int = 0  # calls that the store does not show yet, because another program holds it
    servers: list[ServerReport] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)  # the policy, the critic and each judge
    own_answers: list[str] = field(default_factory=list)  # of judges that wrote the answers
    # of the recipe best_of_n: the score of the best of n answers, by judge and n
    best_of: list[BestOf] = field(default_factory=list)
    p_chosen: str = ""  # what `p_chosen` is: a probability and of what, or a share of the vote
    _frames: dict[str, Any] = field(default_factory=dict, repr=False)

    def frame(self, table: str) -> Any:
        """All rows of one of the store's tables that belong to this run, as a polars frame."""
        from prefab.pipelines.store.fill import query

        if table not in self._frames:
            self._frames[table] = query(self.store, f"SELECT * FROM {table} WHERE run = {self.run}")
        return self._frames[table]

    @property
    def samples(self) -> Any:
        """Drafts (`parent` -1) and revisions."""
        return self.frame("samples")

    @property
    def critiques(self) -> Any:
        """What the critic said of each sample under each principle."""
        return self.frame("critiques")

    @property
    def verdicts(self) -> Any:
        """One judgment in one order a row."""
        return self.frame("verdicts")

    @property
    def preferences(self) -> Any:
        """One comparison a row, with `p_chosen`."""
        return self.frame("preferences")

    @property
    def trainable(self) -> bool:
        """Whether an export of this run holds more than prompts."""
        if self.outcomes:
            return bool(self.outcomes.get("a") or self.outcomes.get("b") or self.best_of)
        return self.prompts > 0 and self.asked + self.reused > self.failed

    def summary(self) -> dict[str, Any]:
        """The counts as plain data."""
        names = [name for name in self.__slots__ if not name.startswith("_")]
        return {
            name: str(value) if isinstance(value := getattr(self, name), Path) else value
            for name in names
        }


def run(
    source: str | Path | dict[str, Any],
    sets: Iterable[str] = (),
    quiet: bool = True,
    engines: dict[str, Engine] | None = None,
    retry_refused: bool = False,
    metrics_port: int | None = None,
) -> RunResult:
    """Make the preference data of a pipeline. The same call continues a run that was interrupted.

    Args:
        source: A pipeline file, the name of a preset, or a dictionary with the same content.
        sets: Overrides of fields, for example `["policy.samples=8"]`.
        quiet: Do not show progress.
        engines: Engines to use in place of those that the pipeline would start, by name.
        retry_refused: Also ask again what a server has refused for good (HTTP 4xx).
        metrics_port: Serve metrics for Prometheus at this port of this machine meanwhile.

    Returns:
        Counts, and the run's rows as polars frames. `state` is `done`, `budget` (a budget was
        exceeded) or `stopped` (Ctrl-C, SIGTERM or SIGHUP; `signal` is its number).

    Raises:
        ConfigError: A mistake in the pipeline, or in a file that it names.
        EngineError: An engine does not start or fails.
        StoreError: The store is damaged.
    """
    loaded = resolve_pipeline(source, sets)
    return run_loaded(loaded, quiet, engines, retry_refused, metrics_port)


def run_loaded(
    loaded: ResolvedPipeline,
    quiet: bool = True,
    engines: dict[str, Engine] | None = None,
    retry_refused: bool = False,
    metrics_port: int | None = None,
) -> RunResult:
    """As `run`, for a loaded pipeline."""

    def work() -> RunResult:
        return in_event_loop(run_async(loaded, quiet, engines, retry_refused, metrics_port))

    return _in_thread(work) if _in_a_loop() else work()


def _in_a_loop() -> bool:
    """A notebook has a loop of its own, which cannot run another inside."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def in_event_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine gives, in a loop of uvloop where that is installed."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with suppress(ImportError):
        from uvloop import Loop

        factory = Loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(coroutine)


def _in_thread(work: Callable[[], T]) -> T:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


async def run_async(
    loaded: ResolvedPipeline,
    quiet: bool = True,
    engines: dict[str, Engine] | None = None,
    retry_refused: bool = False,
    metrics_port: int | None = None,
) -> RunResult:
    """As `run`, inside an event loop, for a loaded pipeline."""
    config = loaded.config
    if is_shared(Path(config.store)):
        raise ConfigError(
            f"{config.store}: this store is in shards (docs/scale.md). Add `--on local:N` to "
            "`prefab run`, or make an ordinary store of it with `prefab store merge`"
        )
    with tracing_by_environment(), stage("run", name=config.name, store=config.store):
        return await _run_in_stages(loaded, quiet, engines, retry_refused, metrics_port)


async def _run_in_stages(
    loaded: ResolvedPipeline,
    quiet: bool,
    engines: dict[str, Engine] | None,
    retry_refused: bool,
    metrics_port: int | None,
) -> RunResult:
    config = loaded.config
    total = count_prompts(loaded, quiet)
    ledger, ctx = Ledger.open(Path(config.store), retry_refused), None
    try:
        made = {**make_programs(loaded), **(engines or make_engines(loaded))}
        async with started_engines(made, quiet, labels(loaded)):
            texts = {**loaded.texts, **models(made)}
            record = ledger.begin_run(config.name, loaded.resolved, texts, deciding)
            if loaded.take_over:
                loaded.take_over(ledger, record)
            ledger.probe_first(made.values())
            ctx = Context.of(loaded, record.id, ledger, made)
            before = {name: engine.starting_s for name, engine in made.items()}
            began = time.monotonic()
            LOG.info("run %s@%d, prompts: %s", record.name, record.version, total)
            with stage("ask"), serving_metrics(metrics_port, ctx, ledger, total, quiet):
                state, reason = await _work(loaded, ctx, total, quiet)
            started = (engine.starting_s - before[name] for name, engine in made.items())
            seconds = time.monotonic() - began - max(started, default=0.0)
    finally:
        await ledger.close(drain=not (ctx and ctx.hurry))
    kept = (
        f"{ctx.asker.stats.asked + ctx.asker.stats.reused:,} answers of this run are in the ledger"
    )
    if ctx.hurry:
        raise Interrupted(ctx.stopped_by, kept)
    try:
        with stage("fill store"):
            behind = fill_store(Path(config.store), quiet)
        with one_connection():
            result = _result(loaded, ctx, record, state, reason, seconds, behind)
            learns = loaded.take_over is None and state == "done"
            if learns and (result.outcomes.get("a") or result.outcomes.get("b")):
                with suppress(HeldError):  # another program holds the store: the next run does it
                    learned = await calibrate_ended(result.store, f"{record.name}@{record.version}")
                    result.p_chosen = learned.sentence()
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        raise Interrupted(
            number, f"{kept}; the DuckDB file is filled by the next command"
        ) from None
    LOG.info(
        "%s: %s asked, %s reused, %s failed", state, result.asked, result.reused, result.failed
    )
    return result


def count_prompts(loaded: ResolvedPipeline, quiet: bool = True) -> int | None:
    """How many prompts there are, where that is cheap to know. Malformed rows are told now, not
    after an hour.

    Raises: ConfigError when there are none, before any engine is started.
    """
    prompts = loaded.prompts
    path = prompts.path
    if path.is_file() and path.stat().st_size > COUNT_UP_TO:
        next(iter(prompts))
        return loaded.config.prompts.limit
    total = sum(1 for _ in prompts)
    if prompts.n_malformed and not quiet:
        for problem in prompts.problems[:3]:
            warn(str(problem))
        warn(prompts.summary())
    return total


def at_work(loaded: ResolvedPipeline, engines: Mapping[str, Engine]) -> int:
    """How many prompts keep the engines full: a prompt has its samples' questions in flight at the
    leanest moment, and as many prompts again cover those between two steps.
    """
    places = sum(engine.max_in_flight for engine in engines.values())
    most = IN_BATCHES if any(engine.in_batches for engine in engines.values()) else MAX_AT_WORK
    return max(2, min(most, 2 * places // loaded.config.policy.samples + 2))


async def _work(
    loaded: ResolvedPipeline, ctx: Context, total: int | None, quiet: bool
) -> tuple[str, str]:
    """All prompts through the recipe. Gives how it ended: done, budget or stopped, and why."""
    recipe = loaded.recipe or RECIPES[loaded.config.recipe]
    source = recorded(loaded.prompts, ctx.asker)
    first: list[BaseException] = []

    async def worker() -> None:
        try:
            for prompt in source:
                ctx.check()
                await recipe(prompt, ctx)
                ctx.counts.finish(prompt.id)
        except BaseException as error:
            first.append(error)
            ctx.stop()

    with (
        Progress(loaded.config.name, total, quiet, "prompts") as progress,
        interruptible(ctx, quiet),
    ):
        ticker = asyncio.create_task(_tick(progress, ctx))
        workers = [asyncio.create_task(worker()) for _ in range(at_work(loaded, ctx.engines))]
        try:
            await asyncio.gather(*workers)
        except asyncio.CancelledError:
            if not ctx.hurry:
                raise
            if task := asyncio.current_task():
                task.uncancel()
            return "stopped", f"stopped by {name_of(ctx.stopped_by)}"
        finally:
            ticker.cancel()
            _show(progress, ctx, ctx.asked(), 0.0)
    if not first:
        ctx.check_answered()
        try:
            ctx.check_shares()
        except BudgetError as error:
            return "budget", str(error)
        return "done", ""
    if isinstance(first[0], BudgetError):
        return "budget", str(first[0])
    if isinstance(first[0], Stopped):
        return "stopped", f"stopped by {name_of(ctx.stopped_by)}"
    raise first[0]


def recorded(prompts: Iterable[Prompt], ledger: Asker) -> Iterator[Prompt]:
    """Prompts, a batch at a time on disk before any of the batch is asked."""
    rest = iter(prompts)
    while batch := list(islice(rest, READ_AHEAD)):
        ledger.add_prompts(batch)
        yield from batch


class interruptible:
    """Ctrl-C (or SIGTERM, or SIGHUP) drains: nothing new is asked, what is in flight is kept. A
    second one does not wait.
    """

    def __init__(self, ctx: Context, quiet: bool) -> None:
        self.ctx, self.quiet = ctx, quiet
        self.here = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> None:
        if self.here:
            self.task = asyncio.current_task()
            self.before = {number: signal.getsignal(number) for number in heeded()}
            for number in self.before:
                asyncio.get_running_loop().add_signal_handler(number, self._told, number)

    def __exit__(self, *_: object) -> None:
        if self.here:
            for number, handler in self.before.items():
                asyncio.get_running_loop().remove_signal_handler(number)
                signal.signal(number, handler or signal.SIG_DFL)

    def _told(self, number: int) -> None:
        self.ctx.stopped_by = number
        if self.ctx.stopping or loading(self.ctx):
            self.ctx.hurry = True
            self.ctx.stop()
            if self.task:
                self.task.cancel()
            return
        self.ctx.stop()
        if not self.quiet:
            warn("stopping: waiting for what is in flight (Ctrl-C again does not wait)")


def loading(ctx: Context) -> bool:
    """Whether some engine's server is on its way up."""
    return any(engine.starting for engine in ctx.engines.values())


async def _tick(progress: Progress, ctx: Context) -> None:
    """Redraw twice a second; the rate is that of the last ten seconds."""
    past: list[tuple[float, int]] = []
    while True:
        while loading(ctx):
            await asyncio.sleep(0.5)  # the engine tells how far it is
            progress.restart()
        past = [*past[-20:], (time.monotonic(), ctx.asked())]
        (t0, n0), (t1, n1) = past[0], past[-1]
        _show(progress, ctx, n1, (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0)
        await asyncio.sleep(0.5)


def _show(progress: Progress, ctx: Context, asked: int, rate: float) -> None:
    counts = ctx.counts
    facts: dict[str, Any] = {"calls": asked} | ({"calls/s": round(rate)} if rate else {})
    facts["reused"] = ctx.asker.stats.reused
    facts["unscored"] = f"{counts.n_unscored / counts.answers:.1%}" if counts.answers else "0"
    if counts.failed:
        facts["failed"] = counts.failed
    progress.share = counts.share(progress.total) or 0.0
    progress.advance(counts.prompts - progress.done, **facts)


def fill_store(folder: Path, quiet: bool = True) -> int:
    """Bring the DuckDB file up to date; how far it is behind when another program holds it for more
    than a moment (a page that looks at the run holds it while it asks).
    """
    from prefab.pipelines.store.fill import PATIENCE_S, fill

    deadline = time.monotonic() + PATIENCE_S
    while (report := fill(folder)).held and time.monotonic() < deadline:
        time.sleep(0.1)
    behind = report.behind
    if behind and not quiet:
        warn(
            f"another program has {folder / 'prefab.duckdb'} open: the store is behind by {counted(behind, 'row')}, the ledger "
            "is complete. `prefab store info` catches up"
        )
    return behind


# What the store says of a run as a whole: kind, name, count.
_SUMMARY = r"""
SELECT 'outcome' AS what, outcome AS name, count(*) AS n FROM preferences WHERE run = $run GROUP BY ALL
UNION ALL
SELECT 'fault', principle, count(*) FROM critiques WHERE run = $run AND fault GROUP BY ALL
UNION ALL
SELECT 'empty', '', count(*) FROM samples
WHERE run = $run AND parent < 0 AND reason IS NULL AND NOT regexp_matches(text, '\S') GROUP BY ALL
UNION ALL
SELECT 'unsure', principle, count(*) FROM critiques
WHERE run = $run AND p_fault BETWEEN 0.2 AND 0.8 GROUP BY ALL
UNION ALL
SELECT 'hard', judge, count(*) FROM verdicts
WHERE run = $run AND exactness = 'hard' AND p_a IS NOT NULL GROUP BY ALL
UNION ALL
SELECT 'orders', CASE WHEN x.winner = y.winner THEN 'same' ELSE 'different' END, count(*)
FROM verdicts x JOIN verdicts y USING (run, prompt, a, b, principle, judge, repeat)
WHERE run = $run AND x."order" = 'ab' AND y."order" = 'ba' AND x.winner IS NOT NULL
  AND y.winner IS NOT NULL GROUP BY ALL"""


def _in_store(folder: Path, run: int) -> dict[str, dict[str, int]]:
    """What the store says of a run, by kind; nothing where another program holds the store."""
    kinds = ("outcome", "fault", "empty", "unsure", "orders", "hard")
    found: dict[str, dict[str, int]] = {what: {} for what in kinds}
    with suppress(HeldError):
        for what, name, n in read_frame(folder, _SUMMARY, {"run": run}).rows():
            found[what][name] = n
    return found


def _best_of(loaded: ResolvedPipeline, run: int) -> list[BestOf]:
    """The scores of the best of n answers; nothing for another recipe, or where another program
    holds the store.
    """
    with suppress(HeldError):
        if loaded.config.recipe == "best_of_n":
            return curve(Path(loaded.config.store), run, loaded.judges)
    return []


def _result(
    loaded: ResolvedPipeline,
    ctx: Context,
    record: Run,
    state: str,
    reason: str,
    seconds: float,
    behind: int,
) -> RunResult:
    stats, counts = ctx.asker.stats, ctx.counts
    told = _in_store(Path(loaded.config.store), record.id)
    unscored = {f"{role} {why}": n for (role, why), n in sorted(counts.unscored.items())}
    from prefab.pipelines.store.run_page import judges_of_own_answers

    return RunResult(
        name=record.name,
        roles=roles_of(loaded, ctx.engines),
        own_answers=judges_of_own_answers(loaded.resolved) if loaded.compares else [],
        version=record.version,
        run=record.id,
        store=Path(loaded.config.store),
        resumed=record.resumed,
        state=state,
        reason=reason,
        prompts=counts.prompts,
        asked=stats.asked,
        reused=stats.reused,
        failed=counts.failed,
        truncated=counts.truncated,
        identical=counts.identical,
        prompt_tokens=stats.prompt_tokens,
        completion_tokens=stats.completion_tokens,
        unscored=unscored,
        malformed=loaded.prompts.n_malformed,
        seconds=seconds,
        escalation=dict(sorted(counts.escalation.items())),
        failures=counts.failures,
        outcomes=told["outcome"],
        faults=dict(sorted(told["fault"].items(), key=lambda item: -item[1])),
        empty=sum(told["empty"].values()),
        unsure_critiques=sum(told["unsure"].values()),
        same_in_both_orders=told["orders"].get("same", 0),
        in_both_orders=sum(told["orders"].values()),
        hard=told["hard"],
        refused=counts.refused,
        awaited=counts.awaited,
        signal=ctx.stopped_by if state == "stopped" else 0,
        behind=behind,
        best_of=_best_of(loaded, record.id),
        servers=[server for engine in ctx.engines.values() for server in engine.servers],
    )
