"""Batches of prompts and answers, and the forward that reads only the places that count.

An answer's log-probability needs the vocabulary head at its own tokens alone; a reward needs the
score head at its last. Answers to one prompt may share it: the prompt stands once, its answers
behind it, each blind to the others (a tree of attention with the positions that each answer would
have on its own). The same serves conversations packed into one row.
Axes: R rows, T places in a row, N scored places, A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# These change the logits after the head; models that set them are read through their own forward.
AFTER_HEAD = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
    "lm_head_multiplier",
)
PLACES = ("input_ids", "position_ids", "tree", "branch")
FLAT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
SCORED = ("row", "place", "token", "answer")
LOGITS_AT_ONCE = 2**26  # numbers in a tile of logits: 256 MiB in fp32
COMPILED_TIMES = 4  # as many where tiles are compiled, which hold no copy in fp32
Tree = tuple[
    list[int], list[tuple[int, list[int]]]
]  # a trunk (may be empty), and its branches with an answer's number each


def lay_out(
    rows: Sequence[Sequence[Tree]],
    pad: int,
    ends: bool = False,
    flat: bool = False,
    multiple: int = 1,
) -> dict[str, Any]:
    """Rows of trees as one batch, padded on the right.

    Scored are all tokens of the branches, each at the place that predicts it; with `ends`, only
    each branch's last token (for rewards; `token_N` then is that token itself).

    Args:
        rows: The trees of each row.
        pad: The token that fills a row.
        ends: Score the last token of each branch alone.
        flat: All trees in one row without padding, for attention with cumulative lengths. Each tree
            must be one sequence: a trunk and at most one branch.
        multiple: Pad rows to a multiple of so many places.

    Returns:
        Shapes: input_ids, position_ids, attention_mask (1 on tokens): R T; row, place, token,
        answer: N; tokens (scored ones of each answer): A. Where attention is not that of one
        sequence a row also tree (-1 on padding) and branch: R T. `flat`: without attention_mask,
        with cumulative lengths.
    """
    if flat:
        rows = [[tree for trees in rows for tree in trees]]
    columns, scored = _columns(), []
    for r, trees in enumerate(rows):
        line: dict[str, list[int]] = {name: [] for name in PLACES}
        for t, (trunk, branches) in enumerate(trees):
            _put(line, trunk, 0, t, 0)
            trunk_end = len(line["input_ids"]) - 1
            for b, (answer, ids) in enumerate(branches, 1):
                start = len(line["input_ids"])
                _put(line, ids, len(trunk), t, b)
                if ends:
                    scored.append((r, start + len(ids) - 1, ids[-1], answer))
                else:
                    before = [trunk_end, *range(start, start + len(ids) - 1)]
                    scored += [
                        (r, at, token, answer) for at, token in zip(before, ids, strict=True)
                    ]
        for name in PLACES:
            columns[name].append(line[name])
    return _stacked(columns, scored, pad, flat, multiple)


def rows_with_places(
    rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]], pad: int, multiple: int = 1
) -> dict[str, Any]:
    """Token rows as a batch in which these places of each row are scored: see `lay_out`. `answer`
    is the row of a place.
    """
    columns, scored = _columns(), []
    for r, (ids, at) in enumerate(zip(rows, places, strict=True)):
        line: dict[str, list[int]] = {name: [] for name in PLACES}
        _put(line, ids, 0, 0, 0)
        scored += [(r, place, ids[place], r) for place in at]
        for name in PLACES:
            columns[name].append(line[name])
    return _stacked(columns, scored, pad, multiple=multiple)


def _columns() -> dict[str, list[list[int]]]:
    return {name: [] for name in PLACES}


def _stacked(
    columns: dict[str, list[list[int]]],
    scored: list[tuple[int, int, int, int]],
    pad: int,
    flat: bool = False,
    multiple: int = 1,
) -> dict[str, Any]:
    """Lists as tensors, padded on the right. What decides how a batch is read is told by which
    tensors there are and by their shapes, so that nobody has to wait for a device to read them.
    """
    import torch

    longest = max(len(ids) for ids in columns["input_ids"])
    longest += 0 if flat else -longest % multiple
    fill = {"input_ids": pad, "position_ids": 0, "tree": -1, "branch": 0}
    made = {
        name: torch.tensor([ids + [fill[name]] * (longest - len(ids)) for ids in columns[name]])
        for name in PLACES
    }
    tree, branch = made["tree"], made["branch"]
    if flat:
        made |= _lengths(columns["position_ids"][0])
    else:
        made["attention_mask"] = (tree >= 0).long()
    if flat or (int(tree.max()) <= 0 and int(branch.max()) <= 1):
        del made["tree"], made["branch"]
    places = torch.tensor(scored, dtype=torch.long).reshape(-1, 4).T.contiguous()
    made |= dict(zip(SCORED, places, strict=True))
    made["tokens"] = torch.bincount(made["answer"])
    return made


def _lengths(positions: list[int]) -> dict[str, Any]:
    """Where each sequence of one flat row begins, in the words of transformers' flash attention."""
    import torch

    starts = [i for i, position in enumerate(positions) if position == 0] + [len(positions)]
    longest = max(b - a for a, b in pairwise(starts))
    ends = torch.tensor(starts, dtype=torch.int32)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _put(
    line: dict[str, list[int]], ids: Sequence[int], position: int, tree: int, branch: int
) -> None:
    line["input_ids"] += ids
    line["position_ids"] += range(position, position + len(ids))
    line["tree"] += [tree] * len(ids)
    line["branch"] += [branch] * len(ids)


