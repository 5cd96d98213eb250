"""A small world whose truth is known: `grammar` writes it, `oracle` reads it, `build` trains two
models in it.
"""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"


def weights_match(name: str = "prefab-tiny") -> tuple[bool, str]:
    """Whether an embedded model was trained with the templates as they now are, and what to say of
    it.
    """
    from prefab.factory.spec.templates import templates_digest

    stamp = WEIGHTS / name / "world.json"
    if not stamp.is_file():
        return (
            False,
            f"{name} has no weights here; build them with `python -m prefab.factory.microworld.builder.build`",
        )
    if json.loads(stamp.read_text(encoding="utf-8"))["templates"] != templates_digest():
        return False, (
            f"{name} was trained with other judge templates than those in judges/templates: its labels may be worse. "
            "Rebuild it with `python -m prefab.factory.microworld.builder.build`, or restore the templates"
        )
    return True, f"{name} was trained with these templates"
