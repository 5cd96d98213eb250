"""The arithmetic of policy gradients against slow references: plain Python loops over one token at
a time."""

from __future__ import annotations

from math import exp, isclose, log, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from prefab.trainers.rl import policy_gradient as pg

torch.set_num_threads(1)
SEEDS = st.integers(0, 2**31 - 1)


def batch(seed: int, B: int = 5, T: int = 7):
    """Random doubles and a mask of random lengths (1..T), for every function that takes them."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=draw)
    mask = torch.arange(T)[None] < lengths[:, None]
    return (
        [torch.randn(B, T, generator=draw, dtype=torch.double) for _ in range(4)],
        mask,
        lengths.tolist(),
        draw,
    )


def real(x, lengths):
    return [x[b, t].item() for b, n in enumerate(lengths) for t in range(n)]


def close(x, y):
    return torch.allclose(
        torch.as_tensor(x, dtype=torch.double),
        torch.as_tensor(y, dtype=torch.double),
        atol=1e-6,
        rtol=0,
    )


def slow_gae(rewards, values, gamma, lam):
    """The definition: A_t = sum_l (gamma lam)^l delta_(t+l), delta_t = r_t + gamma V_(t+1) - V_t, V
    after the end 0."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_sum_of_discounted_errors(seed, gamma, lam):
    (rewards, values, *_), mask, lengths, _ = batch(seed)
    advantages, returns = pg.gae(rewards, values, mask, gamma, lam)
    for b, n in enumerate(lengths):
        slow = slow_gae(rewards[b, :n].tolist(), values[b, :n].tolist(), gamma, lam)
        assert close(advantages[b, :n], slow)
        assert close(
            returns[b, :n], [a + v for a, v in zip(slow, values[b, :n].tolist(), strict=True)]
        )
    assert not advantages[~mask].any()


def test_gae_by_hand():
    # gamma 1, lambda 1: the advantage is what is still to come, minus the value.
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages, returns = pg.gae(
        torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.5, 0.5]]), mask, 1.0, 1.0
    )
    assert close(advantages, [[6.5, 5.5, 3.5]]) and close(returns, [[7.0, 6.0, 4.0]])


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_what_stands_outside_the_mask_never_matters(seed):
    (a, b, c, d), mask, _, _draw = batch(seed)
    noise = torch.full_like(a, float("nan"))
    a2, b2, c2, _d2 = (torch.where(mask, x, noise) for x in (a, b, c, d))
    scores = a[:, 0]
    for one, two in (
        (pg.gae(a, b, mask, 0.9, 0.8), pg.gae(a2, b2, mask, 0.9, 0.8)),
        ((pg.whiten(a, mask),), (pg.whiten(a2, mask),)),
        (
            (pg.penalised_rewards(scores, a, mask, 0.3),),
            (pg.penalised_rewards(scores, a2, mask, 0.3),),
        ),
        (pg.policy_loss(a, b, c, mask, 0.2), pg.policy_loss(a2, b2, c2, mask, 0.2)),
        (pg.value_loss(a, b, c, mask, 0.2), pg.value_loss(a2, b2, c2, mask, 0.2)),
    ):
        for x, y in zip(one, two, strict=True):
            assert torch.equal(x, y) and not torch.isnan(x).any()


def test_gradients_stay_finite_whatever_stands_in_the_padding():
    mask = torch.tensor([[True, False]])
    logps = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    loss, _ = pg.policy_loss(
        logps, torch.tensor([[-1.0, -1e9]]), torch.tensor([[2.0, float("inf")]]), mask, 0.2
    )
    loss.backward()
    assert logps.grad.tolist() == [[-2.0, 0.0]]
    values = torch.tensor([[3.0, float("nan")]], requires_grad=True)
    pg.value_loss(values, values.detach(), torch.tensor([[1.0, float("nan")]]), mask, 0.2)[
        0
    ].backward()
    assert values.grad.tolist() == [[2.0, 0.0]]


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.booleans())
def test_whitening(seed, shift):
    (x, *_), mask, lengths, _ = batch(seed)
    values = real(x, lengths)
    mean = sum(values) / len(values)
    deviation = sqrt(sum((v - mean) ** 2 for v in values) / len(values) + pg.EPSILON)
    slow = [(v - mean) / deviation + (0.0 if shift else mean) for v in values]
    white = pg.whiten(x, mask, shift)
    assert close(real(white, lengths), slow) and not white[~mask].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.sets(st.integers(0, 4), max_size=2))
