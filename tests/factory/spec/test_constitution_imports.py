"""Constitutions of other projects: every layout is read, its texts are kept word for word, and
what comes out is a valid constitution that means the same when it is read again. All texts here are
made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefab.factory.errors import ConfigError
from prefab.factory.spec import yamlio
from prefab.factory.spec.constitution import load_constitution
from prefab.factory.spec.constitution_imports import LAYOUTS, import_constitution

PAPER = {
    "tea": {
        "prompt": ["\n\nCritiqueRequest: Say where the reply is rude about tea.\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Please be polite about tea.\n\nRevision:",
    },
    "Milk & sugar": {
        "prompt": [
            "\n\nCritiqueRequest: Is milk named?\n\nCritique:",
            "\n\nCritiqueRequest: Is sugar named?\n\nCritique:",
        ],
        "edit_request": "\n\nRevisionRequest: Name both: milk, sugar.\n\nRevision:",
    },
}
COMPARISONS = [
    "\nPlease choose the reply that is kinder to tea. Options:",
    "\nWhich of these is calmer? Options:",
]
FEW_SHOT = [
    "\n\nHuman: Tea or coffee?\n\nAssistant: Tea is dull.\n\nCritiqueRequest: Say where the reply is "
    "rude about tea.\n\nCritique: It calls tea dull.\n\nRevisionRequest: Please be polite about "
    "tea.\n\nRevision: Both are fine.\n\nHuman:",
    "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tea?\n\nAssistant: Gladly.\n\nCritiqueRequest: "
    "Other?\n\nCritique: Nothing is wrong.\n\nRevisionRequest: R.\n\nRevision: Gladly.\n\nHuman:",
]
PAIRS = [
    {
        "prompt": "\n\nHuman: Tea?\n\nAssistant:",
        "corrects": ["Yes, please."],
        "incorrects": ["No!"],
    },
    {"prompt": "\n\nHuman: Milk?\n\nAssistant:", "corrects": ["A drop."], "incorrects": ["Ugh."]},
]
SWARM = {
    "constitutions": [{"critic": "Is it sour?", "revision": "Make it sweet."}],
    "system_chat": [
        [
            {"role": "user", "content": "Lemon?"},
            {"role": "assistant", "content": "Sour!"},
            {"role": "user", "content": "Is it sour?"},
            {"role": "assistant", "content": "It is."},
            {"role": "user", "content": "Make it sweet."},
            {"role": "assistant", "content": "Sweet lemon."},
        ]
    ],
    "source": "https://example.org/swarm",
    "license": "Apache-2.0",
}
LANGCHAIN = [
    {"name": "short", "critique_request": "Is it long?", "revision_request": "Cut it."},
    {"critique_request": "Is it loud?", "revision_request": "Say it quietly."},
]
RUBRIC = [
    {"criterion": "Asks for the caller's name", "points": 5, "tags": ["axis:form", "level:item"]},
    {"criterion": "Is impatient", "points": -3, "tags": []},
    {"criterion": "Says nothing", "points": 0, "tags": []},
]
RAR = [
    {"title": "Names a dose", "description": "Essential: names the dose.", "weight": 5},
    {"title": "Panic", "description": "Pitfall: makes the reader panic.", "weight": -1},
]
BULLETS = """\
# Rules of the house

Some words about them.

- Be kind to guests,
  also to late ones.
* **No gossip**: say nothing about other guests.
1. Choose the answer that is shorter.

Not a rule.
"""


def written(folder: Path, name: str, value: Any) -> Path:
    """A file with a value as JSON, or a text."""
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def strings(value: Any) -> list[str]:
    """All texts in a value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    return (
        [text for one in inner for text in strings(one)] if isinstance(value, (list, dict)) else []
    )


