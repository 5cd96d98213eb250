"""`prefab train online`: rounds of sample, judge, train, with judge and constitution fixed.

Each round is a run of the pipeline, NAME-round-R, with the policy of that round, and a training of
that policy on what the run made; its answers lie in the pipeline's store under the identity of the
weights that wrote them. Sampling, judging and training each go on where they were stopped, and a
round that has ended is written down, so the same command goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field, ValidationError

from prefab.factory.engines.base import resolve_model
from prefab.factory.engines.model_files import check_preset_output
from prefab.factory.errors import BudgetError, ConfigError, Problem
from prefab.factory.keys import digest, model_identity
from prefab.factory.spec import yamlio
from prefab.pipelines.config.checks import locate
from prefab.pipelines.config.loader import ResolvedPipeline, resolve_pipeline
from prefab.pipelines.config.schema import Id, PipelineConfig
from prefab.pipelines.training import stages as train_stages
from prefab.trainers.common import Strict, model_folder, record_eval, write_json
from prefab.trainers.registry import STAGES

ENGINE = "round-policy"  # the engine of a policy that was trained; judges and critic keep theirs
LOADS = ("vllm", "hf")  # engines that load weights from a folder


class OnlineConfig(Strict):
    """Rounds of online training, resolved."""

    pipeline: str = Field(
        description="The pipeline file whose prompts, judges, constitution and store every round has."
    )
    sets: list[str] = Field([], description="Overrides of it, as of `prefab run --set`.")
    name: Id | None = Field(
        None, description="Rounds are the runs NAME-round-R; left out: the pipeline's name."
    )
    out: str = Field(description="A folder for what is trained.")
    rounds: int = Field(
        3, ge=1, le=1000, description="May be raised later: the same command then goes on."
    )
    method: Literal["dpo", "ppo", "grpo"] = "dpo"
    model: str | None = Field(
        None, description="The first policy; left out: that of the pipeline's policy engine."
    )
    reference: Literal["first", "last"] = Field(
        "first",
        description="What the policy is held to: the first one, or the "
        "one that the round began with.",
    )
    rows: Literal["all", "round"] = Field(
        "all", description="Preferences of all rounds so far, or of the round alone."
    )
    source: dict[str, Any] = Field(
        {}, description="More fields of the data's sources, such as margin."
    )
    train: dict[str, Any] = Field(
        {}, description="The fields of the method's stage but model, reference and out."
    )
    reward: dict[str, Any] = Field(
        {},
        description="ppo and grpo without train.rewards: the fields of the reward model's stage, "
        "which is trained anew each round.",
    )


def train(path: Path, sets: Iterable[str] = (), quiet: bool = False) -> dict[str, Any]:
    """All rounds of a configuration file, or those that are left.

    Gives `rounds` (what each did), `policy` (the last one) and `stopped` (why before the last
    round, or nothing).
    Raises: ConfigError, EngineError, StoreError, TrainError, BudgetError, KeyboardInterrupt; what
    was done is kept.
    """
    document = train_stages.document(path, sets)
    config: OnlineConfig = yamlio.validate(document, OnlineConfig)
    file = locate(config.pipeline, path.parent)
    loaded = resolve_pipeline(file, config.sets)
    pipeline, first = loaded.config, first_policy(config, loaded.config)
    check_preset_output(first, "model")
    for round in (1, 2):  # mistakes are reported before any model call
        stages(config, pipeline, round, first, first, document)
    claim(config, loaded)
    policy, done = first, []
    for round in range(1, config.rounds + 1):
        row = ended(config, round) or one_round(
            config, pipeline, file, round, policy, first, document, quiet
        )
        done.append(row)
        policy = row["policy"]
        if row["stopped"]:
            break
    return {
        "rounds": done,
        "policy": policy,
        "stopped": done[-1]["stopped"],
        "store": pipeline.store,
    }


def first_policy(config: OnlineConfig, pipeline: PipelineConfig) -> str:
    """The model that round 1 samples. Raises: ConfigError for an engine that could not serve the
    later ones.
    """
    engine = pipeline.engines[pipeline.policy.engine]
    if engine["engine"] not in LOADS or engine.get("url") or engine.get("urls"):
        raise ConfigError(
            f"engines.{pipeline.policy.engine} of {config.pipeline}: each round serves the weights that the last "
            f"one trained, so it must be of engine: {' or '.join(LOADS)}, with a model and no url"
        )
    return config.model or str(engine["model"])


def _folder(config: OnlineConfig, round: int) -> Path:
    return Path(config.out) / f"round-{round}"


def _name(config: OnlineConfig, pipeline: PipelineConfig, round: int) -> str:
    return f"{config.name or pipeline.name}-round-{round}"


def claim(config: OnlineConfig, loaded: ResolvedPipeline) -> None:
    """The folder is this configuration's from now on. Raises: ConfigError where it is another's."""
    file = Path(config.out) / "online.json"
    fixed = digest(loaded.texts, loaded.resolved["panel"], loaded.resolved["prompts"])
    wanted = {
        **config.model_dump(mode="json", exclude={"rounds"}),
        "constitution, templates, judges or prompts": fixed,
    }
    if file.exists():
        there = orjson.loads(file.read_bytes())
        if changed := sorted(k for k in {*wanted, *there} if wanted.get(k) != there.get(k)):
            raise ConfigError(
                f"out: {config.out} holds rounds of another configuration (other {', '.join(changed)}). Name "
                "another folder, or delete this one to begin anew"
            )
    write_json(file, wanted)


def ended(config: OnlineConfig, round: int) -> dict[str, Any] | None:
    """What a round that has ended did. Raises: ConfigError when its policy is no longer what it
    trained.
    """
    file = _folder(config, round) / "round.json"
    if not file.exists():
        return None
    row: dict[str, Any] = orjson.loads(file.read_bytes())
    if model_identity(model_folder(row["policy"])) != row["trained"]:
        raise ConfigError(
            f"{row['policy']} is not what round {round} trained. Put it back, or delete {file.parent} and the "
            "later rounds to train them again"
        )
    return row


def overrides(config: OnlineConfig, pipeline: PipelineConfig, round: int, policy: str) -> list[str]:
    """The pipeline's overrides for a round: its name, and its policy on an engine of its own."""
    sets = [*config.sets, f"name={_name(config, pipeline, round)}"]
    engine = pipeline.engines[pipeline.policy.engine]
    if resolve_model(policy) == resolve_model(str(engine["model"])):
        return sets  # one engine for policy and judges where they are one model
    served = {k: v for k, v in engine.items() if k not in ("revision", "adapter")} | {
        "model": policy
    }
    sets += [
        f"engines.{ENGINE}={json.dumps(served)}",
        f"policy.engine={ENGINE}",
        f"critic.engine={pipeline.critic_config().engine}",
    ]
    return sets + [
        f"panel.judges.{i}.engine={judge.engine}"
        for i, judge in enumerate(pipeline.judges())
        if judge.engine
    ]


