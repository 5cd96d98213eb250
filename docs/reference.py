"""Write the pages of the reference from the code: reference.md (the Python API), commands.md,
configuration.md and store-schema.md; and output.schema.json, what commands print with --json.

`make reference` runs it; a test fails where a page is not up to date.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import duckdb
import yaml
from pydantic import BaseModel
from typer.main import get_command

import prefab
from prefab.factory import errors
from prefab.factory.engines import base as engines
from prefab.factory.engines.base import ENGINES
from prefab.factory.spec import constitution
from prefab.factory.store import store
from prefab.judges import base as judges
from prefab.judges.kinds.critique import CritiqueConfig
from prefab.judges.registry import JUDGES
from prefab.pipelines.cli import main as cli
from prefab.pipelines.cli.commands import COMMANDS
from prefab.pipelines.cli.outputs import output_schema
from prefab.pipelines.config import schema
from prefab.pipelines.evaluation.policy import HeldOut, PolicyEvalConfig
from prefab.pipelines.store.export import base as exports
from prefab.pipelines.training.online import OnlineConfig
from prefab.pipelines.training.sweep import SweepConfig
from prefab.trainers.common import Lora
from prefab.trainers.data import DataConfig, Source
from prefab.trainers.registry import STAGES
from prefab.trainers.rl.config import VllmSettings
from prefab.trainers.rl.rewards import RewardConfig

DOCS = Path(__file__).parent
UNKNOWN = "?"  # a test finds it: give the field a description, or the column one in columns.yaml
GROUPS = {
    "Projects": [
        "init",
        "check",
        "check_data",
        "load_constitution",
        "lint_constitution",
        "explain_lint",
        "import_constitution",
        "constitution_log",
        "constitution_version",
        "load_pipeline",
        "resolve_pipeline",
    ],
    "Making data": ["plan", "run", "import_preferences"],
    "The store": ["query", "view", "rebuild", "export"],
    "Quality of labels and data": [
        "agreement",
        "audit_data",
        "audit_judge",
        "read_benchmark",
        "eval_judge",
        "score_verdicts",
        "label",
        "write_label_queue",
        "read_label_queue",
    ],
    "Training and evaluation": ["train", "sweep", "eval_policy", "weak_to_strong"],
    "The installation": ["doctor", "serve"],
}
PROTOCOLS = [judges.Judge, engines.Engine, exports.ExportFormat]
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Shapes|Units|Source):[ \t]*(.*)$")
PYTHON_PAGE = """\
# Reference of the Python API

Made from docstrings by `make reference`; do not edit. [Using Prefab from Python](python.md) has examples.
"""


# Options that are described once, at the top of the page.
EVERYWHERE = ("as_json", "json_schema", "output_format", "intervals")
COMMANDS_PAGE = """\
# Commands

Made from the code by `make reference`; do not edit. `prefab COMMAND --help` prints the same for one command. An option without a
value in its first column is a switch. Most commands also take

- `--json`: print the result as JSON. [output.schema.json](output.schema.json) is the schema: that of `prefab store info` is
  `#/$defs/store-info`, and that of a mistake, which has exit code 1 or 2, `#/$defs/error`. A number that is not finite is null;
- `--json-schema`: print the schema of this command's output alone;
- `--format csv`, `md` or `json`: print tables as CSV or Markdown, or the result as JSON;
- `--intervals`: show both bounds of each interval, not ±;
- `-h`, `--help`: print what this page says of the command.

