"""The benchmark of PPO and GRPO on a GPU: its quick form measures what a machine without one can,
and names the rest."""

from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")

from benchmarks import common, gpu_ppo
from benchmarks.gpu_ppo import Case, GpuUse


@pytest.mark.parametrize(
    "only",
    [
        ["ours, grpo, dynamic", "vllm"],  # one that is measured, and those that are not
        pytest.param([""], marks=pytest.mark.slow),
    ],
)
def test_a_quick_look_measures_each_sampler_and_names_what_it_left_out(
    monkeypatch, tmp_path, capsys, only
):
    cases = [case for case in gpu_ppo.CASES if any(text in case.name for text in only)]
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    results = {r["case"]: r for r in gpu_ppo.main(["--quick", "--only", *only])}
    written = json.loads((tmp_path / "gpu_ppo.quick.json").read_text())
    assert written["results"] == list(results.values())
    assert results.keys() == {case.name for case in cases} and len(cases) >= 3
    for case in cases:
        found = results[case.name]
        if case.sampler == "vllm":
            assert "vLLM" in found["not_measured"]
            continue
        assert "not_measured" not in found and "note" not in found, found
        assert found["tokens_a_step"] == 8 * 6  # random weights do not end an answer
        assert 0 < found["sampling_share"] < 1 and len(found["steps"]) == 2
    for method in ("ppo", "grpo"):  # the same answers by either cache, and so the same losses
        losses = [
            [step["loss"] for step in results[name]["steps"]]
            for name in (f"ours, {method}, static", f"ours, {method}, dynamic")
            if name in results
        ]
        assert all(one == pytest.approx(losses[0], abs=1e-5) for one in losses)
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in results) and "--quick starts no vLLM" in table


def test_what_fails_or_takes_too_long_is_told_with_what_it_had():
    def fails(tell):
        tell({"s": 1.0})
        raise ValueError("out of memory, say")

    def hangs(tell):
        tell({"s": 1.0})
        time.sleep(600)

    failed = gpu_ppo.in_a_process(fails, 600, GpuUse())
    assert failed["told"] == [{"s": 1.0}] and "out of memory, say" in failed["error"]
    late = gpu_ppo.in_a_process(hangs, 2, GpuUse())
    assert late["late"] == "not done within 2 s" and "error" not in late


def test_figures_by_hand():
    """The first step is left out: 300 tokens in 4 seconds, of which 1 sampled."""
    use = GpuUse()
    use.seen = [(50.0, 10.0), (100.0, 12.0)]
    steps = [
        {"s": 9.0, "generation_s": 8.0, "tokens": 7, "peak_gib": 5.0},
        {"s": 3.0, "generation_s": 0.5, "tokens": 100, "peak_gib": 4.0},
        {"s": 1.0, "generation_s": 0.5, "tokens": 200, "peak_gib": 4.0},
    ]
    assert gpu_ppo.figures(steps, use) == {
        "tokens_per_s": 75.0,
        "sampling_share": 0.25,
        "sampled_tokens_per_s": 300.0,
        "step_s": 2.0,
        "tokens_a_step": 150.0,
        "peak_gib_of_torch": 5.0,
        "peak_gib_of_the_gpu": 12.0,
        "gpu_busy": 0.75,
    }
    assert gpu_ppo.figures(steps[:1], use) == {}


def test_a_case_without_time_or_vllm_is_named(tmp_path, monkeypatch):
    settings = gpu_ppo._settings(["--quick"])
    case = Case("ours", "grpo", "static", 60)
    found = gpu_ppo.measure(case, tmp_path, settings, left_s=5)
    assert found == {"case": "ours, grpo, static", "not_measured": "no time was left"}
    monkeypatch.setattr(gpu_ppo, "find_spec", lambda name: None)
    found = gpu_ppo.measure(Case("trl", "grpo", "vllm", 60), tmp_path, settings, 60)
    assert found["not_measured"] == "vLLM is not installed"
