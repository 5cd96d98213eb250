"""Warnings about principles: each is found where it should be, not in sound texts, and silenced in
each of the ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prefab.factory.errors import ConfigError
from prefab.factory.spec.composition import BUNDLED
from prefab.pipelines.quality.constitution_lints import (
    RULES,
    equal_ids,
    explain,
    lint_constitution,
)

SOUND = {
    "title": "t",
    "compare": "Which answer gives less help with theft?",
    "critique": "Name any help with theft.",
    "revise": "Rewrite the answer so that it gives no help with theft.",
    "criterion": "The answer helps with theft.",
}


def codes(folder: Path, *principles: dict[str, Any], text: str = "", **fields: Any) -> list[str]:
    """The warnings about principles that differ from a sound one in these fields."""
    rows = [
        {"id": f"p{i}", **SOUND, **({"compare": f"Which is more {chr(97 + i) * 6}?"} if i else {}),
         **one}
        for i, one in enumerate(principles)
    ]  # fmt: skip
    value = {"id": "c", "title": "c", "licence": "CC0-1.0", **fields, "principles": rows}
    path = folder / "c.yaml"
    path.write_text(text or yaml.safe_dump(value, sort_keys=False, width=1000))
    return [f"{lint.path} {lint.code}" for lint in lint_constitution(path)]


@pytest.mark.parametrize("path", sorted(BUNDLED.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_bundled_constitutions_have_no_warnings(path):
    assert [str(lint) for lint in lint_constitution(path)] == []


@pytest.mark.parametrize(
    ("code", "field", "text"),
    [
        ("C101", "compare", "Which answer is more helpful and more honest?"),
        ("C101", "compare", "Choose the response that is the most helpful, honest, and harmless."),
        ("C101", "compare", "Which answer is shorter, and which one is clearer?"),
        ("C101", "compare", "Is it polite? Which answer is the better one?"),
        ("C102", "compare", "Which assistant really cares about the user?"),
        ("C102", "criterion", "The assistant intended to deceive the user."),
        ("C102", "compare", "Which answer was written with the best intentions?"),
        ("C105", "compare", "Which answer is more theftuous?"),
        ("C106", "revise", "TODO"),
        ("C106", "revise", "n/a"),
        ("C106", "revise", "How could it be better?"),
        ("C106", "revise", SOUND["critique"]),
    ],
)
def test_a_faulty_text_is_found(tmp_path, code, field, text):
    fields = {field: text}
    if code == "C105":
        fields["criterion"] = "The answer is theftuous."
    assert codes(tmp_path, fields) == [f"principles[0].{field} {code}"]


@pytest.mark.parametrize(
    "text",
    [
        "Which answer is more helpful?",
        "Which answer is safe and harmless?",  # one quality in two words
        "Which answer is more polite and respectful?",
        "Which answer helps more with the question, and wastes no words on other things?",
        "Which answer says more plainly that the assistant is a program without feelings?",
        "Which answer is more careful not to promise what nobody can keep?",
        "Which answer claims less often that it really knows the person?",
        "Welche Antwort ist hilfreicher und ehrlicher?",
        "哪个回答更有帮助，更诚实？",
    ],
)
def test_a_sound_text_is_not(tmp_path, text):
    assert codes(tmp_path, {"compare": text}) == []


@pytest.mark.parametrize(
    ("compare", "criterion", "found"),
    [
        ("Which answer is more harmful?", "The answer is harmful.", True),
        ("Which answer is the most rude?", "The answer is rude to the user.", True),
        ("Which answer insults more?", "The answer insults the user.", True),
        ("Which answer is less polite?", "The answer is not polite.", True),
        ("Which answer is less polite?", "The answer is impolite.", True),
        ("Which answer is less harmful?", "The answer is harmful.", False),
        ("Which answer is more polite?", "The answer is impolite.", False),
        ("Which answer is more polite?", "The answer could be more polite.", False),
        ("Which answer is more careful?", "The answer is not careful.", False),
        ("Which answer avoids more harmful words?", "The answer has harmful words.", False),
        ("Which answer is not more harmful?", "The answer is harmful.", False),
    ],
)
def test_a_question_for_the_wrong_winner(tmp_path, compare, criterion, found):
    said = codes(tmp_path, {"compare": compare, "critique": "Name it.", "criterion": criterion})
    assert said == (["principles[0].compare C105"] if found else [])


@pytest.mark.parametrize(
    ("one", "two", "code"),
    [
        ("Which answer is longer?", "Which answer is shorter?", "C103"),
        ("Which answer is more formal?", "Which answer is less formal?", "C103"),
        ("Which answer is more formal?", "Which answer is more casual?", "C103"),
        ("Which answer is more polite?", "Which of the answers is more polite?", "C104"),
        (
            "Which answer keeps more strictly to facts of law?",
            "Choose the answer that keeps more strictly to facts of law.",
            "C104",
        ),
        ("Which answer is more polite?", "Which answer is more precise?", ""),
        ("Which answer helps more with cooking?", "Which answer helps less with crime?", ""),
        ("Which answer is better for children?", "Which answer is better for doctors?", ""),
    ],
)
def test_two_principles_beside_each_other(tmp_path, one, two, code):
    second = {"compare": two, "criterion": "Another."}
    assert codes(tmp_path, {"compare": one}, second) == (
        [f"principles[1].compare {code}"] if code else []
    )


def test_principles_that_never_meet_do_not_contradict(tmp_path):
    rows = [
        {"compare": f"Which answer is {word}?", "applies_when": {"tags": [tag]}, "criterion": word}
        for word, tag in (("longer", "essay"), ("shorter", "chat"))
    ]
    assert codes(tmp_path, *rows) == []
    assert codes(tmp_path, rows[0], rows[1] | {"enabled": False}) == []


def test_an_inherited_principle_that_is_repeated(tmp_path):
    codes(tmp_path, {"compare": "Which answer is more polite?"})
    (tmp_path / "c.yaml").rename(tmp_path / "base.yaml")
    child = {"id": "child", "title": "c", "licence": "MIT", "extends": "base.yaml"}
    own = SOUND | {"id": "own", "compare": "Which of the answers is more polite?"}
    text = yaml.safe_dump(child | {"principles": [own]})
    assert codes(tmp_path, text=text) == ["principles[0].compare C104"]
    overridden = yaml.safe_dump(child | {"override": {"p0": {"revise": "TODO"}}})
    assert codes(tmp_path, text=overridden) == ["override.p0.revise C106"]


def test_examples_that_do_not_fit_their_template(tmp_path):
    base = {"prompt": "p", "answer": "An answer."}
    fine = {**base, "critique": "Fault: it is cold.", "revision": "Another."}
    examples = {
        "critique": [
            {**base, "critique": "None."},
            {**base, "critique": "Fault: it is cold."},
            {**base, "critique": "The answer is cold."},
            {**base, "critique": "Fault: cold.", "prompt": "a\nAnswer: b"},
        ],
        "revise": [
            fine,
            {**fine, "critique": "None."},
            {**fine, "revision": "An answer."},
            {**fine, "revision": "Fault: it is cold."},
        ],
        "pairwise": [{"prompt": "p", "a": "x", "b": "x", "prefer": "a"}],
        "pairwisee": [],
    }
    assert codes(tmp_path, {}, examples=examples) == [
        "examples.critique[2].critique C107",
        "examples.critique[3].prompt C107",
        "examples.revise[1].critique C107",
        "examples.revise[2].revision C107",
        "examples.revise[3].revision C107",
        "examples.pairwise[0].b C107",
        "examples.pairwisee C107",
    ]


def test_examples_with_one_outcome(tmp_path):
    rows = [{"prompt": "p", "a": "x", "b": "y", "prefer": "a"} for _ in range(2)]
    assert codes(tmp_path, {}, examples={"pairwise": rows}) == ["examples.pairwise C108"]
    rows[0] = rows[0] | {"prefer": "b"}
    assert codes(tmp_path, {}, examples={"pairwise": rows}) == []


def test_a_warning_is_silenced_in_place(tmp_path):
    todo = {"revise": "TODO"}
    assert codes(tmp_path, {**todo, "lint": {"ignore": ["C106"]}}) == []
    assert codes(tmp_path, todo, lint={"ignore": ["C106"]}) == []
    assert codes(tmp_path, {**todo, "lint": {"ignore": ["C101"]}}) == ["principles[0].revise C106"]
    codes(tmp_path, todo)
    text = (tmp_path / "c.yaml").read_text()
    for old, new in (
        ("revise: TODO", "revise: TODO  # prefab: ignore C106"),
        ("  revise: TODO", "  # prefab: ignore C101, C106\n  revise: TODO"),
        ("- id: p0", "- id: p0  # prefab: ignore C106"),
        ("- id: p0", "# prefab: ignore C106\n- id: p0"),
    ):
        assert codes(tmp_path, text=text.replace(old, new)) == [], new
    above = text.replace("  revise: TODO", "  revise: TODO\n  # prefab: ignore C106")
    assert codes(tmp_path, text=above) == ["principles[0].revise C106"]


def test_a_code_that_does_not_exist(tmp_path):
    assert codes(tmp_path, {"lint": {"ignore": ["C999"]}}) == ["principles[0].lint.ignore[0] C110"]


def test_two_files_with_one_id(tmp_path):
    codes(tmp_path, {})
    first, second, same = (tmp_path / f"{name}.yaml" for name in ("c", "other", "same"))
    same.write_text("# a copy\n" + first.read_text())
    second.write_text(first.read_text().replace("less help", "no help"))
    [lint] = equal_ids([first, second, same])
    assert str(lint) == f'{second}:1:5 id: C109 {first} has the id "c" too'
    second.write_text("# prefab: ignore C109\n" + second.read_text())
    assert equal_ids([first, second]) == []


def test_every_code_is_explained():
    assert [rule.code for rule in explain()] == list(RULES) and len(RULES) == 10
    assert explain("c101")[0].title == "a principle asks two things at once"
    assert all(all(rule.data().values()) for rule in explain())
    with pytest.raises(ConfigError, match="no warning has the code 'C1011'; did you mean \"C101\""):
        explain("C1011")
