"""`prefab watch`: judge a fixed panel of comparisons again at each save of a constitution.

The engines stay started between saves. A file that is not valid (an editor may be in the middle of
writing it) is told, and the last valid version stands.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from prefab.factory.engines.lifecycle import KeptEngine
from prefab.factory.errors import ConfigError, PrefabError
from prefab.factory.spec.constitution import (
    constitution_digest,
    constitution_files,
    load_constitution,
)
from prefab.factory.store.store import HeldError, Read
from prefab.factory.types import Engine
from prefab.pipelines.config.loader import ResolvedPipeline, make_engines, make_programs
from prefab.pipelines.run.diff import Diff, Version, differing, fields_read
from prefab.pipelines.run.rejudge import Panel, panel_of, pipeline_of, rejudging
from prefab.pipelines.run.runner import run_async
from prefab.pipelines.store.fill import read_filled

EVERY_S = 0.1  # how often the file is looked at
HELD_S = 0.5  # between two tries while another command has the store open
Show = Callable[[Diff | None, Diff | None, float], None]
Tell = Callable[[PrefabError], object]


def watch(
    file: str | Path,
    store: str | Path,
    show: Show,
    tell: Tell,
    run: str = "",
    pipeline: str | Path | None = None,
    sets: Sequence[str] = (),
    sample: int = 64,
    seed: int = 0,
    engines: dict[str, Engine] | None = None,
    until: Callable[[], bool] = lambda: False,
) -> None:
    """Judge comparisons of a run under a constitution now, and again at each save.

    Args:
        file: The constitution.
        store: The store whose comparisons are judged.
        show: Called after each judging with what moved since the last save, what moved since the
            start (both None the first time), and the seconds since the save was seen.
        tell: Called with the mistakes of a file that is not valid, and while another command has
            the store open.
        run: The run with the comparisons, NAME or NAME@VERSION; default: the latest.
        pipeline: A pipeline file whose judges are asked; default: as the run was configured.
        sets: Overrides of the pipeline's fields.
        sample: How many comparisons, at most.
        seed: Seed of the choice of comparisons.
        engines: Engines to use in place of those that the pipeline would start, by name.
        until: Asked between looks at the file; True ends the watch.

    Raises:
        ConfigError: The constitution is not valid at the start, or there is nothing to judge.
        EngineError: An engine does not start or fails.
    """
    panel = panel_of(Path(store), run, sample, seed)
    loaded = pipeline_of(panel, pipeline, sets, (file, load_constitution(file)))
    asyncio.run(_watch(Path(file), panel, loaded, show, tell, engines, until))


async def _watch(
    file: Path,
    panel: Panel,
    loaded: ResolvedPipeline,
    show: Show,
    tell: Tell,
    engines: dict[str, Engine] | None,
    until: Callable[[], bool],
) -> None:
    # programs of judges start at once and are made anew for each save
    kept: dict[str, Engine] = {
        name: KeptEngine(getattr(engine, "engine", engine))
        for name, engine in (engines or make_engines(loaded)).items()
    }
    import scipy.special  # noqa: F401  # loaded now, so that the first save does not wait for it

    first: Version | None = None
    last: Version | None = None
    seen, held, read = b"", "", fields_read(loaded)
    files = [file]
    try:
        while not until():
            now = _digest(files)
            if now in (b"", seen):
                await asyncio.sleep(EVERY_S)
                continue
            began = time.monotonic()
            files = constitution_files(file)
            seen = _digest(files)
            try:
                constitution = load_constitution(file)
            except ConfigError as error:
                tell(error)
                continue
            if last and constitution_digest(constitution) == last.name:
                continue  # comments and titles
            version = Version(constitution_digest(constitution), constitution)
            try:
                judging = rejudging(panel, constitution, loaded)
                made = {**kept, **make_programs(loaded)}
                version.judged(await run_async(judging, engines=made))
                first = first or version
                since_last, since_start = _since(panel, first, last, version, read)
            except HeldError as error:  # another command reads the store: try again
                if str(error) != held:
                    tell(error)
                seen, held = b"", str(error)
                await asyncio.sleep(HELD_S)
                continue
            seconds, held = time.monotonic() - began, ""
            show(_named(since_last, "last save"), _named(since_start, "start"), seconds)
            last = version
    finally:
        for engine in kept.values():
            await engine.end()  # type: ignore[attr-defined]  # all are KeptEngine


def _since(
    panel: Panel, first: Version, last: Version | None, now: Version, roles: frozenset[str]
) -> tuple[Diff | None, Diff | None]:
    """What moved since the last save, and since the start; one comparison where they are the same.
    Nothing without a last save.
    """
    if last is None:
        return None, None

    def work(read: Read) -> tuple[Diff, Diff]:
        since_last = differing(last, now, panel, roles, read)
        same = first is last
        return since_last, since_last if same else differing(first, now, panel, roles, read)

    return read_filled(panel.path, work)


def _named(found: Diff | None, name: str) -> Diff | None:
    """The diff with names for people in place of digests."""
    if found is None:
        return None
    return replace(found, old=replace(found.old, name=name), new=replace(found.new, name="now"))


def _digest(files: Sequence[Path]) -> bytes:
    """What the constitution and those that it extends hold, digested; empty while one is not there
    or holds nothing, as in the middle of a save.
    """
    try:
        texts = [file.read_bytes() for file in files]
    except OSError:
        return b""
    return b"".join(hashlib.sha256(text).digest() for text in texts) if all(texts) else b""