def test_an_answer_ends_with_its_first_end_token(tokens, ends):
    mask, ended = pg.answer_mask(torch.tensor([tokens]), sorted(ends))
    at = next((i for i, token in enumerate(tokens) if token in ends), None)
    length = len(tokens) if at is None else at + 1
    assert mask.tolist() == [[t < length for t in range(len(tokens))]]
    assert ended.tolist() == [at is not None]


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_kl_estimates(seed):
    (p, q, *_), _mask, lengths, _ = batch(seed)
    slow = {"k1": lambda r: r, "k2": lambda r: r * r / 2, "k3": lambda r: exp(-r) - 1 + r}
    for form, formula in slow.items():
        fast = pg.kl_estimate(p, q, form)
        assert close(real(fast, lengths), [formula(r) for r in real(p - q, lengths)])
    assert (pg.kl_estimate(p, q, "k3") >= 0).all()
    with pytest.raises(ValueError):
        pg.kl_estimate(p, q, "k4")


def test_k1_and_k3_have_the_divergence_as_their_mean():
    p, q = (torch.tensor(x, dtype=torch.double) for x in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    exact = sum(a * log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    for form in ("k1", "k3"):
        assert isclose(
            float((p * pg.kl_estimate(p.log(), q.log(), form)).sum()), exact, abs_tol=1e-12
        )


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0, 2))
def test_the_score_comes_with_the_last_real_token(seed, beta):
    (kl, scores, *_), mask, lengths, _ = batch(seed)
    rewards = pg.penalised_rewards(scores[:, 0], kl, mask, beta)
    for b, n in enumerate(lengths):
        slow = [-beta * kl[b, t].item() for t in range(n)]
        slow[-1] += scores[b, 0].item()
        assert close(rewards[b, :n], slow) and not rewards[b, n:].any()


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.floats(0.01, 0.5))
def test_policy_loss(seed, clip):
    (logps, old, advantages, _), mask, lengths, _ = batch(seed)
    loss, clipped = pg.policy_loss(logps, old, advantages, mask, clip)
    slow, count = 0.0, 0
    for p, q, a in zip(
        real(logps, lengths), real(old, lengths), real(advantages, lengths), strict=True
    ):
        ratio = exp(p - q)
        bounded = min(max(ratio, 1 - clip), 1 + clip)
        slow -= min(ratio * a, bounded * a)
        count += bounded * a < ratio * a
    assert close(loss, slow) and int(clipped) == count


def test_policy_loss_by_hand():
    # ratio 2 with a positive advantage is clipped and has no gradient; with a negative one it is
    # not.
    logps = torch.tensor([[log(2.0), log(2.0)]], requires_grad=True)
    loss, clipped = pg.policy_loss(
        logps,
        torch.zeros(1, 2),
        torch.tensor([[1.0, -1.0]]),
        torch.ones(1, 2, dtype=torch.bool),
        0.2,
    )
    loss.backward()
    assert (
        close(loss.detach(), -1.2 + 2.0) and int(clipped) == 1 and close(logps.grad, [[0.0, 2.0]])
    )


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.one_of(st.none(), st.floats(0.01, 0.5)))
def test_value_loss(seed, clip):
    (values, old, returns, _), mask, lengths, _ = batch(seed)
    loss, clipped = pg.value_loss(values, old, returns, mask, clip)
    slow, count = 0.0, 0
    for v, o, r in zip(
        real(values, lengths), real(old, lengths), real(returns, lengths), strict=True
    ):
        plain = (v - r) ** 2 / 2
        near = plain if clip is None else (o + min(max(v - o, -clip), clip) - r) ** 2 / 2
        slow += max(plain, near)
        count += near > plain
    assert close(loss, slow) and int(clipped) == count


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_entropy(seed):
    logps = (
        (torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) * 3)
        .double()
        .log_softmax(-1)
    )
    for b in range(2):
        for t in range(3):
            assert isclose(
                pg.entropy(logps)[b, t].item(),
                -sum(exp(x) * x for x in logps[b, t].tolist()),
                abs_tol=1e-9,
            )


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[True, True, True, False]])
    assert pg.explained_variance(returns, returns, mask) == 1.0
    assert isclose(pg.explained_variance(torch.zeros(1, 4), returns, mask), 0.0, abs_tol=1e-12)
    assert isclose(pg.explained_variance(-returns, returns, mask), -3.0, abs_tol=1e-12)
    assert pg.explained_variance(returns, torch.ones(1, 4), mask) is None
    two, one = (torch.arange(4)[None] < n for n in (2, 1))
    assert pg.explained_variance(returns, returns, two) == 1.0
    assert pg.explained_variance(returns, returns, one) is None


