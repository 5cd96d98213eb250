"""`prefab calibrate`: p_chosen becomes a probability, and the store can be made again."""

import asyncio
import json
from hashlib import sha256

import polars as pl
import pytest

from prefab.factory.errors import ConfigError
from prefab.factory.ledger.ledger import Ledger
from prefab.pipelines.quality.agreement import measure
from prefab.pipelines.quality.calibrate import calibrate
from prefab.pipelines.run.runner import run
from prefab.pipelines.store.export.base import export
from prefab.pipelines.store.fill import query
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
    return run(project.pipeline(folder, prompts=prompts), engines=planted.engine(say=timid))


async def label(store, rows):
    ledger = Ledger.open(store)
    for row in rows:
        ledger.add_human_label(row)
    await ledger.close()


@pytest.fixture
def labelled(tmp_path):
    """A run whose people know the truth of every comparison with the good answer (number 1)."""
    result = made(tmp_path)
    rows = [
        {"prompt": f"p{i}", "a": a, "b": b, "winner": "b" if b == 1 else "a", "annotator": "me"}
        for i in range(PROMPTS)
        for a, b in ((0, 1), (1, 2))
    ]
    asyncio.run(label(result.store, rows))
    return tmp_path, result


def preferences(store):
    return query(
        store, "SELECT * FROM preferences WHERE outcome IN ('a', 'b') ORDER BY prompt, a, b"
    )


def test_p_chosen_comes_true_and_the_share_is_kept(labelled):
    folder, result = labelled
    before = preferences(result.store)
    assert before["p_chosen"].equals(before["vote_share"]) and not before["calibrated"].any()
    assert before["p_chosen"].max() < 0.65  # a share of votes
    found = calibrate(result.store)
    assert found.calibration.method != "none" and "1 person" in found.source
    after = preferences(result.store)
    assert after["vote_share"].equals(before["vote_share"]) and after["calibrated"].all()
    truth = pl.when(pl.col("b") == 1).then(pl.lit("b")).otherwise(pl.lit("a"))
    known = after.filter((pl.col("a") == 1) | (pl.col("b") == 1))
    right = known.select((pl.col("outcome") == truth).mean()).item()
    assert abs(known["p_chosen"].mean() - right) < 0.05 and 0.7 < right < 0.9
    assert found.calibration.after.ece < found.calibration.before.ece
    checked(result.store)
    again = made(folder)
    assert (again.asked, again.state) == (0, "done")
    assert preferences(result.store).equals(after)


def test_agreement_and_the_card_say_what_it_is(labelled, tmp_path):
    _, result = labelled
    export(result.store, tmp_path / "one", "trl")
    assert "not a calibrated probability" in (tmp_path / "one" / "README.md").read_text()
    assert measure(result.store, resamples=0)["learned"] is None
    calibrate(result.store, method="temperature")
    export(result.store, tmp_path / "two", "trl")
    card = (tmp_path / "two" / "README.md").read_text()
    assert "calibrated (temperature) on 120 comparisons" in card and "1 person" in card
    learned = measure(result.store, resamples=0)["learned"]
    assert learned["calibration"]["after"]["reliability"]
    rows = pl.read_parquet(next((tmp_path / "two").glob("preference/train*.parquet")))
    assert rows["calibrated"].all() and (rows["p_chosen"] > rows["vote_share"]).all()


def test_without_outcomes_it_says_so_and_changes_nothing(tmp_path):
    result = made(tmp_path, 5)
    before = preferences(result.store)
    found = calibrate(result.store)
    assert found.calibration.method == "none" and found.source == "nobody"
    assert preferences(result.store).equals(before)
    export(result.store, tmp_path / "out", "trl")
    assert "0 known outcomes" in (tmp_path / "out" / "README.md").read_text()
    for words in ({"source": "people"}, {"method": "beta"}):
        with pytest.raises(ConfigError, match="known: auto|did you mean"):
            calibrate(result.store, **words)


def test_the_last_calibration_counts(labelled):
    _, result = labelled
    calibrate(result.store)
    evals = query(result.store, "SELECT value FROM evals WHERE name = 'calibration'")["value"]
    assert json.loads(evals[0])["run"] == result.run
    calibrate(result.store, method="isotonic")
    calibrate(result.store, method="temperature")
    last = json.loads(
        query(result.store, "SELECT value FROM evals ORDER BY rowid DESC LIMIT 1")["value"][0]
    )
    assert last["calibration"]["method"] == "temperature"
    checked(result.store)
