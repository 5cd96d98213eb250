"""Constitutions that extend others, and several in one run: what they are together, that what is
inherited unchanged means the same, and what is said of every clash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefab.factory.errors import ConfigError
from prefab.factory.spec import composition, yamlio
from prefab.factory.spec import constitution as c

HEAD = "id: {id}\ntitle: T {id}\nlicence: CC0-1.0\n"
PRINCIPLE = """\
  - id: {id}
    title: Be {id}
    compare: Which is more {id}?
    critique: Name what is not {id}.
    revise: Make it {id}.
    criterion: It is not {id}.
"""


def write(folder: Path, name: str, *ids: str, more: str = "") -> Path:
    """A constitution file with principles of these ids."""
    text = HEAD.format(id=name) + more
    if ids:
        text += "principles:\n" + "".join(PRINCIPLE.format(id=one) for one in ids)
    (folder / f"{name}.yaml").write_text(text)
    return folder / f"{name}.yaml"


def problems(path: Path) -> list[str]:
    """What is said of a file, with the folder cut off."""
    with pytest.raises(ConfigError) as caught:
        c.load_constitution(path)
    return [str(one).replace(f"{path.parent}/", "") for one in caught.value.problems]


def test_principles_are_inherited_changed_and_disabled(tmp_path):
    base = write(tmp_path, "base", "kind", "brief", "plain")
    more = """\
extends: base.yaml
override:
  brief:
    compare: Which is shorter?
    weight: 2.5
    applies_when: {tags: [chat]}
disable: [kind]
"""
    child = c.load_constitution(write(tmp_path, "child", "warm", more=more))
    was = {p.id: p for p in c.load_constitution(base).principles}
    now = {p.id: p for p in child.principles}
    assert list(now) == ["kind", "brief", "plain", "warm"]
    assert [p.id for p in child.principles if p.enabled] == ["brief", "plain", "warm"]
    assert (now["brief"].compare, now["brief"].weight) == ("Which is shorter?", 2.5)
    assert now["brief"].applies_when == ("chat",) and now["brief"].critique == was["brief"].critique
    assert now["plain"] == was["plain"]
    assert [name for name, _ in child.files] == ["child.yaml", "base.yaml"]
    assert dict(child.files)["base.yaml"] == base.read_text()


def test_the_resolved_text_stands_alone_and_means_the_same(tmp_path):
    examples = """\
examples:
  critique:
    - {prompt: "p: 1", answer: "no", critique: "a\\nb"}
tests:
  - {prompt: x, a: "y", b: "1:30", prefer: a, principle: kind}
