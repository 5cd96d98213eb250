"""Prefab: make preference data with AI judges, and train on it.

The public Python API. `import prefab` is quick: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from prefab.factory.ledger.verify import back_up_ledger, recover_ledger, verify_ledger
    from prefab.factory.spec.constitution import load_constitution
    from prefab.factory.spec.constitution_imports import import_constitution
    from prefab.pipelines.cli.data_check import read_report as check_data
    from prefab.pipelines.cli.doctor import examine as doctor
    from prefab.pipelines.cli.project import check_paths as check
    from prefab.pipelines.cli.project import init_project as init
    from prefab.pipelines.cli.serve import serve_model as serve
    from prefab.pipelines.config.loader import resolve_pipeline
    from prefab.pipelines.config.schema import load_pipeline
    from prefab.pipelines.evaluation.policy import run as eval_policy
    from prefab.pipelines.evaluation.weak_to_strong import weak_to_strong
    from prefab.pipelines.quality.agreement import measure as agreement
    from prefab.pipelines.quality.constitution_lints import explain as explain_lint
    from prefab.pipelines.quality.constitution_lints import lint_constitution
    from prefab.pipelines.quality.constitution_log import constitution_log, constitution_version
    from prefab.pipelines.quality.constitution_tests import add_test, run_tests
    from prefab.pipelines.quality.data_audit import audit as audit_data
    from prefab.pipelines.quality.induction import (
        constitution_text,
        induce,
        pairs_of_file,
        pairs_of_people,
        pairs_of_runs,
    )
    from prefab.pipelines.quality.judge_audit import audit as audit_judge
    from prefab.pipelines.quality.judge_benchmark import evaluate as eval_judge
    from prefab.pipelines.quality.judge_benchmark import read_benchmark
    from prefab.pipelines.quality.judge_benchmark import score_saved as score_verdicts
    from prefab.pipelines.quality.label_files import read_answers as read_label_queue
    from prefab.pipelines.quality.label_files import write_queue as write_label_queue
    from prefab.pipelines.quality.labeling import open_session as label
    from prefab.pipelines.quality.principle_effects import principle_effects
    from prefab.pipelines.quality.why import why
    from prefab.pipelines.run.diff import diff
    from prefab.pipelines.run.plan import plan
    from prefab.pipelines.run.preview import preview
    from prefab.pipelines.run.rendering import render_calls
    from prefab.pipelines.run.runner import run
    from prefab.pipelines.run.watch import watch
    from prefab.pipelines.store.calibrate import calibrate
    from prefab.pipelines.store.export.base import export
    from prefab.pipelines.store.fill import query, rebuild
    from prefab.pipelines.store.forget import forget, undo_forgetting
    from prefab.pipelines.store.imports import import_files as import_preferences
    from prefab.pipelines.training.judge_server import serve_judge as serve_judge
    from prefab.pipelines.training.sweep import sweep
    from prefab.pipelines.training.train import train
    from prefab.pipelines.view.serve import view

# Where each name is defined, as module:attribute below `prefab`.
_HOME = {
    "add_test": "pipelines.quality.constitution_tests:add_test",
    "agreement": "pipelines.quality.agreement:measure",
    "audit_data": "pipelines.quality.data_audit:audit",
    "audit_judge": "pipelines.quality.judge_audit:audit",
    "back_up_ledger": "factory.ledger.verify:back_up_ledger",
    "calibrate": "pipelines.store.calibrate:calibrate",
    "check": "pipelines.cli.project:check_paths",
    "check_data": "pipelines.cli.data_check:read_report",
    "constitution_log": "pipelines.quality.constitution_log:constitution_log",
    "constitution_version": "pipelines.quality.constitution_log:constitution_version",
    "diff": "pipelines.run.diff:diff",
    "doctor": "pipelines.cli.doctor:examine",
    "eval_judge": "pipelines.quality.judge_benchmark:evaluate",
    "eval_policy": "pipelines.evaluation.policy:run",
    "explain_lint": "pipelines.quality.constitution_lints:explain",
    "export": "pipelines.store.export.base:export",
    "import_constitution": "factory.spec.constitution_imports:import_constitution",
    "import_preferences": "pipelines.store.imports:import_files",
    "forget": "pipelines.store.forget:forget",
    "init": "pipelines.cli.project:init_project",
    "label": "pipelines.quality.labeling:open_session",
    "lint_constitution": "pipelines.quality.constitution_lints:lint_constitution",
    "load_constitution": "factory.spec.constitution:load_constitution",
    "load_pipeline": "pipelines.config.schema:load_pipeline",
    "plan": "pipelines.run.plan:plan",
    "principle_effects": "pipelines.quality.principle_effects:principle_effects",
    "query": "pipelines.store.fill:query",
    "read_benchmark": "pipelines.quality.judge_benchmark:read_benchmark",
    "read_label_queue": "pipelines.quality.label_files:read_answers",
    "rebuild": "pipelines.store.fill:rebuild",
    "recover_ledger": "factory.ledger.verify:recover_ledger",
    "resolve_pipeline": "pipelines.config.loader:resolve_pipeline",
    "run": "pipelines.run.runner:run",
    "run_tests": "pipelines.quality.constitution_tests:run_tests",
    "score_verdicts": "pipelines.quality.judge_benchmark:score_saved",
    "serve": "pipelines.cli.serve:serve_model",
    "serve_judge": "pipelines.training.judge_server:serve_judge",
    "sweep": "pipelines.training.sweep:sweep",
    "train": "pipelines.training.train:train",
    "undo_forgetting": "pipelines.store.forget:undo_forgetting",
    "verify_ledger": "factory.ledger.verify:verify_ledger",
    "view": "pipelines.view.serve:view",
    "watch": "pipelines.run.watch:watch",
    "weak_to_strong": "pipelines.evaluation.weak_to_strong:weak_to_strong",
    "why": "pipelines.quality.why:why",
    "write_label_queue": "pipelines.quality.label_files:write_queue",
    "constitution_text": "pipelines.quality.induction:constitution_text",
    "induce": "pipelines.quality.induction:induce",
    "pairs_of_file": "pipelines.quality.induction:pairs_of_file",
    "pairs_of_people": "pipelines.quality.induction:pairs_of_people",
    "pairs_of_runs": "pipelines.quality.induction:pairs_of_runs",
    "preview": "pipelines.run.preview:preview",
    "render_calls": "pipelines.run.rendering:render_calls",
}
__all__ = [
    "add_test",
    "agreement",
    "audit_data",
    "audit_judge",
    "back_up_ledger",
    "calibrate",
    "check",
    "check_data",
    "constitution_log",
    "constitution_text",
    "constitution_version",
    "diff",
    "doctor",
    "eval_judge",
    "eval_policy",
    "explain_lint",
    "export",
    "forget",
    "import_constitution",
    "import_preferences",
    "induce",
    "init",
    "label",
    "lint_constitution",
    "load_constitution",
    "load_pipeline",
    "pairs_of_file",
    "pairs_of_people",
    "pairs_of_runs",
    "plan",
    "preview",
    "principle_effects",
    "query",
    "read_benchmark",
    "read_label_queue",
    "rebuild",
    "recover_ledger",
    "render_calls",
    "resolve_pipeline",
    "run",
    "run_tests",
    "score_verdicts",
    "serve",
    "serve_judge",
    "sweep",
    "train",
    "undo_forgetting",
    "verify_ledger",
    "view",
    "watch",
    "weak_to_strong",
    "why",
    "write_label_queue",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(f"module 'prefab' has no attribute {name!r}")
    module, attribute = _HOME[name].split(":")
    return getattr(import_module(f"prefab.{module}"), attribute)


def _version() -> str:
    """The installed version; that of pyproject.toml in a clone that was not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("prefab-rlaif")
    except PackageNotFoundError:
        import tomllib
        from pathlib import Path

        project = Path(__file__).parents[1] / "pyproject.toml"
        return str(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"])


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
