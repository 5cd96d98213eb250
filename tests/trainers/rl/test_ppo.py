"""PPO end to end on policies of a few thousand weights: the exact optimum, exact resume, and every
kind of bad input."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import itertools

from prefab.factory.errors import ConfigError
from prefab.trainers.common import Lora, TrainError, checkpoints, load_policy
from prefab.trainers.rl import (
    batches,
    checkpoint,
    evaluation,
    loop,
    models,
    ppo,
    rewards,
    rollout,
    sampling,
)
from prefab.trainers.rl import policy_gradient as pg
from prefab.trainers.rl.state import Batch
from prefab.trainers.steps import step_tokens
from tests.support import answer_world as aw
from tests.support import exact_optimum, kill_ppo_driver

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[3]
WORLD = aw.World(length=3)
PROMPTS = list(WORLD.prompts) * 5


@pytest.fixture
def make(models, tmp_path):
    def settings(out: str | Path = tmp_path / "out", **changes) -> ppo.PpoConfig:
        return kill_ppo_driver.config(
            models, out, **({"steps": 2, "save_every": 100, "reference": None} | changes)
        )

    return settings


def train(config, reward=WORLD.reward, prompts=PROMPTS, **more):
    seen: list[dict] = []
    state = ppo.run(config, prompts, rewards.single(reward), on_step=seen.append, **more)
    return state, seen


def weights(folder):
    return {name: p.detach().clone() for name, p in load_policy(str(folder)).named_parameters()}


def same(a, b, tolerance=0.0):
    return a.keys() == b.keys() and all(
        torch.allclose(a[n], b[n], atol=tolerance, rtol=0) for n in a
    )


# --- the exact optimum: the whole grid is benchmarks/exact_optimum.py


@pytest.mark.parametrize(
    ("length", "steps", "rate", "world"),
    [
        (2, 120, 1e-2, aw.World),
        (2, 120, 1e-2, aw.StepWorld),
        *((n, None, exact_optimum.LEARNING_RATE, aw.World) for n in (1, 2)),
    ],
)
@pytest.mark.slow
def test_ppo_ends_at_its_exact_optimum(tmp_path, length, steps, rate, world):
    row = exact_optimum.run_one(tmp_path, "ppo", length, 0.5, 1, steps, rate, world)
    assert (
        row["tv_end"] <= exact_optimum.GOAL < 0.3 < row["tv_start"]
    )  # the largest over all states
    others = row[
        "tv_to_other_optima"
    ]  # it could have been wrong; of one token, reverse KL as a loss term is the same
    assert others["ppo, rloo"] == 0 and min(others["grpo forward"], others["no training"]) > 0.06
    assert length == 1 or others["grpo reverse, beta as it stands"] > 0.06


@pytest.mark.slow
def test_answers_sampled_by_the_policy_before_the_update_lead_to_the_same_optimum(tmp_path):
    row = exact_optimum.run_one(tmp_path, "ppo", 1, 0.5, 1, 60, 1e-2, sample_ahead=True)
    assert row["tv_end"] <= exact_optimum.GOAL < 0.3 < row["tv_start"]
    (out,) = tmp_path.glob("ppo-*")
    steps = checkpoint.read_metrics(out / checkpoint.METRICS)
    assert "importance" not in steps[0]  # nothing was sampled before it
    assert all(0.5 < m["importance"] < 1.5 for m in steps[1:])
    assert len({m["importance"] for m in steps[1:]}) > 50


@pytest.mark.slow
def test_answers_sampled_ahead_are_of_the_old_policy_and_stop_at_checkpoints(make, tmp_path):
    """A run that is gone on with from a checkpoint ends as one that was not stopped."""
    settings = {"steps": 6, "save_every": 3, "sample_ahead": True, "schedule": "constant"}
    _, seen = train(make(tmp_path / "whole", **settings))
    assert [step["step"] for step in seen if "importance" in step] == [2, 3, 5, 6]
    # what differs is an update, not rounding
    assert all((step["sampler_gap"] > 1e-4) == ("importance" in step) for step in seen)
    train(make(tmp_path / "cut", **{**settings, "steps": 3}))
    _, later = train(make(tmp_path / "cut", **settings))
    assert [step["step"] for step in later] == [4, 5, 6]
    assert same(weights(tmp_path / "cut/policy"), weights(tmp_path / "whole/policy"))
    train(make(tmp_path / "now", **{**settings, "sample_ahead": False}))
    assert not same(weights(tmp_path / "now/policy"), weights(tmp_path / "whole/policy"))


def test_one_process_trains_in_one_precision_after_another(make, tmp_path):
    """accelerate keeps one precision a process and refuses a second, which a run forgets at its
    start. In bf16 the sampler and the training forward round alike, so most tokens have no gap at
    all; in fp32 the order of sums shows in some.
    """
    gaps, off = {}, {}
    for k, precision in enumerate(["fp32", "bf16", "fp32"]):
        t = ppo.prepare_run(
            make(tmp_path / str(k), precision=precision, batch_size=60),
            PROMPTS,
            rewards.single(WORLD.reward),
        )
        assert t.accelerator.mixed_precision == {"fp32": "no"}.get(precision, precision)
        answers = t.sampler.sample(t.prompt_ids, 1)
        mask, logps, *_ = models.policy_kl(t, answers)
        gaps[k] = (rollout.sampler_logps(answers, mask) - logps)[mask].abs()
        with torch.no_grad():
            packed = batches.pack(answers, t.accelerator.device)
            exact, _, _ = rollout.forward(t.policy, packed, t.config.temperature)
        off[k] = (exact - logps)[mask].abs().max()
    assert gaps[0].equal(gaps[2]) and 0 < gaps[0].max() < 1e-5
    assert (gaps[1] == 0).float().mean() > 0.9
    assert max(off[0], off[2]) < 1e-5 < 1e-4 < off[1]  # it did compute in bf16


def test_the_closed_forms_are_optima():
    """Against brute force: no policy nearby has more reward minus beta KL; the forward form
    balances its own gradient."""
    world, beta = aw.World(length=2), 0.3
    draw = torch.Generator().manual_seed(0)

    def random_table():
        return {
            s: torch.rand(5, generator=draw).add(0.1).double().softmax(-1).tolist()
            for s in world.states()
        }

    def objective(policy, reference):
        total = 0.0
        p_ref = aw.answers(world, reference)
        for ids, p in aw.answers(world, policy).items():
            total += p * (
                world.final(ids[:-1], ids[-1]) - beta * (torch.tensor(p / p_ref[ids]).log().item())
            )
        return total

    reference = random_table()
    optimum = aw.reverse_optimum(world, reference, beta)
    sequence = {
        ids: p * torch.tensor(world.final(ids[:-1], ids[-1]) / beta).exp().item()
        for ids, p in aw.answers(world, reference).items()
    }
    for prompt in {
        ids[1] for ids in sequence
    }:  # pi(y) ~ pi_ref(y) exp(r / beta), summed over whole answers
        rows = {ids: w for ids, w in sequence.items() if ids[1] == prompt}
        for ids, w in rows.items():
            assert aw.answers(world, optimum)[ids] * 2 == pytest.approx(
                w / sum(rows.values()), abs=1e-6
            )
    best = objective(optimum, reference)
    for _ in range(20):
        other = random_table()
        mixed = {
            s: [0.97 * a + 0.03 * b for a, b in zip(optimum[s], other[s], strict=True)]
            for s in optimum
        }
        assert objective(mixed, reference) < best
    forward = aw.token_optimum(world, reference, beta, forward=True)
    for s in world.states():
        if (
            len(s) == 3
        ):  # the last token: Q is the reward; stationary where Q + beta ref/pi is one lambda for all
            level = [world.final(s, v) + beta * reference[s][v] / forward[s][v] for v in range(5)]
            assert max(level) - min(level) < 1e-6 and sum(forward[s]) == pytest.approx(1)


# --- exact resume


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bits(models, training_forks):
    done = training_forks.run([kill_ppo_driver.__file__, models, "2", "5"], timeout=900)
    assert done.returncode == 0 and "0 killed" not in done.stdout, done.stdout + done.stderr[-3000:]
    kill_ppo_driver.train(kill_ppo_driver.config(models, "whole"))
    killed, whole = models / "killed", models / "whole"
    assert (killed / "policy/model.safetensors").read_bytes() == (
        whole / "policy/model.safetensors"
    ).read_bytes()
    assert (killed / "best/model.safetensors").read_bytes() == (
        whole / "best/model.safetensors"
    ).read_bytes()
    saved = [
        torch.load(checkpoints(f)[-1] / "state.pt", weights_only=True) for f in (killed, whole)
    ]
    assert [p.name for p in checkpoints(killed)] == ["checkpoint-9", "checkpoint-12"]
    assert same(saved[0]["critic"], saved[1]["critic"]) and saved[0]["state"] == saved[1]["state"]
    for a, b in zip(*(s["optimizer"]["state"].values() for s in saved), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [
        [
            {k: v for k, v in m.items() if k != "times"}
            for m in checkpoint.read_metrics(f / checkpoint.METRICS)
        ]
        for f in (killed, whole)
    ]
    assert steps[0] == steps[1] and [m["step"] for m in steps[0]] == list(range(13))
    import sqlite3

    rows = (
        sqlite3.connect(models / "store" / "ledger.sqlite")
        .execute("SELECT count(*) FROM evals")
        .fetchone()
    )
    assert rows == (13,)  # a step done again is the same evaluation


@pytest.mark.slow
def test_a_checkpoint_that_was_cut_off_is_not_gone_on_from(make, tmp_path):
    train(make(steps=4, save_every=2))
    expected = weights(tmp_path / "out" / "policy")
    torn = tmp_path / "out" / "checkpoint-4"
    (torn / "prefab-complete").unlink()
    (torn / "state.pt").write_bytes(b"half")
    (tmp_path / "out" / checkpoint.METRICS).open("ab").write(b'{"step": 5, "kl"')
    train(make(steps=4, save_every=2))
    assert same(weights(tmp_path / "out" / "policy"), expected)
    assert [m["step"] for m in checkpoint.read_metrics(tmp_path / "out" / checkpoint.METRICS)] == [
        1,
        2,
        3,
        4,
    ]


def test_what_was_measured_of_forwards_goes_on_with_the_run(make):
    t = ppo.prepare_run(make(), PROMPTS, rewards.single(WORLD.reward))
    checkpoint.restore(t)
    assert models.call_of(t) == batches.CALL_CPU
    t.state.call = 500
    checkpoint.save(t)
    again = ppo.prepare_run(make(), PROMPTS, rewards.single(WORLD.reward))
    checkpoint.restore(again)
    assert models.call_of(again) == 500


def test_another_configuration_does_not_go_on_from_this_one(make):
    train(make())
    with pytest.raises(ConfigError, match="differs in beta, the prompts"):
        train(make(beta=0.3), prompts=PROMPTS[:3])


@pytest.mark.slow
def test_a_run_of_constant_learning_rate_may_go_on_for_longer(make, tmp_path):
    train(make(steps=2, schedule="constant"))
    train(make(steps=4, schedule="constant"))
    train(make(tmp_path / "whole", steps=4, schedule="constant"))
    assert same(*(weights(tmp_path / name / "policy") for name in ("out", "whole")))
    with pytest.raises(ConfigError, match="differs in steps"):  # it has gone further than that
        train(make(steps=3, schedule="constant"))
    train(make(tmp_path / "linear"))
    with pytest.raises(ConfigError, match="differs in steps"):  # its learning rate ended at 0
        train(make(tmp_path / "linear", steps=4))


# --- what the parts do in the loop


def test_small_batches_add_up_to_the_same_update(make, tmp_path):
    train(make(out=tmp_path / "a", micro_batch=16))
    train(make(out=tmp_path / "b", micro_batch=3))
    a, b = weights(tmp_path / "a/policy"), weights(tmp_path / "b/policy")
    assert same(a, b, 2e-4) and not same(a, weights(make().model), 2e-3)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(make, tmp_path, monkeypatch):
    """It works in training mode alone, which both models are in for updates, and the policy only
    then.
    """
    modes, sampled, began = set(), set(), time.monotonic()
    loss, answers = ppo.METHOD.loss, sampling.step_answers

    def lost(t, *rest):
        modes.add((t.policy.training, t.critic.training))
        return loss(t, *rest)

    def sampled_of(t, *rest):
        if not sampled:
            time.sleep(0.5)  # the first sampling takes longer than its update
        sampled.add(t.policy.training)
        return answers(t, *rest)

    train(make(out=tmp_path / "a"))
    with monkeypatch.context() as patched:
        patched.setattr(ppo, "METHOD", replace(ppo.METHOD, loss=lost))
        patched.setattr(sampling, "step_answers", sampled_of)
        _, seen = train(make(out=tmp_path / "b", gradient_checkpointing=True))
    assert modes == {(True, True)} and sampled == {False}
    for step in seen:  # shares of the step's time, which the update has the rest of
        times, tokens = step["times"], step["length"] * make().batch_size
        assert min(times.values()) > 0 and times["sampling_share"] + times["scoring_share"] < 1
        assert times["tokens_per_s"] * times["seconds"] == pytest.approx(tokens)
    assert sum(step["times"]["seconds"] for step in seen) <= time.monotonic() - began
    assert same(weights(tmp_path / "a/policy"), weights(tmp_path / "b/policy"), 1e-5)


def test_one_update_is_the_plain_gradient_step(make, tmp_path):
    """One epoch, one minibatch: Adam's first step is lr * sign(gradient); the gradient written out
    plainly by hand."""
    config = make(
        steps=1,
        epochs=1,
        minibatches=1,
        normalise="none",
        beta=0.2,
        value="shared",
        value_coef=1e-9,
        max_grad_norm=1e9,
        weight_decay=0.0,
        learning_rate=1e-3,
        reference=None,
        whiten_advantages=False,
        unfinished_score=None,
        lam=1.0,
    )
    t = ppo.prepare_run(config, PROMPTS, rewards.single(WORLD.reward))
    rows = evaluation.rows_of(config.seed, len(PROMPTS), 0, 16)
    answers = sampling.step_answers(t, [t.prompt_ids[i] for i in rows], 0)
    texts = evaluation.texts_of(t, answers)
    scores = WORLD.reward([aw.LETTERS[a.prompt[-1] - 2] for a in answers], texts)
    model, loss, tokens = load_policy(config.model), 0.0, sum(len(a.ids) for a in answers)
    for a, score in zip(
        answers, scores, strict=True
    ):  # policy is reference, values are 0, lambda 1: A is the score
        logps = model(torch.tensor([a.prompt + a.ids])).logits[0].log_softmax(-1)
        for i, token in enumerate(a.ids):
            loss = loss - score * logps[len(a.prompt) - 1 + i, token] / tokens
    loss.backward()
    _, (metrics,) = train(config)
    after = weights(tmp_path / "out/policy")
    for name, p in model.named_parameters():
        expected = p.detach() - 1e-3 * p.grad / (p.grad.abs() + 1e-5)
        assert torch.allclose(after[name], expected, atol=2e-6), name
    assert metrics["grad_norm"] == pytest.approx(
        sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5, rel=1e-4
    )
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and metrics["entropy"] > 0.5


def drawn(t: ppo.PpoRun, n: int = 12):
    """Answers of the run's policy to its first prompts, and random doubles for each token place."""
    answers = sampling.step_answers(t, t.prompt_ids[:n], 0)
    texts = evaluation.texts_of(t, answers)
    mask = torch.stack(
        [torch.arange(max(len(a.ids) for a in answers)) < len(a.ids) for a in answers]
    )
    draw = torch.Generator().manual_seed(5)
    return answers, texts, mask, lambda: torch.randn(mask.shape, generator=draw)


