"""Others' preferences come into the store whole or not at all, once, with their origin, and are
trained on by weight."""

from __future__ import annotations

import gzip
import json
import sqlite3
import sys

import polars as pl
import pytest

from prefab.factory import keys
from prefab.factory.errors import ConfigError
from prefab.factory.types import Message
from prefab.pipelines.quality.why import why
from prefab.pipelines.store import imports
from prefab.pipelines.store.export.base import export
from prefab.pipelines.store.fill import fill, query, rebuild
from prefab.trainers.data import DataConfig, read_rows
from tests.support.store_rows import dump, same

HH = [
    {
        "chosen": "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: A joke?\n\nAssistant: Here is "
        "one.",
        "rejected": "\n\nHuman: Hello?\n\nAssistant: Hi.\n\nHuman: A joke?\n\nAssistant: No.",
    },
    {
        "chosen": "\n\nHuman: How are you?\n\nAssistant: Well.",
        "rejected": "\n\nHuman: How are you?\n\nAssistant: Bad.",
    },
]
ULTRA = {
    "instruction": "Name a colour.",
    "source": "x",
    "completions": [
        {"response": "Red.", "overall_score": 7.0, "fine-grained_score": 4.5, "model": "m1"},
        {"response": "Blue.", "overall_score": 9.0, "fine-grained_score": 3.0, "model": "m2"},
        {"response": "Seven.", "overall_score": 1.0, "fine-grained_score": 3.0, "model": "m3"},
    ],
}
BINARIZED = {
    "prompt": "What is up?",
    "score_chosen": 8.0,
    "score_rejected": 8.0,
    "chosen": [
        {"role": "user", "content": "What is up?"},
        {"role": "assistant", "content": "The sky."},
    ],
    "rejected": [
        {"role": "user", "content": "What is up?"},
        {"role": "assistant", "content": "Nothing."},
    ],
}
TRL = [
    {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Five."},
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Two and two?"},
        ],
        "chosen": [{"role": "assistant", "content": "4"}],
        "rejected": [{"role": "assistant", "content": "5"}],
        "p_chosen": 0.8,
    },
    {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Three."},
    {"prompt": "Two and two?", "chosen": "Four.", "rejected": "Four."},
]


