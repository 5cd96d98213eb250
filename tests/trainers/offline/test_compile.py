"""Compiled layers and tiles compute what they compute otherwise, for rows of any length."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from transformers import LlamaConfig, LlamaForCausalLM

from prefab.trainers import collate, tiled_head
from prefab.trainers.offline.loop import compile_layers

torch.set_num_threads(1)


def model():
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=60,
        attn_implementation="sdpa",
    )
    made = LlamaForCausalLM(config).train()
    collate.add_scored_forward(made)
    return made


def batches():
    """Pairs that share their prompts, padded to unlike lengths."""
    for n in (3, 9, 4, 21):
        prompts, chosen, rejected = (
            [[(7 * i + j * k) % 60 for j in range(n + i)] for i in range(4)] for k in (1, 3, 5)
        )
        yield collate.lay_out(collate.pair_rows(prompts, chosen, rejected, True), 0, multiple=8)


def compare(backend, tiles_backend, monkeypatch):
    """Of both ways the log-probabilities and gradients are the same."""
    monkeypatch.setattr(collate, "LOGITS_AT_ONCE", 60 * 7)  # so that tiles are taken
    monkeypatch.setattr(tiled_head, "_compiled", tiles_backend)
    plain, compiled = model(), model()
    compile_layers(compiled, backend)
    assert compiled.lm_head.compiled_tiles
    for batch in batches():
        found = []
        for one in (plain, compiled):
            logps, _ = collate.answer_logps(one, batch, torch.float32)
            (logps * torch.arange(len(logps))).sum().backward()
            found.append((logps, *(p.grad.clone() for p in one.parameters())))
            one.zero_grad()
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_one_graph_serves_all_layers_and_lengths(monkeypatch):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compare(count, lambda function: function, monkeypatch)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiled_to_machine_code_it_is_the_same(monkeypatch):
    compare("inductor", tiled_head._compiled, monkeypatch)
