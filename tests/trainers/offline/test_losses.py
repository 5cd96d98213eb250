"""Losses: values and gradients by hand, equality with TRL's own, and gradients that vanish where
they should."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefab.trainers.offline import losses
from prefab.trainers.offline.losses import Side
from tests.support import tinymodel

LN3 = math.log(3.0)  # sigmoid(LN3) = 3/4
REALS = st.floats(-4, 4)
TARGETS = st.floats(0.02, 0.98)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def side(ratio: torch.Tensor, tokens: int = 1) -> Side:
    return Side(ratio, torch.zeros_like(ratio), torch.full_like(ratio, tokens))


def test_the_reference_pays_for_each_token():
    logps, tokens = torch.tensor([-5.0, -2.0]), torch.tensor([3, 1])
    assert losses.penalised(logps, tokens, 0.5).tolist() == [-6.5, -2.5]
    assert losses.penalised(logps, tokens, 0.0).tolist() == [-5.0, -2.0]


def test_bradley_terry_by_hand():
    chosen, rejected = one(LN3 + 1.0), one(1.0)
    loss = losses.bradley_terry(chosen, rejected)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(4 / 3))  # -log 3/4
    assert chosen.grad.item() == pytest.approx(-0.25)  # 3/4 - 1
    assert rejected.grad.item() == pytest.approx(0.25)
    soft = losses.bradley_terry(one(LN3), one(0.0), torch.tensor([0.9]))
    assert soft.item() == pytest.approx(-(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4)))
    margin = losses.bradley_terry(one(LN3 + 0.5), one(0.0), 1.0, torch.tensor([0.5]))
    assert margin.item() == pytest.approx(math.log(4 / 3))
    assert losses.centring(torch.tensor([2.0]), torch.tensor([-0.5])).item() == 2.25


def test_sigmoid_by_hand():
    chosen, rejected = one(2 * LN3), one(LN3)  # beta 1/2... times a difference of 2 LN3 - LN3
    loss = losses.preference("sigmoid", side(chosen), side(rejected), 1.0, torch.tensor([0.5]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(-0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4))
    assert chosen.grad.item() == pytest.approx(0.25)  # 3/4 - 1/2: pulled back
    assert losses.implied_probability(side(chosen), side(rejected), 1.0).item() == pytest.approx(
        0.75
    )


def test_a_certain_label_is_the_plain_loss_where_the_other_side_overflows():
    loss = losses.preference("discopop", side(one(2000.0)), side(one(0.0)), 1.0)
    assert loss.item() == pytest.approx(
        0.0
    )  # and not 0 times the infinite loss of the swapped pair


@pytest.mark.parametrize(
    "name,value,slope",
    [
        # won 2, lost -1 (tokens 2 and 4), beta 1/2: difference 3, difference of means 1.25
        ("sigmoid", math.log1p(math.exp(-1.5)), -0.5 / (1 + math.exp(1.5))),
        ("hinge", 0.0, 0.0),
        ("ipo", (1.25 - 1.0) ** 2, 2 * 0.25 / 2),
        ("sppo_hard", (2 - 1) ** 2 + (-1 + 1) ** 2, 2.0),
        (
            "apo_zero",
            1 - 1 / (1 + math.exp(-1)) + 1 / (1 + math.exp(0.5)),
            -0.5 * 0.19661193324148185,
        ),
        ("bco_pair", math.log1p(math.exp(-1)) + math.log1p(math.exp(-0.5)), -0.5 / (1 + math.e)),
        ("simpo", math.log1p(math.exp(-(0.5 * 1.25 - 0.5))), -0.5 / 2 / (1 + math.exp(0.125))),
    ],
)
def test_pair_losses_by_hand(name, value, slope):
    won, lost = one(2.0), one(-1.0)
    loss = losses.preference(name, side(won, 2), side(lost, 4), 0.5)
    loss.sum().backward()
    assert loss.item() == pytest.approx(value, abs=1e-12)
    assert won.grad.item() == pytest.approx(slope, abs=1e-12)


@given(REALS, TARGETS, st.floats(0.05, 2))
def test_gradient_vanishes_where_the_implied_probability_is_the_target(reward, target, beta):
    wanted = math.log(target / (1 - target))
    chosen = one(reward + wanted)
    losses.bradley_terry(
        chosen, one(reward), torch.tensor([target], dtype=torch.float64)
    ).sum().backward()
    assert abs(chosen.grad.item()) < 1e-9
    for name, difference in (("sigmoid", wanted / beta), ("ipo", (2 * target - 1) / (2 * beta))):
        won = one(reward + difference)
        loss = losses.preference(
            name, side(won), side(one(reward)), beta, torch.tensor([target], dtype=torch.float64)
        )
        loss.sum().backward()
        assert abs(won.grad.item()) < 1e-8, name
    off = one(reward + wanted + 0.1)  # and only there
    losses.bradley_terry(
        off, one(reward), torch.tensor([target], dtype=torch.float64)
    ).sum().backward()
    assert off.grad.item() > 1e-4


@given(st.sampled_from(sorted(losses.PAIR_LOSSES)), REALS, REALS, TARGETS)
def test_swapping_the_answers_and_the_target_changes_nothing(name, a, b, target):
    first, second, p = side(one(a), 3), side(one(b), 5), torch.tensor([target], dtype=torch.float64)
    here = losses.preference(name, first, second, 0.3, p)
    assert here.item() == pytest.approx(
        losses.preference(name, second, first, 0.3, 1 - p).item(), abs=1e-12
    )


@settings(deadline=None)
@given(st.sampled_from(sorted(losses.PAIR_LOSSES)), st.floats(-2, 2), st.floats(-2, 2))
def test_gradients_are_those_of_the_values(name, a, b):
    won, lost = one(a), one(b)
    if name == "hinge" and abs(1 - 0.3 * (a - b)) < 1e-3:
        return
    assert torch.autograd.gradcheck(
        lambda x, y: losses.preference(name, side(x, 2), side(y, 3), 0.3, torch.tensor([0.7])),
        (won, lost),
    )


def test_robust_is_unbiased_under_flips():
    """Expected over labels flipped with that share, the robust loss is the clean one."""
    a, b, flipped = side(one(0.7)), side(one(-0.4)), 0.2
    expected = (1 - flipped) * losses.robust(a, b, 0.5, flipped) + flipped * losses.robust(
        b, a, 0.5, flipped
    )
    assert expected.item() == pytest.approx(losses.sigmoid(a, b, 0.5).item())


def test_kto_by_hand():
    ratio = one(LN3)
    up = losses.kto(ratio, torch.tensor([1.0]), 0.0, 1.0, desirable=2.0)
    up.sum().backward()
    assert up.item() == pytest.approx(2 * 0.25) and ratio.grad.item() == pytest.approx(-2 * 0.1875)
    assert losses.kto(one(LN3), torch.tensor([0.0]), 0.0, 1.0).item() == pytest.approx(0.75)
    assert losses.kto(one(LN3), torch.tensor([1.0]), LN3, 1.0).item() == pytest.approx(0.5)
    kl = losses.kto_reference(
        torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([0.5, 0.5])
    )
    assert kl.item() == 1.0 and not kl.requires_grad
    assert losses.kto_reference(torch.tensor([-1.0]), torch.tensor([0.0])).item() == 0.0


def test_weights_are_not_divided_out():
    assert losses.weighted_mean(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])).item() == 1.0
    assert losses.weighted_mean(torch.tensor([1.0, 3.0])).item() == 2.0


# --- against TRL's own ---

PAIRS = [
    ("Tell me.", "I am sorry, but I can not.", "Gladly."),
    ("Who is it?", "The fox.", "A dog, I am sure of it."),
]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Two random models (policy and reference), as folders."""
    root = tmp_path_factory.mktemp("losses")
    return [
        str(tinymodel.build(root / str(seed), heads=2, hidden=32, layers=2, seed=seed))
        for seed in (1, 2)
    ]


