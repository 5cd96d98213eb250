"""Where the steps of an answer end among its tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any


def step_tokens(tokenizer: Any, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The place of the token that completes each step.

    Args:
        tokenizer: That of the tokens.
        ids: The answer's tokens; special tokens have no text.
        ends: Where each step ends in the answer's text, in characters, ascending.
    """

    def length(k: int) -> int:
        return len(tokenizer.decode(ids[: k + 1], skip_special_tokens=True))

    most = max(len(ids) - 1, 0)
    return [bisect_left(range(most), end, key=length) for end in ends]
