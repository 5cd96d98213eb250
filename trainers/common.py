"""What every trainer shares: models and tokenizers, seeds, whole checkpoints, and errors that say
what to do.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from prefab.factory.engines.base import resolve_model
from prefab.factory.engines.model_files import (
    MAX_TEMPLATE,
    ask_hub,
    check_chat_template,
    check_model_folder,
    check_preset_output,
    loading_options,
    refuse_words,
    stage_hint,
    trusts_code,
)
from prefab.factory.errors import ConfigError, PrefabError, StoreError
from prefab.factory.spec.yamlio import read_text
from prefab.trainers.chat import chat_text, dialect

COMPLETE = "prefab-complete"  # stands in a checkpoint once everything else does
NEW = ".new"  # how a file ends that is being written
Attention = Literal[
    "auto", "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"
]
Precision = Literal["fp32", "tf32", "bf16", "bf16_weights"]


class TrainError(PrefabError, RuntimeError):
    """Training cannot go on: a loss that is not finite, memory that ran out, a checkpoint that does
    not fit.
    """


class Strict(BaseModel):
    """A part of a configuration: unknown fields and silent conversions are mistakes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Lora(Strict):
    """Low-rank adapters (Hu et al. 2021) instead of all weights."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] = Field(
        [], description="Names of linear layers; empty: all of them but the head."
    )
    bits: Literal[4, 8] | None = Field(
        None,
        description="QLoRA: the frozen weights in so many bits, by the package bitsandbytes.",
        exclude_if=lambda value: value is None,
    )


def seed_everything(seed: int, threads: int | None = None) -> None:
    """Seed python, numpy and torch; set the number of threads where one is given."""
    import torch
    from transformers import set_seed

    set_seed(seed)
    if threads:
        torch.set_num_threads(threads)


def default_device() -> str:
    """cuda where there is one, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def unused_gpu(devices: Path = Path("/dev")) -> list[str]:
    """A note where a machine has an NVIDIA GPU that torch does not use, with the reason."""
    if default_device() != "cpu" or not (devices / "nvidia0").exists():
        return []
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is a build for CPUs"
    elif hidden is not None and not hidden.strip(" -1"):
        why = f"CUDA_VISIBLE_DEVICES is {hidden!r}"
    else:
        why = "torch cannot use it; `prefab doctor` looks at the driver"
    return [f"training on the CPU though there is a GPU: {why}"]


def attention_for(wanted: Attention, device: str) -> str:
    """The attention implementation: on a CPU `eager` trains about twice as fast as `sdpa`, whose
    backward is slow there.

    Raises: ConfigError for flash attention where it is not installed, and for flex attention on a
        CPU, where it has no backward.
    """
    if wanted in FLASH:
        from importlib.util import find_spec

        if device == "cpu" or find_spec(FLASH[wanted]) is None:
            raise ConfigError(
                f"attention: {wanted} needs a GPU and the package flash-attn "
                f"({FLASH[wanted]}); write sdpa or eager"
            )
    if wanted == "flex_attention" and device == "cpu":
        raise ConfigError("attention: flex_attention needs a GPU; write sdpa or eager")
    return ("eager" if device == "cpu" else "sdpa") if wanted == "auto" else wanted


def check_precision(precision: Precision, attention: Attention, device: str) -> None:
    """Raises: ConfigError where the device, or the attention, cannot compute in this precision."""
    import torch

    attention_for(attention, device)
    if attention in FLASH and precision in ("fp32", "tf32"):
        raise ConfigError(f"precision: {attention} computes in bf16 alone; write precision: bf16")
    if device == "cuda" and precision.startswith("bf16") and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            f"precision: {torch.cuda.get_device_name()} has no bf16; write precision: fp32"
        )


def autocast_for(precision: Precision, device: Any) -> Any:
    """Mixed precision where it is asked for, as the Trainer has it in a training step."""
    import torch

    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def model_folder(name: str, field: str = "model") -> str:
    """Where a model is: an embedded model's folder, a folder, or a hub name as it stands.

    Raises: ConfigError for a path that is not there, or a folder without a model in it.
    """
    path = resolve_model(name)
    check_preset_output(path, field)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()
    if looks_local and not any(
        (Path(path) / f).is_file() for f in ("config.json", "adapter_config.json")
    ):
        what = "holds no model (no config.json)" if Path(path).exists() else "does not exist"
        raise ConfigError(
            f"{field}: {path} {what}. Name a folder that a stage wrote, an embedded model (prefab-tiny) "
            f"or a model of the hub{stage_hint(path)}"
        )
    if looks_local:
        check_model_folder(Path(path), name)
    return path