def test_a_minibatch_follows_the_gradient_of_the_whole_loss(make):
    """Old log-probabilities, old values, advantages and returns that differ by chance: the gradient
    is that of clipped surrogate + value loss - entropy bonus, one token at a time."""
    config = make(
        value="shared",
        value_coef=0.7,
        value_clip=0.05,
        entropy_coef=0.3,
        clip=0.1,
        max_grad_norm=1e9,
        micro_batch=4,
    )
    t = ppo.prepare_run(config, PROMPTS, rewards.single(WORLD.reward))
    answers, _, mask, noise = drawn(t)
    with torch.no_grad():
        t.critic["head"].weight.normal_(0, 0.5)
        _, logps, _, _, values = models.policy_kl(t, answers)
    old, old_values = logps + 0.2 * noise(), values + 0.2 * noise()
    advantages, returns = noise(), noise()
    loss = torch.zeros(())
    for b, answer in enumerate(answers):
        packed = batches.pack([answer], torch.device("cpu"))
        new, entropy, states = rollout.forward(t.policy, packed, 1.0, True, True)
        value = models.values_of(t, packed, states)
        for i in range(len(answer.ids)):
            ratio, gain = (new[0, i] - old[b, i]).exp(), advantages[b, i]
            near = old_values[b, i] + (value[0, i] - old_values[b, i]).clamp(-0.05, 0.05)
            loss = loss - torch.minimum(ratio * gain, ratio.clamp(0.9, 1.1) * gain)
            errors = [(x - returns[b, i]) ** 2 / 2 for x in (value[0, i], near)]
            loss = loss + 0.7 * torch.maximum(*errors) - 0.3 * entropy[0, i]
    parameters = [p for m in (t.policy, t.critic) for p in m.parameters()]
    expected = torch.autograd.grad(loss / int(mask.sum()), parameters, allow_unused=True)
    batch = Batch(
        answers=answers,
        mask=mask,
        logps=old,
        reference=old,
        entropy=old,
        advantages=advantages,
        values=old_values,
        returns=returns,
    )
    assert loop._minibatch(t, batch, list(range(len(answers))))
    for p, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            assert torch.allclose(p.grad, gradient, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.4, 3.0])
