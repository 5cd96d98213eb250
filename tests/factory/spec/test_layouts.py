"""Rows of the layouts that public data sets have, and what is said of rows that cannot be kept."""

from __future__ import annotations

import json

import pytest

from prefab.factory.spec import layouts
from prefab.factory.tool_calls import split_calls


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "You are terse."}
ASKED = [user("Name a fish.")]
TALK = [user("Name a fish."), assistant("Of what colour?"), user("Red.")]
CALL = {"type": "function", "id": "c1", "function": {"name": "find", "arguments": {"day": "Tue"}}}
AS_SENT = {**CALL, "function": {"name": "find", "arguments": '{"day": "Tue"}'}}
RESULT = {"role": "tool", "content": '["10:30"]', "tool_call_id": "c1", "name": "find"}
HH = "\n\nHuman: Name a fish.\n\nAssistant: Of what colour?\n\nHuman: Red.\n\nAssistant:"


def arena(winner, **more):
    talks = {f"conversation_{s}": [*ASKED, assistant(t)] for s, t in (("a", "Cod."), ("b", "Oak."))}
    return {**talks, "winner": winner, **more}


FIRST, SECOND, TIE = ([(0, 1, p)] for p in (1.0, 0.0, 0.5))
# The layout, the row, its prompt, its answers, its pairs.
PAIRS = [
    ("trl", {"prompt": "Name a fish.", "chosen": "Cod.", "rejected": "Oak."}, ASKED, FIRST),
    ("hh-rlhf", {"chosen": f"{HH} Cod.", "rejected": f"{HH} Oak."}, TALK, FIRST),
    (
        "trl",  # the prompt's column repeats only the first turn of the conversations
        {
            "prompt": "Name a fish. ",
            "chosen": [*TALK, assistant("Cod.")],
            "rejected": [*TALK, assistant("Oak.")],
        },
        TALK,
        FIRST,
    ),
    (
        "trl",  # UltraFeedback binarized, with a system turn that only the conversations have
        {
            "prompt": "Name a fish.",
            "chosen": [SYSTEM, *ASKED, assistant("Cod.")],
            "rejected": [SYSTEM, *ASKED, assistant("Oak.")],
            "messages": [*ASKED, assistant("Cod.")],
            "score_chosen": 8.0,
            "score_rejected": 8.0,
        },
        [SYSTEM, *ASKED],
        TIE,
    ),
    (
        "trl",  # Skywork
        {"chosen": [*ASKED, assistant("Cod.")], "rejected": [*ASKED, assistant("Oak.")]},
        ASKED,
        FIRST,
    ),
    (
        "trl",  # Orca
        {
            "system": "You are terse.",
            "question": "Name a fish.",
            "chosen": "Cod.",
            "rejected": "Oak.",
        },
        [SYSTEM, *ASKED],
        FIRST,
    ),
    (
        "trl",  # Alpaca
        {"instruction": "Name", "input": "a fish.", "chosen": "Cod.", "rejected": "Oak."},
        [user("Name\na fish.")],
        FIRST,
    ),
    (
        "trl",  # LLaMA-Factory, ShareGPT
        {
            "conversations": [{"from": "human", "value": "Name a fish."}],
            "chosen": {"from": "gpt", "value": "Cod."},
            "rejected": {"from": "gpt", "value": "Oak."},
        },
        ASKED,
        FIRST,
    ),
    (
        "ultrafeedback",
        {
            "instruction": "Name a fish.",
            "completions": [
                {"response": "Cod.", "fine-grained_score": 2.0, "overall_score": 9.0},
                {"response": "Oak.", "fine-grained_score": 3.0, "overall_score": 1.0},
            ],
        },
        ASKED,
        SECOND,
    ),
    (
        "nectar",
        {
            "prompt": "\n\nHuman: Name a fish.\n\nAssistant: ",
            "answers": [{"answer": "Cod.", "rank": 2.0}, {"answer": "Oak.", "rank": 1.0}],
        },
        ASKED,
        SECOND,
    ),
    (
        "helpsteer2-preference",
        {
            "prompt": "Name a fish.",
            "response_1": "Cod.",
            "response_2": "Oak.",
            "preference_strength": -3,
        },
        ASKED,
        FIRST,
    ),
    (
        "helpsteer3",
        {"context": ASKED, "response1": "Cod.", "response2": "Oak.", "overall_preference": 2},
        ASKED,
        SECOND,
    ),
    (
        "helpsteer3",
        {"context": ASKED, "response1": "Cod.", "response2": "Oak.", "overall_preference": 0},
        ASKED,
        TIE,
    ),
    (
        "pku-saferlhf",
        {
            "prompt": "Name a fish.",
            "response_0": "Cod.",
            "response_1": "Oak.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        ASKED,
        SECOND,
    ),
    ("arena", arena("model_b"), ASKED, SECOND),
    ("arena", arena("tie (bothbad)"), ASKED, TIE),
    (
        "arena-columns",
        {
            "prompt": '["Name a fish."]',
            "response_a": '["Cod."]',
            "response_b": '["Oak."]',
            "winner_model_a": 0,
            "winner_model_b": 0,
            "winner_tie": 1,
        },
        ASKED,
        TIE,
    ),
    (
        "openai",
        {
            "input": {"messages": ASKED},
            "preferred_output": [assistant("Cod.")],
            "non_preferred_output": [assistant("Oak.")],
        },
        ASKED,
        FIRST,
    ),
    (
        "hh-rlhf",
        {
            "chosen": "Human: Name a fish.\n\nAssistant: Cod.",
            "rejected": "Human: Name a fish.\n\nAssistant: Oak.",
        },
        ASKED,
        FIRST,
    ),
    (
        "trl",
        {
            "chosen": json.dumps([*ASKED, assistant("Cod.")]),
            "rejected": str([*ASKED, assistant("Oak.")]),
        },
        ASKED,
        FIRST,
    ),
    (
        "llmbar",
        {"input": "Name a fish.", "output_1": "Cod.", "output_2": "Oak.", "label": 2},
        ASKED,
        SECOND,
    ),
]


@pytest.mark.parametrize(("layout", "row", "prompt", "pairs"), PAIRS)
def test_pairs_are_read_without_conversion(layout, row, prompt, pairs):
    found = layouts.parse(row)
    assert (found.layout, found.prompt, found.pairs) == (layout, prompt, pairs)
    assert found.answers == [assistant("Cod."), assistant("Oak.")]
    assert found.columns.keys() <= row.keys() and len(found.columns) > 1


def test_the_first_turn_alone_is_judged_where_the_row_says_so():
    longer = {
        name: [*talk, user("And?"), assistant(f"{name}.")]
        for name, talk in arena("a").items()
        if name != "winner"
    }
    assert layouts.parse({**longer, "winner": "model_a", "turn": 1}).pairs == FIRST
    second = layouts.parse({**longer, "winner": "model_a", "turn": 2})
    assert (second.prompt, second.pairs) == (ASKED, FIRST)
    assert second.answers == [assistant("conversation_a."), assistant("conversation_b.")]
    assert second.contexts == [[assistant(text), user("And?")] for text in ("Cod.", "Oak.")]


@pytest.mark.parametrize("column", ["conversation_a", "conversation_b"])
@pytest.mark.parametrize(
    ("talk", "words"),
    [
        ([], "has no turns"),
        ([user("Else"), assistant("a"), user("b"), assistant("c")], "begin with different"),
        ([*ASKED, assistant("a"), user("b"), assistant("")], "is empty"),
        ([*ASKED, assistant("a"), user("b")], "the last must be the"),
        ([*ASKED, assistant(""), user("b"), assistant("c")], "turn 2 is empty"),
    ],
)
def test_conversations_that_cannot_be_compared_are_refused(column, talk, words):
    whole = [*ASKED, assistant("x"), user("And?"), assistant("y")]
    row = {"conversation_a": whole, "conversation_b": whole, "winner": "tie", column: talk}
    with pytest.raises(ValueError, match=words):
        layouts.parse(row)


def test_a_pair_says_itself_that_its_sides_have_two_contexts():
    sides = {
        name: [*ASKED, assistant(name), user("And?"), assistant(f"{name}!")]
        for name in ("chosen", "rejected")
    }
    with pytest.raises(ValueError, match=r"part before .*two_contexts: true"):
        layouts.parse(sides)
    found = layouts.parse({**sides, "two_contexts": True, "p_chosen": 0.8})
    assert (found.prompt, found.pairs) == (ASKED, [(0, 1, 0.8)])
    assert found.contexts == [[assistant(name), user("And?")] for name in sides]


def test_every_two_answers_of_a_ranking_are_a_pair():
    ranked = [{"answer": text, "rank": rank} for text, rank in (("a", 1), ("b", 2), ("c", 2))]
    found = layouts.parse({"prompt": "x", "answers": ranked})
    assert found.pairs == [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5)]