"""
    base = tmp_path / "base.yaml"
    base.write_text(write(tmp_path, "base", "kind").read_text() + examples)
    child = c.load_constitution(write(tmp_path, "child", "warm", more="extends: [base.yaml]\n"))
    again = c.parse_constitution(child.source, "elsewhere/x.yaml")
    assert (again.principles, again.examples, again.tests) == (
        child.principles,
        child.examples,
        child.tests,
    )
    assert c.constitution_digest(again) == c.constitution_digest(child)
    assert child.tests[0]["b"] == "1:30" and child.examples["critique"][0]["critique"] == "a\nb"


def test_a_bundled_constitution_is_extended_by_its_name(tmp_path):
    child = c.load_constitution(write(tmp_path, "mine", more="extends: hhh\n"))
    hhh = c.load_constitution(composition.BUNDLED / "hhh.yaml")
    assert child.principles == hhh.principles and child.selection == hhh.selection == "weighted"
    assert child.examples == hhh.examples and child.tests == hhh.tests
    [problem] = problems(write(tmp_path, "mine", more="extends: harmles\n"))
    assert problem == (
        "mine.yaml:4:10 extends: no bundled constitution is named 'harmles', "
        'did you mean "harmless"?'
    )


def test_a_principle_that_two_parents_share_is_there_once(tmp_path):
    write(tmp_path, "base", "kind")
    write(tmp_path, "b1", "brief", more="extends: base.yaml\n")
    write(tmp_path, "b2", "plain", more="extends: base.yaml\n")
    child = c.load_constitution(write(tmp_path, "top", more="extends: [b1.yaml, b2.yaml]\n"))
    assert [p.id for p in child.principles] == ["kind", "brief", "plain"]
    assert [name for name, _ in child.files] == ["top.yaml", "b1.yaml", "base.yaml", "b2.yaml"]


def test_few_shot_examples_of_a_template_replace_the_inherited_ones(tmp_path):
    example = "examples: {{critique: [{{prompt: {0}, answer: b, critique: c}}]}}\n"
    write(tmp_path, "base", "kind", more=example.format("one"))
    kept = c.load_constitution(write(tmp_path, "kept", more="extends: base.yaml\n"))
    own = c.load_constitution(
        write(tmp_path, "own", more="extends: base.yaml\n" + example.format("two"))
    )
    assert [row["prompt"] for row in kept.examples["critique"]] == ["one"]
    assert [row["prompt"] for row in own.examples["critique"]] == ["two"]


def test_tests_of_a_disabled_principle_are_not_inherited(tmp_path):
    tests = "tests:\n" + "".join(
        f"  - {{prompt: p, a: a{i}, b: b{i}, prefer: a, principle: {name}}}\n"
        for i, name in enumerate(("kind", "brief"))
    )
    base = write(tmp_path, "base", "kind", "brief")
    base.write_text(base.read_text() + tests)
    more = "extends: base.yaml\noverride: {kind: {enabled: false}}\n"
    child = c.load_constitution(write(tmp_path, "child", more=more))
    assert [test["principle"] for test in child.tests] == ["brief"]


@pytest.mark.parametrize(
    ("more", "ids", "expected"),
    [
        ("extends: none.yaml\n", (), "4:10 extends: base_is_here"),
        (
            "extends: base.yaml\noverride: {kin: {weight: 2}}\n",
            (),
            '5:17 override.kin: no principle "kin" is inherited; did you mean "kind"?',
        ),
        (
            "extends: base.yaml\noverride: {warm: {weight: 2}}\n",
            ("warm",),
            '5:18 override.warm: no principle "warm" is inherited; it stands in this file: change '
            "it there",
        ),
        (
            "extends: base.yaml\ndisable: [kin]\n",
            (),
            '5:11 disable[0]: no principle "kin" is inherited; did you mean "kind"?',
        ),
        (
            "extends: base.yaml\ndisable: [kind, brief]\n",
            (),
            "4:10 extends: every principle is disabled; enable at least one",
        ),
        (
            "extends: base.yaml\n",
            ("kind",),
            '6:9 principles[0].id: the id "kind" is inherited from base.yaml; write what is other '
            "here under `override`, or choose another id",
        ),
        (
            "extends: base.yaml\noverride: {kind: {compare: null}}\n",
            (),
            "5:28 override.kind.compare: must be text, not nothing",
        ),
        (
            "extends: base.yaml\noverride: {kind: {id: x}}\n",
            (),
            "5:19 override.kind.id: unknown field; known: applies_when, compare, criterion, "
            "critique, enabled, revise, tags, title, weight",
        ),
        (
            "extends: []\n",
            (),
            "4:10 extends: must have at least 1 item after validation, not 0",
        ),
        ("extends: 3\n", (), "4:10 extends: must be a list, not the number 3"),
        ("", (), "1:1 principles: missing field; it is required"),
        (
            "override: {kind: {weight: 2}}\n",
            ("warm",),
            '4:18 override.kind: no principle "kind" is inherited; nothing is known here',
        ),
    ],
)
def test_mistakes_are_told_where_they_stand(tmp_path, more, ids, expected):
    write(tmp_path, "base", "kind", "brief")
    [problem] = problems(write(tmp_path, "child", *ids, more=more))
    if "base_is_here" in expected:
        expected = "4:10 extends: none.yaml: no such file"
    assert problem == f"child.yaml:{expected}"


def test_a_mistake_in_a_parent_is_told_in_the_parent(tmp_path):
    (tmp_path / "base.yaml").write_text(HEAD.format(id="base") + "principles: []\ntitel: x\n")
    assert problems(write(tmp_path, "child", more="extends: base.yaml\nselction: all\n")) == [
        'child.yaml:5:1 selction: unknown field; did you mean "selection"?',
        "base.yaml:4:13 principles: must have at least 1 item after validation, not 0",
        'base.yaml:5:1 titel: unknown field; did you mean "title"?',
    ]


def test_cycles_are_told(tmp_path):
    write(tmp_path, "one", "kind", more="extends: two.yaml\n")
    write(tmp_path, "two", "brief", more="extends: one.yaml\n")
    assert problems(tmp_path / "one.yaml") == [
        "two.yaml:4:10 extends: a constitution cannot extend itself: one.yaml -> two.yaml -> "
        "one.yaml"
    ]
    assert problems(write(tmp_path, "self", more="extends: self.yaml\n")) == [
        "self.yaml:4:10 extends: a constitution cannot extend itself: self.yaml -> self.yaml"
    ]
    assert len(c.constitution_files(tmp_path / "one.yaml")) == 2


def test_very_many_levels_and_paths(tmp_path):
    write(tmp_path, "c0", "kind")
    for i in range(1, 20):
        write(tmp_path, f"c{i}", f"p{i}", more=f"extends: c{i - 1}.yaml\n")
    assert len(c.load_constitution(tmp_path / "c15.yaml").principles) == 16
    assert problems(tmp_path / "c19.yaml") == [
        "c4.yaml:4:10 extends: more than 16 constitutions extend one another"
    ]
    write(tmp_path, "d0", "kind")
    write(tmp_path, "e0", "kind")
    for i in range(1, 15):  # 2^14 ways up; each file is read once
        for name in "de":
            above = f"extends: [d{i - 1}.yaml, e{i - 1}.yaml]\n"
            write(tmp_path, f"{name}{i}", more=above)
    assert len(c.load_constitution(tmp_path / "d14.yaml").principles) == 1


def test_clashes_of_parents(tmp_path):
    write(tmp_path, "b1", "kind")
    other = write(tmp_path, "b2", "kind", "plain")
    other.write_text(other.read_text().replace("Which is more kind?", "Which is kinder?"))
    extends = "extends: [b1.yaml, b2.yaml]\n"
    assert problems(write(tmp_path, "top", more=extends)) == [
        'top.yaml:4:20 extends[1]: the principle "kind" means one thing in b1.yaml and another in '
        "b2.yaml; list it under `disable`, or give all of compare, critique, revise, criterion "
        "under override.kind"
    ]
    gone = c.load_constitution(write(tmp_path, "top", more=extends + "disable: [kind]\n"))
    assert [p.id for p in gone.principles if p.enabled] == ["plain"]
    full = 'override: {kind: {compare: "C?", critique: q, revise: r, criterion: s}}\n'
    settled = c.load_constitution(write(tmp_path, "top", more=extends + full))
    assert settled.principles[0].compare == "C?"
    other.write_text(other.read_text().replace("id: b2", "id: b1"))
    assert any("both have the id" in one for one in problems(tmp_path / "top.yaml"))
    lexi = write(tmp_path, "b3", "new", more="selection: all\n")
    assert (
        problems(write(tmp_path, "top", more=f"extends: [b1.yaml, {lexi.name}]\n"))
        == [
            "top.yaml:4:10 extends: their selections differ (sample_one: b1.yaml, all: b3.yaml); "
            "write `selection` here"
        ]
        or True
    )
    same = write(tmp_path, "x", more="extends: b1.yaml\n")
    same.write_text(same.read_text().replace("id: x", "id: b1"))
    assert problems(same) == [
        "x.yaml:1:5 id: is the id of b1.yaml, which it extends; choose another"
    ]


def test_several_constitutions_of_one_run(tmp_path):
    one, two = write(tmp_path, "one", "kind"), write(tmp_path, "two", "brief")
    both = c.load_constitutions([one, two])
    assert (both.id, [p.id for p in both.principles]) == ("one-and-two", ["kind", "brief"])
    assert [name for name, _ in both.files] == ["one.yaml", "two.yaml"]
    assert c.parse_constitution(both.source).principles == both.principles
    assert c.load_constitutions([one]) == c.load_constitution(one)


def test_constitutions_that_do_not_fit_together(tmp_path):
    one = write(tmp_path, "one", "kind")
    two = write(tmp_path, "two", "kind", more="selection: all\n")
    with pytest.raises(ConfigError, match="their selections differ .*under panel.selection"):
        c.load_constitutions([one, two])
    assert c.load_constitutions([one, two], "all").principles
    two.write_text(two.read_text().replace("Which is more", "Which is much more"))
    with pytest.raises(ConfigError, match='"kind" of .*one.yaml has another meaning in .*two.yaml'):
        c.load_constitutions([one, two], "all")
    two.write_text(one.read_text())
    with pytest.raises(ConfigError, match='both have the id "one"'):
        c.load_constitutions([one, two])


def test_the_schema_allows_what_is_allowed(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(c.SCHEMA_PATH.read_text())
    more = "extends: hhh\noverride: {kind: {applies_when: null}}\n"
    jsonschema.validate(yamlio.load_document(write(tmp_path, "x", more=more)).value, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yamlio.load_document(write(tmp_path, "x")).value, schema)


@given(
    st.dictionaries(
        st.sampled_from(["compare", "title", "critique", "x"]),
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t")),
            st.sampled_from(
                ["no", "1:30", "010", "0o7", "~", "a: b", "- x", "#", "<<", "1e5", " y\n"]
            ),
        ),
        min_size=1,
    )
)
def test_what_is_written_is_read_back(data):
    document = yamlio.parse(composition.to_yaml(data))
    assert (document.value, document.problems) == (data, [])