@given(st.floats(0.01, 1), st.floats(0, 100), st.floats(0.1, 20), st.integers(1, 512))
def test_the_controller_moves_beta_towards_the_target(beta, kl, target, n):
    after = pg.adapt_beta(beta, kl, target, n, 10_000)
    assert (after > beta) == (kl > target) or after == beta
    assert abs(after / beta - 1) <= 0.2 * n / 10_000 + 1e-12


def test_the_controller_by_hand():
    assert isclose(pg.adapt_beta(0.1, 6.6, 6.0, 256, 1000), 0.1 * (1 + 0.1 * 0.256))
    assert isclose(pg.adapt_beta(0.1, 60.0, 6.0, 500, 1000), 0.1 * 1.1)
    assert isclose(pg.adapt_beta(0.1, 0.0, 6.0, 500, 1000), 0.1 * 0.9)


def test_importance_weights_are_cut_off_above_and_nothing_outside_the_mask():
    logps, sampled = torch.tensor([[-1.0, -1.0, -1.0, 9.0]]), torch.tensor([[-1.0, -3.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    found = pg.importance_weights(logps, sampled, mask, cap=2.0)
    assert found.tolist() == [pytest.approx([1.0, 2.0, exp(-1.0), 0.0])]


def test_rewards_of_steps_have_the_gradient_of_their_sum():
    """Over all answers of two tokens, enumerated: the expected gradient with the rewards of steps
    at their tokens is that with the sum at the end, KL penalty included, so the optimum is the
    same."""
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)  # after nothing, and 0 to 2
    pairs = [(a, b) for a in range(3) for b in range(3)]
    first, second = (torch.tensor(column) for column in zip(*pairs, strict=True))
    logps = logits.log_softmax(-1)
    logps_BT = torch.stack([logps[0, first], logps[1 + first, second]], dim=1)
    mask = torch.ones(9, 2, dtype=torch.bool)
    of_steps = torch.randn(9, 2, dtype=torch.float64)
    of_steps[:, 0] = torch.randn(3, dtype=torch.float64)[first]
    kl = (logps_BT + log(3)).detach()

    def gradient(rewards_BT):
        _, returns = pg.gae(rewards_BT, torch.zeros_like(rewards_BT), mask, 1.0, 1.0)
        weight_B = logps_BT.detach().sum(-1).exp()
        return torch.autograd.grad(
            (weight_B[:, None] * returns * logps_BT).sum(), logits, retain_graph=True
        )[0]

    whole = pg.penalised_rewards(of_steps.sum(-1), kl, mask, 0.3)
    steps = [[(0, float(r[0])), (1, float(r[1]))] for r in of_steps]
    placed = pg.place_step_rewards(whole, steps, mask)
    assert torch.allclose(placed, of_steps - 0.3 * kl)
    assert torch.allclose(placed.sum(-1), whole.sum(-1)) and not torch.allclose(placed, whole)
    assert torch.allclose(gradient(placed), gradient(whole), atol=1e-12)
