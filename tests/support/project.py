"""A small project for the tests of pipelines, commands and exports: two principles, a few prompts,
the scripted engine."""

from __future__ import annotations

import json
from math import log
from pathlib import Path
from typing import Any

import yaml

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.types import Completion, Request

CONSTITUTION: dict[str, Any] = {
    "id": "small",
    "title": "Small",
    "licence": "CC0-1.0",
    "selection": "all",
    "principles": [
        {
            "id": "kind",
            "title": "Kind",
            "compare": "Which answer is kinder?",
            "critique": "Name what is unkind.",
            "revise": "Make it kind.",
            "criterion": "The answer is unkind.",
        },
        {
            "id": "brief",
            "title": "Brief",
            "compare": "Which answer is briefer?",
            "critique": "Name what is long.",
            "revise": "Make it brief.",
            "criterion": "The answer is long.",
        },
    ],
}


def pipeline(folder: Path, prompts: int = 6, **changes: Any) -> dict[str, Any]:
    """A pipeline as a dictionary, with its constitution and prompts written to `folder`."""
    (folder / "small.yaml").write_text(yaml.safe_dump(CONSTITUTION, sort_keys=False))
    rows = [{"id": f"p{i}", "prompt": f"Question {i}?", "group": f"g{i}"} for i in range(prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "recipe": "rlaif",
        "name": "small",
        "store": str(folder / "store"),
        "constitution": str(folder / "small.yaml"),
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "engines": {"local": {"engine": "scripted"}},
        "policy": {"engine": "local", "samples": 3, "temperature": 1.0, "max_tokens": 32},
        "panel": {"judges": [{"name": "judge", "kind": "pairwise"}]},
        **changes,
    }


def write(folder: Path, value: dict[str, Any], name: str = "pipeline.yaml") -> Path:
    """The pipeline as a file."""
    (folder / name).write_text(yaml.safe_dump(value, sort_keys=False))
    return folder / name


def asked(request: Request) -> str:
    """What kind of question this is: sample, judge, critique, revise or reason."""
    if "Fault" in request.labels:
        return "critique"
    if request.labels or request.messages[0].role != "system":
        return "judge" if request.labels else "sample"
    text = request.messages[-1].content
    return (
        "critique"
        if "Reply with None" in text
        else "revise"
        if "Reply with the new answer" in text
        else "reason"
    )


def answer(request: Request) -> Completion:
    """Samples `draft K of ...`; the critic finds every draft unkind once; judges prefer the first
    slot a little, and the draft of the lower number much."""
    text, kind = "\n".join(m.content for m in request.messages), asked(request)
    if kind == "sample":
        return Completion(f"draft {request.repeat[0]} of {text}", "stop", None, "exact", 5, 4)
    if kind == "critique":
        fault = "unkind" in text and "draft" in text
        said = "Fault: it is unkind." if fault else "None."
        p = {"None": 0.2, "Fault": 0.6} if fault else {"None": 0.72, "Fault": 0.08}
        logps = {label: log(p.get(label, 1e-9)) for label in request.labels} or None
        return Completion(said, "stop", logps, "exact", 9, 3)
    if kind == "revise":
        return Completion("mended " + text.split("draft ")[1][0], "stop", None, "exact", 9, 2)
    first, second = (int(part[0]) for part in text.split("draft ")[1:3])
    return judgment(0.8 if first < second else 0.3)


def judgment(a: float) -> Completion:
    """A comparison that gives the first slot this probability, and a tie 0.04."""
    masses = {"A": a, " A": 1e-3, "B": 0.95 - a, " B": 1e-3, "T": 0.04, " T": 1e-3}
    logps = {label: log(mass) for label, mass in masses.items()}
    return Completion("A", "length", logps, "exact", 20, 1)


def engine(**config: Any) -> dict[str, Scripted]:
    """The scripted engine with the answers above, under the name that `pipeline` uses."""
    return {"local": Scripted(ScriptedConfig(**config), answer)}
