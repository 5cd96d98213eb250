"""A pipeline file with everything that it names read and checked, and its engines made; nothing is
started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prefab.factory.engines.base import make
from prefab.factory.engines.lifecycle import lazily
from prefab.factory.errors import ConfigError, Problem, StoreError
from prefab.factory.ledger import db
from prefab.factory.ledger import records as recorded
from prefab.factory.spec.constitution import load_constitutions
from prefab.factory.spec.templates import Template, critique_labels, load_template
from prefab.factory.spec.yamlio import did_you_mean
from prefab.factory.types import Constitution, Engine, Prompt
from prefab.judges import registry
from prefab.judges.base import Judge, JudgeConfig
from prefab.judges.kinds.critique import CritiqueConfig
from prefab.pipelines.config.prompts import Prompts
from prefab.pipelines.config.registries import Recipe
from prefab.pipelines.config.schema import (
    PipelineConfig,
    ReviseConfig,
    load_pipeline,
    make_pipeline,
)

WITHOUT_LABELS = "critique.jinja"  # the critique template of versions that read no labels
CRITIQUE_TEXT = "template critique"  # the name under which a run's texts hold it


if TYPE_CHECKING:
    from prefab.factory.ledger.ledger import Ledger
    from prefab.factory.ledger.records import Run


class PromptSource(Protocol):
    """Where a run's prompts come from; iterated once or often."""

    path: Path
    n_malformed: int
    problems: list[Problem]

    def __iter__(self) -> Iterator[Prompt]:
        """The prompts, in their order."""

    def summary(self) -> str:
        """One line for people about rows that were left out; empty when there are none."""


@dataclass(frozen=True, slots=True)
class ResolvedPipeline:
    """A pipeline file with everything that it names read and checked; nothing is started.

    `recipe` stands in for the one that the configuration names. `take_over` records what the run
    has from another one, before its first question; such a run learns no calibration of its own.
    """

    config: PipelineConfig
    resolved: dict[str, Any]
    constitution: Constitution
    templates: dict[str, Template]
    judges: list[Judge[Any]]
    revise: ReviseConfig | None
    critic: CritiqueConfig
    reviser: CritiqueConfig
    prompts: PromptSource
    recipe: Recipe | None = None
    take_over: Callable[[Ledger, Run], None] | None = None

    @property
    def texts(self) -> dict[str, str]:
        """What is stored beside a run's configuration: the words that decide what is asked."""
        return {
            "constitution": self.constitution.source,
            **{f"constitution file {name}": text for name, text in self.constitution.files},
            **{f"template {role}": template.text for role, template in self.templates.items()},
        }

    @property
    def revises(self) -> bool:
        """Whether drafts are criticised and revised."""
        return self.revise is not None and self.revise.rounds > 0

    @property
    def compares(self) -> bool:
        """Whether pairs are judged."""
        return self.config.recipe != "cai" and bool(self.judges)


def resolve_pipeline(
    source: str | Path | dict[str, Any], sets: Iterable[str] = ()
) -> ResolvedPipeline:
    """Read a pipeline and the files that it names. No engine is started.

    Args:
        source: A pipeline file, the name of a preset, or a dictionary with the same content.
        sets: Overrides of fields, for example `["policy.samples=8"]`.

    Raises:
        ConfigError: Every mistake in the pipeline and in the files that it names.
    """
    config, resolved = (
        make_pipeline(source, sets) if isinstance(source, dict) else load_pipeline(source, sets)
    )
    constitution = load_constitutions(
        [config.locate(name) for name in config.constitution], config.panel_settings().selection
    )
    judges = [registry.judge_of(_located(config, judge)) for judge in config.judges()]
    if config.recipe == "rlaif" and not judges:
        raise ConfigError(
            "the recipe rlaif compares answers: name at least one judge under panel.judges"
        )
    revise = config.revise or (ReviseConfig() if config.recipe == "cai" else None)
    critic, reviser = _critics(config, revise or ReviseConfig())
    templates = {
        "critique": _template(config, critic.template, "critique"),
        "revise": _template(config, critic.revise_template, "revise"),
    }
    for judge in judges:
        for role, (name, kind) in judge.templates().items():
            templates[role] = _template(config, name, kind)
    prompts = Prompts(config.prompts, config._base)
    return ResolvedPipeline(
        config, resolved, constitution, templates, judges, revise, critic, reviser, prompts
    )


def _critics(config: PipelineConfig, revise: ReviseConfig) -> tuple[CritiqueConfig, CritiqueConfig]:
    """One model with two templates: as critic at its own temperature and length, as reviser at
    those of revisions.
    """
    critic = config.critic_config()
    if "temperature" not in (config.critic or {}):
        critic = critic.model_copy(update={"temperature": revise.temperature})
    if "template" not in (config.critic or {}) and _asks_without_labels(Path(config.store)):
        critic = critic.model_copy(update={"template": WITHOUT_LABELS})
    longest = revise.max_tokens or config.policy.max_tokens
    return critic, critic.model_copy(
        update={"temperature": revise.temperature, "max_tokens": longest}
    )


