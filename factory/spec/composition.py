"""How constitutions are put together: what a file inherits from those that it `extends`, and what
several constitutions of one run are together.

Everything here works on `Constitution`s that are read already; `constitution` reads the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from prefab.factory.errors import ConfigError
from prefab.factory.paths import PACKAGE
from prefab.factory.spec import yamlio
from prefab.factory.types import Constitution, Principle, PrincipleSelection

BUNDLED = PACKAGE / "constitutions"
DEEPEST = 16  # constitutions that extend one another; more is surely a mistake
TEXTS = ("compare", "critique", "revise", "criterion")


def meaning(principle: Principle) -> dict[str, Any]:
    """The parts of a principle that decide what is asked, and what it weighs."""
    return {
        "compare": principle.compare,
        "critique": principle.critique,
        "revise": principle.revise,
        "criterion": principle.criterion,
        "weight": principle.weight,
        "enabled": principle.enabled,
        "applies_when": sorted(set(principle.applies_when)),
    }


def bundled_names() -> list[str]:
    """The constitutions that come with Prefab, by name."""
    return sorted(path.stem for path in BUNDLED.glob("*.yaml"))


def read_parent(name: str, file: str) -> tuple[str, str]:
    """The constitution that a file names under `extends`.

    Args:
        name: A path, as seen from the folder of `file`, or the name of a bundled constitution.
        file: The file that extends it; empty: the current folder.

    Returns:
        Its path, and its text.

    Raises:
        ConfigError: It does not exist or cannot be read.
    """
    beside = Path(file).parent / name
    if not beside.exists() and Path(name).name == name:
        bundled = BUNDLED / f"{name.removesuffix('.yaml')}.yaml"
        if bundled.is_file():
            return str(bundled), yamlio.read_text(bundled)
        if "." not in name:
            known = yamlio.did_you_mean(name, bundled_names())
            raise ConfigError(f"no bundled constitution is named {name!r}, {known}")
    return str(beside), yamlio.read_text(beside)


@dataclass(slots=True)
class Inherited:
    """What a constitution takes over: the principles by id, where each comes from, few-shot
    examples by template, and tests. `clashes` are ids of principles with several meanings (number
    of the parent, both files), `twice` are parents of one id (number, id, both files).
    """

    principles: dict[str, Principle] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)
    examples: dict[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    tests: tuple[Mapping[str, Any], ...] = ()
    clashes: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)  # of the parents -> their files
    twice: list[tuple[int, str, str, str]] = field(default_factory=list)
    selections: dict[PrincipleSelection, str] = field(
        default_factory=dict
    )  # of the parents -> a file with it


def inherit(parents: Sequence[tuple[str, Constitution]]) -> Inherited:
    """The union of constitutions, each with its file's name: principles in the order of the
    parents, one of equal meaning once. Examples of one template stand one after another.
    """
    found = Inherited()
    for number, (file, parent) in enumerate(parents):
        if found.ids.setdefault(parent.id, file) != file:
            found.twice.append((number, parent.id, found.ids[parent.id], file))
        found.selections.setdefault(parent.selection, file)
        for principle in parent.principles:
            known = found.principles.setdefault(principle.id, principle)
            found.source.setdefault(principle.id, file)
            if meaning(known) != meaning(principle):
                found.clashes.setdefault(principle.id, (number, found.source[principle.id], file))
        for template, rows in parent.examples.items():
            before = found.examples.get(template, ())
            found.examples[template] = before + tuple(row for row in rows if row not in before)
        found.tests += tuple(test for test in parent.tests if test not in found.tests)
    return found


def changed(
    found: Inherited, override: Mapping[str, Mapping[str, Any]], disabled: Iterable[str]
) -> Iterator[Principle]:
    """The inherited principles with the fields that `override` sets, and without those disabled."""
    out = set(disabled)
    for name, principle in found.principles.items():
        made = replace(principle, **override.get(name, {}))
        yield replace(made, enabled=False) if name in out else made


def of_use(
    tests: Iterable[Mapping[str, Any]], disabled: Iterable[str]
) -> Iterator[Mapping[str, Any]]:
    """The tests that are not of a disabled principle."""
    out = set(disabled)
    return (test for test in tests if test["principle"] not in out)


def together(
    parts: Sequence[tuple[str, Constitution]], selection: str | None = None
) -> Constitution:
    """Several constitutions as one: all their principles, examples and tests.

    Args:
        parts: Each with the name of its file.
        selection: The selection of the panel, which stands above those of the constitutions.

    Raises:
        ConfigError: Two have the same id, one principle id has two meanings, or the selections
            differ and none is given.
    """
    found = inherit(parts)
    for _, name, first, second in found.twice:
        raise ConfigError(f'{first} and {second} both have the id "{name}"; rename one')
    for name, (_, first, second) in found.clashes.items():
        raise ConfigError(
            f'the principle "{name}" of {first} has another meaning in {second}; write a '
            "constitution that extends both, and settle it there under `override` or `disable`"
        )
    if selection is None and len(found.selections) > 1:
        each = ", ".join(f"{file}: {name}" for name, file in found.selections.items())
        raise ConfigError(f"their selections differ ({each}); say which under panel.selection")
    made = Constitution(
        id="-and-".join(found.ids)[:64].rstrip("-_"),
        title=" + ".join(part.title for _, part in parts),
        licence=" AND ".join(dict.fromkeys(part.licence for _, part in parts)),
        selection=parts[0][1].selection,
        principles=tuple(found.principles.values()),
        examples=found.examples,
        tests=found.tests,
        files=tuple(
            named
            for file, part in parts
            for named in (part.files or ((Path(file).name, part.source),))
        ),
    )
    return replace(made, source=constitution_yaml(made))


def constitution_yaml(constitution: Constitution) -> str:
    """A constitution as a file that stands alone, without `extends`. Read again, it means the
    same.
    """
    return to_yaml(
        {
            "id": constitution.id,
            "title": constitution.title,
            "licence": constitution.licence,
            **constitution.origin,
            "selection": constitution.selection,
            "principles": [principle_data(principle) for principle in constitution.principles],
            "examples": {
                name: [dict(row) for row in rows] for name, rows in constitution.examples.items()
            },
            "tests": [
                {name: value for name, value in test.items() if value is not None}
                for test in constitution.tests
            ],
        }
    )


def principle_data(principle: Principle) -> dict[str, Any]:
    """A principle as its fields in YAML; fields that have their default are left out."""
    data: dict[str, Any] = {name: getattr(principle, name) for name in ("id", "title", *TEXTS)}
    more = {
        "weight": (principle.weight, 1.0),
        "tags": (list(principle.tags), []),
        "formerly": (list(principle.formerly), []),
        "enabled": (principle.enabled, True),
    }
    data |= {name: value for name, (value, default) in more.items() if value != default}
    if principle.applies_when:
        data["applies_when"] = {"tags": list(principle.applies_when)}
    return data


class _Dumper(yaml.SafeDumper):
    """Writes what `yamlio` reads: a text that YAML could read as something else is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value out each time it occurs."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of a list below its key."""
        super().increase_indent(flow, False)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        plain = yamlio.scalar(text) == text
    except ValueError:
        plain = False
    block = (
        "\n" in text and text == text.strip() and not any(ord(c) < 32 for c in text if c != "\n")
    )
    style = "|" if block else None if plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _text)


def to_yaml(data: Mapping[str, Any]) -> str:
    """A mapping as YAML; empty lists and mappings at the top are left out."""
    kept = {name: value for name, value in data.items() if value not in ({}, [])}
    return yaml.dump(kept, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
