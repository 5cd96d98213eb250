"""The sweep: its arithmetic by hand, runs that are not repeated, resumption, the chart, and
mistakes."""

from __future__ import annotations

import json
from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from prefab.factory.errors import ConfigError
from prefab.pipelines.cli.main import app
from prefab.pipelines.training.sweep import (
    Point,
    SweepConfig,
    at_equal_kl,
    measured,
    over_seeds,
    settings,
)
from prefab.pipelines.training.sweep import sweep as run

A, B = 1.2, 0.8


def gained(d: float) -> float:
    return d * (A - B * log(d))


def points(shift: float = 0.0) -> list[Point]:
    """Gao's form itself, for two arms of which one gains less; two seeds that differ by 2
    `shift`."""
    made = []
    for arm, part in (("single", 0.5), ("ensemble", 1.0)):
        for beta, most in ((0.1, 4.0), (0.5, 1.5)):
            for seed in (0, 1):
                for step in range(1, 5):
                    d = most * step / 4
                    g = part * gained(d) + (shift if seed else -shift)
                    made.append(Point(arm, beta, seed, step, d * d, d, 3.0 + g, g))
    return made


def test_the_fit_finds_what_the_points_were_made_of_and_marks_the_peak():
    found = measured(points(), {("single", 0.1): [True, True], ("ensemble", 0.1): [True, False]})
    fit, peak = found["arms"]["ensemble"]["fit"], exp(A / B - 1)
    assert fit["a"]["value"] == pytest.approx(A) and fit["b"]["value"] == pytest.approx(B)
    assert found["arms"]["ensemble"]["peak_kl"] == pytest.approx(peak**2)
    assert found["arms"]["ensemble"]["peak_gained"] == pytest.approx(gained(peak))
    assert found["arms"]["single"]["peak_gained"] == pytest.approx(gained(peak) / 2)
    best = found["arms"]["ensemble"]["best"]
    assert (best["beta"], best["step"]) == (0.5, 4) and best["gained"] == pytest.approx(
        max(map(gained, (1, 2, 3, 4, 1.5, 1.125)))
    )
    rows = {(row["arm"], row["beta"]): row for row in found["table"]}
    assert (
        rows["single", 0.1]["alarms"] == 2
        and rows["ensemble", 0.1]["alarms"] == 1
        and rows["single", 0.5]["alarms"] == 0
    )
    assert (
        rows["ensemble", 0.1]["end"]["kl"] == pytest.approx(16)
        and rows["ensemble", 0.1]["best"]["step"] == 2
    )


def test_arms_at_equal_kl_are_paired_by_seed():
    rows = at_equal_kl(points(0.1))  # both seeds reach 16 nats at beta .1, and 2.25 at .5
    assert [(row["kl"], row["arm"]) for row in rows] == [
        (kl, arm) for kl in (4.0, 8.0, 16.0) for arm in ("single", "ensemble")
    ]
    half, whole = rows[0], rows[1]
    assert half["more"] is None and half["gained"]["value"] == pytest.approx(
        gained(2) / 2
    )  # 2.25 nats are too near
    assert (
        whole["gained"]["value"] == pytest.approx(gained(2))
        and whole["gained"]["low"] < gained(2) - 0.1
    )
    assert whole["more"]["value"] == pytest.approx(gained(2) / 2)
    assert whole["more"]["low"] == pytest.approx(
        whole["more"]["high"]
    )  # the seeds differ in both arms alike
    near = at_equal_kl([p for p in points() if p.beta == 0.5 or p.kl <= 1])
    assert near[-1]["kl"] == pytest.approx(2.25) and near[-1]["gained"]["value"] == pytest.approx(
        gained(1.5)
    )
    assert (
        at_equal_kl([p for p in points() if (p.arm, p.seed) != ("ensemble", 1)]) == []
    )  # a run failed: no pairs


@pytest.mark.parametrize("gain", [0.2, -0.2])
def test_a_beta_is_recommended_only_where_the_ground_truth_rose(gain, capsys):
    from prefab.pipelines.cli.train import _show_sweep

    found = measured([replace(p, gained=gain * p.kl) for p in points()], {})
    _show_sweep({**found, "equal_kl": [], "files": ["sweep.png"], "failed": []})
    told = capsys.readouterr().err
    assert ("next: prefab train ppo ppo --set beta=" in told) == (gain > 0)
    assert ("so none is recommended" in told) == (gain < 0)


def test_a_peak_beyond_what_was_seen_is_none():
    near = [p for p in points() if p.kl < 1]
    assert measured(near, {})["arms"]["ensemble"]["peak_kl"] is None


def test_means_over_seeds_have_students_interval():
    mean = next(
        m for m in over_seeds(points(0.1)) if (m.arm, m.beta, m.step) == ("ensemble", 0.5, 4)
    )
    assert (
        mean.seeds == 2
        and mean.gained == pytest.approx(gained(1.5))
        and mean.kl == pytest.approx(2.25)
    )
    assert mean.high - mean.gained == pytest.approx(
        12.7062 * sqrt(0.02) / sqrt(2), rel=1e-4
    )  # t of one degree of freedom
    alone = over_seeds([p for p in points() if p.seed == 0])
    assert all(m.low is None and m.seeds == 1 for m in alone)


# --- with training


