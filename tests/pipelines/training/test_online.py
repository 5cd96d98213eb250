"""Rounds of sample, judge, train: what each is made of, that a kill anywhere changes nothing, and
mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from tests.support import project

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from safetensors.torch import save_file

from prefab.factory.errors import ConfigError
from prefab.factory.keys import model_identity
from prefab.factory.spec import yamlio
from prefab.pipelines.cli.main import app
from prefab.pipelines.store.fill import query
from prefab.pipelines.training.online import (
    OnlineConfig,
    _errors_as_written,
    ended,
    stages,
    train,
)
from prefab.trainers.common import load_tokenizer
from prefab.trainers.data import DataConfig, read_rows, tokenised
from tests.support import trained

ROOT = Path(__file__).resolve().parents[3]
DPO = {
    "learning_rate": 1e-3,
    "max_steps": 2,
    "batch_size": 4,
    "threads": 1,
    "data": {"max_length": 200},
}
PPO = {
    "steps": 2,
    "batch_size": 4,
    "micro_batch": 4,
    "max_new_tokens": 4,
    "reference_samples": 8,
    "unfinished_score": None,
    "threads": 1,
    "kl_stop": None,
    "learning_rate": 1e-3,
}


def project_in(folder: Path, **changes) -> Path:
    """A pipeline with a random policy in this process (one row at a time: no answer depends on its
    batch) and a scripted judge, and the rounds' configuration beside it."""
    model = trained.make_model(folder / "model")
    value = project.pipeline(
        folder,
        10,
        policy={"engine": "here", "samples": 2, "temperature": 1.0, "max_tokens": 6},
        budget={"unscored": None},
        engines={
            "here": {"engine": "hf", "model": str(model), "batch": 1},
            "local": {"engine": "scripted"},
        },
        panel={
            "judges": [
                {"name": "judge", "kind": "pairwise", "engine": "local", "min_label_mass": 0.1}
            ],
            "tie_margin": 0.0,
        },
    )
    project.write(folder, value)
    config = {
        "pipeline": str(folder / "pipeline.yaml"),
        "out": str(folder / "out"),
        "rounds": 2,
        "source": {"truncated": True},
        "train": DPO,
        **changes,
    }
    (folder / "online.yaml").write_text(yaml.safe_dump(config))
    return folder / "online.yaml"


