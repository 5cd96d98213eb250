"""The benchmarks of training: what they count, that those for a GPU refuse to run without one, and
that their quick looks compare the same steps."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks import common, gpu_training, ppo_speed, train_speed
from benchmarks.gpu_training import flops

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "tie_word_embeddings": True,
}


def test_model_flops_by_hand():
    """A layer: four 8 x 8 of attention, three 8 x 16 of the MLP, two norms of 8; one more norm; the
    head 8 x 50, tied."""
    body = 3 * (4 * 64 + 3 * 128 + 2 * 8) + 8
    rows = [
        {"prompt_ids": [1] * 5, "chosen_ids": [1] * 3, "rejected_ids": [1] * 2}
    ]  # 8 and 7 tokens
    dpo = sum(t * (6 * (body + 400) + 12 * 3 * 8 * t) for t in (8, 7)) * 4 / 3
    assert flops("dpo", LlamaForCausalLM(LlamaConfig(**SHAPE)), rows) == (15, pytest.approx(dpo))
    whole = [{"chosen_ids": [1] * 8, "rejected_ids": [1] * 7}]
    reward = sum(t * (6 * (body + 8) + 12 * 3 * 8 * t) for t in (8, 7))  # a head of 8 x 1
    model = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1))
    assert flops("reward", model, whole) == (15, pytest.approx(reward))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(training_forks):
    done = training_forks.run(["-m", "benchmarks.gpu_training"])
    assert done.returncode == 2 and "needs a GPU" in done.stderr and "Traceback" not in done.stderr


def test_a_quick_look_takes_the_same_steps_on_all_sides(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    results = gpu_training.main(["--quick"])
    written = json.loads((tmp_path / "gpu_training.quick.json").read_text())
    assert written["results"] == results
    assert [(f["stage"], len(f["contenders"])) for f in results] == [("dpo", 2), ("reward", 1)]
    for found in results:
        assert not found["errors"] and not found["left_out"] and "error" not in found
        for f in found["contenders"]:
            assert all(gap < 1e-5 for gap in f["losses_differ_by_at_most"].values())
            assert all(0 < loss < 2 for loss in f["losses"])
    assert results[1]["contenders"][0]["parts_a_step"] == 2
    assert results[0]["reference"]["fp32"]["difference"] == 0.0


@pytest.mark.slow
def test_a_quick_look_at_training_has_the_losses_of_trl(monkeypatch):
    monkeypatch.setattr(train_speed, "write", lambda *_, **__: None)
    for found in train_speed.main(["--quick", "--threads", "1"]):
        assert 0 < found["losses_differ_by_at_most"] < 1e-5
        assert found["last_loss"] != found["first_loss"]  # it trains
        assert found["times_trl"].keys() == found["seconds"].keys() == {"trl", "ours"}


@pytest.mark.slow
def test_a_quick_look_at_ppo_has_the_same_losses_however_many_answers_a_forward(monkeypatch):
    monkeypatch.setattr(ppo_speed, "write", lambda *_, **__: None)
    found = ppo_speed.main(["--quick"])
    assert found.keys() == {"ours", "ours, double"}
    one, two = (f.pop("losses") for f in found.values())
    assert len(one) == 2 and torch.allclose(torch.tensor(one), torch.tensor(two), atol=1e-5)
    assert all(loss for step in one for loss in step)
    for figures in found.values():
        assert figures["tokens_a_step"] > 8 and 0 < figures["generation_share"] < 1
        assert len(figures["steps"]) == 2


def test_what_the_time_does_not_allow_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_training, "long_pairs", lambda *_: None)
    monkeypatch.setattr(gpu_training.train_speed, "token_rows", lambda *_: None)
    found: dict[str, object] = {}
    case = gpu_training.Case("dpo", "m", 3, 2)
    gpu_training.run_case(found, case, ("ours", "trl"), tmp_path, 1, None, lambda: True)
    assert found["left_out"] == ["ours", "trl"] and not found["contenders"]
