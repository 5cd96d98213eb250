"""Folders of models that strangers made: none of their code runs, and nothing hangs or takes all
memory."""

from __future__ import annotations

import asyncio
import io
import json
import pickle
import re
import shutil
import sys

import pytest

from prefab.factory.engines.base import EMBEDDED
from prefab.factory.engines.hf import HF, HfConfig
from prefab.factory.engines.model_files import (
    TRUST,
    ask_hub,
    chat_templates,
    check_chat_template,
    check_model_folder,
    loading_options,
    refuse_words,
)
from prefab.factory.engines.vllm import VllmConfig
from prefab.factory.engines.vllm_process import VllmProcess, environment
from prefab.factory.errors import ConfigError, EngineError
from prefab.trainers.common import load_policy, load_reward, load_tokenizer
from tests.support.hub_server import hub_server

NANO = EMBEDDED / "prefab-nano"
LOOPS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10**(10**8) }}",
    "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}"
    "{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}"
    "{% for m in messages %}{{ 'a' * 10**10 }}{% endfor %}",
]


@pytest.fixture
def folder(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(NANO, copy)
    return copy


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


BROKEN = [
    (pickled, "the weights are in pickle files"),
    (cut, "model.safetensors: is cut off: 1,000 bytes of weights are missing"),
    (lambda f: (f / "model.safetensors").write_bytes(b"hello"), "is no safetensors file"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "is no safetensors file"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"[]"), "damaged"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{x"), "damaged"),
    (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: is not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json: must hold an object"),
    (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: is not JSON"),
    (
        lambda f: (f / "chat_template.jinja").write_text("x" * 2_000_000),
        "chat_template.jinja: the file is longer than 1 MB",
    ),
    (
        lambda f: edit(f / "tokenizer_config.json", chat_template=LOOPS[3]),
        "the chat template takes more than 1 s or 512 MB",
    ),
]


@pytest.mark.parametrize(("breaks", "says"), BROKEN, ids=[says[:40] for _, says in BROKEN])
def test_a_broken_model_is_refused_in_words(folder, breaks, says):
    breaks(folder)
    for load in (load_policy, load_tokenizer):
        with pytest.raises(ConfigError, match=re.escape(says)):
            load(str(folder))
    with pytest.raises(EngineError, match=re.escape(says)):
        asyncio.run(HF(HfConfig(engine="hf", model=str(folder))).start())


@pytest.mark.slow_but("{{ 10**(10**8) }}", "template3")
@pytest.mark.parametrize("template", LOOPS)
def test_a_chat_template_that_does_not_end_is_stopped(template):
    with pytest.raises(ConfigError, match="the chat template takes more than 1 s or 512 MB"):
        check_chat_template(template, "here")


def test_chat_templates_of_real_models_are_taken(folder):
    check_chat_template("{% for m in messages %}{% break %}{% endfor %}{% generation %}", "here")
    check_chat_template("{{ raise_exception('no system') }}{{ strftime_now('%d') }}", "here")
    (folder / "chat_template.jinja").write_text("{{ messages[0]|tojson(indent=4) }}")
    named = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    assert [text[:2] for _, text in chat_templates(folder)] == ["{{", "a", "b"]
    check_model_folder(folder)


@pytest.fixture
def brings_code(folder):
    """A model of a kind that transformers does not know, whose files bring its code."""
    edit(
        folder / "config.json",
        model_type="evil",
        auto_map={
            "AutoConfig": "evil.EvilConfig",
            "AutoModelForCausalLM": "evil.EvilModel",
            "AutoModelForSequenceClassification": "evil.EvilModel",
        },
    )
    mark = folder.parent / "RAN"
    (folder / "evil.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PretrainedConfig as EvilConfig\n"
    )
    return folder, mark


def test_a_models_own_code_is_never_run(brings_code, monkeypatch):
    folder, mark = brings_code
    for load in (load_policy, load_reward, load_tokenizer):
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
        with pytest.raises(ConfigError, match=f"brings Python code of its own.*{TRUST}={folder}"):
            load(str(folder))
    with pytest.raises(EngineError, match="brings Python code of its own"):
        asyncio.run(HF(HfConfig(engine="hf", model=str(folder))).start())
    assert not mark.exists()


def test_a_models_own_code_is_run_when_the_user_names_it(brings_code, monkeypatch, capsys):
    folder, _ = brings_code
    monkeypatch.setenv(TRUST, f"other, {folder}")
    check_model_folder(folder, str(folder))
    assert loading_options(str(folder))["trust_remote_code"] is True
    said = " ".join(capsys.readouterr().err.split())
    assert "may run Python code of its own" in said
    monkeypatch.setenv(TRUST, "other")
    assert loading_options(str(folder))["trust_remote_code"] is False
    with pytest.raises(ConfigError, match="brings Python code"):
        check_model_folder(folder, str(folder))


def test_known_models_that_also_bring_code_are_loaded_without_it(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.EvilModel"})
    assert load_policy(str(folder), device="cpu") is not None


def test_a_folder_that_is_not_there_is_named_before_what_the_hub_says(tmp_path):
    error = OSError("We couldn't connect to the hub")
    lost = refuse_words("trained/sft", error)
    assert lost.startswith(
        "cannot load trained/sft: there is no folder trained/sft, and the model hub"
    )
    assert refuse_words(str(tmp_path), error) == f"cannot load {tmp_path}: {error}"


def test_a_model_of_a_hub_that_does_not_answer_is_read_from_the_cache_or_refused_at_once(
    tmp_path, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    process = VllmProcess(VllmConfig(model="me/model"), "me/model", 1, "judge", None)
    with hub_server([]) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        assert ask_hub("me/model") and not constants.HF_HUB_OFFLINE
    for load in (load_policy, load_reward, load_tokenizer):  # nothing listens there any more
        with pytest.raises(ConfigError, match="no folder me/model.*hf download me/model"):
            load("me/model")
    with pytest.raises(EngineError, match="engines.hf: there is no folder me/model.*hf download"):
        asyncio.run(HF(HfConfig(engine="hf", model="me/model")).start())
    with pytest.raises(EngineError, match="engines.judge: there is no folder me/model"):
        process.look_for_model()
    with pytest.raises(ConfigError, match="neither a folder nor a name on the model hub"):
        ask_hub("a b/c")
    with pytest.raises(ConfigError, match="If `prefab train dpo` is to write it, run that first"):
        load_policy("mine/dpo")
    with pytest.raises(
        EngineError, match="no folder trained/sft in .*`prefab train sft sft` makes"
    ):
        asyncio.run(HF(HfConfig(engine="hf", model="trained/sft")).start())
    cached = tmp_path / "models--me--model"
    shutil.copytree(NANO, cached / "snapshots/0")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0")
    assert load_policy("me/model", device="cpu").config.hidden_size == 128
    assert len(load_tokenizer("me/model"))
    assert constants.is_offline_mode()  # else its client tries again for 24 s at each file
    process.look_for_model()
    assert environment(process)["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        ask_hub("me/other")
    assert ask_hub(str(NANO))