def load_tokenizer(
    model: str, chat_template: str | None = None, pad_token: str | None = None
) -> Any:
    """The tokenizer of a model, with a chat template and a pad token.

    Raises: ConfigError where either is missing and not given, or the pad token is the end-of-turn
    token.
    """
    from transformers import AutoTokenizer

    folder = model_folder(model)
    with loading(model):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code(model))
    if chat_template:
        tokenizer.chat_template = read_text(chat_template, MAX_TEMPLATE)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model: the tokenizer of {model} has no chat template (a base model?); name a Jinja file with "
            "chat_template: FILE"
        )
    if isinstance(tokenizer.chat_template, str):
        check_chat_template(tokenizer.chat_template, str(chat_template or model))
    if pad_token:
        if pad_token not in tokenizer.get_vocab():
            raise ConfigError(f"pad_token: {pad_token!r} is no token of {model}")
        tokenizer.pad_token = pad_token
    end = dialect(tokenizer).end
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id, end):
        what = (
            "has no pad token"
            if tokenizer.pad_token_id is None
            else "pads with its end-of-turn token"
        )
        others = _possible_pads(tokenizer)
        raise ConfigError(
            f"model: the tokenizer of {model} {what}; name a token that conversations never hold with "
            f"pad_token: TOKEN{' (there are: ' + ', '.join(others[:8]) + ')' if others else ''}"
        )
    tokenizer.padding_side = "right"
    return tokenizer


def _possible_pads(tokenizer: Any) -> list[str]:
    """Added tokens that the chat template neither writes nor looks for, those made for padding
    first.
    """
    known = dialect(tokenizer)
    written = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.decode([known.end])}
    found = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.content not in written and token.content not in tokenizer.chat_template
    ]
    whole = chat_text(tokenizer, [{"role": "user", "content": "x"}], True)
    found = [text for text in found if text.strip() and text not in whole]
    return sorted(found, key=lambda text: "pad" not in text.lower())


def write_ends(model: Any, tokenizer: Any) -> None:
    """Have generation end where the chat template ends the assistant's turn, by the model's own
    generation configuration. A model that does not generate is left as it is.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None:
        return
    known = generation.eos_token_id
    ends = [known] if isinstance(known, int) else list(known or ())
    end = dialect(tokenizer).end
    generation.eos_token_id = [end, *(i for i in ends if i != end)] if ends != [end] else end
    generation.pad_token_id = tokenizer.pad_token_id


def quantised(lora: Lora | None, device: str) -> dict[str, Any]:
    """The options of transformers that load frozen weights in few bits (Dettmers et al. 2023).

    Raises: ConfigError where bitsandbytes is missing.
    """
    if lora is None or lora.bits is None:
        return {}
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"lora.bits: {lora.bits} needs the package bitsandbytes: pip install bitsandbytes"
        )
    import torch
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=lora.bits == 4,
        load_in_8bit=lora.bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": how, "device_map": {"": device}}


def load_policy(
    model: str,
    attention: Attention = "auto",
    dtype: str = "float32",
    device: str | None = None,
    lora: Lora | None = None,
) -> Any:
    """A causal language model, ready to train: weights in `dtype`, dropout as its configuration
    says; frozen ones as `lora.bits` says.

    Raises: ConfigError when there is none at `model`, or it is of another kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, device = model_folder(model), device or default_device()
    with loading(model):
        found = (
            AutoConfig.from_pretrained(folder, trust_remote_code=trusts_code(model))
            if (Path(folder) / "config.json").exists()
            else None
        )
        kinds = list(getattr(found, "architectures", None) or ())
        if any("Classification" in kind for kind in kinds):
            raise ConfigError(
                f"model: {model} is a {kinds[0]}, not a language model that writes answers"
            )
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention_for(attention, device),
            **loading_options(model),
            **(in_bits := quantised(lora, device)),
        )
    return loaded if in_bits else loaded.to(device)


def load_reward(
    model: str,
    attention: Attention = "auto",
    dtype: str = "float32",
    device: str | None = None,
    new_head: bool = False,
    dropout: float | None = None,
    lora: Lora | None = None,
) -> Any:
    """A sequence classifier with one label. With `new_head`, a language model gets a fresh head,
    drawn from torch's seed with deviation 1 / sqrt(width + 1) (Stiennon et al. 2020).

    Raises: ConfigError for a model with several labels, or a language model without `new_head`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from trl.trainer.reward_trainer import suppress_seqcls_warning

    folder, device = model_folder(model), device or default_device()
    with loading(model), suppress_seqcls_warning():
        found = AutoConfig.from_pretrained(folder, trust_remote_code=trusts_code(model))
        is_reward = any("Classification" in kind for kind in found.architectures or ())
        if is_reward and found.num_labels != 1:
            raise ConfigError(
                f"model: {model} has {found.num_labels} labels; a reward model has one"
            )
        if not is_reward and not new_head:
            raise ConfigError(
                f"model: {model} is a {(found.architectures or ['?'])[0]}, not a reward model; train one "
                "with `prefab train reward`"
            )
        found.num_labels, found.attention_dropout = (
            1,
            dropout or getattr(found, "attention_dropout", 0.0),
        )
        loaded = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=found,
            dtype=dtype,
            attn_implementation=attention_for(attention, device),
            **loading_options(model),
            **(in_bits := quantised(lora, device)),
        )
    if not is_reward:
        torch.nn.init.normal_(loaded.score.weight, std=(loaded.score.weight.shape[1] + 1) ** -0.5)
    return loaded if in_bits else loaded.to(device)


def write_json(file: Path, value: Any) -> None:
    """A JSON file that is there whole or not at all, whenever the process is killed. Its folder is
    made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(file.name + NEW)
    new.write_text(json.dumps(value, indent=1), encoding="utf-8")
    new.replace(file)