@pytest.mark.parametrize(
    ("name", "value", "layout", "principles", "examples"),
    [
        ("a.json", PAPER, "paper", 3, 0),
        ("a.json", COMPARISONS, "comparisons", 2, 0),
        ("a.json", SWARM, "llm-swarm", 1, 2),
        ("a.json", SWARM["constitutions"], "llm-swarm", 1, 0),
        ("a.json", LANGCHAIN, "langchain", 2, 0),
        ("a.json", {"x": LANGCHAIN[0], "y": LANGCHAIN[1]}, "langchain", 2, 0),
        ("a.json", RUBRIC, "rubric", 2, 0),
        ("a.json", {"rubrics": RUBRIC}, "rubric", 2, 0),
        ("a.jsonl", "\n".join(map(json.dumps, RUBRIC)), "rubric", 2, 0),
        ("a.json", RAR, "rubric", 2, 0),
        ("a.md", BULLETS, "bullets", 3, 0),
        ("a.yaml", "- critic: Is it sour?\n  revision: Make it sweet.\n", "llm-swarm", 1, 0),
    ],
)
def test_each_layout_is_read_and_read_back(tmp_path, name, value, layout, principles, examples):
    path = written(tmp_path, name, value)
    found = import_constitution([path], licence="MIT")
    assert list(found.layouts.values()) == [layout]
    assert len(found.constitution.principles) == principles
    assert sum(map(len, found.constitution.examples.values())) == examples
    out = written(tmp_path, "out.yaml", found.text)
    again = load_constitution(out)
    assert again.principles == found.constitution.principles
    assert again.examples == found.constitution.examples and again.licence == "MIT"


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (PAPER, {("Say where the reply is rude about tea.", "Please be polite about tea."),
                 ("Is milk named?", "Name both: milk, sugar."),
                 ("Is sugar named?", "Name both: milk, sugar.")}),
        (SWARM, {("Is it sour?", "Make it sweet.")}),
        (LANGCHAIN, {("Is it long?", "Cut it."), ("Is it loud?", "Say it quietly.")}),
    ],
)  # fmt: skip
def test_critiques_and_revisions_are_kept_word_for_word(tmp_path, value, read):
    found = import_constitution([written(tmp_path, "a.json", value)])
    assert {(p.critique, p.revise) for p in found.constitution.principles} == read


def test_the_papers_files_are_read_together(tmp_path):
    values = {"f.json": FEW_SHOT, "p.json": PAPER, "c.json": COMPARISONS, "r.json": PAIRS}
    found = import_constitution([written(tmp_path, *item) for item in values.items()])
    made = found.constitution
    assert [p.id for p in made.principles] == [
        *("tea", "milk-sugar-1", "milk-sugar-2", "compare-1", "compare-2")
    ]
    assert made.principles[3].compare == "Please choose the reply that is kinder to tea."
    base = {"principle": "tea", "prompt": "Tea or coffee?", "answer": "Tea is dull."}
    fault = "Fault: It calls tea dull."
    assert [dict(row) for row in made.examples["revise"]] == [
        {**base, "critique": fault, "revision": "Both are fine."}
    ]
    assert [row["critique"] for row in made.examples["critique"]] == [fault, "None."]
    assert made.examples["critique"][1]["prompt"] == "Human: Hi\n\nAssistant: Hello.\n\nHuman: Tea?"
    assert [dict(row) for row in made.examples["pairwise"]] == [
        {"prompt": "Tea?", "a": "Yes, please.", "b": "No!", "prefer": "a"},
        {"prompt": "Milk?", "a": "Ugh.", "b": "A drop.", "prefer": "b"},
    ]


def test_rubrics_keep_their_sign_weight_and_tags(tmp_path):
    found = import_constitution([written(tmp_path, "a.json", RUBRIC)])
    asks, impatient = found.constitution.principles
    assert found.constitution.selection == "all"
    assert (asks.weight, asks.tags) == (5.0, ("axis:form", "level:item"))
    assert asks.criterion == "This statement is not true of the answer: Asks for the caller's name"
    assert impatient.weight == 3.0
    assert impatient.criterion == "This statement is true of the answer: Is impatient"
    assert "1 criteria without points were left out" in found.notes
    names, panic = import_constitution([written(tmp_path, "b.json", RAR)]).constitution.principles
    assert (names.id, names.title, panic.weight) == ("names-a-dose", "Names a dose", 1.0)


def test_a_list_of_rules(tmp_path):
    found = import_constitution([written(tmp_path, "a.md", BULLETS)])
    kind, gossip, shorter = found.constitution.principles
    assert kind.criterion == "The answer breaks this rule: Be kind to guests, also to late ones."
    assert (gossip.id, gossip.title) == ("no-gossip", "No gossip")
    assert shorter.compare == "Choose the answer that is shorter."