def test_the_penalty_is_that_of_the_controllers_beta(make, beta):
    """The return of the first token is the score less beta times the answer's own log-ratio."""
    config = make(reference=str(make().model.replace("policy", "reference")), gamma=1.0, lam=1.0)
    t = ppo.prepare_run(config, PROMPTS, rewards.single(WORLD.reward))
    answers, _, mask, _ = drawn(t)
    t.state.beta = beta
    scores = [float(b) for b in range(len(answers))]
    _, logps, reference, _, _ = models.policy_kl(t, answers)
    ratio = ((logps - reference) * mask).sum(1)
    batch, kl = loop.estimate(t, answers, scores, {})
    assert ratio.abs().max() > 0.1 and kl == pytest.approx(float(ratio.mean()), abs=1e-5)
    assert torch.allclose(batch.returns[:, 0], torch.tensor(scores) - beta * ratio, atol=1e-4)


def test_the_reward_of_a_step_stands_at_its_last_token(make):
    """The return of a token is all that comes at it and later: a step's reward is not in the
    returns after the step."""
    t = ppo.prepare_run(make(gamma=1.0, lam=1.0), PROMPTS, rewards.single(WORLD.reward))
    answers, texts, _, _ = drawn(t)
    t.state.beta = 0.0
    scores = [rewards.StepRewards([(1, 2.0)], 5.0) if text else 5.0 for text in texts]
    batch, _ = loop.estimate(t, answers, scores, {})
    assert any(texts)
    for b, (answer, text) in enumerate(zip(answers, texts, strict=True)):
        n = len(answer.ids)
        steps = step_tokens(t.tokenizer, answer.ids, [1]) if text else []
        wanted = [5.0 - 2.0 * any(i > at for at in steps) for i in range(n)]
        assert batch.returns[b, :n].tolist() == pytest.approx(wanted, abs=1e-5)


