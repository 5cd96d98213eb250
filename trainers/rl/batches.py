"""Answers with their prompts in batches for a forward: which stand together, and their tensors.

Where answers to the same prompt stand together, their prompt can be computed once (`Prompts`).
Lists become tensors on the CPU, and go to a GPU from pinned memory, so that nothing waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

# Columns that the overhead of a forward is worth. On a CPU a constant, so that a run has the same
# bits every time; on a GPU, which computes thousands of columns in the time that launching a small
# model's kernels takes, it is measured (`measured_call`), and MOST_CALL bounds it.
CALL_CPU, CALL, MOST_CALL = 64, 2048, 65_536


class Answer(Protocol):
    """The tokens of a prompt and of an answer to it."""

    @property
    def prompt(self) -> list[int]:
        """Of the prompt."""

    @property
    def ids(self) -> list[int]:
        """Of the answer."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The distinct prompts of a batch, each once: ids, attention and positions G P, padded on the
    left. `of_B` is the number of each answer's prompt.
    """

    ids_GP: Tensor
    attention_GP: Tensor
    positions_GP: Tensor
    of_B: Tensor

    def inputs(self) -> dict[str, Any]:
        """What a model is called with. It gives the keys and values for the answers, and the logits
        of their first tokens.
        """
        return {
            "input_ids": self.ids_GP,
            "attention_mask": self.attention_GP,
            "position_ids": self.positions_GP,
            "use_cache": True,
            "logits_to_keep": 1,
        }


@dataclass(frozen=True, slots=True)
class Packed:
    """Prompts and answers as one batch that ends at the right edge, so that short rows cost no
    columns.

    Shapes: ids, attention and positions B L; the answers are the last T columns, an answer shorter
    than T at their end. `mask_BT` is True on real tokens of answers aligned at the left, and
    `shift_B` the columns that aligning skips. `lengths` are those of the answers.

    With `prompts` ids and positions hold the answers alone, aligned at the left already, and
    attention has the columns of the prompts before them, B P+T.
    """

    ids_BL: Tensor
    attention_BL: Tensor
    positions_BL: Tensor
    mask_BT: Tensor
    shift_B: Tensor
    lengths: list[int]
    prompts: Prompts | None = None

    def inputs(self) -> dict[str, Any]:
        """What a model is called with, B L-1: each token is predicted from those before it, the
        last predicts none.
        """
        return {
            "input_ids": self.ids_BL[:, :-1],
            "attention_mask": self.attention_BL[:, :-1],
            "position_ids": self.positions_BL[:, :-1],
            "use_cache": self.prompts is not None,
        }

    def places(self) -> tuple[Tensor, Tensor]:
        """The places of all real tokens of answers, row by row, each N, in B T made flat: as they
        stand in the last T columns, and as they stand aligned at the left.
        """
        import torch

        T, device = self.mask_BT.shape[1], self.mask_BT.device
        lengths_B = torch.tensor(self.lengths)
        left_N = (torch.arange(T) < lengths_B[:, None]).flatten().nonzero()[:, 0]
        shift_B = torch.zeros_like(lengths_B) if self.prompts else T - lengths_B
        packed_N = left_N + shift_B.repeat_interleave(lengths_B)
        return to_device(packed_N, device), to_device(left_N, device)


def to_device(values: Any, device: Any) -> Tensor:
    """Numbers, rows of numbers, or a tensor on the CPU, as a tensor on this device. The copy to a
    GPU is not waited for.
    """
    import torch

    found = torch.as_tensor(values)
    if device is None or torch.device(device).type != "cuda":
        return found.to(device)
    return found.pin_memory().to(device, non_blocking=True)


def left_padded(rows: Sequence[list[int]], device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention, positions), each B L: every row ends at the right edge and counts positions
    from its own start.

    The padding's id is 0: nothing attends to it.
    """
    longest = max(map(len, rows))
    ids = to_device([[0] * (longest - len(row)) + row for row in rows], device)
    attention = to_device([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device)
    return ids, attention, (attention.cumsum(-1) - 1).clamp(min=0)


def numbered(prompts: Sequence[list[int]]) -> tuple[list[list[int]], list[int]]:
    """(the distinct prompts, in the order in which they first come; the number of each prompt)."""
    number: dict[tuple[int, ...], int] = {}
    of = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    return [list(prompt) for prompt in number], of


def pack(answers: Sequence[Answer], device: Any, call: int | None = None) -> Packed:
    """Answers with their prompts as one batch for `rollout.forward`. With `call`, the columns that
    a forward's overhead is worth, each distinct prompt is computed once where that is cheaper.
    """
    import torch

    lengths, distinct, of = [len(a.ids) for a in answers], *numbered([a.prompt for a in answers])
    T, prompts = max(lengths), None
    skipped = [T - n for n in lengths]
    plain = max(len(a.prompt) + n for a, n in zip(answers, lengths, strict=True)) * len(answers)
    if call is not None and plain + call > _shared_cost(
        len(distinct), max(map(len, distinct)), len(answers), T, call
    ):
        prompts = Prompts(*left_padded(distinct, device), to_device(of, device))
        ids = to_device([a.ids + [0] * n for a, n in zip(answers, skipped, strict=True)], device)
        real = to_device([[1] * (T - n) + [0] * n for n in skipped], device)
        attention = torch.cat([prompts.attention_GP[prompts.of_B], real], 1)
        before_B = to_device([len(a.prompt) for a in answers], device)
        positions = before_B[:, None] + torch.arange(T, device=device)
    else:
        ids, attention, positions = left_padded([a.prompt + a.ids for a in answers], device)
    return Packed(
        ids,
        attention,
        positions,
        torch.arange(T, device=device)[None] < to_device(lengths, device)[:, None],
        to_device(skipped, device),
        lengths,
        prompts,
    )


def left(x_BT: Tensor, packed: Packed) -> Tensor:
    """The last T columns, aligned at the left (B T or B T D); what then stands outside the mask is
    arbitrary.
    """
    import torch

    if packed.prompts is not None:
        return x_BT
    T = packed.mask_BT.shape[1]
    columns_BT = (torch.arange(T, device=x_BT.device)[None] + packed.shift_B[:, None]).clamp(
        max=T - 1
    )
    return x_BT[torch.arange(len(x_BT), device=x_BT.device)[:, None], columns_BT]


def default_call(device: Any) -> int:
    """The columns that a forward's overhead is worth where nothing was measured."""
    return CALL_CPU if device.type == "cpu" else CALL


def measured_call(model: Any, device: Any) -> int:
    """The columns that a forward's overhead is worth for this model on this GPU."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(rows: int, columns: int) -> float:
        ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
        took = []
        for _ in range(4):  # the first one warms up
            wait()
            began = time.perf_counter()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            wait()
            took.append(time.perf_counter() - began)
        return min(took[1:])

    with torch.no_grad():
        return call_of_times(seconds(1, 16), seconds(32, 256), seconds(64, 256), 32 * 256)


def call_of_times(least_s: float, some_s: float, more_s: float, columns: int) -> int:
    """The columns that take as long as the overhead: `least_s` of a forward of hardly any columns,
    `more_s` of one with `columns` more than that of `some_s`.
    """
    a_column_s = (more_s - some_s) / columns
    if a_column_s * MOST_CALL <= least_s:  # also where it is not positive
        return MOST_CALL
    return max(CALL_CPU, round(least_s / a_column_s))


def in_batches(
    answers: Sequence[Answer], rows: Sequence[int], batch: int, call: int, share: bool = False
) -> list[list[int]]:
    """`rows` (places in `answers`) in batches of at most `batch`, the longest first: what does not
    fit fails at once.

    Rows of like length are together, cut where all is cheapest: columns, padding too, and the
    overhead of each forward, worth `call` columns. `share`: a batch may compute each distinct
    prompt once (`pack`), and answers to one prompt are together where that is cheaper.
    """
    size = {i: (len(answers[i].prompt), len(answers[i].ids)) for i in rows}
    distinct, of = numbered([answers[i].prompt for i in rows])
    number = dict(zip(rows, of, strict=True))
    orders = [sorted(rows, key=lambda i: -sum(size[i]))]
    if share and len(distinct) < len(rows):
        orders.append(sorted(rows, key=lambda i: (-size[i][0], number[i], -size[i][1])))
    ways = [_cut(order, size, number if len(orders) > 1 else None, batch, call) for order in orders]
    _, found = min(ways, key=lambda way: way[0])
    return sorted(found, key=lambda some: -max(sum(size[i]) for i in some))


def _cut(
    order: Sequence[int],
    size: Mapping[int, tuple[int, int]],
    number: Mapping[int, int] | None,
    batch: int,
    call: int,
) -> tuple[int, list[list[int]]]:
    """(cost, batches) of the cheapest way to cut rows of this order. `size` are the tokens of their
    prompts and answers; `number` those of their prompts, where these can be shared.
    """
    # for the first n rows: (their cost, where the last of their batches begins)
    cheapest = [(0, 0)]
    for n in range(1, len(order) + 1):
        prompts, prompt, answer, longest, ways = set[int](), 0, 0, 0, []
        for k in range(n - 1, max(0, n - batch) - 1, -1):
            a, b = size[order[k]]
            prompt, answer, longest = max(prompt, a), max(answer, b), max(longest, a + b)
            cost = call + longest * (n - k)
            if number is not None:
                prompts.add(number[order[k]])
                cost = min(cost, _shared_cost(len(prompts), prompt, n - k, answer, call))
            ways.append((cheapest[k][0] + cost, k))
        cheapest.append(min(ways))
    found, n = [], len(order)
    while n:
        found.append(list(order[cheapest[n][1] : n]))
        n = cheapest[n][1]
    return cheapest[-1][0], found[::-1]


def _shared_cost(prompts: int, prompt: int, answers: int, answer: int, call: int) -> int:
    """The columns that so many prompts, and answers to them, each padded to so many tokens, are
    worth in a forward of the prompts and one of the answers.
    """
    forwards = 2 if answer > 1 else 1
    return forwards * call + prompts * prompt + answers * answer


def packed_batches(
    answers: Sequence[Answer],
    rows: Sequence[int],
    batch: int,
    call: int,
    device: Any,
    share: bool = False,
) -> Iterator[tuple[Tensor, Packed]]:
    """(rows on the device, packed) of each batch of `in_batches`."""
    for some in in_batches(answers, rows, batch, call, share):
        packed = pack([answers[i] for i in some], device, call if share else None)
        yield to_device(some, device), packed