def pair_rows(
    prompts: Sequence[list[int]],
    chosen: Sequence[list[int]],
    rejected: Sequence[list[int]],
    share: bool,
) -> list[list[Tree]]:
    """Pairs as rows: answer i is pair i's chosen one, B + i its rejected one. Shared, both stand
    behind one prompt.
    """
    B = len(prompts)
    if share:
        return [[(prompts[i], [(i, chosen[i]), (B + i, rejected[i])])] for i in range(B)]
    return [[(prompts[i % B], [(i, ids)])] for i, ids in enumerate([*chosen, *rejected])]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common, leaving at least one of each for the
    branch.
    """
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), most)


def tree_mask(tree_RT: Tensor, branch_RT: Tensor, dtype: Any) -> Tensor:
    """0 where a place may look (itself or earlier, same tree, the trunk or its own branch), else
    the least number.

    Shapes: R T twice to R 1 T T.
    """
    import torch

    T = tree_RT.shape[1]
    same = tree_RT[:, :, None] == tree_RT[:, None, :]
    own = (branch_RT[:, :, None] == branch_RT[:, None, :]) | (branch_RT[:, None, :] == 0)
    see = same & own & torch.ones(T, T, dtype=torch.bool, device=tree_RT.device).tril()
    return torch.zeros(see.shape, dtype=dtype, device=see.device).masked_fill_(
        ~see, torch.finfo(dtype).min
    )[:, None]


def to_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """A batch whose tensors are on `device`."""
    return {
        name: value.to(device, non_blocking=True) if hasattr(value, "to") else value
        for name, value in batch.items()
    }


def compute_dtype(device: Any, dtype: Any) -> Any:
    """The precision in which a model of `dtype` computes now: autocast's where it is on."""
    import torch

    kind = torch.device(device).type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def inputs_of(batch: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """What the backbone is given: a plain mask where every row is one conversation, else the
    tree's; cumulative lengths of a flat row.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if "cu_seq_lens_q" in batch:
        return inputs | {name: batch[name] for name in FLAT}
    if "branch" in batch:
        device = batch["branch"].device
        mask = tree_mask(batch["tree"], batch["branch"], compute_dtype(device, dtype))
    else:
        mask = batch["attention_mask"]
    return {**inputs, "attention_mask": mask}


def add_scored_forward(model: Any) -> None:
    """Teach a model `model(**inputs, scored=(row_N, place_N, token_N))`: log-probabilities N, or
    scores N of a reward model, from the heads at those places alone. Without `scored` it is what it
    was.

    It is a forward of the model itself, not of its parts, so that DDP and FSDP see it. Call before
    PEFT wraps the model.
    """
    plain_forward, head_alone = model.forward, is_head_alone(model)
    is_reward = hasattr(model, "score")

    def forward(
        self: Any, *args: Any, scored: tuple[Tensor, Tensor, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        if scored is None:
            return plain_forward(*args, **kwargs)
        row_N, place_N, token_N = scored
        if is_reward or head_alone:
            states = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[
                row_N, place_N
            ]
            if is_reward:
                return self.score(states)[:, 0].float()
            return head_logps(self.get_output_embeddings(), states, token_N)
        logits_NV = plain_forward(*args, **kwargs, use_cache=False).logits[row_N, place_N]
        return plain_logps(logits_NV, token_N)

    model.forward = MethodType(forward, model)


def is_head_alone(model: Any) -> bool:
    """Whether a model's logits are what its head makes of the last states, and no more."""
    config = model.config.get_text_config()
    return not any(getattr(config, name, None) for name in AFTER_HEAD)


def plain_logps(logits_NV: Tensor, token_N: Tensor) -> Tensor:
    """The log-probability of each token. Shapes: N V and N to N."""
    from torch.nn.functional import cross_entropy

    return -cross_entropy(logits_NV.float(), token_N, reduction="none")


def head_logps(head: Any, states_NH: Tensor, token_N: Tensor) -> Tensor:
    """The log-probability of each token from the states that predict it; in tiles where all logits
    would be many, so that they are never in memory together.

    Heads that are more than one matrix in this process (adapters, shards) are called as they are.
    Shapes: N H and N to N.
    """
    from prefab.trainers.tiled_head import can_tile, tiled_logps

    if can_tile(head) and len(token_N) * head.weight.shape[0] > LOGITS_AT_ONCE:
        compiled = getattr(head, "compiled_tiles", False)
        at_once = LOGITS_AT_ONCE * (COMPILED_TIMES if compiled else 1)
        return tiled_logps(states_NH, head.weight, head.bias, token_N, at_once, compiled)
    return plain_logps(head(states_NH), token_N)


def _scored(model: Any, batch: dict[str, Any], dtype: Any) -> Tensor:
    """The log-probability, or reward, at each scored place. Shapes: N."""
    found: Tensor = model(
        **inputs_of(batch, dtype), scored=(batch["row"], batch["place"], batch["token"])
    )
    return found


def answer_logps(model: Any, batch: dict[str, Any], dtype: Any) -> tuple[Tensor, Tensor]:
    """(summed log-probability A, tokens A) of each answer in a batch. Shapes: A answers, by their
    number.
    """
    import torch

    logps_N = _scored(model, batch, dtype)
    sums_A = torch.zeros(len(batch["tokens"]), device=logps_N.device)
    return sums_A.index_add_(0, batch["answer"], logps_N), batch["tokens"]


def answer_scores(model: Any, batch: dict[str, Any], dtype: Any) -> Tensor:
    """The reward of each answer, read at its last token. Shapes: A."""
    import torch

    scores_N = _scored(model, batch, dtype)
    return torch.zeros(len(scores_N), device=scores_N.device).index_put_(
        (batch["answer"],), scores_N
    )


def can_share(model: Any, attention: str, device: Any) -> bool:
    """Whether trees give this model what separate rows give it: tried on a few tokens, in
    evaluation mode.

    False with flash attention, which takes no such mask, and for models with other than full
    attention or a state.
    """
    import torch

    if attention not in ("eager", "sdpa"):
        return False
    vocab, was = model.config.get_text_config().vocab_size, model.training
    ids = [[(7 * i + j) % vocab for j in range(9)] for i in range(3)]
    rows = [
        lay_out(pair_rows([ids[0]], [ids[1]], [ids[2]], share), 0, hasattr(model, "score"))
        for share in (False, True)
    ]
    dtype = next(model.parameters()).dtype
    model.eval()
    try:
        with torch.no_grad():
            read = answer_scores if hasattr(model, "score") else lambda *a: answer_logps(*a)[0]
            apart, together = (read(model, to_device(batch, device), dtype) for batch in rows)
        return bool(
            torch.allclose(apart, together, atol=1e-3 if dtype == torch.float32 else 0.1, rtol=1e-2)
        )
    except (RuntimeError, ValueError, TypeError):
        return False
    finally:
        model.train(was)


def packed(rows: Sequence[dict[str, Any]], longest: int) -> list[list[int]]:
    """Indices of rows that fit together into `longest` tokens: first fit, the longest first
    (best-fit decreasing is within a few tokens of it here). Every row stands once.
    """
    bins: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(rows)), key=lambda i: (-rows[i]["length"], i)):
        size = rows[i]["length"]
        at = next((k for k, (used, _) in enumerate(bins) if used + size <= longest), None)
        if at is None:
            bins.append((size, [i]))
        else:
            bins[at] = (bins[at][0] + size, [*bins[at][1], i])
    return [members for _, members in bins]


