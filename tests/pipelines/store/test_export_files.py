"""The files of an export, without a store: what is written, replaced, removed and refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import polars as pl
import pytest

from prefab.factory.errors import ConfigError
from prefab.pipelines.store.export import files
from prefab.pipelines.store.export.files import MANIFEST, LinesFile, ShardedFile, replacing

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
DEAD = 2**22 + 1  # more than any process has


def content(folder: Path) -> dict[str, str]:
    """The text of each file by its path in the folder."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if not p.is_dir()}


def replace_by(out: Path, **texts: str) -> None:
    """An export of these files to `out`; `__` in a name stands for a folder."""
    with replacing(out, ["README.md"]) as stage:
        for name, text in texts.items():
            path = stage / (name.replace("__", "/") + (".jsonl" if "__" in name else ".md"))
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


def test_parts_are_one_file_until_it_is_long_enough(tmp_path, monkeypatch):
    for most, names in (
        (files.SHARD_BYTES, ["train.parquet"]),
        (10, [f"train-{i:05}-of-00003.parquet" for i in range(3)]),
    ):
        monkeypatch.setattr(files, "SHARD_BYTES", most)
        folder = tmp_path / str(most)
        folder.mkdir()
        file = ShardedFile(folder / "sft" / "train")
        for part in range(3):
            file.write(pl.DataFrame({"part": [part, part]}))
        file.close()
        pattern = file.finish()
        assert sorted(p.name for p in (folder / "sft").iterdir()) == names and file.rows == 6
        assert pattern == f"sft/{names[0] if len(names) == 1 else 'train-*.parquet'}"
        assert pl.read_parquet(folder / pattern)["part"].to_list() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "suffix, expected",
    [
        ("jsonl", '{"a":1,"b":"x"}\n{"a":2,"b":"y"}\n{"a":1,"b":"x"}\n{"a":2,"b":"y"}\n'),
        ("csv", "a,b\n1,x\n2,y\n1,x\n2,y\n"),
        (
            "json",
            '[\n{"a":1,"b":"x"},\n{"a":2,"b":"y"},\n{"a":1,"b":"x"},\n{"a":2,"b":"y"}\n]\n',
        ),
    ],
)
def test_lines_that_are_written_in_two_parts(tmp_path, suffix, expected):
    file = LinesFile(tmp_path / "sft" / "train", suffix)
    file.write(ROWS)
    file.write(ROWS)
    file.close()
    file.close()
    assert (tmp_path / file.finish()).read_text() == expected and file.rows == 4


def test_a_json_list_without_rows_is_one(tmp_path):
    file = LinesFile(tmp_path / "sft" / "train", "json")
    file.close()
    assert json.loads((tmp_path / "sft/train.json").read_text()) == []


def test_the_former_files_are_replaced_and_folders_that_empty_are_removed(tmp_path):
    out = tmp_path / "new" / "folder"
    replace_by(out, README="1", sft__train="1", prompts__train="1", unpaired__train="1")
    (out / "unpaired/mine.txt").write_text("mine")
    replace_by(out, README="2", sft__train="2")
    found = content(out)
    assert json.loads(found.pop(MANIFEST))["files"] == ["README.md", "sft/train.jsonl"]
    assert found == {"README.md": "2", "sft/train.jsonl": "2", "unpaired/mine.txt": "mine"}
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["sft", "unpaired"]


def test_an_error_leaves_what_was_there_and_is_the_one_that_is_told(tmp_path):
    replace_by(tmp_path / "old", README="1")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "old", tmp_path / "empty", tmp_path / "new"):
        before = content(out)
        with pytest.raises(KeyError, match="mine"), replacing(out) as stage:
            (stage / "README.md").write_text("2")
            if out.name == "empty":
                shutil.rmtree(stage)  # by somebody else
            raise KeyError("mine")
        assert content(out) == before and not list(tmp_path.glob("*/.prefab-export-*"))
    assert (tmp_path / "empty").is_dir() and not (tmp_path / "new").exists()


def test_nothing_is_written_through_a_link_or_over_what_no_export_wrote(tmp_path):
    (tmp_path / "other").mkdir()
    for name in ("link", "file", "mine", "damaged"):
        (tmp_path / name).mkdir()
    (tmp_path / "link/sft").symlink_to(tmp_path / "other")
    (tmp_path / "file/sft").write_text("mine")
    (tmp_path / "mine/README.md").write_text("mine")
    (tmp_path / "damaged" / MANIFEST).write_text('{"files": ["../other/mine.txt"]}')
    before = content(tmp_path)
    for name in ("link", "file", "mine", "damaged"):
        with pytest.raises(ConfigError, match=f"{name}.*Choose another folder"):
            replace_by(tmp_path / name, README="1", sft__train="1")
    assert content(tmp_path) == before


def test_what_a_killed_export_left_is_removed_and_nothing_else(tmp_path):
    kept = {
        f".prefab-export-{os.getpid()}-abc": "README.md",
        f".prefab-export-{DEAD}-mine": "thesis.tex",
        ".prefab-export-notes": "README.md",
    }
    gone = {
        f".prefab-export-{DEAD}-abc": MANIFEST,
        f".prefab-export-{DEAD}-def": "sft/train.jsonl",
    }
    for folder, name in (kept | gone).items():
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_text("x")
    replace_by(tmp_path, README="1")
    assert sorted(p.name for p in tmp_path.glob(".prefab-export-*")) == sorted(kept)
