"""Keys: golden values, RFC 8785, and the fast path held equal to the slow one."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefab.factory import keys
from prefab.factory.types import Message, Request, Sampling

GOLDEN = Path(__file__).parents[1] / "golden" / "keys.json"
PLAIN = Request("name:m", (Message("user", "Hi"),), Sampling(16))
JUDGED = (Message("system", "You judge."), Message("user", 'A or B?\n"é" \U0001f600'))
GOLDEN_REQUESTS = {
    "plain": PLAIN,
    "sampled": replace(
        PLAIN, sampling=Sampling(128, 1.0, 0.95, 20, seed=7, stop=("\n\n",)), repeat=(3, 1)
    ),
    "label read": replace(
        PLAIN,
        messages=JUDGED,
        sampling=Sampling(1),
        labels=("A", " A", "B", " B", "T", " T"),
        template_kwargs=(("enable_thinking", False),),
    ),
}


def test_golden_keys_have_not_moved():
    golden = json.loads(GOLDEN.read_text())
    got = {name: keys.request_key(request).hex() for name, request in GOLDEN_REQUESTS.items()}
    assert got == {name: entry["key"] for name, entry in golden.items()}
    for entry in golden.values():  # the key can be computed again with nothing but SHA-256
        assert hashlib.sha256(entry["canonical"].encode()).hexdigest()[:32] == entry["key"]


@pytest.mark.parametrize(
    "number, text",
    [  # RFC 8785, appendix B, and ECMAScript's own borders
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "1"),
        (1e21, "1e+21"),
        (1e20, "100000000000000000000"),
        (1e-6, "0.000001"),
        (1e-7, "1e-7"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (4.50, "4.5"),
        (2e-3, "0.002"),
        (333333333.33333329, "333333333.3333333"),
        (9007199254740994.0, "9007199254740994"),
        (-1.5e-9, "-1.5e-9"),
        (295147905179352830000.0, "295147905179352830000"),
    ],
)
def test_numbers_are_written_as_rfc_8785_says(number, text):
    assert keys.canonical(number).decode() == text


def test_objects_are_sorted_by_utf16_and_strings_escaped_as_rfc_8785_says():
    unsorted = {
        "\u20ac": 1,
        "\r": 2,
        "\ufb33": 3,
        "1": 4,
        "\U0001f600": 5,
        "\u0080": 6,
        "\u00f6": 7,
    }
    names = list(json.loads(keys.canonical(unsorted), object_pairs_hook=lambda pairs: dict(pairs)))
    assert names == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert (
        keys.canonical("\u20ac$\x0f\nA'B\"\\\x7f/").decode()
        == '"\u20ac$\\u000f\\nA\'B\\"\\\\\x7f/"'
    )


@pytest.mark.parametrize(
    ("bad", "story"),
    [
        (float("nan"), "nan is not a JSON number"),
        (float("inf"), "inf is not a JSON number"),
        (float("-inf"), "-inf is not a JSON number"),
        ("\ud800", "surrogate"),
        (2**53, "no exact JSON number"),
        (b"bytes", "bytes is not a JSON type"),
        ({1: 2}, "must be text"),
        (object(), "object is not a JSON type"),
    ],
)
def test_what_has_no_canonical_text_is_refused(bad, story):
    with pytest.raises(ValueError, match=story):
        keys.canonical([bad])


def test_a_request_with_a_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="surrogate"):
        keys.request_key(replace(PLAIN, messages=(Message("user", "\ud800"),)))


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
SMALL = st.integers(-(2**53) + 1, 2**53 - 1)
SAMPLING = st.builds(
    Sampling,
    SMALL,
    FLOAT,
    FLOAT,
    SMALL,
    FLOAT,
    FLOAT,
    FLOAT,
    FLOAT,
    st.tuples(TEXT),
    st.none() | SMALL,
)
KWARGS = st.dictionaries(TEXT, st.booleans() | FLOAT | TEXT | SMALL, max_size=3)
REQUEST = st.builds(
    Request,
    TEXT,
    st.lists(st.builds(Message, TEXT, TEXT), max_size=4).map(tuple),
    SAMPLING,
    st.lists(TEXT, max_size=4).map(tuple),
    KWARGS.map(lambda d: tuple(d.items())),
    st.lists(SMALL, max_size=3).map(tuple),
)


@given(REQUEST)
def test_the_fast_path_equals_the_slow_path(request):
    assert keys.request_bytes(request) == keys.canonical(keys.request_object(request))


def test_one_and_one_point_zero_are_one_question_but_true_and_one_are_two():
    assert keys.request_key(
        replace(PLAIN, sampling=Sampling(16, temperature=1))
    ) == keys.request_key(replace(PLAIN, sampling=Sampling(16, temperature=1.0)))
    assert keys.request_key(replace(PLAIN, template_kwargs=(("x", 1),))) != keys.request_key(
        replace(PLAIN, template_kwargs=(("x", True),))
    )


@pytest.mark.parametrize(
    "change",
    [
        {"model": "name:n"},
        {"messages": (Message("user", "Hi!"),)},
        {"messages": (Message("system", "Hi"),)},
        {"labels": ("A",)},
        {"repeat": (0,)},
        {"template_kwargs": (("enable_thinking", False),)},
        {"sampling": Sampling(17)},
        {"sampling": Sampling(16, seed=0)},
        {"sampling": Sampling(16, stop=("x",))},
    ],
)
def test_everything_that_decides_an_answer_moves_the_key(change):
    assert keys.request_key(replace(PLAIN, **change)) != keys.request_key(PLAIN)


def test_ids_do_not_run_into_each_other_and_seeds_fit():
    assert keys.digest("ab", "c") != keys.digest("a", "bc")
    assert keys.digest("a", 1) != keys.digest("a", "1") and len(keys.digest("a")) == 32
    assert keys.prompt_id((Message("user", "a"),)) != keys.prompt_id((Message("system", "a"),))
    assert keys.derived_seed(b"\xff" * 16) == 2**31 - 1


def test_ids_have_not_moved():
    lines = (("clear", 1.0), ("short", 0.5))
    assert keys.digest("a", "b") == "0473ef2dc0d324ab659d3580c1134e9d"
    assert keys.digest("rubric", [*map(list, lines)]) == "7007de56bd0303b9a465d4db1bed9d8e"
    assert keys.rubric_id(lines) == "7007de56bd0303b9"


def test_splits_have_the_stated_proportions():
    splits = [keys.split_of(f"group {i}") for i in range(4000)]
    assert (
        abs(splits.count("train") / 4000 - 0.9) < 0.02
        and abs(splits.count("test") / 4000 - 0.05) < 0.015
    )
    place = int(keys.digest("split", "x")[:13], 16) / 16**13  # each split ends before its bound
    assert keys.split_of("x", (place, 1 - place, 0.0)) == "val"
    assert keys.split_of("x", (0.0, place, 1 - place)) == "test"


def test_a_folders_identity_follows_what_decides_its_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFAB_CACHE", str(tmp_path / "new" / "cache"))
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "model.safetensors").write_bytes(b"w" * (2 << 20))
        (tmp_path / place / "config.json").write_text("{}")
    first, second = str(tmp_path / "one"), str(tmp_path / "two")
    assert keys.model_identity(first) == keys.model_identity(second)
    assert keys.model_identity(first) != keys.model_identity(first, dtype="float32")
    (tmp_path / "two" / "README.md").write_text("not the model")
    (tmp_path / "two" / "training.json").write_text('{"seconds": 7.2}')
    assert keys.model_identity(first) == keys.model_identity(second)
    (tmp_path / "two" / "chat_template.jinja").write_text("x")
    assert keys.model_identity(first) != keys.model_identity(second)
    cached = json.loads((tmp_path / "new" / "cache" / "digests.json").read_text())
    assert len(cached) == 2 and all("model.safetensors" in place for place in cached)


def test_the_working_directory_is_no_part_of_a_folders_identity(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFAB_CACHE", str(tmp_path / "cache"))
    for place in ("model", "clean", "full"):
        (tmp_path / place).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "full" / "notes.json").write_text("{}")
    (tmp_path / "full" / "tool.py").write_text("x = 1")
    found = set()
    for place in ("clean", "full"):
        monkeypatch.chdir(tmp_path / place)
        found.add(keys.model_identity(str(tmp_path / "model")))
    assert len(found) == 1
    parts = ["", keys._folder_files(tmp_path / "model"), []]  # as always, in a folder without such
    assert found == {"folder:" + keys.digest(*map(keys._text, parts))}


def test_a_hub_snapshot_is_known_by_its_blob_names(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_text("{}")
    for name in ("a", "b"):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
        os.symlink("../../blobs/abc", tmp_path / "snapshots" / name / "config.json")
    one, other = (keys.model_identity(str(tmp_path / "snapshots" / name)) for name in ("a", "b"))
    assert one == other and one.startswith("folder:")
    (tmp_path / "blobs" / "abd").write_text("{}")
    (tmp_path / "plain").mkdir()
    found = []
    for name, file in (("c", "blobs/abd"), ("d", "plain/abc"), ("e", "plain/abd")):
        (tmp_path / file).write_text("{}")
        (tmp_path / "snapshots" / name).mkdir()
        os.symlink(tmp_path / file, tmp_path / "snapshots" / name / "config.json")
        found.append(keys.model_identity(str(tmp_path / "snapshots" / name)))
    assert one != found[0] and found[1] == found[2]  # the last two by what the files hold
    assert keys.model_identity("Qwen/Qwen3-32B", revision="r1") != keys.model_identity(
        "Qwen/Qwen3-32B"
    )
