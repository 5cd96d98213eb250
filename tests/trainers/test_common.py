"""Chats as tokens for templates of several kinds, models that do not fit, checkpoints that are
whole."""

from __future__ import annotations

import errno
import json
import sqlite3
from pathlib import Path

import pytest

from prefab.factory.errors import ConfigError, StoreError
from prefab.trainers import chat, common
from tests.support import tinymodel
from tests.support.tinymodel import LLAMA, TEMPLATES, THINKS

TURNS = [{"role": "user", "content": "Please tell me your name."}]


@pytest.fixture(scope="module")
def tokenizer():
    return tinymodel.build_tokenizer()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "turns", [TURNS, [*TURNS, {"role": "assistant", "content": "I am sorry."}, *TURNS]]
)
def test_answer_tokens_are_the_answer_and_one_end(tokenizer, name, turns):
    tokenizer.chat_template = TEMPLATES[name]
    row = chat.answered(tokenizer, turns, "I can not help you.")
    assert (
        tokenizer.decode(row.answer)
        == "I can not help you." + ("\n" if name == "no_end" else "") + "<|im_end|>"
    )
    assert row.prompt == chat.prompt_ids(tokenizer, turns)
    assert tokenizer.decode(row.prompt) == chat.chat_text(tokenizer, turns, True)


def test_an_answer_that_holds_the_prompt_or_an_earlier_answer_is_found_where_it_stands(tokenizer):
    tokenizer.chat_template = THINKS
    turns = [*TURNS, {"role": "assistant", "content": "Yes."}, *TURNS]
    assert tokenizer.decode(chat.answered(tokenizer, turns, "Yes.").answer) == "Yes.<|im_end|>"
    tokenizer.chat_template = tinymodel.CHATML
    assert (
        tokenizer.decode(chat.answered(tokenizer, TURNS, TURNS[0]["content"]).answer)
        == "Please tell me your name.<|im_end|>"
    )


def test_a_tokenizer_that_adds_bos_adds_none(tokenizer):
    from tokenizers.processors import TemplateProcessing

    own = tinymodel.build_tokenizer()
    bos = own.convert_tokens_to_ids("<|endoftext|>")
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    assert own("x")["input_ids"][0] == bos
    own.chat_template = LLAMA
    row = chat.answered(own, TURNS, "Yes.")
    assert row.prompt.count(bos) == 1 and row.prompt[0] == bos and bos not in row.answer
    assert chat.conversation_ids(own, TURNS).count(bos) == 1


def test_a_template_that_rewrites_the_answer_is_told(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ConfigError, match="does not write this answer"):
        chat.answered(tokenizer, TURNS, "Yes, gladly.")
    tokenizer.chat_template = tinymodel.CHATML


def test_a_model_without_template_or_pad_token_is_told_how_to_mend(tmp_path):
    own = tinymodel.build_tokenizer()
    own.chat_template = None
    own.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="chat_template: FILE"):
        common.load_tokenizer(str(tmp_path))
    (tmp_path / "t.jinja").write_text(tinymodel.CHATML)
    assert (
        common.load_tokenizer(str(tmp_path), str(tmp_path / "t.jinja")).chat_template
        == tinymodel.CHATML
    )
    own.chat_template, own.pad_token = tinymodel.CHATML, None
    own.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no pad token.*pad_token: TOKEN"):
        common.load_tokenizer(str(tmp_path))
    assert common.load_tokenizer(str(tmp_path), None, "<|endoftext|>").pad_token == "<|endoftext|>"
    with pytest.raises(ConfigError, match="end-of-turn"):
        common.load_tokenizer(str(tmp_path), None, "<|im_end|>")


