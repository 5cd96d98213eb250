"""The pipeline file: one model for the whole YAML, `--set` overrides, and every mistake at once.

`python -m prefab.pipelines.config.schema --schema` writes `pipelines/config/pipeline.schema.json`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PrivateAttr,
    StringConstraints,
    WithJsonSchema,
)

from prefab.factory.engines.base import ENGINES
from prefab.factory.errors import Problem
from prefab.factory.paths import PACKAGE
from prefab.factory.spec import yamlio
from prefab.factory.steps import Separator
from prefab.judges import registry
from prefab.judges.base import JudgeConfig
from prefab.judges.kinds.critique import CritiqueConfig
from prefab.pipelines.config import checks
from prefab.pipelines.config.checks import locate
from prefab.pipelines.config.kinds import BUNDLED_ONLY, KindName, OneOf, checked_raw, config_class
from prefab.pipelines.config.registries import FORMATS, RECIPES

SCHEMA_PATH = PACKAGE / "pipelines" / "pipeline.schema.json"

Id = Annotated[str, StringConstraints(pattern=yamlio.ID_PATTERN, max_length=64)]
Text = Annotated[str, StringConstraints(pattern=r"\S")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


EngineField = Annotated[Any, OneOf(ENGINES, "engine", "engine", keep_raw=True)]
JudgeField = Annotated[Any, OneOf(registry.JUDGES, "kind", "kind of judge")]
CriticField = Annotated[
    dict[str, Any],
    BeforeValidator(checked_raw(CritiqueConfig)),
    WithJsonSchema(CritiqueConfig.model_json_schema()),
]


# One name stays a text in the resolved configuration, which is the identity of a run.
ConstitutionNames = Annotated[
    list[Text],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    PlainSerializer(lambda names: names[0] if len(names) == 1 else names),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"\S"},
                {"type": "array", "items": {"type": "string", "pattern": r"\S"}, "minItems": 1},
            ]
        }
    ),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PromptsConfig(_Strict):
    """Where the prompts come from."""

    source: Text = Field(
        description="A .jsonl, .json, .csv or .parquet file, a folder or a pattern of such files, an address (hf://, s3://, "
        "https://), a `datasets` folder, or `microworld`."
    )
    limit: int | None = Field(None, ge=1, description="Take the first so many; left out: all.")
    column: Text | None = Field(
        None,
        description="The field that holds the prompt; left out: prompt, messages or "
        "conversations, whichever there is.",
    )
    split: Literal["train", "val", "test", "train+val"] | None = Field(
        None,
        description="Only rows of this split; left out: all. train+val of the microworld: every fifth prompt is of "
        "val, on which `p_chosen` is calibrated.",
    )
    cut_answer: bool = Field(
        False, description="Drop the assistant turns that end a conversation (SFT data)."
    )
    seed: int = Field(0, description="Of the microworld's prompts.")


class PolicyConfig(_Strict):
    """The model whose answers are improved, and how it is sampled."""

    engine: Id
    samples: int = Field(4, ge=1, le=1024)
    temperature: Temperature = 1.0
    max_tokens: int = Field(512, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: all tokens.")
    min_p: Share = 0.0
    stop: list[str] = Field([], max_length=16)
    template_kwargs: dict[str, Any] = Field(
        {}, description="For the model's chat template, such as enable_thinking."
    )


class ReviseConfig(_Strict):
    """Critique and revision. `sweep` criticises under every principle and revises where a fault is
    named.
    """

    rounds: int = Field(1, ge=0, le=64)
    select: Literal["sweep", "draw"] = "sweep"
    temperature: Temperature = 0.0
    max_tokens: int | None = Field(None, ge=1, description="Of a revision; left out: the policy's.")
    min_p_fault: Share = Field(
        0.0,
        exclude_if=lambda value: value == 0.0,
        description="A fault that is less probable at the critique's first word is not revised; one "
        "without a probability always is.",
    )


class StepsConfig(_Strict):
    """What a step of an answer is, and what a judge is shown of it."""

    by: Separator = Field("line", description="line: each line; paragraph: parted by blank lines.")
    shows: Literal["prefix", "step"] = Field(
        "prefix", description="prefix: the answer up to the end of the step; step: that alone."
    )


class WhenConfig(_Strict):
    """What calls for a stronger judge. What the others could not score always does."""

    margin: float | None = Field(
        0.2,
        ge=0,
        le=0.5,
        allow_inf_nan=False,
        description="So close to a half is unsure; null: not by margin.",
    )
    disagreement: bool = Field(True, description="When the other judges pick different sides.")


class EscalateConfig(_Strict):
    """Judges that are asked only where the others are unsure, divided, or could not be read."""

    to: list[Text] = Field(
        min_length=1, description="Names of the stronger judges, among the panel's."
    )
    when: WhenConfig = WhenConfig()
    max_share: Share = Field(
        1.0,
        description="Of a prompt's comparisons, the least certain first; a fraction of one is "
        "drawn from the prompt's identity. In the mean never more than this share.",
    )
    decides: Literal["strong", "all"] = Field(
        "strong", description="Whose readings make the preference where a stronger judge was asked."
    )


class PanelConfig(_Strict):
    """Who judges, and how their verdicts become a preference."""

    judges: list[JudgeField] = Field(
        min_length=1, description="Each has name and kind, and the fields of that kind."
    )
    selection: Literal["sample_one", "all", "weighted", "lexicographic"] | None = Field(
        None, description="Which principles judge a comparison; left out: as the constitution says."
    )
    orders: Literal["both", "random", "first"] = Field(
        "both", description="Anything but both is said in every report."
    )
    min_label_mass: float = Field(0.5, gt=0, le=1, description="Below it a verdict is unscored.")
    combine: Literal["mean", "log_odds"] = Field(
        "mean",
        description="Of the principles' readings. mean: p_chosen is the mean share of the vote, near a half where "
        "one of many decides. log_odds: their evidence is added up, so that p_chosen says how surely.",
    )
    tie_margin: float = Field(0.02, ge=0, lt=0.5, description="So close to a half is a tie.")
    min_scored: Share = Field(0.5, description="Share of the readings' weight that must be scored.")
    weights: dict[Id, Weight] = Field({}, description="By judge's name; default 1.")
    repeats: int = Field(1, ge=1, le=64, description="Ask each judge so often (test-retest).")
    escalate: EscalateConfig | None = Field(
        None, description="Left out: every judge is asked about everything."
    )


class ChooseConfig(_Strict):
    """Which of a prompt's decided comparisons become pairs to train on."""

    method: Literal["compared", "best_worst", "bradley_terry", "davidson"] | None = Field(
        None,
        description="compared: each of them. best_worst: the answer that wins most against the one that wins least. "
        "bradley_terry, davidson (with ties): each that a fit of all the prompt's comparisons confirms, "
        "with the fit's probability. Left out: best_worst for `pairs: best_worst`, else compared.",
    )
    margin: float = Field(
        0.0, ge=0, lt=0.5, description="p_chosen must be above a half by at least this."
    )
    demonstrations: Literal["best", "accepted"] = Field(
        "best",
        exclude_if=lambda value: value == "best",
        description="Of the recipe best_of_n, for SFT: each prompt's best answer, or all answers "
        "whose score is at least min_score (rejection sampling).",
    )
    min_score: float | None = Field(
        None,
        allow_inf_nan=False,
        exclude_if=lambda value: value is None,
        description="Of the recipe best_of_n: a demonstration needs this score, on the judge's own "
        "scale (of a verifier: 1.0 is right). Left out: none.",
    )


