"""The sampler with a cache of fixed size and a compiled forward draws what the ordinary one draws.

Here the forward is traced and run by torch itself, which shows what is compiled anew; a slow test
compiles it to machine code.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from statistics import fmean

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from prefab.trainers.rl import decoding, noise, rollout
from prefab.trainers.rl.config import PpoConfig

torch.set_num_threads(1)
END = 2
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 3], [4, 4], [5, 6, 7, 8]]


class Counter:
    """A backend of torch.compile that runs the graph as it is, and counts graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


def tiny(attention="sdpa", kind="Llama", **more):
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.6,
        eos_token_id=END,
        pad_token_id=0,
        attn_implementation=attention,
        **more,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def drawn(model, compiled, prompts=PROMPTS * 3, most=20, autocast=nullcontext):
    """By batches of 7, so that the last one is smaller and prompts have unlike lengths."""
    sampler = rollout.TransformersSampler(model, most, 0.7, [END], 7, 4, autocast, compiled)
    return sampler.sample(prompts, 3)


def assert_alike(some, others, tolerance=1e-5):
    assert [(a.prompt, a.ids, a.ended) for a in some] == [
        (a.prompt, a.ids, a.ended) for a in others
    ]
    for one, other in zip(some, others, strict=True):
        assert one.sampler_logps == pytest.approx(other.sampler_logps, abs=tolerance)


@pytest.fixture
def decoders():
    """Gives a model a decoder with this backend; forgets it at the end."""
    given = []

    def give(model, backend):
        given.append(model)
        decoding._decoders[model] = decoding.StaticDecoder(backend)
        return decoding._decoders[model]

    yield give
    for model in given:
        decoding.forget(model)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("attention", decoding.ATTENTION)
def test_a_cache_of_fixed_size_changes_no_answer(decoders, attention, hashed, monkeypatch):
    """Prompts padded at the left, rows that end early, a last batch that is not full."""
    monkeypatch.setattr(noise, "HASHED", ("cpu",) if hashed else ())
    model = tiny(attention)
    decoder = decoders(model, None)
    plain, static = drawn(model, False), drawn(model, True)
    assert_alike(static, plain)
    assert {a.ended for a in plain} == {True, False}
    assert (decoder.rows, decoder.columns) == (8, 128)
    assert drawn(model, True) == static  # nothing is left over from the batch before


def test_under_autocast_the_cache_holds_what_attention_computes_with(decoders):
    """Keys come rotated, in fp32, and values in bf16."""

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    model = tiny()
    decoder = decoders(model, None)
    plain, static = (drawn(model, how, PROMPTS, 6, autocast) for how in (False, True))
    assert decoder.cache.layers[0].keys.dtype == torch.bfloat16
    gaps = []
    for one, other in zip(static, plain, strict=True):  # until rounding decides about a token
        for id, its, logp, its_logp in zip(
            one.ids, other.ids, one.sampler_logps, other.sampler_logps, strict=False
        ):
            if id != its:
                break
            gaps.append(abs(logp - its_logp))
    assert len(gaps) > 15 and fmean(gaps) < 0.02 and max(gaps) < 0.2
    assert_alike(drawn(model, True), drawn(model, False))  # in fp32 again


@pytest.mark.slow
def test_noise_that_is_hashed_is_compiled_once_with_the_draw(decoders, monkeypatch):
    """And answers that come again are found by one forward."""
    monkeypatch.setattr(noise, "HASHED", ("cpu",))
    model, counter = tiny(), Counter()
    decoders(model, counter)
    before = drawn(model, True)
    assert_alike(before, drawn(model, False))
    assert_alike(drawn(model, True, PROMPTS[:3]), drawn(model, False, PROMPTS[:3]))
    assert counter.graphs == 2
    sampler = rollout.TransformersSampler(model, 20, 0.7, [END], 7, 4, nullcontext, True)
    monkeypatch.setattr(rollout, "_answer_rows", None)  # nothing is drawn token by token
    assert_alike(sampler.sample(PROMPTS * 3, 3, [a.ids for a in before]), before)


@pytest.mark.slow
def test_one_compiled_forward_serves_all_batches_and_sees_new_weights(decoders):
    model, counter = tiny(), Counter()
    decoders(model, counter)
    before = drawn(model, True)
    assert_alike(before, drawn(model, False))
    assert counter.graphs == 1
    with torch.no_grad():  # an update is in place
        model.lm_head.weight[END] += 0.5
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    after = drawn(model, True)
    assert_alike(after, drawn(model, False))
    assert [a.ids for a in after] != [a.ids for a in before]
    drawn(model, True, PROMPTS[:1], 10)  # fewer rows, shorter answers
    drawn(model, True, [[5] * 60, [6]] * 4)  # longer prompts, within the room there is
    assert counter.graphs == 1
    longer = [[5, 6] * 60, [7]]
    assert_alike(drawn(model, True, longer), drawn(model, False, longer))
    assert counter.graphs == 2  # a longer cache is another size
    drawn(model, True)
    assert counter.graphs == 2


def test_a_model_that_cannot_is_sampled_as_before_and_it_is_said_once(capsys):
    window = tiny(kind="Mistral", sliding_window=4)
    flex = tiny()
    flex.config._attn_implementation = "flash_attention_2"
    assert "layers that do not attend to all tokens" in decoding.why_not(window)
    assert "takes no mask of a fixed size" in decoding.why_not(flex)
    assert decoding.why_not(tiny()) is None
    assert_alike(drawn(window, True), drawn(window, False))
    drawn(window, True)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 == told.count("sampling without compiled decoding")


def test_a_compiler_that_fails_is_not_asked_again(decoders, capsys):
    def broken(graph, _):
        raise RuntimeError("no compiler was found")

    model = tiny()
    decoders(model, broken)
    assert_alike(drawn(model, True), drawn(model, False))
    told = capsys.readouterr().err
    assert told.count("sampling without compiled decoding") == 1 and "no compiler" in told
    assert decoding.decoder_of(model) is None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_in_training_with_gradient_checkpointing_is_sampled_with_its_cache(
    decoders, compiled
):
    """Such layers drop the cache while they train; GRPO samples between two updates of TRL."""
    model = tiny()
    decoders(model, None)
    plain = drawn(model, False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_alike(drawn(model, compiled), plain)
    assert model.training


def test_on_a_cpu_it_is_off_unless_asked_for():
    common = {"model": "prefab-nano", "out": "out"}
    auto, on = (PpoConfig(**common, **more) for more in ({}, {"compile_sampling": True}))
    assert [c.compiles_sampling(device) for c in (auto, on) for device in ("cpu", "cuda")] == [
        False,
        True,
        True,
        True,
    ]
    assert "compile_sampling" not in auto.model_dump()  # runs of earlier versions go on


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_to_machine_code_it_draws_the_same(decoders):
    model = tiny("eager")
    decoders(model, decoding.BACKEND)
    assert_alike(drawn(model, True), drawn(model, False))
    with torch.no_grad():
        model.lm_head.weight[END] += 0.5
    assert_alike(drawn(model, True), drawn(model, False))
    assert decoding.decoder_of(model) is not None  # it did not give up
