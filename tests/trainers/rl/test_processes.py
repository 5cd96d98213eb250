"""PPO and GRPO in two processes (gloo): the numbers of one process, the same bits after kills, and
an end of both where one fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from prefab.factory.errors import ConfigError
from prefab.trainers.common import load_policy
from prefab.trainers.rl import batches, checkpoint, grpo, processes, rewards
from tests.support import kill_ppo_driver, two_ppo_driver

# counts of tokens (one is clipped or not by the last digit), times, and texts
COUNTED = ("clip_fraction", "value_clip_fraction", "times", "eval/samples")
SMALL = {"steps": 4, "batch_size": 8, "minibatches": 1, "save_every": 2, "reference_samples": 8}


def ran(forks, models, jobs) -> dict[str, str]:
    """What the driver printed of each job."""
    done = forks.run([two_ppo_driver.__file__, models, json.dumps(jobs)], timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    parts = done.stdout.split("job ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in parts}


@pytest.fixture(scope="module")
def two(models, training_forks):
    """PPO in two processes, in the folder `two`."""
    return ran(training_forks, models, [{"out": "two", "changes": SMALL}])


@pytest.fixture(scope="module")
def told(two, models, training_forks):
    return ran(
        training_forks,
        models,
        [
            {"out": "killed", "changes": {**SMALL, "fault": "killed"}},
            {"out": "nan", "changes": {**SMALL, "fault": "nan", "max_bad": 2}},
            {"out": "two-grpo", "changes": {"method": "grpo"}},
            {"out": "killed-grpo", "changes": {"method": "grpo", "fault": "killed"}},
            {"out": "two-rloo", "changes": {"method": "rloo", "micro_batch": 3}},
        ],
    )


def steps(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name not in COUNTED}
        for row in checkpoint.read_metrics(folder / checkpoint.METRICS)
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_policy(str(folder / "policy")).named_parameters())


@pytest.mark.slow
def test_two_processes_train_as_one(two, models):
    kill_ppo_driver.train(kill_ppo_driver.config(models, "one", **SMALL))
    one, two = steps(models / "one"), steps(models / "two")
    assert [row["step"] for row in two] == list(range(5))
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5), mine["step"]
    assert len({row["policy_loss"] for row in two[1:]}) > 2
    a, b = weights(models / "one"), weights(models / "two")
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)
    start = dict(load_policy(str(models / "policy")).named_parameters())
    assert any(not torch.allclose(a[name], start[name], atol=1e-3) for name in a)  # it did train


@pytest.mark.slow
def test_two_processes_that_were_killed_give_the_same_bits(told, models):
    assert "1 killed" in told["killed"] and steps(models / "killed") == steps(models / "two")
    for name in ("policy", "best"):
        one, other = (models / out / name / "model.safetensors" for out in ("two", "killed"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_two_processes_train_grpo_as_one(told, models, method, monkeypatch):
    monkeypatch.setattr(batches, "CALL_CPU", 0)  # as in the driver
    settings = two_ppo_driver.grpo_config(models, f"one-{method}", method=method)
    grpo.run(settings, two_ppo_driver.PROMPTS, rewards.single(kill_ppo_driver.WORLD.reward))
    one, two = steps(models / f"one-{method}"), steps(models / f"two-{method}")
    assert [row["step"] for row in two] == [1, 2, 3] and two[0]["reward_sd"] > 0
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5), mine["step"]
    a, b = weights(models / f"one-{method}"), weights(models / f"two-{method}")
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


@pytest.mark.slow
def test_grpo_in_two_processes_that_was_killed_gives_the_same_bits(told, models):
    assert "1 killed" in told["killed-grpo"]
    assert steps(models / "killed-grpo") == steps(models / "two-grpo")
    one, other = (models / f"{name}-grpo/policy/model.safetensors" for name in ("two", "killed"))
    assert one.read_bytes() == other.read_bytes()


def check_ended(told, models, fault, codes):
    assert f"ended with {codes}" in told[fault]
    assert sorted(p.name for p in (models / fault).glob("checkpoint-*"))[-1] == "checkpoint-2"
    assert len(steps(models / fault)) == 3  # of the start and two steps: it can go on from there


@pytest.mark.slow
def test_a_number_that_is_none_in_one_process_ends_both_with_the_reason(told, models):
    words = "process {}: the loss was not finite in 2 updates in a row"
    assert all(words.format(k) in told["nan"] for k in (0, 1))
    check_ended(told, models, "nan", "1 and 1")


@pytest.mark.slow
def test_when_one_process_dies_the_other_ends(models, training_forks):
    faults = {name: {**SMALL, "fault": name} for name in ("die", "raise")}
    jobs = [{"out": name, "changes": changes} for name, changes in faults.items()]
    told = ran(training_forks, models, jobs)
    assert all("process 0 ends because another one did" in told[name] for name in faults)
    assert "process 1: memory ran out" in told["raise"]
    check_ended(told, models, "die", "1 and -9")
    check_ended(told, models, "raise", "1 and 1")


def test_gathered_shares_are_in_their_order(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number, rows in ((0, [0, 2, 4]), (1, [1, 3])):
        monkeypatch.setenv("RANK", str(number))
        assert list(processes.share(range(5))) == rows


def test_sharded_models_are_refused():
    class Sharded:
        distributed_type = "DistributedType.FSDP"

    with pytest.raises(ConfigError, match="cannot train with FSDP.*prefab export --format verl"):
        processes.check_kind(Sharded())