Exit codes: {codes} [Runs](runs.md#exit-codes) says what each means for a run.
"""
CONFIGURATION_PAGE = """\
# Configuration

Made from the code by `make reference`; do not edit. Every file is YAML and read strictly: an unknown field is an error that names
the nearest one. `--set a.b=value` overrides a field on the command line. `pipelines/pipeline.schema.json` and
`constitutions/constitution.schema.json` let editors complete and check.
"""
STORE_PAGE = """\
# Tables of the store

Made from `factory/store/schema.sql` by `make reference`; do not edit. `prefab sql` reads these tables and views of
`prefab.duckdb`; all of them are computed from `ledger.sqlite`, and [the store](store.md) says how they are kept.
"""


def main() -> None:
    """Write the pages."""
    for name, page in render().items():
        (DOCS / name).write_text(page, encoding="utf-8")


def render() -> dict[str, str]:
    """Each page by the name of its file."""
    return {
        "reference.md": python_page(),
        "commands.md": commands_page(),
        "configuration.md": configuration_page(),
        "store-schema.md": store_page(),
        "output.schema.json": json.dumps(output_schema(), indent=2, ensure_ascii=False) + "\n",
    }


def commands_page() -> str:
    """Every command with its arguments, options and examples, in the order of `prefab --help`."""
    codes = re.search(r"Exit codes:\s+(.*?\))\.", inspect.getdoc(cli) or "", re.S)
    parts = [COMMANDS_PAGE.format(codes=" ".join(codes[1].split()) + "." if codes else "")]
    group = None
    for name, command in commands(get_command(cli.app), ""):
        title, examples = COMMANDS.get(name) or (group, ())
        if title != group:
            group = title
            parts.append(f"## {title}\n")
        parts.append(f"### prefab {name}\n")
        parts.append(" ".join((command.help or "").split()) + "\n")
        shown = [p for p in command.params if not p.hidden]
        rows = [_parameter_row(p) for p in shown if p.name not in EVERYWHERE]
        parts.append(
            "| argument or option | default | meaning |\n|---|---|---|\n" + "\n".join(rows)
        )
        also = [f"`{p.opts[0]}`" for p in shown if p.name in EVERYWHERE]
        parts += [f"Also {', '.join(also)}.\n"] if also else []
        if examples:
            parts.append("```text\n" + "\n".join(examples) + "\n```\n")
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The name and the object of each command below one, in the order of the groups of `--help`."""
    order = {word: position for position, word in enumerate(COMMANDS)}
    inner: dict[str, Any] = getattr(command, "commands", {})
    for word in sorted(inner, key=lambda word: order.get(f"{name} {word}".strip(), len(order))):
        yield from commands(inner[word], f"{name} {word}".strip())
    if not inner and not command.hidden:
        yield name, command


def _parameter_row(parameter: Any) -> str:
    kind = _value_type(parameter.type_descriptor.annotation)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if parameter.param_type_name == "argument":
        words = [parameter.metavar or parameter.name.upper()]
    else:
        words = [*parameter.opts, *parameter.secondary_opts]
        named = parameter.opts[0].lstrip("-").upper() if choices else kind.__name__.upper()
        words[0] += "" if parameter.is_bool_flag else f" {parameter.metavar or named}"
    default = parameter.default
    shown = "" if default in (None, False, "", [], ()) else f"`{default}`"
    shown = "required" if parameter.required else "on" if default is True else shown
    meaning = parameter.help or ""
    if choices:
        meaning += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
    return f"| {', '.join(f'`{cell(word)}`' for word in words)} | {shown} | {cell(meaning)} |"


def _value_type(annotation: Any) -> Any:
    """The type of one value: of a list's items, and without None."""
    inner = [kind for kind in get_args(annotation) if kind is not NoneType]
    return annotation if get_origin(annotation) is Literal or not inner else _value_type(inner[0])


def cell(words: str) -> str:
    """Words that stand in one cell of a table."""
    return " ".join(words.split()).replace("|", "\\|")


def store_page() -> str:
    """Every table and view of the store, with its columns, their types and what the schema says."""
    sql = store.SCHEMA.read_text(encoding="utf-8")
    created = r"((?:^--.*\n)*)^CREATE (TABLE|VIEW) (\w+) [^;]*;(?:  +(--.*))?"
    described = {
        name: " ".join(re.sub(r"^-- ?", "", f"{before}{after}", flags=re.M).split())
        + (" A view." if kind == "VIEW" else "")
        for before, kind, name, after in re.findall(created, sql, re.M)
    }
    with duckdb.connect() as connection:
        connection.execute(sql)
        columns = connection.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal "
            "ORDER BY table_oid, column_index"
        ).fetchall()
    meanings = yaml.safe_load((DOCS / "columns.yaml").read_text(encoding="utf-8"))
    parts = [STORE_PAGE]
    for name, words in described.items():
        parts += [f"## {name}\n"] + ([f"{words.strip()}\n"] if words else [])
        rows = [
            f"| `{column}` | {type} | {meanings.get(f'{name}.{column}') or meanings.get(column, UNKNOWN)} |"
            for table, column, type in columns
            if table == name
        ]
        parts.append("| column | type | meaning |\n|---|---|---|\n" + "\n".join(rows))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def configuration_page() -> str:
    """Every configuration class with its fields, in the order of a pipeline's life."""
    known = yaml.safe_load((DOCS / "fields.yaml").read_text(encoding="utf-8"))
    parts = [CONFIGURATION_PAGE]
    for title, sections in configurations().items():
        parts.append(f"## {title}\n")
        for name, config in sections.items():
            parts += [f"### {name}\n", _description(config) + "\n"]
            properties = config.model_json_schema(by_alias=True)["properties"]
            rows = [
                f"| `{field.alias or key}` | {_kind(properties[field.alias or key])} | {_default(field)} | "
                f"{_meaning(known, config, key)} |"
                for key, field in config.model_fields.items()
            ]
            parts.append(
                "| field | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows)
            )
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def configurations() -> dict[str, dict[str, type[BaseModel]]]:
    """The configuration classes: group, then what the class configures, then the class."""
    whole = schema.PipelineConfig
    sections: dict[str, type[BaseModel]] = {"The file": whole}
    for key, field in [*whole.model_fields.items(), *schema.PanelConfig.model_fields.items()]:
        (inner, *_) = [_model(kind) for kind in (field.annotation, *get_args(field.annotation))]
        inner = inner or next(filter(None, map(_model, get_args(field.annotation))), None)
        if inner:
            sections[f"`{key}:`" if key in whole.model_fields else f"`panel.{key}:`"] = inner
    sections["`panel.escalate.when:`"] = schema.WhenConfig
    sections["`critic:`"] = CritiqueConfig
    stages = {f"`prefab train {name}`": stage.config for name, stage in STAGES.items()}
    return {
        "Pipeline files": sections,
        "Engines": {f"`engine: {name}`": engine.Config for name, engine in ENGINES.items()},
        "Judges": {f"`kind: {name}`": judge.Config for name, judge in JUDGES.items()},
        "Constitutions": {
            "The constitution": constitution.ConstitutionModel,
            "A principle": constitution.PrincipleModel,
            "`applies_when:`": constitution.AppliesWhen,
            "A few-shot example": constitution.Example,
            "A test": constitution.TestCase,
            "`override:`": constitution.Override,
        },
        "Training and evaluation": {
            **stages,
            "`prefab train online`": OnlineConfig,
            "`prefab sweep`": SweepConfig,
            "`prefab eval policy`": PolicyEvalConfig,
            "`prompts:` of an evaluation": HeldOut,
            "`data:` of a training": DataConfig,
            "`data.sources:`": Source,
            "`lora:`": Lora,
            "`rewards:`": RewardConfig,
            "`vllm:` of PPO": VllmSettings,
        },
    }


