"""GRPO and RLOO through TRL with our rewards: their own optima, resumption, unfinished answers,
stops."""

from __future__ import annotations

import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from prefab.factory.errors import ConfigError
from prefab.trainers import common
from prefab.trainers.common import COMPLETE, Lora, TrainError, load_policy
from prefab.trainers.registry import STAGES
from prefab.trainers.rl import checkpoint, grpo, rewards
from tests.support import answer_world as aw
from tests.support import exact_optimum, tinymodel

torch.set_num_threads(1)
WORLD = aw.World(length=2)
PROMPTS = list(WORLD.prompts)


@pytest.fixture
def make(models, tmp_path):
    def settings(**changes) -> grpo.GrpoConfig:
        return grpo.GrpoConfig(
            **(
                {
                    "model": str(models / "policy"),
                    "out": str(tmp_path / "out"),
                    "steps": 4,
                    "batch_size": 16,
                    "micro_batch": 8,
                    "group": 4,
                    "max_new_tokens": 2,
                    "learning_rate": 5e-3,
                    "beta": 0.1,
                    "kl_stop": None,
                    "reference_samples": 64,
                    "threads": 1,
                    "save_every": 2,
                    "eval_every": 2,
                }
                | changes
            )
        )

    return settings


def train(config, reward=WORLD.reward, **more):
    seen: list[dict] = []
    state = grpo.run(config, PROMPTS, rewards.single(reward), on_step=seen.append, **more)
    return state, seen


def weights(folder):
    return {name: p.detach().clone() for name, p in load_policy(str(folder)).named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.slow
@pytest.mark.parametrize("method", exact_optimum.METHODS)
@pytest.mark.parametrize("length", [1, 2])
def test_each_method_ends_at_its_own_optimum(tmp_path, method, length):
    """One cell of the grid of benchmarks/exact_optimum.py, for every method and length."""
    row = exact_optimum.run_one(tmp_path, method, length, 0.6, 1)
    assert row["tv_end"] <= exact_optimum.GOAL < 0.3 < row["tv_start"]
    assert row["tv_to_other_optima"]["no training"] > 0.1


@pytest.mark.slow  # bf16 takes long on a CPU that has no instructions for it
def test_a_second_run_of_another_precision_in_one_process_trains(make, tmp_path):
    """TRL makes an accelerator of its own, and sets the precision for all later ones."""
    for precision in ("bf16", "fp32"):
        config = make(out=str(tmp_path / precision), precision=precision, steps=1, save_every=1)
        state, (step,) = train(config)
        assert state.step == 1 and step["loss"] == pytest.approx(step["loss"])  # a number
    fresh = make(out=str(tmp_path / "fresh"), steps=1, save_every=1)
    train(fresh)
    first, again = (weights(tmp_path / name / "policy") for name in ("fp32", "fresh"))
    assert same(first, again) and not same(weights(tmp_path / "bf16/policy"), first)


@pytest.mark.slow
def test_grpo_ends_at_the_optimum_of_a_world_of_one_token(tmp_path):
    row = exact_optimum.run_one(tmp_path, "grpo forward", 1, 0.6, 1, steps=50, rate=1e-2)
    assert row["tv_end"] <= exact_optimum.GOAL < 0.3 < row["tv_start"]
    assert row["tv_to_other_optima"]["ppo, rloo"] > 0.05


def test_trls_advantages_are_ours(make):
    """What TRL makes of rewards, group by group, against our own formula: which mean it takes off
    decides the optimum."""
    for method in ("grpo", "rloo"):
        given: list[float] = []

        def reward(prompts, completions, given=given):
            given.extend(WORLD.reward(prompts, completions))
            return given[-len(completions) :]

        t = grpo.prepare_run(
            make(method=method, beta=0.0, micro_batch=16, normalise="none", unfinished_score=None),
            PROMPTS,
            rewards.single(reward),
        )
        trainer = grpo._trainer(t, grpo.watch(t, None, [], [], None))
        batch = trainer._generate_and_score_completions(
            [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS * 2 for _ in range(4)]
        )
        rewards_PG = torch.tensor(given).view(-1, 4)
        ours = rewards_PG - rewards_PG.mean(1, keepdim=True)
        if method == "rloo":  # less the mean of the other three answers
            ours *= 4 / 3
        assert torch.allclose(batch["advantages"].flatten(), ours.flatten(), atol=1e-6), method


def test_it_is_recorded_watched_and_goes_on_where_it_was_stopped(make, tmp_path):
    gold = rewards.Source("gold", (WORLD.reward,))
    _, seen = train(
        make(out=str(tmp_path / "whole"), store=str(tmp_path / "store")),
        gold=gold,
        eval_prompts=PROMPTS * 8,
    )
    assert [m["step"] for m in seen] == [1, 2, 3, 4] and [("eval/gold" in m) for m in seen] == [
        False,
        True,
    ] * 2
    assert {"reward", "reward/reward", "kl", "entropy", "length", "unfinished"} <= seen[0].keys()
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-6) and seen[3]["kl"] > 1e-4
    calls = []

    def dies(prompts, completions):
        calls.append(1)
        if len(calls) > 5:  # calibration, two halves of two steps, then in the third
            raise KeyboardInterrupt
        return WORLD.reward(prompts, completions)

    config = make(out=str(tmp_path / "stopped"))
    with pytest.raises(KeyboardInterrupt):
        train(config, dies, gold=gold, eval_prompts=PROMPTS * 8)
    assert (tmp_path / "stopped/checkpoint-2" / COMPLETE).exists()
    state, _ = train(config, gold=gold, eval_prompts=PROMPTS * 8)
    assert [e.step for e in state.evaluations] == [0, 2, 4] and state.step == 4
    assert same(weights(tmp_path / "whole/policy"), weights(tmp_path / "stopped/policy"))
    told = [
        [
            {k: v for k, v in m.items() if k != "times"}
            for m in checkpoint.read_metrics(tmp_path / f / checkpoint.METRICS)
        ]
        for f in ("whole", "stopped")
    ]
    assert told[0] == told[1]


