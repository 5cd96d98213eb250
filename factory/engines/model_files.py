"""Model folders of strangers: what is looked at before a model is loaded.

Nothing of a model is run: no code that its folder brings, no pickle file, and no chat template that
does not end.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prefab.factory.console import warn
from prefab.factory.errors import ConfigError, Problem
from prefab.factory.spec import bounded, template_check

TRUST = "PREFAB_TRUST_REMOTE_CODE"
MAX_SETTINGS = 64 * 2**20  # bytes of a JSON file of a model; tokenizer.json is the longest
MAX_TEMPLATE = 2**20  # bytes of a chat template
SETTINGS = (
    *("config.json", "generation_config.json", "adapter_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json"),
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# By the folder that a preset of trainers/presets writes, the command that runs it.
PRESET_OUTPUTS = {
    "trained/sft": "prefab train sft sft",
    "trained/reward": "prefab train reward reward",
    "trained/process": "prefab train process process",
    "trained/dpo": "prefab train dpo dpo",
    "trained/simpo": "prefab train dpo simpo",
    "trained/kto": "prefab train kto kto",
    "trained/ppo": "prefab train ppo ppo",
    "trained/grpo": "prefab train grpo grpo",
    "trained/online": "prefab train online online",
}
_STAGES = ("sft", "reward", "process", "dpo", "kto", "ppo", "grpo", "online")
_SAFE = ("model*.safetensors", "adapter_model*.safetensors", "*.gguf", "consolidated*.safetensors")
_TURNS = (
    [{"role": "user", "content": "Sample question."}],
    [
        {"role": "user", "content": "Sample question."},
        {"role": "assistant", "content": "Sample answer."},
        {"role": "user", "content": "Another question."},
    ],
)


def trusts_code(model: str) -> bool:
    """Whether the user named this model as one whose own code may run: in the environment variable
    PREFAB_TRUST_REMOTE_CODE, a list of names or paths with commas between.
    """
    names = [name.strip() for name in os.environ.get(TRUST, "").split(",")]
    return bool(model) and model in names


def loading_options(model: str) -> dict[str, Any]:
    """The options with which transformers loads a model or tokenizer: no code of the model's own
    unless the user named it, and no pickle files.
    """
    trusted = trusts_code(model)
    if trusted:
        warn(f"{model} may run Python code of its own: {TRUST} names it")
    return {"trust_remote_code": trusted, "use_safetensors": True}


def check_preset_output(model: str, field: str = "") -> None:
    """Refuse the name of a folder that a preset writes, where there is none. It is never asked for
    on the hub.

    Args:
        model: The name or path of a model.
        field: The field that names it.

    Raises:
        ConfigError: There is no such folder, with the command that makes it.
    """
    path = Path(model)
    made = next((out for out in PRESET_OUTPUTS if path.is_relative_to(out)), "")
    if not made or path.is_dir():
        return
    command = PRESET_OUTPUTS[made]
    if made == "trained/reward" and path.name.startswith("member-"):
        command += " --set members=3"
    raise ConfigError(
        f"{field}{': ' * bool(field)}there is no folder {model} in {Path.cwd()}. `{command}` makes it: "
        "run that first, or name another model"
    )


def stage_hint(model: str) -> str:
    """What to do about a missing model that is called like a training stage; else nothing."""
    stage = next((part for part in reversed(Path(model).parts) if part in _STAGES), "")
    return f". If `prefab train {stage}` is to write it, run that first" if stage else ""


def ask_hub(model: str, revision: str = "") -> bool:
    """Before a model is loaded: whether it is a folder, or the hub answers. If the hub does not
    answer, its client reads only the cache on this machine until the next call of this function;
    it would otherwise try again for 24 s at each file.

    Raises: ConfigError when the hub does not answer and the cache lacks the model, or a preset has
    not written its folder yet.
    """
    if os.path.isdir(model):
        return True
    check_preset_output(model)
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    why = _why_no_hub()
    constants.HF_HUB_OFFLINE = bool(why)  # read at each request
    try:
        found = [try_to_load_from_cache(model, f, revision=revision or None) for f in SETTINGS[:3]]
    except HFValidationError as error:
        raise ConfigError(
            f"{model} is neither a folder nor a name on the model hub{stage_hint(model)}"
        ) from error
    if why and not any(isinstance(file, str) for file in found):
        raise ConfigError(
            f"there is no folder {model}, and the model hub ({constants.ENDPOINT}) cannot be asked for "
            f"it: {why}. Name a folder, or fetch the model first, with a network: hf download {model}"
            f"{stage_hint(model)}"
        )
    return not why


def _why_no_hub() -> str:
    """Why the hub cannot be asked; empty when it answers."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HfHubHTTPError

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in constants.ENV_VARS_TRUE_VALUES:
            return f"{name} is set"
    constants.HF_HUB_OFFLINE = False
    # the HTTP client's own errors, and OSError
    failures = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except failures as error:
        return str(error)
    return ""


