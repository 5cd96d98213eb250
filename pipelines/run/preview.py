"""Run a few prompts of a pipeline into a store of their own, and show every step of each.

The store is `STORE/preview`, so that no statistic or export of the pipeline's runs meets these
answers, and a second preview asks only what an edit has changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from prefab.factory.errors import Problem
from prefab.factory.types import Engine, Prompt
from prefab.judges.base import NO_ORDER
from prefab.pipelines.config.loader import ResolvedPipeline, resolve_pipeline
from prefab.pipelines.run.runner import RunResult, run_loaded

READ = 1_000  # prompts of the source to choose from
FOLDER = "preview"


@dataclass(slots=True)
class Step:
    """One step of a prompt: what was done, its facts, and the text that came of it."""

    title: str
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class PreviewedPrompt:
    """A prompt with every step, in the order of the recipe: drafts, critiques, revisions, verdicts,
    preferences.
    """

    prompt: str
    text: str
    steps: list[Step]


@dataclass(slots=True)
class Preview:
    """A few prompts of a pipeline, run through. `store` has everything."""

    run: str
    store: str
    prompts: list[PreviewedPrompt]
    asked: int
    reused: int
    failed: int
    unscored: dict[str, int]

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class _Few:
    """A few prompts of a source, as a pipeline's `prompts`."""

    def __init__(self, source: Any, n: int, seed: int) -> None:
        self.source = source

        def place(prompt: Prompt) -> bytes:
            return blake2b(f"{seed}\0{prompt.id}".encode()).digest()

        self.prompts = sorted(islice(source, READ), key=place)[:n]
        self.path, self.n_malformed, self.problems = source.path, 0, list[Problem]()

    def __iter__(self) -> Iterator[Prompt]:
        """The chosen prompts."""
        return iter(self.prompts)

    def summary(self) -> str:
        """Rows of the source that were left out."""
        found: str = self.source.summary()
        return found


def preview(
    pipeline: str | Path | dict[str, Any],
    n: int = 5,
    sets: Sequence[str] = (),
    seed: int = 0,
    engines: dict[str, Engine] | None = None,
    quiet: bool = True,
) -> Preview:
    """Run a few prompts into `STORE/preview` and give every step of each.

    Args:
        pipeline: A pipeline file, the name of a preset, or a dictionary with the same content.
        n: How many prompts, chosen at random from the first 1,000.
        sets: Overrides of fields, for example `["policy.samples=8"]`.
        seed: Of the choice.
        engines: Engines to use in place of those that the pipeline would start, by name.
        quiet: Do not show progress.

    Raises:
        ConfigError: Every mistake in the pipeline and in the files that it names.
        EngineError: An engine does not start or fails.
    """
    loaded = resolve_pipeline(pipeline, sets)
    result = run_loaded(_previewing(loaded, n, seed), quiet, engines)
    return Preview(
        f"{result.name}@{result.version}",
        str(result.store),
        _steps(result),
        result.asked,
        result.reused,
        result.failed,
        result.unscored,
    )


def _previewing(loaded: ResolvedPipeline, n: int, seed: int) -> ResolvedPipeline:
    """The pipeline on a few prompts, in its own store, without a budget of unscored answers."""
    store = str(Path(loaded.config.store) / FOLDER)
    free = loaded.config.budget.model_copy(update={"unscored": None, "failed": None})
    prompts = _Few(loaded.prompts, n, seed)
    chosen = [prompt.id for prompt in prompts]
    return replace(
        loaded,
        config=loaded.config.model_copy(update={"store": store, "budget": free}),
        resolved={**loaded.resolved, "store": store, "preview": chosen},
        prompts=prompts,
    )


def _steps(result: RunResult) -> list[PreviewedPrompt]:
    """Every prompt of the run with its steps."""
    from prefab.pipelines.store.fill import query

    sql = (
        "SELECT prompt, text FROM prompts WHERE prompt IN (SELECT prompt FROM samples WHERE "
        f"run = {result.run})"
    )
    texts = dict(query(result.store, sql).iter_rows())
    tables = [
        *((result.samples, _sample), (result.critiques, _critique)),
        *((result.verdicts, _verdict), (result.preferences, _preference)),
    ]
    found = []
    for prompt in sorted(texts):
        steps: list[tuple[tuple[int, ...], Step]] = []
        for frame, step in tables:
            rows = frame.filter(frame["prompt"] == prompt).iter_rows(named=True)
            steps += [step(row) for row in rows]
        steps.sort(key=lambda one: one[0])
        found.append(PreviewedPrompt(prompt, texts[prompt] or "", [step for _, step in steps]))
    return found


def _sample(row: dict[str, Any]) -> tuple[tuple[int, ...], Step]:
    facts = {"finish": row["finish"], "unscored": row["reason"]}
    if row["parent"] < 0:
        return (0, row["index"]), Step(f"draft {row['index']}", row["text"] or "", facts)
    title = f"revision {row['index']} of {row['parent']} under {row['principle']}"
    return (1, row["round"], row["index"], 1), Step(title, row["text"] or "", facts)


def _critique(row: dict[str, Any]) -> tuple[tuple[int, ...], Step]:
    word = {True: "a fault", False: "no fault", None: "unreadable"}[row["fault"]]
    title = f"critique of {row['index']} under {row['principle']}: {word}"
    facts = {"unscored": row["reason"]}
    return (1, row["round"], row["index"], 0), Step(title, row["text"] or "", facts)


def _verdict(row: dict[str, Any]) -> tuple[tuple[int, ...], Step]:
    shown = {"ab": "first shown first", "ba": "second shown first", NO_ORDER: ""}
    order = shown.get(row["order"], "")
    title = (
        f"{row['judge']} on {row['a']} and {row['b']}"
        f"{' under ' + row['principle'] if row['principle'] else ''}"
        f"{', ' + order if order else ''}: {_winner(row, row['winner'])}"
    )
    facts = {f"P({row['a']})": row["p_a"], "label mass": row["mass"], "unscored": row["reason"]}
    return (2, row["a"], row["b"], 0), Step(title, "", facts)


def _preference(row: dict[str, Any]) -> tuple[tuple[int, ...], Step]:
    title = f"preference between {row['a']} and {row['b']}: {_winner(row, row['outcome'])}"
    facts = {
        "p_chosen": row["p_chosen"],
        "readings": row["n_readings"],
        "identical": row["identical"] or None,
    }
    return (2, row["a"], row["b"], 1), Step(title, "", facts)


def _winner(row: dict[str, Any], outcome: str | None) -> str:
    """The number of the answer that won, or tie or unscored."""
    return {"a": str(row["a"]), "b": str(row["b"]), "tie": "tie"}.get(outcome or "", "unscored")
