"""Write docs/reference.md, the reference of the Python API, from signatures and docstrings.

`make reference` runs it; a test fails where the page is not up to date.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import prefab
from prefab.factory import errors
from prefab.factory.engines import base as engines
from prefab.judges import base as judges
from prefab.pipelines.store.export import base as exports

PAGE = Path(__file__).with_name("reference.md")
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
    "Training and evaluation": ["train", "sweep", "eval_policy"],
    "The installation": ["doctor", "serve"],
}
PROTOCOLS = [judges.Judge, engines.Engine, exports.ExportFormat]
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Shapes|Units|Source):[ \t]*(.*)$")
INTRODUCTION = """\
# Reference of the Python API

Made from docstrings by `make reference`; do not edit. [Using Prefab from Python](python.md) has examples.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
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
    in_section = False
    for line in inspect.cleandoc(docstring or "").splitlines():
        heading = SECTION.match(line)
        if heading:
            title = "Parameters" if heading[1] == "Args" else heading[1]
            lines += [f"**{title}:** {heading[2]}".rstrip()]
            in_section = not heading[2]
            lines += [""] if in_section else []
        elif in_section and re.match(r" {4}\S", line):
            entry = re.match(r" {4}([\w, ]+|`[\w`, ]+`): (.*)", line)
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
