"""The head in tiles gives what the plain one gives: values, gradients, through a whole model."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from prefab.trainers import collate, tiled_head
from prefab.trainers.tiled_head import can_tile, tiled_logps


@pytest.mark.parametrize("dtype,near", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_log_softmax(dtype, near, bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 101, bias=bias, dtype=dtype)
    states, tokens = torch.randn(37, 16, dtype=dtype, requires_grad=True), torch.randint(101, (37,))
    slope, inputs = torch.randn(37, dtype=dtype), [states, *head.parameters()]
    found = tiled_logps(states, head.weight, head.bias, tokens, 5 * 101)  # five tokens a tile
    wanted = torch.log_softmax(head(states), -1)[torch.arange(37), tokens]
    assert torch.allclose(found, wanted, atol=near, rtol=near)
    ours, plain = (torch.autograd.grad(x, inputs, slope) for x in (found, wanted))
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).abs().max() <= near * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("bias", [True, False])
def test_entropies_and_their_gradients_are_those_of_the_whole_distribution(bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 101, bias=bias, dtype=torch.float64)
    states = torch.randn(37, 16, dtype=torch.float64, requires_grad=True)
    tokens, inputs = torch.randint(101, (37,)), [states, *head.parameters()]
    whole = torch.log_softmax(head(states), -1)
    wanted = whole[torch.arange(37), tokens], -(whole.exp() * whole).sum(-1)
    found = tiled_head.tiled_entropy(states, head.weight, head.bias, tokens, 5 * 101)
    slopes = torch.randn(2, 37, dtype=torch.float64)
    ours, plain = (
        torch.autograd.grad(x, inputs, list(slopes), retain_graph=True) for x in (found, wanted)
    )
    for a, b in zip((*found, *ours), (*wanted, *plain), strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_compiled_tiles_are_the_same(bias, monkeypatch):
    """Traced and run by torch itself; a slow test compiles them to machine code."""
    made = []

    def traced(function):
        made.append(function.__name__)
        return torch.compile(function, dynamic=True, backend="eager")

    monkeypatch.setattr(tiled_head, "_compiled", cache(traced))
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 101, bias=bias)
    states, tokens = torch.randn(37, 16, requires_grad=True), torch.randint(101, (37,))
    slope, inputs = torch.randn(37), [states, *head.parameters()]
    apart, whole = (
        tiled_logps(states, head.weight, head.bias, tokens, 5 * 101, how) for how in (True, False)
    )
    assert torch.allclose(apart, whole, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(x, inputs, slope) for x in (apart, whole)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert made == ["_read", "_slope"]


def test_logits_of_all_tokens_never_exist_together():
    head, tokens = torch.nn.Linear(8, 1000, bias=False), torch.zeros(64, dtype=torch.long)
    states, largest = torch.randn(64, 8, requires_grad=True), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (1000,):
                largest.append(out.shape[0])
            return out

    with Watch():
        tiled_logps(states, head.weight, None, tokens, 4 * 1000).sum().backward()
    assert max(largest) == 8 or set(largest) <= {4, 8}  # tiles; 8 is the width of the weight
    assert 64 not in largest


def test_a_model_takes_tiles_where_logits_are_many(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=50, num_attention_heads=2, attn_implementation="eager")
    )
    collate.add_scored_forward(model)
    batch = collate.lay_out([[([5, 6], [(0, [7, 8, 9])])], [([4], [(1, [3, 2])])]], 0)
    found = []
    for limit in (2**26, 60):
        monkeypatch.setattr(collate, "LOGITS_AT_ONCE", limit)
        model.zero_grad()
        logps, _ = collate.answer_logps(model, batch, torch.float32)
        logps.sum().backward()
        found.append((logps.detach(), model.lm_head.weight.grad.clone()))
    for plain, tiled in zip(*found, strict=True):
        assert torch.allclose(plain, tiled, atol=1e-6)


def test_heads_that_are_more_than_a_matrix_are_called():
    head = torch.nn.Linear(4, 9)
    assert can_tile(head) and not can_tile(torch.nn.Sequential(head))
    head.weight.ds_id = 1  # ZeRO-3: the matrix is elsewhere until the head is called
    assert not can_tile(head)