class ExportConfig(_Strict):
    """What `prefab export PIPELINE.yaml` writes where its options do not say otherwise."""

    format: Annotated[str, KindName(FORMATS, "export format")] = "trl"
    folder: Text = "out"
    truncated: bool = Field(
        False, description="Include answers that were cut off at the length limit."
    )
    without: list[Text] = Field(
        [],
        description="Rules of `prefab audit data`; pairs that they marked are left out.",
    )
    per_prompt: int = Field(
        0,
        ge=0,
        description="At most this many pairs of each prompt, those with the highest p_chosen; 0: all.",
    )
    balance_length: bool = Field(
        False,
        description="Leave pairs out until the chosen answer is as often the longer one as the rejected answer.",
    )
    weights: Literal["none", "prompt", "confidence"] = Field(
        "none",
        description="A column `weight`: one over the number of the prompt's pairs (prompt), or 2 p_chosen - 1 (confidence).",
    )
    splits: list[Literal["train", "val", "test"]] = Field(
        [], description="The splits that are written; empty: all."
    )


class BudgetConfig(_Strict):
    """When a run stops by itself. Shares are checked from 200 answers on, and at the end over all
    answers.
    """

    unscored: Share | None = Field(0.05, description="Share of unscored verdicts and critiques.")
    failed: Share | None = Field(0.01, description="Share of calls that failed in transport.")
    calls: int | None = Field(None, ge=1, description="Cap on calls really made.")
    tokens: int | None = Field(None, ge=1, description="Cap on tokens of calls really made.")


