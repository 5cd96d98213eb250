"""Which replica gets a request: the one that has seen the longest beginning of its text, unless it
is too busy.

A server's prefix cache is warm for what it was asked before. A plain hash of the prompt would need
to know where the prompt ends and the instructions begin; counting known beginnings finds that by
itself: the instructions soon lie on all replicas, a prompt's answers on one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from prefab.factory.types import Message

CHUNK = 256  # characters: about two of vLLM's CPU blocks of 32 tokens
KNOWN = 65536  # beginnings remembered a replica
SLACK = 8  # requests that a replica may have in flight beyond its fair share


class Spread:
    """Remembers which beginnings each of `n` replicas has been asked."""

    def __init__(self, n: int) -> None:
        self.known: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(n)]

    def pick(
        self, messages: Sequence[Message], in_flight: Sequence[int], usable: Sequence[int]
    ) -> int:
        """The index of the replica to ask, one of `usable`; notes that it will have seen this
        text.
        """
        if len(self.known) == 1:
            return 0
        beginnings = _beginnings(messages)
        fair = sum(in_flight[i] for i in usable) / len(usable)
        free = [i for i in usable if in_flight[i] <= 1.25 * fair + SLACK] or usable
        best = min(free, key=lambda i: (-_matched(self.known[i], beginnings), in_flight[i], i))
        known = self.known[best]
        for beginning in beginnings:
            known[beginning] = None
            known.move_to_end(beginning)
        while len(known) > KNOWN:
            known.popitem(last=False)
        return best


def _beginnings(messages: Sequence[Message]) -> list[int]:
    """A hash of each beginning of the conversation, chunk by chunk."""
    text = "\0".join(m.content for m in messages)
    so_far, found = 0, []
    for at in range(0, max(1, len(text) - CHUNK + 1), CHUNK):
        so_far = hash((so_far, text[at : at + CHUNK]))
        found.append(so_far)
    return found


def _matched(known: OrderedDict[int, None], beginnings: Sequence[int]) -> int:
    return next(
        (i for i, beginning in enumerate(beginnings) if beginning not in known), len(beginnings)
    )
