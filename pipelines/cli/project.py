"""Projects of people's own: `init` writes one, `check` reads one and tells every mistake at once,
`serve` a model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from prefab.factory.errors import ConfigError, EngineError, Problem
from prefab.factory.paths import PACKAGE
from prefab.factory.spec import yamlio
from prefab.factory.spec.constitution import load_constitution
from prefab.factory.spec.templates import TEMPLATES, VARIABLES
from prefab.factory.spec.templates import load_template as load_template
from prefab.pipelines.config.schema import PromptsConfig

SKIPPED = {".git", ".venv", "__pycache__", "node_modules", "store", "out"}

PIPELINE = """\
# yaml-language-server: $schema=.schemas/pipeline.schema.json
# prefab check .                      all mistakes at once
# prefab plan pipeline.yaml           what would be asked, and why
# prefab run pipeline.yaml            make the data; run it again to resume
recipe: rlaif
name: mine
store: store
constitution: constitution.yaml
prompts: {source: prompts.jsonl}
engines:
  # The embedded model knows only its own small world. For real work name a real model, such as
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


def init_project(folder: Path) -> list[Path]:
    """Write a project into a new or empty folder; the paths that were written, within the folder.

    Raises: ConfigError when something is there already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            [Problem(str(folder), 0, 0, "", "is there already and not empty; name a new folder")]
        )
    (folder / "templates").mkdir(parents=True)
    (folder / ".schemas").mkdir()
    for name in ("pairwise", "critique", "revise"):
        shutil.copyfile(TEMPLATES / f"{name}.jinja", folder / "templates" / f"{name}.jinja")
    for schema in (
        PACKAGE / "constitutions" / "constitution.schema.json",
        PACKAGE / "pipelines" / "pipeline.schema.json",
    ):
        shutil.copyfile(schema, folder / ".schemas" / schema.name)
    constitution = (PACKAGE / "constitutions" / "front-desk.yaml").read_text(encoding="utf-8")
    constitution = constitution.replace(
        "$schema=constitution.schema.json", "$schema=.schemas/constitution.schema.json"
    )
    texts = {
        "constitution.yaml": constitution,
        "pipeline.yaml": PIPELINE,
        "prompts.jsonl": PROMPTS,
        ".gitignore": IGNORED,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def check_paths(paths: Sequence[Path]) -> tuple[list[tuple[Path, str]], list[Problem]]:
    """Everything checkable under these paths, with what it is, and every problem found.

    Raises: ConfigError when nothing checkable is there.
    """
    checked: list[tuple[Path, str]] = []
    problems: list[Problem] = []
    for path in _files(paths):
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
            return "yaml"  # the check tells what is wrong with it
        names = set(value) if isinstance(value, dict) else set()
        if names & {"principles", "licence", "selection"}:
            return "constitution"
        return "pipeline" if names & {"recipe", "engines", "policy", "panel"} else "yaml"
    return {".jinja": "template", ".jsonl": "prompts"}.get(path.suffix)


def _check_template(path: Path) -> None:
    """A template's kind is the longest kind that its name begins with: pairwise-short.jinja is
    pairwise.
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
                    "which kind of template is this? Begin its name with one of "
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
    if document.problems:
        raise ConfigError(document.problems)
    raise ConfigError(
        [
            Problem(
                str(path),
                1,
                1,
                "",
                "neither a constitution (principles: ...) nor a pipeline (recipe: ...)",
            )
        ]
    )


_CHECKS = {
    "constitution": load_constitution,
    "pipeline": _check_pipeline,
    "template": _check_template,
    "prompts": _check_prompts,
    "yaml": _check_yaml,
}


def serve_model(model: str, port: int, extra: Sequence[str] = ()) -> int:
    """Start vLLM in the foreground as the engine would; its exit code.

    Raises: EngineError when vLLM is not installed.
    """
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed here: `make setup` installs it, or `pip install '.[serve]'`"
        )
    from prefab.factory.engines import vllm_process
    from prefab.factory.engines.vllm import VLLM, VllmConfig
    from prefab.factory.engines.vllm_process import VllmProcess, command_line, environment

    engine = VLLM(VllmConfig(model=model, port=port, args=list(extra)), "serve")
    process = VllmProcess(engine.config, str(engine.path), port, "serve", None)
    words = command_line(process)
    print(
        f"serving {model} at http://127.0.0.1:{port}/v1 (Ctrl-C ends it)\n"
        f"a pipeline talks to it with: engines.local = {{engine: vllm, url: 'http://127.0.0.1:{port}', "
        f"model: {model}}}",
        file=sys.stderr,
        flush=True,
    )
    supervisor = [
        sys.executable,
        str(Path(vllm_process.__file__).with_name("supervisor.py")),
        str(os.getpid()),
        "/dev/stderr",
    ]
    child = subprocess.Popen([*supervisor, *words], stdin=subprocess.PIPE, env=environment(process))
    try:
        return child.wait()
    except KeyboardInterrupt:  # the supervisor was told too, and ends the server and its children
        child.wait()
        return 130
