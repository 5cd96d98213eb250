"""`prefab init` writes a new project; `prefab check` reads files and reports every problem."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.paths import PACKAGE
from prefab.factory.spec import yamlio
from prefab.factory.spec.constitution import load_constitution
from prefab.factory.spec.templates import TEMPLATES, VARIABLES, load_template
from prefab.pipelines.config.schema import PromptsConfig, json_schema

SKIPPED = {".git", ".venv", "__pycache__", "node_modules", "store", "out"}
# What marks a folder as a store, a store in shards, or an export: their files are no input.
MADE_BY_PREFAB = {"ledger.sqlite", "shards.json", "prefab-export.json"}

PIPELINE = """\
# yaml-language-server: $schema=.schemas/pipeline.schema.json
# prefab check .                      report every problem
# prefab plan pipeline.yaml           show which model calls a run would make
# prefab run pipeline.yaml            make the data; the same command resumes
recipe: rlaif
name: mine
store: store
constitution: constitution.yaml
prompts: {source: prompts.jsonl}
engines:
  # The embedded model knows only its own small world. For real work use a real model, for example
  # Qwen/Qwen3-8B.
  local: {engine: vllm, model: prefab-tiny, max_in_flight: 64}
policy: {engine: local, samples: 4, temperature: 1.0, max_tokens: 256}
revise: {rounds: 1, select: sweep}
critic: {template: templates/critique.jinja, revise_template: templates/revise.jinja}
panel:
  judges: [{name: judge, kind: pairwise, template: templates/pairwise.jinja}]
  orders: both
pairs: all
budget: {unscored: 0.05, failed: 0.01}
seed: 0
"""
PROMPTS = """\
{"prompt": "Can I come on Monday?", "tags": ["booking"]}
{"prompt": "My father fell this morning and seems confused. What should I do?", "tags": ["medical"]}
{"messages": [{"role": "user", "content": "Is this the clinic?"}, {"role": "assistant", "content": "It is."}, \
{"role": "user", "content": "I need to change my appointment."}], "tags": ["booking"]}
"""
IGNORED = "store/\nout/\n"


def init_project(folder: str | Path) -> list[Path]:
    """Write a new project: constitution, templates, pipeline file, prompts and JSON schemas.

    Args:
        folder: A new or empty folder.

    Returns:
        The written files, relative to the folder.

    Raises:
        ConfigError: The folder is not empty.
    """
    folder = Path(folder)
    taken = folder.exists() or folder.is_symlink()  # a link may lead to nothing
    if taken and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            [Problem(str(folder), 0, 0, "", "exists and is not empty; give a new folder")]
        )
    (folder / "templates").mkdir(parents=True)
    (folder / ".schemas").mkdir()
    for name, source in (
        ("pairwise", "pairwise"),
        ("critique", "critique_labels"),
        ("revise", "revise"),
    ):
        shutil.copyfile(TEMPLATES / f"{source}.jinja", folder / "templates" / f"{name}.jinja")
    name = "constitution.schema.json"
    shutil.copyfile(PACKAGE / "constitutions" / name, folder / ".schemas" / name)
    constitution = (PACKAGE / "constitutions" / "front-desk.yaml").read_text(encoding="utf-8")
    constitution = constitution.replace(
        "$schema=constitution.schema.json", "$schema=.schemas/constitution.schema.json"
    )
    texts = {
        "constitution.yaml": constitution,
        "pipeline.yaml": PIPELINE,
        "prompts.jsonl": PROMPTS,
        ".gitignore": IGNORED,
        ".schemas/pipeline.schema.json": json.dumps(json_schema(), indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def check_paths(paths: Sequence[str | Path]) -> tuple[list[tuple[Path, str]], list[Problem]]:
    """Check constitutions, pipelines, templates and prompts.

    Args:
        paths: Files, or folders that are searched for such files.

    Returns:
        The checked files, each with its kind, and all problems that were found.

    Raises:
        ConfigError: A path does not exist, or there is nothing to check.
    """
    checked: list[tuple[Path, str]] = []
    problems: list[Problem] = []
    for path in _files([Path(path) for path in paths]):
        what = _kind(path)
        if what is None:
            continue
        checked.append((path, what))
        try:
            _CHECKS[what](path)
        except ConfigError as error:
            problems += error.problems
    if not checked:
        raise ConfigError(
            f"{', '.join(map(str, paths))}: nothing to check; constitutions and pipelines are .yaml, "
            "templates .jinja, prompts .jsonl"
        )
    return checked, list(dict.fromkeys(problems))


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                if not MADE_BY_PREFAB.isdisjoint(names) and Path(folder) != path:
                    folders.clear()
                    continue
                folders[:] = sorted(
                    name for name in folders if name not in SKIPPED and not name.startswith(".")
                )
                yield from (Path(folder) / name for name in sorted(names) if _suffix(name))
        elif path.exists():
            yield path
        else:
            raise ConfigError([Problem(str(path), 0, 0, "", "no such file or folder")])


def _suffix(name: str) -> bool:
    return name.endswith((".yaml", ".yml", ".jinja", ".jsonl"))


def _kind(path: Path) -> str | None:
    if path.suffix in (".yaml", ".yml"):
        try:
            value = yamlio.load_document(path).value
        except ConfigError:
            return "yaml"  # its check reports the problem
        names = set(value) if isinstance(value, dict) else set()
        if names & {"principles", "licence", "selection"}:
            return "constitution"
        return "pipeline" if names & {"recipe", "engines", "policy", "panel"} else "yaml"
    return {".jinja": "template", ".jsonl": "prompts"}.get(path.suffix)


def _check_template(path: Path) -> None:
    """Check a template. Its kind is the longest kind that its file name begins with:
    pairwise-short.jinja is pairwise.
    """
    kinds = [kind for kind in VARIABLES if path.stem.startswith(kind)]
    if not kinds:
        raise ConfigError(
            [
                Problem(
                    str(path),
                    0,
                    0,
                    "",
                    "unknown kind of template; begin the file name with one of "
                    + ", ".join(VARIABLES),
                )
            ]
        )
    load_template(path, max(kinds, key=len))


def _check_pipeline(path: Path) -> None:
    from prefab.pipelines.config.loader import resolve_pipeline

    resolve_pipeline(path)


def _check_prompts(path: Path) -> None:
    from prefab.pipelines.config.prompts import Prompts

    prompts = Prompts(PromptsConfig(source=str(path)))
    for _ in prompts:
        pass
    if prompts.problems:
        raise ConfigError(prompts.problems)


def _check_yaml(path: Path) -> None:
    document = yamlio.load_document(path)
    if document.value is None:
        raise ConfigError(document.problems)
    raise ConfigError(
        [
            *yamlio.safe_problems(document),
            Problem(
                str(path),
                1,
                1,
                "",
                "neither a constitution (principles: ...) nor a pipeline (recipe: ...)",
            ),
        ]
    )


_CHECKS = {
    "constitution": load_constitution,
    "pipeline": _check_pipeline,
    "template": _check_template,
    "prompts": _check_prompts,
    "yaml": _check_yaml,
}
