"""Exports, read back as their users do: with `datasets`, and by TRL's own trainers on a tiny random
model."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import polars as pl
import pytest
from datasets import load_dataset

from prefab import run
from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.errors import ConfigError, StoreError
from prefab.factory.store import datasets
from prefab.factory.types import Completion
from prefab.pipelines.store.export import files as export_files
from prefab.pipelines.store.export import parquet
from prefab.pipelines.store.export.base import export
from prefab.pipelines.store.export.files import ShardedFile
from tests.support import project
from tests.support.hub_server import hub_server


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A run of 40 prompts in all three splits, revisions among them."""
    folder = tmp_path_factory.mktemp("export")
    value = project.pipeline(folder, prompts=40, revise={"rounds": 1, "select": "sweep"})
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    rows = [
        {**row, "split": ["train", "train", "val", "test"][i % 4]} for i, row in enumerate(rows)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(value, engines=project.engine())
    assert result.state == "done" and result.preferences.height == 120
    return folder / "store"


@pytest.fixture(scope="module")
def exported(store, tmp_path_factory):
    """The folder of an export that nothing is written to, and its report."""
    out = tmp_path_factory.mktemp("exported") / "out"
    return out, export(store, out)


def test_four_datasets_in_splits_with_probabilities_and_lineage(exported):
    out, report = exported
    assert report.counts == {
        "preference": {"train": 60, "validation": 30, "test": 30},
        "prompts": {"train": 20, "validation": 10, "test": 10},
        "unpaired": {"train": 40, "validation": 20, "test": 20},
        "sft": {"train": 60, "validation": 30, "test": 30},
    }
    rows = pl.read_parquet(out / "preference/train.parquet")
    assert {
        "prompt",
        "chosen",
        "rejected",
        "p_chosen",
        "preference",
        "prompt_id",
        "chosen_sample",
        "rejected_sample",
        "run",
        "split",
    } <= set(rows.columns)
    first = rows.row(0, named=True)
    assert first["chosen"][0]["content"].startswith("draft ") and 0.5 < first["p_chosen"] <= 1
    assert first["prompt"][0]["role"] == "user" and first["chosen"] != first["rejected"]
    unpaired = pl.read_parquet(out / "unpaired/train.parquet")
    assert dict(unpaired["label"].value_counts().iter_rows()) == {
        True: 20,
        False: 20,
    }  # the middle draft is even
    assert set(pl.read_parquet(out / "sft/train.parquet")["revised"]) == {True}


def test_what_is_held_out_stands_in_no_train_file(exported):
    out, _ = exported
    for name in ("preference", "unpaired", "prompts", "sft"):
        parts = {
            split: set(pl.read_parquet(out / f"{name}/{split}.parquet")["prompt_id"])
            for split in ("train", "validation", "test")
        }
        assert not parts["train"] & (parts["test"] | parts["validation"])
        assert {int(p[1:]) % 4 for p in parts["test"]} == {3}


@pytest.mark.slow
def test_best_worst_takes_one_pair_a_prompt(tmp_path):
    value = project.pipeline(tmp_path, prompts=10, pairs="best_worst")
    assert run(value, engines=project.engine()).preferences.height == 30
    report = export(tmp_path / "store", tmp_path / "out")
    assert sum(report.counts["preference"].values()) == 10
    rows = pl.read_parquet(tmp_path / "out/preference/train.parquet")
    assert all("draft 0" in row[0]["content"] for row in rows["chosen"])
    assert all("draft 2" in row[0]["content"] for row in rows["rejected"])


@pytest.mark.slow
def test_answers_cut_off_are_left_out_and_counted(tmp_path):
    def cut(request):
        answer = project.answer(request)
        cut_off = project.asked(request) == "sample" and request.repeat == (0,)
        return Completion(answer.text, "length") if cut_off else answer

    result = run(
        project.pipeline(tmp_path, prompts=10), engines={"local": Scripted(ScriptedConfig(), cut)}
    )
    assert result.truncated == 10
    left, kept = (
        export(tmp_path / "store", tmp_path / name, truncated=keep)
        for name, keep in (("a", 0), ("b", 1))
    )
    assert (
        sum(left.counts["preference"].values()) == 10
        and sum(kept.counts["preference"].values()) == 30
    )
    assert any("10 answers cut off by length" in note for note in left.notes)


def test_parquet_gives_the_tables(store, tmp_path):
    report = export(store, tmp_path / "out", format="parquet")
    assert report.counts["preferences"] == {"train": 120} and report.counts["verdicts"] == {
        "train": 480
    }


@pytest.mark.slow
@pytest.mark.parametrize("format", ["trl", "parquet"])
def test_a_large_run_is_exported_in_parts_and_in_several_files(
    store, tmp_path, monkeypatch, format
):
    whole = export(store, tmp_path / "whole", format)
    monkeypatch.setattr(datasets, "PART_PROMPTS", 7)
    monkeypatch.setattr(parquet, "MOST_ROWS", 11)
    monkeypatch.setattr(export_files, "SHARD_BYTES", 6_000)
    parts = export(store, tmp_path / "parts", format)
    assert parts.counts == whole.counts and parts.notes == whole.notes
    assert any("*" in place for place in parts.files.values())
    for dataset, splits in whole.counts.items():
        for split in splits:
            one = pl.read_parquet(tmp_path / "whole" / dataset / f"{split}.parquet")
            some = pl.read_parquet(tmp_path / "parts" / parts.files[f"{dataset}/{split}"])
            assert one.schema == some.schema
            assert sorted(map(repr, one.rows())) == sorted(map(repr, some.rows()))
    cache = str(tmp_path / "cache")
    loaded = load_dataset(str(tmp_path / "parts"), whole.first(), cache_dir=cache)
    assert {name: len(rows) for name, rows in loaded.items()} == whole.counts[whole.first()]
    again = export(store, tmp_path / "parts", format)  # its own files are replaced
    assert again.counts == whole.counts


def test_refusals_say_what_there_is(store, tmp_path):
    with pytest.raises(ConfigError, match="parquet, text, torchtune, trl, verl"):
        export(store, tmp_path / "out", format="sharegpt")
    with pytest.raises(ConfigError, match="small@1"):
        export(store, tmp_path / "out", run="smal")
    with pytest.raises(ConfigError, match="no store here"):
        export(tmp_path / "nothing", tmp_path / "out")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def lay(folder: Path, files: dict[str, str]) -> dict[str, bytes]:
    """Write files of somebody else's."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return tree(folder)


def test_an_earlier_export_is_replaced_and_other_files_stay(store, tmp_path):
    out = tmp_path / "out"
    mine = lay(
        out,
        {
            ".git/HEAD": "ref",
            ".gitattributes": "*.parquet filter=lfs",
            "verdicts/notes.txt": "mine",
        },
    )
    export(store, out, format="parquet")
    assert (out / "scores").exists() is False and (out / "verdicts/train.parquet").exists()
    export(store, out)
    assert mine.items() <= tree(out).items() and not (out / "samples").exists()
    listed = json.loads((out / "prefab-export.json").read_text())["files"]
    assert (
        set(tree(out)) == {*mine, *listed, "prefab-export.json"} and "sft/train.parquet" in listed
    )
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            ".git",
            ".gitattributes",
            "README.md",
            "prefab-export.json",
            "preference",
            "prompts",
            "report.html",
            "sft",
            "source",
            "unpaired",
            "verdicts",
        ]
    )


@pytest.mark.slow
def test_a_file_that_no_export_wrote_is_not_overwritten(store, tmp_path):
    card = tree_of_export(store, tmp_path / "card")["README.md"].decode()
    for name, files in {
        "project": {
            "README.md": card,
            "constitution.yaml": "id: x",
            "store/ledger.sqlite": "calls",
        },
        "marked": {
            "README.md": "<!-- written by prefab export -->",
            "model.safetensors": "weights",
        },
        "data": {"sft/train.parquet": "mine"},
        "folder": {"README.md/x": "mine"},
        "file": {"sft": "mine"},
        "empty": {"prefab-export.json": "{"},
        "list": {"prefab-export.json": "[]"},
    }.items():
        before = lay(tmp_path / name, files)
        with pytest.raises(ConfigError, match="Choose another folder") as told:
            export(store, tmp_path / name)
        assert str(tmp_path / name) in str(told.value) and tree(tmp_path / name) == before
        assert not [path for path in (tmp_path / name).iterdir() if path.name.startswith(".")]
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(ConfigError, match="not a folder"):
        export(store, tmp_path / "thesis")


def tree_of_export(store: Path, out: Path) -> dict[str, bytes]:
    export(store, out)
    return tree(out)


@pytest.mark.parametrize(
    "name",
    [
        "/{other}",
        "../other/mine.txt",
        "sft/../../other/mine.txt",
        "constitution.yaml",
        ".git/HEAD",
        7,
    ],
)
def test_a_list_that_names_what_no_export_writes_is_refused(store, tmp_path, name):
    before = lay(
        tmp_path, {"other/mine.txt": "x", "out/constitution.yaml": "x", "out/.git/HEAD": "x"}
    )
    name = name.format(other=tmp_path / "other/mine.txt") if isinstance(name, str) else name
    (tmp_path / "out/prefab-export.json").write_text(json.dumps({"files": [name]}))
    with pytest.raises(ConfigError, match="prefab-export.json"):
        export(store, tmp_path / "out")
    assert before.items() <= tree(tmp_path).items()


def test_nothing_is_written_or_removed_through_a_link(store, tmp_path):
    before = lay(tmp_path / "other", {"train.parquet": "mine", "README.md": "mine"})
    for name, target in {
        "sft": tmp_path / "other",
        "README.md": tmp_path / "other/README.md",
        "old": tmp_path / "other",
        "prompts": tmp_path / "nowhere",
        "prefab-export.json": tmp_path / "list",
    }.items():
        out = tmp_path / f"out-{name}"
        lay(
            out,
            {
                "prefab-export.json": json.dumps(
                    {"files": ["old/train.parquet", "README.md", "sft/train.parquet"]}
                )
            },
        )
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(target)
        with pytest.raises(ConfigError, match="Choose another folder"):
            export(store, out)
    assert tree(tmp_path / "other") == before


def test_a_folder_in_the_store_is_refused(store, tmp_path):
    before = tree(store)
    (tmp_path / "link").symlink_to(store)
    for out in (store, store / "out", tmp_path / "link" / "out"):
        with pytest.raises(ConfigError, match="in the store"):
            export(store, out)
    assert tree(store) == before


def test_an_export_that_fails_leaves_the_earlier_one(store, tmp_path, monkeypatch):
    out, before = tmp_path / "out", tree_of_export(store, tmp_path / "out")
    write, written = ShardedFile.write, []

    def full(file: ShardedFile, rows: pl.DataFrame) -> None:
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", "a file")
        written.append(file)
        write(file, rows)

    monkeypatch.setattr(ShardedFile, "write", full)
    for again, kept in ((out, before), (tmp_path / "new", None)):
        written.clear()
        with pytest.raises(OSError, match="No space"):
            export(store, again, format="parquet")
        assert tree(again) == kept if kept else not again.exists()
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_the_folder_of_a_killed_export_is_removed_by_the_next_one(store, tmp_path):
    out = tmp_path / "out"
    export(store, out)
    dead = 2**22 + 1  # more than any process has
    for name, file in (
        (f".prefab-export-{dead}-abc", "README.md"),
        (f".prefab-export-{os.getpid()}-abc", "README.md"),
        (f".prefab-export-{dead}-mine", "thesis.tex"),
    ):
        (out / name).mkdir()
        (out / name / file).write_text("x")
    export(store, out)
    assert sorted(path.name for path in out.glob(".prefab-export-*")) == sorted(
        [f".prefab-export-{os.getpid()}-abc", f".prefab-export-{dead}-mine"]
    )


@pytest.mark.slow
def test_a_run_with_nothing_to_export_leaves_the_earlier_export(store, tmp_path):
    before = tree_of_export(store, tmp_path / "out")
    broken = {"local": Scripted(ScriptedConfig(), lambda request: Completion("cut", "length"))}
    run(
        project.pipeline(tmp_path, prompts=2, budget={"unscored": 1.0, "failed": 1.0}),
        engines=broken,
    )
    with pytest.raises(ConfigError, match="nothing to export"):
        export(tmp_path / "store", tmp_path / "out")
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("DPO", "preference"),
        pytest.param("SFT", "sft", marks=pytest.mark.slow),
        pytest.param("KTO", "unpaired", marks=pytest.mark.slow),
        pytest.param("Reward", "preference", marks=pytest.mark.slow),
    ],
)
def test_datasets_reads_it_and_trl_trains_on_it(exported, tmp_path, method, name):
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from tests.support import tinymodel

    cache = str(tmp_path / "cache")
    for one in ("prompts", name):
        data = load_dataset(str(exported[0]), one, cache_dir=cache)
        assert set(data) == {"train", "validation", "test"}
    folder = tinymodel.build(tmp_path / "model", heads=2, hidden=32, layers=1, context=256)
    if method == "Reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    args = getattr(trl, f"{method}Config")(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        max_length=128,
    )
    trainer = getattr(trl, f"{method}Trainer")(
        model=model,
        args=args,
        train_dataset=data["train"],
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    assert trainer.train().training_loss > 0  # not NaN either


@pytest.mark.slow
def test_a_pipeline_file_gives_the_defaults_of_export(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from prefab.pipelines.cli.main import app

    monkeypatch.chdir(tmp_path)
    value = project.pipeline(tmp_path, prompts=4, export={"format": "parquet", "folder": "mine"})
    run(value, engines=project.engine())
    (tmp_path / "p.yaml").write_text(json.dumps(value))
    done = CliRunner().invoke(app, ["export", "p.yaml"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "mine/verdicts/train.parquet").exists()
    done = CliRunner().invoke(app, ["export", "p.yaml", "other", "--format", "trl"])
    assert done.exit_code == 0 and (tmp_path / "other/preference/train.parquet").exists()
    value["export"] = {"per_prompt": 1, "splits": ["train"], "folder": "third"}
    (tmp_path / "p.yaml").write_text(json.dumps(value))
    dry = CliRunner().invoke(app, ["export", "p.yaml", "--dry-run"])
    assert not (tmp_path / "third").exists() and "a row of preference:" in dry.stdout
    for options, per_prompt in ([], 1), (["--per-prompt", "0"], 3):
        done = CliRunner().invoke(app, ["export", "p.yaml", *options, "--json"])
        report = json.loads(done.stdout)
        assert set(report["counts"]["preference"]) == {"train"}
        prompts = report["counts"]["prompts"]["train"]
        assert report["counts"]["preference"]["train"] == per_prompt * prompts


def test_a_format_that_nothing_writes_is_not_accepted(tmp_path):
    value = project.pipeline(tmp_path, prompts=4, export={"format": "sharegpt"})
    with pytest.raises(
        ConfigError, match='there is no export format "sharegpt"; known: argilla, axolotl'
    ):
        run(value, engines=project.engine())


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A run of 12 prompts. The chosen answer is the longer one for 8 of them, the shorter one for
    2, and as long as the rejected one for 2."""
    folder = tmp_path_factory.mktemp("uneven")

    def answer(request):
        made = project.answer(request)
        if project.asked(request) != "sample":
            return made
        prompt = int(request.messages[-1].content.split()[1].strip("?"))
        padding = [prompt, 0] if prompt < 8 else [0, prompt] if prompt < 10 else [1, 1]
        return Completion(made.text + " pad" * padding[request.repeat[0]] + " end", "stop")

    policy = {"engine": "local", "samples": 2, "temperature": 1.0, "max_tokens": 99}
    value = project.pipeline(folder, prompts=12, policy=policy)
    rows = [
        {"id": f"p{i:02}", "prompt": f"Question {i + (i == 0)}?", "split": "train"}
        for i in range(12)
    ]
    rows[0]["prompt"] = "Question 7 ?"
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(value, engines={"local": Scripted(ScriptedConfig(), answer)}).state == "done"
    return folder / "store"


@pytest.mark.slow
def test_pairs_are_balanced_in_length_without_those_that_differ_most(uneven, tmp_path):
    report = export(uneven, tmp_path / "out", balance_length=True)
    rows = pl.read_parquet(tmp_path / "out/preference/train.parquet").to_dicts()
    more = [len(row["chosen"][0]["content"]) - len(row["rejected"][0]["content"]) for row in rows]
    assert sorted(more) == [-36, -32, 0, 0, 4, 8]
    assert any("6 pairs are left out, so that the chosen" in note for note in report.notes)
    assert report.counts["unpaired"] == {"train": 24}


def test_a_cap_keeps_the_surest_pairs_of_a_prompt_and_weights_add_up(store, tmp_path):
    report = export(store, tmp_path / "all", weights="prompt", splits=["train", "val"])
    assert report.counts["preference"] == {"train": 60, "validation": 30}
    rows = pl.read_parquet(tmp_path / "all/preference/train.parquet")
    assert set(rows["weight"]) == {1 / 3}
    report = export(store, tmp_path / "one", per_prompt=1, weights="confidence")
    assert report.counts["preference"] == {"train": 20, "validation": 10, "test": 10}
    kept = pl.read_parquet(tmp_path / "one/preference/train.parquet")
    assert (
        kept["p_chosen"].to_list()
        == (
            rows.group_by("prompt_id").agg(pl.col("p_chosen").max()).sort("prompt_id")["p_chosen"]
        ).to_list()
    )
    assert kept["weight"].to_list() == [2 * p - 1 for p in kept["p_chosen"]]
    assert any("80 pairs are left out: at most 1 of each" in note for note in report.notes)
    with pytest.raises(ConfigError, match="axolotl has no pairs with a column for weights"):
        export(store, tmp_path / "out", "axolotl", weights="prompt")


@pytest.mark.slow
def test_method_margin_judges_and_principles_replace_those_of_the_run(store, tmp_path):
    report = export(store, tmp_path / "best", method="best_worst")
    assert sum(report.counts["preference"].values()) == 40
    with pytest.raises(ConfigError, match="nothing to export|within 0.49 of a half"):
        report = export(store, tmp_path / "out", margin=0.49)
        assert "preference" not in report.counts
        raise ConfigError("; ".join(report.notes))
    assert export(store, tmp_path / "kind", principles=["kind"]).counts["preference"]
    with pytest.raises(ConfigError, match="no principle 'honest' in small@1; there are: brief"):
        export(store, tmp_path / "out", principles=["honest"])
    with pytest.raises(ConfigError, match="has no davidson fit"):
        export(store, tmp_path / "out", method="davidson")
    with pytest.raises(ConfigError, match="'dev' is no split"):
        export(store, tmp_path / "out", splits=["dev"])


@pytest.mark.parametrize("format", ["trl", "argilla", "parquet"])
def test_a_dry_run_counts_as_an_export_does_and_writes_nothing(store, tmp_path, format):
    out = tmp_path / "out"
    dry = export(store, out, format, dry_run=True)
    assert not out.exists()
    done = export(store, out, format)
    assert (dry.counts, dry.notes) == (done.counts, done.notes)
    assert dry.examples == done.examples and set(dry.examples) == set(dry.counts)
    assert dry.data()["examples"] and "examples" not in done.data()


def test_records_for_argilla_show_either_answer_first_whoever_won(store, tmp_path):
    export(store, tmp_path / "out", "argilla")
    rows = json.loads((tmp_path / "out/records/train.json").read_text())
    assert len(rows) == 60 and len({row["id"] for row in rows}) == 60
    said = [row["suggestions"]["label"]["value"] for row in rows]
    assert {"a", "b"} == set(said)
    for row, label in zip(rows, said, strict=True):
        chosen, rejected = ("answer_a", "answer_b") if label == "a" else ("answer_b", "answer_a")
        assert row["fields"][chosen][:7] < row["fields"][rejected][:7]  # the lower draft wins
        assert row["fields"]["conversation"][-1]["content"] == row["fields"]["question"]


def test_an_export_is_pushed_in_one_commit_that_replaces_the_last_one(store, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from prefab.pipelines.store.export.hub import push_to_hub

    with hub_server(["preference/old.txt", "sft/train.jsonl", "README.md"]) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        with pytest.raises(ConfigError, match="no export here"):
            push_to_hub(tmp_path, "me/data")
        report = export(store, tmp_path / "out")
        (tmp_path / "out/private.txt").write_text("mine")
        push_to_hub(tmp_path / "out", "me/data")
        lines = [json.loads(line) for line in hub.commits[0].splitlines()]
        added = {line["value"]["path"] for line in lines if "ile" in line["key"]}
        gone = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
        assert gone == {"sft/train.jsonl"} and added - gone == {
            *report.files.values(),
            *("README.md", "report.html", "source/constitution.yaml", "source/pipeline.yaml"),
        }
        assert [(of["organization"], of["name"], of["visibility"]) for of in hub.created[:1]] == [
            ("me", "data", "private")
        ]
        with pytest.raises(ConfigError, match="the hub refuses me/forbidden"):
            push_to_hub(tmp_path / "out", "me/forbidden")
        with pytest.raises(ConfigError, match="not a name of a repository"):
            push_to_hub(tmp_path / "out", "a/b/c")
    with pytest.raises(StoreError, match="the hub cannot be reached"):
        push_to_hub(tmp_path / "out", "me/data")


@pytest.mark.slow
def test_a_judge_of_its_own_answers_is_named_in_every_report(store, tmp_path):
    from prefab import agreement, audit_data
    from prefab.pipelines.store.run_page import judges_of_own_answers

    export(store, tmp_path / "out")
    told = "Judge judge: the model that wrote the answers judges them itself"
    assert told in (tmp_path / "out/README.md").read_text()
    assert told in (tmp_path / "out/report.html").read_text()
    assert any(told in line for line in agreement(store, resamples=20)["limitations"])
    assert any(told in line for line in audit_data(store).notes)
    engines = {"a": {"model": "one"}, "b": {"model": "two"}, "c": {"model": "one"}}
    judges = [{"name": n, "kind": "pairwise", "engine": n} for n in "bc"]
    judges.append({"name": "people", "kind": "human", "engine": ""})
    config = {"engines": engines, "policy": {"engine": "a"}, "panel": {"judges": judges}}
    (line,) = judges_of_own_answers(config)  # c is another engine with the same model
    assert line.startswith("Judge c: ")
    config["panel"]["judges"] = judges[:1]
    assert judges_of_own_answers(config) == [] == judges_of_own_answers({})
