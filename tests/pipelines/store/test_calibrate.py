"""`prefab calibrate`: p_chosen becomes a probability, and the store can be made again."""

import asyncio
import json
import shutil
from dataclasses import replace
from functools import partial
from hashlib import sha256

import polars as pl
import pytest

from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.store import store
from prefab.pipelines.quality.agreement import measure
from prefab.pipelines.run.runner import run
from prefab.pipelines.store.calibrate import calibrate
from prefab.pipelines.store.export.base import export
from prefab.pipelines.store.fill import fill, query
from tests.support import planted, project
from tests.support.store_rows import checked

PROMPTS = 60


def timid(request):
    """Verdicts that lean to the good answer by little, and in one of five prompts to the bad."""
    if not (request.labels and "A" in request.labels):
        return None
    text = request.messages[-1].content
    seen = planted.SEEN.findall(text)
    if "good" not in seen:
        return None
    question = planted.re.search(r"Question \d+", text)[0]
    wrong = sha256(question.encode()).digest()[0] % 5 == 0
    right = "A" if (seen[0] == "good") != wrong else "B"
    return planted.read(request.labels, right, 0.40)


def made(folder, prompts=PROMPTS):
    folder.mkdir(exist_ok=True)
    return run(project.pipeline(folder, prompts=prompts), engines=planted.engine(say=timid))


async def label(store, rows):
    ledger = Ledger.open(store)
    for row in rows:
        ledger.add_human_label(row)
    await ledger.close()


@pytest.fixture(scope="module")
def labelled_once(tmp_path_factory):
    """A run whose people know the truth of every comparison with the good answer (number 1)."""
    folder = tmp_path_factory.mktemp("labelled")
    result = made(folder)
    rows = [
        {"prompt": f"p{i}", "a": a, "b": b, "winner": "b" if b == 1 else "a", "annotator": "me"}
        for i in range(PROMPTS)
        for a, b in ((0, 1), (1, 2))
    ]
    asyncio.run(label(result.store, rows))
    return folder, result


@pytest.fixture
def labelled(labelled_once, tmp_path):
    """Runs it again, and its result, on a copy of its store."""
    folder, result = labelled_once
    shutil.copytree(result.store, tmp_path / "store")
    value = {**project.pipeline(folder, prompts=PROMPTS), "store": str(tmp_path / "store")}
    rerun = partial(run, value, engines=planted.engine(say=timid))
    return rerun, replace(result, store=tmp_path / "store")


def preferences(store):
    return query(
        store, "SELECT * FROM preferences WHERE outcome IN ('a', 'b') ORDER BY prompt, a, b"
    )


def test_p_chosen_comes_true_and_the_share_is_kept(labelled):
    rerun, result = labelled
    before = preferences(result.store)
    assert before["p_chosen"].max() < 0.65 and set(before["calibrated"]) == {"retest"}
    found = calibrate(result.store)
    assert found.fitted and found.kind == "human" and "1 person" in found.source
    after = preferences(result.store)
    assert after["vote_share"].equals(before["vote_share"])
    assert set(after["calibrated"]) == {"human"}
    truth = pl.when(pl.col("b") == 1).then(pl.lit("b")).otherwise(pl.lit("a"))
    known = after.filter((pl.col("a") == 1) | (pl.col("b") == 1))
    right = known.select((pl.col("outcome") == truth).mean()).item()
    assert abs(known["p_chosen"].mean() - right) < 0.05 and 0.7 < right < 0.9
    assert found.calibration.after.ece < found.calibration.before.ece
    checked(result.store)
    again = rerun()
    assert (again.asked, again.state) == (0, "done")
    assert preferences(result.store).equals(after)


def evals(store):
    values = query(store, "SELECT value FROM evals WHERE name = 'calibration' ORDER BY rowid")
    return [json.loads(value) for value in values["value"]]


def test_a_run_calibrates_itself_at_its_end_and_asks_nothing(labelled):
    rerun, result = labelled
    assert "not checked against the truth" in result.p_chosen and len(evals(result.store)) == 1
    again = rerun()  # people's labels came meanwhile
    assert again.asked == 0 and "1 person" in again.p_chosen
    assert set(preferences(result.store)["calibrated"]) == {"human"}
    rerun()
    assert len(evals(result.store)) == 2  # nothing new, nothing recorded
    checked(result.store)


def test_the_source_that_was_chosen_stays(labelled):
    rerun, result = labelled
    assert calibrate(result.store, source="none").calibration.method == "none"
    shares = preferences(result.store)
    assert shares["p_chosen"].equals(shares["vote_share"])
    assert shares["calibrated"].null_count() == shares.height
    asyncio.run(label(result.store, [{"prompt": "p0", "a": 0, "b": 1, "winner": "a"}]))
    assert "is off" in rerun().p_chosen
    assert preferences(result.store).equals(shares)
    checked(result.store)