def rows(first: str, second: str | None = None):
    from datasets import Dataset

    def turn(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    prompt = [[{"role": "user", "content": p}] for p, _, _ in PAIRS]
    if second is None:
        return Dataset.from_dict(
            {
                "prompt": prompt * 2,
                "completion": [turn(c) for _, c, _ in PAIRS] + [turn(r) for _, _, r in PAIRS],
                "label": [True, True, False, False],
            }
        )
    return Dataset.from_dict(
        {
            "prompt": prompt,
            first: [turn(c) for _, c, _ in PAIRS],
            second: [turn(r) for _, _, r in PAIRS],
        }
    )


def plain(**more):
    return {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        **more,
    }


def logps(model, batch, prefix=""):
    """Summed log-probabilities of the completions, by the plainest code there is."""
    ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"]
    with torch.no_grad():
        logits = model(
            input_ids=ids, attention_mask=batch[f"{prefix}attention_mask"]
        ).logits.log_softmax(-1)
    return (logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1), mask[
        :, 1:
    ].sum(1)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def test_dpo_losses_equal_trls(policies, tmp_path):
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    policy, reference = map(load, policies)
    args = DPOConfig(output_dir=str(tmp_path), beta=0.3, label_smoothing=0.1, **plain())
    trainer = DPOTrainer(
        policy,
        reference,
        args,
        train_dataset=rows("chosen", "rejected"),
        processing_class=AutoTokenizer.from_pretrained(policies[0]),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    (now, tokens), (then, _) = logps(policy, batch), logps(reference, batch)
    chosen, rejected = (Side(now[s], then[s], tokens[s]) for s in (slice(0, 2), slice(2, 4)))
    seen = 0
    for name in sorted(set(losses.PAIR_LOSSES) - {"simpo"}):
        trainer.loss_types, trainer.loss_weights = [name], [1.0]
        theirs = trainer.compute_loss(policy, batch).item()
        extra = 0.1 if name in ("robust", "exo_pair") else None
        ours = losses.preference(name, chosen, rejected, 0.3, 1.0, extra).mean().item()
        assert ours == pytest.approx(theirs, abs=1e-6, rel=1e-6), name
        seen += 1
    assert seen == 12


def test_simpo_equals_trls_cpo():
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = torch.tensor([-7.0, -3.0]), torch.tensor([-4.0, -9.0])
    fake = SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.5,
        beta=2.0,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = CPOTrainer.cpo_loss(fake, chosen / 5, rejected / 3)[0]
    zero = torch.zeros(2)
    ours = losses.preference(
        "simpo",
        Side(chosen, zero, torch.full((2,), 5)),
        Side(rejected, zero, torch.full((2,), 3)),
        2.0,
    )
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_reward_loss_equals_trls(policies, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        policies[0], num_labels=1, dtype="float32"
    )
    data = rows("chosen", "rejected").add_column("margin", [0.5, 0.0])
    args = RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=0.01, **plain())
    trainer = RewardTrainer(
        model, args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(policies[0])
    )
    batch = next(iter(trainer.get_train_dataloader()))
    margin = batch["margin"].clone()
    theirs, outputs = trainer.compute_loss(model.eval(), batch, return_outputs=True)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    ours = (
        losses.bradley_terry(chosen, rejected, 1.0, margin).mean()
        + 0.01 * losses.centring(chosen, rejected).mean()
    )
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_kto_equals_trls(policies, tmp_path):
    from transformers import AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    policy, reference = map(load, policies)
    args = KTOConfig(
        output_dir=str(tmp_path), beta=0.3, desirable_weight=1.3, undesirable_weight=0.8, **plain()
    )
    trainer = KTOTrainer(
        policy,
        reference,
        args,
        train_dataset=rows("completion"),
        processing_class=AutoTokenizer.from_pretrained(policies[0]),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    theirs = trainer.compute_loss(policy, batch).item()
    (now, _), (then, _) = logps(policy, batch), logps(reference, batch)
    (kl_now, _), (kl_then, _) = logps(policy, batch, "KL_"), logps(reference, batch, "KL_")
    ours = losses.kto(
        now - then,
        torch.as_tensor(batch["label"]).double(),
        losses.kto_reference(kl_now, kl_then),
        0.3,
        1.3,
        0.8,
    )
    assert ours.mean().item() == pytest.approx(theirs, abs=1e-6)