def test_an_advantage_is_weighted_by_how_much_likelier_the_update_made_its_token(make):
    """Of tokens that the policy makes 1.5, 0.5 and 4 times as likely as the one that sampled them,
    the advantages are times 1.5, 0.5 and 2, the cap. Returns are not weighted."""
    t = ppo.prepare_run(make(importance_cap=2.0), PROMPTS, rewards.single(WORLD.reward))
    answers, _, mask, _ = drawn(t)
    scores, metrics = [float(b) for b in range(len(answers))], {}
    plain, _ = loop.estimate(t, answers, scores, {})
    turn = (torch.arange(mask.shape[0])[:, None] + torch.arange(mask.shape[1])) % 3
    ratios = torch.tensor([1.5, 0.5, 4.0])[turn]
    for b, answer in enumerate(answers):
        n = len(answer.ids)
        answer.sampler_logps[:] = (plain.logps - ratios.log())[b, :n].tolist()
    t.off_policy = True
    batch, _ = loop.estimate(t, answers, scores, metrics)
    weights = torch.tensor([1.5, 0.5, 2.0])[turn] * mask
    assert plain.advantages[mask].abs().min() > 1e-3
    assert torch.allclose(batch.advantages, plain.advantages * weights, atol=1e-4)
    assert torch.equal(batch.returns, plain.returns)
    assert metrics["importance"] == pytest.approx(float(weights.sum() / mask.sum()), abs=1e-4)


