"""Which runs are the same run: what decides neither what is asked nor what is answered makes no new
version."""

from __future__ import annotations

import shutil

import pytest

from prefab import run
from tests.support import project


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a finished run, and its pipeline."""
    folder = tmp_path_factory.mktemp("identity")
    value = project.pipeline(folder)
    assert run(value, engines=project.engine()).version == 1
    return folder, value


@pytest.mark.slow_but("change1-1", "change3-2")
@pytest.mark.parametrize(
    ("change", "version"),
    [
        ({"engines": {"local": {"engine": "scripted", "max_in_flight": 3, "delay_s": 0.001}}}, 1),
        ({"budget": {"failed": 0.5, "calls": 10_000}}, 1),
        ({"export": {"format": "parquet"}}, 1),
        ({"seed": 7}, 2),
        ({"engines": {"local": {"engine": "scripted", "max_model_len": 4096}}}, 2),
        ({"pairs": "adjacent"}, 2),
    ],
)
def test_only_what_decides_makes_a_new_version(made, tmp_path, change, version):
    folder, value = made
    shutil.copytree(folder / "store", tmp_path / "store")  # another folder than that of the run
    changed = {**value, **change, "store": str(tmp_path / "store")}
    result = run(changed, engines=project.engine())
    assert (result.version, result.resumed) == (version, version == 1)
    if version == 1:
        assert result.asked == 0
    assert run(changed, engines=project.engine()).version == version


def test_the_same_configuration_is_found_before_one_that_differs_in_what_does_not_decide(
    made, tmp_path
):
    folder, value = made
    shutil.copytree(folder / "store", tmp_path / "store")
    moved = {**value, "store": str(tmp_path / "store")}
    assert run({**moved, "seed": 7}, engines=project.engine()).version == 2
    assert run(moved, engines=project.engine()).version == 1
