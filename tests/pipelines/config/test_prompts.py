"""Prompts from every kind of source, and what is said of rows that are none."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from prefab.factory.errors import ConfigError
from prefab.factory.keys import prompt_id
from prefab.factory.types import Message
from prefab.pipelines.config.prompts import Prompts, parse_row, split_of
from prefab.pipelines.config.schema import PromptsConfig

ROOT = Path(__file__).resolve().parents[3]
ROWS = [
    {"id": "a", "prompt": "Hello?", "tags": ["x", "y"], "group": "g", "split": "test"},
    {"prompt": "Hello again?"},
]


def source(path: Path, **options) -> Prompts:
    """The prompts of a file."""
    return Prompts(PromptsConfig(source=str(path), **options))


def jsonl(tmp_path: Path, *lines: object) -> Path:
    """A JSONL file; text lines stand as they are."""
    path = tmp_path / "p.jsonl"
    data = [
        line
        if isinstance(line, bytes)
        else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(data) + b"\n")
    return path


def refused(path: Path, **options) -> str:
    """What is said of a source that cannot be used at all."""
    with pytest.raises(ConfigError) as caught:
        list(source(path, **options))
    return str(caught.value).replace(f"{path}", "FILE")


def as_jsonl(path):
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)))


def as_json(path):
    path.write_text(json.dumps(ROWS))


def as_csv(path):
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, ["id", "prompt", "tags", "group", "split"], delimiter=delimiter
        )
        writer.writeheader()
        writer.writerows([{**row, "tags": "; ".join(row.get("tags", []))} for row in ROWS])


def as_parquet(path):
    import polars

    polars.DataFrame(ROWS).write_parquet(path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("p.jsonl", as_jsonl),
        ("p.json", as_json),
        ("p.csv", as_csv),
        ("p.tsv", as_csv),
        ("p.parquet", as_parquet),
    ],
)
def test_every_format_gives_the_same_prompts(tmp_path, name, save):
    save(tmp_path / name)
    prompts = source(tmp_path / name)
    for _ in range(2):  # iterating again starts afresh
        first, second = prompts
        assert (first.id, first.tags, first.group, first.split) == ("a", ("x", "y"), "g", "test")
        assert first.messages == (Message("user", "Hello?"),)
        assert (second.id, second.tags, second.split) == (prompt_id(second.messages), (), None)
        assert (prompts.n_rows, prompts.n_malformed, prompts.summary()) == (2, 0, "")


def test_a_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"prompt": f"q{i}"} for i in range(5)])
    one.filter(lambda row: row["prompt"] != "q0").save_to_disk(str(tmp_path / "one"))
    assert [p.messages[0].content for p in source(tmp_path / "one")] == ["q1", "q2", "q3", "q4"]
    two = datasets.DatasetDict(
        {"train": one, "validation": one.map(lambda row: {"prompt": row["prompt"] + "?"})}
    )
    two.save_to_disk(str(tmp_path / "two"))
    assert Counter(p.split for p in source(tmp_path / "two")) == {"train": 5, "val": 5}
    assert [p.messages[0].content for p in source(tmp_path / "two", split="val", limit=1)] == [
        "q0?"
    ]


def test_the_microworld():
    prompts = list(Prompts(PromptsConfig(source="microworld", limit=5, split="test", seed=1)))
    assert (
        len(prompts) == 5
        and {p.split for p in prompts} == {"test"}
        and all(p.group for p in prompts)
    )
    with pytest.raises(ConfigError, match="prompts.limit: "):
        list(Prompts(PromptsConfig(source="microworld", limit=20_001)))


CONVERSATION = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "v"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CONVERSATION},
        {"prompt": CONVERSATION},
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "u"},
                {"from": "gpt", "value": "a"},
                {"from": "human", "value": "v"},
            ]
        },
        {
            "prompt": None,
            "messages": [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]}
                for turn in CONVERSATION
            ],
        },
    ],
)
def test_conversations(row):
    messages = parse_row(row, PromptsConfig(source="x")).messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "s"),
        ("user", "u"),
        ("assistant", "a"),
        ("user", "v"),
    ]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"system": "Be brief.", "prompt": "x"}, ["Be brief.", "x"]),
        ({"system": "", "instruction": "Name", "input": "a fish."}, ["Name\na fish."]),
        (
            {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: x\n\nAssistant: z"},
            ["x"],
        ),
        (
            {"prompt": "\n\nHuman: x\n\nAssistant:", "answers": [{"answer": "y", "rank": 1}] * 2},
            ["x"],
        ),
        ({"conversation": CONVERSATION}, ["s", "u", "a", "v"]),
        (
            {"messages": [{"role": "developer", "content": "s"}, *CONVERSATION[1:]]},
            ["s", "u", "a", "v"],
        ),
    ],
)
def test_every_part_of_the_prompt_is_kept(row, turns):
    messages = parse_row(row, PromptsConfig(source="x")).messages
    assert [m.content for m in messages] == turns
    assert (messages[0].role == "system") == (turns[0] in ("Be brief.", "s"))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {
                "messages": [
                    *CONVERSATION[:2],
                    {**CONVERSATION[2], "reasoning_content": "Hm."},
                    CONVERSATION[3],
                ]
            },
            "turn 3 has reasoning_content",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "x"},
                    {"from": "observation", "value": "y"},
                ]
            },
            "turn 2 is a tool's result, and no call stands before it",
        ),
        ({"prompt": "x", "tools": "[oops"}, "tools are no JSON"),
        (
            {
                "messages": [
                    CONVERSATION[1],
                    {"role": "assistant", "content": None},
                    CONVERSATION[3],
                ]
            },
            "null",
        ),
    ],
)
def test_what_a_prompt_cannot_hold_is_refused(row, told):
    with pytest.raises(ValueError, match=told):
        parse_row(row, PromptsConfig(source="x"))


def test_settings(tmp_path):
    path = jsonl(
        tmp_path, *[{"question": f"q{i}", "split": "dev" if i % 2 else "train"} for i in range(6)]
    )
    assert [p.messages[0].content for p in source(path, column="question", limit=2)] == ["q0", "q1"]
    prompts = source(path, column="question", split="val")
    assert [p.messages[0].content for p in prompts] == ["q1", "q3", "q5"]
    assert (prompts.n_skipped, prompts.summary()) == (3, f"{path}: 3 rows of other splits")
    assert (
        parse_row(
            {"messages": [*CONVERSATION, {"role": "assistant", "content": "b"}]},
            PromptsConfig(source="x", cut_answer=True),
        )
        .messages[-1]
        .content
        == "v"
    )


def test_rows_without_a_split_fall_where_the_ledger_puts_them(tmp_path):
    path = jsonl(tmp_path, *[f'"question {i}"' for i in range(200)])
    parts = {split: {p.id for p in source(path, split=split)} for split in ("train", "val", "test")}
    assert sum(map(len, parts.values())) == 200 and len(set.union(*parts.values())) == 200
    assert {p.id for p in source(path) if split_of(p) == "val"} == parts["val"]


def test_malformed_rows_are_told_by_number_and_counted(tmp_path):
    path = jsonl(
        tmp_path,
        {"prompt": "fine"},
        "{oops",
        "",
        b'{"prompt": "caf\xe9"}',
        {"promt": "x"},
        {"prompt": "  "},
        7,
        {"prompt": ["hi"]},
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]},
        {"prompt": "x", "split": "trian"},
        {"prompt": "x", "tags": 5},
        {"prompt": "x", "id": 1.5},
        '{"prompt": "\\ud800"}',
        {"prompt": None},
        {"id": "a", "prompt": "x"},
        {"id": "a", "prompt": "y"},
        {"id": "a", "prompt": "x"},
        {"prompt": {"text": "x"}},
        "[" * 100_000,
    )
    prompts = source(path)
    assert [p.messages[0].content for p in prompts] == ["fine", "x", "x"]
    assert (prompts.n_rows, prompts.n_malformed) == (23, 20)
    assert [str(problem).removeprefix(f"{path}:") for problem in prompts.problems] == [
        "2:1 row 2: not JSON: Expecting property name enclosed in double quotes at column 2",
        "4:1 row 3: not UTF-8 (byte 0xe9 at column 16)",
        "5:1 row 4: has no prompt or question or instruction or query or messages or conversations or conversation; "
        "its fields are: promt",
        "6:1 row 5: the prompt is empty",
        "7:1 row 6: is the number 7; must be text or an object",
        '8:1 row 7: turn 1 is "hi"; must have role and content',
        "9:1 row 8: the conversation has no turns",
        "10:1 row 9: turn 1 is a tool's result, and no call stands before it",
        "11:1 row 10: turn 1 has the number 3 as content; must be text",
        "12:1 row 11: ends with the assistant's turn; a prompt ends with the user's "
        "(prompts.cut_answer: true)",
        "13:1 row 12: has no user turn",
        "14:1 row 13: turn 2 is a system message; only the first turn may be",
        '15:1 row 14: split is "trian"; must be train, val or test',
        "16:1 row 15: tags are the number 5; must be a list of texts",
        "17:1 row 16: id is the number 1.5; must be text",
        "18:1 row 17: holds half of a surrogate pair, which is not valid Unicode",
        "19:1 row 18: prompt is empty",
        '21:1 row 20: the id "a" already names another prompt',
        "23:1 row 22: the prompt is a mapping; must be text or a list of turns",
        "24:1 row 23: not JSON: nested too deeply",
    ]
    assert prompts.summary() == f"{path}: 20 of 23 rows malformed"


def test_malformed_csv_rows(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(
        b'prompt,tags\nfine,x\nWhat, then?,y,z\ncaf\xe9,\n"two\nlines",x;y\n\n"bad"quote,x\nlast,\n'
    )
    prompts = source(path)
    assert [p.messages[0].content for p in prompts] == ["fine", "two\nlines", "last"]
    assert [str(problem).removeprefix(f"{path}:") for problem in prompts.problems] == [
        "3:1 row 2: has 2 fields more than the header; put text that holds a comma in quotes",
        "4:1 row 3: not UTF-8",
        "8:1 row 5: not CSV: ',' expected after '\"'",
    ]


@pytest.mark.parametrize(
    ("name", "text", "options", "expected"),
    [
        ("p.jsonl", "", {}, 'FILE: holds no prompts; write one a line, such as {"prompt": "..."}'),
        (
            "p.jsonl",
            "\n\n",
            {},
            'FILE: holds no prompts; write one a line, such as {"prompt": "..."}',
        ),
        ("p.json", "[]", {}, 'FILE: holds no prompts; write one a line, such as {"prompt": "..."}'),
        ("p.csv", "", {}, 'FILE: holds no prompts; write one a line, such as {"prompt": "..."}'),
        (
            "p.csv",
            "prompt\n",
            {},
            'FILE: holds no prompts; write one a line, such as {"prompt": "..."}',
        ),
        (
            "p.jsonl",
            "x\n",
            {},
            "FILE: no prompt could be read: 1 of 1 rows are malformed\n"
            "FILE:1:1 row 1: not JSON: Expecting value at column 1",
        ),
        (
            "p.jsonl",
            '{"prompt": "x", "split": "train"}',
            {"split": "val"},
            "FILE: none of 1 rows has the split val; add rows, or write "
            '"split": "val" in some of them',
        ),
        ("p.json", "3", {}, "FILE:1:1: must be a list of rows, not the number 3"),
        (
            "p.json",
            '{"prompt": "x"}\n{}',
            {},
            "FILE:2:1: not JSON: more than one value; one object a line is .jsonl",
        ),
        ("p.json", "[1,\n", {}, "FILE:2:1: not JSON: Expecting value"),
        (
            "p.csv",
            "text,b\nx,y\n",
            {},
            "FILE:1:1: no column prompt or question or instruction or query or messages or "
            "conversations or conversation; the columns are: text, b (prompts.column names another)",
        ),
        ("p.parquet", "nonsense, long enough", {}, "FILE: not a Parquet file: "),
        (
            "p.txt",
            "x",
            {},
            "FILE: cannot read rows from .txt; .jsonl, .ndjson, .json, .csv, .tsv, .parquet, each also "
            "with .gz, .zst, .bz2",
        ),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, name, text, options, expected):
    (tmp_path / name).write_text(text)
    assert refused(tmp_path / name, **options).startswith(expected)


def test_missing_files_and_plain_folders(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("x")
    assert (
        refused(tmp_path / "promts.jsonl")
        == f"FILE: no such file; did you mean {tmp_path / 'prompts.jsonl'}?"
    )
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty") == (
        "FILE: is a folder without data: neither one that `datasets` saved (state.json), nor with "
        ".jsonl, .ndjson, .json, .csv, .tsv, .parquet files in it"
    )


def test_a_long_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for i in range(3_000):
            file.write(json.dumps({"prompt": f"{i} " + "x" * 4000}) + "\n")
    tracemalloc.start()
    n = sum(1 for _ in source(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 3_000 and path.stat().st_size > 12_000_000 and peak < 2_000_000


def test_the_shipped_prompts():
    prompts = list(source(ROOT / "prompts" / "real-world.jsonl"))
    tags = Counter(tag for p in prompts for tag in p.tags)
    assert len(prompts) == len({p.id for p in prompts}) == len({p.messages for p in prompts}) == 200
    assert (tags["red-team"], tags["ordinary"], tags["conversation"]) == (60, 140, 20)
    assert len(tags) >= 40


def test_a_pattern_stands_for_its_files_in_order(tmp_path):
    for name, texts in {"b-train.jsonl": ["three"], "a.jsonl": ["one", "two"]}.items():
        (tmp_path / name).write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    (tmp_path / "notes.md").write_text("not data")
    found = Prompts(PromptsConfig(source="*"), tmp_path)
    assert [p.messages[0].content for p in found] == ["one", "two", "three"] and found.n_rows == 3
    with pytest.raises(ConfigError, match="no such file"):
        list(Prompts(PromptsConfig(source=str(tmp_path / "*.parquet"))))


def test_shards_at_an_address_are_copied_once(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("PREFAB_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for name, text in {"test-0.jsonl": "last", "part-0.jsonl": "first"}.items():
        memory.pipe(f"/shards/{name}", json.dumps({"prompt": text}).encode())
    prompts = Prompts(PromptsConfig(source="memory://shards/*.jsonl"))
    assert [(p.messages[0].content, p.split) for p in prompts] == [
        ("first", None),
        ("last", "test"),
    ]
    copies = sorted((tmp_path / "cache/data").rglob("*.jsonl"))
    times = [copy.stat().st_mtime_ns for copy in copies]
    assert len(copies) == 2 and len(list(prompts)) == 2
    memory.pipe("/shards/part-0.jsonl", json.dumps({"prompt": "changed"}).encode())
    assert [p.messages[0].content for p in prompts] == ["changed", "last"]
    assert [copy.stat().st_mtime_ns for copy in copies] == times  # none was written again


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("memory://nothing/*.jsonl", "no file is there"),
        ("memory://nothing/here.jsonl", "cannot be read"),
        ("nowhere://bucket/x.jsonl", "nowhere"),
        ("http://127.0.0.1:9/x.jsonl", "copy the files to this machine"),
    ],
)
def test_an_address_that_cannot_be_read_is_one_clear_line(tmp_path, monkeypatch, source, words):
    monkeypatch.setenv("PREFAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=words) as error:
        list(Prompts(PromptsConfig(source=source)))
    assert len(str(error.value).splitlines()) == 1