def test_demonstrations_and_labelled_answers():
    alpaca = layouts.parse({"instruction": "Name", "input": "", "output": "Cod.", "system": ""})
    assert (alpaca.prompt, alpaca.answers) == ([user("Name")], [assistant("Cod.")])
    history = layouts.parse({"instruction": "c", "output": "d", "history": [["a", "b"]]})
    assert history.prompt == [user("a"), assistant("b"), user("c")]
    talk = [*TALK, assistant("Cod.")]
    assert layouts.parse({"messages": talk, "system": SYSTEM["content"]}).talk == [SYSTEM, *talk]
    kto = layouts.parse({"prompt": "x", "completion": [assistant("Cod.")], "label": False})
    assert (kto.layout, kto.label, kto.answers) == ("unpaired", False, [assistant("Cod.")])
    assert layouts.parse({"messages": TALK}).prompt == TALK
    assert layouts.parse({"conversation": talk}).talk == talk
    assert layouts.parse({"input": "x", "output": "y"}).prompt == [user("x")]


def test_tool_calls_results_and_tools_are_kept():
    tools = [{"type": "function", "function": {"name": "find", "strict": None}}]
    talk = [*ASKED, assistant(None, tool_calls=[AS_SENT]), RESULT]
    kept = [*ASKED, assistant("", tool_calls=[CALL]), RESULT]
    found = layouts.parse(
        {"messages": talk, "tools": json.dumps(tools), "chosen": assistant("a"), "rejected": "b"}
    )
    assert (found.prompt, found.pairs) == (kept, FIRST)
    assert found.tools == [{"type": "function", "function": {"name": "find"}}]
    answer = layouts.parse(
        {"prompt": ASKED, "chosen": [assistant(None, tool_calls=[AS_SENT])], "rejected": "No."}
    )
    assert answer.answers[0] == assistant("", tool_calls=[CALL])
    assert split_calls(layouts.answer_text(answer.answers[0])).calls == [
        {"type": "function", "function": CALL["function"]}
    ]
    with pytest.raises(ValueError, match="reasoning_content"):
        layouts.answer_text(assistant("a", reasoning_content="b"))
    share = [
        {"from": "human", "value": "Name a fish."},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"day": "Tue"}}'},
        {"from": "observation", "value": "4 degrees"},
    ]
    call = {"type": "function", "function": CALL["function"]}
    assert layouts.parse({"conversations": share}).prompt == [
        *ASKED,
        assistant("", tool_calls=[call]),
        {"role": "tool", "content": "4 degrees"},
    ]


