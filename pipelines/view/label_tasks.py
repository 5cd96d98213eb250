"""What people may label of a large run, as JSON: `python -m prefab.pipelines.view.label_tasks STORE
RUN FIRST PRINCIPLE`. In a process of its own: it takes seconds and much memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import orjson

from prefab.factory.errors import PrefabError
from prefab.judges.kinds import human
from prefab.pipelines.quality.labeling import First, Task, tasks

SAMPLE = 1000  # prompts of a run with more, from which people are asked


def task_of(value: dict[str, Any], annotator: str) -> Task:
    """A task as it was written, for a person: it is the person that decides which answer is shown
    first.
    """
    value["conversation"] = tuple((role, text) for role, text in value["conversation"])
    value["names"] = tuple(value["names"])
    task = Task(**value)
    order = human.shown_order(0, annotator, task.place)
    return Task(**{**value, "order": order})


if __name__ == "__main__":
    store, run, first, principle = sys.argv[1:]
    under = [principle] if principle else []
    try:
        found = tasks(Path(store), run, "", cast("First", first), 0, under, SAMPLE)
    except PrefabError as error:
        sys.exit(str(error))
    sys.stdout.buffer.write(orjson.dumps(found))
