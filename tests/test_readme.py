"""The README's figures are those of the committed results: each line below is built from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())


def clients() -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["client"], row["latency_ms"]): row for row in result("clients")["table"]}


NAMES = {
    "prefab run": "`prefab run`, everything durable",
    "prefab run, batch endpoint": "`prefab run`, vLLM's batch endpoint",
    "aiohttp": "plain aiohttp loop, nothing kept",
    "aiohttp, uvloop, orjson": "aiohttp, uvloop, orjson",
    "bare protocol": "bare protocol",
    "distilabel 1.5.3": "distilabel 1.5.3",
}


@pytest.mark.parametrize("client", NAMES)
def test_a_client_in_the_speed_table(client):
    at_0, at_50 = (clients()[client, latency] for latency in (0, 50))
    cpu = f"{at_0['cpu_ms']:.1f}" if at_0["cpu_ms"] >= 10 else f"{at_0['cpu_ms']:.2f}"
    cells = [NAMES[client], f"{at_0['per_s']:,.0f}", f"{at_50['per_s']:,.0f}", cpu]
    assert f"| {' | '.join([*cells, format(at_0['peak_rss_mb'], '.0f')])} |" in README
    assert at_0["of"] == at_50["of"] == 3  # "medians of three interleaved rounds"


# The results that the tables stand on, as the README calls them.
RESULTS = {
    "clients": "the comparison with the peers",
    "rerun": "the rerun of 1,000,000 calls",
    "vllm_load": "the verdicts on a real vLLM",
    "agreement": "the coefficients",
    "ppo_speed": "PPO's tokens",
}


def test_what_the_tables_stand_on():
    """Where, when and from which commit each was measured, how often, and what was not clean."""
    where = {name: result(name)["where"] for name in RESULTS}
    for name, found in where.items():
        assert {found["cpu"], found["cores"]} == {"AMD EPYC", 2}, name
        assert re.fullmatch(r"2\d{3}-\d\d-\d\d", found["date"]) and found["commit"]
        assert found["command"].startswith(f"python -m benchmarks.{name}")
    changed = [
        RESULTS[name]
        for name, found in where.items()
        if not found.get("clean", not found["commit"].endswith("-dirty"))
    ]
    steps = result("ppo_speed")["results"]["ours"]["steps"]
    text = " ".join(README.split())
    assert f"medians of three interleaved rounds on {where['clients']['date']}" in text
    assert f"medians of {len(result('agreement')['runs'])} runs" in text
    assert f"those of {len(steps) - 1} steps after the first" in text
    cpu_ms = {row["batch"]: row["cpu_ms"] for row in result("distilabel_batches")["table"]}
    less, best = 1 - cpu_ms[256] / cpu_ms[64], min(cpu_ms, key=lambda batch: cpu_ms[batch])
    assert f"With batches of {best}," in text and f"{less:.0%} less CPU a judgment" in text
    assert f"changes that were not committed: {', '.join(changed)}." in text
    assert len(result("vllm_load")["verdicts"]["prefab"]) == 1  # "of one run"


def goals() -> str:
    found = {name: value for name, _, value, _ in result("clients")["goals"]}
    plain, batched, slow = (
        found[f"{name}, of plain aiohttp"]
        for name in ("0 ms", "0 ms with the batch endpoint", "50 ms")
    )
    times, cpu = found["0 ms, times distilabel"], found["CPU a judgment, of distilabel"]
    whole = [
        clients()[ours, latency]["per_s_whole_work"]
        / clients()["aiohttp", latency]["per_s_whole_work"]
        for ours, latency in (
            ("prefab run", 0),
            ("prefab run, batch endpoint", 0),
            ("prefab run", 50),
        )
    ]
    return (
        f"| of plain aiohttp at 0 ms · with the batch endpoint · at 50 ms | {plain:.2f} · "
        f"{batched:.2f} · {slow:.2f} | 0.5 · 1 · 0.95 |\n"
        f"| likewise, whole work: start, run and filling DuckDB | {' · '.join(f'{x:.2f}' for x in whole)} "
        "| |\n"
        f"| times distilabel at 0 ms | {times:.1f} (missed by {100 * (1 - times / 15):.0f}%) | 15 |\n"
        f"| CPU · memory, of distilabel | 1/{cpu**-1:.0f} · "
        f"{found['peak memory, of distilabel']:.2f} | 1/12 · 1/2 |\n"
    )


def rerun() -> str:
    found = result("rerun")
    assert found["calls"] == 1_000_000 and found["rerun_asked"] == 0
    return (
        f"| rerunning 1,000,000 answered calls | {found['rerun_s']:.0f} s, none asked | 90 s, none "
        "asked |\n"
        f"| memory grown from 10,000 to 1,000,000 calls | {found['memory']['grew_mb']:.1f} MiB | "
        "100 MiB |\n"
        f"| peak memory of filling DuckDB with them | {found['rebuild_peak_mb']:.0f} MiB | below "
        "400 MiB |\n"
    )


def vllm() -> str:
    found = result("vllm_load")
    rate = {name: runs[0]["per_s"] for name, runs in found["verdicts"].items()}
    ours, first = found["blocks"]
    assert ours["order"] == "question last (ours)" and ours["queries"] == first["queries"]
    return (
        "| verdicts/s on a real vLLM, of a bare load generator (of one that batches) | "
        f"{rate['prefab'] / rate['bare']:.2f} ({rate['prefab'] / rate['bare, 32 a POST']:.2f}) | "
        "0.95 |\n"
        "| prefix-cache hit rate, question last (ours) · question first | "
        f"{ours['hit_rate']:.0%} · {first['hit_rate']:.0%} | |\n"
        f"| tokens prefilled of {ours['queries']:,.0f} · verdicts/s, likewise | "
        f"{ours['prefilled']:,.0f} · {first['prefilled']:,.0f} · {ours['per_s']:.0f}/s · "
        f"{first['per_s']:.0f}/s | |\n"
    )


def others() -> str:
    agreement, ppo = result("agreement"), result("ppo_speed")["results"]
    ratio = ppo["ours"]["tokens_per_s"] / ppo["trl"]["tokens_per_s"]
    return (
        "| every agreement coefficient, 2,000-resample intervals, Dawid-Skene: "
        f"{agreement['items']:,} items × {agreement['judges']} judges, beside other work | "
        f"{agreement['median']['total_s']:.1f} s | 3 s |\n"
        f"| PPO's tokens/s, of TRL 1.9's experimental PPO | {ratio:.2f} | 1.5 |\n"
    )


def gpu() -> str:
    training = {f["contender"]: f for f in result("gpu_training")["results"][0]["contenders"]}
    step = [
        f"{f['step_s']:.3f} · {f['mfu']:.1%} · {f['peak_gib']:.1f}".removeprefix("0")
        for f in (training["ours, bf16_weights"], training["trl"])
    ]
    grpo = [
        f"{f['tokens_per_s']:,.0f} · {f['peak_gib_of_torch']:.1f}"
        for f in result("gpu_ppo")["results"][:2]
    ]
    return (
        "| DPO, 16 pairs (11,270 tokens) a step with the reference pass: s · utilisation · peak "
        f"GiB | {' | '.join(step)} |\n"
        "| GRPO, 512 answers of 256 tokens, sampled by transformers: tokens/s · peak GiB (goal: 5 "
        f"times TRL, missed) | {' | '.join(grpo)} |\n"
    )


@pytest.mark.parametrize("lines", [goals, rerun, vllm, others, gpu])
def test_the_table_of_goals(lines):
    assert lines() in README


def test_the_pages_at_a_million_preferences():
    found, text = result("view"), " ".join((ROOT / "docs/view.md").read_text().split())
    cpu = {name: page["cpu_ms"] for name, page in found["pages"].items()}
    deep, other = ("page 100", "row 900,000"), ("one preference", "runs", "constitution")
    grid = [cpu[name] for name in cpu if name not in (*deep, *other)]
    rows = [cpu[name] for name in deep]
    assert f"With {found['preferences']:,} preferences and the index" in text
    assert f"takes {min(grid)} to {max(grid)} ms of processor time under each filter" in text
    assert f"rows at any depth {min(rows)} to {max(rows)} ms, and one preference" in text
    assert f"and one preference {cpu['one preference']} ms" in text
    assert f"The server takes {found['peak_mb']} MB at most" in text


def world() -> str:
    models = [
        next(m for m in result("world_eval") if m["model"] == f"prefab-{name}")
        for name in ("tiny", "nano")
    ]

    def shares(section: str, *names: str) -> list[str]:
        return [" / ".join(f"{m[section][name]:.1%}" for name in names) for m in models]

    rows = {
        "pairs judged right, mean over principles / worst": shares("pairwise", "mean", "worst"),
        "the first slot picked / both orders agree": shares(
            "pairwise", "first_slot", "orders_agree"
        ),
        "calibration error of P(A)": [
            f"{models[0]['pairwise']['ece']:.4f}",
            f"{models[1]['pairwise']['ece']:.3f}",
        ],
        "critique names the right fault / rightly none": shares(
            "singles", "critique_right_fault", "critique_rightly_none"
        ),
        "revisions right word for word": shares("revision", "both"),
        "drafts at T=1: coherent / break a principle": shares("policy", "coherent", "broken"),
    }
    return "".join(f"| {name} | {tiny} | {nano} |\n" for name, (tiny, nano) in rows.items())


def test_the_embedded_models():
    assert world() in README
    least = min(model["pairwise"]["n"] for model in result("world_eval"))
    assert f"(`make world-eval`, at least {least:,} decided pairs)" in README


def test_the_judge_on_new_sentences():
    found = result("held_out")["new"]
    assert {some["n_items"] for some in found["by_principle"].values()} == {48}
    mean, low, high = (f"{found['all'][name]:.1%}" for name in ("value", "low", "high"))
    worst = min(some["value"] for some in found["by_principle"].values())
    text = " ".join(README.split())
    assert f"on {found['all, over topics']['n_groups']} topics that it did not have" in text
    assert (
        f"right in {mean} of {found['all']['n_items']} pairs ({low} to {high}, over "
        f"{found['all']['n_groups']} sentences; worst principle {worst:.1%};" in text
    )


def test_the_demo():
    """Each line of the README's example, and its duration, stand in the output of that run."""
    output = (ROOT / "benchmarks/results/demo.txt").read_text()
    example = README.split("## The demo")[1].split("```")[3].strip().splitlines()
    assert len(example) > 10 and not [line for line in example if line not in output]
    data, minutes, seconds = re.findall(
        r"data (\d+ min \d+ s) .* in all (\d+) min (\d+) s", output
    )[-1]
    assert f"This run took {minutes} minutes {int(seconds)} seconds" in README
    assert (
        f"reward model, DPO and PPO | {data} (missed) · {minutes} min {seconds} s | 3 · 8 minutes |"
        in README
    )
