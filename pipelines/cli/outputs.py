"""What each command prints with `--json`, as types, and their JSON schema, which is
docs/output.schema.json.

A type here states what is printed, which is not always all that a result holds: `_printed` makes a
type from a result's own fields, without some and with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, make_dataclass
from typing import Annotated, Any, Literal, cast, get_type_hints

from pydantic import Field, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from prefab.factory.stats import Estimate
from prefab.judges.benchmarks import adapters
from prefab.judges.stats.preference_calibration import Calibration
from prefab.pipelines.cli import demo, doctor
from prefab.pipelines.cli.data_check import DataReport
from prefab.pipelines.evaluation.policy import Report as PolicyReport
from prefab.pipelines.evaluation.weak_to_strong import WeakToStrong
from prefab.pipelines.quality.constitution_lints import Lint, LintRule
from prefab.pipelines.quality.constitution_log import ConstitutionVersion
from prefab.pipelines.quality.constitution_tests import AddedTest, TestReport
from prefab.pipelines.quality.induction import Induction
from prefab.pipelines.quality.judge_audit import Report as JudgeAudit
from prefab.pipelines.quality.labeling import Report as LabelReport
from prefab.pipelines.quality.principle_effects import PrincipleReport
from prefab.pipelines.quality.why import Why
from prefab.pipelines.run.diff import Moved, PrincipleMoved
from prefab.pipelines.run.plan import Plan
from prefab.pipelines.run.preview import Preview
from prefab.pipelines.run.rendering import RenderedCall
from prefab.pipelines.run.runner import RunResult
from prefab.pipelines.store.export.card import ExportReport
from prefab.pipelines.store.forget import Forgetting
from prefab.pipelines.store.imports import Imported
from prefab.trainers.offline.estimate import Estimate as StepEstimate

Rows = list[dict[str, Any]]  # of a table whose columns depend on the data
Counts = dict[str, int]
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def _printed(name: str, result: type[Any], without: tuple[str, ...] = (), **more: Any) -> type[Any]:
    """A type with a result's public fields, less those of `without`; `more` are added or replace
    fields.
    """
    hints = get_type_hints(result, include_extras=True)
    names = [field.name for field in fields(result) if not field.name.startswith("_")]
    own = {name: hints[name] for name in names if name not in without}
    return make_dataclass(name, list((own | more).items()))


def _object(name: str, **values: Any) -> type[Any]:
    return make_dataclass(name, list(values.items()))


@dataclass
class Mistake:
    """What a command prints when it ends with an error, in place of its result."""

    error: str
    problems: list[str]
    exit: int


@dataclass
class DiffVersion:
    """One of the two versions of a constitution that were compared."""

    name: str
    digest: str
    run: int
    record: str
    asked: int
    reused: int
    failed: int


@dataclass
class DiffOutput:
    """What differs between two versions of a constitution."""

    old: DiffVersion
    new: DiffVersion
    source: str
    comparisons: int
    flips: int
    flip_rate: Estimate
    change_rate: Estimate
    alpha: Estimate
    ac1: Estimate
    outcomes: dict[str, Counts]
    principles: list[PrincipleMoved]
    changes: list[str]
    moved: list[_printed("MovedComparison", Moved, flipped=bool)]  # type: ignore[valid-type]  # made from the fields


@dataclass
class CheckedConstitution:
    """The digests of a constitution and of its principles."""

    file: str
    id: str
    digest: str
    principles: dict[str, str]


@dataclass
class CheckOutput:
    """What `prefab check` found in constitutions, templates and pipelines."""

    checked: list[str]
    problems: list[str]
    lints: list[Lint]
    constitutions: list[CheckedConstitution]


@dataclass
class DataCheckOutput:
    """What `prefab check` found in data files."""

    checked: list[str]
    files: list[DataReport]
    problems: list[str]


@dataclass
class AuditFinding:
    """The result of one rule of `prefab audit data`."""

    rule: str
    what: str
    marked: int
    share: float
    threshold: float | None
    source: str
    limit: float | None
    fails: bool
    of_prompt: bool
    examples: list[dict[str, str]]


@dataclass
class DataAuditOutput:
    """What `prefab audit data` found."""

    run: str
    pairs: int
    comparisons: int
    clean: int
    fails: bool
    evaluation: Rows
    notes: list[str]
    rules: list[AuditFinding]


@dataclass
class AgreementAccuracy:
    """How often judges, and the panel by each method, agree with the gold labels."""

    rows: Rows
    best: str | None
    over_best: dict[str, Estimate]


@dataclass
class JudgePairs:
    """How the judges of a panel go together."""

    pairs: Rows
    mean_error_correlation: Estimate
    effective: Estimate


@dataclass
class JudgeRow:
    """What one judge read, and how reliable it is."""

    judge: str
    readings: int
    scored: int
    verdicts: int
    unscored: float
    unscored_reasons: Counts
    ties: float | None
    label_mass: float | None
    label_mass_low: int | float | None
    inexact: int
    hard: int
    accuracy: Estimate
    exact: Estimate
    position_consistency: Estimate
    first_slot_share: Estimate
    slot_lean: Estimate
    stability: Estimate


@dataclass
class AgreementOutput:
    """What `prefab agreement` measured."""

    run: str
    gold: str | None
    orders: str
    comparisons: int
    items: int
    prompts: int
    groups: int
    resamples: int
    seed: int
    sampled: int | None
    judges: list[JudgeRow]
    between: JudgePairs | None
    coefficients: dict[str, Estimate] | None
    accuracy: AgreementAccuracy | None
    calibration: Rows | None
    learned: Calibration | None
    p_chosen: str
    principles: Rows
    constitution: dict[str, Any]
    tags: Rows
    critiques: Rows
    divided: Any
    limitations: list[str]


@dataclass
class VerifyOutput:
    """What `prefab store verify` found."""

    ledger: str
    whole: bool
    integrity: list[str]
    tables: Rows
    differences: Annotated[list[str], Field(serialization_alias="prefab.duckdb")]
    recovered: str | None


@dataclass
class Trained:
    """What a training on pairs, labels or demonstrations did. `base`: the model that it began with.
    `store`: where it is recorded.
    """

    stage: str
    model: str
    steps: int
    train: int
    val: int
    seconds: float
    metrics: dict[str, float]
    notes: list[str]
    base: str
    store: str | None


@dataclass
class RewardTrained(Trained):
    """What a training of a reward model did; the mean and deviation of its scores."""

    reward_mean: float
    reward_deviation: float


@dataclass
class PolicyTrained:
    """What PPO or GRPO did. `first` and `last`: the metrics of a step."""

    stage: str
    policy: str
    steps: int
    stopped: str | None
    first: dict[str, Any]
    last: dict[str, Any]
    best: str | None
    evaluations: Rows
    alarm: str
    charts: list[str]


@dataclass
class Server:
    """A server that is kept."""

    url: str
    model: str
    identity: str
    settings: dict[str, Any]
    pid: int
    idle_s: float
    started: float
    log: str
    unused_s: float


_BENCHMARK = _printed(
    "BenchmarkOutput",
    adapters.Report,
    judge=str,
    model=str,
    items=int,
    rows=int,
    bad_rows=int,
    problems=list[str],
    files=Any,
    asked=int,
    reused=int,
)


@dataclass
class DemoPreferences:
    """The preferences of `prefab demo`, compared with the oracle's scores."""

    outcomes: Counts
    gold_decided: int
    both_decided: int
    right: float | None
    right_of_all: float | None


