"""The quick form of `make torture`: a few of each part, spread over what the full form tries."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.torture import crash_states, hostile, kills, server_faults
from tests.torture.__main__ import markdown
from tests.torture.lab import ROOT, committed, lab

NEEDS_SHIM = pytest.mark.skipif(
    not (shutil.which("gcc") or shutil.which("cc")), reason="no C compiler"
)
POINTS = ["after_commit:4", "mid_fill:1"]
FAULTS = ["two choices", "503"]
HOSTILE = ["YAML: aliases that grow", "sql: writes a file", "store: the ledger is zeros"]


@pytest.fixture(scope="module")
def started():
    """A lab that all tests of this file share, and what an undisturbed run leaves."""
    with lab(shim=True, **server_faults.QUICK) as here:
        here.undisturbed()
        yield here, here.questions, here.rows


@pytest.fixture
def here(started):
    lab, lab.questions, rows = started
    lab.rows = dict(rows)
    return lab


def well(results):
    """No problem anywhere, and something was tried."""
    results = list(results)
    assert results
    assert {r.place: r.problems for r in results if r.problems} == {}
    return results


@pytest.mark.slow
def test_kills_lose_no_answer_and_leave_the_same_store(here):
    assert all(result.killed for result in well(kills.named(here, POINTS)))
    well(kills.at_random(here, 1, seed=1))


@NEEDS_SHIM
def test_crashes_and_power_cuts_lose_no_committed_answer(here):
    operations = crash_states.recorded(here, kills.RUN)
    assert sum(one.kind == "S" for one in operations) > 10
    for how, every in (("all", 440), ("drop", 800), ("some", 680)):
        for place, sure in crash_states.states(here, operations, how, every):
            assert crash_states.check_state(here, sure) == [], place
    well(kills.at_operations(here, 2))


@pytest.mark.slow
def test_server_faults_invent_no_verdict_and_are_mended(here):
    well(server_faults.faults(here, FAULTS, ("middle",)))


def test_hostile_files_are_refused_in_words(here):
    here.undisturbed()
    well(hostile.hostile(here, HOSTILE))


def test_the_page_has_the_figures():
    figures = json.loads((ROOT / "benchmarks" / "results" / "torture.json").read_text())
    assert markdown(figures) in (ROOT / "docs" / "reliability.md").read_text()


@pytest.mark.slow
def test_the_checks_see_what_they_look_for(here):
    """A committed answer that is lost or asked again, and a store that differs, are problems."""
    here.undisturbed()
    before = committed(here.store)
    here.reset()
    ended = here.prefab("run", "pipeline.yaml", "-q")
    asked_again = kills.promise(here, "", ended, before, [], list(before))
    assert asked_again.problems == [f"{len(before)} committed answers were asked again"]
    here.rows["verdicts"] = here.rows["verdicts"][1:]
    assert here.differences() == "verdicts differs"
    shutil.rmtree(here.store)
    lost = kills.promise(here, "", here.prefab("check", "pipeline.yaml"), before, [], [])
    assert lost.problems == [f"{len(before)} committed answers are lost"]
