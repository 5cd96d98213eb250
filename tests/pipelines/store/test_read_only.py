"""A finished store on a disk that cannot be written is read, queried and exported; a run on it says
that it cannot write."""

from __future__ import annotations

import os
import pwd
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


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_the_store_of_another_user_is_read_queried_and_exported(project, tmp_path):
    store, out = tmp_path / "store", tmp_path / "out"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    for folder in [tmp_path, *tmp_path.parents]:
        if not folder.stat().st_mode & 0o001:
            pytest.skip(f"another user cannot reach {folder}")
    nobody = pwd.getpwnam("nobody")
    environment = {**os.environ, "HOME": str(out)}

    def other(words):
        return subprocess.run(
            f"{PREFAB} {words}",
            shell=True,
            user=nobody.pw_uid,
            group=nobody.pw_gid,
            extra_groups=[],
            env=environment,
            capture_output=True,
            text=True,
        )

    if other("--version").returncode:
        pytest.skip("another user cannot run this Python")
    before = {path.name: path.read_bytes() for path in sorted(store.iterdir())}
    for words in (
        'sql "SELECT count(*) FROM samples" --store',
        "store info --store",
        "store verify",
        f"export {out / 'data'} --store",
    ):
        made = other(f"{words} {store}")
        assert made.returncode == 0, made.stderr
    made = other(f"run {project}")
    assert made.returncode == 1 and "Traceback" not in made.stderr, made.stderr
    assert {path.name: path.read_bytes() for path in sorted(store.iterdir())} == before