def _model(kind: Any) -> type[BaseModel] | None:
    return kind if inspect.isclass(kind) and issubclass(kind, BaseModel) else None


def _meaning(known: dict[str, str], config: type[BaseModel], key: str) -> str:
    words = config.model_fields[key].description
    words = words or known.get(f"{config.__name__}.{key}") or known.get(key, UNKNOWN)
    return cell(words[0].upper() + words[1:] + "." * (not words.endswith(".")))


def _description(config: type[BaseModel]) -> str:
    return " ".join(line for line in (inspect.getdoc(config) or "").splitlines())


def _kind(found: dict[str, Any]) -> str:
    """What a field holds, in words, from its JSON schema."""
    if "const" in found or "enum" in found:
        return ", ".join(f"`{value}`" for value in found.get("enum", [found.get("const")]))
    if "anyOf" in found or "oneOf" in found:
        inner = (_kind(one) for one in found.get("anyOf", found.get("oneOf")))
        return " or ".join(dict.fromkeys(kind for kind in inner if kind))
    if found.get("type") == "array":
        return f"list of {_kind(found['items'])}" if found.get("items") else "list"
    words = {"string": "text", "integer": "whole number", "boolean": "true or false"}
    words |= {"object": "mapping", "null": "null", "number": "number"}
    return words.get(found.get("type", ""), "mapping")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its own defaults"
    return f"`{cell(json.dumps(value, default=str, ensure_ascii=False))}`"


def python_page() -> str:
    """The reference of the Python API."""
    parts = [PYTHON_PAGE]
    results: dict[type, None] = {}
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        for name in names:
            function = getattr(prefab, name)
            parts += [f"### prefab.{name}\n", signature(name, function), text(function.__doc__)]
            results.update(dict.fromkeys(returned(function)))
    parts.append("## What the functions return\n")
    parts += [describe(cls) for cls in sorted(results, key=place)]
    parts.append("## To add a judge, an engine or an export format\n")
    parts.append("[How it works](design.md#the-tree) says where each is registered.\n")
    parts += [describe(cls) for cls in PROTOCOLS]
    parts.append("## Errors\n")
    parts += [describe(cls) for _, cls in sorted(inspect.getmembers(errors, _is_error))]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _is_error(value: object) -> bool:
    return (
        inspect.isclass(value)
        and issubclass(value, Exception)
        and value.__module__ == errors.__name__
    )