def buckets(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> Iterator[int]:
    """Row numbers in an order whose consecutive batches have rows of like length; another order
    each epoch.

    Shuffled, cut into chunks of 32 batches, sorted inside each, and the batches shuffled again, so
    that length and time stay unrelated. A function of its arguments: that is what makes a resumed
    run see the same batches.
    """
    import random

    rng = random.Random(f"{seed} {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    span, whole, short = 32 * batch, [], []
    for start in range(0, len(order), span):
        chunk = sorted(order[start : start + span], key=lambda i: lengths[i])
        cut = [chunk[k : k + batch] for k in range(0, len(chunk), batch)]
        whole += [b for b in cut if len(b) == batch]
        short += [b for b in cut if len(b) < batch]
    rng.shuffle(whole)
    for group in (*whole, *short):  # the last, smaller batch of all stays last
        yield from group


Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


def pair_collator(pad: int, share: bool, flat: bool = False, multiple: int = 1) -> Collator:
    """Token pairs (`prompt_ids`, `chosen_ids`, `rejected_ids`) to a batch, with their numbers per
    pair. `flat`, `multiple`: see `lay_out`.
    """

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        prompts, chosen, rejected = (
            [item[name] for item in items] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        rows = pair_rows(prompts, chosen, rejected, share)
        return {**lay_out(rows, pad, flat=flat, multiple=multiple), **_numbers(items)}

    return collate


def reward_collator(pad: int, share: bool, flat: bool = False, multiple: int = 1) -> Collator:
    """Whole conversations (`chosen_ids`, `rejected_ids`) to a batch in which what both begin with
    may stand once. `flat`, `multiple`: see `lay_out`.
    """

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        cuts = [
            common_prefix(item["chosen_ids"], item["rejected_ids"]) if share else 0
            for item in items
        ]
        prompts = [item["chosen_ids"][:cut] for item, cut in zip(items, cuts, strict=True)]
        chosen, rejected = (
            [item[name][cut:] for item, cut in zip(items, cuts, strict=True)]
            for name in ("chosen_ids", "rejected_ids")
        )
        rows = pair_rows(prompts, chosen, rejected, share)
        return {**lay_out(rows, pad, True, flat, multiple), **_numbers(items)}

    return collate


def single_collator(pad: int, flat: bool = False, multiple: int = 1) -> Collator:
    """Single answers (`prompt_ids`, `completion_ids`) to a batch. Where there are answers of other
    rows (`kl_ids`), a second batch holds each prompt with one of those; its names begin with `kl_`.
    `flat`, `multiple`: see `lay_out`.
    """

    def side(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
        rows = [[(item["prompt_ids"], [(i, item[name])])] for i, item in enumerate(items)]
        return lay_out(rows, pad, flat=flat, multiple=multiple)

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        other = side(items, "kl_ids") if "kl_ids" in items[0] else {}
        return {
            **side(items, "completion_ids"),
            **{f"kl_{name}": value for name, value in other.items()},
            **_numbers(items),
        }

    return collate


def sft_collator(pad: int, flat: bool = False, multiple: int = 1) -> Collator:
    """Conversations (`input_ids`, `labels`; or lists of them, packed into one row) to a batch that
    scores the labels.

    `labels` (R T) stands beside, because the Trainer counts tokens by it; each token's weight is
    its conversation's. `flat`, `multiple`: see `lay_out`.
    """

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        rows = [
            list(zip(item["input_ids"], item["labels"], strict=True))
            if "packed" in item
            else [(item["input_ids"], item["labels"])]
            for item in items
        ]
        weights = [
            weight
            for item in items
            for weight in (item["weight"] if "packed" in item else [item["weight"]])
        ]
        if flat:
            rows = [[talk for talks in rows for talk in talks]]
        columns, scored, labels, answer = _columns(), [], [], 0
        for r, talks in enumerate(rows):
            line: dict[str, list[int]] = {name: [] for name in PLACES}
            marks: list[int] = []
            for t, (ids, wanted) in enumerate(talks):
                at = len(line["input_ids"])
                _put(line, ids, 0, t, 0)
                scored += [
                    (r, at + i - 1, token, answer)
                    for i, token in enumerate(wanted)
                    if i and token != -100
                ]
                marks += [-100, *wanted[1:]]
                answer += 1
            for name in PLACES:
                columns[name].append(line[name])
            labels.append(marks)
        made = _stacked(columns, scored, pad, flat, multiple)
        T = made["input_ids"].shape[1]
        made["labels"] = torch.tensor([marks + [-100] * (T - len(marks)) for marks in labels])
        return {
            **made,
            "weight": torch.tensor(weights),
            "rows": torch.tensor([item["row"] for item in items]),
        }

    return collate


def _numbers(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The columns of numbers, one a pair or answer; `rows` says where they came from."""
    import torch

    names = [
        name
        for name, value in items[0].items()
        if isinstance(value, (int, float)) and name not in ("row", "length")
    ]
    columns = {name: torch.tensor([float(item[name]) for item in items]) for name in names}
    return {**columns, "rows": torch.tensor([item["row"] for item in items])}