_VERSION = _printed("Version", ConstitutionVersion, date=str)
_RUN = _printed("RunOutput", RunResult, store=str, best_of=Rows)
_EXPORTED = _printed("ExportDone", ExportReport, ("examples",), out=str)


@dataclass
class DemoOutput:
    """What `prefab demo` measured. `policies`, `ppo`: null without training."""

    run: _RUN  # type: ignore[valid-type]  # made from the fields
    drafts: demo.AnswerQuality
    revised: demo.AnswerQuality
    changed: int
    accuracy: list[demo.Accuracy]
    preferences: DemoPreferences
    policies: PolicyReport | None
    ppo: dict[str, Any] | None
    seconds: dict[str, float]


@dataclass
class RealDemoOutput:
    """What `prefab demo --real` measured. `right`: by policy, the share of right answers and their
    number. `policies`, `right`: null without training.
    """

    run: _RUN  # type: ignore[valid-type]  # made from the fields
    agreement: AgreementOutput
    export: _EXPORTED  # type: ignore[valid-type]  # made from the fields
    worth: str
    seconds: dict[str, float]
    policies: PolicyReport | None
    right: dict[str, tuple[float, int]] | None


# By command: the type of what it prints with --json.
OUTPUTS: dict[str, Any] = {
    "demo": DemoOutput | RealDemoOutput,
    "init": _object("InitOutput", folder=str, files=list[str]),
    "check": CheckOutput | DataCheckOutput,
    "doctor": _object("DoctorOutput", findings=list[doctor.Finding], ok=bool),
    "plan": Plan,
    "run": _RUN,
    "sql": Rows,
    "why": Why,
    "report": _object("ReportOutput", file=str, bytes=int, run=str, headline=str),
    "export": _EXPORTED | _printed("ExportTried", ExportReport, out=str),
    "import-preferences": _object("ImportOutput", store=str, imported=list[Imported]),
    "diff": DiffOutput,
    "test": _printed("TestOutput", TestReport, passed=int, failed=int) | AddedTest,
    "principles": PrincipleReport,
    "induce": Induction,
    "explain": _object("ExplainOutput", codes=list[LintRule]),
    "render": list[RenderedCall],
    "preview": Preview,
    "import-constitution": _object(
        "ImportedConstitution",
        id=str,
        principles=list[str],
        examples=Counts,
        layouts=dict[str, str],
        notes=list[str],
        out=str | None,
    ),
    "constitution log": _object(
        "LogOutput",
        versions=list[_VERSION],  # type: ignore[valid-type]  # made from the fields
    ),
    "constitution show": _VERSION,
    "agreement": AgreementOutput,
    "calibrate": _printed("CalibrateOutput", Calibration, run=str, source=str),
    "label": _printed("LabelOutput", LabelReport, labelled=int),
    "audit judge": JudgeAudit,
    "audit data": DataAuditOutput,
    "eval judge": _BENCHMARK,
    **{f"train {name}": Trained | StepEstimate for name in ("sft", "process", "dpo", "kto")},
    "train reward": RewardTrained | StepEstimate,
    **{f"train {name}": PolicyTrained for name in ("ppo", "grpo")},
    "train online": _object("OnlineOutput", rounds=Rows, policy=str, stopped=str | None, store=str),
    "sweep": _object(
        "SweepOutput",
        points=Rows,
        means=Rows,
        arms=dict[str, Any],
        table=Rows,
        equal_kl=Any,
        failed=dict[str, str],
        files=list[str],
    ),
    "eval policy": PolicyReport,
    "eval weak-to-strong": WeakToStrong,
    "store info": _object("StoreInfo", store=str, tables=Counts, runs=Rows),
    "store rebuild": _object("StoreRebuilt", store=str, rows=Counts, seconds=float),
    "store merge": _object("StoreMerged", store=str, calls=int, damaged=list[str]),
    "store verify": VerifyOutput,
    "store backup": _object("StoreBackedUp", store=str, backup=str, rows=Counts),
    "store forget": _object("Forgotten", answers=int, id=int | None, dry_run=bool)
    | list[Forgetting],
    "serve": _object("Servers", servers=list[Server])
    | _object("ServersStopped", stopped=list[Server]),
    "error": Mistake,
}


