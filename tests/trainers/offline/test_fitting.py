"""Micro-batches by measurement, weights in bf16 with a copy in fp32, and what a step will take."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from prefab.factory.errors import ConfigError
from prefab.pipelines.cli.main import app
from prefab.trainers.offline import dpo, loop
from prefab.trainers.offline.estimate import estimate
from prefab.trainers.offline.fitting import (
    divisors,
    first_micro_batch,
    largest_that_fits,
    remedies,
)
from prefab.trainers.offline.gpus import data_sheet
from prefab.trainers.offline.master_weights import master_adamw


@given(
    st.integers(1, 96), st.integers(0, 5000), st.integers(1, 500), st.integers(1, 20_000), st.data()
)
def test_the_largest_micro_batch_that_fits_is_found(rows, fixed, a_row, budget, data):
    breaks = data.draw(st.integers(1, 200))  # memory runs out there, before the budget or behind
    tried = []

    def attempt(n):
        assert n not in tried
        tried.append(n)
        return None if n >= breaks else fixed + a_row * n

    fits = [n for n in divisors(rows) if n < breaks and fixed + a_row * n <= budget]
    assert largest_that_fits(divisors(rows), attempt, budget) == max(fits, default=None)


def test_few_tries_are_needed_where_memory_grows_evenly():
    tried = []

    def attempt(n):
        tried.append(n)
        return 1000 + 10 * n

    assert largest_that_fits(divisors(64), attempt, 1000 + 10 * 40) == 32
    assert tried == [1, 2, 32]


def test_a_cpu_takes_eight_rows_and_a_gpu_all_until_it_is_measured():
    assert first_micro_batch("auto", 32, "cpu") == 8 and first_micro_batch("auto", 6, "cpu") == 6
    assert first_micro_batch("auto", 11, "cpu") == 1 and first_micro_batch("auto", 32, "cuda") == 32
    assert first_micro_batch(None, 32, "cpu") == 32 and first_micro_batch(64, 32, "cpu") == 32


def test_small_updates_of_bf16_weights_are_kept_and_saved():
    """Twenty updates of 1/1000 of a weight: in bf16 alone each is lost."""

    def run(steps, saved=None):
        weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimiser = master_adamw()([weight], lr=1e-3, weight_decay=0.0, fused=False)
        if saved is not None:
            weight.data.copy_(saved["weight"])
            optimiser.load_state_dict(saved["state"])
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimiser.step()
        return {"weight": weight.data.clone(), "state": optimiser.state_dict()}

    whole = run(20)
    exact = torch.nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        exact.grad = torch.ones_like(exact)
        plain.step()
    assert torch.equal(whole["state"]["state"][0]["master"], exact.data)
    assert torch.equal(whole["weight"], exact.data.bfloat16()) and whole["weight"][0] < 0.985
    halves = run(10, run(10))
    assert halves["state"]["state"][0]["master"].dtype == torch.float32
    assert torch.equal(halves["state"]["state"][0]["master"], exact.data)


def config(**more):
    data = {"sources": [{"files": "x"}], "max_length": 256}
    return dpo.DpoConfig.model_validate({"model": "prefab-tiny", "out": "o", "data": data, **more})


def test_an_estimate_follows_batch_precision_and_gpu():
    small = estimate(config(micro_batch=8), "dpo", "H100")
    large = estimate(config(micro_batch=32), "dpo", "NVIDIA H100 80GB HBM3")
    assert small.fits and large.activations_gib > 3.5 * small.activations_gib
    assert small.weights_gib == large.weights_gib == pytest.approx(16 * small.parameters / 2**30)
    faster = estimate(config(micro_batch=8, precision="bf16"), "dpo", "H100")
    assert faster.step_s < small.step_s / 10 and faster.activations_gib < small.activations_gib
    huge = config(micro_batch="auto", batch_size=4096, data={"sources": [{"files": "x"}]})
    found = estimate(huge, "dpo", "L4")
    assert found.fits and found.largest_micro_batch < 4096 and found.total_gib < 24
    with pytest.raises(ConfigError, match="'abacus' is not known. Known are H200"):
        estimate(config(), "dpo", "abacus")
    assert data_sheet("NVIDIA GeForce RTX 4090") == (165.0, 24.0)


def test_a_dry_run_estimates_and_trains_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["train", "dpo", "dpo", "--dry-run", "--gpu", "H100", "--json"]
    done = CliRunner().invoke(app, small)
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["fits"] and found["micro_batch"] == 32
    large = [*small[:3], "--dry-run", "--gpu=L4", "--set=batch_size=4096", "--set=micro_batch=4096"]
    done = CliRunner().invoke(app, large)
    told = " ".join(done.stderr.split())
    assert done.exit_code == 1 and re.search(r"Try micro_batch: \d{2,3} \(the result", told)
    assert "nothing is trained" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_reward_model_takes_half_of_a_reward_models_memory(tmp_path, monkeypatch):
    """A row is one answer, not two; neither has a vocabulary's head."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for stage in ("process", "reward"):
        words = ["train", stage, stage, "--dry-run", "--gpu", "H100", "--json"]
        done = CliRunner().invoke(app, [*words, "--set=micro_batch=8", "--set=batch_size=8"])
        assert done.exit_code == 0, done.output
        found[stage] = json.loads(done.stdout)
    one, two = found["process"], found["reward"]
    assert one["weights_gib"] == two["weights_gib"] and one["fits"]
    assert one["activations_gib"] == pytest.approx(two["activations_gib"] / 2, rel=0.01)
    assert one["step_s"] == pytest.approx(two["step_s"] / 2, rel=0.01)
    assert one["tokens_a_step"] == 8 * 512


def test_what_takes_less_memory_is_told_in_order():
    assert remedies(config()) == (
        "Try micro_batch: 1 (the result stays the same), precision: bf16, lora: {rank: 16}, "
        "a smaller data.max_length"
    )
    more = {"micro_batch": "auto", "precision": "bf16", "lora": {"rank": 4}}
    assert remedies(config(**more)) == "Try lora: {bits: 4}, a smaller data.max_length"


def test_a_step_may_be_cut_otherwise_after_the_trainer_is_made():
    class Args:
        per_device_train_batch_size = per_device_eval_batch_size = 16
        gradient_accumulation_steps = 2

    class Trainer:
        args = Args()

    loop.set_micro_batch(Trainer, 8)
    assert (Args.per_device_train_batch_size, Args.gradient_accumulation_steps) == (16, 2)
    assert (Trainer.args.per_device_train_batch_size, Trainer._train_batch_size) == (8, 8)
    assert Trainer.args.gradient_accumulation_steps == 4
