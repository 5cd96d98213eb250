"""Ctrl-C, SIGTERM and SIGHUP in each phase of real processes: what is kept and the command that
goes on are said, the exit code tells the signal, and that command goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support.project import pipeline, write

DRIVER = str(Path(__file__).parents[2] / "support" / "signal_driver.py")
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


def finish(forks, *words):
    made = forks.run([DRIVER, "-", *words], timeout=300)
    assert made.returncode == 0, made.stderr
    return made


def stopped(process, number):
    """Send the signal once the phase is reached; what the process says at its end."""
    assert process.stdout.readline() == "reached\n", process.communicate()[1]
    process.send_signal(number)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 128 + number, told
    assert f"stopped by {NAMES[number]}: " in told and "Traceback" not in told
    assert "The same command goes on" in told and "next: prefab " in told
    return told


@pytest.fixture
def project(tmp_path):
    budget = {"unscored": None, "failed": None}
    return write(tmp_path, pipeline(tmp_path, prompts=20, budget=budget))


@pytest.mark.parametrize(
    ("phase", "number", "kept"),
    [
        ("opening", signal.SIGTERM, "all answers so far are in the ledger"),
        ("asking", signal.SIGINT, "all answers so far are kept"),
        ("filling", signal.SIGHUP, "answers of this run are in the ledger"),
        *(
            pytest.param(phase, number, kept, marks=pytest.mark.slow)
            for phase, number, kept in (
                ("asking", signal.SIGTERM, "all answers so far are kept"),
                ("asking", signal.SIGHUP, "all answers so far are kept"),
                ("filling", signal.SIGINT, "answers of this run are in the ledger"),
                ("filling", signal.SIGTERM, "answers of this run are in the ledger"),
            )
        ),
    ],
)
def test_a_run_that_is_told_to_stop(project, phase, number, kept, forks):
    told = stopped(forks.start([DRIVER, phase, "run", project, "-q"]), number)
    assert kept in told and " 0 answers" not in told
    assert "reused" in finish(forks, "run", project).stdout


def test_the_other_commands(project, tmp_path, forks):
    finish(forks, "run", project, "-q")
    store = ["--store", tmp_path / "store"]
    for phase, words, kept in (
        ("planning", ["plan", project], "a plan changes nothing"),
        ("exporting", ["export", *store, tmp_path / "out"], "earlier export"),
        ("filling", ["store", "rebuild", *store], "the ledger has everything"),
        ("asking the store", ["sql", "SELECT 1", *store], "the ledger has everything"),
    ):
        assert kept in stopped(forks.start([DRIVER, phase, *words]), signal.SIGTERM)
    assert not list((tmp_path / "out").glob("*"))
    finish(forks, "store", "info", *store)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_second_signal_ends_the_process_at_once(project, number, forks):
    process = forks.start([DRIVER, "stuck", "run", project, "-q"])
    for _ in range(2):
        assert process.stdout.readline() == "reached\n"
        process.send_signal(number)
    process.wait(timeout=120)
    assert process.returncode == 128 + number
    finish(forks, "run", project, "-q")
