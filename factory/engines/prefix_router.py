"""Chooses the replica for a request: the one that has seen the longest prefix of its text, unless
it is too busy.

A server's prefix cache holds the prefixes it was asked before. Routing by a hash of the prompt
would need to know where the instructions end and the prompt begins. Counting known prefixes needs
no such knowledge: the instructions are soon cached on all replicas, and a prompt's answers on one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from prefab.factory.types import Message

CHUNK = 256  # characters: about two of vLLM's CPU blocks of 32 tokens
KNOWN = 65536  # prefixes remembered for each replica
SLACK = 8  # requests that a replica may have in flight beyond its fair share


class PrefixRouter:
    """Remembers which prefixes each of `n` replicas has been asked."""

    def __init__(self, n: int) -> None:
        self.known: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(n)]

    def add(self) -> None:
        """One more replica, which has seen nothing."""
        self.known.append(OrderedDict())

    def pick(
        self, messages: Sequence[Message], in_flight: Sequence[float], usable: Sequence[int]
    ) -> int:
        """The index of the replica to ask, one of `usable`; notes that it will have seen this
        text.
        """
        if len(self.known) == 1:
            return 0
        prefixes = _prefixes(messages)
        fair = sum(in_flight[i] for i in usable) / len(usable)
        free = [i for i in usable if in_flight[i] <= 1.25 * fair + SLACK] or usable
        best = min(free, key=lambda i: (-_matched(self.known[i], prefixes), in_flight[i], i))
        known = self.known[best]
        for prefix in prefixes:
            known[prefix] = None
            known.move_to_end(prefix)
        while len(known) > KNOWN:
            known.popitem(last=False)
        return best


def _prefixes(messages: Sequence[Message]) -> list[int]:
    """A hash of each prefix of the conversation, in steps of `CHUNK` characters."""
    text = "\0".join(m.content for m in messages)
    so_far, found = 0, []
    for at in range(0, max(1, len(text) - CHUNK + 1), CHUNK):
        so_far = hash((so_far, text[at : at + CHUNK]))
        found.append(so_far)
    return found


def _matched(known: OrderedDict[int, None], prefixes: Sequence[int]) -> int:
    return next((i for i, prefix in enumerate(prefixes) if prefix not in known), len(prefixes))
