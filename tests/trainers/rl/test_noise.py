"""Noise that is hashed has the distribution of noise that is drawn, and rows do not depend on each
other."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from scipy import stats

from prefab.trainers.rl import noise


@pytest.mark.slow
def test_hashed_noise_is_exponential():
    """Over columns, over rows and over steps; every bit of the seed counts."""
    many = noise.HashedNoise(range(64), "cpu")
    first, second = many.rows(4096), many.rows(4096)
    one = noise.HashedNoise([7], "cpu")
    steps = torch.cat([one.rows(8) for _ in range(4096)])
    for what in (first, second, first[5], first[:, 3], steps[:, 2]):
        assert stats.kstest(what.flatten().numpy(), "expon").pvalue > 1e-3
    assert first.min() > 0 and torch.isfinite(first).all()
    near = noise.HashedNoise([2**61, 2**61 + 1, 1], "cpu").rows(4096)
    assert torch.corrcoef(near).fill_diagonal_(0).abs().max() < 0.06


def test_rows_and_steps_do_not_depend_on_each_other():
    """Correlations of 200 rows, of the same row at two steps, and of a row with itself one column
    further, are those of chance."""
    draws = noise.HashedNoise(range(200), "cpu")
    n = 2048
    first, second = draws.rows(n), draws.rows(n)
    for a, b in ((first, second), (first[:, 1:], first[:, :-1])):
        together = torch.corrcoef(torch.cat([a, b]))
        z = together[~torch.eye(400, dtype=torch.bool)] * n**0.5
        assert z.std() == pytest.approx(1, abs=0.02) and z.abs().max() < 6
    # rows whose first halves agree in their high bits are no rearrangements of each other
    draws.key_B2 = torch.tensor([[5, 1], [6, 2]], dtype=torch.int32)
    a, b = draws.rows(n)
    assert len(set(a.tolist()) & set(b.tolist())) < 5


def test_a_row_is_a_function_of_seed_and_place():
    """Whatever rows stand beside it, and whenever others leave the batch."""
    draws = noise.HashedNoise([3, 4, 5], "cpu")
    alone = noise.HashedNoise([5], "cpu")
    assert torch.equal(draws.rows(50)[2], alone.rows(50)[0])
    draws.keep([2])
    found = draws.rows(50)
    assert torch.equal(found, alone.rows(50)) and not torch.equal(found, alone.rows(50))
    assert not torch.equal(found, noise.HashedNoise([6], "cpu").rows(50))


@pytest.mark.parametrize("kind", [noise.HashedNoise, noise.GeneratorNoise])
def test_tokens_are_drawn_with_their_probabilities(kind):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.5, -3.0])
    draws, n = kind(range(5000), "cpu"), 4
    tokens = torch.cat(
        [noise.next_tokens(logits.expand(5000, 5), draws.rows(5), 0.8)[0] for _ in range(n)]
    )
    expected = (logits.double() / 0.8).softmax(-1) * len(tokens)
    assert stats.chisquare(tokens.bincount(minlength=5), expected).pvalue > 1e-3


def test_the_device_decides():
    assert isinstance(noise.noise_for([1], "cpu"), noise.GeneratorNoise)
    assert noise.HASHED == ("cuda",)
