"""An engine that knows which sample is the good one, for every kind of judge: it looks for it in
what it is shown."""

from __future__ import annotations

import re
from math import log

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.types import Completion, Request

KINDS = {
    "pairwise": {"kind": "pairwise"},
    "reasoning": {"kind": "pairwise", "reasoning": True},
    "pointwise": {"kind": "pointwise"},
    "scale": {"kind": "pointwise", "low": 2, "high": 9, "repeats": 2},
    "rubric": {"kind": "rubric"},
    "listwise": {"kind": "listwise"},
}
SEEN = re.compile(r"(good|bad \d) answer")


def read(labels: tuple[str, ...], wanted: str, p: float = 0.9) -> Completion:
    """A label read with this probability on one label and the rest of 0.99 spread evenly."""
    rest = (0.99 - p) / (len(labels) - 1)
    return Completion(
        wanted,
        "length",
        {label: log(p if label == wanted else rest) for label in labels},
        "exact",
        20,
        1,
    )


def answer(request: Request, good: int = 1) -> Completion:
    """Samples of which number `good` is good; every judge sees that."""
    text, labels = request.messages[-1].content, request.labels
    if not labels and request.messages[0].role != "system":
        k = request.repeat[0]
        return Completion(
            f"{'good' if k == good else f'bad {k}'} answer to {text}", "stop", None, "exact", 5, 4
        )
    seen = SEEN.findall("\n".join(m.content for m in request.messages if m.role == "user"))
    if not labels and "Reply with the numbers" in text:
        order = sorted(range(len(seen)), key=lambda i: (seen[i] != "good", seen[i]))
        return Completion(" > ".join(str(i + 1) for i in order), "stop", None, "exact", 30, 9)
    if not labels:
        return Completion("One of them is better.", "stop", None, "exact", 30, 9)
    if "A" in labels:
        return read(labels, "T" if "good" not in seen else "A" if seen[0] == "good" else "B")
    if (
        "Yes" in labels
    ):  # a statement of fault is true of the bad ones; one that helps, of the good one
        return read(labels, "Yes" if (seen == ["good"]) == ("helps" in text) else "No")
    return read(labels, "9" if seen == ["good"] else "2")


def engine(good: int = 1, say=None, **config) -> dict[str, Scripted]:
    """The engine under the name that `project.pipeline` uses; `say(request)` may answer first."""
    return {
        "local": Scripted(ScriptedConfig(**config), lambda r: (say and say(r)) or answer(r, good))
    }


def panel(names, **settings):
    """The configuration of a panel with a judge of each of these kinds."""
    return {"judges": [{"name": name, **KINDS[name]} for name in names], **settings}


def two_engines(good=1, say=None, **config):
    """A strong engine that is right, and a cheap one that is, for odd prompts, nearly even and
    leans the wrong way."""

    def cheap(request):
        said = say(request) if say else None
        if said or "A" not in request.labels:
            return said
        text = request.messages[-1].content
        if not any(f"Question {i}?" in text for i in range(1, 100, 2)):
            return None
        seen = SEEN.findall(text)
        if "good" not in seen:
            return read(request.labels, "A" if seen[0] < seen[1] else "B")
        p = {"A": 0.5, "B": 0.4} if seen[0] != "good" else {"A": 0.4, "B": 0.5}
        return read(request.labels, max(p, key=p.get), 0.4)

    return {
        **engine(good, cheap, model="local", **config),
        "big": Scripted(ScriptedConfig(model="big", **config), lambda r: answer(r, good)),
    }
