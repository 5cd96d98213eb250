"""`prefab watch`: each save is judged, an invalid one is told, and engines are started once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefab import run
from prefab.factory.engines.scripted import Scripted
from prefab.factory.errors import ConfigError
from prefab.pipelines.run.watch import watch
from tests.pipelines.run.test_diff import constitution, engine
from tests.support import project


class Counting(Scripted):
    """A scripted engine that counts its starts and stops."""

    starts = stops = 0

    async def start(self) -> None:
        self.starts += 1
        await super().start()

    async def stop(self) -> None:
        self.stops += 1
        await super().stop()


def test_each_save_is_judged_and_the_engine_is_started_once(tmp_path: Path) -> None:
    run(project.pipeline(tmp_path), engines=engine())
    plain = engine()["local"]
    counting = Counting(plain.config, plain.answer)
    file = Path(constitution(tmp_path, "mine.yaml"))
    original = file.read_text()
    worse = original.replace("kinder?", "worse?").replace("briefer?", "worse?")
    saves = [
        worse,
        "",
        "id: [",
        worse.replace("title: Small", "title: Other") + "# more\n",
        original,
    ]
    shown, told, idle = [], [], 0

    def until() -> bool:
        """The next save after three looks that found nothing new; then the end."""
        nonlocal idle
        idle += 1
        if idle % 3 == 0 and saves:
            file.write_text(saves.pop(0))
        return idle > 21

    def show(last, start, seconds):
        shown.append((last, start))

    watch(file, tmp_path / "store", show, told.append, engines={"local": counting}, until=until)
    assert shown[0] == (None, None) and len(shown) == 3
    last, start = shown[1]
    assert (len(last.flips), len(start.flips), last.new.asked) == (
        12,
        12,
        36,
    )  # one question for both
    last, start = shown[2]
    assert (len(last.flips), len(start.moved), last.new.asked) == (12, 0, 0)
    assert len(told) == 1 and "mine.yaml" in str(told[0].problems[0])
    assert (counting.starts, counting.stops) == (1, 1)


def test_a_file_that_is_invalid_at_the_start_is_an_error(tmp_path: Path) -> None:
    run(project.pipeline(tmp_path), engines=engine())
    (tmp_path / "bad.yaml").write_text("id: [")
    with pytest.raises(ConfigError, match="bad.yaml"):
        watch(tmp_path / "bad.yaml", tmp_path / "store", print, print, engines=engine())


@pytest.mark.slow
def test_a_store_that_another_command_has_open_is_waited_for(tmp_path: Path) -> None:
    run(project.pipeline(tmp_path), engines=engine())
    file, store = Path(constitution(tmp_path, "mine.yaml")), tmp_path / "store"
    code = "import duckdb, sys; held = duckdb.connect(sys.argv[1]); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(store / "prefab.duckdb")]
    shown, told, holders = [], [], []

    def show(last, start, seconds):
        shown.append(last)
        if len(shown) == 1:
            file.write_text(file.read_text().replace("kinder?", "worse?"))
            holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            holder.stdout.readline()
            holders.append(holder)

    def tell(error):
        told.append(error)
        holders[0].communicate(b"\n")

    end = time.monotonic() + 60
    watch(
        file,
        store,
        show,
        tell,
        engines=engine(),
        until=lambda: len(shown) > 1 or time.monotonic() > end,
    )
    assert len(shown) == 2 and shown[1].new.reused == 72  # the first try asked
    assert [type(error).__name__ for error in told] == ["HeldError"]