def test_unfinished_answers_do_not_set_the_scale_of_rewards(make):
    """Where they get a fixed score, only answers that ended are read for the mean and deviation."""
    read: list[str] = []

    def reward(prompts, completions):
        read.extend(completions)
        return [float(len(read) % 7) for _ in completions[:-1]] + [9.0]

    for score, all_read in ((-5.0, False), (None, True)):
        read.clear()
        config = make(reference_samples=64, unfinished_score=score)
        evaluation.calibrate(ppo.prepare_run(config, PROMPTS, rewards.single(reward)))
        assert (len(read) == 64) == all_read and len(read) > 20


def test_the_first_answers_score_about_zero_with_deviation_one(make):
    _, seen = train(
        make(steps=1, batch_size=200, reference_samples=200, unfinished_score=None),
        lambda p, c: [70 + 9 * r for r in WORLD.reward(p, c)],
    )
    assert (
        abs(seen[0]["reward"]) < 0.15
        and abs(seen[0]["reward_sd"] - 1) < 0.1
        and seen[0]["reward/reward"] > 60
    )


def test_lora_takes_the_policy_without_adapter_as_reference(make, tmp_path):
    config = make(lora=Lora(rank=4, alpha=8.0, dropout=0.1), steps=3, learning_rate=0.05)
    _, seen = train(config)
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-6) and abs(seen[2]["kl"]) > 1e-3
    before, after = weights(config.model), weights(tmp_path / "out/policy")
    assert before.keys() == after.keys() and not same(
        before, after, 1e-3
    )  # merged: an ordinary checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("value", ["separate", pytest.param("shared", marks=pytest.mark.slow)])
