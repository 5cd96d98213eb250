"""Texts of models and people as HTML: escaped, with marks in place of what is not shown, cut where
they are very long, and two texts word by word.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

from prefab.factory.printable import printable
from prefab.factory.word_diff import word_differences

LONGEST = 20_000  # characters of one text in a page


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
    or very long, or they have little in common.
    """
    if old is None or new is None or max(len(old), len(new)) > LONGEST:
        return shown(old), shown(new)
    left, right = word_differences(old, new)
    return (
        Markup("").join(_part("del", *piece) for piece in left),
        Markup("").join(_part("ins", *piece) for piece in right),
    )


def _part(tag: str, text: str, own: bool) -> Markup:
    bare = text.rstrip()
    if not own or not bare:
        return safe(text)
    return Markup("<{0}>{1}</{0}>{2}").format(Markup(tag), safe(bare), safe(text[len(bare) :]))