class _Printed(GenerateJsonSchema):
    """Schemas of what `print_json` writes: every field, and null for a number that is not one."""

    def float_schema(self, schema: Any) -> dict[str, Any]:
        """A number; orjson writes NaN and infinities as null."""
        return {"type": ["number", "null"]}

    def field_is_required(self, field: Any, total: bool) -> bool:
        """Fields with a default are printed too."""
        return True


def schema_of(command: str) -> dict[str, Any]:
    """The JSON schema of what one command prints, for example of `store info`."""
    kind: TypeAdapter[Any] = TypeAdapter(OUTPUTS[command])
    found = kind.json_schema(mode="serialization", schema_generator=_Printed)
    return {"$schema": DIALECT, "title": f"What prefab {command} prints with --json", **found}


def output_schema() -> dict[str, Any]:
    """The JSON schema of all outputs: that of a command stands in `$defs` under the command's
    words with `-` between them (`store-info`), and what they share under the names of types.
    """
    wanted: list[tuple[str, Literal["serialization"], TypeAdapter[Any]]] = [
        (name.replace(" ", "-"), "serialization", TypeAdapter(kind))
        for name, kind in OUTPUTS.items()
    ]
    by_command, shared = TypeAdapter.json_schemas(wanted, schema_generator=_Printed)
    found: Mapping[str, Any] = {name: schema for (name, _), schema in by_command.items()}
    return {
        "$schema": DIALECT,
        "title": "What the commands of Prefab print with --json",
        "$defs": {**found, **cast("dict[str, Any]", shared.get("$defs", {}))},
    }