@pytest.mark.slow
def test_second_answers_can_make_a_judge_less_sure_but_never_surer(tmp_path):
    steady = made(tmp_path / "steady")
    assert evals(steady.store)[0]["calibration"]["temperature"] == 1.0
    (tmp_path / "pulled").mkdir()
    value = project.pipeline(tmp_path / "pulled", prompts=PROMPTS)
    pulled = run(value, engines=planted.engine(say=unsteady))
    (found,) = evals(pulled.store)
    assert found["kind"] == "retest" and found["calibration"]["temperature"] > 1.5
    rows = preferences(pulled.store)
    assert (rows["p_chosen"] <= rows["vote_share"] + 1e-9).all()


def unsteady(request):
    """Verdicts for the good answer that are a little surer in one order, and in half of the prompts
    name the other answer in the other order.
    """
    if not (request.labels and "A" in request.labels):
        return None
    text = request.messages[-1].content
    seen = planted.SEEN.findall(text)
    if "good" not in seen:
        return None
    turned = int(planted.re.search(r"Question (\d+)", text)[1]) % 2 and seen[0] != "good"
    right = "A" if (seen[0] == "good") != bool(turned) else "B"
    return planted.read(request.labels, right, 0.35 if turned else 0.49)


def test_runs_that_cannot_be_calibrated_say_why(tmp_path):
    value = project.pipeline(tmp_path, prompts=PROMPTS)
    value["panel"]["selection"] = "lexicographic"
    result = run(value, engines=planted.engine(say=timid))
    assert "lexicographic" in result.p_chosen and "share of the judges' vote" in result.p_chosen
    with pytest.raises(ConfigError, match="lexicographic"):
        calibrate(result.store)
    rows = preferences(result.store)
    assert rows["calibrated"].null_count() == rows.height


@pytest.mark.slow
def test_agreement_and_the_card_say_what_it_is(labelled, tmp_path):
    _, result = labelled
    export(result.store, tmp_path / "one", "trl")
    assert "not checked against the truth" in (tmp_path / "one" / "README.md").read_text()
    assert measure(result.store, resamples=0)["learned"]["kind"] == "retest"
    calibrate(result.store, method="temperature")
    export(result.store, tmp_path / "two", "trl")
    card = (tmp_path / "two" / "README.md").read_text()
    assert "calibrated (temperature) on 120 comparisons" in card and "1 person" in card
    learned = measure(result.store, resamples=0)["learned"]
    assert learned["calibration"]["after"]["reliability"]
    rows = pl.read_parquet(next((tmp_path / "two").glob("preference/train*.parquet")))
    assert set(rows["calibrated"]) == {"human"} and (rows["p_chosen"] > rows["vote_share"]).all()


@pytest.mark.slow
def test_without_outcomes_it_says_so_and_changes_nothing(tmp_path):
    result = made(tmp_path, 5)
    before = preferences(result.store)
    assert not evals(result.store) and "10 known outcomes, and 20" in result.p_chosen
    export(result.store, tmp_path / "out", "trl")
    assert "too few comparisons" in (tmp_path / "out" / "README.md").read_text()
    found = calibrate(result.store)
    assert found.calibration.method == "none" and found.source == "nobody"
    assert preferences(result.store).equals(before)
    export(result.store, tmp_path / "again", "trl")
    assert "10 known outcomes" in (tmp_path / "again" / "README.md").read_text()
    for words in ({"source": "people"}, {"method": "beta"}):
        with pytest.raises(ConfigError, match="known: auto|did you mean"):
            calibrate(result.store, **words)


@pytest.mark.slow
def test_the_last_calibration_counts(labelled):
    _, result = labelled
    calibrate(result.store, method="isotonic")
    calibrate(result.store, method="temperature")
    last = evals(result.store)[-1]
    assert last["run"] == result.run and last["calibration"]["method"] == "temperature"
    checked(result.store)


async def calibration_of_temperature(store, temperature):
    """Record the run's last calibration again, with another temperature."""
    value = evals(store)[-1]
    value["calibration"] |= {"method": "temperature", "temperature": temperature}
    ledger = Ledger.open(store)
    ledger.add_eval(value)
    await ledger.close()


@pytest.mark.slow
def test_a_new_calibration_changes_preferences_without_reading_answers(labelled):
    _, result = labelled
    judged = "SELECT count(*) FROM preferences WHERE NOT identical"
    pairs = query(result.store, judged).item()
    asyncio.run(calibration_of_temperature(result.store, 3.0))
    rows = fill(result.store).rows
    assert rows["preferences"] == pairs and not rows.get("verdicts") and not rows.get("samples")
    checked(result.store)
    with store.opened(result.store) as con:  # its verdicts do not give this id
        con.execute(
            "UPDATE preferences SET preference = 'x' WHERE prompt = 'p3' AND a = 0 AND b = 1"
        )
    asyncio.run(calibration_of_temperature(result.store, 2.0))
    rows = fill(result.store).rows
    assert 0 < rows["verdicts"] < 20 and 0 < rows["samples"] < 10
    checked(result.store)
