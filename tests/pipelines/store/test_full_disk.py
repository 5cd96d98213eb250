"""A disk that is really full (a small file system in memory): a clear error, nothing lost, and the
same command goes on once there is room."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from prefab import run
from prefab.pipelines.store.fill import query
from tests.support.project import engine, pipeline, write

PREFAB = f"{shlex.quote(sys.executable)} -m prefab.pipelines.cli.main"


def on_a_disk(folder: Path, *lines: str) -> list[tuple[int, str]]:
    """Run commands with a file system of their own mounted at `folder`; DISK SIZE as a command sets
    its size. Gives the exit code and the error output of each.
    """
    if not shutil.which("unshare"):
        pytest.skip("mounting is not allowed here")
    folder.mkdir(exist_ok=True)
    log = folder.with_name(folder.name + "-log")
    log.mkdir()
    at, script = shlex.quote(str(folder)), ["set -u"]
    for i, line in enumerate(lines):
        if line.startswith("DISK "):
            how = f"remount,size={line[5:]}" if i else f"size={line[5:]}"
            line = f"mount -t tmpfs -o {how} tmpfs {at}"
        script.append(f"({line}) > /dev/null 2> {log}/{i}; echo $? >> {log}/codes")
    subprocess.run(["unshare", "-m", "bash", "-c", "\n".join(script)], capture_output=True)
    if not (log / "codes").exists() or "mount:" in (log / "0").read_text():
        pytest.skip("mounting is not allowed here")
    codes = (log / "codes").read_text().split()
    return [(int(code), (log / str(i)).read_text()) for i, code in enumerate(codes)]


def rows(store: Path) -> list[tuple]:
    sql = "SELECT prompt, a, b, outcome, p_chosen FROM preferences ORDER BY ALL"
    return query(store, sql).rows()


@pytest.mark.parametrize("size", ["900k", pytest.param("2300k", marks=pytest.mark.slow)])
def test_a_run_ends_in_words_and_goes_on(tmp_path, size):
    """Full while the ledger is written, or at the run's end."""
    project = write(tmp_path, pipeline(tmp_path, prompts=40, budget={"unscored": None}))
    store, kept = tmp_path / "store", tmp_path / "kept"
    done = on_a_disk(
        store,
        f"DISK {size}",
        f"{PREFAB} run {project}",
        "DISK 300m",
        f"{PREFAB} run {project}",
        f"{PREFAB} store verify {store}",
        f"cp -r {store} {kept}",
    )
    code, told = done[1]
    assert code == 1 and "the disk is full" in told and "Traceback" not in told, told
    assert [code for code, _ in done[2:]] == [0, 0, 0, 0], done
    other = tmp_path / "other"
    other.mkdir()
    run(pipeline(other, prompts=40, budget={"unscored": None}))
    assert rows(kept) == rows(other / "store")


@pytest.mark.slow
def test_an_export_ends_in_words_and_the_earlier_one_stays(tmp_path):
    settings = pipeline(tmp_path, prompts=40)
    run(settings, engines=engine())
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    export = f"{PREFAB} export --store {tmp_path / 'store'} {disk}/out"
    done = on_a_disk(
        disk,
        "DISK 100m",
        export,
        f"dd if=/dev/zero of={disk}/filler bs=1k",
        export,
        f"cp -r {disk}/out {kept}",
        f"rm {disk}/filler",
        export,
    )
    assert [code for code, _ in done] == [0, 0, 1, 1, 0, 0, 0], done
    assert "No space left" in done[3][1] and "Traceback" not in done[3][1]
    assert pl.read_parquet(kept / "preference/*.parquet").height > 0


@pytest.mark.slow
def test_a_rebuild_ends_in_words_and_goes_on(tmp_path):
    """There is room for the ledger, and none for the DuckDB file that is made from it."""
    run(pipeline(tmp_path, prompts=40), engines=engine())
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    rebuild = f"{PREFAB} store rebuild --store {disk}"
    done = on_a_disk(
        disk,
        "DISK 100m",
        f"cp {tmp_path}/store/ledger.sqlite {disk}",
        f"dd if=/dev/zero of={disk}/filler bs=1k",
        f"truncate -s -600k {disk}/filler",
        rebuild,
        f"rm {disk}/filler",
        rebuild,
        f"cp -r {disk} {kept}",
    )
    assert [code for code, _ in done] == [0, 0, 1, 0, 1, 0, 0, 0], done
    assert "the disk is full" in done[4][1] and "Traceback" not in done[4][1]
    assert rows(kept) == rows(tmp_path / "store")
