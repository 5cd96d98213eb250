"""Constitutions and the strict YAML under them: what is read, and what is said of every kind of
mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefab.factory.errors import ConfigError
from prefab.factory.spec import constitution as c
from prefab.factory.spec import yamlio

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "constitutions").glob("*.yaml"))
GOOD = """\
id: small
title: A small one
licence: CC0-1.0
principles:
  - id: kind
    title: Be kind
    compare: Which is kinder?
    critique: Name what is unkind.
    revise: Make it kind.
    criterion: It is unkind.
"""


def problems(tmp_path: Path, text: str | bytes) -> list[str]:
    """What is said of a constitution with this text, without the file's name."""
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        c.load_constitution(path)
    return [str(problem).removeprefix(f"{path}:") for problem in caught.value.problems]


def said(text: str) -> list[str]:
    """What the YAML reader says of a text."""
    return [str(problem) for problem in yamlio.parse(text, "f").problems]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_constitutions_are_valid(path):
    constitution = c.load_constitution(path)
    assert path.read_text().startswith("# yaml-language-server: $schema=constitution.schema.json")
    assert constitution.id == path.stem and constitution.licence == "CC0-1.0"
    assert (
        len(constitution.principles) >= 3
        and constitution.tests
        and constitution.source == path.read_text()
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_constitutions_have_tests_of_both_outcomes(path):
    tests = c.load_constitution(path).tests
    assert len(tests) >= 4 and {"a", "b"} <= {test["prefer"] for test in tests}
    assert all(test["principle"] for test in tests)


def test_three_real_constitutions_are_shipped():
    assert {"harmless", "hhh", "front-desk"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_constitutions_satisfy_the_schema_that_editors_use(path):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(yamlio.load_document(path).value, json.loads(c.SCHEMA_PATH.read_text()))


def test_the_committed_schema_is_current():
    current = c.schema_text(c.json_schema())
    assert c.SCHEMA_PATH.read_text() == current, (
        "run: python -m prefab.factory.spec.constitution --schema"
    )


def test_a_good_constitution_and_its_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("\ufeff" + GOOD)
    constitution = c.load_constitution(tmp_path / "c.yaml")
    principle = constitution.principles[0]
    assert (constitution.id, constitution.selection) == ("small", "sample_one")
    assert (principle.weight, principle.enabled) == (1.0, True)
    assert principle.applies_when == () and principle.formerly == () and constitution.examples == {}


def test_every_mistake_is_told_at_once(tmp_path):
    text = """\
id: Front Desk
title: 2024
licence: no
selection: sample-one
selction: all
principles:
  - id: privacy
    title: t
    compare: Which?
    critque: Name any.
    revise: Rewrite.
    criterion: It asks.
    weight: -1
    applies_when: booking
  - id: privacy
    title: t
    title: u
    compare: 1:30
    critique:
    revise: 010
    criterion: 2026-01-01
tests:
  - {prompt: x, a: y, b: z, prefer: c, principle: privcy}
examples:
  critique: [{prompt: p, answer: q}]
"""
    assert problems(tmp_path, text) == [
        '1:5 id: must be small letters and digits, joined by - or _, not "Front Desk"',
        "2:8 title: must be text, not the number 2024; put it in quotes",
        '3:10 licence: `no` would be read by YAML as false; write false, or "no" in quotes',
        "4:12 selection: must be one of sample_one, all, weighted, lexicographic, not "
        '"sample-one"; '
        'did you mean "sample_one"?',
        '5:1 selction: unknown field; did you mean "selection"?',
        "7:5 principles[0].critique: missing field; it is required",
        '10:5 principles[0].critque: unknown field; did you mean "critique"?',
        "13:13 principles[0].weight: must be greater than 0, not the number -1",
        '14:19 principles[0].applies_when: must be a mapping (key: value), not "booking"',
        '15:9 principles[1].id: the id "privacy" is already taken by principles[0]',
        '17:5 principles[1].title: duplicate key "title" (first in line 16)',
        "18:14 principles[1].compare: `1:30` would be read by YAML as a number in base 60; write "
        '"1:30" in quotes',
        "19:14 principles[1].critique: must be text, not nothing",
        '20:13 principles[1].revise: `010` would be read by YAML as an octal number; write "010" '
        "in quotes",
        "21:16 principles[1].criterion: `2026-01-01` would be read by YAML as a date; write "
        '"2026-01-01" in quotes',
        '23:37 tests[0].prefer: must be one of a, b, tie, not "c"',
        '23:51 tests[0].principle: no principle has the id "privcy"; did you mean "privacy"?',
        '25:14 examples.critique[0].critique: missing field; an example for "critique" needs it',
    ]


def test_unknown_field_without_a_near_name_lists_the_known(tmp_path):
    [problem] = problems(tmp_path, GOOD + "    zzz: 1\n")
    assert problem == (
        "11:5 principles[0].zzz: unknown field; known: applies_when, compare, criterion, critique, "
        "enabled, formerly, id, lint, revise, tags, title, weight"
    )


def test_former_ids_and_disabled_principles(tmp_path):
    second = (
        GOOD.split("principles:\n")[1].replace("id: kind", "id: warm") + "    formerly: [kind]\n"
    )
    assert problems(tmp_path, GOOD + second) == [
        '17:16 principles[1].formerly[0]: "kind" already names another principle'
    ]
    assert problems(tmp_path, GOOD + "    enabled: false\n") == [
        "5:3 principles: every principle is disabled; enable at least one"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1:1: the file is empty"),
        ("# nothing\n", "1:1: the file is empty"),
        ("- a\n", "1:1: must be a mapping (key: value), not a list"),
        ("hello\n", "1:1: must be a mapping (key: value), not text"),
        (b"id: caf\xe9\n", "1:8: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        ("id: a\n".encode("utf-16"), "1:1: not UTF-8 (byte 0xff); save the file as UTF-8"),
        ("id: a\x00b\n", "1:6: the control character U+0000 is not allowed; remove it"),
    ],
)
def test_files_that_are_no_constitution(tmp_path, text, expected):
    assert problems(tmp_path, text)[0].replace(f"{tmp_path / 'c.yaml'}", "") == expected


def test_missing_file_directory_and_near_name(tmp_path):
    (tmp_path / "harmless.yaml").write_text(GOOD)
    for path, expected in [
        (tmp_path / "harmles.yaml", f"no such file; did you mean {tmp_path / 'harmless.yaml'}?"),
        (tmp_path / "zzz", "no such file"),
        (
            tmp_path / "no" / "c.yaml",
            f"no such file; the folder {tmp_path / 'no'} does not exist either",
        ),
        (tmp_path, "is a directory; name a file in it"),
    ]:
        with pytest.raises(ConfigError) as caught:
            c.load_constitution(path)
        assert str(caught.value) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a:\n\t- b\nc: d\n\te: f\n",
            [
                "f:2:1: a tab; YAML is indented with spaces",
                "f:4:1: a tab; YAML is indented with spaces",
            ],
        ),
        (
            "a: b: c\n",
            ['f:1:5: a ": " inside unquoted text, or wrong indentation; put the text in quotes'],
        ),
        ("a: 'x\n", ["f:2:1: a quote is opened and never closed"]),
        ("a: 1\n---\nb: 1\n", ["f:2:1: a second document (---); one a file"]),
        (
            "a: &x [1]\nb: *x\n",
            ["f:1:4 b: anchors and aliases (&x, *x) are not read; write the value out"],
        ),
        (
            "a: !!python/object:os.system x\n",
            ["f:1:4 a: the tag !!python/object:os.system is not read; remove it"],
        ),
        ("<<: {a: 1}\n", ["f:1:1: merge keys (<<) are not read; write the values out"]),
        ("1: a\n", ["f:1:1: the key `1` is not text; put it in quotes"]),
        (
            "on: a\n",
            ['f:1:1: key `on` would be read by YAML as true; write true, or "on" in quotes'],
        ),
        ("a: [1, 2\nb: 3\n", ["f:2:2: a list opened with [ is not closed before this"]),
        ("a: @x\n", ["f:1:4: text that starts with @ needs quotes"]),
        (
            "a: 0x1f\n",
            [
                'f:1:4 a: `0x1f` would be read by YAML as a number in another base; write "0x1f" '
                "in quotes"
            ],
        ),
        (
            "a: .nan\n",
            [
                "f:1:4 a: `.nan` would be read by YAML as a number that is not finite; write "
                '".nan" in quotes'
            ],
        ),
        ("a: 1e999\n", ["f:1:4 a: `1e999` is too large for a number"]),
        (
            "a: 1_000\n",
            [
                "f:1:4 a: `1_000` would be read by YAML as a number without its underscores; "
                'write "1_000" in quotes'
            ],
        ),
        ("[" * 1100, ["f:1:1: nested too deeply to be read"]),
    ],
)
def test_what_strict_yaml_refuses(text, expected):
    assert said(text) == expected