def sample(
    config: OnlineConfig, pipeline: PipelineConfig, file: Path, round: int, policy: str, quiet: bool
) -> dict[str, Any]:
    """The round's data: sampled, judged and in the store, once.

    Raises: BudgetError, KeyboardInterrupt for a run that was stopped; ConfigError where it made no
    pairs.
    """
    made = _folder(config, round) / "data.json"
    if made.exists():
        data: dict[str, Any] = orjson.loads(made.read_bytes())
        return data
    from prefab.pipelines.run.runner import run

    result = run(file, overrides(config, pipeline, round, policy), quiet)
    if result.state == "stopped":
        raise KeyboardInterrupt
    if result.state == "budget":
        raise BudgetError(f"round {round}: {result.reason}")
    train_stages.catch_up([pipeline.store])
    pairs = result.preferences.filter(result.preferences["outcome"].is_in(["a", "b"])).height
    row = {
        "round": round,
        "run": f"{result.name}@{result.version}",
        "sampled": policy,
        "weights": model_identity(model_folder(policy)),
        "asked": result.asked,
        "reused": result.reused,
        "failed": result.failed,
        "comparisons": result.preferences.height,
        "pairs": pairs,
    }
    write_json(made, row)
    return row


def stages(
    config: OnlineConfig,
    pipeline: PipelineConfig,
    round: int,
    policy: str,
    first: str,
    document: yamlio.Document,
) -> list[tuple[str, str, Any]]:
    """The trainings of a round in their order: each one's stage, the field with its settings, and
    its configuration.

    Raises: ConfigError with every mistake, where it stands in the file.
    """
    names = [
        _name(config, pipeline, r) for r in range(1 if config.rows == "all" else round, round + 1)
    ]
    folder, train = _folder(config, round), dict(config.train)

    def data(fields: dict[str, Any], names: list[str]) -> Any:
        more = fields.get("data") or {}
        if not isinstance(more, dict):
            return more  # which is refused below
        return {
            **more,
            "sources": [{"store": pipeline.store, "run": n, **config.source} for n in names],
        }

    made, wanted, problems = [], [], list[Problem]()
    if config.method != "dpo" and not train.get("rewards"):
        made.append(
            (
                "reward",
                "reward",
                {
                    "model": first,
                    **config.reward,
                    "out": str(folder / "reward"),
                    "data": data(config.reward, names),
                },
            )
        )
        train["rewards"] = [
            {"name": "preference", "kind": "model", "paths": [str(folder / "reward")]}
        ]
    held = {"reference": first} if config.reference == "first" and round > 1 else {}
    made.append(
        (
            config.method,
            "train",
            {
                "store": pipeline.store,
                **train,
                **held,
                "model": policy,
                "out": str(folder / config.method),
                "data": data(train, names if config.method == "dpo" else names[-1:]),
            },
        )
    )
    for stage, part, value in made:
        model = STAGES[stage].config
        try:
            checked = model.model_validate(value)
        except ValidationError as error:
            problems += yamlio.model_problems(error, document, model, _as_written(part))
            continue
        checked.data.written_as(f"{part}.data", "source")
        wanted.append((stage, part, checked))
    if problems:
        raise ConfigError(yamlio.tidy(problems))
    return wanted


