"""Optional packages: which extra of Prefab brings each, and the command that installs it here."""

from __future__ import annotations

import json
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from prefab.factory.errors import ConfigError
from prefab.factory.paths import IMPORT_ROOT

NAME = "prefab-rlaif"
# By module: the extra in pyproject.toml that brings it.
EXTRA_OF = {
    **dict.fromkeys(("evalica", "rensa"), "stats"),
    **dict.fromkeys(("accelerate", "datasets", "matplotlib", "peft", "torch"), "train"),
    **dict.fromkeys(("safetensors", "tokenizers", "transformers", "trl"), "train"),
    **dict.fromkeys(("starlette", "uvicorn"), "view"),
    **dict.fromkeys(("fsspec", "huggingface_hub"), "hub"),
    **dict.fromkeys(("opentelemetry", "prometheus_client"), "telemetry"),
    "gguf": "real",
    "obstore": "s3",
    "ray": "scale",
    "vllm": "serve",
}
NOT_SET_UP = ("real", "s3", "scale")  # extras whose packages `make setup` does not install


def missing_package(module: str | None, what: str) -> ConfigError:
    """The error that says which package is missing, and the command that installs it.

    Args:
        module: The module that could not be imported.
        what: What needs it, as `prefab view`.
    """
    root = (module or "").split(".")[0]
    return ConfigError(f"{what} needs {root}: {install_command(EXTRA_OF.get(root, 'train'))}")


def install_command(
    extra: str, installed: Distribution | None = None, prefix: str = sys.prefix
) -> str:
    """The command that adds an extra to this installation.

    Args:
        extra: An extra of pyproject.toml.
        installed: The metadata of Prefab; default: those of this process.
        prefix: The folder of the Python environment.
    """
    try:
        installed = installed or distribution(NAME)
    except PackageNotFoundError:  # started from a clone that was not installed
        return f"`make setup` in {IMPORT_ROOT}"
    direct = json.loads(installed.read_text("direct_url.json") or "{}")
    url = str(direct.get("url", ""))
    if direct.get("dir_info", {}).get("editable"):
        folder = url.removeprefix("file://")
        if Path(prefix) == Path(folder) / ".venv":
            if extra in NOT_SET_UP:
                return f"`{prefix}/bin/python -m pip install -e '{folder}[{extra}]'`"
            return f"`make setup` in {folder}"
        return f"`pip install -e '{folder}[{extra}]'`"
    if vcs := direct.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}"
    wanted = f"{NAME}[{extra}]" + (f" @ {url}" if url else "")
    by_uv = (installed.read_text("INSTALLER") or "").strip() == "uv"
    return _of_tool(Path(prefix), wanted) or f"`{'uv ' if by_uv else ''}pip install '{wanted}'`"


def _of_tool(prefix: Path, wanted: str) -> str:
    """The command of the tool that made the environment for Prefab alone; else nothing."""
    parts = prefix.parts
    if "pipx" in parts or (prefix / "pipx_metadata.json").exists():
        if ".cache" in parts:  # an environment that `pipx run` made
            return f"`pipx run --spec '{wanted}' prefab`"
        return f"`pipx install --force '{wanted}'`"
    if "uv" in parts and "tools" in parts:
        return f"`uv tool install --force '{wanted}'`"
    if "archive-v0" in parts:  # an environment in uv's cache, which uvx made
        return f"`uvx --from '{wanted}' prefab`"
    return ""