class ScaleConfig(_Strict):
    """A run on many processes or machines: `prefab run --on`, or `--shard`."""

    shards: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Parts of the prompts, fixed at the first start; left out: eight a worker, and "
        "at most a million calls in each.",
    )
    shared: Text | None = Field(
        None,
        description="A folder that all machines mount, or s3://BUCKET/FOLDER; left out: the store.",
    )
    local: Text | None = Field(
        None,
        description="Where each machine has its ledgers, on a disk of its own; left out: a folder "
        "in TMPDIR.",
    )
    publish_s: float = Field(30.0, gt=0, description="Seconds between two publications.")
    workers: int | None = Field(
        None, ge=1, description="Left out: as --on says; on Ray as many as there is room for."
    )
    retries: int = Field(3, ge=1, description="A shard that ends its worker so often is set aside.")


class PipelineConfig(_Strict):
    """A pipeline, resolved. What of it decides whether two runs are the same: `loader.deciding`."""

    recipe: Annotated[Id, KindName(RECIPES, "recipe")] = Field(
        description="What is done with each prompt."
    )
    name: Id = Field(description="Of the run; a store holds many, and they share answers.")
    store: Text = Field("store", description="The folder of ledger.sqlite and prefab.duckdb.")
    constitution: ConstitutionNames = Field(
        description="A constitution file; or a list of them, whose principles are used together."
    )
    prompts: PromptsConfig
    engines: dict[Id, EngineField] = Field(
        min_length=1, description="By name; each has engine (its kind) and the fields of that kind."
    )
    policy: PolicyConfig
    critic: CriticField | None = Field(
        None, description="The model that criticises and revises; left out: the policy's, greedy."
    )
    revise: ReviseConfig | None = Field(
        None, description="Left out: no revisions, but for the recipe cai one sweep."
    )
    panel: PanelConfig | None = None
    steps: StepsConfig | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Of the recipe process: the steps of an answer that are judged; left out: lines.",
    )
    pairs: Literal["all", "best_worst", "adjacent", "tournament"] = Field(
        "all",
        description="Which answers are compared: every two (all, best_worst), each with the next (adjacent), or "
        "winners with winners until one is left (tournament).",
    )
    choose: ChooseConfig = ChooseConfig()
    export: ExportConfig = ExportConfig()
    budget: BudgetConfig = BudgetConfig()
    seed: int = Field(0, ge=0, le=2**31 - 1)
    scale: ScaleConfig | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Of a run on many processes or machines.",
    )

    _base: Path = PrivateAttr(default=Path())

    def locate(self, name: str) -> Path:
        """A file named in the configuration: as seen from here, from the pipeline file, or from the
        project.
        """
        return locate(name, self._base)

    def judges(self) -> list[JudgeConfig]:
        """The panel's judges, each as the configuration class of its kind."""
        return list(self.panel.judges) if self.panel else []

    def panel_settings(self) -> PanelConfig:
        """The panel; without one, no judge and the default settings."""
        return self.panel or PanelConfig.model_construct(judges=[])

    def steps_settings(self) -> StepsConfig:
        """What a step is; without the section, the default settings."""
        return self.steps or StepsConfig()

    def scale_settings(self) -> ScaleConfig:
        """How the run is divided; without the section, the default settings."""
        return self.scale or ScaleConfig()

    def critic_config(self) -> CritiqueConfig:
        """The critic as `CritiqueConfig`; the engine is the policy's unless it says otherwise."""
        return CritiqueConfig.model_validate({"engine": self.policy.engine, **(self.critic or {})})


def load_pipeline(
    path: str | Path, sets: Iterable[str] = ()
) -> tuple[PipelineConfig, dict[str, Any]]:
    """Read and validate a pipeline file.

    Args:
        path: A pipeline file, or the name of a preset in `pipelines/presets/`.
        sets: Overrides of fields, for example `["policy.samples=8"]`.

    Returns:
        The pipeline, and its resolved configuration as plain data (it is stored with the run).

    Raises:
        ConfigError: Every mistake in the file and in `sets`.
    """
    path = pipeline_file(path)
    return _validate(yamlio.load_document(path), path.resolve().parent, sets)


def pipeline_file(path: str | Path) -> Path:
    """The path of a pipeline file; a name such as `demo` stands for pipelines/presets/demo.yaml."""
    return yamlio.file_or_preset(Path(path), PACKAGE / "pipelines" / "presets")