@contextmanager
def loading(model: str) -> Iterator[None]:
    """What transformers raises for a model that cannot be loaded, as a mistake that can be mended;
    one that neither a folder nor the hub has is refused at once.
    It no longer tells what we know: that it reads and writes weights, that a new head is new, that
    tied weights are stored once.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        ask_hub(resolve_model(model))
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"model: {refuse_words(model, error)}") from error


def lora_config(lora: Lora | None, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> Any:
    """PEFT's configuration, for the trainer to wrap the model with; None without `lora`.

    A model that was wrapped before TRL's DPO trainer sees it gets a second adapter `ref` there, and
    on a resume transformers 5.19 then loads that one alone: training would silently begin anew.
    """
    if lora is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        task_type=task,
        target_modules=lora.targets or "all-linear",
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def with_lora(model: Any, lora: Lora | None, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> Any:
    """The model with adapters around its linear layers; unchanged without `lora`. For TRL's
    trainers: `lora_config`.
    """
    if lora is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, lora_config(lora, task))


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints below `out`, oldest first. One without its mark was cut off while being
    written.
    """
    found = [p for p in Path(out).glob("checkpoint-*") if (p / COMPLETE).is_file()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def mark_complete(checkpoint: Path) -> None:
    """Say that a checkpoint is whole. Called last, after everything in it is on disk."""
    for file in (p for p in Path(checkpoint).rglob("*") if p.is_file()):
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    (Path(checkpoint) / COMPLETE).write_text("")


def remove_old(out: Path, kept: int, best: str = "") -> None:
    """Remove whole checkpoints but `kept`: the newest and the one named `best` always stay. Called
    once the newest is whole; the mark goes first, so that one which a kill left half removed is not
    taken for whole.
    """
    whole = checkpoints(out)
    old = [p for p in whole[:-1] if p.name != best]
    for checkpoint in old[: max(0, len(whole) - kept)]:
        (checkpoint / COMPLETE).unlink()
        shutil.rmtree(checkpoint)


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint; those that were cut off are removed."""
    whole = checkpoints(out)
    for other in Path(out).glob("checkpoint-*"):
        if other not in whole:
            shutil.rmtree(other, ignore_errors=True)
    return whole[-1] if whole else None


def record_eval(
    store: Path | str | None, name: str, subject: str, metrics: Mapping[str, Any], **more: Any
) -> None:
    """Put an evaluation into the store's ledger (the table `evals`); nothing without a store."""
    if store is None:
        return
    from prefab.factory.ledger.ledger import Ledger

    ledger = Ledger.open(Path(store))
    try:
        ledger.add_eval({"name": name, "subject": subject, "metrics": dict(metrics), **more})
    finally:
        asyncio.run(ledger.close())


@contextmanager
def translate_errors(
    out: Path, smaller: str = "batch_size", advice: Callable[[], str] | None = None
) -> Iterator[None]:
    """Memory and disk that ran out, as errors that say what to turn down; the last whole checkpoint
    stays.

    Args:
        out: The output folder.
        smaller: The fields to turn down.
        advice: Says instead what to do where memory ran out.

    Raises: TrainError, StoreError.
    """
    try:
        yield
    except PrefabError:
        raise
    except Exception as error:  # the tokenizers library raises no more special class than this
        text = str(error)
        if (
            (isinstance(error, OSError) and error.errno == errno.ENOSPC)
            or "No space left" in text
            or "os error 28" in text
            or "file write failed" in text
            or "unexpected pos" in text
        ):
            raise StoreError(
                f"{out}: the disk is full. The last whole checkpoint is kept: free some space, then run the "
                "same command again"
            ) from error
        if (
            isinstance(error, MemoryError)
            or "out of memory" in text.lower()
            or "can't allocate memory" in text.lower()
            or "not enough memory" in text.lower()
        ):
            todo = (
                advice()
                if advice
                else f"Turn down {smaller}, or max_length; use lora, gradient_checkpointing: true, "
                "or precision: bf16"
            )
            raise TrainError(
                f"memory ran out. {todo}. The last whole checkpoint is kept"
            ) from error
        raise
