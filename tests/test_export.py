"""Exports, read back as their users do: with `datasets`, and by TRL's own trainers on a tiny random model."""
from __future__ import annotations

import json

import polars as pl
import project
import pytest

from factory.engines.scripted import Config, Scripted
from factory.errors import ConfigError
from factory.types import Completion
from pipelines import run
from pipelines.export import export


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A run of 40 prompts in all three splits, revisions among them."""
    folder = tmp_path_factory.mktemp("export")
    value = project.pipeline(folder, prompts=40, revise={"rounds": 1, "select": "sweep"})
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    rows = [{**row, "split": ["train", "train", "val", "test"][i % 4]} for i, row in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(value, engines=project.engine())
    assert result.state == "done" and result.preferences.height == 120
    return folder / "store"


def test_four_datasets_in_splits_with_probabilities_and_lineage(store, tmp_path):
    report = export(store, tmp_path / "out")
    assert report.counts == {
        "preference": {"train": 60, "validation": 30, "test": 30}, "prompts": {"train": 20, "validation": 10, "test": 10},
        "unpaired": {"train": 40, "validation": 20, "test": 20}, "sft": {"train": 60, "validation": 30, "test": 30}}
    rows = pl.read_parquet(tmp_path / "out/preference/train.parquet")
    assert {"prompt", "chosen", "rejected", "p_chosen", "preference", "prompt_id", "chosen_sample", "rejected_sample",
            "run", "split"} <= set(rows.columns)
    first = rows.row(0, named=True)
    assert first["chosen"][0]["content"].startswith("draft ") and 0.5 < first["p_chosen"] <= 1
    assert first["prompt"][0]["role"] == "user" and first["chosen"] != first["rejected"]
    unpaired = pl.read_parquet(tmp_path / "out/unpaired/train.parquet")
    assert dict(unpaired["label"].value_counts().iter_rows()) == {True: 20, False: 20}  # the middle draft is even
    assert set(pl.read_parquet(tmp_path / "out/sft/train.parquet")["revised"]) == {True}


def test_what_is_held_out_stands_in_no_train_file(store, tmp_path):
    export(store, tmp_path / "out")
    for name in ("preference", "unpaired", "prompts", "sft"):
        parts = {split: set(pl.read_parquet(tmp_path / f"out/{name}/{split}.parquet")["prompt_id"])
                 for split in ("train", "validation", "test")}
        assert not parts["train"] & (parts["test"] | parts["validation"])
        assert {int(p[1:]) % 4 for p in parts["test"]} == {3}


def test_best_worst_takes_one_pair_a_prompt(tmp_path):
    value = project.pipeline(tmp_path, prompts=10, pairs="best_worst")
    assert run(value, engines=project.engine()).preferences.height == 30
    report = export(tmp_path / "store", tmp_path / "out")
    assert sum(report.counts["preference"].values()) == 10
    rows = pl.read_parquet(tmp_path / "out/preference/train.parquet")
    assert all("draft 0" in row[0]["content"] for row in rows["chosen"])
    assert all("draft 2" in row[0]["content"] for row in rows["rejected"])


def test_answers_cut_off_are_left_out_and_counted(tmp_path):
    def cut(request):
        answer = project.answer(request)
        cut_off = project.asked(request) == "sample" and request.repeat == (0,)
        return Completion(answer.text, "length") if cut_off else answer

    result = run(project.pipeline(tmp_path, prompts=10), engines={"local": Scripted(Config(), cut)})
    assert result.truncated == 10
    left, kept = (export(tmp_path / "store", tmp_path / name, truncated=keep) for name, keep in (("a", 0), ("b", 1)))
    assert sum(left.counts["preference"].values()) == 10 and sum(kept.counts["preference"].values()) == 30
    assert any("10 answers were cut off" in note for note in left.notes)


def test_parquet_gives_the_tables(store, tmp_path):
    report = export(store, tmp_path / "out", format="parquet")
    assert report.counts["preferences"] == {"train": 120} and report.counts["verdicts"] == {"train": 480}


def test_refusals_say_what_there_is(store, tmp_path):
    with pytest.raises(ConfigError, match="trl, parquet"):
        export(store, tmp_path / "out", format="verl")
    with pytest.raises(ConfigError, match="small@1"):
        export(store, tmp_path / "out", run="smal")
    with pytest.raises(ConfigError, match="no store here"):
        export(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="no earlier export"):
        export(store, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_an_earlier_export_is_replaced(store, tmp_path):
    export(store, tmp_path / "out", format="parquet")
    export(store, tmp_path / "out")
    assert not (tmp_path / "out/verdicts").exists() and (tmp_path / "out/sft").exists()


def test_datasets_reads_it_and_trl_trains_on_it(store, tmp_path):
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    import tinymodel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    export(store, tmp_path / "out")
    data = {name: datasets.load_dataset(str(tmp_path / "out"), name, cache_dir=str(tmp_path / "cache"))
            for name in ("preference", "unpaired", "prompts", "sft")}
    assert {name: set(parts) for name, parts in data.items()} == {
        name: {"train", "validation", "test"} for name in data}
    folder = tinymodel.build(tmp_path / "model", heads=2, hidden=32, layers=1, context=256)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def causal():
        return AutoModelForCausalLM.from_pretrained(folder)

    def train(trainer, config, model, name, **more):
        args = config(output_dir=str(tmp_path / name), max_steps=2, per_device_train_batch_size=4, use_cpu=True, bf16=False,
                      report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, **more)
        made = trainer(model=model, args=args, train_dataset=data[name]["train"], processing_class=tokenizer)
        loss = made.train().training_loss
        assert loss == loss and loss > 0, name

    train(trl.SFTTrainer, trl.SFTConfig, causal(), "sft", max_length=128)
    train(trl.DPOTrainer, trl.DPOConfig, causal(), "preference", max_length=128)
    train(trl.KTOTrainer, trl.KTOConfig, causal(), "unpaired", max_length=128)
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    train(trl.RewardTrainer, trl.RewardConfig, reward, "preference", max_length=128)