def make_pipeline(
    data: dict[str, Any], sets: Iterable[str] = ()
) -> tuple[PipelineConfig, dict[str, Any]]:
    """As `load_pipeline`, from a dictionary."""
    return _validate(
        yamlio.Document("pipeline", "", json.loads(json.dumps(data))), Path.cwd(), sets
    )


def _validate(
    document: yamlio.Document, base: Path, sets: Iterable[str]
) -> tuple[PipelineConfig, dict[str, Any]]:
    for text in sets:
        _override(document, text)
    _fill(document.value)
    asked = [
        checks.names_of_judges,
        checks.escalation,
        checks.rankings,
        checks.fits,
        checks.best_of_n,
        checks.process,
        checks.engine_names,
        lambda value: checks.files(value, base),
    ]
    config = yamlio.validate(document, PipelineConfig, asked)
    config._base = base
    return config, config.model_dump(mode="json")


def _override(document: yamlio.Document, text: str) -> None:
    """Put one `a.b=value` into the document; the value is read as YAML is."""
    file = f"--set {text}"
    name, equals, value = text.partition("=")
    parsed = yamlio.parse(value, file) if value.strip() else yamlio.Document(file, value, "")
    parts: list[str | int] = [
        int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in name.strip().split(".")
    ]
    if not equals or "" in parts:
        document.problems.append(
            Problem(file, 0, 0, "", "write --set name=value, such as --set policy.samples=8")
        )
        return
    document.problems += [Problem(file, 0, 0, name, problem.message) for problem in parsed.problems]
    document.value = {} if document.value is None else document.value
    target = document.value
    for index, part in enumerate(parts[:-1]):
        target = _step(target, part)
        if target is None:
            where = yamlio.path_text(parts[: index + 1])
            document.problems.append(
                Problem(file, 0, 0, where, "there is nothing of that name to set a field of")
            )
            return
    last = parts[-1]
    if isinstance(target, dict):
        target[str(last)] = parsed.value
    elif isinstance(target, list) and isinstance(last, int) and last < len(target):
        target[last] = parsed.value
    else:
        document.problems.append(Problem(file, 0, 0, name, "cannot be set there"))
    document.origins[tuple(parts)] = file


def _step(target: Any, part: str | int) -> Any:
    """One step into the document; a section that is left out or null is made on the way."""
    if isinstance(target, list):
        return target[part] if isinstance(part, int) and part < len(target) else None
    if not isinstance(target, dict):
        return None
    if target.get(str(part)) is None:
        target[str(part)] = {}
    return target[str(part)]


def _fill(value: Any) -> None:
    """Write into the raw value what each judge inherits: the policy's engine and the panel's
    settings.
    """
    panel = checks.mapping(value, "panel")
    engine = str(checks.mapping(value, "policy").get("engine"))
    for _, judge in checks.judges(value):
        if engine in checks.mapping(value, "engines") and _asks_an_engine(judge.get("kind")):
            judge.setdefault("engine", engine)
        fields = _fields(judge.get("kind"))
        for name in ("min_label_mass", "repeats"):
            if name in panel and name in fields:
                judge.setdefault(name, panel[name])
        weights = checks.mapping(panel, "weights")
        if isinstance(judge.get("name"), str) and judge["name"] in weights:
            judge.setdefault("weight", weights[judge["name"]])


def _asks_an_engine(kind: Any) -> bool:
    known = isinstance(kind, str) and kind in registry.JUDGES
    return known and not registry.JUDGES[kind].own


def _fields(kind: Any) -> Any:
    """The fields of a kind of judge; of an unknown kind, those that every judge has."""
    known = isinstance(kind, str) and kind in registry.JUDGES
    return (config_class(registry.JUDGES, kind) if known else JudgeConfig).model_fields


def json_schema(bundled_only: bool = False) -> dict[str, Any]:
    """The JSON schema that editors complete and check by, with the kinds of all installed packages,
    or with those alone that come with Prefab.
    """
    token = BUNDLED_ONLY.set(bundled_only)
    try:
        schema = PipelineConfig.model_json_schema()
    finally:
        BUNDLED_ONLY.reset(token)
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, **schema, "title": "Prefab pipeline"}


if __name__ == "__main__":
    if sys.argv[1:] == ["--schema"]:
        SCHEMA_PATH.write_text(
            json.dumps(json_schema(bundled_only=True), indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        print(f"wrote {SCHEMA_PATH}")
    else:
        sys.exit("usage: python -m prefab.pipelines.config.schema --schema")
