"""PPO, GRPO and RLOO in several processes (`accelerate launch`): each has the whole model, answers
and updates on its share of a step's rows, and takes the same decisions from the same numbers.

What belongs to a run once (rewards, files, a server) is done by the main process, and all get its
result, or its error. In one process all of this does nothing.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from prefab.factory.errors import ConfigError
from prefab.trainers.common import TrainError
from prefab.trainers.distributed import is_main, world_size

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
BUCKET = 2**24  # gradients are added up in parts of so many numbers
ENDED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")
_alone = 0  # how deep in work that the main process does alone


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def check_kind(accelerator: Any) -> None:
    """Raises: ConfigError where the launcher shards the model (FSDP, DeepSpeed)."""
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in SHARDED:
        raise ConfigError(
            f"PPO, GRPO and RLOO hold the whole model in each process and cannot train with {kind}. Launch "
            "with trainers/accelerate/cpu.yaml or another MULTI_GPU configuration, or use lora; for larger "
            "models `prefab export --format verl` (or openrlhf) writes a script that trains there"
        )


def share(rows: Sequence[T]) -> Sequence[T]:
    """The rows of this process: every N-th of N processes, so that all have like ones."""
    return rows[rank() :: world_size()]


def gather(mine: Sequence[T]) -> list[T]:
    """All rows in their order, from the `share` of each process."""
    if world_size() == 1:
        return list(mine)
    n, parts = world_size(), concatenated([list(mine)])
    found: list[Any] = [None] * sum(map(len, parts))
    for k, part in enumerate(parts):
        found[k::n] = part
    return found


def concatenated(mine: Sequence[T]) -> list[T]:
    """The rows of all processes, those of the first one first. Each waits for all others."""
    if world_size() == 1:
        return list(mine)
    import torch

    parts: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(parts, list(mine))
    return [row for part in parts for row in part]


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes, the same bits in each."""
    if world_size() > 1:
        import torch

        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def add_up_gradients(parameters: Iterable[Any]) -> None:
    """Replace each gradient by its sum over all processes. A process without rows adds zeros."""
    if world_size() == 1:
        return
    import torch

    waiting: list[Any] = []

    def flush() -> None:
        flat = torch.cat([p.grad.reshape(-1) for p in waiting])
        torch.distributed.all_reduce(flat)
        for p, part in zip(waiting, flat.split([p.numel() for p in waiting]), strict=True):
            p.grad.copy_(part.view_as(p.grad))
        waiting.clear()

    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        waiting.append(p)
        if sum(q.numel() for q in waiting) >= BUCKET:
            flush()
    if waiting:
        flush()


def on_main(work: Callable[[], T]) -> T:
    """What `work` gives in the main process, which does it alone, in all of them. Raises: what
    `work` raises there, in all of them.
    """
    global _alone
    if world_size() == 1 or _alone:
        return work()
    import torch

    told: list[Any] = [None]
    if is_main():
        _alone += 1
        try:
            told = [(work(), None)]
        except Exception as error:
            told = [(None, _sendable(error))]
        finally:
            _alone -= 1
    torch.distributed.broadcast_object_list(told)
    result, raised = told[0]
    if raised is not None:
        raise raised
    done: T = result
    return done


def _sendable(error: Exception) -> Exception:
    """The error, or one with its words where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return TrainError(f"{type(error).__name__}: {error}")
    return error


class MainSampler:
    """A sampler that the main process has: all get its answers."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[Any]:
        """See `rollout.Sampler`."""
        found: list[Any] = on_main(lambda: self.sampler.sample(prompts, seed))
        return found

    def ahead(self, prompts: Sequence[list[int]], seed: int) -> Any:
        """See `rollout.Sampler`."""
        waiting = []

        def begin() -> None:
            waiting.append(self.sampler.ahead(prompts, seed))

        on_main(begin)
        return lambda: on_main(lambda: waiting[0]())

    def check(self, gap: float) -> None:
        """See `rollout.Sampler`."""
        on_main(lambda: self.sampler.check(gap))


@contextmanager
def others_watched() -> Iterator[None]:
    """Raises: TrainError where another process has ended, which closes its connections."""
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and any(words in str(error) for words in ENDED):
            raise TrainError(
                f"process {rank()} ends because another one did; the message of that one says why. "
                "The last whole checkpoint is kept"
            ) from error
        raise
