"""Thinking and answer, taken apart and put together."""

from __future__ import annotations

import time

import pytest

from prefab.factory.thinking import (
    MOST_BLOCKS,
    PolicyAnswer,
    join_thinking,
    message_text,
    policy_answer,
    split_thinking,
)
from prefab.factory.types import Completion


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
        ("<think>a</think>\n<think>b</think>c", ("a\n\nb", "c", True)),
        ("<think>a <think>b</think> c</think>d", ("a <think>b</think> c", "d", True)),
        ("The tag `</think>` ends it.", ("", "The tag `</think>` ends it.", True)),
        ("<think>I write `</think>` here</think>d", ("I write `</think>` here", "d", True)),
        ("<think></think>", ("", "", True)),
        ("<seed:think>a</seed:think>b", ("a", "b", True)),
        ("<Think>a</Think>b", ("a", "b", True)),
        ("<thought>a</thought>\nb", ("a", "b", True)),
        ("<unused94>thought\na<unused95>b", ("a", "b", True)),
        (
            "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>",
            ("a", "b", True),
        ),
        (
            "<|begin_of_thought|>a<|end_of_thought|>\n\n<|begin_of_solution|>b<|end_of_solution|>",
            ("a", "b", True),
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b"
            "<|return|>",
            ("a", "b", True),
        ),
        ("<|channel|>analysis<|message|>a", ("a", "", False)),
        ("analysisThe user asks.assistantfinalYes.", ("The user asks.", "Yes.", True)),
        ("analysisWe need", ("We need", "", False)),
        ("analysis of the problem: none", ("", "analysis of the problem: none", True)),
        (
            "An analysis. The assistantfinal word",
            ("", "An analysis. The assistantfinal word", True),
        ),
        ("1 < 2 and [x]", ("", "1 < 2 and [x]", True)),
    ],
)
def test_split(text, found):
    assert split_thinking(text) == found


def test_what_is_joined_is_split_again():
    assert split_thinking(join_thinking("Why?", "Yes.")) == ("Why?", "Yes.", True)
    assert split_thinking(join_thinking("Why?", "")) == ("Why?", "", False)
    assert split_thinking(join_thinking("Say </think> now", "Yes.")).answer == "Yes."


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": "Yes."}, "Yes."),
        ({"content": None}, ""),
        ({"content": "Yes.", "reasoning_content": None}, "Yes."),
        ({"content": "Yes.", "reasoning_content": "Why?"}, "<think>\nWhy?\n</think>\n\nYes."),
        ({"content": "Yes.", "reasoning": "Why?"}, "<think>\nWhy?\n</think>\n\nYes."),
        ({"content": None, "reasoning": "Why"}, "<think>\nWhy"),
        ({"content": "Yes.", "thinking": "Why?"}, "<think>\nWhy?\n</think>\n\nYes."),
        (
            {"content": "Yes.", "reasoning_content": [{"type": "text", "text": "Why?"}]},
            "<think>\nWhy?\n</think>\n\nYes.",
        ),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "Why?"}]},
                    {"type": "text", "text": "Yes."},
                ]
            },
            "<think>\nWhy?\n</think>\n\nYes.",
        ),
    ],
)
def test_thinking_given_apart_stands_before_the_answer(message, text):
    assert message_text(message) == text


def test_content_of_another_type_is_refused():
    for content in (5, [{"type": "image_url", "image_url": {}}], ["Yes."]):
        with pytest.raises((TypeError, AttributeError)):
            message_text({"content": content})


@pytest.mark.parametrize(
    ("completion", "found"),
    [
        (Completion("Yes.", "stop"), PolicyAnswer("Yes.", "")),
        (Completion("", "stop"), PolicyAnswer("", "")),
        (Completion("Yes, bu", "length"), PolicyAnswer("Yes, bu", "")),
        (Completion("<think>Why?</think>Yes.", "stop"), PolicyAnswer("Yes.", "Why?")),
        (Completion("<think>Why", "length"), PolicyAnswer(None, "Why", "truncated")),
        (Completion("<think>Why", "stop"), PolicyAnswer(None, "Why", "truncated")),
        (Completion("<think>Why?</think>", "length"), PolicyAnswer(None, "Why?", "truncated")),
        (Completion("<think>Why?</think>\n", "stop"), PolicyAnswer(None, "Why?", "parse")),
        (Completion("", "refused"), PolicyAnswer(None, "", "refused")),
    ],
)
def test_an_unfinished_thought_is_no_answer(completion, found):
    assert policy_answer(completion) == found


def test_very_many_blocks_of_thinking_end_in_bounded_time():
    """As a policy that is rewarded for length may write them; the rest of them is the answer."""
    began = time.process_time()
    found = split_thinking("<think>a</think>" * 5_000)
    assert found.finished and found.thinking.split() == ["a"] * (1 + MOST_BLOCKS)
    assert len(found.answer) == len("<think>a</think>") * (5_000 - 1 - MOST_BLOCKS)
    cut = split_thinking("<think>a</think><|START_RESPONSE|>" + " " * 100_000 + "x")
    assert cut == ("a", "x", True) and time.process_time() - began < 3
