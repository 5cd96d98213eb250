"""One shard on this machine: restored from what is published, asked, published, and its rows
written for the catalogue.
"""

from __future__ import annotations

import asyncio
import fcntl
import resource
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import orjson

from prefab.factory.console import warn
from prefab.factory.errors import StoreError
from prefab.factory.ledger import db, segments
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.ledger.records import Run
from prefab.factory.shared_files import SharedFiles
from prefab.factory.store import store
from prefab.factory.store.shared import COPIED, VIEWED, SharedFolder, name_of
from prefab.factory.types import Engine, Prompt
from prefab.pipelines.config.loader import ResolvedPipeline
from prefab.pipelines.config.registries import RECIPES
from prefab.pipelines.config.schema import BudgetConfig
from prefab.pipelines.run.context import Context
from prefab.pipelines.run.runner import RunResult, run_async
from prefab.pipelines.scale.sharding import POSITIONS, Part, ShardPrompts
from prefab.pipelines.store.catalogue import add_head, add_runs
from prefab.pipelines.store.fill import fill

Tables = dict[str, tuple[str, int]]  # by table, a file of the shared folder and its size


@dataclass(frozen=True, slots=True)
class ShardJob:
    """What a worker does with a shard: ask all its prompts' questions in run number `run`, or,
    with `derive`, only make its rows anew. With other positions than the shard's first and last, it
    asks and publishes the questions of these prompts, and makes no rows. `digest` is that of the
    file of the shard's prompts.
    """

    shard: int
    run: int
    derive: bool = False
    first: int = 0
    end: int = POSITIONS
    digest: str = ""

    @property
    def part(self) -> Part:
        """The shard, or what is asked of it."""
        return Part(self.shard, self.first, self.end)