def configured(folder: Path, **changes) -> Path:
    """A sweep of PPO from files: rewards count letters, gold the answers' words."""
    pytest.importorskip("torch")
    from tests.support import trained

    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(40))
    )
    (folder / "letters.py").write_text(
        "def reward(prompts, completions):\n    return [c.count('e') - 0.1 * len(c) for c in completions]\n"
    )
    (folder / "gold.py").write_text(
        "from pathlib import Path\n"
        f"stop = Path({str(folder / 'stop')!r})\n"
        "def reward(prompts, completions):\n"
        "    if stop.exists():\n"  # as Ctrl-C in the middle of a run
        "        raise KeyboardInterrupt\n"
        "    return [float(len(set(c))) for c in completions]\n"
    )
    ppo = {
        "model": str(trained.make_model(folder / "model")),
        "out": "none",
        "steps": 2,
        "batch_size": 8,
        "micro_batch": 8,
        "max_new_tokens": 4,
        "reference_samples": 16,
        "unfinished_score": None,
        "threads": 1,
        "kl_stop": None,
        "eval_every": 1,
        "eval_prompts": 4,
        "learning_rate": 1e-3,
        "data": {"sources": [{"files": str(folder / "rows.jsonl")}], "val_share": 0.2},
        "rewards": [{"name": "letters", "kind": "file", "paths": [str(folder / "letters.py")]}],
        "gold": {"name": "gold", "kind": "file", "paths": [str(folder / "gold.py")]},
    }
    (folder / "ppo.yaml").write_text(yaml.safe_dump(ppo))
    pair = {
        "name": "letters",
        "kind": "file",
        "paths": [str(folder / "letters.py")] * 2,
        "combine": "min",
    }
    value = {
        "ppo": str(folder / "ppo.yaml"),
        "out": str(folder / "out"),
        "betas": [0.05, 0.5],
        "seeds": [3],
        "arms": {"one": ppo["rewards"], "two": [pair]},
        **changes,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(value))
    return folder / "sweep.yaml"


def kept(found: dict) -> dict:
    return {k: found[k] for k in ("points", "means", "arms", "table")}


def stopped(folder: Path) -> Path:
    """A sweep of four runs that was stopped in the third."""
    file = configured(folder)
    run(file, ["betas=[0.05]"], quiet=True)
    (folder / "stop").touch()
    with pytest.raises(KeyboardInterrupt):
        run(file, quiet=True)
    (folder / "stop").unlink()
    return file


@pytest.mark.slow
def test_runs_are_trained_once_drawn_and_go_on_after_a_stop(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("trl")
    file = stopped(tmp_path)
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/policy/model.safetensors")}
    done = CliRunner().invoke(app, ["sweep", str(file), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(first) == 2 and all(
        p.stat().st_mtime_ns == when for p, when in first.items()
    )  # not trained again
    assert sorted((p["arm"], p["beta"], p["step"]) for p in found["points"]) == [
        (arm, beta, step) for arm in ("one", "two") for beta in (0.05, 0.5) for step in (1, 2)
    ]
    assert kept(json.loads((tmp_path / "out/sweep.json").read_text())) == kept(found)
    (png, page) = map(Path, found["files"])
    assert (
        png.read_bytes().startswith(b"\x89PNG")
        and "<svg" in page.read_text()
        and "two, beta 0.5" not in page.name
    )
    assert all(f"<td>{arm}</td>" in page.read_text() for arm in ("one", "two"))
    with pytest.raises(ConfigError, match="differs in learning_rate"):
        run(file, ["sets=[learning_rate=0.1]"], quiet=True)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_has_the_figures_of_one_that_was_not(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("trl")
    found = run(stopped(tmp_path), quiet=True)
    whole = run(configured(tmp_path, out=str(tmp_path / "whole")), quiet=True)
    assert kept(whole) == kept(found)  # to the last digit


def test_every_arm_beta_and_seed_is_a_run_and_a_seed_comes_whole(tmp_path):
    file = configured(tmp_path, seeds=[0, 1])
    runs = settings(SweepConfig.model_validate(yaml.safe_load(file.read_text())))
    assert [name for _, name, _ in runs] == [
        f"{arm}-beta-{beta}-seed-{seed}"
        for seed in (0, 1)
        for beta in ("0.05", "0.5")
        for arm in ("one", "two")
    ]
    assert runs[1][2].rewards[0].combine == "min" and runs[1][2].out == str(
        tmp_path / "out/two-beta-0.05-seed-0"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sets": ["gold=null"]}, "gold: a sweep sets proxy against gold"),
        ({"sets": ["kl=adaptive"]}, "beta is what is swept"),
        ({"sets": ["eval_every=9"]}, "nothing is evaluated"),
        ({"betas": [0.1, 0.1]}, "name each once"),
        ({"betas": [-1.0]}, "at least 0"),
        ({"arms": {"none": []}}, "every arm needs a reward"),
        ({"betas": []}, "betas"),
        ({"arms": {"one": [{"name": "x", "kind": "modle"}]}}, r"arms.one.*kind"),
        ({"sets": ["stps=3"]}, "stps: unknown field"),
    ],
)
def test_mistakes_are_told_at_once(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        run(configured(tmp_path, **changes), quiet=True)
    assert not (tmp_path / "out").exists()