def refuse_words(model: str, error: Exception) -> str:
    """What to tell the user about a model that transformers would not load."""
    words = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)[:300]
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return _refused(model)
    here = "" if os.path.isdir(model) else f"there is no folder {model}, and the model hub says: "
    return f"cannot load {model}: {here}{words}{stage_hint(model) if here else ''}"


def _refused(model: str) -> str:
    return (
        f"{model} brings Python code of its own, which was not run. If you trust it, name it in the "
        f"environment: {TRUST}={model}"
    )


def check_model_folder(folder: Path, name: str = "") -> None:
    """Look at the files of a model before it is loaded. Only a folder is looked at: the files of a
    model of the hub come when it is loaded.

    Args:
        folder: The model's folder.
        name: What the user called it.

    Raises:
        ConfigError: Code of its own that nobody asked for, weights in pickle files alone, weights
            that are cut off or damaged, settings that cannot be read, a chat template that is too
            long or does not end.
    """
    if not folder.is_dir():
        return
    for file in (folder / name for name in SETTINGS):
        settings = _settings(file) if file.exists() else None
        if file.name == "config.json" and settings is not None and not isinstance(settings, dict):
            raise _problem(file, "must hold an object; fetch the model again")
        if file.name == "config.json" and settings and _needs_code(settings):
            called = name or str(folder)
            if not trusts_code(called):
                raise _problem(file, _refused(called))
    _check_weights(folder)
    for file, template in chat_templates(folder):
        check_chat_template(template, str(file))


def _needs_code(settings: dict[str, Any]) -> bool:
    """Whether a model brings code of its own, and transformers has no class for its kind."""
    kind = settings.get("model_type")
    if not settings.get("auto_map"):
        return False
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return kind not in CONFIG_MAPPING_NAMES


def _problem(file: Path, message: str) -> ConfigError:
    return ConfigError([Problem(str(file), 0, 0, "", message)])


def _settings(file: Path) -> Any:
    try:
        return json.loads(bounded.read_bytes(file, MAX_SETTINGS))
    except OSError as error:
        raise _problem(file, f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _problem(file, "is not JSON that can be read; fetch the model again") from None


def _check_weights(folder: Path) -> None:
    weights = sorted({file for kind in _SAFE for file in folder.glob(kind)})
    if not weights:
        pickles = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
        if pickles:
            raise _problem(
                folder / pickles[0],
                "the weights are in pickle files, which can run any code when they are read; fetch "
                "the model as safetensors",
            )
    for file in weights:
        if file.suffix == ".safetensors" and (wrong := _wrong_with(file)):
            raise _problem(file, f"{wrong}; fetch or copy the file again")


def _wrong_with(file: Path) -> str | None:
    """Why a safetensors file cannot be whole, from its header and its size alone."""
    try:
        with bounded.open_regular(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, 100 * 2**20):
                return "is no safetensors file, or is cut off"
            header = json.loads(opened.read(length))
        parts = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((int(entry["data_offsets"][1]) for entry in parts), default=0)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return "has a header that is damaged"
    if size - 8 - length < end:
        return f"is cut off: {end - (size - 8 - length):,} bytes of weights are missing"
    return None


def chat_templates(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, text) of each chat template of a model's folder."""
    for file in (folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")):
        if file.is_file():
            text = bounded.read_bytes(file, MAX_TEMPLATE).decode("utf-8", "replace")
            yield file, text
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        file = folder / name
        settings = _settings(file) if file.is_file() else {}
        found = settings.get("chat_template") if isinstance(settings, dict) else None
        named = found if isinstance(found, list) else [{"template": found}]
        for entry in named:
            template = entry.get("template") if isinstance(entry, dict) else None
            if isinstance(template, str):
                yield file, template


@lru_cache(maxsize=64)
def check_chat_template(text: str, where: str) -> None:
    """Render a chat template on short conversations, in a child process with limits.

    What it refuses or fails on is no matter here: the conversation itself will tell.

    Raises: ConfigError where it is too long, or takes too much time or memory.
    """
    most = bounded.limit(MAX_TEMPLATE)
    if len(text) > most:
        message = f"the chat template is longer than {bounded.mb(most)}{bounded.HOW}"
        raise ConfigError([Problem(where, 0, 0, "", message)])
    template_check.try_out(lambda: _render(text), where, "the chat template ")


def _render(text: str) -> None:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=_refuse, strftime_now=datetime.now().strftime)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, default=str)
    try:
        text = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)  # of transformers alone
        template = environment.from_string(text)
    except MemoryError:
        raise
    except Exception:
        return
    for turns in _TURNS:
        for prompt in (False, True):
            try:
                template.render(messages=turns, add_generation_prompt=prompt, tools=None)
            except MemoryError:
                raise
            except Exception:
                continue


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
