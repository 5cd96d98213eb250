"""Rows of data files of every format, plain and compressed, and of folders of them."""

from __future__ import annotations

import bz2
import gzip
import json

import polars as pl
import pyarrow
import pytest

from prefab.factory.errors import ConfigError
from prefab.factory.spec import data_files

ROWS = [{"prompt": f"Question {i}?", "chosen": "a", "rejected": "b"} for i in range(3)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def read(path):
    return [row for _, _, row in data_files.rows(path)]


def zst(path):
    with pyarrow.output_stream(str(path), compression="zstd") as file:
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
