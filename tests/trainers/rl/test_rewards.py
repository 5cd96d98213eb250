"""Rewards on text: combination, scales, and what is said of those that misbehave."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from prefab.factory.errors import ConfigError
from prefab.trainers.common import TrainError
from prefab.trainers.rl import rewards
from prefab.trainers.rl.rewards import RewardConfig, Source

FINITE = st.floats(-100, 100)


def fixed(*values):
    return lambda prompts, completions: list(values)


def test_an_ensemble_by_hand():
    assert rewards.combine([1.0, 3.0], "mean") == 2.0 and rewards.combine([1.0, 3.0], "min") == 1.0
    assert rewards.combine([1.0, 3.0], "mean_minus_sd", 0.5) == 1.5
    assert rewards.combine([1.0, None], "min") is None


@given(st.lists(FINITE, min_size=1, max_size=5), st.floats(0, 3))
def test_ensembles_are_never_above_their_mean(members, lam):
    mean = rewards.combine(members, "mean")
    assert min(members) - 1e-9 <= mean <= max(members) + 1e-9
    assert rewards.combine(members, "min") <= mean + 1e-9
    assert rewards.combine(members, "mean_minus_sd", lam) <= mean + 1e-9


def test_scores_are_weighted_sums_and_each_source_is_told_apart():
    sources = (
        Source("a", (fixed(1.0, 2.0),), 2.0),
        Source("b", (fixed(0.0, 4.0), fixed(2.0, 0.0)), 1.0, "min"),
    )
    found = rewards.score(sources, ["p", "p"], ["x", "y"])
    assert found.total == [2.0 + 0.0, 4.0 + 0.0]
    assert found.raw == {"a": [1.0, 2.0], "b": [1.0, 2.0]} and found.disagreement == {
        "a": [0.0, 0.0],
        "b": [1.0, 2.0],
    }


@given(st.lists(FINITE, min_size=3, max_size=8, unique=True), st.floats(0.1, 50), FINITE)
def test_what_the_reference_writes_scores_zero_with_deviation_one(values, scale, shift):
    if max(values) - min(values) < 1e-3:
        return
    texts = [str(i) for i in range(len(values))]
    plain = Source("r", (fixed(*values), fixed(*reversed(values))), 1.0, "mean_minus_sd")
    moved = Source(
        "r", (fixed(*(scale * v + shift for v in values)), plain.members[1]), 1.0, "mean_minus_sd"
    )
    for source in (plain, moved):  # each member has its own scale: moving one changes nothing
        try:
            scales = rewards.calibrate([source], texts, texts)
        except TrainError:
            continue  # a symmetric pair can cancel out to a constant
        total = rewards.score([source], texts, texts, scales).total
        assert abs(sum(total)) < 1e-5 and sum(x * x for x in total) / len(total) == pytest.approx(
            1, abs=1e-5
        )


def test_an_answer_without_a_score_has_no_total():
    found = rewards.score(
        [Source("a", (fixed(1.0, None),)), Source("b", (fixed(1.0, 1.0),))], ["p"] * 2, ["x", "y"]
    )
    assert found.total == [2.0, None] and found.raw["a"] == [1.0, None]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0], "gave 1 values for 2 answers"),
        ([1.0, float("inf")], "gave inf for the answer 'y'"),
        ([1.0, "x"], "must be a number"),
        ([1.0, [2.0]], "must be a number"),
    ],
)
def test_bad_values_are_told(values, words):
    with pytest.raises(TrainError, match=words):
        rewards.score(rewards.single(fixed(*values), "mine"), ["p", "p"], ["x", "y"])


def test_files_and_names(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(prompts, completions):\n    return [len(c) for c in completions]\n")
    (source,) = rewards.build([RewardConfig(name="length", kind="file", paths=[str(file)])])
    assert rewards.score([source], ["p"], ["four"]).total == [4.0]
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_text("1 / 0\n")
    for name, words in (
        ("none.py", "has no function reward"),
        ("bad.py", "ZeroDivisionError"),
        ("no.py", "no such file"),
    ):
        with pytest.raises(ConfigError, match=words):
            rewards.build([RewardConfig(name="r", kind="file", paths=[str(tmp_path / name)])])
    with pytest.raises(ConfigError, match="two are named r"):
        rewards.build(
            [RewardConfig(name="r", kind="oracle"), RewardConfig(name="r", kind="oracle")]
        )
    with pytest.raises(ConfigError, match="name at least one model"):
        rewards.build([RewardConfig(name="r")])


def test_a_reward_model_reads_text_through_its_own_tokenizer(tmp_path):
    """Batches of like length, padding and order change nothing: each score is that of the
    conversation alone."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tests.support.tinymodel import build_tokenizer

    tokenizer = build_tokenizer(700)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_labels=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward = rewards.from_model(str(tmp_path), batch=2)
    prompts, texts = (
        ["hello", [{"role": "user", "content": "Answer A or B"}], "x y z"],
        ["yes", "A", "no, I can not help"],
    )
    with torch.no_grad():
        alone = []
        for prompt, text in zip(prompts, texts, strict=True):
            said = tokenizer.apply_chat_template(
                [*rewards.turns(prompt), {"role": "assistant", "content": text}], tokenize=False
            )
            alone.append(
                float(
                    model(
                        torch.tensor([tokenizer(said, add_special_tokens=False)["input_ids"]])
                    ).logits
                )
            )
    assert (
        reward(prompts, texts) == pytest.approx(alone, abs=1e-5) and max(alone) - min(alone) > 1e-3
    )
    (tmp_path / "reward.json").write_text(
        '{"mean": 2.0, "deviation": 0.5}'
    )  # as training leaves it
    assert rewards.from_model(str(tmp_path))(prompts, texts) == pytest.approx(
        [(x - 2) * 2 for x in alone], abs=1e-4
    )


def test_an_ensemble_that_training_wrote_is_read_by_its_members(tmp_path):
    (tmp_path / "reward.json").write_text('{"members": ["member-0", "member-1"]}')
    assert rewards.members_of(str(tmp_path)) == [
        str(tmp_path / "member-0"),
        str(tmp_path / "member-1"),
    ]
    assert rewards.members_of(str(tmp_path / "one")) == [str(tmp_path / "one")]


def test_the_oracle_is_the_worlds_own_score():
    from prefab.factory.microworld import grammar
    from prefab.factory.microworld.oracle import assess

    prompt = next(iter(grammar.prompts("train", 1)))
    turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
    assert rewards.oracle([turns], ["nothing to say"]) == [
        assess(prompt.messages, "nothing to say").score
    ]
