"""Two CPU processes under `accelerate launch` train as one does; the shipped configurations are
what accelerate takes."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from prefab.trainers.common import COMPLETE, checkpoints
from prefab.trainers.registry import STAGES
from tests.support import kill_two_driver, trained

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "trainers/accelerate").glob("*.yaml"))
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("accelerate")
    return trained.make_store(root), trained.make_model(root / "model")


def losses(out: Path) -> list[float]:
    states = sorted(
        out.glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name[11:])
    )
    return [h["loss"] for h in json.loads(states[-1].read_text())["log_history"] if "loss" in h]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def command(stage: str, file: Path) -> list[str]:
    """Two processes on a free port; the shipped configuration."""
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "trainers/accelerate/cpu.yaml"),
        "--main_process_port",
        "0",
        "-m",
        "prefab.pipelines.cli.main",
        "train",
        stage,
        str(file),
        "--json",
    ]


def launched(stage: str, file: Path) -> dict:
    """The result of a training by two processes, of which one prints."""
    done = subprocess.run(
        command(stage, file), env=ENV, text=True, capture_output=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "sft", "reward", "kto"])
def test_two_launched_processes_train_as_one(world, tmp_path, stage):
    """54 rows or so in steps of 10 over two epochs: the last step of each is smaller, and is shared
    all the same."""
    store, model = world
    config = {
        "model": str(model),
        "data": trained.data(store),
        "batch_size": 10,
        "micro_batch": None,
        "learning_rate": 2e-3,
        "epochs": 2,
        "eval_every": 5,
        "keep": "last",
        "share_prompt": False,
    }
    if stage == "reward":
        config["patience"] = None
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**config, "out": str(tmp_path / name)}))
    module = STAGES[stage]
    one = module.run(
        STAGES[stage].config.model_validate(json.loads((tmp_path / "one.yaml").read_text())),
        quiet=True,
    )
    two = launched(stage, tmp_path / "two.yaml")
    assert one["train"] % 10 and two["steps"] == one["steps"] == 2 * -(-one["train"] // 10)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert len(set(losses(tmp_path / "two"))) > 2
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    a, b = (weights(tmp_path / name) for name in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_two_processes_that_were_killed_give_the_same_bits(world, tmp_path, stage, training_forks):
    """At random moments, the first of them in all likelihood before any checkpoint; and those of
    one process, but for rounding. Forks stand in for the launcher."""
    store, model = world
    config = {
        "model": str(model),
        "data": trained.data(store),
        "batch_size": 10,
        "learning_rate": 2e-3,
        "epochs": 2,
        "eval_every": 2,
        "threads": 1,
    }
    driver = [kill_two_driver.__file__, stage, "1"]
    for name, kills in (("whole", 0), ("cut", 2)):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({**config, "out": str(tmp_path / name)}))
        driver.append(f"{file}:{kills}")
    done = training_forks.run(driver, env=ENV, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, cut = done.stdout.splitlines()[-2:]
    assert whole == "0 killed" != cut
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    single = {**config, "out": str(tmp_path / "one")}
    STAGES[stage].run(STAGES[stage].config.model_validate(single), quiet=True)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    assert len(set(losses(tmp_path / "one"))) > 2
    alone = weights(tmp_path / "one")
    assert all(torch.allclose(alone[name], one[name], atol=1e-4) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_two_processes_killed_at_any_moment_and_launched_again_give_the_same_bits(
    world, tmp_path, stage
):
    """Killed after the first whole checkpoint, at a moment drawn anew each time, while the next
    ones are computed or written; over two epochs, with a smaller last step in each."""
    store, model = world
    config = {
        "model": str(model),
        "data": trained.data(store),
        "batch_size": 10,
        "learning_rate": 2e-3,
        "epochs": 2,
        "eval_every": 2,
        "keep_checkpoints": 99,
        "threads": 1,
    }
    files = {name: tmp_path / f"{name}.yaml" for name in ("whole", "cut")}
    for name, file in files.items():
        file.write_text(json.dumps({**config, "out": str(tmp_path / name)}))
    steps = launched(stage, files["whole"])["steps"]
    cut, at = tmp_path / "cut", random.choice((4, 6))
    running = subprocess.Popen(
        command(stage, files["cut"]),
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    end, began = time.monotonic() + 900, None
    while (
        not (cut / f"checkpoint-{at}").exists()
        and running.poll() is None
        and time.monotonic() < end
    ):
        if began is None and (cut / f"checkpoint-2/{COMPLETE}").exists():
            began = time.monotonic()
        time.sleep(0.002)
    if began:  # within two steps from here, as long as they take now
        time.sleep(random.random() * 2 * (time.monotonic() - began) / (at - 2))
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    gone = time.monotonic() + 60  # without `end_with_launcher` they would train on to the end
    while (left := trainers(files["cut"])) and time.monotonic() < gone:
        time.sleep(0.01)
    whole = [p.name for p in checkpoints(cut)]
    assert not left and began and whole and not (cut / "model.safetensors").exists()
    print(f"killed after {whole[-1]} of {steps} steps")
    assert launched(stage, files["cut"])["steps"] == steps
    one, other = weights(tmp_path / "whole"), weights(cut)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert losses(cut) == losses(tmp_path / "whole")
    assert any(
        not torch.equal(one[name], w) for name, w in weights(Path(model)).items() if name in one
    )  # it did train


def trainers(file: Path) -> list[int]:
    """The processes that train by this file."""
    return [
        p.pid
        for p in psutil.process_iter(["cmdline", "status"])
        if str(file) in (p.info["cmdline"] or ()) and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerates_own_classes_take_the_shipped_files(file, monkeypatch):
    """Unknown keys are refused by ClusterConfig; what the launcher would hand on is what the
    plugins read."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin

    found = load_config_from_file(str(file))
    assert found.num_processes >= 2 and not found.use_cpu
    if file.stem == "fsdp":
        for name, value in found.fsdp_config.items():
            monkeypatch.setenv(name.upper(), str(value))
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
        assert (
            "FULL_STATE_DICT" in str(plugin.state_dict_type)
            and not plugin.cpu_ram_efficient_loading
        )
        known = set(FullyShardedDataParallelPlugin.__dataclass_fields__)
        assert {name.removeprefix("fsdp_") for name in found.fsdp_config} - {
            "version",
            "offload_params",
        } <= known
    if file.stem == "zero3":
        assert (
            found.deepspeed_config["zero_stage"] == 3
            and found.deepspeed_config["zero3_save_16bit_model"] is True
        )
        launch = (Path(torch.__file__).parents[1] / "accelerate/commands/launch.py").read_text()
        assert all(f"--{name}" in launch for name in found.deepspeed_config)


def test_every_shipped_configuration_is_told_of():
    page = (ROOT / "docs/training.md").read_text()
    assert [f.name for f in FILES] == ["cpu.yaml", "fsdp.yaml", "zero3.yaml"]
    assert all(re.search(rf"trainers/accelerate/{f.name}", page) for f in FILES)


def test_rows_that_fill_a_step_teach_nothing():
    from datasets import Dataset

    from prefab.trainers.distributed import Padded

    pairs = Padded(Dataset.from_list([{"weight": 2.0, "x": i} for i in range(5)]), 4)
    assert (
        len(pairs) == 8
        and pairs[4] == {"weight": 2.0, "x": 4}
        and pairs[5] == pairs[7] == {"weight": 0.0, "x": 0}
    )
    talks = Padded(Dataset.from_list([{"weight": 1.0, "labels": [-100, 7]}]), 2)
    assert talks[1] == {"weight": 1.0, "labels": [-100, -100]}
    packed = Padded(Dataset.from_list([{"weight": [1.0], "labels": [[-100, 7], [3]]}]), 2)
    assert (
        packed[1]["labels"] == [[-100, -100], [-100]]
        and len(Padded(Dataset.from_list([{"weight": 1.0}] * 4), 2)) == 4
    )
