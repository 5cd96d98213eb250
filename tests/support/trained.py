"""A store and a tiny model for the tests of the trainers: 40 prompts in three splits, preferences
and revisions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.types import Completion, Request
from tests.support import project, tinymodel


def answer(request: Request) -> Completion:
    """As the scripted project answers, but surer of some prompts and of one principle than of
    others."""
    if project.asked(request) != "judge":
        return project.answer(request)
    text = "\n".join(m.content for m in request.messages)
    first, second = (int(part[0]) for part in text.split("draft ")[1:3])
    sure = (
        0.1
        + 0.04 * (int(re.search(r"Question (\d+)", text).group(1)) % 5)
        + 0.1 * ("kinder" in text)
    )
    return project.judgment(0.475 + sure if first < second else 0.475 - sure)


def make_store(
    folder: Path,
    prompts: int = 40,
    splits: tuple[str, ...] = ("train", "train", "train", "val", "test"),
    **changes: Any,
) -> Path:
    """Run the scripted project and give its store, filled."""
    from prefab import run
    from prefab.pipelines.store.fill import fill

    folder.mkdir(parents=True, exist_ok=True)
    value = project.pipeline(folder, prompts, revise={"rounds": 1, "select": "sweep"}, **changes)
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    rows = [{**row, "split": splits[i % len(splits)]} for i, row in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(value, engines={"local": Scripted(ScriptedConfig(), answer)}).state == "done"
    fill(folder / "store")
    return folder / "store"


def make_model(folder: Path, **shape: int) -> Path:
    """A random Llama of a few thousand parameters."""
    return tinymodel.build(
        folder, **{"heads": 2, "hidden": 32, "layers": 1, "context": 256, **shape}
    )


def data(store: Path, **more: Any) -> dict[str, Any]:
    """The `data` section over a store."""
    return {"sources": [{"store": str(store), **more.pop("source", {})}], **more}
