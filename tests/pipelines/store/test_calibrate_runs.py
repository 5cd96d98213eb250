"""Whole runs whose `p_chosen` is calibrated: on the embedded world's oracle, and with people in the
panel."""

from __future__ import annotations

import orjson
import polars as pl
import pytest

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.microworld import oracle
from prefab.factory.types import Message
from prefab.pipelines.quality import labeling
from prefab.pipelines.run.runner import run
from prefab.pipelines.store.calibrate import calibrate
from prefab.pipelines.store.fill import query
from prefab.pipelines.store.ground_truth import truth
from tests.support import noisyworld, planted, project
from tests.support.store_rows import checked

PAIRS = """
SELECT p.*, q.split, q.messages, c.text AS good, j.text AS bad FROM preferences p
JOIN prompts q USING (prompt)
JOIN samples c ON c.run = p.run AND c.prompt = p.prompt AND c."index" = p.chosen
JOIN samples j ON j.run = p.run AND j.prompt = p.prompt AND j."index" = p.rejected"""


def microworld(folder):
    """Every fifth prompt is of the validation split."""
    return {
        "recipe": "rlaif",
        "name": "world",
        "store": str(folder / "store"),
        "constitution": "constitutions/microworld.yaml",
        "prompts": {"source": "microworld", "split": "train+val", "limit": 320, "seed": 1},
        "engines": {"local": {"engine": "scripted"}},
        "policy": {"engine": "local", "samples": 3, "temperature": 1.0, "max_tokens": 64},
        "panel": {"judges": [{"name": "judge", "kind": "pairwise"}], "selection": "all"},
        "pairs": "adjacent",
    }


def gold(messages, good, bad):
    """1 where the oracle prefers the chosen answer too, 0 for the other, None where it has none."""
    talk = tuple(Message(role, text) for role, text in orjson.loads(messages))
    side = truth(oracle.assess(talk, good), oracle.assess(talk, bad), "")
    return {"a": 1.0, "b": 0.0}.get(side)


@pytest.mark.slow
def test_a_run_of_the_embedded_world_is_calibrated_on_the_oracle(tmp_path):
    answer = noisyworld.judge("judge", right=0.9, sure=0.6)
    engines = {"local": Scripted(ScriptedConfig(), answer)}
    result = run(microworld(tmp_path), engines=engines)
    assert (result.state, result.failed) == ("done", 0) and "oracle" in result.p_chosen
    found = query(result.store, PAIRS)
    assert set(found["calibrated"]) == {"oracle"}
    train = found.filter(pl.col("split") == "train")  # of which the calibration has seen nothing
    right = [gold(*row) for row in train.select("messages", "good", "bad").iter_rows()]
    known = train.with_columns(right=pl.Series(right, dtype=pl.Float64)).drop_nulls("right")
    right, said, share = (known[name].mean() for name in ("right", "p_chosen", "vote_share"))
    assert known.height > 60 and abs(said - right) < 0.06 < abs(share - right)
    checked(result.store)
    assert run(microworld(tmp_path), engines=engines).asked == 0
    assert query(result.store, PAIRS).sort("preference").equals(found.sort("preference"))


@pytest.mark.slow
def test_people_in_the_panel_are_part_of_the_vote_and_no_gold_for_it(tmp_path):
    judges = [{"name": "cheap", "kind": "pairwise"}, {"name": "people", "kind": "human"}]
    panel = {"judges": judges, "escalate": {"to": ["people"]}}
    value = project.pipeline(tmp_path, 40, panel=panel)
    value["engines"] = {"local": {"engine": "scripted", "model": "local"}}
    engines = {"local": planted.two_engines()["local"]}
    first = run(value, engines=engines)
    assert first.awaited > 0
    with labeling.open_session(first.store, "", "ann") as session:
        for task in session.todo:
            session.say("a" if "good" in task.shown[0] else "b")
    second = run(value, engines=engines)
    assert second.awaited == 0 and run(value, engines=engines).asked == 0
    sources = set(second.preferences["calibrated"])
    assert "human" not in sources and sources <= {"retest", None}
    with pytest.raises(ConfigError, match="already part of the vote"):
        calibrate(second.store, source="human")
    checked(second.store)
