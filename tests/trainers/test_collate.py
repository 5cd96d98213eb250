"""Batches that read only what counts give what the plain way gives: values, gradients, order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefab.trainers import collate as layout
from prefab.trainers import common
from prefab.trainers.offline import reference
from prefab.trainers.offline.reference import compute_logps, reference_logps
from tests.support import trained

PROMPTS, CHOSEN, REJECTED = (
    [[5, 6, 7], [8, 9, 10, 11, 12]],
    [[20, 21, 22, 2], [23, 2]],
    [[24, 2], [25, 26, 27, 28, 2]],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(trained.make_model(tmp_path_factory.mktemp("layout") / "model", layers=2))


def plain_logps(model, prompt, answer):
    """By the book: one row, all logits."""
    ids = torch.tensor([prompt + answer])
    logits = model(input_ids=ids).logits.log_softmax(-1)[0]
    return sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(answer))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("share", [True, False])
def test_logps_and_gradients_are_those_of_plain_rows(folder, attention, share):
    model = common.load_policy(folder, attention)
    wanted = torch.stack(
        [plain_logps(model, p, a) for p, a in zip(PROMPTS * 2, CHOSEN + REJECTED, strict=True)]
    )
    (wanted * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    slopes = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    layout.add_scored_forward(model)
    batch = layout.lay_out(layout.pair_rows(PROMPTS, CHOSEN, REJECTED, share), 0)
    assert batch["input_ids"].shape == ((2, 12) if share else (4, 10))
    found, tokens = layout.answer_logps(model, batch, torch.float32)
    assert tokens.tolist() == [4, 2, 2, 5]
    assert torch.allclose(found, wanted, atol=1e-5)
    (found * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, slopes[name], atol=2e-5), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_flat_row_without_padding_gives_the_same(folder, attention):
    """As flash attention reads it; the others tell sequences apart by their positions."""
    model = common.load_policy(folder, attention)
    layout.add_scored_forward(model)
    rows = layout.pair_rows(PROMPTS, CHOSEN, REJECTED, False)
    padded, flat = (layout.lay_out(rows, 0, flat=flat, multiple=8) for flat in (False, True))
    assert padded["input_ids"].shape == (4, 16) and flat["input_ids"].shape == (1, 29)
    assert flat["cu_seq_lens_q"].tolist() == [0, 7, 14, 19, 29] and flat["max_length_k"] == 10
    assert "attention_mask" not in flat and "branch" not in padded
    wanted, found = (layout.answer_logps(model, x, torch.float32)[0] for x in (padded, flat))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_references_are_computed_in_the_trainings_precision_and_the_difference_is_told(
    folder, tmp_path
):
    model = common.load_policy(folder, "eager")
    layout.add_scored_forward(model)
    pairs = list(zip(PROMPTS * 2, CHOSEN + REJECTED, strict=True))
    exact = compute_logps(model, pairs, 4, 0)
    notes: list[str] = []
    names = [reference.weights_of(model, folder, p) for p in ("fp32", "bf16")]
    assert names[0] != names[1]
    found = reference_logps(model, names[1], pairs, tmp_path, 4, 0, "bf16", notes)
    assert found == compute_logps(model, pairs, 4, 0, "bf16") != exact
    gap = sum(abs(a - b) for a, b in zip(found, exact, strict=True)) / 4
    assert 0 < gap < 0.5 and notes == [
        "the reference's log-probabilities are computed in bf16, as in training; on 4 answers they "
        f"differ from fp32's by {gap:.2g} nats an answer on the mean"
    ]


def test_a_forward_takes_rows_by_answers_or_by_places():
    pairs = [([1] * 6, [2] * 2)] * 4 + [([1] * 3, [2])] * 4
    groups = [[0, 1], [2, 3], [4], [5], [6], [7]]  # of 10, 10, 4 ... places
    assert reference._together(groups, pairs, 3, 0) == groups[:1]
    assert reference._together(groups, pairs, 5, 0) == groups[:3]
    assert reference._together(groups, pairs, 1, 45) == groups[:4]
    assert reference._together(groups, pairs, 1, 3) == groups[:1]


def test_rewards_are_those_of_an_ordinary_classifier(folder):
    torch.manual_seed(0)
    model = common.load_reward(folder, "eager", new_head=True)
    rows = [[5, 6, 7, 20, 2], [5, 6, 7, 24, 25, 26, 2], [8, 9, 2], [8, 9, 10, 11, 2]]
    wanted = torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])
    layout.add_scored_forward(model)
    collate = layout.reward_collator(0, True)
    batch = collate(
        [
            {"chosen_ids": rows[i], "rejected_ids": rows[i + 1], "row": i, "weight": 1.0}
            for i in (0, 2)
        ]
    )
    assert batch["input_ids"].shape == (
        2,
        9,
    )  # three tokens shared, then 2 and 4; two, then 1 and 3
    found = layout.answer_scores(model, batch, torch.float32)
    assert torch.allclose(found, wanted[[0, 2, 1, 3]], atol=1e-5)
    assert layout.can_share(model, "eager", "cpu") and not layout.can_share(
        model, "flash_attention_2", "cpu"
    )


def test_a_model_that_reads_more_than_its_own_branch_is_not_shared(folder):
    model = common.load_policy(folder, "eager")
    layout.add_scored_forward(model)
    inner = model.model.forward

    def leaks(
        *args, attention_mask=None, **kwargs
    ):  # as a model with a state would: the order of places counts
        out = inner(*args, attention_mask=attention_mask, **kwargs)
        out.last_hidden_state = out.last_hidden_state.cumsum(1)
        return out

    model.model.forward = leaks
    assert not layout.can_share(model, "eager", "cpu")


def test_packed_conversations_are_blind_to_each_other(folder):
    model = common.load_policy(folder, "eager")
    layout.add_scored_forward(model)
    talks = [
        {
            "input_ids": [5, 6, 7, 8],
            "labels": [-100, -100, 7, 8],
            "weight": 1.0,
            "row": 0,
            "length": 4,
        },
        {"input_ids": [9, 10, 2], "labels": [-100, 10, 2], "weight": 2.0, "row": 1, "length": 3},
    ]
    collate = layout.sft_collator(0)
    alone = collate(talks)
    joined = collate(
        [
            {
                "input_ids": [t["input_ids"] for t in talks],
                "labels": [t["labels"] for t in talks],
                "weight": [1.0, 2.0],
                "row": 0,
                "length": 7,
                "packed": True,
            }
        ]
    )
    read = [
        model(**layout.inputs_of(b, torch.float32), scored=(b["row"], b["place"], b["token"]))
        for b in (alone, joined)
    ]
    assert torch.allclose(*read, atol=1e-5) and joined["input_ids"].shape == (1, 7)
    assert (
        alone["weight"][alone["answer"]].tolist()
        == joined["weight"][joined["answer"]].tolist()
        == [1, 1, 2, 2]
    )
    assert (joined["labels"] != -100).sum() == 4 == len(joined["token"])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 90))
def test_packing_keeps_every_row_once_and_never_overfills(lengths, longest):
    bins = layout.packed([{"length": n} for n in lengths], longest)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= longest for members in bins)
    assert len(bins) <= 2 * -(-sum(lengths) // longest) + 1


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 5))
def test_buckets_are_a_permutation_and_a_function_of_seed_and_epoch(n, batch, seed):
    lengths = [(7 * i) % 23 for i in range(n)]
    order = list(layout.buckets(lengths, batch, seed, 1))
    assert sorted(order) == list(range(n)) and order == list(
        layout.buckets(lengths, batch, seed, 1)
    )
    if n > 40:
        assert order != list(layout.buckets(lengths, batch, seed, 2))


def test_buckets_waste_little():
    lengths = [10 + (37 * i) % 90 for i in range(2000)]
    order = list(layout.buckets(lengths, 16, 0, 0))
    padded = sum(16 * max(lengths[i] for i in order[k : k + 16]) for k in range(0, 2000, 16))
    assert padded < 1.05 * sum(lengths)
    assert [lengths[order[k]] for k in range(0, 320, 16)] != sorted(
        lengths[order[k]] for k in range(0, 320, 16)
    )


def test_answers_to_one_prompt_share_it_in_the_reference_and_are_as_apart(folder):
    model = common.load_policy(folder, "sdpa")
    layout.add_scored_forward(model)
    pairs = [(p, a) for p, a in zip(PROMPTS * 2, CHOSEN + REJECTED, strict=True)] + [
        (PROMPTS[0], [5])
    ]
    rows = []
    inner = model.forward
    model.forward = lambda *a, **k: rows.append(len(k["input_ids"])) or inner(*a, **k)
    found = compute_logps(model, pairs, 64, 0)
    assert rows[-1] == len(PROMPTS)
    model.forward = inner
    assert found == pytest.approx(
        [float(plain_logps(model, p, a).detach()) for p, a in pairs], abs=1e-4
    )


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=40),
    st.integers(1, 12),
    st.booleans(),
)
def test_groups_of_pairs_hold_each_once_within_twice_the_longest(shape, batch, share):
    pairs = [([p] * (3 * p + 1), [0] * n) for p, n in shape]
    groups = reference._groups(pairs, share)
    assert sorted(i for group in groups for i in group) == list(range(len(pairs)))
    longest = max(len(p) + len(a) for p, a in pairs)
    assert all(len({pairs[i][0][0] for i in group}) == 1 for group in groups) and (
        share or max(map(len, groups)) == 1
    )
    assert all(
        len(pairs[g[0]][0]) + sum(len(pairs[i][1]) for i in g) <= 2 * longest for g in groups
    )
    cut, left = [], list(groups)
    while left:
        cut.append(reference._together(left, pairs, batch, 0))
        del left[: len(cut[-1])]
    assert [g for some in cut for g in some] == groups and all(
        len(some) == 1 or sum(map(len, some)) <= batch for some in cut
    )


def test_reference_is_computed_once_by_content(folder, tmp_path, monkeypatch):
    model = common.load_policy(folder, "eager")
    monkeypatch.setattr(layout, "can_share", lambda *_: False)
    layout.add_scored_forward(model)
    pairs = [(p, a) for p, a in zip(PROMPTS * 2, CHOSEN + REJECTED, strict=True)]
    first = reference_logps(model, "m", pairs, tmp_path, 3, 0)
    assert first == pytest.approx(
        [float(plain_logps(model, p, a).detach()) for p, a in pairs], abs=1e-4
    )
    calls = []
    inner = model.forward
    model.forward = lambda *a, **k: calls.append(len(k["input_ids"])) or inner(*a, **k)
    again = reference_logps(model, "m", [pairs[2], pairs[0], (PROMPTS[0], [1, 2])], tmp_path, 3, 0)
    assert again[:2] == [first[2], first[0]] and calls == [1]  # only the new one
    reference_logps(model, "other weights", pairs[:2], tmp_path, 3, 0)
    assert calls == [1, 2]
    for file in tmp_path.glob("*.parquet"):
        file.write_bytes(b"cut off")
    assert reference_logps(model, "m", pairs, tmp_path, 3, 0) == pytest.approx(first)