def test_the_value_function_learns_what_is_to_be_expected(make, value):
    """The policy all but stands still: the value of every state ends near its expected reward,
    which is known."""
    config = make(
        steps=40,
        batch_size=128,
        micro_batch=128,
        sample_batch=128,
        beta=0.0,
        value=value,
        value_coef=1.0,
        learning_rate=1e-9 if value == "separate" else 3e-3,
        value_learning_rate=1e-2,
        value_clip=None,
        clip=1e-9,
        kl="fixed",
        normalise="none",
        unfinished_score=None,
        eval_every=1000,
    )
    _, seen = train(config)
    t = ppo.prepare_run(config, PROMPTS, rewards.single(WORLD.reward))
    checkpoint.restore(t)
    policy, expected = aw.table(WORLD, t.policy), {}
    for s in reversed(WORLD.states()):
        ends = [WORLD.final(s, v) for v in range(5)]
        expected[s] = sum(
            p * (expected[(*s, v)] if r is None else r)
            for v, (p, r) in enumerate(zip(policy[s], ends, strict=True))
        )
    answers = [
        rollout.SampledAnswer(list(s[:2]), [*s[2:], aw.END], [], True) for s in WORLD.states()
    ]
    values = models.policy_kl(t, answers)[4]
    errors = {
        s: abs(float(values[i, len(s) - 2]) - expected[s]) for i, s in enumerate(WORLD.states())
    }
    visits = aw.visits(WORLD, policy)
    assert seen[0]["value"] == 0
    for n in (2, 3, 4):
        assert sum(errors[s] * visits[s] for s in errors if len(s) == n) < 0.15 * sum(
            visits[s] for s in errors if len(s) == n
        )


def test_beta_follows_the_controller(make):
    config = make(steps=4, reference=str(make().model.replace("policy", "reference")))
    _, seen = train(config)
    for now, then in itertools.pairwise(seen):
        assert then["beta"] == pytest.approx(pg.adapt_beta(now["beta"], now["kl"], 0.5, 16, 100.0))
    assert seen[1]["beta"] != seen[0]["beta"] and (seen[1]["beta"] > seen[0]["beta"]) == (
        seen[0]["kl"] > 0.5
    )


def test_prompts_come_round_evenly():
    rows = [i for s in range(7) for i in evaluation.rows_of(3, 5, s, 4)]
    assert len(rows) == 28 and all(
        sorted(rows[e * 5 : e * 5 + 5]) == list(range(5)) for e in range(5)
    )
    assert rows != [i for s in range(7) for i in evaluation.rows_of(4, 5, s, 4)]


