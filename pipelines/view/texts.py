"""Texts of models and people as HTML: escaped, with marks in place of what is not shown, cut where
they are very long, and two texts word by word.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from markupsafe import Markup, escape

from prefab.factory.printable import printable

LONGEST = 20_000  # characters of one text in a page
MOST_WORDS = 1_500  # of each side of a word diff, whose time grows with the square

_WORD = re.compile(r"\s+|\w+|[^\w\s]")


def safe(text: Any) -> Markup:
    """A text with its markup escaped. Characters that would move a terminal's cursor, reverse other
    text or hide are shown as their codes, and known secrets are not shown.
    """
    return escape(printable(str(text)))


def shown(text: str | None, longest: int = LONGEST) -> Markup:
    """A text of any length as HTML, cut at `longest` characters, which is said."""
    if text is None:
        return Markup('<span class="none">no text</span>')
    left = len(text) - longest
    more = (
        Markup('<span class="cut"> … {:,} more characters</span>').format(left) if left > 0 else ""
    )
    return safe(text[:longest]) + more


def short(text: str | None, longest: int = 160) -> Markup:
    """The beginning of a text in one line."""
    line = " ".join((text or "")[: 4 * longest].split())
    return safe(line if len(line) <= longest else line[: longest - 1] + "…")


def words_apart(old: str | None, new: str | None) -> tuple[Markup, Markup]:
    """Both texts, the words marked that the other does not have; unmarked where either is missing
    or has more words than are compared.
    """
    if old is None or new is None or max(len(old), len(new)) > LONGEST:
        return shown(old), shown(new)
    one, two = _WORD.findall(old), _WORD.findall(new)
    if max(len(one), len(two)) > MOST_WORDS:
        return shown(old), shown(new)
    left, right = [], []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, one, two, False).get_opcodes():
        left.append(_part("del", "".join(one[i:j]), kind))
        right.append(_part("ins", "".join(two[k:m]), kind))
    return Markup("").join(left), Markup("").join(right)


def _part(tag: str, text: str, kind: str) -> Markup:
    if kind == "equal" or not text:
        return safe(text)
    return Markup("<{0}>{1}</{0}>").format(Markup(tag), safe(text))
