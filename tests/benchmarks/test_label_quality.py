"""The table of methods on judges whose faults are known: what must help helps, and what cannot is
not said to."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import label_quality as lq
from prefab import run
from prefab.pipelines.quality.rating_matrix import load_matrix
from prefab.pipelines.store.selection import select
from tests.support import noisyworld

NAN = np.nan
JUDGES = {
    "tiny": {"right": 0.97},
    "nano": {"right": 0.7, "sure": 0.8},
    "tiny-curt": {"right": 0.95},
    "nano-curt": {"right": 0.9, "sure": 0.6, "pull": 1.6},
    "contrary": {"right": 0.8, "mean": True, "sure": 0.95},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    value, engines = noisyworld.pipeline(folder, JUDGES, prompts=36, name="label-quality")
    assert run(value, engines=engines).state == "done"
    return folder / "store"


@pytest.fixture(scope="module")
def found(store):
    return lq.measure(store, "label-quality", "nano", "tiny")


def row(found, method, against, measure="right"):
    return next(
        r
        for r in found["rows"]
        if (r["method"], r["measure"]) == (method, measure) and against in r["against"]
    )


def test_scores_by_hand():
    gold = np.array([1, 1, 0, 0.5, NAN, 1])
    p = np.array([0.9, 0.2, 0.5, 0.9, 0.9, NAN])
    assert np.array_equal(lq.right(p, gold), [1, 0, 0.5, NAN, NAN, NAN], equal_nan=True)
    assert np.array_equal(
        lq.three_way(np.array([1, 0.5, 0, 0.5, 1, NAN]), gold),
        [1, 0, 1, 1, NAN, NAN],
        equal_nan=True,
    )
    assert lq.closeness(p, gold)[:3] == pytest.approx([-0.01, -0.64, -0.25])
    assert (
        lq.surprise(p, gold)[:3] == pytest.approx(np.log([0.9, 0.2, 0.5]))
        and np.isnan(lq.surprise(p, gold)[3:]).all()
    )
    assert lq.surprise(np.array([0.0]), np.array([1.0])) == pytest.approx(np.log(lq.EDGE))
    sure_tie, torn = lq.certainty(np.array([0.5, 0.5]), np.array([0.98, 0.0]))
    assert (sure_tie, torn) == (pytest.approx(0.98), pytest.approx(0.5))


def test_a_method_helps_only_where_its_interval_says_so():
    prompts, ones = np.arange(400), np.ones(400)
    half = np.where(prompts % 2 == 0, 1.0, 0.0)
    assert lq.compare("q", "m", ones, "o", half, prompts).verdict == "helps"
    assert lq.compare("q", "m", half, "o", ones, prompts).verdict == "hurts"
    assert lq.compare("q", "m", half, "o", 1 - half, prompts).verdict == "no difference seen"
    assert lq.compare("q", "m", ones, "o", np.full(400, NAN), prompts).verdict.startswith(
        "no reading"
    )


def test_known_faults_give_known_rows(found):
    assert (
        row(found, "nano-curt: mean of both", "one order")["verdict"] == "helps"
    )  # pulled to the first slot
    assert row(found, "tiny-curt: mean of both", "one order")["verdict"] == "no difference seen"
    for other in ("majority", "mean probability"):
        assert row(found, "Dawid-Skene, one judge bad", other)["verdict"] == "helps"
    assert row(found, "panel of 4", "best member (tiny")["verdict"] == "helps"  # they err apart
    assert row(found, "nano: probabilities", "nano: votes", "-Brier")["verdict"] == "helps"
    assert (
        found["judges"]["tiny"]["value"]
        > 0.9
        > found["judges"]["nano"]["value"]
        > found["judges"]["contrary"]["high"]
    )
    assert len(found["rows"]) == 5 + 3 * 6 + 2 + 6 + 12 and {
        r["verdict"] for r in found["rows"]
    } <= {"helps", "hurts", "no difference seen"}


def test_escalation_asks_a_third_where_it_is_needed(found, store):
    assert all(share == pytest.approx(1 / 3, abs=0.02) for share in found["escalated"].values())
    sure = "tiny for a third, least certain label"
    assert row(found, sure, "nano alone")["verdict"] == "helps"
    assert row(found, sure, "drawn", "right, ties included")["verdict"] == "helps"
    # Most readings are ties: the nearest to a half are those of which the judge is sure that they
    # are ties.
    assert row(found, "tiny for a third, nearest to a half", "drawn")["verdict"] == "hurts"
    data, _ = load_matrix(select(store, "label-quality"))
    value = np.random.default_rng(0).random(len(data.p))
    chosen = lq.third(value, data)
    for prompt in range(int(data.prompts.max()) + 1):
        mine = data.prompts == prompt
        n = int((chosen & mine).sum())
        assert abs(n - mine.sum() / 3) < 1
        assert n == 0 or value[mine & chosen].max() < value[mine & ~chosen].min()


def test_the_best_member_is_chosen_on_other_prompts(store):
    data, _ = load_matrix(select(store, "label-quality"))
    scores, names = lq.best_member(data)
    assert names in ("tiny", "tiny-curt", "tiny and tiny-curt")
    assert np.array_equal(np.isnan(scores), ~np.isin(data.gold, (0.0, 1.0)))


def test_a_run_without_the_judges_says_so(store):
    with pytest.raises(SystemExit, match="no judge huge"):
        lq.measure(store, "label-quality", "nano", "huge")
