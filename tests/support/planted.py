"""An engine that knows which sample is the good one, for every kind of judge: it looks for it in
what it is shown."""

from __future__ import annotations

import re
from math import log

from prefab.factory.engines.scripted import Scripted, ScriptedConfig
from prefab.factory.types import Completion, Request

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
