"""`prefab train`: from a file to a model, presets, and mistakes told with where they stand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from prefab.factory.engines.model_files import PRESET_OUTPUTS
from prefab.factory.errors import ConfigError
from prefab.pipelines.cli.main import app
from prefab.pipelines.training import stages
from prefab.pipelines.training.stages import load_config
from prefab.pipelines.training.train import train
from prefab.trainers.registry import STAGES
from tests.support import trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    store, model = trained.make_store(root, 10), trained.make_model(root / "model")
    (root / "prefab.duckdb").unlink(missing_ok=True)
    value = {
        "model": str(model),
        "out": str(root / "out"),
        "data": trained.data(store),
        "max_steps": 2,
        "batch_size": 4,
        "threads": 1,
    }
    (root / "dpo.yaml").write_text(yaml.safe_dump(value))
    return root


def test_a_file_becomes_a_model(folder):
    (folder / "store/prefab.duckdb").unlink()  # the store is brought up to its ledger first
    done = CliRunner().invoke(
        app, ["train", "dpo", str(folder / "dpo.yaml"), "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0 and "note" not in done.stderr
    result = json.loads(done.stdout)
    assert (
        result["steps"] == 2
        and (folder / "out/model.safetensors").exists()
        and (folder / "out/README.md").exists()
    )
    again = CliRunner().invoke(
        app, ["train", "dpo", str(folder / "dpo.yaml")], catch_exceptions=False
    )
    assert again.exit_code == 0 and "2 steps on" in again.output
    fewer = ["--set", "data.sources.0.margin=0.2", "--set", f"out={folder / 'fewer'}"]
    told = CliRunner().invoke(
        app, ["train", "dpo", str(folder / "dpo.yaml"), *fewer], catch_exceptions=False
    )
    assert re.search(  # before the first step, not only on the card
        r"\d+ of \d+ rows are below the margin 0.2 and are left out, \d+ stay; the setting is "
        r"data.sources.0.margin\n(?s:.)*training dpo",
        told.stderr,
    )


@pytest.mark.parametrize(("stage", "preset"), [*((s, s) for s in STAGES), ("dpo", "simpo")])
def test_presets_are_valid_and_take_overrides(stage, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / preset).mkdir()  # `prefab train sft sft --set out=sft`, once more
    config = STAGES[stage].config
    loaded = load_config(
        Path(preset), config, ["seed=7", "data.sources.0.store=elsewhere", "lora={rank: 8}"]
    )
    assert (loaded.seed, loaded.data.sources[0].store, loaded.lora.rank) == (7, "elsewhere", 8)


def test_the_command_that_makes_each_preset_s_output_is_known():
    reports = {"sweep", "weak-to-strong"}  # not one model
    presets = {f.stem: f for f in stages.PRESETS.glob("*.yaml") if f.stem not in reports}
    out = {yaml.safe_load(f.read_text())["out"]: name for name, f in presets.items()}
    assert out.keys() == PRESET_OUTPUTS.keys()
    for folder, command in PRESET_OUTPUTS.items():
        assert re.fullmatch(rf"prefab train ({'|'.join(STAGES)}|online) {out[folder]}", command)


@pytest.mark.parametrize(
    ("stage", "sets", "words"),
    [
        ("ppo", [], "^model: there is no folder trained/sft in .*`prefab train sft sft` makes it"),
        (
            "grpo",
            ["model=prefab-tiny"],
            "^rewards: preference: paths: .*`prefab train reward reward`",
        ),
        ("dpo", ["reference=trained/sft"], "^reference: there is no folder trained/sft"),
        ("dpo", ["model=trained/simpo"], "^model: .*`prefab train dpo simpo` makes it"),
        (
            "ppo",
            ["model=prefab-tiny", "rewards.0.paths=[trained/reward/member-2]"],
            "paths: .*`prefab train reward reward --set members=3` makes it",
        ),
        (
            "ppo",
            [
                "model=prefab-tiny",
                "rewards=[{name: r, kind: oracle}]",
                "gold={name: steps, kind: process, paths: [trained/process]}",
            ],
            "^gold: steps: paths: .*`prefab train process process` makes it",
        ),
        (
            "online",
            ["pipeline=demo"],
            r"^\S+ model: .*`prefab train sft sft` makes it|^model: .*sft",
        ),
    ],
)
def test_a_missing_output_of_another_stage_is_told_with_its_command(
    stage, sets, words, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        train(stage, stage, sets, quiet=True)
    assert not [*tmp_path.iterdir()]


def test_mistakes_are_told_with_their_place(folder, tmp_path):
    text = (
        (folder / "dpo.yaml")
        .read_text()
        .replace("max_steps: 2", "max_stps: 2\nbeta: -1\nloss: sigmid")
    )
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        train("dpo", tmp_path / "bad.yaml")
    words = str(caught.value)
    assert (
        'bad.yaml:10:1 max_stps: unknown field; did you mean "max_steps"?' in words
        or 'max_stps: unknown field; did you mean "max_steps"?' in words
    )
    assert 'did you mean "sigmoid"' in words and "beta" in words and len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="no store here"):
        train(
            "dpo",
            folder / "dpo.yaml",
            [f"data.sources.0.store={tmp_path}", f"out={tmp_path / 'x'}"],
        )


def test_a_source_is_a_store_or_files(folder, tmp_path):
    with pytest.raises(ConfigError, match="name a store, or files, and not both"):
        train("dpo", folder / "dpo.yaml", ["data.sources.0.files=x"])


def test_an_unknown_stage_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match="there is no stage 'dpos'; did you mean \"dpo\""):
        train("dpos", "dpo")