def _as_written(part: str) -> Callable[[yamlio.Path_], yamlio.Path_]:
    """Where a field of a stage, whose settings are the field `part`, stands in the file."""

    def place(path: yamlio.Path_) -> yamlio.Path_:
        if path[:2] == ("data", "sources"):
            return ("source", *path[3:])
        return path if path[:1] in (("model",), ("out",)) else (part, *path)

    return place


@contextmanager
def _errors_as_written(stage: str, part: str, document: yamlio.Document) -> Iterator[None]:
    """Mistakes that a stage finds in its configuration, with the fields as they stand in the
    file.
    """

    def written(problem: Problem) -> Problem:
        found = re.match(r"([a-z_]+)([a-z_.]*): ", problem.message)
        if problem.file or not found or found[1] not in STAGES[stage].config.model_fields:
            return problem
        path = tuple((found[1] + found[2]).split("."))
        return document.problem(_as_written(part)(path), problem.message[found.end() :])

    try:
        yield
    except ConfigError as error:
        raise ConfigError([*map(written, error.problems)]) from error


def one_round(
    config: OnlineConfig,
    pipeline: PipelineConfig,
    file: Path,
    round: int,
    policy: str,
    first: str,
    document: yamlio.Document,
    quiet: bool,
) -> dict[str, Any]:
    """Sample, judge, train, and write down what was done."""
    row = sample(config, pipeline, file, round, policy, quiet)
    for stage, part, settings in stages(config, pipeline, round, policy, first, document):
        with _errors_as_written(stage, part, document):
            done = train_stages.fit(stage, settings, quiet)
        row |= {
            "policy": str(Path(settings.out) / STAGES[stage].model),
            "metrics": done["last"] if STAGES[stage].with_rewards else done["metrics"],
            "stopped": done.get("stopped", ""),
        }
    row["trained"] = model_identity(model_folder(row["policy"]))
    record_eval(
        pipeline.store,
        "online",
        row["run"],
        row["metrics"],
        method=config.method,
        round=round,
        weights=row["weights"],
        trained=row["trained"],
    )
    write_json(_folder(config, round) / "round.json", row)
    return row