class ShardRun:
    """A shard in work."""

    def __init__(
        self,
        loaded: ResolvedPipeline,
        shared: SharedFolder,
        local: Path,
        job: ShardJob,
        budget: bool = False,
    ) -> None:
        """`local` is the folder of this machine's ledgers. `budget`: the shard is held to the
        pipeline's budget by itself, not by a driver over all shards together.
        """
        self.loaded, self.shared, self.job = loaded, shared, job
        self.folder = local / job.part.name
        self.ctx: Context | None = None
        self._stopped, self._budget, self._divided = False, budget, False
        self._ticker: asyncio.Task[None] | None = None
        self._publisher = segments.Publisher(self.folder / db.FILE, shared.segments(job.shard))

    def counts(self) -> dict[str, int]:
        """What was done so far; from any thread."""
        if self.ctx is None:
            return {}
        counts, stats = self.ctx.counts, self.ctx.asker.stats
        return {
            "prompts": counts.prompts,
            "asked": stats.asked,
            "reused": stats.reused,
            "tokens": self.ctx.tokens(),
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "answers": counts.answers,
            "unscored": counts.n_unscored,
            "failed": counts.failed,
        }

    def stop(self, divided: bool = False) -> None:
        """Ask nothing new; what is in flight is kept. `divided`: other workers go on, so that the
        rows are not made here. In the event loop of `run`.
        """
        self._stopped, self._divided = True, self._divided or divided
        if self.ctx is not None:
            self.ctx.stop()

    def publish(self) -> None:
        """Publish what is answered; from any thread. Raises: StoreError, OSError."""
        if self.ctx is not None:
            self._publisher.publish()

    async def run(
        self, engines: Mapping[str, Engine], prompts: ShardPrompts, publish_s: float
    ) -> dict[str, Any]:
        """Do the job. Returns: the state, the run's counts, and the files of the shard's rows.

        Raises: PrefabError as `prefab.run` does; OSError when nothing can be published.
        """
        began, used = time.monotonic(), _cpu_s()
        await asyncio.to_thread(prompts.check, self.job.digest)
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder):
            file = self.folder / db.FILE
            restored = await asyncio.to_thread(
                segments.restore, file, self.shared.segments(self.job.shard)
            )
            head = self.shared.head_digest()
            await asyncio.to_thread(db.write, file, partial(seed, shared=self.shared))
            restore_s = time.monotonic() - began
            result: RunResult | None = None
            if not self.job.derive:
                result = await self._ask(dict(engines), prompts, publish_s)
            await asyncio.to_thread(self._publisher.publish)
            filling = time.monotonic()
            state = result.state if result else "derived"
            whole = self.job.part.is_whole and not (self._divided and state == "stopped")
            tables, waiting = Tables(), 0
            if whole:
                await asyncio.to_thread(fill, self.folder)
                tables, waiting = await asyncio.to_thread(
                    write_tables, self.folder, self.shared.files, self.job.shard
                )
        if not self.job.part.is_whole:  # all is published, and nobody works on this part again
            shutil.rmtree(self.folder, ignore_errors=True)
        return {
            "shard": self.job.shard,
            "state": state,
            "counts": _plain(result.summary()) if result else {},
            "rows": whole,
            "tables": tables,
            "head": head,
            "waiting": waiting,
            "restored": restored.rows.get("calls", 0),
            "published_bytes": self._publisher.bytes,
            "restore_s": restore_s,
            "publish_s": self._publisher.seconds,
            "tables_s": time.monotonic() - filling,
            "cpu_s": _cpu_s() - used,
            "seconds": time.monotonic() - began,
        }

    async def _ask(
        self, engines: dict[str, Engine], prompts: ShardPrompts, publish_s: float
    ) -> RunResult:
        update: dict[str, Any] = {"store": str(self.folder)}
        if not self._budget:
            update["budget"] = BudgetConfig(unscored=None, failed=None)
        config = self.loaded.config.model_copy(update=update)
        recipe = self.loaded.recipe or RECIPES[config.recipe]

        async def watched(prompt: Prompt, ctx: Context) -> None:
            if self.ctx is None:
                self.ctx, ctx.stopping = ctx, ctx.stopping or self._stopped
                ctx.check()
            await recipe(prompt, ctx)

        def begun(_: Ledger, record: Run) -> None:
            if record.id != self.job.run:
                raise StoreError(
                    f"shard {self.job.shard}: the constitution, the templates, the models or the "
                    "pipeline that this machine reads differ from those with which the run began"
                )
            self._ticker = asyncio.create_task(self._publish_often(publish_s))

        loaded = replace(
            self.loaded, config=config, prompts=prompts, recipe=watched, take_over=begun
        )
        try:
            return await run_async(loaded, engines=engines)
        finally:
            if self._ticker is not None:
                self._ticker.cancel()

    async def _publish_often(self, publish_s: float) -> None:
        while True:
            await asyncio.sleep(publish_s)
            try:
                await asyncio.to_thread(self._publisher.publish)
            except OSError as error:  # the last one, at the end, must succeed
                warn(f"{self._publisher.files.address}: cannot publish now ({error})")


def _plain(counts: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = orjson.loads(orjson.dumps(counts))
    return plain


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time works on a shard on this machine; another one waits."""
    with open(folder / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def seed(con: Connection, shared: SharedFolder) -> None:
    """Write into a shard's ledger, inside an open transaction, the runs with the numbers that they
    have in all shards, and what the catalogue's ledger has for it.
    """
    add_runs(con, shared)
    add_head(con, shared)


def write_tables(folder: Path, files: SharedFiles, shard: int) -> tuple[Tables, int]:
    """Write the rows of a shard's store as Parquet files of the shared folder.

    Returns: By table with rows, the file's name and its size in bytes; and how many prompts wait
        for calls.
    """
    name = f"{name_of(shard)}-{uuid.uuid4().hex[:8]}.parquet"

    def write(memory_mb: int) -> tuple[Tables, int]:
        found: Tables = {}
        with store.opened(folder, memory_mb) as con:
            for table in (*VIEWED, *COPIED):
                if con.execute(f"SELECT count(*) FROM {table}").fetchall() == [(0,)]:
                    continue
                with files.writing(f"tables/{table}/{name}") as path:
                    con.execute(
                        f"COPY (SELECT * FROM {table}) TO '{_quoted(path)}' "
                        "(FORMAT parquet, COMPRESSION zstd)"
                    )
                    found[table] = (name, path.stat().st_size)
            waiting = con.execute("SELECT count(*) FROM work").fetchall()[0][0]
        return found, waiting

    return store.with_memory(folder, write)


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
