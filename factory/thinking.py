"""What a reasoning model thinks before it answers, and the answer, in one text.

A completion's text is raw: thinking stands in it as `<think>...</think>` before the answer, also
where the server gave it apart (`reasoning_content`). Where the chat template opens the thinking,
the text has the closing tag alone. Judges, stores and trainers take the answer.
"""

from __future__ import annotations

from typing import NamedTuple

TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))  # Qwen, DeepSeek and others; Mistral


class ThinkingSplit(NamedTuple):
    """The two parts of a text. `finished` is False when the text ends within the thinking; the
    answer is then empty.
    """

    thinking: str
    answer: str
    finished: bool = True


def split_thinking(text: str) -> ThinkingSplit:
    """Split a model's text into its thinking and its answer; white space around both is dropped
    where there is any thinking.
    """
    for opening, closing in TAGS:
        before, closed, after = text.partition(closing)
        opened = text.lstrip().startswith(opening)
        if opened and not closed:
            return ThinkingSplit(text.lstrip()[len(opening) :].strip(), "", False)
        if closed and (opened or opening not in before):
            return ThinkingSplit(before.strip().removeprefix(opening).strip(), after.strip())
    return ThinkingSplit("", text)


def join_thinking(thinking: str, answer: str) -> str:
    """Thinking that a server gave apart, and the answer, as one text. Without an answer the
    thinking stays open.
    """
    return f"<think>\n{thinking}\n</think>\n\n{answer}" if answer else f"<think>\n{thinking}"
