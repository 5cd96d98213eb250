"""The benchmark of people's labels measures the judge that it is given, in each of its sizes."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from benchmarks import human
from tests.support import project
from tests.support.family_server import family_server


def pairs_file(folder, pairs):
    rows = [
        {
            "chosen": f"\n\nHuman: Question {i}?\n\nAssistant: Good {i}.",
            "rejected": f"\n\nHuman: Question {i}?\n\nAssistant: Bad {i}.",
        }
        for i in range(pairs)
    ]
    file = folder / "hh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_people_s_pairs_are_trained_on_as_trl_does(tmp_path):
    args = Namespace(hh=pairs_file(tmp_path, 60), work=tmp_path, model="prefab-nano")
    found = human.training(args, human.SIZES["quick"])
    assert (found["pairs that fit"], found["trained on"], found["tested on"]) == (60, 12, 8)
    assert found["trl"]["largest gap"] < 1e-4
    for stage in ("reward model", "dpo"):
        assert 0 <= found[stage]["held out"]["right"]["value"] <= 1
    text = human.page({"training": {**found, "size": "quick", "took_s": 1}})
    assert "Prefab and TRL train on the same file of 4 pairs" in text


@pytest.mark.parametrize("size", ["quick", "cpu"])
@pytest.mark.parametrize("logprobs", ["given", "refused"])
def test_a_named_judge_is_measured_against_people(tmp_path, size, logprobs):
    pairs = 20
    hh = pairs_file(tmp_path, pairs)
    with family_server(logprobs=logprobs) as server:  # its judge takes the first answer, always
        local = {"engine": "openai", "model": "mock", "base_url": f"{server.url}/v1"}
        source = project.pipeline(tmp_path, engines={"local": local})
        args = Namespace(
            hh=hh, llmbar=None, judge=project.write(tmp_path, source), work=tmp_path / "work"
        )
        args.work.mkdir()
        found = human.judge(args, human.SIZES[size])
    measured = found["sets"]["HH harmless"]
    asked = min(pairs, human.SIZES[size].judged or pairs)
    assert "mock" in found["model"]
    assert (measured["pairs"], measured["unscored"]) == (asked, 0)
    assert measured["picks the first"]["value"] == 1.0
    assert measured["the same answer in both orders"]["value"] == 0.0
    right, swapped = (measured[f"right, {how}"]["value"] for how in ("as they stand", "swapped"))
    assert right + swapped == pytest.approx(1.0)
    text = human.page({"judge": {**found, "size": size, "took_s": 1}})
    assert "A judge against people" in text
