"""Rows of data files of every format, plain and compressed, and of folders of them."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefab.factory.errors import ConfigError
from prefab.factory.spec import bounded, data_files, layouts, yamlio
from prefab.factory.spec.constitution import load_constitution
from prefab.pipelines.cli.project import check_paths
from prefab.pipelines.config.schema import load_pipeline

ROWS = [{"prompt": f"Question {i}?", "chosen": "a", "rejected": "b"} for i in range(3)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path):
    return [row for _, _, row in data_files.rows(path)]


def zst(path):
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(TEXT)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.jsonl", lambda path: path.write_bytes(TEXT)),
        ("x.jsonl.gz", lambda path: path.write_bytes(gzip.compress(TEXT))),
        ("x.jsonl.bz2", lambda path: path.write_bytes(bz2.compress(TEXT))),
        ("x.jsonl.zst", zst),
        ("x.json", lambda path: path.write_text(json.dumps({"data": ROWS}))),
        ("x.json.gz", lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))),
        ("x.csv", lambda path: pl.DataFrame(ROWS).write_csv(path)),
        (
            "x.csv.gz",
            lambda p: p.write_bytes(gzip.compress(pl.DataFrame(ROWS).write_csv().encode())),
        ),
        ("x.parquet", lambda path: pl.DataFrame(ROWS).write_parquet(path)),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert read(tmp_path / name) == ROWS


def test_a_folder_of_files_names_the_splits(tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(("test_prefs-00000-of-00001", "train-00000-of-00002")):
        pl.DataFrame(ROWS[i : i + 1]).write_parquet(tmp_path / f"data/{name}.parquet")
    (tmp_path / "data/more.parquet").write_bytes(
        (tmp_path / "data/train-00000-of-00002.parquet").read_bytes()
    )
    (tmp_path / "README.jsonl").write_bytes(TEXT)  # not where there is Parquet
    assert [row.get("split") for row in read(tmp_path)] == [None, "test", "train"]
    with gzip.open(tmp_path / "validation.jsonl.gz", "wb") as file:
        file.write(TEXT)
    for file in (tmp_path / "data").iterdir():
        file.unlink()
    assert [row.get("split") for row in read(tmp_path)] == [None] * 3 + ["val"] * 3


def test_a_table_holds_conversations_as_json(tmp_path):
    talk = [{"role": "user", "content": "x"}]
    texts = {"chosen": json.dumps(talk), "rejected": '[{"role": oops', "text": json.dumps(talk)}
    for name, write in (("x.csv", "write_csv"), ("x.parquet", "write_parquet")):
        getattr(pl.DataFrame([texts]), write)(tmp_path / name)
        assert read(tmp_path / name) == [{**texts, "chosen": talk}]


def test_a_damaged_file_is_told(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(TEXT)[:-12])
    with pytest.raises(ConfigError, match=r"x\.jsonl\.gz: cannot be decompressed"):
        read(tmp_path / "x.jsonl.gz")
    (tmp_path / "x.jsonl.zst").write_bytes(TEXT)
    with pytest.raises(ConfigError, match=r"x\.jsonl\.zst: cannot be decompressed"):
        read(tmp_path / "x.jsonl.zst")
    (tmp_path / "x.xlsx").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot read rows from \.xlsx; \.jsonl"):
        read(tmp_path / "x.xlsx")


ROW = '{"prompt": "x"}\n'
LONG = '{"prompt": "' + "x" * 100_000 + '"}\n'
DEEP = "[" * 100_000
REFUSED = [
    ("a.jsonl", b'{"prompt": "\\ud800"}\n', "row 1: holds half of a surrogate pair"),
    ("a.jsonl", b'{"prompt": "x", "tags": ["\\uDC00"]}\n', "row 1: holds half of a surrogate pair"),
    ("a.jsonl", b'{"\\udfff": "x"}\n', "row 1: holds half of a surrogate pair"),
    (
        "a.jsonl",
        b'{"n": ' + b"9" * 5000 + b"}\n",
        "row 1: holds a number of 5,000 digits; at most 300",
    ),
    (
        "a.jsonl",
        b'{"n": 1' + b"0" * 400 + b"}\n",
        "row 1: holds a number of 401 digits; at most 300",
    ),
    ("a.jsonl", DEEP.encode() + b"\n", "row 1: not JSON: nested too deeply"),
    ("a.jsonl", b'{"prompt": "x", "prompt": "y"}\n', "row 1: the field 'prompt' is there twice"),
    (
        "a.jsonl",
        b'{"prompt": "' + b"x" * 2_000_000 + b'"}\n',
        "row 1: the line is longer than 1 MB",
    ),
    ("a.json", b'[{"n": ' + b"9" * 5000 + b"}]", "a number of 5,000 digits"),
    ("a.json", DEEP.encode(), "nested too deeply"),
    ("a.json", b'[{"prompt": "\\ud800"}]', "half of a surrogate pair"),
    ("a.json", b" " * 6_000_000, "longer than 4 MB; write one object a line"),
    ("a.csv", b"prompt,prompt\nx,y\n", "names the column 'prompt' twice"),
    ("a.csv", "prompt\nHello?\n".encode("utf-16"), "not UTF-8; save the file as UTF-8"),
    ("a.csv", b"prompt\n" + b"x" * 2_000_000, ":2:1: a line is longer than 1 MB"),
    ("a.jsonl.gz", lambda: gzip.compress(b"x" * 40_000_000), "unpacks to more than 8 MB"),
    (
        "a.csv.gz",
        lambda: gzip.compress(b"prompt\n" + (b"x" * 100_000 + b"\n") * 500),
        "unpacks to more than 8 MB",
    ),
    ("a.jsonl.bz2", lambda: bz2.compress(LONG.encode() * 350), "unpacks to more than 8 MB"),
    ("a.jsonl.gz", gzip.compress(ROW.encode())[:-9], "cannot be decompressed"),
    ("a.jsonl.gz", b"\x1f\x8b\x08\x00" + b"\xff" * 40, "cannot be decompressed"),
    ("a.json.bz2", b"BZh9" + b"\xff" * 40, "cannot be decompressed"),
    ("a.csv.gz", b"\x1f\x8b\x08\x00" + b"\xff" * 40, "cannot be decompressed"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 40, "cannot be decompressed"),
    ("a.parquet", b"hello", "not a Parquet file"),
]


@pytest.mark.parametrize(
    ("name", "data", "says"), REFUSED, ids=[f"{n} {says[:40]}" for n, _, says in REFUSED]
)
def test_what_would_take_all_memory_or_end_in_a_traceback_is_refused(
    tmp_path, monkeypatch, name, data, says
):
    """With the limits of reading at a thirty-second."""
    monkeypatch.setenv(bounded.VARIABLE, str(1 / 32))
    file = tmp_path / name
    file.write_bytes(data() if callable(data) else data)
    if not says.startswith("row "):
        with pytest.raises(ConfigError, match=re.escape(says)):
            list(data_files.rows(file))
        return
    if name.endswith(".jsonl"):
        file.write_bytes(data + ROW.encode())
    told, *others = [value for _, _, value in data_files.rows(file)]
    assert isinstance(told, ValueError) and says.removeprefix("row 1: ") in str(told)
    assert others == [{"prompt": "x"}]


def test_a_file_that_is_no_file_is_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for file, says in ((pipe, "is a pipe"), (Path("/dev/zero"), "is a device")):
        with pytest.raises(ConfigError, match=says):
            list(data_files.rows(file, text=True))
        with pytest.raises(ConfigError, match=says):
            yamlio.read_text(file)


def test_a_limit_of_reading_can_be_raised(tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    file.write_text("a: " + "x" * 9_000_000)
    with pytest.raises(ConfigError, match=r"longer than 8 MB; PREFAB_READ_LIMITS=10"):
        yamlio.read_text(file)
    monkeypatch.setenv(bounded.VARIABLE, "2")
    assert len(yamlio.read_text(file)) == 9_000_003
    for wrong in ("many", "-1", "nan"):
        monkeypatch.setenv(bounded.VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"PREFAB_READ_LIMITS is '{wrong}': write a number"):
            yamlio.read_text(file)


@pytest.mark.slow
def test_a_table_that_names_one_long_value_again_and_again_is_refused(tmp_path, monkeypatch):
    """A few kilobytes of Parquet or Arrow that unpack to gigabytes are read in small pieces."""
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["x" * 100_000])
    table = pa.table({"prompt": values.cast(pa.large_string())})
    file = tmp_path / "a.parquet"
    pq.write_table(table, file, compression="zstd")
    assert file.stat().st_size < 100_000
    monkeypatch.setenv(bounded.VARIABLE, str(1 / 32))
    read = 0
    with pytest.raises(ConfigError, match=r"unpacks too far \(at row \d+\)"):
        for read, _, _ in data_files.rows(file):
            pass
    assert 50 < read < 200


LISTS = {
    "booleans": lambda n: pa.array(np.ones(n, dtype=bool)),
    "nulls": lambda n: pa.nulls(n),
    "numbers that are all missing": lambda n: pa.nulls(n, pa.int64()),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_row_with_a_list_of_millions_of_values_is_refused(tmp_path, monkeypatch, kind):
    """A kilobyte of Parquet, which as Python values takes 8 bytes a value and more."""
    monkeypatch.setenv(bounded.VARIABLE, str(1 / 32))
    n = 2_000_000
    values = pa.ListArray.from_arrays(pa.array([0, n], pa.int32()), LISTS[kind](n))
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["hi"], "x": values}), file, compression="zstd")
    assert file.stat().st_size < 2_000
    with pytest.raises(ConfigError, match="a column unpacks to more than 8 MB"):
        list(data_files.rows(file))


def test_a_table_nested_too_deeply_is_refused(tmp_path):
    values = pa.array(["a"])
    for _ in range(120):
        values = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), values)
    pq.write_table(pa.table({"prompt": ["hi"], "x": values}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="too deeply nested"):
        list(data_files.rows(tmp_path / "a.parquet"))


@pytest.mark.parametrize(("length", "rows"), [(100, 64), (4_000_000, 33)])
def test_the_longer_a_value_that_is_stored_once_the_fewer_rows_are_read_together(
    tmp_path, length, rows
):
    values = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), ["x" * length])
    file = tmp_path / "a.parquet"
    table = pa.table({"prompt": values})
    pq.write_table(table, file, compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert data_files._rows_at_once(file, pq.ParquetFile(file).metadata) == rows
    _, _, row = next(data_files.rows(file))
    assert row == {"prompt": "x" * length}


def test_the_first_row_of_a_large_row_group_does_not_bring_the_others(tmp_path):
    data = np.random.default_rng(0).integers(97, 123, 20_000_000, dtype=np.uint8)
    starts = np.arange(0, len(data) + 1, 200, dtype=np.int32)
    buffers = [None, pa.py_buffer(starts), pa.py_buffer(data)]
    table = pa.table({"prompt": pa.Array.from_buffers(pa.string(), len(starts) - 1, buffers)})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    assert pq.ParquetFile(tmp_path / "a.parquet").metadata.num_row_groups == 1
    before = pa.total_allocated_bytes()
    rows = data_files.rows(tmp_path / "a.parquet")
    assert len(next(rows)[2]["prompt"]) == 200
    assert pa.total_allocated_bytes() - before < 6_000_000
    rows.close()


def test_of_a_large_file_some_rows_are_read_evenly_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MOST_ROWS", 300)
    rows = [{"prompt": f"Question {i:06}?"} for i in range(1, 3001)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.csv").write_text("prompt\n" + "\n".join(row["prompt"] for row in rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet", row_group_size=700)
    (tmp_path / "folder").mkdir()
    for i in range(2):
        part = pl.DataFrame(rows[i * 1500 : i * 1500 + 1500])
        part.write_parquet(tmp_path / f"folder/train-{i}.parquet")
    places = [data_files.stride(path) for path in sorted(tmp_path.iterdir())]
    assert places == [1, 10, 1, 10, 10]  # csv, jsonl, jsonl.gz, parquet, folder
    every, plain = {}, [(i, row) for i, row in enumerate(rows, 1)]
    for path in sorted(tmp_path.iterdir()):
        assert [(n, row["prompt"]) for n, _, row in data_files.rows(path)] == [
            (n, row["prompt"]) for n, row in plain
        ]
        every[path.name] = [(n, row["prompt"]) for n, _, row in data_files.rows(path, every=10)]
    a = every["a.parquet"]
    assert a == every["a.jsonl"] == every["a.csv"] == every["a.jsonl.gz"]
    for some in (a, every["folder"]):
        assert all(row == f"Question {n:06}?" for n, row in some) and 290 <= len(some) <= 310
        gaps = {y - x for (x, _), (y, _) in pairwise(some)}
        assert len(gaps) > 1 and max(gaps) < 30  # no period of the file


BROKEN = [
    ({"dataset_dict.json": "{"}, "dataset_dict.json: not JSON"),
    ({"dataset_dict.json": "{}"}, "dataset_dict.json: has no list splits"),
    ({"dataset_dict.json": '{"splits": [1]}'}, "dataset_dict.json: splits holds what is not"),
    ({"dataset_dict.json": '{"splits": ["../x"]}'}, "dataset_dict.json: splits holds what is not"),
    ({"dataset_dict.json": '{"splits": [".."]}'}, "dataset_dict.json: splits holds what is not"),
    ({"dataset_dict.json": '{"splits": ["train"]}'}, "state.json: no such file"),
    ({"state.json": "[]"}, "state.json: has no list _data_files"),
    ({"state.json": "{}"}, "state.json: has no list _data_files"),
    ({"state.json": '{"_data_files": [{}]}'}, "state.json: _data_files holds what is not"),
    (
        {"state.json": '{"_data_files": [{"filename": "/etc/shadow"}]}'},
        "holds what is not the name",
    ),
    ({"state.json": '{"_data_files": [{"filename": "x.arrow"}]}'}, "x.arrow, which is not there"),
    (
        {"state.json": '{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow": "junk"},
        "x.arrow: cannot be read",
    ),
]


@pytest.mark.parametrize(("files", "says"), BROKEN)
def test_a_broken_folder_of_datasets_is_told(tmp_path, files, says):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        list(data_files.rows(tmp_path))


def test_an_answer_in_a_thousand_is_not_half_a_million_pairs():
    row = {"prompt": "x", "completions": [{"response": f"a{i}", "score": i} for i in range(1000)]}
    with pytest.raises(ValueError, match="has 1,000 answers to one prompt; at most 256"):
        layouts.parse(row)


SHADOW = "root:$y$secret:20228:0:99999:7:::\ndaemon:*:20228:0:99999:7:::\n"


@pytest.mark.parametrize(
    "text",
    [SHADOW, "password: yes\nzipcode: 010\n", "12:30\n", "user: &a secret\nb: *a\n", "secret\n"],
)
def test_a_file_that_was_named_by_mistake_is_not_shown(tmp_path, text):
    file = tmp_path / "shadow.yaml"
    file.write_text(text)
    for read in (load_constitution, load_pipeline, lambda path: check_paths([path])[1]):
        try:
            said = "\n".join(map(str, read(file)))
        except ConfigError as error:
            said = str(error)
        told = said.replace(str(file), "")
        assert told and not re.search(r"secret|root|daemon|password|zipcode|010|12:30|user", told)
