"""The benchmark of calibration, its part on labels, on a small run with a scripted judge."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks import calibration
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.pipelines.run.runner import run
from tests.support import noisyworld


@pytest.mark.slow
def test_the_oracles_calibration_comes_closer_to_the_truth_than_the_share(tmp_path: Path, capsys):
    args = Namespace(
        folder=tmp_path, engine="hf", prompts=320, samples=3, judges=["tiny"], store=None, run=""
    )
    source = calibration.pipeline(args, "tiny")
    answer = noisyworld.judge("judge", right=0.9, sure=0.6)
    done = run(source, engines={"policy": Scripted(ScriptedConfig(), answer)})
    assert done.state == "done"
    frame = calibration.pairs(args, "tiny")
    train = frame.filter(pl.col("split") == "train")
    found = calibration.errors(train, draws=20)
    assert set(found) == {"share", "retest", "oracle"}
    assert found["oracle"]["ece"].value < 0.1 < found["share"]["ece"].value
    assert found["share"]["marked"] == found["share"]["pairs"] > found["oracle"]["marked"]
    calibration.show({"tiny": found}, {}, {})
    assert "| tiny | oracle |" in capsys.readouterr().out


def test_an_interval_over_seeds_is_students():
    found = calibration.over_seeds(np.array([0.1, 0.2, 0.3]))
    assert found["value"] == pytest.approx(0.2)
    assert found["high"] - 0.2 == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)  # t of 2 degrees
    assert calibration.over_seeds(np.array([0.1]))["high"] == float("inf")


@pytest.mark.slow
def test_its_quick_size_goes_through(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "write", lambda *args, **results: None)
    words = ["calibration", "--folder", str(tmp_path), "--quick", "--model", "prefab-nano"]
    monkeypatch.setattr(sys, "argv", words)
    calibration.main()
    text = capsys.readouterr().out
    assert "| tiny, oracle |" in text and "gold, difference over seeds" in text
