"""Answers that share their prompts' forward against the same answers in rows of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from prefab.trainers import collate
from prefab.trainers.rl import batches, decoding, rollout

torch.set_num_threads(1)
VOCAB = 24
WINDOW_AND_ALL = ["sliding_attention", "full_attention"]
MODELS = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 4},  # shorter than prompts and answers
    "Gemma3Text": {"sliding_window": 4, "head_dim": 8, "layer_types": WINDOW_AND_ALL},
    "Gemma2": {"sliding_window": 5, "head_dim": 8},  # every other layer; more after the head
}
# of prompts and answers: some prompts once, some several times, not side by side
ROWS = [(5, 4), (2, 1), (5, 7), (9, 3), (2, 6), (1, 2), (5, 1), (9, 5)]


def tiny(kind, attention, **more):
    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=0,
        attn_implementation=attention,
        **more,
    )
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()


def drawn(rows=ROWS):
    """An answer of so many tokens to a prompt of so many, one prompt for each length."""
    draw = torch.Generator().manual_seed(1)
    ids = {n: torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n, _ in rows}
    return [
        rollout.SampledAnswer(
            list(ids[p]), torch.randint(3, VOCAB, (n,), generator=draw).tolist(), [], True
        )
        for p, n in rows
    ]


def assert_alike(some, others):
    """Within 1e-5 of the largest number of each tensor (or of 1)."""
    for one, other in zip(some, others, strict=True):
        off, most = (float(x.detach().abs().max()) for x in (one - other, other))
        assert off < 1e-5 * max(1.0, most)


def found_by(model, packed):
    """Log-probabilities, entropies, a loss of both and of the states, and its gradient."""
    logps, entropy, states = rollout.forward(model, packed, 0.7, hidden=True, entropy=True)
    weight = torch.randn(logps.shape, generator=torch.Generator().manual_seed(2))
    terms = (logps + entropy * entropy + 0.1 * states.sum(-1)) * weight
    loss = terms.masked_fill(~packed.mask_BT, 0.0).sum() / len(logps)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return [x.masked_fill(~packed.mask_BT, 0.0) for x in (logps, entropy)] + [loss, *gradient]


@pytest.mark.parametrize("in_tiles", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODELS)
def test_shared_prompts_give_what_separate_rows_give(kind, attention, in_tiles, monkeypatch):
    monkeypatch.setattr(collate, "LOGITS_AT_ONCE", 60 if in_tiles else 2**26)
    model, answers = tiny(kind, attention, **MODELS[kind]), drawn()
    plain, shared = (batches.pack(answers, None, call) for call in (None, 0))
    assert plain.prompts is None and shared.prompts.ids_GP.shape == (4, 9)
    assert rollout._in_tiles(model, shared) == (in_tiles and kind != "Gemma2")
    assert rollout.can_share(model)
    assert_alike(found_by(model, shared), found_by(model, plain))


def test_shared_prompts_under_autocast():
    """The shared forward rounds to bf16 as the plain one does."""
    model, answers, found = tiny("Llama", "sdpa"), drawn(), []
    for call in (None, 0):
        packed = batches.pack(answers, None, call)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(rollout.forward(model, packed, 1.0)[0].masked_fill(~packed.mask_BT, 0.0))
    with torch.no_grad():
        exact = rollout.forward(model, packed, 1.0)[0].masked_fill(~packed.mask_BT, 0.0)
    off, rounding = (float((found[1] - x).abs().mean()) for x in (found[0], exact))
    assert off < rounding < 0.05


def test_answers_of_one_token_need_the_prompts_forward_alone():
    model, answers = tiny("Llama", "sdpa"), drawn([(5, 1)] * 3)
    plain, shared = (batches.pack(answers, None, call) for call in (None, 0))
    expected, calls = found_by(model, plain), []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert_alike(found_by(model, shared), expected)
    assert len(calls) == 1


def test_models_whose_cache_is_no_list_of_keys_do_not_share():
    config = transformers.Lfm2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    model = transformers.Lfm2ForCausalLM(config).eval()
    assert not rollout.can_share(model)
    done = rollout.sample(model, [[5, 6]] * 8, 12, 1.0, [3, 4, 5], 0)  # rows leave the batch
    packed = batches.pack(done, None, None)
    with torch.no_grad():
        logps, *_ = rollout.forward(model, packed, 1.0)
    assert rollout.sampler_gap(done, logps, packed.mask_BT)[1] < 1e-4
    assert len({len(a.ids) for a in done}) > 3
    model = tiny("Llama", "sdpa")
    forward = model.model.forward

    def wrong(*args, position_ids, **more):  # positions of its own, from 0 in each call
        return forward(*args, position_ids=position_ids - position_ids[:, :1], **more)

    model.model.forward = wrong
    assert not rollout.can_share(model)


def cost(some, share, call):
    """Columns of a batch, and its forwards' overhead."""
    prompts = {tuple(a.prompt) for a in some}
    answer, n = max(len(a.ids) for a in some), len(some)
    plain = call + n * max(len(a.prompt) + len(a.ids) for a in some)
    together = call * (2 if answer > 1 else 1) + n * answer + len(prompts) * max(map(len, prompts))
    return min(plain, together) if share else plain


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.integers(0, 64),
)
def test_batches_that_share_hold_every_row_and_cost_no_more(rows, most, call):
    answers = [rollout.SampledAnswer([p] * 3 * p, [1] * n, [], True) for p, n in rows]
    plain, shared = (
        [
            [answers[i] for i in some]
            for some in batches.in_batches(answers, range(len(rows)), most, call, share)
        ]
        for share in (False, True)
    )
    assert sorted(id(a) for some in shared for a in some) == sorted(map(id, answers))
    assert max(map(len, shared)) <= most
    if len({p for p, _ in rows}) == len(rows):
        assert shared == plain
    assert sum(cost(s, True, call) for s in shared) <= sum(cost(s, True, call) for s in plain)
    for some in shared:
        packed = batches.pack(some, None, call)
        assert (packed.prompts is not None) == (cost(some, True, call) < cost(some, False, call))


def test_answers_to_one_prompt_come_together_where_that_is_cheaper():
    answers = drawn([(p, 4 + k) for k in range(4) for p in (40, 41)])
    assert batches.in_batches(answers, range(8), 4, 64, True) == [[7, 5, 3, 1], [6, 4, 2, 0]]
    assert batches.in_batches(answers, range(8), 4, 64) == [[7, 5, 6, 3], [4, 1, 2, 0]]


@pytest.mark.parametrize(
    ("kind", "static"), [("Llama", False), ("Mistral", False), ("Llama", True)]
)
def test_sampling_computes_each_prompt_once_and_draws_the_same(kind, static, monkeypatch):
    model, found, seen = tiny(kind, "sdpa", **MODELS[kind]), [], []
    prompts = [a.prompt for a in drawn([(5, 1), (2, 1), (9, 1)]) for _ in range(4)]
    model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    for share in (True, False):
        monkeypatch.setattr(rollout, "can_share", lambda _, share=share: share)
        decoder = decoding.StaticDecoder(None) if static else None
        seen.clear()
        found.append(
            rollout._sample(model, prompts, 12, 0.7, [3, 4], range(12), 12, [], 4, decoder)
        )
        assert seen[0] == (3 if share else 16 if static else 12, 9)
    for one, other in zip(*found, strict=True):
        assert (one.prompt, one.ids, one.ended) == (other.prompt, other.ids, other.ended)
        assert one.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-5)
    assert len({len(a.ids) for a in found[0]}) > 2