def lines(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def pairs(store, run):
    return query(
        store,
        "SELECT messages, chosen, rejected, p_chosen FROM pairs WHERE name = ? ORDER BY ALL",
        [run],
    ).rows()


def test_each_shape_becomes_pairs_of_the_store(tmp_path):
    store = tmp_path / "store"
    files = [
        lines(tmp_path / "hh.jsonl", HH),
        lines(tmp_path / "trl.jsonl", TRL),
        tmp_path / "ultra.parquet",
        lines(tmp_path / "binarized.jsonl", [BINARIZED]),
    ]
    pl.DataFrame([ULTRA]).write_parquet(files[2])
    done = imports.import_files(store, files)
    assert [(r.run, r.format, r.prompts, r.pairs, r.ties, r.identical) for r in done] == [
        ("hh@1", "hh-rlhf", 2, 2, 0, 0),
        ("trl@1", "trl", 2, 3, 0, 1),
        ("ultra@1", "ultrafeedback", 1, 2, 1, 0),
        ("binarized@1", "trl", 1, 0, 1, 0),
    ]
    talk = json.dumps(
        [["user", "Hello?"], ["assistant", "Hi."], ["user", "A joke?"]], separators=(",", ":")
    )
    assert pairs(store, "hh") == [
        (talk, "Here is one.", "No.", 1.0),
        ('[["user","How are you?"]]', "Well.", "Bad.", 1.0),
    ]
    assert [row[1:] for row in pairs(store, "trl")] == [
        ("4", "5", 0.8),
        ("Four.", "Five.", 1.0),
        ("Four.", "Three.", 1.0),
    ]
    assert [row[1:] for row in pairs(store, "ultra")] == [
        ("Red.", "Blue.", 1.0),
        ("Red.", "Seven.", 1.0),
    ]  # by the mean of aspects
    assert query(store, "SELECT count(*) FROM samples WHERE text = 'Four.'").item() == 1
    before = dump(store)
    rebuild(store)
    assert same(dump(store), before)


def test_the_same_file_again_adds_nothing_and_another_is_the_next_version(tmp_path):
    store, file = tmp_path / "store", lines(tmp_path / "some.jsonl", TRL)
    imports.import_files(store, [file])
    fill(store)
    before = dump(store)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(file.read_bytes())
    for again in (file, copy):
        (report,) = imports.import_files(store, [again])
        assert (report.run, report.new) == ("some@1", False)
    fill(store)
    assert same(dump(store), before)
    (report,) = imports.import_files(
        store, [lines(file, [*TRL, {**TRL[0], "chosen": "Five.", "rejected": "Four."}])]
    )
    assert (report.run, report.new, report.pairs, report.ties) == (
        "some@2",
        True,
        2,
        1,
    )  # Four against Five: one vote each


BAD = {
    "cannot be decompressed": None,
    "not JSON": '{"prompt": "a", ',
    "its fields are: text": {"text": "a"},
    "has no prompt": {"chosen": "a", "rejected": "b"},
    "the answer of rejected is empty": {"prompt": "a", "chosen": "b", "rejected": " "},
    "p_chosen is 1.5": {"prompt": "a", "chosen": "b", "rejected": "c", "p_chosen": 1.5},
    "chosen has the lower score": {**BINARIZED, "score_chosen": 1.0},
    "part before their last turn": {"chosen": HH[0]["chosen"], "rejected": HH[1]["rejected"]},
    "ends with the turn of": {
        "prompt": "a",
        "chosen": [{"role": "user", "content": "x"}],
        "rejected": "b",
    },
    "completions need a score each": {
        **ULTRA,
        "completions": [{"response": "a"}, {"response": "b", "score": 1}],
    },
    "list of two or more": {**ULTRA, "completions": []},
    'split is "train_prefs"': {**TRL[0], "split": "train_prefs"},
    "same prompt with another group": {**TRL[0], "group": "g"},
    "surrogate": '{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}',
}


@pytest.mark.parametrize("told", BAD)
def test_a_bad_row_is_told_with_its_line_and_nothing_is_imported(
    tmp_path, told, monkeypatch, capsys
):
    from prefab.pipelines.cli.main import main

    good = lines(tmp_path / "good.jsonl", HH)
    bad = lines(
        tmp_path / ("bad.jsonl" if BAD[told] else "bad.jsonl.gz"), [TRL[0], BAD[told] or ""]
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["prefab", "import-preferences", str(good), str(bad), "--store", str(tmp_path / "store")],
    )
    with pytest.raises(SystemExit) as ended:
        main()
    err = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and told in err and "Traceback" not in err
    assert ("bad.jsonl:2:1 row 2" in err and "--skip-bad" in err) or BAD[told] is None
    assert not (tmp_path / "store").exists()
    if BAD[told]:
        (report,) = imports.import_files(tmp_path / "store", [bad], skip_bad=True)
        assert (report.skipped, report.pairs) == (1, 1)


def test_other_columns_folders_and_compressed_files_are_imported(tmp_path, monkeypatch, capsys):
    from prefab.pipelines.cli.main import main

    rows = [{"ask": f"Q{i}?", "good": "a", "bad": "b", "split": "train"} for i in range(3)]
    folder = tmp_path / "people"
    folder.mkdir()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(lines(tmp_path / "x", rows).read_bytes()))
    store = tmp_path / "store"
    names = "prompt=ask,chosen=good,rejected=bad"
    run = ["prefab", "import-preferences", str(folder), "--store", str(store), "--map", names]
    monkeypatch.setattr(sys, "argv", run)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and len(pairs(store, "people")) == 3
    monkeypatch.setattr(sys, "argv", [*run[:-1], "promt=ask"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and 'did you mean "prompt"' in capsys.readouterr().err


def test_tools_calls_and_results_come_back_as_they_were(tmp_path):
    from prefab.pipelines.store.export.base import export
    from prefab.trainers import data

    function = {"name": "find", "arguments": {"day": "Tue", "at": 1e-7}}
    call = {"type": "function", "id": "c1", "function": function}
    answer = {"role": "assistant", "content": "Let me look.", "tool_calls": [call]}
    result = {"role": "tool", "content": "[]", "tool_call_id": "c1", "name": "find"}
    asked = {"role": "user", "content": "x"}
    tool = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
    store, prompt = tmp_path / "store", [asked, answer, result]
    rows = [
        {"prompt": prompt, "chosen": [answer], "rejected": "No.", "tools": [tool]},
        {"prompt": "plain", "chosen": "<tool_call> is a tag.", "rejected": "b"},
        {"prompt": [asked], "chosen": "a", "rejected": "b"},
    ]
    rows = [{**row, "split": "train"} for row in rows]
    imports.import_files(store, [lines(tmp_path / "x.jsonl", rows)])
    fill(store)
    source = {"store": str(store), "run": "x"}
    from_store = data.read_rows("preference", data.DataConfig.model_validate({"sources": [source]}))
    export(store, tmp_path / "out", run="x")
    source = {"files": str(tmp_path / "out")}
    exported = data.read_rows("preference", data.DataConfig.model_validate({"sources": [source]}))
    kept = {**answer, "tool_calls": [{"type": "function", "function": function}]}
    for found in (from_store, exported):
        by_tools = {bool(row.get("tools")): row for row in (*found.train, *found.val)}
        row = by_tools[True]
        assert (row["prompt"], row["tools"]) == (prompt, [tool])
        assert (row["chosen"], row["rejected"]) == (kept, "No.")
    plain = {row["chosen"] for row in (*found.train, *found.val) if isinstance(row["chosen"], str)}
    assert plain == {"<tool_call> is a tag.", "a"}
    with pytest.raises(ConfigError, match="has tools"):
        data.read_rows("prompts", data.DataConfig.model_validate({"sources": [source]}))


@pytest.mark.slow
def test_answers_that_follow_different_turns_are_kept_with_them(tmp_path):
    def talk(first, last):
        said = ("Two and two?", first, "And three?", last)
        return [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant") * 2, said, strict=True)
        ]

    good, bad, same_end = talk("Four.", "Seven."), talk("Five.", "Eight."), talk("Six.", "Seven.")
    rows = [
        {"conversation_a": bad, "conversation_b": good, "winner": "model_b", "turn": 2},
        {"conversation_a": good, "conversation_b": same_end, "winner": "model_a", "turn": 2},
        {"conversation_a": good, "conversation_b": bad, "winner": "model_a", "turn": 1},
        TRL[0] | {"prompt": "Else?"},
    ]
    store, file = tmp_path / "store", lines(tmp_path / "mt.jsonl", rows)
    (report,) = imports.import_files(store, [file])
    assert (report.pairs, report.ties, report.identical) == (4, 0, 0)
    fill(store)
    before = dump(store)
    rebuild(store)
    assert same(dump(store), before)
    named = query(store, "SELECT preference FROM pairs WHERE rejected = 'Eight.'").item()
    assert ["user: And three?" in node.below[0].text for node in why(store, named).root.below[1:3]]
    trl = export(store, tmp_path / "trl", "trl", "mt")
    assert any(note.startswith("2 pairs have answers that follow") for note in trl.notes)
    read = {
        name: pl.read_parquet(tmp_path / "trl" / name / "train.parquet")
        for name in ("preference", "conversations", "unpaired")
    }
    assert sorted(row[0]["content"] for row in read["preference"]["chosen"]) == ["Four.", "Four."]
    sides = {(str(r["chosen"]), str(r["rejected"])) for r in read["conversations"].to_dicts()}
    assert sides == {(str(good), str(bad)), (str(good), str(same_end))}
    assert good[:3] in read["unpaired"]["prompt"].to_list()
    data = {"val_share": 0.5, "bad_rows": "drop"}
    for source in (
        {"store": str(store), "run": "mt"},
        {"files": str(file)},
        {"files": str(tmp_path / "trl")},
    ):
        rows_of = {
            kind: read_rows(kind, DataConfig.model_validate({**data, "sources": [source]}))
            for kind in ("reward", "preference")
        }
        whole = [
            [row["prompt"], row["chosen_context"], row["rejected_context"]]
            for row in (*rows_of["reward"].train, *rows_of["reward"].val)
            if "chosen_context" in row
        ]
        assert [good[:1], good[1:3], bad[1:3]] in whole and len(whole) == 2
        found = rows_of["preference"]
        assert len(found.train) + len(found.val) == 2
        assert any("follow" in note for note in found.notes) or source["files"].endswith("trl")


def test_reasoning_apart_from_an_answer_is_refused_not_cut(tmp_path):
    answer = {"role": "assistant", "content": "a", "reasoning_content": "Hm."}
    bad = [{"prompt": "x", "chosen": [answer], "rejected": "No."}]
    with pytest.raises(ConfigError, match="row 1: an answer has reasoning_content"):
        imports.import_files(tmp_path / "store", [lines(tmp_path / "x.jsonl", bad)])


def test_splits_are_the_stores_and_a_contradiction_imports_nothing(tmp_path):
    texts = [f"Question {i}?" for i in range(60)]
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"} for text in texts]
    grouped = [
        {"prompt": f"Other {i}?", "chosen": "a", "rejected": "b", "group": "one", "split": "test"}
        for i in range(3)
    ]
    store = tmp_path / "store"
    imports.import_files(store, [lines(tmp_path / "rows.jsonl", rows + grouped)])
    found = dict(query(store, "SELECT text, split FROM prompts").iter_rows())
    for text in texts:
        assert found[text] == keys.split_of(json.dumps([["user", text]], separators=(",", ":")))
    assert {found[f"Other {i}?"] for i in range(3)} == {"test"} and set(found.values()) == {
        "train",
        "val",
        "test",
    }
    imports.import_files(
        store,
        [
            lines(
                tmp_path / "more.jsonl",
                [{**grouped[0], "chosen": "c", "group": None, "split": None}],
            )
        ],
    )
    assert query(store, "SELECT split FROM prompts WHERE text = 'Other 0?'").unique().rows() == [
        ("test",)
    ]
    runs = sqlite3.connect(store / "ledger.sqlite").execute("SELECT count(*) FROM runs").fetchone()
    with pytest.raises(
        ConfigError, match="has the split 'train', but stands in this store as 'test'"
    ):
        imports.import_files(
            store,
            [
                lines(
                    tmp_path / "wrong.jsonl",
                    [
                        {**rows[0], "prompt": "New?"},
                        {**grouped[1], "split": "train", "group": None},
                    ],
                )
            ],
        )
    con = sqlite3.connect(store / "ledger.sqlite")
    assert con.execute("SELECT count(*) FROM runs").fetchone() == runs
    assert con.execute("SELECT count(*) FROM prompts WHERE messages LIKE '%New?%'").fetchone() == (
        0,
    )


def test_a_prompt_that_a_run_has_keeps_the_runs_split(tmp_path):
    import asyncio

    from prefab.factory.ledger.ledger import Ledger
    from prefab.factory.types import Prompt

    ledger = Ledger.open(tmp_path / "store")
    ledger.add_prompts([Prompt("mine", (Message("user", "Two and two?"),), split="test")])
    asyncio.run(ledger.close())
    imports.import_files(tmp_path / "store", [lines(tmp_path / "trl.jsonl", TRL[:1])])
    assert query(tmp_path / "store", "SELECT prompt, split FROM prompts ORDER BY 1").rows() == [
        (keys.prompt_id([Message("user", "Two and two?")]), "test"),
        ("mine", "test"),
    ]


@pytest.mark.slow
def test_training_mixes_sources_by_weight_and_an_export_says_where_they_are_from(tmp_path):
    from prefab.pipelines.store.export.base import export
    from prefab.trainers import data
    from tests.support import trained

    store = trained.make_store(tmp_path)
    rows = [{"prompt": f"Asked {i}?", "chosen": "word1", "rejected": "word2"} for i in range(30)]
    imports.import_files(store, [lines(tmp_path / "people.jsonl", rows)], by="people")
    fill(store)
    sources = [
        {"store": str(store)},
        {"store": str(store), "run": "people", "weight": 3.0},
    ]  # without a name: the run, no import
    found = data.read_rows("preference", data.DataConfig.model_validate({"sources": sources}))
    by_run = {
        run: {row["weight"] for row in found.train if row["run"] == run}
        for run in ("small@1", "people@1")
    }
    (own,), (others,) = by_run.values()
    assert others == pytest.approx(3 * own) and any(
        "people, SHA-256" in note for note in found.notes
    )
    assert all(row["split"] != "test" for row in (*found.train, *found.val))
    assert (
        len(
            data.read_rows(
                "unpaired", data.DataConfig.model_validate({"sources": sources[1:]})
            ).train
        )
        > 30
    )
    export(store, tmp_path / "out", run="people")
    card = (tmp_path / "out/README.md").read_text()
    assert (
        "imported from people.jsonl (trl, people" in card and "a model's, not people's" not in card
    )
    assert set(pl.read_parquet(tmp_path / "out/preference/train.parquet")["run"]) == {"people@1"}
    assert set(export(store, tmp_path / "own").counts) >= {"preference", "sft"}