def test_several_rewards_are_logged_apart_and_an_ensemble_tells_its_disagreement(make):
    sources = (
        rewards.Source("world", (WORLD.reward,), 2.0),
        rewards.Source("both", (WORLD.reward, lambda p, c: [len(x) for x in c]), 1.0, "min"),
    )
    seen: list[dict] = []
    ppo.run(make(), PROMPTS, sources, on_step=seen.append)
    assert {"reward/world", "reward/both", "disagreement/both"} <= seen[0].keys() and seen[0][
        "disagreement/both"
    ] > 0
    assert "disagreement/world" not in seen[0]


# --- what goes wrong


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda p, c: 1 / 0, "reward reward: raised ZeroDivisionError: division by zero"),
        (lambda p, c: [0.5], "gave 1 values for"),
        (lambda p, c: [float("nan")] * len(c), "gave nan for the answer"),
        (lambda p, c: ["good"] * len(c), "gave 'good' for the answer.*must be a number"),
        (lambda p, c: [0.25] * len(c), r"the same value \(0.25\) for all"),
        (lambda p, c: [None] * len(c), "scored 0 answers"),
    ],
)
@pytest.mark.parametrize("normalise", ["reference", "none"])
def test_bad_rewards_are_told(make, reward, words, normalise):
    words = "could not score|" + words if words.startswith("scored") else words
    with pytest.raises(TrainError, match=words):
        train(make(normalise=normalise), reward)


def test_answers_without_a_score_are_left_out_and_counted(make):
    _, seen = train(
        make(batch_size=64),
        lambda p, c: [None if "c" in x else r for x, r in zip(c, WORLD.reward(p, c), strict=True)],
    )
    assert 0 < seen[0]["unscored"] < 32
    with pytest.raises(TrainError, match="could not score"):
        train(
            make(batch_size=64, normalise="none", out=make().out + "2"),
            lambda p, c: [
                r if "c" in x else None for x, r in zip(c, WORLD.reward(p, c), strict=True)
            ],
        )


def test_a_loss_that_is_no_number_stops_with_the_last_good_policy(make, tmp_path):
    config = make(normalise="none")
    with pytest.raises(TrainError, match="not finite in 3 updates in a row.*out/policy"):
        train(config, lambda p, c: [1e300 * r for r in WORLD.reward(p, c)])
    assert same(weights(tmp_path / "out/policy"), weights(config.model))


def test_three_bad_updates_in_a_row_are_the_last(make, monkeypatch):
    tried = []
    monkeypatch.setattr(loop, "_minibatch", lambda *_: tried.append(1) or {})
    with pytest.raises(TrainError, match="3 updates in a row"):
        train(make())
    assert len(tried) == 3


def test_a_single_bad_update_is_skipped_and_counted(make):
    calls = iter([1.0, 1e300, 1.0, 1.0])
    config = make(normalise="none", epochs=1, steps=4)
    state, seen = train(
        config,
        lambda p, c, scale=None: [
            next_scale * r for next_scale in [next(calls)] for r in WORLD.reward(p, c)
        ],
    )
    assert state.bad == 2 == seen[-1]["bad_updates"] and state.step == 4
    assert "policy_loss" not in seen[1] and seen[2]["policy_loss"] == seen[2]["policy_loss"]


def test_kl_beyond_its_stop_at_the_first_step_says_that_the_models_differ(make, tmp_path):
    config = make(reference=make().model.replace("policy", "reference"), kl_stop=0.05)
    state, seen = train(config)
    assert state.step == 0 and "Policy and reference differ before any training" in state.stopped
    assert seen[0]["stopped"] == state.stopped and same(
        weights(tmp_path / "out/policy"), weights(config.model)
    )


def test_a_stop_by_kl_goes_back_to_a_policy_that_was_within_bounds(make, tmp_path):
    state, seen = train(
        make(steps=30, beta=0.0, kl="fixed", kl_stop=0.6, learning_rate=1e-2, save_every=1)
    )
    assert "beyond kl_stop" in state.stopped and f"that of step {state.step}" in state.stopped
    assert state.step == seen[-1]["step"] - 2 and seen[-1]["kl"] > 0.6 >= max(
        m["kl"] for m in seen[:-1]
    )
    kept = torch.load(tmp_path / f"out/checkpoint-{state.step}/state.pt", weights_only=True)[
        "policy"
    ]
    assert same(weights(tmp_path / "out/policy"), kept)


