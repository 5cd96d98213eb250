"""Checkpoints without waiting: a copy is taken at once, and a thread writes it while training goes
on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class BackgroundWriter:
    """Runs one piece of work at a time in a thread; an error is raised where the main thread next
    asks.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Begin work, once what was begun before has ended. Raises: its error."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises: the error of work that has failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Wait until nothing is being written; errors stay for `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until nothing is being written. Raises: the error of work that has failed."""
        self.join()
        self.check()


def snapshot(state: Any) -> Any:
    """A copy in main memory of all tensors in nested dictionaries and lists, which later steps do
    not change. Tensors that are one in `state` are one in the copy. Other objects are passed on as
    they are.
    """
    import torch

    copies: dict[tuple[Any, ...], Any] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, dict):
            return type(value)((k, copy(v)) for k, v in value.items())
        if isinstance(value, list | tuple):
            return type(value)(copy(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach()
        key = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in copies or not value.numel():
            if value.is_cuda:
                pinned = torch.empty_like(value, device="cpu", pin_memory=True)
                copies[key] = pinned.copy_(value, non_blocking=True)
            else:
                copies[key] = value.clone()
        return copies[key]

    made = copy(state)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return made