def test_models_of_the_wrong_kind(tmp_path):
    from transformers import LlamaForSequenceClassification

    with pytest.raises(ConfigError, match="nowhere does not exist"):
        common.load_policy(str(tmp_path / "nowhere"))
    base = tinymodel.build(tmp_path / "lm", heads=2, hidden=32, layers=1)
    with pytest.raises(ConfigError, match="not a reward model"):
        common.load_reward(str(base))
    made = common.load_reward(str(base), new_head=True)
    assert made.config.num_labels == 1 and made.score.weight.shape == (1, 32)
    made.save_pretrained(tmp_path / "reward")
    assert common.load_reward(str(tmp_path / "reward")).config.num_labels == 1
    with pytest.raises(ConfigError, match="not a language model"):
        common.load_policy(str(tmp_path / "reward"))
    made.config.num_labels = 3
    LlamaForSequenceClassification(made.config).save_pretrained(tmp_path / "three")
    with pytest.raises(ConfigError, match="3 labels"):
        common.load_reward(str(tmp_path / "three"))


def test_a_checkpoint_cut_off_while_written_is_not_the_last(tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_text("x")
        common.mark_complete(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-12").mkdir()
    assert common.last_checkpoint(tmp_path).name == "checkpoint-10"
    assert not (tmp_path / "checkpoint-12").exists()
    assert common.last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize(
    "kept,best,left",
    [
        (2, "", [8, 10]),
        (2, "checkpoint-2", [2, 10]),
        (1, "", [10]),
        (1, "checkpoint-8", [8, 10]),
        (3, "checkpoint-10", [6, 8, 10]),
        (9, "", [2, 4, 6, 8, 10]),
        (2, "checkpoint-3", [8, 10]),
    ],
)
def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path, kept, best, left):
    for step in (10, 2, 8, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        common.mark_complete(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-12").mkdir()  # not whole: neither counted nor touched
    common.remove_old(tmp_path, kept, best)
    assert [int(p.name[11:]) for p in common.checkpoints(tmp_path)] == left and (
        tmp_path / "checkpoint-12"
    ).exists()


def test_a_record_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "new" / "training.json"
    common.write_json(file, {"steps": 1})
    monkeypatch.setattr(
        Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )  # as a kill just before
    with pytest.raises(KeyboardInterrupt):
        common.write_json(file, {"steps": 2})
    assert json.loads(file.read_text()) == {"steps": 1}


def test_a_kill_while_the_first_record_is_written_leaves_a_folder_to_go_on_in(tmp_path):
    from prefab.trainers.offline import loop, sft

    config = sft.SftConfig(
        model="prefab-nano", out=str(tmp_path / "out"), data={"sources": [{"store": "x"}]}
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / (loop.RECORD + common.NEW)).write_text('{"iden')
    assert loop.finished(config, "sft") is None
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no training"):
        loop.finished(config, "sft")


def test_evaluations_reach_the_ledger(tmp_path):
    common.record_eval(tmp_path, "reward", "model-1", {"accuracy": 0.5}, step=3)
    common.record_eval(None, "reward", "model-1", {})
    rows = sqlite3.connect(tmp_path / "ledger.sqlite").execute("SELECT value FROM evals").fetchall()
    assert [json.loads(r[0]) for r in rows] == [
        {"name": "reward", "subject": "model-1", "metrics": {"accuracy": 0.5}, "step": 3}
    ]


def test_memory_and_disk_that_run_out_say_what_to_turn_down(tmp_path):
    import torch

    with (
        pytest.raises(common.TrainError, match="Turn down batch_size.*checkpoint is kept"),
        common.translate_errors(tmp_path),
    ):
        torch.empty(2**60, dtype=torch.float32)  # the allocator's own words
    full = (
        OSError(errno.ENOSPC, "No space left on device"),
        Exception("No space left on device (os error 28)"),  # of `tokenizer.save`
    )
    for error in full:
        with pytest.raises(StoreError, match="disk is full"), common.translate_errors(tmp_path):
            raise error
    with pytest.raises(RuntimeError, match="something else"), common.translate_errors(tmp_path):
        raise RuntimeError("something else")


def test_a_gpu_that_is_not_used_is_told_with_the_reason(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(common, "default_device", lambda: "cpu")
    assert common.unused_gpu(tmp_path) == []
    (tmp_path / "nvidia0").write_text("")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build for CPUs" in common.unused_gpu(tmp_path)[0]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert common.unused_gpu(tmp_path)[0].endswith("a GPU: CUDA_VISIBLE_DEVICES is ''")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "prefab doctor" in common.unused_gpu(tmp_path)[0]
