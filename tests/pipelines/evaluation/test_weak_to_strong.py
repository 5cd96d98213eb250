"""Weak to strong: the share recovered by hand, the whole command on the embedded world, resumption,
and mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from prefab import query, run
from prefab.factory.errors import ConfigError
from prefab.factory.stats import ratio_over_seeds
from prefab.factory.types import Message, Prompt
from prefab.pipelines.cli.main import app
from prefab.pipelines.evaluation import weak_to_strong as weak
from prefab.pipelines.evaluation.policy_metrics import PolicyAnswer
from prefab.pipelines.evaluation.weak_to_strong import WeakToStrongConfig, measured, weak_to_strong
from tests.support import noisyworld

PROMPTS = [Prompt(f"p{k}", (Message("user", f"{k}"),), group=f"g{k // 2}") for k in range(8)]
LABELS = {"weak": {}, "strong": {}, "truth": {"gold": "oracle"}}


def settings(**more) -> WeakToStrongConfig:
    value = {"store": "s", "out": "o", "train": {"model": "m"}, "labels": LABELS, "seeds": [3, 5]}
    return WeakToStrongConfig.model_validate({**value, **more})


def answers(means: dict[str, float], seeds=(3, 5)) -> dict:
    """Two answers to each prompt whose scores have these means and differ by prompt."""
    return {
        (name, seed): [
            PolicyAnswer(k // 2, "a b", 3, True, -1.0, -1.0, {"gold": mean + 0.01 * (k // 2) % 3})
            for k in range(2 * len(PROMPTS))
        ]
        for name, mean in means.items()
        for seed in ((0,) if name == weak.BASE else seeds)
    }


def result(found, name):
    return next(r for r in found.results if r.name == name)


ROWS = {
    "weak": {("p", "a", "b"): (True, "p"), ("q", "a", "b"): (False, "q")},
    "strong": {("p", "a", "b"): (True, "p")},
    "truth": {("p", "a", "b"): (True, "p"), ("q", "a", "b"): (True, "q")},
}


def test_the_share_recovered_by_hand():
    scores = {weak.BASE: 0.2, "weak": 0.3, "strong": 0.5, "truth": 0.6}
    found = measured(settings(), PROMPTS, ROWS, answers(scores))
    assert found.value == "gold" and found.floor == weak.BASE and found.ceiling == "truth"
    assert result(found, "weak").recovered.value == pytest.approx(0.25)
    assert result(found, "strong").recovered.value == pytest.approx(0.75)
    assert result(found, "weak").gain.value == pytest.approx(0.1)
    assert result(found, "weak").agree.value == 0.5 and result(found, "strong").agree.value == 1.0
    assert found.notes == []
    from_weak = measured(settings(floor="weak"), PROMPTS, ROWS, answers(scores))
    assert result(from_weak, "strong").recovered.value == pytest.approx(2 / 3)
    assert result(from_weak, weak.BASE).gain.value == pytest.approx(-0.1)


def test_without_a_gap_no_share_is_told():
    scores = {weak.BASE: 0.6, "weak": 0.3, "strong": 0.5, "truth": 0.5}
    found = measured(settings(), PROMPTS, ROWS, answers(scores))
    assert result(found, "strong").recovered.value is None
    assert result(found, "strong").gain.value == pytest.approx(-0.1)
    assert "there is no gap to recover" in found.notes[0]


def test_labels_out_of_order_are_told():
    scores = {weak.BASE: 0.2, "weak": 0.3, "strong": 0.5, "truth": 0.6}
    rows = {**ROWS, "weak": ROWS["strong"], "strong": ROWS["weak"]}
    assert (
        "is not that of their strength"
        in measured(settings(seeds=[3]), PROMPTS, rows, answers(scores)).notes[-1]
    )


def test_the_interval_of_a_ratio():
    rng = np.random.default_rng(0)
    seeds, groups = np.repeat(np.arange(3), 40), np.tile(np.arange(40), 3)
    below = 1.0 + rng.normal(0, 0.3, 120)
    above = 0.5 * below + rng.normal(0, 0.2, 120)
    found = ratio_over_seeds(above, below, seeds, groups)
    assert found.low < 0.5 < found.high < found.low + 0.2
    doubled = ratio_over_seeds(2 * above, below, seeds, groups)
    assert doubled.low == pytest.approx(2 * found.low, abs=1e-4)
    # the ratio is 0.5 to the last digit only where the noise is none
    exact = ratio_over_seeds(0.5 * below, below, seeds, groups)
    assert (exact.low, exact.high) == pytest.approx((0.5, 0.5))
    assert ratio_over_seeds(above, below - 1.0, seeds, groups).undefined


@pytest.mark.parametrize(
    "more, words",
    [
        ({"floor": "truth"}, "one of the labels before the last"),
        ({"labels": {"untrained": {}, "truth": {}}}, "before any training"),
        ({"labels": {"a": {"gold": "oracle", "margin": 0.1}, "b": {}}}, "no judges, principles"),
        ({"seeds": [1, 1]}, "name each once"),
        ({"train": {"model": "m", "out": "x"}}, "out is set for each policy"),
        ({"train": {"model": "m", "data": {"sources": []}}}, "data.sources is set"),
        ({"train": {"model": "m", "data": 5}}, "train.data: must be a mapping, not the number 5"),
        ({"train": {}}, "model is missing"),
        ({"train": {"model": 5}}, "model is missing"),
        ({"seeds": [-1]}, "greater than or equal to 0"),
    ],
)
def test_mistakes_in_the_configuration(more, words):
    with pytest.raises(ValueError, match=words):
        settings(**more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store of the embedded world with a weak judge."""
    root = tmp_path_factory.mktemp("weak")
    judges = {"weak": {"right": 0.6}}
    value, engines = noisyworld.pipeline(root, judges, 20)
    assert run(value, engines=engines).state == "done"
    return root


