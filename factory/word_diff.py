"""Two texts word by word: what each has that the other lacks."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

ALIKE = 0.3  # texts that share less of their words have no differences worth a mark
MOST_WORDS = (
    2000  # of both texts together; the time grows with the square, longer ones are not marked
)
Piece = tuple[str, bool]  # a part of a text, and whether the other text lacks it


def word_differences(a: str, b: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, each with whether the other text lacks it. Together the pieces are the
    text.
    """
    words = [re.findall(r"\S+\s*|\s+", text) for text in (a, b)]
    if sum(map(len, words)) > MOST_WORDS:
        return [(a, False)], [(b, False)]
    bare = [[word.strip() for word in side] for side in words]
    found = SequenceMatcher(None, bare[0], bare[1], autojunk=False)
    if found.ratio() < ALIKE:
        return [(a, False)], [(b, False)]
    pieces: tuple[list[Piece], list[Piece]] = ([], [])
    for kind, a1, a2, b1, b2 in found.get_opcodes():
        for side, (start, end) in enumerate(((a1, a2), (b1, b2))):
            if start < end:
                pieces[side].append(("".join(words[side][start:end]), kind != "equal"))
    return pieces
