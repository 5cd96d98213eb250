"""The steps of an answer: its lines, or its paragraphs."""

from __future__ import annotations

import re
from typing import Literal

Separator = Literal["line", "paragraph"]
_STEPS = {
    "line": re.compile(r"[^\n]*\S[^\n]*"),
    "paragraph": re.compile(r"\S(?:.|\n(?!\s*\n))*"),
}


def step_spans(text: str, by: Separator) -> list[tuple[int, int]]:
    """Where each step of a text begins and ends, in characters; blank lines are in no step.

    Args:
        text: The answer.
        by: line: each line is a step; paragraph: blank lines part the steps.
    """
    spans = []
    for found in _STEPS[by].finditer(text):
        end = found.start() + len(found.group().rstrip())
        spans.append((found.start(), end))
    return spans


def step_text(text: str, span: tuple[int, int], shows: Literal["prefix", "step"]) -> str:
    """What a judge is shown of an answer to judge one step: the answer up to the step's end, or the
    step alone.
    """
    return text[: span[1]] if shows == "prefix" else text[slice(*span)].strip()
