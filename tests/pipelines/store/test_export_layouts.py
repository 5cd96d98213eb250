"""Exports in the layouts of other trainers, read by the trainers' own loaders (slow: they are
installed from the package index), and by `datasets`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from datasets import load_dataset

from prefab import run
from prefab.factory.errors import ConfigError
from prefab.pipelines.config.registries import FORMATS
from prefab.pipelines.store.export import layouts
from prefab.pipelines.store.export.base import export
from prefab.pipelines.store.fill import query
from tests.support import project, trainer_loaders
from tests.support.trainer_loaders import launched

ROOT = Path(__file__).parents[3]
TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds",
        "parameters": {"type": "object", "properties": {"q": {"type": "string"}}},
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "find", "arguments": json.dumps({"q": "it"})},
}
QUESTION = [{"role": "user", "content": "=Question one?"}]
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "one": QUESTION,
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Question two?"},
    ],
    "talk": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Question three?"},
    ],
    "call": [
        {"role": "user", "content": "Find it"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "found", "tool_call_id": "c1"},
    ],
}
# which of PROMPTS each dataset of a format holds
TEXT, ALL, ONE = ["one", "system", "talk"], list(PROMPTS), ["one"]
FOUR = ("preference", "unpaired", "prompts", "sft")
HOLDS: dict[str, dict[str, list[str]]] = {
    "argilla": {"records": TEXT},
    "jsonl": dict.fromkeys(FOUR, ALL),
    "text": dict.fromkeys(FOUR, ONE),
    "csv": {name: ["one", "system"] for name in FOUR},
    "axolotl": {
        "preference": TEXT,
        "reward": ["one", "system"],
        "unpaired": ["one"],
        "prompts": ALL,
        "sft": ALL,
    },
    "llama_factory": {"preference": ALL, "unpaired": ALL, "sft": ALL},
    "llama_factory_alpaca": {name: ["one", "system"] for name in FOUR},
    "nemo_rl": {"preference": TEXT, "sft": ALL},
    "openrlhf": {"preference": TEXT, "prompts": TEXT, "sft": TEXT},
    "torchtune": {"preference": TEXT, "sft": TEXT},
    "verl": {"reward": ["one"], "prompts": TEXT, "sft": TEXT},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    value = project.pipeline(folder, revise={"rounds": 1, "select": "sweep"})
    rows = [
        {
            "id": name,
            "prompt": turns,
            "split": "train",
            **({"tools": [TOOL]} if name == "call" else {}),
        }
        for name, turns in PROMPTS.items()
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(value).state == "done"
    return folder / "store"


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The rows of the format `trl` by dataset."""
    out = tmp_path_factory.mktemp("trl")
    report = export(store, out)
    return {name: pl.read_parquet(out / name / "*.parquet").to_dicts() for name in report.counts}


def test_every_format_is_in_these_tests() -> None:
    assert set(HOLDS) == set(FORMATS) - {"trl", "parquet"}


