"""Judge the comparisons of a run again, under another constitution.

A rejudged run has the same prompts, answers and pairs as its source; only the judges are asked. Its
answers stand in the same ledger, so that a question that some run asked before is not asked again,
and a later run under the new constitution finds what was asked here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.keys import digest
from prefab.factory.ledger.ledger import Ledger
from prefab.factory.ledger.records import Run
from prefab.factory.spec.constitution import parse_constitution
from prefab.factory.store.store import Read, one_connection
from prefab.factory.tool_calls import answer_in_context, stored_messages
from prefab.factory.types import Constitution, Engine, Prompt, Sample
from prefab.factory.uses import DraftUse, RevisionUse
from prefab.judges.base import Pair
from prefab.pipelines.config.loader import ResolvedPipeline, pipeline_for, resolve_pipeline
from prefab.pipelines.run.context import Context
from prefab.pipelines.run.escalation import judged
from prefab.pipelines.run.rlaif import ask_about
from prefab.pipelines.run.runner import RunResult, run_loaded
from prefab.pipelines.store.calibrations import record_of
from prefab.pipelines.store.export.base import find_run
from prefab.pipelines.store.fill import query, read_filled

if TYPE_CHECKING:
    import polars

RECIPE = "rejudge"


@dataclass(frozen=True, slots=True)
class Origin:
    """The call that gave an answer; empty for an imported one, which is told by its text and its
    context (the turns between prompt and answer, as the store has them).
    """

    call: bytes
    text: str
    context: str


@dataclass(frozen=True, slots=True)
class RecordedPrompt(Prompt):
    """A prompt with the answers that a run has of it as judges see them, where each comes from, and
    the pairs that it compared.
    """

    samples: tuple[Sample, ...] = ()
    origins: tuple[Origin, ...] = ()  # in the order of `samples`
    pairs: tuple[Pair, ...] = ()


class Panel:
    """The comparisons of a run: its prompts, as a pipeline's `prompts`, and what its readings were
    calibrated by (an evaluation's record; empty: they are not calibrated).
    """

    def __init__(
        self,
        store: Path,
        run: Mapping[str, Any],
        prompts: list[RecordedPrompt],
        calibration: Mapping[str, Any],
    ) -> None:
        self.path, self.run, self.prompts, self.calibration = store, run, prompts, calibration
        self.n_malformed, self.problems = 0, list[Problem]()

    def __iter__(self) -> Iterator[RecordedPrompt]:
        """The prompts, in the order of their ids."""
        return iter(self.prompts)

    @property
    def source(self) -> str:
        """The run that the comparisons come from, as NAME@VERSION."""
        return f"{self.run['name']}@{self.run['version']}"

    @property
    def imported(self) -> bool:
        """Whether the answers were imported, so that no model call gave them."""
        return bool(self.run["recipe"] == "import")

    @property
    def n_pairs(self) -> int:
        """How many comparisons there are."""
        return sum(len(prompt.pairs) for prompt in self.prompts)

    @property
    def digest(self) -> str:
        """Changes when another comparison is among them."""
        return digest(*(f"{p.id} {pair}" for p in self.prompts for pair in p.pairs))

    @property
    def constitution(self) -> Constitution:
        """The constitution of the run, as it was when the run was made."""
        sql = "SELECT source FROM constitutions WHERE constitution = $name"
        rows = query(self.path, sql, {"name": self.run["constitution"]})
        if rows.is_empty():
            raise ConfigError(f"{self.source} has no constitution: name both versions, OLD and NEW")
        return parse_constitution(rows["source"][0], f"the constitution of {self.source}")

    def summary(self) -> str:
        """Nothing is malformed."""
        return ""


_PAIRS = "SELECT prompt, a, b FROM preferences WHERE run = $run AND NOT identical ORDER BY ALL"
_SAMPLES = """
SELECT s.prompt, s."index", s.parent, s.round, s.principle, s.text, s.finish, s.call, s.context
FROM samples s WHERE s.run = $run AND s.text IS NOT NULL ORDER BY s.prompt, s."index" """
_PROMPTS = """
SELECT q.prompt, q.messages, q.tags, q."group", q.split, q.rubric FROM prompts q
WHERE q.prompt IN (SELECT DISTINCT prompt FROM preferences WHERE run = $run) ORDER BY q.prompt"""


@one_connection()
def panel_of(store: Path, run: str = "", sample: int | None = None, seed: int = 0) -> Panel:
    """The comparisons of a run that can be judged again.

    Args:
        store: The store.
        run: NAME or NAME@VERSION; default: the latest run.
        sample: At most so many comparisons, chosen by `seed`; default: all.
        seed: Seed of the choice; the same seed chooses the same comparisons.

    Raises:
        ConfigError: There is no such run, or it has no comparison.
    """
    return read_filled(store, partial(_panel, store, find_run(store, run), sample, seed))


def _panel(
    store: Path, record: Mapping[str, Any], sample: int | None, seed: int, read: Read
) -> Panel:
    """The comparisons of a run, from the open store."""
    values = {"run": record["run"]}
    chosen = _choose(read(_PAIRS, values).rows(), sample, seed)
    if not chosen:
        raise ConfigError(
            f"{record['name']}@{record['version']} in {store} has no comparison to judge again. "
            "Finish it with `prefab run`, or name another run with --run"
        )
    imported = record["recipe"] == "import"
    samples, found = _samples(read(_SAMPLES, values)), []
    for name, messages, tags, group, split, rubric in read(_PROMPTS, values).rows():
        if pairs := chosen.get(name):
            some = samples[name] if imported else {i for pair in pairs for i in pair}
            shown = [samples[name][i] for i in sorted(some)]
            found.append(
                RecordedPrompt(
                    name,
                    stored_messages(messages),
                    tuple(tags),
                    group,
                    split,
                    tuple((line, points) for line, points in json.loads(rubric or "[]")),
                    tuple(one for one, _ in shown),
                    tuple(origin for _, origin in shown),
                    tuple(pairs),
                )
            )
    return Panel(store, record, found, record_of(store, record["run"], read) or {})


def _samples(rows: polars.DataFrame) -> dict[str, dict[int, tuple[Sample, Origin]]]:
    """The rows of `_SAMPLES` by prompt and index, each with its origin."""
    found: dict[str, dict[int, tuple[Sample, Origin]]] = {}
    for prompt, index, parent, round, principle, text, finish, call, context in rows.rows():
        seen = answer_in_context(stored_messages(context or "[]"), text)
        made = Sample(prompt, index, seen, finish, parent, round, principle)
        origin = Origin(bytes.fromhex(call or ""), text, context or "")
        found.setdefault(prompt, {})[index] = made, origin
    return found


def _choose(
    rows: Sequence[tuple[str, int, int]], sample: int | None, seed: int
) -> dict[str, list[Pair]]:
    """Pairs by prompt; with `sample`, those whose digest under `seed` is least."""
    if sample is not None:
        least = sorted(rows, key=lambda row: blake2b(repr((seed, row)).encode()).digest())
        rows = sorted(least[:sample])
    chosen: dict[str, list[Pair]] = {}
    for prompt, a, b in rows:
        chosen.setdefault(prompt, []).append((a, b))
    return chosen


def pipeline_of(
    panel: Panel,
    pipeline: str | Path | None,
    sets: Sequence[str],
    constitution: tuple[str | Path, Constitution] | None = None,
) -> ResolvedPipeline:
    """The pipeline whose judges judge the panel: a file, or else the run's own configuration; for
    imported pairs the one of the `constitution` (its file, and what it says).

    Raises: ConfigError when there is none, it cannot be read, or has no judges.
    """
    if panel.imported and not pipeline and constitution:
        pipeline = pipeline_for(*constitution)
    try:
        loaded = resolve_pipeline(pipeline or json.loads(panel.run["config"]), sets)
    except ConfigError as error:
        if pipeline:
            raise
        words = (
            f"the configuration of {panel.source} cannot be used from this folder; "
            "name its pipeline file with --pipeline"
        )
        raise ConfigError([Problem("", 0, 0, "", words), *error.problems]) from error
    if not loaded.judges:
        raise ConfigError(f"{loaded.config.name} has no panel.judges, so nothing can be judged")
    return loaded


def rejudge(
    panel: Panel,
    constitution: Constitution,
    loaded: ResolvedPipeline,
    quiet: bool = True,
    engines: dict[str, Engine] | None = None,
) -> RunResult:
    """Judge the panel's comparisons under a constitution, as a run of its own in the same store.

    Args:
        panel: The comparisons, from `panel_of`.
        constitution: The constitution to judge under.
        loaded: The pipeline whose judges are asked, from `pipeline_of`.
        quiet: Do not show progress.
        engines: Engines to use in place of those that the pipeline would start, by name.

    Raises:
        EngineError: An engine does not start or fails.
        StoreError: The store is damaged.
    """
    return run_loaded(rejudging(panel, constitution, loaded), quiet, engines)


def rejudging(
    panel: Panel, constitution: Constitution, loaded: ResolvedPipeline
) -> ResolvedPipeline:
    """The pipeline that judges the panel under this constitution. Its run is told apart by the
    source run, the comparisons and the constitution. By the source run's own judges, its readings
    become a probability as theirs do, so that the two can be compared.
    """
    name = f"{panel.run['name'][:54]}-{RECIPE}"
    unlimited = loaded.config.budget.model_copy(
        update={"unscored": None, "calls": None, "tokens": None}
    )
    update = {"name": name, "store": str(panel.path), "budget": unlimited}
    described = {
        "recipe": RECIPE,
        "name": name,
        "constitution": constitution.id,
        "source": {"run": panel.source, "comparisons": panel.n_pairs, "digest": panel.digest},
    }
    if panel.imported:
        described["prompts"] = {"source": panel.source}
    return replace(
        loaded,
        config=loaded.config.model_copy(update=update),
        resolved={**loaded.resolved, **described},
        constitution=constitution,
        revise=None,
        prompts=panel,
        recipe=compare_again,
        take_over=partial(
            _take_over,
            panel,
            panel.calibration if _same_reading(panel, loaded, constitution) else {},
        ),
    )


def _take_over(panel: Panel, calibration: Mapping[str, Any], ledger: Ledger, record: Run) -> None:
    """Record the calibration, and answers that no call gave, as those of this run."""
    if calibration:
        own = {"run": record.id, "subject": f"{record.name}@{record.version}"}
        ledger.add_eval({**calibration, **own})
    if panel.imported:
        answers = {p.id: [(one.text, one.context) for one in p.origins] for p in panel}
        ledger.add_answers(record.id, answers)


def _same_reading(panel: Panel, loaded: ResolvedPipeline, constitution: Constitution) -> bool:
    """Whether the pipeline's panel is that of the run, and combines the readings of principles."""
    own: dict[str, Any] = json.loads(panel.run["config"]).get("panel") or {}
    selection = own.get("selection") or constitution.selection
    return own == loaded.resolved["panel"] and selection != "lexicographic"


async def compare_again(prompt: Prompt, ctx: Context) -> None:
    """Record the answers that are there, and put the recorded pairs to the panel of judges."""
    assert isinstance(prompt, RecordedPrompt)
    for sample, origin in zip(prompt.samples, prompt.origins, strict=True):
        if origin.call:
            ctx.note(_use(sample, ctx.run), origin.call)
    at = {sample.index: sample for sample in prompt.samples}
    pairs = [(at[a], at[b]) for a, b in prompt.pairs]
    await judged(prompt, ask_about(prompt, pairs, ctx), ctx)


def _use(sample: Sample, run: int) -> DraftUse | RevisionUse:
    if sample.parent < 0:
        return DraftUse(run, sample.prompt, sample.index)
    place = (sample.index, sample.parent, sample.principle, sample.round)
    return RevisionUse(run, sample.prompt, *place)
