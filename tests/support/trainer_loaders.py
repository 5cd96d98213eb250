"""What other trainers' own loaders read from an export: run as `python trainer_loaders.py TOOL
EXPORT TOKENIZER` with the tool's package on PYTHONPATH; prints JSON.

Packages that a tool imports beside its loader (servers, audio, kernels) are stand-ins: nothing of
them is called. The loader's code is the tool's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

STANDINS = ("torchaudio", "ray", "pylatexenc", "torchao", "tensordict", "codetiming", "gradio")


class StandIns(MetaPathFinder, Loader):
    """Gives a mock for each module of STANDINS that is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.split(".")[0] not in STANDINS:
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> Any:
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__version__ = [], spec, "99.0"
        return module

    def exec_module(self, module: Any) -> None:
        """Nothing: a mock has everything."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def llama_factory(out: Path, tokenizer: Any) -> dict[str, Any]:
    from datasets import load_dataset
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import get_dataset_list

    found = {}
    for name in json.loads((out / "dataset_info.json").read_text()):
        (attr,) = get_dataset_list([name], str(out))
        data = load_dataset("json", data_files=str(out / attr.dataset_name), split="train")
        convert = get_dataset_converter(attr.formatting, attr, SimpleNamespace(media_dir=""))
        found[name] = [convert(row) for row in data]
    return found


def argilla(out: Path, tokenizer: Any) -> dict[str, Any]:
    import argilla as rg
    from argilla.records._io import JsonIO  # `dataset.records.from_json` without a server

    rg.Argilla._default_client = MagicMock()  # there is no server
    page = (Path(__file__).resolve().parents[2] / "docs/panels.md").read_text()
    settings = eval(page.split("```py\n")[1].split("```")[0], {"rg": rg})
    settings.validate()
    records = JsonIO._records_from_json(out / "records/train.json")
    return {
        "records": [
            (one.id, dict(one.fields), one.to_dict()["suggestions"]["label"]["value"])
            for one in records
        ],
        "settings": [
            [field.name for field in settings.fields],
            [[question.name, question.labels] for question in settings.questions],
        ],
    }


def axolotl(out: Path, tokenizer: Any) -> dict[str, Any]:
    import yaml
    from axolotl.prompt_strategies import chat_template
    from axolotl.prompt_strategies.bradley_terry import chat_template as bradley_terry
    from axolotl.prompt_strategies.dpo.chat_template import default as pairs
    from axolotl.prompt_strategies.kto.user_defined import default as rated
    from axolotl.utils.dict import DictDefault

    config = {"sequence_len": 4096, "train_on_inputs": False, "chat_template": "tokenizer_default"}
    found: dict[str, Any] = {}
    for settings in yaml.safe_load_all((out / "axolotl.yaml").read_text()):
        if not settings:
            continue
        whole = DictDefault({**config, **settings})
        (data,) = whole["datasets"]
        name, rows = data["path"].split("/")[0], lines(out / data["path"])
        if name == "preference":
            transform, _ = pairs(whole)
            found[name] = [transform(row, tokenizer=tokenizer) for row in rows]
        elif name == "unpaired":
            transform = rated(settings)
            found[name] = [transform(row) for row in rows]
        elif name == "sft":
            strategy = chat_template.load(tokenizer, whole, ds_cfg=data)
            labels = [strategy.tokenize_prompt(row)["labels"] for row in rows]
            found[name] = [tokenizer.decode([n for n in row if n != -100]) for row in labels]
        else:
            strategy = bradley_terry.load(tokenizer, whole, ds_cfg=data)
            made = [strategy._tokenize_single_prompt(row) for row in rows]
            sides = ("chosen_ids", "rejected_ids")
            found[name] = [[tokenizer.decode(row[side]) for side in sides] for row in made]
    return found


def launched(script: Path, **variables: str) -> list[str]:
    """What a launch script hands to its trainer, with a stand-in for `python3`."""
    stand_in = script.parents[1] / "stand-in/python3"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    stand_in.chmod(0o755)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    given = {"MODEL": "model", "PREFAB_JUDGE_KEY": "k", "GPUS": "4", "BATCH": "32", **variables}
    env = {"PATH": path, "HOME": os.environ.get("HOME", "/"), **given}
    done = subprocess.run([script], env=env, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def openrlhf_arguments(words: list[str]) -> dict[str, Any]:
    """The arguments as `openrlhf.cli.train_ppo_ray` parses and checks them, without its imports."""
    import argparse
    import ast
    import datetime
    from importlib.util import find_spec

    found = find_spec("openrlhf.cli")
    assert found and found.submodule_search_locations
    source = Path(found.submodule_search_locations[0], "train_ppo_ray.py").read_text()
    (main,) = (n for n in ast.parse(source).body if isinstance(n, ast.If))
    parsed: list[Any] = []
    sys.argv = ["train_ppo_ray", *words]
    code = compile(ast.Module(main.body, []), "train_ppo_ray.py", "exec")
    exec(
        code, {"argparse": argparse, "os": os, "sys": sys, "train": parsed.append} | vars(datetime)
    )
    (args,) = parsed
    return {
        "prompts": args.data.prompt_dataset,
        "model": args.actor.model_name_or_path,
        "reward": args.reward.remote_url or args.reward.model_name_or_path,
        "samples": args.train.batch_size,
        "critic": args.critic.model_name_or_path,
    }


def verl_configuration(words: list[str]) -> dict[str, Any]:
    """The overrides in verl's own configuration, which refuses unknown fields, after its checks."""
    from hydra import compose, initialize_config_module
    from verl.utils.config import validate_config

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=words)
    validate_config(config, use_reference_policy=True, use_critic=False)
    return {
        "prompts": config.data.train_files,
        "val": config.data.val_files,
        "model": config.actor_rollout_ref.model.path,
        "reward": config.reward.custom_reward_function.path,
        "batch": config.actor_rollout_ref.actor.ppo_mini_batch_size,
    }