def written(folder: Path, out: Path, **more) -> Path:
    value = {
        "store": str(folder / "store"),
        "labels": {"weak": {"judges": ["weak"]}, "truth": {"gold": "oracle"}},
        "train": {
            "model": "prefab-nano",
            "max_steps": 1,
            "batch_size": 4,
            "data": {"max_length": 512, "too_long": "drop", "limit": 8},
        },
        "seeds": [1],
        "out": str(out),
        "prompts": {"limit": 4},
        "samples": 1,
        "max_new_tokens": 8,
        **more,
    }
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(value, sort_keys=False))
    return file


@pytest.mark.slow
def test_the_whole_report_and_its_resumption(folder, tmp_path, monkeypatch):
    file, out = written(folder, tmp_path / "out"), tmp_path / "out"
    done = CliRunner().invoke(
        app, ["eval", "weak-to-strong", str(file), "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    names = [r["name"] for r in found["results"]]
    assert names == ["untrained", "weak", "truth"] and found["seeds"] == 1
    agree = {r["name"]: r["agree"]["value"] for r in found["results"]}
    assert agree["weak"] < 0.9 and agree["truth"] == 1.0
    assert {"distinct_2", "refuses", "kl"} <= set(found["results"][1]["figures"])
    assert "| labels |" in (out / "README.md").read_text()
    assert all(Path(f).exists() for f in found["files"])
    sql = "SELECT count(*) AS n FROM evals WHERE name = 'eval weak-to-strong'"
    assert query(folder / "store", sql)["n"][0] == 1
    # a report that was stopped before its last policy had answered: only that one answers again
    before = json.loads((out / "weak-to-strong.json").read_text())
    for gone in ("weak-to-strong.json", "answers/truth-seed-1.json"):
        (out / gone).unlink()
    asked, sample = [], weak.sample_all
    monkeypatch.setattr(weak, "sample_all", lambda c, *a: asked.extend(c.policies) or sample(c, *a))
    weak_to_strong(file, quiet=True)
    assert asked == ["truth-seed-1"]
    assert json.loads((out / "weak-to-strong.json").read_text()) == before
    # other prompts are answered anew
    monkeypatch.setattr(weak, "sample_all", lambda c, *a: pytest.fail("asked again", False))
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        weak_to_strong(file, ["prompts.limit=5"], quiet=True)


def test_bad_input_is_told(folder, tmp_path):
    for sets, words in (
        (["run=nothing"], "has no run"),
        (["labels.weak.judges=[other]"], "nothing to train on|other"),
        (["labels.weak={gold: human}"], "human decides no comparison"),
        (["train.bate=1"], "bate"),
        (["train.model=nowhere/at/all"], "nowhere/at/all does not exist"),
        (["prompts.split=train"], "train split"),
    ):
        with pytest.raises(ConfigError, match=words):
            weak_to_strong(written(folder, tmp_path / "bad"), sets, quiet=True)
    shutil.rmtree(tmp_path / "bad", ignore_errors=True)
