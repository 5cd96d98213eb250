"""The benchmark of calibration, its part on labels, on a small run with a scripted judge."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import polars as pl
import pytest

from benchmarks import calibration
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.pipelines.run.runner import run
from tests.support import noisyworld


@pytest.mark.slow
def test_the_oracles_calibration_comes_closer_to_the_truth_than_the_share(tmp_path: Path, capsys):
    args = Namespace(folder=tmp_path, engine="hf", prompts=320, samples=3, judges=["tiny"])
    source = calibration.pipeline(args, "tiny")
    answer = noisyworld.judge("judge", right=0.9, sure=0.6)
    done = run(source, engines={"policy": Scripted(ScriptedConfig(), answer)})
    assert done.state == "done"
    frame = calibration.pairs(args, "tiny")
    train = frame.filter(pl.col("split") == "train")
    found = calibration.errors(train, draws=20)
    assert set(found) == {"share", "retest", "oracle"}
    assert found["oracle"]["ece"]["value"] < 0.1 < found["share"]["ece"]["value"]
    assert found["share"]["marked"] == found["share"]["pairs"] > found["oracle"]["marked"]
    calibration.show({"tiny": found}, {}, {})
    assert "| tiny | oracle |" in capsys.readouterr().out