def place(cls: type) -> str:
    """The full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def signature(name: str, function: Callable[..., Any]) -> str:
    """A function's signature as a block of Python, one parameter a line where it is long."""
    found = inspect.signature(function)
    parameters = [_parameter(p) for p in found.parameters.values() if p.name != "self"]
    result = f" -> {_annotation(found.return_annotation)}"
    name = f"async {name}" if inspect.iscoroutinefunction(function) else name
    line = f"{name}({', '.join(parameters)}){result}"
    if len(line) > 90:
        line = "".join([f"{name}(\n", *(f"    {p},\n" for p in parameters), f"){result}"])
    return f"```py\n{line}\n```\n"


def _parameter(parameter: inspect.Parameter) -> str:
    name = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    words = f"{name}{parameter.name}"
    if parameter.annotation is not parameter.empty:
        words += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        words += f" = {parameter.default!r}"
    return words


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return "None" if annotation is None else getattr(annotation, "__name__", str(annotation))


def returned(function: Callable[..., Any]) -> Iterator[type]:
    """Prefab's own classes in the annotation of what a function returns."""
    names = re.findall(r"\w+", _annotation(inspect.signature(function).return_annotation))
    scope = inspect.unwrap(function).__globals__
    for cls in (scope.get(name) for name in names):
        if inspect.isclass(cls) and cls.__module__.startswith("prefab."):
            yield cls


def text(docstring: str | None) -> str:
    """A Google-style docstring as Markdown: sections in bold, their entries as lists."""
    lines: list[str] = []
    in_section, entries = False, False  # what is returned is prose
    for line in inspect.cleandoc(docstring or "").splitlines():
        heading = SECTION.match(line)
        if heading:
            title = "Parameters" if heading[1] == "Args" else heading[1]
            lines += [f"**{title}:** {heading[2]}".rstrip()]
            in_section, entries = not heading[2], heading[1] not in ("Returns", "Yields")
            lines += [""] if in_section else []
        elif in_section and re.match(r" {4}\S", line):
            entry = entries and re.match(r" {4}([\w, ]+|`[\w`, ]+`): (.*)", line)
            lines.append(f"- `{entry[1].strip('`')}`: {entry[2]}" if entry else line[4:])
        elif in_section and line.startswith(" " * 8):
            lines.append(f"  {line.strip()}")
        else:
            in_section = in_section and not line
            lines.append(line)
    return "\n".join(lines) + "\n"


def describe(cls: type) -> str:
    """A class: its docstring, its fields, and its public methods and properties."""
    about = text(cls.__doc__)
    head, _, attributes = about.partition("**Attributes:**")
    described = dict(re.findall(r"^- `(\w+)`: (.*(?:\n  .*)*)", attributes, re.M))
    parts = [f"### {place(cls)}\n", head.rstrip() + "\n"]
    fields = [_field(name, kind, described.get(name, words)) for name, kind, words in _fields(cls)]
    parts += ["\n".join(fields) + "\n"] if fields else []
    for name, member in vars(cls).items():
        is_property = isinstance(member, property)
        function = member.fget if is_property else member
        if name.startswith(("_", "model_")) or not inspect.isfunction(function):
            continue
        parts.append(f"#### {cls.__name__}.{name}{' (property)' if is_property else ''}\n")
        parts += (
            [text(function.__doc__)]
            if is_property
            else [signature(name, function), text(function.__doc__)]
        )
    return "\n".join(parts)


def _field(name: str, kind: str, words: str) -> str:
    return f"- `{name}: {kind}`" + (f": {words}" if words else "")


def _fields(cls: type) -> Iterator[tuple[str, str, str]]:
    """Each public field: its name, its type, and its description or nothing."""
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            if not field.name.startswith("_"):
                yield field.name, _annotation(field.type), ""
    elif hasattr(cls, "model_fields"):
        written = {
            k: v for c in reversed(cls.__mro__) for k, v in inspect.get_annotations(c).items()
        }
        for name, info in cls.model_fields.items():
            yield name, _annotation(written.get(name, info.annotation)), info.description or ""


if __name__ == "__main__":
    main()
