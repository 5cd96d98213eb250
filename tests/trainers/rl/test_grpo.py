"""GRPO and RLOO: the loss and gradient of TRL's trainers, their own optima, resumption, answers
without a score or an end, stops."""

from __future__ import annotations

import copy
import shutil
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from prefab.factory.errors import ConfigError
from prefab.trainers import collate, common
from prefab.trainers.common import COMPLETE, Lora, TrainError, load_policy
from prefab.trainers.registry import STAGES
from prefab.trainers.rl import batches, checkpoint, grpo, loop, rewards, rollout
from prefab.trainers.rl import models as models_of
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


@pytest.mark.slow
def test_grpo_ends_at_the_optimum_of_a_world_of_one_token(tmp_path):
    row = exact_optimum.run_one(tmp_path, "grpo forward", 1, 0.6, 1, steps=50, rate=1e-2)
    assert row["tv_end"] <= exact_optimum.GOAL < 0.3 < row["tv_start"]
    assert row["tv_to_other_optima"]["ppo, rloo"] > 0.05


# --- the same loss and gradient as TRL's trainers


def drawn(t, n=16):
    """Answers of the run's policy to the prompts of its first step, and the number of their
    groups."""
    rows = loop.prompts_of_step(t, 0)[:n]
    answers = t.sampler.sample([t.prompt_ids[i] for i in rows], 3)
    return rows, answers, [b // t.config.group for b in range(len(rows))]


def trl_trainer(t, out, rows, answers, scores):
    """TRL's trainer of the same method, policy and reference, which samples these answers and
    scores them so."""
    from datasets import Dataset
    from trl import import_utils

    # vLLM, which takes seconds to import, samples nothing here
    with mock.patch.object(import_utils, "is_vllm_available", return_value=False):
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.trainer.utils import add_fused_lm_head

    c, is_grpo = t.config, t.config.method == "grpo"
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": len(answers),
        "gradient_accumulation_steps": 1,
        "num_generations": c.group,
        "num_iterations": 2,  # so that the log-probabilities before the update are kept
        "max_completion_length": c.max_new_tokens,
        "temperature": c.temperature,
        "beta": c.beta,
        "epsilon": c.clip,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    if is_grpo:
        args = GRPOConfig(
            **settings,
            loss_type="dapo",
            scale_rewards=c.scale_rewards,
            use_bias_correction_kl=c.kl == "reverse",
        )
    else:
        args = RLOOConfig(**settings)
    asked = [{"prompt": [{"role": "user", "content": PROMPTS[i]}]} for i in rows]
    trainer = (GRPOTrainer if is_grpo else RLOOTrainer)(
        model=copy.deepcopy(t.policy),
        reward_funcs=lambda **_: scores,
        args=args,
        processing_class=t.tokenizer,
        train_dataset=Dataset.from_list(asked),
    )
    reference = copy.deepcopy(t.reference)
    add_fused_lm_head(reference, temperature=c.temperature)
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    ids = [answer.ids for answer in answers]
    told: list[list[list[int]]] = []

    def single_turn(prompt_ids, *_, **__):
        told.append(prompt_ids)
        return (ids, None) if is_grpo else ids

    trainer._generate_single_turn = single_turn
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions(asked)
    assert told == [[answer.prompt for answer in answers]]
    return trainer, batch


@pytest.mark.slow_but(
    str({"kl": "reverse", "scale_rewards": "batch", "temperature": 0.7}), str({"method": "rloo"})
)
@pytest.mark.parametrize(
    "changes",
    [
        {"kl": "reverse", "scale_rewards": "none"},
        {"kl": "forward", "scale_rewards": "group"},
        {"kl": "reverse", "scale_rewards": "batch", "temperature": 0.7},
        {"beta": 0.0},
        {"method": "rloo"},
    ],
    ids=str,
)
def test_an_update_has_the_loss_and_the_gradient_of_trls(make, models, tmp_path, changes):
    """On the same answers, by a policy that has moved since they were sampled."""
    config = make(
        **{"beta": 0.3, "clip": 0.1, "max_grad_norm": 1e9, "learning_rate": 1e-9, **changes},
        epochs=2,  # else the gradient is that of the policy that sampled
        micro_batch=5,
        reference=str(models / "reference"),
        max_new_tokens=3,
    )
    t = grpo.prepare_run(config, PROMPTS, rewards.single(WORLD.reward))
    rows, answers, groups = drawn(t)
    assert len({len(answer.ids) for answer in answers}) > 1
    scores = torch.randn(len(answers), generator=torch.Generator().manual_seed(1)).tolist()
    batch, kl = loop.estimate(t, answers, scores, {}, groups)
    assert batch.sums is None
    trainer, theirs = trl_trainer(t, tmp_path, rows, answers, scores)
    assert torch.allclose(batch.advantages[:, 0], theirs["advantages"], atol=1e-5) and kl != 0
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for ours, other in zip(t.policy.parameters(), trainer.model.parameters(), strict=True):
            noise = 0.1 * torch.randn(ours.shape, generator=draw)
            ours += noise
            other += noise
    loss = trainer._compute_loss(trainer.model, theirs)
    loss.backward()
    done = loop._minibatch(t, batch, list(range(len(answers))))
    assert done["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
    assert done["clip_fraction"] == pytest.approx(clipped) and 0 < clipped < 1
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, p in t.policy.named_parameters():
        assert torch.allclose(p.grad, gradients[name], atol=1e-6), name
    assert max(float(g.abs().max()) for g in gradients.values()) > 0.01


@pytest.mark.parametrize("at_once", [2**26, 20])  # logits in tiles: two answers' tokens at a time
def test_a_step_of_one_update_takes_everything_from_one_forward(
    make, models, tmp_path, monkeypatch, at_once
):
    """The same metrics and weights as with a forward of the policy before the update."""
    monkeypatch.setattr(collate, "LOGITS_AT_ONCE", at_once)
    reference, calls, forward = str(models / "reference"), [], rollout.forward

    def counted(*rest, **more):
        calls.append(None)
        return forward(*rest, **more)

    monkeypatch.setattr(rollout, "forward", counted)
    monkeypatch.setattr(rollout, "can_share", lambda _: True)  # without its trial
    _, once = train(make(out=str(tmp_path / "once"), reference=reference))
    n = len(calls)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "in_one_pass", lambda t: False)
        _, twice = train(make(out=str(tmp_path / "twice"), reference=reference))
    assert n == 2 / 3 * (len(calls) - n) > 0  # of the reference, and before and in the update
    for one, other in zip(once, twice, strict=True):
        del one["times"], other["times"]
        assert one == pytest.approx(other, abs=1e-5)
    a, b = weights(tmp_path / "once/policy"), weights(tmp_path / "twice/policy")
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert once[0]["entropy"] > 0.1 and once[0]["kl"] > 0.01


@pytest.mark.slow_but("{}-20")
@pytest.mark.parametrize(
    ("changes", "at_once"),
    [({}, 20), ({"minibatches": 2}, 2**26), ({"method": "rloo"}, 2**26)],  # at_once: in tiles
    ids=str,
)
def test_a_run_whose_answers_share_their_prompts_is_the_same(
    make, models, tmp_path, monkeypatch, changes, at_once
):
    """The same metrics and weights as where each answer has its prompt in a row of its own."""
    monkeypatch.setattr(collate, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(batches, "CALL_CPU", 0)  # these prompts are short: a forward costs more
    pack, found = batches.pack, []
    for share in (True, False):
        packed = []
        monkeypatch.setattr(rollout, "can_share", lambda _, share=share: share)
        monkeypatch.setattr(
            batches, "pack", lambda *a, packed=packed: packed.append(pack(*a)) or packed[-1]
        )
        more = {"out": str(tmp_path / str(share)), "reference": str(models / "reference")}
        found.append(train(make(**changes, **more, max_new_tokens=3))[1])
        assert share == any(some.prompts is not None for some in packed)
    for one, other in zip(*found, strict=True):
        del one["times"], other["times"]
        assert one == pytest.approx(other, abs=1e-5)
    a, b = (weights(tmp_path / name / "policy") for name in ("True", "False"))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_layers_with_gradient_checkpointing_keep_no_cache(make, monkeypatch):
    """They share in the forwards before the update alone."""
    monkeypatch.setattr(batches, "CALL_CPU", 0)
    config = make(gradient_checkpointing=True, reference=None)
    t = grpo.prepare_run(config, PROMPTS, rewards.single(WORLD.reward))
    _, answers, _ = drawn(t)
    shared = [
        {
            packed.prompts is not None
            for _, packed in models_of.packed_batches(t, answers, range(16), training)
        }
        for training in (False, True)
    ]
    assert shared == [{True}, {False}]


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_answers_sampled_ahead_weigh_as_much_as_the_update_made_them_likelier(make, method):
    """Each token in GRPO, each answer in RLOO, at most the cap."""
    config = make(method=method, importance_cap=2.0, beta=0.0, max_new_tokens=3)
    t = grpo.prepare_run(config, PROMPTS, rewards.single(WORLD.reward))
    _, answers, groups = drawn(t)
    scores = [float(b % 5) for b in range(len(answers))]
    plain, _ = loop.estimate(t, answers, scores, {}, groups)
    ratios = torch.tensor([1.5, 0.5, 4.0])[torch.arange(len(answers)) % 3]
    for b, answer in enumerate(answers):  # all of it in the last token
        answer.sampler_logps[:] = plain.logps[b, : len(answer.ids)].tolist()
        answer.sampler_logps[-1] -= float(ratios[b].log())
    t.off_policy, metrics = True, {}
    batch, _ = loop.estimate(t, answers, scores, metrics, groups)
    weights = torch.ones_like(plain.advantages) if method == "grpo" else torch.ones(16, 1)
    for b, answer in enumerate(answers):
        weights[b, len(answer.ids) - 1 if method == "grpo" else 0] = ratios[b].clamp(max=2.0)
    mask = batch.mask if method == "grpo" else batch.mask[:, :1]
    assert plain.advantages.abs().max() > 1
    assert torch.allclose(batch.advantages * mask, plain.advantages * weights * mask, atol=1e-4)
    mean = float((weights * mask).sum() / mask.sum())
    assert metrics["importance"] == pytest.approx(mean, abs=1e-4)


def test_an_answer_without_a_score_is_left_out_of_its_group(make):
    """The others are compared as if it had not been there; alone, an answer has no advantage."""
    config = make(beta=0.0, unfinished_score=None)
    t = grpo.prepare_run(config, PROMPTS, rewards.single(WORLD.reward))
    rows, answers, _ = drawn(t)
    texts = [str(b) for b in range(16)]
    values = [None, 1.0, 2.0, 6.0, *[float(b) for b in range(4)], *[None] * 3, 5.0, *[1.0] * 4]
    t.sources = rewards.single(lambda prompts, completions: values)
    kept, scores, metrics = loop.score(t, [PROMPTS[i] for i in rows], answers, texts)
    assert metrics["unscored"] == 4 and len(kept) == 12
    groups = [b // 4 for b in kept]
    batch, _ = loop.estimate(t, [answers[b] for b in kept], scores, {}, groups)
    wanted = [-2.0, -1.0, 3.0, -1.5, -0.5, 0.5, 1.5, 0.0, *[0.0] * 4]
    assert batch.advantages[:, 0].tolist() == pytest.approx(wanted)


def test_it_is_recorded_watched_and_goes_on_where_it_was_stopped(make, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "CALL_CPU", 0)  # so that these short prompts are shared
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
    named = {
        "reward",
        "reward_sd",
        "reward/reward",
        "kl",
        "entropy",
        "length",
        "unfinished",
        "loss",
    }
    named |= {"clip_fraction", "sampler_gap", "unscored", "distinct_1", "grad_norm", "bad_updates"}
    assert named <= seen[0].keys() and seen[0]["times"]["tokens_per_s"] > 0
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-6) and seen[3]["kl"] > 1e-4
    calls = []

    def dies(prompts, completions):
        calls.append(1)
        if len(calls) > 5:  # calibration, two evaluations, two steps, then in the third
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
    assert 0 < round(seen[0]["unfinished"] * 64) == n < 64
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
    assert state.step == 0 and "differ before any training" in state.stopped
    both = make(
        lora=Lora(), reference=str(models / "reference"), out=str(tmp_path / "both"), steps=1
    )
    _, seen = train(both)
    assert seen[0]["kl"] == pytest.approx(other[0]["kl"], abs=1e-5)  # its own, not the policy


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
    """Though the tokenizer's EOS is another token."""
    folder = tinymodel.build(tmp_path / "base", heads=2, hidden=32, layers=1)
    tokenizer = common.load_tokenizer(str(folder))
    tokenizer.eos_token = "<|im_start|>"
    tokenizer.save_pretrained(folder)
    t = grpo.prepare_run(make(model=str(folder)), PROMPTS, rewards.single(WORLD.reward))
    assert t.tokenizer.convert_tokens_to_ids("<|im_end|>") in t.ends