def openrlhf(out: Path, tokenizer: Any) -> dict[str, Any]:
    from openrlhf.datasets import prompts_dataset, reward_dataset, sft_dataset

    template = tokenizer.apply_chat_template
    return {
        "preference": [
            reward_dataset.preprocess_data(
                row, prompt_key="prompt", apply_chat_template=template, is_dpo=True
            )
            for row in lines(out / "preference/train.jsonl")
        ],
        "sft": [
            sft_dataset.preprocess_data(row, output_key="output", apply_chat_template=template)
            for row in lines(out / "sft/train.jsonl")
        ],
        "prompts": [
            prompts_dataset.preprocess_data(row, apply_chat_template=template)[0]
            for row in lines(out / "prompts/train.jsonl")
        ],
        "launch": [
            openrlhf_arguments(launched(out / "openrlhf.sh", **more)[2:])
            for more in ({}, {"REWARD_MODEL": "rewarder"})
        ],
    }


def torchtune(out: Path, tokenizer: Any) -> dict[str, Any]:
    from torchtune.data import ChosenRejectedToMessages, OpenAIToMessages

    pair, talk = ChosenRejectedToMessages(), OpenAIToMessages()

    def told(messages: list[Any]) -> list[list[Any]]:
        return [[m.role, m.text_content, m.masked] for m in messages]

    return {
        "preference": [
            {side: told(of) for side, of in pair(row).items() if side in ("chosen", "rejected")}
            for row in lines(out / "preference/train.jsonl")
        ],
        "sft": [told(talk(row)["messages"]) for row in lines(out / "sft/train.jsonl")],
    }


def verl(out: Path, tokenizer: Any) -> dict[str, Any]:
    from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.dataset.rm_dataset import RMDataset

    config = {"filter_overlong_prompts": False, "cache_dir": str(out / "cache")}
    prompts = RLHFDataset(str(out / "prompts/train.parquet"), tokenizer, config)
    sft = MultiTurnSFTDataset(
        str(out / "sft/train.parquet"), tokenizer, {"pad_mode": "no_padding", "max_length": 4096}
    )
    reward = RMDataset(str(out / "reward/train.parquet"), tokenizer, cache_dir=str(out / "cache"))

    def trained(row: dict[str, Any]) -> str:
        pairs = zip(row["input_ids"].tolist(), row["loss_mask"].tolist(), strict=True)
        return str(tokenizer.decode([token for token, mask in pairs if mask]))

    return {
        "launch": verl_configuration(launched(out / "verl.sh")[2:]),
        "prompts": [prompts[i]["raw_prompt"] for i in range(len(prompts))],
        "sft": [trained(sft[i]) for i in range(len(sft))],
        "reward": [
            [
                tokenizer.decode(side[mask.bool()])
                for side, mask in zip(
                    reward[i]["input_ids"], reward[i]["attention_mask"], strict=True
                )
            ]
            for i in range(len(reward))
        ],
    }


if __name__ == "__main__":
    from transformers import AutoTokenizer

    sys.meta_path.append(StandIns())
    tool, out, tokenizer = sys.argv[1:]
    print(
        json.dumps(
            globals()[tool](Path(out), AutoTokenizer.from_pretrained(tokenizer)), default=str
        )
    )