def left(folder: Path) -> dict:
    """What a run of rounds leaves: weights, and the store's rows without what tells when or
    where."""
    weights = {
        str(p.relative_to(folder / "out")): p.read_bytes()
        for p in sorted((folder / "out").glob("round-*/*/*.safetensors"))
    }
    rows = query(
        folder / "store",
        "SELECT r.name, p.prompt, p.a, p.b, p.p_a, p.outcome FROM preferences p JOIN runs r USING "
        "(run) ORDER BY ALL",
    ).rows()
    texts = query(
        folder / "store",
        'SELECT r.name, s.prompt, s."index", s.text, c.model FROM samples s JOIN runs r USING (run) '
        "JOIN calls c USING (call) ORDER BY ALL",
    ).rows()
    return {"weights": weights, "preferences": rows, "samples": texts}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = CliRunner().invoke(
        app, ["train", "online", str(project_in(folder)), "--json"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


def test_each_round_is_a_run_by_the_policy_that_the_last_one_trained(whole):
    folder, done = whole
    first, second = done["rounds"]
    assert [first["run"], second["run"]] == ["small-round-1@1", "small-round-2@1"] and done[
        "stopped"
    ] == ""
    assert (
        first["weights"] == model_identity(str(folder / "model"))
        and second["weights"] == first["trained"] != first["weights"]
    )
    assert done["policy"] == second["policy"] and second["trained"] == model_identity(
        second["policy"]
    )
    models = {}
    for name, _, _, _, model in left(folder)["samples"]:
        models.setdefault(name, set()).add(model)
    engines = {
        name: model_identity(path, "float32")
        for name, path in (
            ("small-round-1", str(folder / "model")),
            ("small-round-2", first["policy"]),
        )
    }
    assert models == {
        name: {identity} for name, identity in engines.items()
    }  # labelled with who wrote them
    evals = query(folder / "store", "SELECT value FROM evals WHERE name = 'online'")[
        "value"
    ].to_list()
    assert sorted(json.loads(v)["round"] for v in evals) == [1, 2]
    record = json.loads((Path(second["policy"]) / "training.json").read_text())
    assert record["identity"]["reference"] == str(folder / "model")  # held to the first policy
    assert [line["run"] for line in record["lineage"]] == ["small-round-1@1", "small-round-2@1"]


def test_the_same_command_again_does_nothing_and_another_is_refused(whole):
    folder, done = whole
    before = left(folder)
    again = train(folder / "online.yaml", quiet=True)
    assert again["rounds"] == done["rounds"] and left(folder) == before
    assert (
        train(folder / "online.yaml", ["rounds=1"], quiet=True)["rounds"] == done["rounds"][:1]
    )  # how many is no identity
    with pytest.raises(ConfigError, match="another configuration .other rows"):
        train(folder / "online.yaml", ["rows=round"], quiet=True)
    constitution = folder / "small.yaml"
    text = constitution.read_text()
    constitution.write_text(text.replace("kinder", "much kinder"))
    with pytest.raises(ConfigError, match="other constitution, templates"):
        train(folder / "online.yaml", quiet=True)
    constitution.write_text(text)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_anywhere_it_ends_the_same(whole, tmp_path, seed, training_forks):
    """One process imports torch and forks, so that a try costs little; it is killed at random
    moments."""
    folder = tmp_path / "killed"
    folder.mkdir()
    file = project_in(folder)
    done = training_forks.run([__file__, file, "2", seed], timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert left(folder) == left(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_rounds_of_ppo_and_grpo_train_a_reward_model_each(tmp_path, method):
    more = {"group": 2} if method == "grpo" else {}
    reward = {"max_steps": 2, "batch_size": 4, "threads": 1, "data": {"max_length": 200}}
    file = project_in(tmp_path, method=method, train={**PPO, **more}, reward=reward)
    done = train(file, quiet=True)
    assert [Path(row["policy"]).parent.name for row in done["rounds"]] == [method, method]
    assert all((tmp_path / f"out/round-{r}/reward/reward.json").exists() for r in (1, 2))
    assert (
        done["rounds"][1]["weights"] == done["rounds"][0]["trained"]
        and "kl" in done["rounds"][1]["metrics"]
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"train": {**DPO, "batchsize": 4}},
            r"online.yaml:\d+:\d+ train.batchsize: unknown field; did you mean",
        ),
        (
            {"source": {"margn": 0.1}},
            r"^\S*online.yaml:\d+:\d+ source.margn: unknown field;[^\n]*$",
        ),
        ({"train": {**DPO, "data": 5}}, r"online.yaml:\d+:\d+ train.data: must be a mapping"),
        ({"sets": ["engines.here={engine: scripted}"]}, "each round serves the weights"),
        ({"pipeline": "nowhere.yaml"}, "nowhere.yaml"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(tmp_path, changes, words):
    file = project_in(tmp_path, **changes)
    with pytest.raises(ConfigError, match=words):
        train(file, quiet=True)
    assert not (tmp_path / "out").exists() and not (tmp_path / "store").exists()


def test_messages_name_the_fields_of_the_file(tmp_path):
    """A stage's configuration is made from the rounds' file, and has its fields elsewhere."""
    model = trained.make_model(tmp_path / "model")
    rows = [
        {"prompt": f"p{i}", "chosen": "a b", "rejected": "c", "p_chosen": 0.6} for i in range(4)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "online.yaml").write_text("source: {margin: 0.3}\ntrain: {pad_token: nothing}\n")
    document = yamlio.load_document(tmp_path / "online.yaml")
    config = OnlineConfig(pipeline="", out=str(tmp_path), source={"margin": 0.3})
    pipeline = SimpleNamespace(name="small", store=str(tmp_path))
    ((stage, part, made),) = stages(config, pipeline, 1, str(model), str(model), document)
    of_files = {"files": str(tmp_path / "rows.jsonl"), "margin": 0.3}
    data = DataConfig(sources=[of_files])
    data.written_as(made.data._written_as, made.data.sources[0]._written_as)
    with pytest.raises(ConfigError, match=r"4 of 4 rows .*the setting is source\.margin$"):
        read_rows("preference", data)
    data = DataConfig(sources=[{**of_files, "margin": 0.0}], max_length=8)
    data.written_as("train.data", "source")
    with pytest.raises(ConfigError, match=r"or write train\.data\.too_long: drop"):
        tokenised([{"prompt": [{"content": "x"}]}], lambda row: [{"length": 9}], data, [], "train")
    with (
        pytest.raises(
            ConfigError, match=r"online.yaml:2:\d+ train.pad_token: 'nothing' is no token"
        ),
        _errors_as_written(stage, part, document),
    ):
        load_tokenizer(str(model), pad_token="nothing")


def test_a_policy_that_was_changed_by_hand_is_told(tmp_path):
    folder = tmp_path / "round-1/dpo"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    row = {"policy": str(folder), "trained": model_identity(str(folder)), "stopped": ""}
    (tmp_path / "round-1/round.json").write_text(json.dumps(row))
    config = OnlineConfig(pipeline="pipeline.yaml", out=str(tmp_path))
    assert ended(config, 1) == row and ended(config, 2) is None
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="is not what round 1 trained"):
        ended(config, 1)


if __name__ == "__main__":
    from tests.support.killer import at_random, until_done

    until_done(
        lambda: train(Path(sys.argv[1]), quiet=True),
        at_random(int(sys.argv[2]), int(sys.argv[3]), 4.0),
    )