def test_what_strict_yaml_reads():
    text = (
        "a: 1e-5\nb: .5\nc: 12\nd: true\ne: null\nf: 'no'\ng: y\nh: \"1:30\"\ni: "
        "Qwen/Qwen3-32B\nj: 1.2.3\nk: -0.5\n"
    )
    assert yamlio.parse(text).value == {
        "a": 1e-5,
        "b": 0.5,
        "c": 12,
        "d": True,
        "e": None,
        "f": "no",
        "g": "y",
        "h": "1:30",
        "i": "Qwen/Qwen3-32B",
        "j": "1.2.3",
        "k": -0.5,
    }


@settings(deadline=None)
@given(st.text(max_size=60) | st.text(alphabet=" :-[]{}#&*!|>'\"%@`\n\tan1", max_size=60))
def test_no_text_breaks_the_reader(text):
    document = yamlio.parse(text, "f")
    assert (
        document.problems
        or document.value is None
        or isinstance(document.value, (dict, list, str, int, float))
    )


@settings(deadline=None, max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["id", "principles", "tests", "examples", "formerly", "weight", "x"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_value_breaks_the_checks(value):
    with pytest.raises(ConfigError):
        c._validated(yamlio.Document("f", "", value), c.Inherited())


def test_the_digest_is_of_what_is_asked():
    principle = c.parse_constitution(GOOD).principles[0]
    folded = GOOD.replace("compare: Which is kinder?", "compare: >\n      Which is\n      kinder?")
    moved = folded.replace("    title: Be kind\n", "") + "    title: Be kind\n    weight: 1\n"
    same = [
        replace(principle, title="x", tags=("y",), id="z", formerly=("kind",)),
        c.parse_constitution("# a comment\n" + GOOD).principles[0],
        c.parse_constitution(moved).principles[0],
    ]
    other = [
        replace(principle, **{field: "x"})
        for field in ("compare", "critique", "revise", "criterion")
    ]
    other += [
        replace(principle, weight=2.0),
        replace(principle, enabled=False),
        replace(principle, applies_when=("x",)),
    ]
    digest = c.principle_digest(principle)
    assert (
        digest == "4db814abb7573e2c2755013f147b5c19"
    )  # golden: a change makes every stored principle look edited
    assert {c.principle_digest(p) for p in same} == {digest}
    assert len({digest, *(c.principle_digest(p) for p in other)}) == 8


def test_loading_is_light():
    """`prefab check` answers at once: pydantic and yaml, nothing more."""
    code = (
        "import sys, prefab.factory.spec.constitution as c; "
        "c.load_constitution('constitutions/hhh.yaml'); print([m for m in "
        "('torch', 'numpy', 'aiohttp', 'duckdb', 'polars', 'rich', 'jinja2') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_the_two_answers_of_a_test_differ():
    text = (c.BUNDLED / "front-desk.yaml").read_text()
    row = "\ntests:\n  - {prompt: p, a: same, b: same, prefer: a, principle: privacy}\n"
    value = yamlio.parse(text).value
    name = value["principles"][0]["id"]
    text = text.split("\ntests:")[0] + row.replace("privacy", name)
    with pytest.raises(ConfigError, match=r"tests\[0\].b: is the same text as a"):
        c.parse_constitution(text)
