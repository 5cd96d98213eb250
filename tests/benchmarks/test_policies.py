"""Answers to the test prompts are sampled once; what the oracle says of them is never kept."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict

from benchmarks import policies
from prefab.factory.microworld import grammar
from prefab.pipelines.evaluation.policy import gold_of
from prefab.pipelines.evaluation.policy_metrics import PolicyAnswer


def test_kept_answers_are_read_by_the_oracle_anew_and_not_sampled(tmp_path):
    args = Namespace(folder=tmp_path, answers=1, seeds=2, only=1, threads=1)
    model = tmp_path / "sft-1"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"no weights: to sample from it would fail")
    named = policies.numbered(args, {"SFT": [str(model)]})
    assert named == {"SFT #1": str(model)}
    prompts = grammar.prompts("held", 2)
    texts = ["You are too slow to do this.", "I cannot assist with this request."]
    kept = policies.answers_file(args, "SFT #1", str(model), prompts)
    kept.parent.mkdir()
    stale = [
        asdict(PolicyAnswer(k, text, 5, True, -1.0, -2.0, {"gold": 0.5}, group="g"))
        for k, text in enumerate(texts)
    ]
    kept.write_text(json.dumps(stale))
    found = policies.answers(args, named, prompts)["SFT #1"]
    assert [a.text for a in found] == texts and found[0].logp == -1.0 and found[0].group == "g"
    assert [a.gold for a in found] == [
        gold_of(prompt, text) for prompt, text in zip(prompts, texts, strict=True)
    ]
    assert found[0].gold["gold"] < 0  # not what was kept
    (model / "model.safetensors").write_bytes(b"trained again")
    assert policies.answers_file(args, "SFT #1", str(model), prompts) != kept
    assert policies.answers_file(args, "SFT #1", str(model), prompts[:1]) != kept
