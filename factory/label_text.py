r"""The label in an answer that puts it into a form: `Answer: **A**`, `[[A]]`, `\boxed{A}`, or `A`
alone on a line; and the word that a text begins with, such as a critique's `Fault: ...`.

For a verdict only forms count. A label in a sentence ("A is kinder than B") is none, and an answer
whose forms name two labels has none: a verdict is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

# Threat: a text of 200,000 line breaks or spaces. Where two repetitions of one class meet, or begin
# at each line, the first is possessive or stays in its line: else they take minutes.
_OPEN, _CLOSE = (
    r"[\s*_`\"'“”‘’(\[{<$]*",
    r"[\s*_`\"'“”‘’)\]}>$]*+(?:[.!。][\s*_`]*+)?+",
)
_BLANK = r" \t\r\x0b\x0c\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_OPEN_LINE, _CLOSE_LINE = (part.replace(r"\s", _BLANK) for part in (_OPEN, _CLOSE))
_NAMES = (
    r"answer|verdict|choice|judg(?:e)?ment|winner|decision|preference|preferred(?: answer)?|rating"
    r"|score|grade|result|label|conclusion|option"
)
_END = r"[*_`\"'”’)\]}>$]*+(?!\w)"
# before a label and after it: no letter, digit, slash or decimal may belong to it
_ALONE_BEFORE, _ALONE_AFTER = (
    r"(?<![\w/.,-])",
    r"(?![\w/]|[.,]\d|\s*(?:/|or\b|and\b|vs\b|to\b)\s*\w)",
)


class FoundLabel(NamedTuple):
    """A label and where it stands in the answer."""

    label: str
    offset: int


def find_label(answer: str, labels: Iterable[str]) -> FoundLabel | None:
    """The label that the answer's forms name; None where none does, or two differ.

    Args:
        answer: A model's answer without its thinking.
        labels: The labels, with or without a space before them.
    """
    names = tuple(sorted({label.strip() for label in labels}, key=len, reverse=True))
    found = [
        FoundLabel(_label_of(match["label"], names), match.start("label"))
        for pattern in _patterns(names)
        for match in pattern.finditer(answer)
    ]
    if len({f.label for f in found}) != 1:
        return None
    return min(found, key=lambda f: f.offset)


def opening_label(answer: str, labels: Iterable[str]) -> FoundLabel | None:
    """The label that an answer begins with, before it goes on: `Fault: it is rude.`, `**None.**`.
    Only words are found (a letter may be a word of its sentence), with a colon, a full stop, a
    line's end or the text's end after them.

    Args:
        answer: A model's answer without its thinking.
        labels: The labels, with or without a space before them.
    """
    names = tuple(sorted({name for label in labels if len(name := label.strip()) > 1}))
    match = _opening(names).match(answer) if names else None
    return match and FoundLabel(_label_of(match["label"], names), match.start("label"))


def label_of_answer(answer: str, labels: Iterable[str]) -> tuple[FoundLabel | None, bool]:
    """The label that an answer names, and whether it begins with it. None where there is none, or
    it begins with one and names another in a form.
    """
    labels = tuple(labels)
    named, opens = find_label(answer, labels), opening_label(answer, labels)
    if opens is None:
        return named, False
    return (None if named is not None and named.label != opens.label else opens), True


@lru_cache(maxsize=64)
def _opening(names: tuple[str, ...]) -> re.Pattern[str]:
    spelled = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    mark = r"(?:(?:[-*•>#]{1,6}|\(?\d{1,2}[.)])\s++)?"
    return re.compile(
        rf"\s*+{mark}{_OPEN}(?P<label>{spelled})(?=[*_`\"'”’)\]]*\s*(?:[.:：。]|\n|$))", re.I
    )


def _label_of(text: str, names: Sequence[str]) -> str:
    return next(name for name in names if name.lower() == text.lower())


@lru_cache(maxsize=64)
def _patterns(names: tuple[str, ...]) -> tuple[re.Pattern[str], ...]:
    """One pattern a form. Words ("Yes") are found in any case, single letters in their own."""
    spelled = "|".join(
        f"(?i:{re.escape(name)})" if len(name) > 1 else re.escape(name) for name in names
    )
    label = f"{_ALONE_BEFORE}(?P<label>{spelled}){_ALONE_AFTER}"
    return (
        re.compile(rf"\\boxed\{{\s*+(?:\\(?:text|textbf|mathrm)\{{\s*+)?{label}\s*\}}"),
        re.compile(rf"\[\[\s*{label}\s*\]\]"),
        re.compile(rf"<(?:answer|verdict|choice|score)>\s*{label}\s*</"),
        re.compile(
            rf"(?i:\b(?:{_NAMES})\b(?:\s+(?:is|would be|should be))?){_CLOSE}[:：=]{_OPEN}{label}{_END}"
        ),
        re.compile(
            rf"(?i:\b(?:{_NAMES})\s+(?:is|would be))\s*+[:：]?{_OPEN}{label}{_CLOSE_LINE}$", re.M
        ),
        re.compile(rf"^{_OPEN_LINE}{label}{_CLOSE_LINE}$", re.M),
    )