def _asks_without_labels(store: Path) -> bool:
    """Whether the last run of this store that named no critique template asked for critiques
    without labels, as older versions did: its answers are used again.
    """
    if not (store / db.FILE).is_file():
        return False
    try:
        con = db.connect(store / db.FILE, readonly=True)
        try:
            runs = [
                run
                for run in recorded.runs(con)
                if CRITIQUE_TEXT in run.texts and "template" not in (run.config.get("critic") or {})
            ]
        finally:
            con.close()
    except StoreError:  # what opens the store says so
        return False
    last = max(runs, key=lambda run: run.last_start, default=None)
    return last is not None and not critique_labels(last.texts[CRITIQUE_TEXT])


def _located(config: PipelineConfig, judge: JudgeConfig) -> JudgeConfig:
    """The judge with its files as they are found from the pipeline file; the resolved configuration
    keeps their names.
    """
    files = registry.JUDGES[judge.model_dump()["kind"]].FILES
    named = judge.model_dump(include=set(files))
    return judge.model_copy(
        update={
            field: str(config.locate(name)) for field, name in named.items() if name is not None
        }
    )


def _template(config: PipelineConfig, name: str, kind: str) -> Template:
    path = config.locate(name)
    return load_template(path if path.is_file() else name, kind)


def pipeline_for(file: str | Path, constitution: Constitution) -> str | Path:
    """The pipeline whose judges are asked about a constitution where none is named: the file
    `pipeline.yaml` beside it, or the preset `demo` for the embedded world.

    Raises: ConfigError when there is none.
    """
    beside = Path(file).resolve().parent / "pipeline.yaml"
    if beside.exists():
        return beside
    if constitution.id == "microworld":
        return "demo"
    raise ConfigError(
        f"{file}: which judge shall be asked? There is no pipeline.yaml beside it; name a pipeline "
        "with --pipeline FILE (or the preset `real`, whose small model is near chance as a judge)"
    )


def make_engines(loaded: ResolvedPipeline) -> dict[str, Engine]:
    """The engines that some role of this pipeline uses, not yet started."""
    config = loaded.config
    used = {config.policy.engine}
    used |= {str(loaded.critic.engine)} if loaded.revises else set()
    used |= {judge.engine for judge in loaded.judges} if loaded.compares else set()
    return {
        name: lazily(_logged(config, make(config.engines[name], name)))
        for name in config.engines
        if name in used
    }


def make_programs(loaded: ResolvedPipeline) -> dict[str, Engine]:
    """The engines of the judges that have their own, each by the name `judge NAME`, not yet
    started.
    """
    programs = [judge for judge in loaded.judges if judge.own] if loaded.compares else []
    return {judge.engine: lazily(_logged(loaded.config, judge.own_engine())) for judge in programs}


def _logged(config: PipelineConfig, engine: Engine) -> Engine:
    """An engine whose server of its own writes its log beside the store, where there is one."""
    if Path(config.store).is_dir():
        engine.log_folder = Path(config.store) / "logs"
    return engine


def labels(loaded: ResolvedPipeline) -> dict[str, set[tuple[str, ...]]]:
    """By engine, the labels that its judges read."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for judge in loaded.judges if loaded.compares else ():
        if judge.labels():
            found.setdefault(judge.engine, set()).add(judge.labels())
    return found


def models(engines: dict[str, Engine]) -> dict[str, str]:
    """The identity of each engine's model, as a run's texts: other weights under the same name are
    another version of the run, so that one version never mixes two models' answers.
    """
    return {f"model {name}": engine.identity for name, engine in engines.items()}


# Of a configuration, what decides neither what is asked nor what is answered: where the store is,
# when a run stops, how an export is written; and of an engine, where its server is and how fast it
# is asked. The model that answers is among a run's texts (`models`).
INCIDENTAL = ("store", "budget", "export", "scale")
INCIDENTAL_OF_ENGINE = (
    *("base_url", "url", "urls", "port", "api_key_env", "log_file", "start_timeout_s"),
    *("gather_s", "poll_s"),
    *("max_in_flight", "batch", "timeout_s", "deadline_s", "retries", "down_after_s", "outage_s"),
    *("canary_every", "kv_cache_gib", "gpu_memory_utilization", "tensor_parallel", "threads"),
    *("device", "delay_s", "fail_every"),
)


def deciding(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that decides what is asked and what is answered. A run
    whose configuration differs in the rest only is the same run.
    """
    kept = {name: value for name, value in config.items() if name not in INCIDENTAL}
    kept["engines"] = {
        name: {field: value for field, value in engine.items() if field not in INCIDENTAL_OF_ENGINE}
        for name, engine in config.get("engines", {}).items()
    }
    return kept


def find_judge(loaded: ResolvedPipeline, name: str, kinds: tuple[str, ...]) -> Judge[Any]:
    """The judge of this name (without one, the panel's first), which must be of one of `kinds`.
    Raises: ConfigError.
    """
    names = [judge.name for judge in loaded.judges]
    if not names:
        raise ConfigError("this pipeline has no panel.judges to ask")
    if name and name not in names:
        raise ConfigError(f'no judge is named "{name}"; {did_you_mean(name, names)}')
    judge = loaded.judges[names.index(name) if name else 0]
    if judge.kind not in kinds:
        raise ConfigError(
            f"{judge.name!r} is of kind {judge.kind}; asked here are judges of kind {', '.join(kinds)}"
        )
    return judge