REFUSED = [
    (
        "looks like a list of turns that was written as text",
        {"prompt": "x", "chosen": "[{'role': 'user'} {'role': 'assistant'}]", "rejected": "b"},
    ),
    ('chosen ends with the turn of "user"', {"chosen": TALK, "rejected": TALK}),
    (
        "part before their last turn",
        {"chosen": [*TALK, assistant("x")], "rejected": [*ASKED, assistant("y")]},
    ),
    ("answer of rejected is empty", {"chosen": f"{HH} Cod.", "rejected": HH}),
    ("answer of rejected is empty", {"prompt": "x", "chosen": "a", "rejected": ""}),
    ("rejected is null", {"prompt": "x", "chosen": "a", "rejected": None}),
    (
        "a whole conversation, the other an answer",
        {"prompt": "x", "chosen": [*ASKED, assistant("a")], "rejected": "b"},
    ),
    (
        "its prompt is not what the conversations",
        {
            "prompt": "Else",
            "chosen": [*ASKED, assistant("a")],
            "rejected": [*ASKED, assistant("b")],
        },
    ),
    ("turn 2 has null as content, and no tool_calls", {"messages": [*ASKED, assistant(None)]}),
    (
        "turn 1 has a part of type image",
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
    ),
    (
        'turn 1 has the role "judge"; must be system, user, assistant or tool',
        {"prompt": [{"role": "judge", "content": "x"}]},
    ),
    ("has images", {"prompt": "x", "chosen": "a", "rejected": "b", "images": ["cat.png"]}),
    (
        "system is another text",
        {"system": "Be long.", "prompt": [SYSTEM, *ASKED], "chosen": "a", "rejected": "b"},
    ),
    ('winner is "nobody"', arena("nobody")),
    ("label is the number 3", {"prompt": "x", "completion": "a", "label": 3}),
    ("none of the columns of a known layout.*its fields are: text", {"text": "x"}),
    (
        "without the name of a function",
        {"messages": [*ASKED, assistant("", tool_calls=[{"x": 1}])]},
    ),
]


@pytest.mark.parametrize(("told", "row"), REFUSED)
def test_what_cannot_be_kept_is_refused_with_a_reason(told, row):
    with pytest.raises(ValueError, match=told):
        layouts.parse(row)


def test_columns_can_be_mapped():
    row = {"ask": "Name a fish.", "good": "Cod.", "bad": "Oak.", "chosen": "not this"}
    found = layouts.parse(row, {"prompt": "ask", "chosen": "good", "rejected": "bad"})
    assert (found.prompt, found.answers) == (ASKED, [assistant("Cod."), assistant("Oak.")])
    with pytest.raises(ValueError, match="has no worse to map; its fields are: ask, good"):
        layouts.parse(row, {"rejected": "worse"})
