"""Data files elsewhere (`hf://`, `s3://`, `https://` and whatever else fsspec knows), copied into
the cache folder, where they are read like files of this machine.
"""

from __future__ import annotations

import os
import re
import tempfile
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.extras import missing_package
from prefab.factory.paths import cache_folder
from prefab.factory.redaction import redact

ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_remote(name: str) -> bool:
    """Whether a name is an address and not a path."""
    return bool(ADDRESS.match(name))


def fetch(address: str) -> list[Path]:
    """The files of an address or of a pattern (`s3://bucket/shards/*.parquet`), as copies on this
    machine, in the order of their names. A file that has not changed is not copied again.

    Raises:
        ConfigError: Nothing is there, it cannot be reached, or the package for this kind of address
            is not installed.
    """
    try:
        import fsspec
    except ImportError as error:
        raise missing_package(error.name, f"reading {address}") from error
    try:
        system, pattern = fsspec.url_to_fs(address)
        names = sorted(system.glob(pattern)) if re.search(r"[*?\[]", pattern) else [pattern]
        copies = [_copy(system, address, name) for name in names if not system.isdir(name)]
    except Exception as error:  # each file system has errors of its own
        why = redact(str(error)).splitlines() or [type(error).__name__]
        raise ConfigError(
            f"{address} cannot be read: {why[0]}. Where there is no network, copy the files to this "
            "machine and name their folder"
        ) from error
    if not copies:
        raise ConfigError(f"{address}: no file is there")
    return copies


def _copy(system: Any, address: str, name: str) -> Path:
    """The copy of a file, in a folder named by its address and version."""
    version = sha256(f"{address}\n{name}\n{system.ukey(name)}".encode()).hexdigest()[:32]
    file = cache_folder() / "data" / version / PurePosixPath(name).name
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent)
        os.close(handle)
        try:
            system.get_file(name, part)
            os.replace(part, file)
        finally:
            Path(part).unlink(missing_ok=True)
    return file