def test_a_policy_that_stops_ending_its_answers_is_stopped(make):
    state, _seen = train(make(steps=30, unfinished_stop=0.05, learning_rate=1e-5))
    assert (
        "do not end within max_new_tokens, 5 steps running" in state.stopped
        and 4 <= state.step < 29
    )


def test_unfinished_answers_get_the_fixed_score_and_are_not_read(make):
    read: list[str] = []

    def reward(prompts, completions):
        read.extend(completions)
        return [0.0 if i % 2 else 1.0 for i in range(len(completions))]

    _, seen = train(make(steps=1, normalise="none", batch_size=64, unfinished_score=-5.0), reward)
    n = round(seen[0]["unfinished"] * 64)
    assert 0 < n < 64 and len(read) == 64 - n
    assert seen[0]["reward"] == pytest.approx((-5.0 * n + (64 - n + 1) // 2) / 64)


def test_prompts_that_leave_no_room_are_told(make):
    with pytest.raises(
        ConfigError, match="1 of 2 prompts leave no room to answer: prompt 1 has 15 tokens, 13 fit"
    ):
        train(make(), prompts=["a b", "a " * 14])
    with pytest.raises(ConfigError, match="at least one prompt"):
        train(make(), prompts=[])


def test_the_alarm_stops_a_run_whose_gold_falls_while_its_proxy_rises(make, tmp_path):
    """The reward is the opposite of gold: the policy as it began is the best, and is kept."""

    def against(prompts, completions):
        return [-r for r in WORLD.reward(prompts, completions)]

    config = make(
        steps=40,
        eval_every=4,
        beta=0.0,
        kl="fixed",
        stop_on_alarm=True,
        batch_size=64,
        normalise="none",
        unfinished_score=None,
    )
    state, _ = train(
        config, against, gold=rewards.Source("gold", (WORLD.reward,)), eval_prompts=PROMPTS * 12
    )
    evaluated = [
        m
        for m in checkpoint.read_metrics(tmp_path / "out" / checkpoint.METRICS)
        if "eval/gold" in m
    ]
    assert (
        "over-optimisation" in state.stopped
        and 2 < len(evaluated) < 10
        and evaluated[0]["step"] == 0
    )
    assert same(weights(tmp_path / "out" / "best"), weights(config.model))
    for m in evaluated:  # the same prompts each time
        assert [s["turns"] for s in m["eval/samples"]] == [
            [["user", prompt]] for prompt in (PROMPTS * 12)[:3]
        ]
        assert all(isinstance(s["text"], str) and "gold" in s for s in m["eval/samples"])
    card = (tmp_path / "out/policy/README.md").read_text()
    assert "Stopped early: over-optimisation" in card and "training.svg" in card
    assert (
        evaluated[-1]["eval/gold"] < evaluated[0]["eval/gold"]
        and evaluated[-1]["eval/proxy"] > evaluated[0]["eval/proxy"]
    )
    first, second = (
        evaluated[-2]["step"],
        evaluated[-1]["step"],
    )  # once seen, it is looked at again after the next step
    assert first % 4 == 0 and second == first + 1


@pytest.mark.slow
def test_an_evaluation_asks_only_about_answers_that_changed_and_tells_what_asking_anew_tells(
    make, tmp_path
):
    asked, config = [], make(steps=4, eval_every=1, learning_rate=1e-3)

    def gold(prompts, completions):
        asked.append(len(completions))
        return WORLD.reward(prompts, completions)

    state, _ = train(
        config, WORLD.reward, gold=rewards.Source("gold", (gold,)), eval_prompts=PROMPTS * 12
    )
    assert asked[0] == len(PROMPTS * 12) and 0 < sum(asked[1:]) < 2 * asked[0], asked
    anew = make(
        model=str(tmp_path / "out" / "policy"),
        reference=config.model,
        out=str(tmp_path / "anew"),
        steps=1,
        learning_rate=1e-9,
    )
    again, _ = train(
        anew, WORLD.reward, gold=rewards.Source("gold", (WORLD.reward,)), eval_prompts=PROMPTS * 12
    )
    last, first = state.evaluations[-1], again.evaluations[0]
    assert last.gold == first.gold and last.kl == pytest.approx(first.kl, abs=1e-5)
