"""`prefab check` of data files: what each column is taken for, and the first row as a trainer sees
it."""

from __future__ import annotations

import gzip
import json

import pytest
from typer.testing import CliRunner

from prefab.factory.errors import ConfigError
from prefab.factory.spec import data_files
from prefab.pipelines.cli.data_check import read_report
from prefab.pipelines.cli.main import app


def check(*args, code=0):
    done = CliRunner().invoke(app, ["check", *map(str, args)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ORCA = {"system": "Be terse.", "question": "Name a fish.", "chosen": "Cod.", "rejected": "Oak."}


def test_each_column_is_told(tmp_path):
    file = write(tmp_path / "x.jsonl", [{**ORCA, "source": "mine"}] * 2)
    found = json.loads(check(file, "--json"))["files"][0]
    assert (found["rows"], found["by_layout"], found["by_kind"]) == (2, {"trl": 2}, {"pairs": 2})
    assert found["columns"] == {
        "system": "the system turn",
        "question": "the prompt",
        "chosen": "the better answer",
        "rejected": "the worse answer",
        "source": "not read",
    }
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert "layout trl" in check(tmp_path / "x.jsonl.gz")


def test_columns_are_mapped_and_the_first_row_is_shown_with_its_tokens(tmp_path):
    file = write(tmp_path / "x.jsonl", [{"ask": "Name a fish.", "good": "Cod.", "bad": "Oak."}])
    names = ["--map", "prompt=ask", "--map", "chosen=good,rejected=bad"]
    out = check(file, *names, "--show")
    assert "--- prompt" in out and "Name a fish." in out and "--- chosen" in out
    shown = json.loads(check(file, *names, "--show", "--json"))["files"][0]["shown"]
    assert shown.keys() == {"prompt", "chosen", "rejected"}
    from prefab.trainers.common import load_tokenizer

    own = load_tokenizer("prefab-tiny")
    asked = [{"role": "user", "content": "Name a fish."}]
    assert shown["prompt"] == own.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert shown["chosen"] == f"Cod.{own.eos_token}"
    talk = write(
        tmp_path / "talk.jsonl", [{"messages": [*asked, {"role": "assistant", "content": "Cod."}]}]
    )
    shown = json.loads(check(talk, "--show", "--json"))["files"][0]["shown"]
    assert shown["learnt"] == f"Cod.{own.eos_token}" and shown["text"].endswith(shown["learnt"])


def test_rows_that_cannot_be_kept_are_told_with_their_line(tmp_path):
    bad = [ORCA, {**ORCA, "rejected": ""}, {"text": "x"}]
    file = write(tmp_path / "x.jsonl", bad)
    with pytest.raises(ConfigError) as caught:
        check(file)
    told = str(caught.value)
    assert "x.jsonl:2:1 row 2: the answer of rejected is empty" in told and "row 3" in told
    found = json.loads(check(file, "--json", code=2))
    assert found["files"][0]["bad"] == 2 and len(found["problems"]) == 2


def test_prompts_are_checked_as_prompts(tmp_path):
    file = write(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}])
    with pytest.raises(ConfigError, match="already names another prompt"):
        check(file)


def test_of_a_large_file_some_rows_are_checked_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MOST_ROWS", 50)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"prompt": "q {i:03}"}}\n' for i in range(200)))
    report = read_report(tmp_path / "a.jsonl")
    assert report.read_one_in == 4 and 45 <= report.rows <= 55 and not report.problems
    assert "one row in 4" in " ".join(check(tmp_path / "a.jsonl").split())
