"""A finished store on a disk that cannot be written is read, queried and exported; a run on it says
that it cannot write."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest

from prefab import run
from tests.support.project import engine, pipeline, write

PREFAB = f"{shlex.quote(sys.executable)} -m prefab.pipelines.cli.main"


def read_only(folder, command):
    """Run a command where the folder is mounted read-only."""
    at = shlex.quote(str(folder))
    script = f"mount --bind {at} {at} && mount -o remount,ro,bind {at} && {command}"
    made = subprocess.run(["unshare", "-m", "bash", "-c", script], capture_output=True, text=True)
    if "mount:" in made.stderr or "unshare:" in made.stderr:
        pytest.skip("mounting is not allowed here")
    return made


@pytest.fixture
def project(tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    settings = pipeline(tmp_path)
    run(settings, engines=engine())
    return write(tmp_path, settings)


def test_it_is_read_queried_and_exported(project, tmp_path):
    store = tmp_path / "store"
    before = sorted(path.name for path in store.iterdir())
    moved = tmp_path / "moved"
    shutil.copytree(store, moved)  # other files than those that were filled
    for folder in (store, moved):
        for words in ('sql "SELECT count(*) FROM samples"', "store info", "agreement"):
            made = read_only(folder, f"{PREFAB} {words} --store {folder}")
            assert made.returncode == 0, made.stderr
        out = tmp_path / f"out-{folder.name}"
        made = read_only(folder, f"{PREFAB} export --store {folder} {out}")
        assert made.returncode == 0 and (out / "README.md").exists(), made.stderr
    assert sorted(path.name for path in store.iterdir()) == before


def test_a_run_and_a_rebuild_say_that_they_cannot_write(project, tmp_path):
    store = tmp_path / "store"
    for words in (f"run {project}", f"store rebuild --store {store}"):
        made = read_only(store, f"{PREFAB} {words}")
        assert made.returncode == 1 and "Traceback" not in made.stderr, made.stderr
        assert "cannot be" in made.stderr or "Read-only" in made.stderr, made.stderr


def as_stranger(command):
    """Run a command without the privileges by which root writes the files of others."""
    dropped = "--bounding-set=-dac_override,-dac_read_search,-fowner,-chown"
    made = subprocess.run(
        ["setpriv", dropped, "bash", "-c", command], capture_output=True, text=True
    )
    if made.stderr.startswith("setpriv:"):
        pytest.skip("mounting is not allowed here")
    return made


def test_the_store_of_another_user_is_read_queried_and_exported(project, tmp_path):
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("mounting is not allowed here")
    store, out = tmp_path / "store", tmp_path / "out"
    for path in (store, *store.iterdir()):
        os.chown(path, 65534, 65534)
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = {path.name: path.read_bytes() for path in sorted(store.iterdir())}
    for words in (
        'sql "SELECT count(*) FROM samples" --store',
        "store info --store",
        "store verify",
        f"export {out} --store",
    ):
        made = as_stranger(f"{PREFAB} {words} {store}")
        assert made.returncode == 0, made.stderr
    made = as_stranger(f"{PREFAB} run {project}")
    assert made.returncode == 1 and "Traceback" not in made.stderr, made.stderr
    assert "cannot be opened for writing" in made.stderr
    assert {path.name: path.read_bytes() for path in sorted(store.iterdir())} == before
