"""A judge, or a program, as the reward: what it is worth, what is asked once, what stays unscored,
and training from it."""

from __future__ import annotations

import json
from math import log

import pytest
import yaml
from typer.testing import CliRunner

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError
from prefab.factory.types import Completion
from prefab.pipelines.training.judge_reward import opened
from prefab.trainers.rl import ppo, rewards
from prefab.trainers.rl.rewards import RewardConfig
from tests.support import project

KIND, BRIEF = 0.7, 0.2  # probability of the best grade, by principle; else the worst


def grades(request):
    """Grades 9 or 1: kind answers often get the best, brief ones rarely; no label for an answer
    that says `odd`."""
    text = request.messages[-1].content
    if not request.labels:
        return Completion("yes", "stop", None, "exact", 5, 1)
    p = KIND if "unkind" in text else BRIEF
    mass = 1e-3 if "odd" in text or ("half" in text and "unkind" in text) else 1.0
    logps = {label: log(1e-9) for label in request.labels} | {
        "9": log(p * mass),
        "1": log((1 - p) * mass),
    }
    return Completion("9", "length", logps, "exact", 20, 1)


@pytest.fixture
def judged(tmp_path):
    """A pipeline file with a pointwise judge; its principles weigh 3 to 1."""
    value = project.pipeline(tmp_path, panel={"judges": [{"name": "points", "kind": "pointwise"}]})
    constitution = yaml.safe_load((tmp_path / "small.yaml").read_text())
    constitution["principles"][0]["weight"] = 3.0
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(constitution))
    return project.write(tmp_path, value)


def settings(*sources, **more):
    return ppo.PpoConfig(model="none", out="none", rewards=list(sources), **more)


def scores(config, texts, engines=None, prompt="Question 1?"):
    with opened(config, engines=engines) as (sources, _):
        return rewards.score(sources, [prompt] * len(texts), texts).total


def test_a_judge_is_worth_its_expected_score_over_the_principles_weights(judged):
    engines = {"local": Scripted(ScriptedConfig(), grades)}
    config = settings(RewardConfig(name="judge", kind="judge", paths=[str(judged)]))
    expected = (3 * (2 * KIND - 1) + (2 * BRIEF - 1)) / 4  # grades 1..9 on -1..1, by hand
    found = scores(config, ["fine", "odd", "half"], engines)
    # odd: no mass on any label. half: only the principle of weight 1 of 4 is scored, less than
    # min_scored
    assert found == [pytest.approx(expected, abs=1e-6), None, None] and engines["local"].total == 6


def test_identical_questions_are_asked_once_in_a_step_a_run_and_after_it(judged, tmp_path):
    engines = {"local": Scripted(ScriptedConfig(), grades)}
    config = settings(RewardConfig(name="judge", kind="judge", paths=[str(judged)]))
    first = scores(config, ["fine", "fine", "good"], engines)
    assert (
        first[0] == first[1]
        and engines["local"].total == 4
        and max(engines["local"].asked.values()) == 1
    )
    assert (
        scores(config, ["good", "fine", "fine"], engines) == first and engines["local"].total == 4
    )
    assert (tmp_path / "store/reward/ledger.sqlite").exists()


def test_what_the_run_asked_is_known(tmp_path):
    value = project.pipeline(tmp_path, panel={"judges": [{"name": "points", "kind": "pointwise"}]})
    file = project.write(tmp_path, value)

    def differ(request):
        return (
            grades(request) if request.labels else Completion(f"draft {request.repeat[0]}", "stop")
        )

    engine = Scripted(ScriptedConfig(), differ)
    run(file, engines={"local": engine})
    asked = engine.total
    config = settings(RewardConfig(name="judge", kind="judge", paths=[str(file)]))
    assert (
        None not in scores(config, ["draft 0", "draft 2"], {"local": engine})
        and engine.total == asked
    )
    scores(config, ["another"], {"local": engine})
    assert engine.total == asked + 2


def test_a_verifier_checks_by_prompt_and_leaves_out_what_it_cannot_check(tmp_path):
    (tmp_path / "right.jsonl").write_text(json.dumps({"prompt": "2 + 2?", "reference": 4}) + "\n")
    config = settings(
        RewardConfig(
            name="right",
            kind="verifier",
            verifier={"check": "numeric", "references": str(tmp_path / "right.jsonl")},
        )
    )
    assert scores(config, ["it is 4", "5", "none"], prompt="2 + 2?") == [1.0, 0.0, 0.0]
    assert scores(config, ["4"], prompt="3 + 3?") == [None]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"kind": "judge"}, "name the pipeline file"),
        (
            {"kind": "judge", "judge": "pints", "paths": "PIPELINE"},
            'no pointwise judge is named "pints"; did you mean "points"',
        ),
        ({"kind": "judge", "paths": "PAIRS"}, "none of its judges is pointwise"),
        ({"kind": "verifier"}, "verifier.check: Field required"),
        (
            {"kind": "verifier", "verifier": {"check": "numeric", "reference": "x"}},
            "'x' is not a number",
        ),
    ],
)
def test_bad_settings_are_told(judged, tmp_path, source, words):
    pairs = project.write(tmp_path, project.pipeline(tmp_path), "pairs.yaml")
    if "paths" in source:
        source = {**source, "paths": [str(judged if source["paths"] == "PIPELINE" else pairs)]}
    with (
        pytest.raises(ConfigError, match=words),
        opened(settings(RewardConfig(name="r", **source))),
    ):
        pass


def test_without_the_pipelines_such_a_reward_is_refused():
    with pytest.raises(ConfigError, match="made by prefab.pipelines.training.judge_reward"):
        rewards.build([RewardConfig(name="r", kind="judge", paths=["x"])])


@pytest.mark.parametrize("stage", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_training_from_a_judge_and_a_verifier(judged, tmp_path, stage):
    """From a file, by the command: the scripted judge's own server stands in for a model."""
    pytest.importorskip("torch")
    pytest.importorskip("trl")
    from prefab.pipelines.cli.main import app
    from tests.support import trained

    model = trained.make_model(tmp_path / "model")
    value = {
        "model": str(model),
        "out": str(tmp_path / "out"),
        "steps": 2,
        "batch_size": 8,
        "micro_batch": 4,
        "max_new_tokens": 4,
        "reference_samples": 16,
        "unfinished_score": None,
        "threads": 1,
        "kl_stop": None,
        "data": {"sources": [{"files": str(tmp_path / "rows.jsonl")}]},
        "rewards": [
            {"name": "judge", "kind": "judge", "paths": [str(judged)]},
            {
                "name": "short",
                "kind": "verifier",
                "weight": 0.5,
                "verifier": {"check": "regex", "reference": "[a-m]"},
            },
        ],
        **({"group": 4} if stage == "grpo" else {}),
    }
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(12))
    )
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(value))
    done = CliRunner().invoke(
        app, ["train", stage, str(tmp_path / "train.yaml"), "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout)["last"]
    assert -1 <= last["reward/judge"] <= 1 and 0 <= last["reward/short"] <= 1