def test_source_commit_and_licence_are_kept(tmp_path):
    path = written(tmp_path, "a.json", SWARM)
    stated = load_constitution(written(tmp_path, "b.yaml", import_constitution([path]).text))
    assert stated.licence == "Apache-2.0"
    assert stated.origin == {"source": "https://example.org/swarm"}
    given = import_constitution([path], "house", "House", "CC-BY-4.0", "https://x.org", "abc123")
    made = given.constitution
    assert (made.id, made.title, made.licence) == ("house", "House", "CC-BY-4.0")
    assert made.origin == {"source": "https://x.org", "commit": "abc123"}
    unknown = import_constitution([written(tmp_path, "c.json", LANGCHAIN)])
    assert unknown.constitution.licence == "LicenseRef-unknown"
    assert any("the licence is not known" in note for note in unknown.notes)


def test_texts_that_yaml_could_misread_and_other_scripts(tmp_path):
    texts = ["no", "1:30", "a: b # c", "- x", "“Sei höflich.”", "请礼貌。", "👍 ok", "two\nlines"]
    rows = [{"critique_request": text, "revision_request": text, "name": text} for text in texts]
    found = import_constitution([written(tmp_path, "a.json", rows)])
    again = load_constitution(written(tmp_path, "out.yaml", found.text))
    assert [p.critique for p in again.principles] == texts
    assert len({p.id for p in again.principles}) == len(texts)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("a.json", [{"x": 1, "y": 2}], "a list of 1 mappings with the fields x, y"),
        ("a.json", {"rules": 3}, "a mapping with the fields rules"),
        ("a.json", [], "an empty list"),
        ("a.json", [3], "a list of 1, the first of them the number 3"),
        ("a.json", 7, "the number 7"),
        ("a.md", "No list here.\n", "a text without a list in it"),
        ("a.json", "{", "a.json:1:2: is no JSON: Expecting property name"),
        ("a.jsonl", '{"criterion": "x", "points": 1}\n{', "a.jsonl:2:2: is no JSON"),
        ("a.json", [{"prompt": "p", "rubrics": RUBRIC}], "holds 1 prompt with a rubric each"),
        ("a.json", {"id": "x", "principles": []}, "is a constitution of Prefab already"),
        ("a.json", [LANGCHAIN[0], {"name": "x"}], "[1].critique_request: missing"),
        ("a.json", {"constitutions": [{"critic": 3, "revision": "r"}]},
         "constitutions[0].critic: must be text, not the number 3"),
        ("a.json", [{"criterion": "c", "points": "many"}], "[0].points: must be a number"),
        ("a.json", {"constitutions": SWARM["constitutions"], "system_chat": [[]]},
         "system_chat[0]: must be question, answer"),
        ("a.json", ["\n\nCritiqueRequest: Is it?"], "[0]: a part is missing"),
        ("a.json", PAIRS, "there are only examples"),
        ("none.json", None, "no such file"),
    ],
)  # fmt: skip
def test_a_wrong_shape_is_told_in_one_line(tmp_path, name, value, expected):
    path = tmp_path / name
    if value is not None:
        written(tmp_path, name, value)
    with pytest.raises(ConfigError) as caught:
        import_constitution([path])
    said = str(caught.value)
    assert expected in said and "\n" not in said
    if "no layout" in said:
        assert all(layout.shape in said for layout in LAYOUTS)


def test_every_layout_is_tried_on_every_file_without_a_crash(tmp_path):
    for value in (PAPER, COMPARISONS, FEW_SHOT, PAIRS, SWARM, LANGCHAIN, RUBRIC, RAR, BULLETS):
        fitting = [layout.name for layout in LAYOUTS if layout.fits(value)]
        assert len(fitting) == 1, fitting
    for value in (None, 3, "", [], {}, [[]], [None], {"a": None}, [{"prompt": 1}], {"": {}}):
        assert not any(layout.fits(value) for layout in LAYOUTS)


def test_what_is_written_has_no_problem_of_its_own(tmp_path):
    found = import_constitution([written(tmp_path, "a.json", PAPER)])
    assert yamlio.parse(found.text).problems == []
