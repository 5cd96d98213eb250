"""Thinking and answer, taken apart and put together."""

from __future__ import annotations

import pytest

from prefab.factory.thinking import join_thinking, split_thinking


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Yes.", ("", "Yes.", True)),
        ("<think>\nWhy?\n</think>\n\nYes.", ("Why?", "Yes.", True)),
        ("\n<think></think>Yes.", ("", "Yes.", True)),
        ("Why?\n</think>\n\nYes.", ("Why?", "Yes.", True)),  # the template opened it
        ("<think>Why", ("Why", "", False)),
        ("<think>Why</think>", ("Why", "", True)),
        ("[THINK]Why[/THINK]Yes.", ("Why", "Yes.", True)),
        ("It writes <think> first.", ("", "It writes <think> first.", True)),
        (
            "It writes <think> and </think>.",
            ("", "It writes <think> and </think>.", True),
        ),
        (" kept as it is ", ("", " kept as it is ", True)),
    ],
)
def test_split(text, found):
    assert split_thinking(text) == found


def test_what_is_joined_is_split_again():
    assert split_thinking(join_thinking("Why?", "Yes.")) == ("Why?", "Yes.", True)
    assert split_thinking(join_thinking("Why?", "")) == ("Why?", "", False)
