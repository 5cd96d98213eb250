"""A finished store on a disk that cannot be written is read, queried and exported; a run on it says
that it cannot write."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from prefab import run
from tests.support.project import engine, pipeline, write
from tests.support.sharded import run_sharded

# Runs commands one after another in one process, whose imports cost more than they do; prints the
# exit code and the error output of each.
COMMANDS = """
import contextlib, io, json, sys
from prefab.pipelines.cli.main import main

ended = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["prefab", *words]
    code, err = 0, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    ended.append((code, err.getvalue()))
print(json.dumps(ended))
"""


def ended(before, commands):
    """The exit code and the error output of each command, run after `before` in its namespace."""
    program = shlex.join([sys.executable, "-c", COMMANDS, json.dumps(commands)])
    made = subprocess.run([*before[:-1], before[-1] + program], capture_output=True, text=True)
    if re.search("^(mount|unshare|setpriv):", made.stderr, re.M):
        pytest.skip("mounting is not allowed here")
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


def read_only(folders, *commands):
    """Run commands where the folders are mounted read-only."""
    places = [shlex.quote(str(folder)) for folder in folders]
    script = "".join(
        f"mount --bind {at} {at} && mount -o remount,ro,bind {at} && " for at in places
    )
    return ended(["unshare", "-m", "bash", "-c", script], commands)


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
    outs = [tmp_path / "out-store", tmp_path / "out-moved"]
    commands = []
    for folder, out in zip((store, moved), outs, strict=True):
        commands += [
            [*words, "--store", str(folder)]
            for words in (
                ["sql", "SELECT count(*) FROM samples"],
                ["store", "info"],
                ["agreement"],
                ["export", str(out)],
            )
        ]
    for words, (code, told) in zip(commands, read_only([store, moved], *commands), strict=True):
        assert code == 0, (words, told)
    assert all((out / "README.md").exists() for out in outs)
    assert sorted(path.name for path in store.iterdir()) == before


@pytest.mark.slow
def test_a_store_in_shards_is_queried_and_exported_and_view_refuses_it(tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("no unshare")
    scale = {"shards": 2, "local": str(tmp_path / "local")}
    run_sharded(pipeline(tmp_path, store=str(tmp_path / "shards"), scale=scale))
    folder, out = str(tmp_path / "shards"), str(tmp_path / "out")
    *read, (code, told) = read_only(
        [tmp_path / "shards"],
        ["sql", "SELECT count(*) FROM samples", "--store", folder],
        ["agreement", "--store", folder],
        ["export", out, "--store", folder],
        ["view", folder, "--port", "0", "--no-browser"],
    )
    assert [ended for ended, _ in read] == [0, 0, 0], read
    assert code == 1 and told.startswith(f"error {folder} cannot be written, and `prefab view`")
    assert f"prefab store merge {folder} NEW" in told.splitlines()[0]


@pytest.mark.slow
def test_a_run_and_a_rebuild_say_that_they_cannot_write(project, tmp_path):
    store = tmp_path / "store"
    commands = (["run", str(project)], ["store", "rebuild", "--store", str(store)])
    for code, told in read_only([store], *commands):
        assert code == 1 and "Traceback" not in told, told
        assert "cannot be" in told or "Read-only" in told, told


def as_stranger(*commands):
    """Run commands without the privileges by which root writes the files of others."""
    dropped = "--bounding-set=-dac_override,-dac_read_search,-fowner,-chown"
    return ended(["setpriv", dropped, "bash", "-c", ""], commands)


@pytest.mark.slow
def test_the_store_of_another_user_is_read_queried_and_exported(project, tmp_path):
    if os.getuid() or not shutil.which("setpriv"):
        pytest.skip("mounting is not allowed here")
    store, out = tmp_path / "store", tmp_path / "out"
    for path in (store, *store.iterdir()):
        os.chown(path, 65534, 65534)
        path.chmod(0o755 if path.is_dir() else 0o644)
    before = {path.name: path.read_bytes() for path in sorted(store.iterdir())}
    *read, (code, told) = as_stranger(
        ["sql", "SELECT count(*) FROM samples", "--store", str(store)],
        ["store", "info", "--store", str(store)],
        ["store", "verify", str(store)],
        ["export", str(out), "--store", str(store)],
        ["run", str(project)],
    )
    for one, error in read:
        assert one == 0, error
    assert code == 1 and "Traceback" not in told, told
    assert "cannot be opened for writing" in told
    assert {path.name: path.read_bytes() for path in sorted(store.iterdir())} == before
