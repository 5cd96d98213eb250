"""SIGKILL, at every named point, before every operation on a file, and at random moments; each kill
is followed by the same command.

What must hold: no committed answer is asked again or lost; what is asked twice or served in vain
was in flight (at most twice `max_in_flight`); the final store is that of an undisturbed run.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture import crash_states
from tests.torture.lab import IN_FLIGHT, Ended, Lab, committed, wait_for

RUN = ("run", "pipeline.yaml", "-q")
NAMED = [
    *(f"{point}:{n}" for point in ("before_commit", "after_commit") for n in range(1, 11)),
    *(f"{point}:{n}" for point in ("mid_fill", "end") for n in range(1, 4)),
]


@dataclass
class Result:
    """One kill, or one state, or one fault: where, and what was wrong."""

    place: str
    problems: list[str]
    killed: bool = False
    repeated: int = 0


def life(lab: Lab, place: str, job: dict[str, Any], way: Any = None) -> Result:
    """Start the command, let `way` kill it, and hold the promise of the ledger."""
    before, past = committed(lab.store), lab.log()
    pid = lab.start(*RUN, **job)
    if way:
        way(pid)
        lab.kill(pid)
    ended = lab.end()
    log = lab.log()
    return promise(lab, place, ended, before, past, log[len(past) :])


def promise(
    lab: Lab, place: str, ended: Ended, before: dict[str, int], past: list[str], asked: list[str]
) -> Result:
    """What is wrong after a command that asked `asked`, where `before` was committed and `past`
    had been asked."""
    after = committed(lab.store)
    repeated = [name for name in asked if name in set(past) and name not in before]
    in_vain = {*past, *asked} - after.keys()
    problems = [
        (f"{n} {what}")
        for n, what in (
            (len(set(asked) & before.keys()), "committed answers were asked again"),
            (len(before.keys() - after.keys()), "committed answers are lost"),
            (sum(n > 1 for n in after.values()), "questions have two answers"),
        )
        if n
    ]
    for n, what in ((len(repeated), "asked twice"), (len(in_vain), "served, not on disk")):
        if n > 2 * IN_FLIGHT:
            problems.append(f"{n} {what}, more than were in flight")
    if not ended.killed and ended.code != 0:
        problems.append(f"exit code {ended.code}: {ended.last}")
    if "Traceback" in ended.err:
        problems.append(f"a traceback: {ended.last}")
    return Result(place, problems, ended.killed, len(repeated))


def finish(lab: Lab, place: str) -> list[str]:
    """The same command, undisturbed: done, and the store is the one that it should be."""
    result = life(lab, place, {})
    if result.problems:
        return result.problems
    return [difference] if (difference := lab.differences()) else []


def named(lab: Lab, points: list[str]) -> Iterator[Result]:
    """A kill at each named point."""
    for point in points:
        lab.reset()
        result = life(lab, point, {"env": {"PREFAB_KILL_AT": point}})
        result.problems += finish(lab, point)
        yield result


def at_operations(lab: Lab, n: int) -> Iterator[Result]:
    """A kill before each operation of a run on the store's files, or before `n` spread over all."""
    total = len(crash_states.recorded(lab, RUN))
    for at in range(1, total + 1, -(-total // n)):
        lab.reset()
        place = f"operation {at} of {total}"
        result = life(lab, place, {"shim": {"root": str(lab.store), "at": at}})
        result.problems += finish(lab, place)
        yield result


def at_export_operations(lab: Lab, every: int = 1) -> Iterator[Result]:
    """A kill before each operation of an export, into a new folder and over an earlier export
    beside which a file of somebody else lies."""
    out = lab.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    assert lab.prefab("export", "out").code == 0
    wanted = files_of(out)
    for earlier in (False, True):
        total = len(crash_states.recorded(lab, ("export", "out"), out))
        for at in range(1, total + 1, every):
            if not earlier:
                shutil.rmtree(out, ignore_errors=True)
            else:
                (out / "notes.txt").write_text("mine")
            place = f"export{' again' * earlier}, operation {at} of {total}"
            ended = lab.prefab("export", "out", shim={"root": str(out), "at": at})
            again = lab.prefab("export", "out")
            problems = []
            if again.code != 0 or "Traceback" in again.err:
                problems.append(f"exit code {again.code}: {again.last}")
            found = files_of(out)
            if earlier and found.pop("notes.txt", b"") != b"mine":
                problems.append("the file of somebody else is gone")
            if differ := [n for n in {*found, *wanted} if found.get(n) != wanted.get(n)]:
                problems.append(f"{sorted(differ)} differ")
            yield Result(place, problems, ended.killed)


def files_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def at_random(lab: Lab, kills: int, seed: int) -> Iterator[Result]:
    """Kills at moments drawn from the seed, up to eight in the life of one store."""
    draw = random.Random(seed)
    done = 0
    lab.reset()
    began = time.monotonic()
    assert not life(lab, "", {}).problems
    usual_s = time.monotonic() - began
    while done < kills:
        lab.reset()
        for _ in range(draw.randint(3, 8)):
            way = draw.choice((_after_time, _after_questions, _in_fill))
            result = life(lab, way.__name__, {}, way(lab, draw, usual_s))
            done += result.killed
            yield result
        place = f"the end of a store's life (kill {done}, seed {seed})"
        yield Result(place, finish(lab, place))


def _after_time(lab: Lab, draw: random.Random, usual_s: float) -> Any:
    seconds = draw.uniform(0, usual_s)
    return lambda pid: time.sleep(seconds)


def _after_questions(lab: Lab, draw: random.Random, usual_s: float) -> Any:
    asked = len(lab.ask("/_log")["log"])
    target = asked + draw.randint(1, max(2, len(lab.questions) - len(committed(lab.store))))
    late_s = draw.uniform(0, 0.02)

    def way(pid: int) -> None:
        wait_for(lambda: len(lab.ask("/_log")["log"]) >= target or not _alive(pid), 2 * usual_s)
        time.sleep(late_s)

    return way


def _in_fill(lab: Lab, draw: random.Random, usual_s: float) -> Any:
    file, late_s = lab.store / "prefab.duckdb.wal", draw.uniform(0, 0.25)
    before = file.stat().st_mtime_ns if file.exists() else 0

    def way(pid: int) -> None:
        def touched() -> bool:
            try:
                return file.stat().st_mtime_ns != before
            except FileNotFoundError:
                return False

        wait_for(lambda: touched() or not _alive(pid), 2 * usual_s)
        time.sleep(late_s)

    return way


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