@pytest.mark.parametrize("page", ["README.md", "docs/exports.md"])
def test_the_tables_name_the_version_that_the_tests_install_of_each_loader(page: str) -> None:
    """A tool of PACKAGES is installed by the test that reads with it; the others are pinned."""
    lines = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| `")]
    pinned = {
        requirement.split("==")[0].replace("-", "").replace("_", "").lower(): requirement
        for requirements in ((ROOT / "requirements.txt").read_text().split(), *PACKAGES.values())
        for requirement in requirements
        if "==" in requirement
    }
    for format in FORMATS:
        (line,) = (line for line in lines if f"`{format}`" in line.split("|")[1])
        cell = line.rsplit("|", 2)[1]
        named = re.findall(r"`?([\w-]+)`? (\d+(?:\.\d+)+)", cell)
        for name, version in named:
            requirement = pinned[name.replace("-", "").lower()]
            assert requirement.split("==")[1].split("+")[0] == version, f"{format}: {requirement}"
        tool = format.removesuffix("_alpaca")
        if tool in PACKAGES:
            package = PACKAGES[tool][0].split("==")[0]
            assert [name.replace("-", "").lower() for name, _ in named] == [package]
            assert callable(getattr(trainer_loaders, tool))
        else:
            others = {
                "trl": ["TRL", "datasets"],
                "csv": ["datasets", "polars"],
                "parquet": ["polars"],
            }
            expected = [] if tool == "nemo_rl" else others.get(tool, ["datasets"])
            assert [name for name, _ in named] == expected, cell


@pytest.mark.parametrize(
    ("turn", "alone"),
    [
        ({"role": "assistant", "content": "yes"}, True),
        ({"role": "tool", "content": "found"}, False),
        ({"role": "assistant", "content": "", "tool_calls": [CALL]}, False),
        ({"role": "assistant", "content": None}, False),
    ],
)
def test_what_text_alone_is(turn: dict[str, Any], alone: bool) -> None:
    assert layouts.only_text([*QUESTION, turn]) is alone
    assert layouts.text([turn]) == ("yes" if alone else None)
    assert layouts.text([turn, turn]) is None


@pytest.mark.parametrize("format", HOLDS)
def test_a_format_holds_what_its_layout_can_and_says_what_it_cannot(
    store: Path, whole: dict[str, list[dict[str, Any]]], tmp_path: Path, format: str
) -> None:
    report = export(store, tmp_path / "out", format)
    assert list(report.counts) == list(HOLDS[format])
    for name, prompts in HOLDS[format].items():
        rows = whole["preference" if name in ("reward", "records") else name]
        held = [row for row in rows if row["prompt_id"] in prompts]
        assert sum(report.counts[name].values()) == len(held) > 0
        left = [note for note in report.notes if f" of {name} left out: " in note]
        assert [note.split()[0] for note in left] == (
            [str(len(rows) - len(held))] if len(held) < len(rows) else []
        )
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: of.num_rows for split, of in data.items()} == report.counts[report.first()]


@pytest.mark.slow
def test_exports_of_two_formats_take_each_others_place(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path, "axolotl")
    assert (tmp_path / "axolotl.yaml").is_file() and (tmp_path / "reward/train.jsonl").is_file()
    export(store, tmp_path, "llama_factory")
    assert not (tmp_path / "axolotl.yaml").exists() and not (tmp_path / "reward").exists()
    assert list(json.loads((tmp_path / "dataset_info.json").read_text())) == [
        "preference_train",
        "unpaired_train",
        "sft_train",
    ]
    (tmp_path / "axolotl.yaml").write_text("mine: true\n")
    with pytest.raises(ConfigError, match="no earlier export wrote it"):
        export(store, tmp_path, "axolotl")
    assert (tmp_path / "dataset_info.json").is_file()


def test_launch_scripts_name_the_prompts_and_want_a_policy(store: Path, tmp_path: Path) -> None:
    for format, prompts in (("verl", "prompts/train.parquet"), ("openrlhf", "prompts/train.jsonl")):
        export(store, tmp_path / format, format)
        script = tmp_path / format / f"{format}.sh"
        words = launched(script)
        assert any(word.endswith(prompts) for word in words) and words[0] == "-m"
        refused = subprocess.run([script], env={"PATH": os.defpath}, capture_output=True, text=True)
        assert refused.returncode and "the policy to begin with" in refused.stderr
    reward = ROOT / "pipelines/store/export/verl_reward.py"
    assert (tmp_path / "verl/verl_reward.py").read_text() == reward.read_text()
    assert any("key=k&unscored=-1" in word for word in words)


def test_no_cell_of_a_table_is_a_formula(store: Path, tmp_path: Path) -> None:
    export(store, tmp_path, "csv")
    rows = pl.read_csv(tmp_path / "prompts/train.csv").to_dicts()
    assert {row["prompt"] for row in rows} == {"'=Question one?", "Question two?"}
    assert {row["system"] for row in rows} == {"", "Be brief."}


# ---- the trainers' own loaders ----

PACKAGES = {
    "argilla": ("argilla==2.8.0",),
    "axolotl": ("axolotl==0.19.0", "addict==2.4.0"),
    "llama_factory": ("llamafactory==0.9.5",),
    "openrlhf": ("openrlhf==0.11.2",),
    "torchtune": ("torchtune==0.6.1", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3"),
    "verl": (
        "verl==0.9.1",
        "hydra-core==1.3.2",
        "omegaconf==2.3.0",
        "antlr4-python3-runtime==4.9.3",
    ),
}


def read_by(tool: str, out: Path, folder: Path) -> dict[str, Any]:
    """What a tool's loader reads from an export."""
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(site)]
    made = subprocess.run([*install, *PACKAGES[tool]], capture_output=True, text=True, timeout=600)
    if made.returncode:
        pytest.skip(f"no package index: {tool} could not be installed: {made.stderr[-300:]}")
    command = [sys.executable, str(ROOT / "tests/support/trainer_loaders.py")]
    tokenizer = ROOT / "factory/microworld/weights/prefab-tiny"
    found = subprocess.run(
        [*command, tool, str(out), str(tokenizer)],
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return dict(json.loads(found.stdout.splitlines()[-1]))


def rows_of(whole: dict[str, list[dict[str, Any]]], format: str, name: str) -> list[dict[str, Any]]:
    rows = whole["preference" if name in ("reward", "records") else name]
    return [row for row in rows if row["prompt_id"] in HOLDS[format][name]]


def content(row: dict[str, Any], name: str) -> str:
    return str(row[name][0]["content"])


def turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    return PROMPTS[row["prompt_id"]]


@pytest.mark.slow
def test_axolotl_reads_it(store: Path, whole: Any, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "axolotl")
    found = read_by("axolotl", tmp_path / "out", tmp_path)
    for row, read in zip(rows_of(whole, "axolotl", "preference"), found["preference"], strict=True):
        assert read["prompt"].endswith(
            f"{turns(row)[-1]['content']}<|im_end|>\n<|im_start|>assistant\n"
        )
        for side in ("chosen", "rejected"):
            assert read[side] == f"{content(row, side)}<|im_end|>"
    for row, read in zip(rows_of(whole, "axolotl", "unpaired"), found["unpaired"], strict=True):
        assert (read["prompt"], read["completion"], read["label"]) == (
            turns(row)[0]["content"],
            content(row, "completion"),
            row["label"],
        )
    for row, read in zip(rows_of(whole, "axolotl", "sft"), found["sft"], strict=True):
        assert read.endswith(f"{content(row, 'completion')}<|im_end|>")
    for row, read in zip(rows_of(whole, "axolotl", "reward"), found["reward"], strict=True):
        for side, text in zip(("chosen", "rejected"), read, strict=True):
            assert all(turn["content"] in text for turn in turns(row))
            assert text.endswith(f"{content(row, side)}<|im_end|>\n")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["llama_factory", "llama_factory_alpaca"])
def test_llama_factory_reads_it(store: Path, whole: Any, tmp_path: Path, format: str) -> None:
    export(store, tmp_path / "out", format)
    found = read_by("llama_factory", tmp_path / "out", tmp_path)
    assert set(found) == {f"{name}_train" for name in HOLDS[format]}
    for name in HOLDS[format]:
        for row, read in zip(rows_of(whole, format, name), found[f"{name}_train"], strict=True):
            system = [turn["content"] for turn in turns(row) if turn["role"] == "system"]
            assert read["_system"] == "".join(system)
            assert (json.loads(read["_tools"] or "[]") == [TOOL]) == (row["prompt_id"] == "call")
            said = [turn["content"] for turn in turns(row) if turn["role"] != "system"]
            told = [turn["content"] for turn in read["_prompt"]]
            if row["prompt_id"] == "call":
                assert json.loads(told[1]) == [{"name": "find", "arguments": {"q": "it"}}]
                said[1] = told[1]
            assert told == said
            answers = [turn["content"] for turn in read["_response"]]
            if name == "preference":
                assert answers == [content(row, "chosen"), content(row, "rejected")]
            elif name == "unpaired":
                assert answers.index("") == int(row["label"])
                assert content(row, "completion") in answers
            else:
                assert answers == ([content(row, "completion")] if name == "sft" else [])


@pytest.mark.slow
def test_openrlhf_reads_it(store: Path, whole: Any, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "openrlhf")
    found = read_by("openrlhf", tmp_path / "out", tmp_path)
    for row, (prompt, chosen, rejected, margin) in zip(
        rows_of(whole, "openrlhf", "preference"), found["preference"], strict=True
    ):
        assert prompt.endswith(f"{turns(row)[-1]['content']}<|im_end|>\n<|im_start|>assistant\n")
        assert chosen == f"{content(row, 'chosen')}<|im_end|>\n"
        assert rejected == f"{content(row, 'rejected')}<|im_end|>\n" and margin == 0
    for row, (_, answer) in zip(rows_of(whole, "openrlhf", "sft"), found["sft"], strict=True):
        assert answer == f"{content(row, 'completion')}<|im_end|>\n"
    assert len(found["prompts"]) == len(rows_of(whole, "openrlhf", "prompts"))
    shared = {"prompts": "prompts/train.jsonl", "model": "model", "samples": 256, "critic": None}
    judge = ["http://127.0.0.1:8100/get_reward?key=k&unscored=-1"]
    assert found["launch"] == [{**shared, "reward": judge}, {**shared, "reward": "rewarder"}]


@pytest.mark.slow
def test_argilla_reads_it(store: Path, whole: Any, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "argilla")
    found = read_by("argilla", tmp_path / "out", tmp_path)
    for row, (name, fields, suggested) in zip(
        rows_of(whole, "argilla", "records"), found["records"], strict=True
    ):
        assert name == row["preference"] and fields["conversation"] == turns(row)
        assert fields[f"answer_{suggested}"] == content(row, "chosen")
        assert found["settings"] == [list(fields), [["label", ["a", "b", "tie"]]]]  # docs/panels.md


@pytest.mark.slow
def test_torchtune_reads_it(store: Path, whole: Any, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "torchtune")
    found = read_by("torchtune", tmp_path / "out", tmp_path)
    for row, read in zip(
        rows_of(whole, "torchtune", "preference"), found["preference"], strict=True
    ):
        for side in ("chosen", "rejected"):
            assert read[side] == [
                *(
                    [turn["role"], turn["content"], turn["role"] != "assistant"]
                    for turn in turns(row)
                ),
                ["assistant", content(row, side), False],
            ]
    for row, read in zip(rows_of(whole, "torchtune", "sft"), found["sft"], strict=True):
        assert read[-1][:2] == ["assistant", content(row, "completion")]


@pytest.mark.slow
def test_verl_reads_it(store: Path, whole: Any, tmp_path: Path) -> None:
    export(store, tmp_path / "out", "verl")
    found = read_by("verl", tmp_path / "out", tmp_path)
    launch = found["launch"]
    assert launch.pop("reward") == str(tmp_path / "out/verl_reward.py")
    prompts = "prompts/train.parquet"
    assert launch == {"prompts": prompts, "val": prompts, "model": "model", "batch": 32}
    assert found["prompts"] == [turns(row) for row in rows_of(whole, "verl", "prompts")]
    for row, read in zip(rows_of(whole, "verl", "sft"), found["sft"], strict=True):
        assert read.endswith(f"{content(row, 'completion')}<|im_end|>\n")
    for row, read in zip(rows_of(whole, "verl", "reward"), found["reward"], strict=True):
        expected = [
            f"{turns(row)[0]['content']}{content(row, side)}<|im_end|>"
            for side in ("chosen", "rejected")
        ]
        assert read == expected


def test_nemo_rl_has_its_ranked_form(store: Path, whole: Any, tmp_path: Path) -> None:
    """By the documentation of its PreferenceDataset: its package on the index holds no code."""
    export(store, tmp_path, "nemo_rl")
    read = [
        json.loads(line) for line in (tmp_path / "preference/train.jsonl").read_text().splitlines()
    ]
    for row, made in zip(rows_of(whole, "nemo_rl", "preference"), read, strict=True):
        assert made["context"] == turns(row)
        assert [one["rank"] for one in made["completions"]] == [0, 1]
        assert [one["completion"] for one in made["completions"]] == [
            [{"role": "assistant", "content": content(row, side)}]
            for side in ("chosen", "rejected")
        ]
    assert query(store, "SELECT count(*) AS n FROM preferences")["n"][0] >= len(read) > 0
    assert yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["configs"][0][
        "default"
    ]