@pytest.mark.slow
def test_a_run_of_constant_learning_rate_may_go_on_for_longer(make, tmp_path):
    for out, steps in (("out", 2), ("out", 4), ("whole", 4)):
        train(make(out=str(tmp_path / out), steps=steps, schedule="constant"))
    assert same(*(weights(tmp_path / name / "policy") for name in ("out", "whole")))


def test_unfinished_answers_get_the_fixed_score(make):
    read: list[str] = []

    def reward(prompts, completions):
        read.extend(completions)
        return [float(len(c)) for c in completions]

    _, seen = train(
        make(steps=1, normalise="none", unfinished_score=-7.0, batch_size=64, micro_batch=64),
        reward,
    )
    n = 64 - len(read)
    assert (
        0 < round(seen[0]["unfinished"] * 64) <= n < 64
    )  # TRL takes a last token that is the pad token for an end
    assert seen[0]["reward"] == pytest.approx((-7.0 * n + sum(map(len, read))) / 64, abs=1e-4)


@pytest.mark.slow
def test_lora_and_another_reference(make, models, tmp_path):
    _, seen = train(make(lora=Lora(rank=4, alpha=8.0), steps=2, learning_rate=0.05))
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-6) and seen[1]["kl"] > 1e-4
    assert weights(tmp_path / "out/policy").keys() == weights(models / "policy").keys()
    config = make(
        lora=Lora(rank=4, alpha=8.0), steps=4, learning_rate=0.05, out=str(tmp_path / "whole")
    )
    train(config)
    shutil.rmtree(tmp_path / "whole/checkpoint-4")  # as if it had been killed in its last step
    expected = weights(tmp_path / "whole/policy")
    _, again = train(config)
    assert [m["step"] for m in again] == [3, 4] and same(
        expected, weights(tmp_path / "whole/policy")
    )
    _, other = train(
        make(reference=str(models / "reference"), out=str(tmp_path / "other"), steps=1)
    )
    assert other[0]["kl"] > 0.05
    state, _ = train(
        make(reference=str(models / "reference"), out=str(tmp_path / "stop"), kl_stop=0.01)
    )
    assert state.step == 1 and "beyond kl_stop" in state.stopped


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda p, c: 1 / 0, "raised ZeroDivisionError"),
        (lambda p, c: [0.5], "gave 1 values for"),
        (lambda p, c: [float("nan")] * len(c), "gave nan"),
        (lambda p, c: [0.25] * len(c), "the same value"),
    ],
)
def test_bad_rewards_are_told(make, reward, words):
    for normalise in ("reference", "none"):
        with pytest.raises(TrainError, match=words):
            train(
                make(normalise=normalise, unfinished_score=None, out=make().out + normalise), reward
            )


def test_what_does_not_fit_together_is_told(make):
    for changes, words in (
        ({"batch_size": 18}, "multiple of group"),
        ({"method": "rloo", "kl": "forward"}, "are GRPO's"),
        ({"lora": Lora(), "reference": "x"}, "leave reference out"),
    ):
        with pytest.raises(ValueError, match=words):
            make(**changes)
    train(make(steps=1))
    with pytest.raises(ConfigError, match="differs in beta"):
        train(make(steps=1, beta=0.5))


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_presets_are_configurations(stage):
    from pathlib import Path

    from prefab.pipelines.training.stages import load_config

    assert (
        load_config(Path(stage), STAGES[stage].config, ["steps=3", "rewards.0.weight=2"])
        .rewards[0]
        .weight
        == 2
    )
    with pytest.raises(ConfigError, match='--set beta=x beta: must be a number, not "x"'):
        load_config(Path(stage), STAGES[stage].config, ["beta=x"])
    with pytest.raises(ConfigError, match='unknown field; did you mean "beta"'):
        load_config(Path(stage), STAGES[stage].config, ["betta=1"])


def test_an_answer_ends_where_the_template_ends_it(make, tmp_path):
    """Though the tokenizer's EOS is another token: TRL stops sampling at that one alone."""
    folder = tinymodel.build(tmp_path / "base", heads=2, hidden=32, layers=1)
    tokenizer = common.load_tokenizer(str(folder))
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    t = grpo.prepare_run(make(model=str(folder)), PROMPTS, rewards.single(WORLD.reward))
    assert t.tokenizer.eos_token == "<|im_end|>"
    assert t.tokenizer.convert_tokens_to_ids("<|im_end|>") in t.ends
