"""Where the installed package lies, with the files that it carries."""

from __future__ import annotations

import os
from pathlib import Path

import prefab

PACKAGE = Path(
    prefab.__file__
).parent  # constitutions/, prompts/, judges/templates/ and presets lie below it
IMPORT_ROOT = (
    PACKAGE.parent
)  # the folder to put on `sys.path` of a process that needs this very copy


def cache_folder() -> Path:
    """The folder of what can be fetched or computed again: `PREFAB_CACHE`, else
    `~/.cache/prefab`.
    """
    return Path(os.environ.get("PREFAB_CACHE") or Path.home() / ".cache" / "prefab")
