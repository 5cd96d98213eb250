"""Constitutions: what people write in YAML, validated by one model that also gives editors their
JSON schema.

`python -m prefab.factory.spec.constitution --schema` writes
`constitutions/constitution.schema.json`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.spec import yamlio
from prefab.factory.spec.composition import (
    BUNDLED,
    DEEPEST,
    TEXTS,
    Inherited,
    changed,
    constitution_yaml,
    inherit,
    meaning,
    of_use,
    read_parent,
    together,
)
from prefab.factory.types import Constitution, Principle

SCHEMA_PATH = BUNDLED / "constitution.schema.json"
ReadParent = Callable[[str, str], tuple[str, str]]

Id = Annotated[str, StringConstraints(pattern=yamlio.ID_PATTERN, max_length=64)]
Text = Annotated[str, StringConstraints(pattern=r"\S")]
LintCode = Annotated[str, StringConstraints(pattern=r"^[A-Z][0-9]{3}$")]
Names = Annotated[
    list[Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]

# What a few-shot example of each shipped template must say; other templates take any of the fields.
EXAMPLE_FIELDS = {
    "critique": ("answer", "critique"),
    "revise": ("answer", "critique", "revision"),
    "pairwise": ("a", "b", "prefer"),
    "pairwise_cot": ("a", "b", "reasoning", "prefer"),
    "pairwise_scored": ("a", "b", "reasoning", "prefer"),
    "pointwise": ("answer", "score"),
    "rubric": ("answer", "fault"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class AppliesWhen(_Strict):
    """When a principle is used at all."""

    tags: list[Text] = Field(
        min_length=1, description="Tags of the prompt, any of which makes the principle apply."
    )


class LintSettings(_Strict):
    """What `prefab check` is not to warn of."""

    ignore: list[LintCode] = Field(
        min_length=1, description="Codes of lints; `prefab explain CODE` says what each means."
    )


class PrincipleModel(_Strict):
    """One rule: the same idea as a question for judges, for a critic, for a reviser, and as a
    statement of fault.
    """

    id: Id = Field(description="Short name, stable for ever: small letters, digits and hyphens.")
    title: Text = Field(description="For people; never sent to a model.")
    compare: Text = Field(
        description="The question a judge of two answers is asked: which answer ...?"
    )
    critique: Text = Field(description="What a critic of one answer is told to look for.")
    revise: Text = Field(description="How a faulty answer is to be rewritten.")
    criterion: Text = Field(
        description="A statement about one answer; when it is true, the answer is at fault."
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1e6,
        allow_inf_nan=False,
        description="Share in weighted draws and in preferences over several principles.",
    )
    tags: list[Text] = Field([], description="For people and reports; never sent to a model.")
    applies_when: AppliesWhen | None = Field(None, description="Left out: always.")
    formerly: list[Id] = Field(
        [], description="Earlier ids, oldest first: a rename then moves no draw."
    )
    enabled: bool = Field(True, description="false keeps the principle in the file and out of use.")
    lint: LintSettings | None = None


class Override(_Strict):
    """Fields of an inherited principle that are other ones here; those left out stay."""

    title: Text = ""
    compare: Text = ""
    critique: Text = ""
    revise: Text = ""
    criterion: Text = ""
    weight: float = Field(1.0, gt=0, le=1e6, allow_inf_nan=False)
    tags: list[Text] = []
    applies_when: AppliesWhen | None = Field(None, description="null: always.")
    enabled: bool = True


class Example(_Strict):
    """A few-shot example; which fields it needs depends on the template it is for."""

    prompt: Text
    principle: Id | None = Field(
        None, description="Shown only under this principle; left out: under every one."
    )
    answer: Text | None = None
    a: Text | None = None
    b: Text | None = None
    critique: Text | None = None
    revision: Text | None = None
    reasoning: Text | None = None
    prefer: Literal["a", "b", "tie"] | None = None
    score: int | None = Field(None, ge=1, le=9)
    fault: bool | None = None


class TestCase(_Strict):
    """A comparison whose outcome the author knows, which `prefab test` asks."""

    __test__ = False  # pytest would otherwise collect it

    prompt: Text
    a: Text
    b: Text
    prefer: Literal["a", "b", "tie"]
    principle: Id | None = Field(
        None, description="Asked under this principle; left out: under all that apply."
    )


class ConstitutionModel(_Strict):
    """A constitution: the rules by which answers are criticised, revised and compared."""

    id: Id
    title: Text
    licence: Text = Field(description="An SPDX name such as CC0-1.0.")
    source: Text | None = Field(None, description="Where imported texts come from.")
    commit: Text | None = Field(None, description="The version of the source.")
    extends: Names = Field(
        [],
        min_length=1,
        description="Constitutions whose principles, examples and tests are taken over: paths as "
        "seen from this file, or names of bundled ones.",
    )
    override: dict[Id, Override] = Field(
        {}, description="By the id of an inherited principle, the fields that are other ones here."
    )
    disable: list[Id] = Field([], description="Inherited principles that are not used.")
    selection: Literal["sample_one", "all", "weighted", "lexicographic"] = Field(
        "sample_one",
        description="Which principles judge a comparison: one drawn at random, all, one drawn by weight, "
        "or in the order of the file until one decides. Left out with `extends`: as there.",
    )
    principles: list[PrincipleModel] = Field([], min_length=1)
    examples: dict[Id, list[Example]] = Field(
        {},
        description="Few-shot examples by the template's name. They stand in place of inherited "
        "ones of the same template.",
    )
    tests: list[TestCase] = Field([], description="Comparisons whose outcome is known.")
    lint: LintSettings | None = None


def load_constitution(path: str | Path) -> Constitution:
    """Read and validate a constitution, with those that it extends.

    Args:
        path: A YAML file.

    Raises:
        ConfigError: Every mistake in the file and in those that it extends.
    """
    return parse_constitution(yamlio.read_text(path), str(path))


def load_constitutions(paths: Sequence[str | Path], selection: str | None = None) -> Constitution:
    """Read the constitutions of one run; several are one with all their principles.

    Args:
        paths: YAML files.
        selection: The selection of the panel, which stands above those of the constitutions.

    Raises:
        ConfigError: Every mistake in the files, or the constitutions do not fit together.
    """
    parts: list[tuple[str, Constitution]] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            parts.append((str(path), load_constitution(path)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return parts[0][1] if len(parts) == 1 else together(parts, selection)


def parse_constitution(text: str, file: str = "", read: ReadParent = read_parent) -> Constitution:
    """As `load_constitution`, from text (as the ledger keeps it). `file` is named in errors; `read`
    gives path and text of what a file extends.
    """
    return _parse(text, file) if "extends" not in text else _Reader(read).extending(text, file, ())


@lru_cache(maxsize=32)
def _parse(text: str, file: str) -> Constitution:
    """A text without `extends`."""
    return _made(_validated(yamlio.parse(text, file), Inherited()), text)


@dataclass(slots=True)
class _Reader:
    """Reads a constitution with all that it extends, each file once."""

    read: ReadParent
    known: dict[str, Constitution] = field(default_factory=dict)

    def extending(self, text: str, file: str, below: tuple[str, ...]) -> Constitution:
        """A text that may have `extends`. `below` are the files that led here."""
        document = yamlio.parse(text, file)
        names = list(_parents(document.value))
        if not names:
            return _parse(text, file)
        parents: list[tuple[str, Constitution]] = []
        problems: list[Problem] = []
        here = (*below, str(Path(file).resolve()))
        for path, name in names:
            try:
                parents.append(self.parent(name, file, here))
            except ConfigError as error:
                problems += [_placed(problem, document, path) for problem in error.problems]
        inherited = inherit(parents)
        try:
            model = _validated(document, None if problems else inherited)
        except ConfigError as error:
            raise ConfigError(list(dict.fromkeys([*error.problems, *problems]))) from None
        if problems:
            raise ConfigError(problems)
        made = _with_inherited(_made(model, text), model, inherited)
        made = replace(made, files=_files(text, file, parents))
        return replace(made, source=constitution_yaml(made))

    def parent(self, name: str, file: str, below: tuple[str, ...]) -> tuple[str, Constitution]:
        """What a file names under `extends`: its path, and the constitution."""
        found, text = self.read(name, file)
        _check_chain(found, below)
        path = str(Path(found).resolve())
        if path not in self.known:
            self.known[path] = self.extending(text, found, below)
        return found, self.known[path]


def _with_inherited(
    own: Constitution, model: ConstitutionModel, inherited: Inherited
) -> Constitution:
    """The constitution with what it inherits before its own."""
    gone = {*model.disable, *(p for p, o in model.override.items() if not o.enabled)}
    override = {name: _overridden(fields) for name, fields in model.override.items()}
    stated = "selection" in model.model_fields_set
    return replace(
        own,
        selection=own.selection if stated else next(iter(inherited.selections)),
        principles=(*changed(inherited, override, model.disable), *own.principles),
        examples={**inherited.examples, **own.examples},
        tests=(*of_use(inherited.tests, gone), *own.tests),
    )


def _placed(problem: Problem, document: yamlio.Document, path: yamlio.Path_) -> Problem:
    """A problem of a file that cannot be read is one of the line that names the file."""
    if problem.line:
        return problem
    message = f"{problem.file}: {problem.message}" if problem.file else problem.message
    return document.problem(path, message)


def _check_chain(file: str, below: tuple[str, ...]) -> None:
    """Raises: ConfigError when a file extends itself, or very many stand above it."""
    path = str(Path(file).resolve())
    if path in below:
        names = [Path(name).name for name in (*below[below.index(path) :], path)]
        raise ConfigError(f"a constitution cannot extend itself: {' -> '.join(names)}")
    if len(below) >= DEEPEST:
        raise ConfigError(f"more than {DEEPEST} constitutions extend one another")


def _parents(value: Any) -> Iterator[tuple[yamlio.Path_, str]]:
    """The names under `extends` of a raw value of any shape, with their paths."""
    names = value.get("extends") if isinstance(value, dict) else None
    if isinstance(names, str):
        yield ("extends",), names
    for index, name in enumerate(names if isinstance(names, list) else []):
        if isinstance(name, str):
            yield ("extends", index), name


def _files(
    text: str, file: str, parents: list[tuple[str, Constitution]]
) -> tuple[tuple[str, str], ...]:
    """The file and all that it extends, each once, as (name, text)."""
    found = {Path(file).name: text}
    for parent, constitution in parents:
        for name, inner in constitution.files or ((Path(parent).name, constitution.source),):
            if found.setdefault(name, inner) != inner:
                found[f"{Path(parent).parent.name}/{name}"] = inner
    return tuple(found.items())


def constitution_files(path: str | Path) -> list[Path]:
    """A constitution's file and those that it extends, as far as they can be read."""
    found: dict[Path, Path] = {}
    todo = [str(path)]
    while todo:
        here = todo.pop()
        if Path(here).resolve() not in found:
            found[Path(here).resolve()] = Path(here)
            with suppress(ConfigError):
                names = _parents(yamlio.load_document(here).value)
                todo += [read_parent(name, here)[0] for _, name in names]
    return list(found.values())


def _validated(document: yamlio.Document, inherited: Inherited | None) -> ConstitutionModel:
    """The document as a model. `inherited` is None where it could not be read; what depends on it
    is not checked then.

    Raises: ConfigError with every mistake.
    """
    checks: list[yamlio.Check] = [_examples, _tests]
    if inherited is not None:
        checks += [
            partial(check, inherited=inherited)
            for check in (_names, _in_use, _references, _inheritance, _extended)
        ]
    return yamlio.validate(document, ConstitutionModel, checks)


def _made(model: ConstitutionModel, text: str) -> Constitution:
    """The constitution of a file alone, without what it inherits."""
    examples = {
        name: tuple(example.model_dump(exclude_none=True) for example in rows)
        for name, rows in model.examples.items()
    }
    return Constitution(
        id=model.id,
        title=model.title,
        licence=model.licence,
        selection=model.selection,
        principles=tuple(_freeze(principle) for principle in model.principles),
        examples=examples,
        tests=tuple(test.model_dump() for test in model.tests),
        source=text,
        origin={
            name: text
            for name, text in (("source", model.source), ("commit", model.commit))
            if text is not None
        },
    )


def _overridden(model: Override) -> dict[str, Any]:
    """The fields that an override sets, as those of a `Principle`."""
    fields: dict[str, Any] = {
        "title": model.title,
        "compare": model.compare.strip(),
        "critique": model.critique.strip(),
        "revise": model.revise.strip(),
        "criterion": model.criterion.strip(),
        "weight": model.weight,
        "tags": tuple(model.tags),
        "applies_when": tuple(model.applies_when.tags) if model.applies_when else (),
        "enabled": model.enabled,
    }
    return {name: value for name, value in fields.items() if name in model.model_fields_set}


def _freeze(model: PrincipleModel) -> Principle:
    return Principle(
        id=model.id,
        title=model.title,
        compare=model.compare.strip(),
        critique=model.critique.strip(),
        revise=model.revise.strip(),
        criterion=model.criterion.strip(),
        weight=model.weight,
        tags=tuple(model.tags),
        applies_when=tuple(model.applies_when.tags) if model.applies_when else (),
        formerly=tuple(model.formerly),
        enabled=model.enabled,
    )


def principle_digest(principle: Principle) -> str:
    """32 hex digits that change exactly when the principle's questions, weight or conditions
    change.

    Title, tags, id, earlier ids, comments, key order and the folding of the YAML do not matter.
    """
    return _digest(meaning(principle))


def constitution_digest(constitution: Constitution) -> str:
    """32 hex digits over the selection, the principles in their order, and the examples."""
    return _digest(
        {
            "selection": constitution.selection,
            "principles": [[p.id, principle_digest(p)] for p in constitution.principles],
            "examples": {
                name: [dict(row) for row in rows] for name, rows in constitution.examples.items()
            },
        }
    )


def renamed(old: Constitution, new: Constitution) -> dict[str, str]:
    """The ids of `old` that a principle of `new` has taken over under another id: it lists the id
    under `formerly`, or it has the same meaning and the id is gone.
    """
    there = {p.id for p in new.principles}
    found = {former: p.id for p in new.principles for former in p.formerly}
    same = {principle_digest(p): p.id for p in new.principles}
    for p in old.principles:
        if p.id not in there and principle_digest(p) in same:
            found.setdefault(p.id, same[principle_digest(p)])
    return found


def _digest(value: Any) -> str:
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def json_schema() -> dict[str, Any]:
    """The JSON schema with which editors complete and check constitutions."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **ConstitutionModel.model_json_schema(),
        "anyOf": [{"required": ["principles"]}, {"required": ["extends"]}],
    }
    for one in schema["$defs"]["Override"]["properties"].values():
        one.pop("default", None)
    extends = schema["properties"]["extends"]
    one = {"type": "string", "pattern": r"\S"}
    extends |= {"anyOf": [one, {"type": "array", "items": extends.pop("items"), "minItems": 1}]}
    del (
        extends["type"],
        extends["minItems"],
        extends["default"],
        schema["properties"]["principles"]["default"],
    )
    schema["title"] = "Prefab constitution"
    return schema


def schema_text(schema: dict[str, Any]) -> str:
    """A schema as it is committed."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _rows(value: Any, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The mappings of a list in a raw value of any shape, with their indices."""
    rows = value.get(key) if isinstance(value, dict) else None
    for index, row in enumerate(rows if isinstance(rows, list) else []):
        if isinstance(row, dict):
            yield index, row


def _names(value: Any, inherited: Inherited) -> Iterator[tuple[yamlio.Path_, str]]:
    """Every id, present or former, names one principle; at least one principle is in use."""
    if isinstance(value, dict) and not {"principles", "extends"} & value.keys():
        yield ("principles",), "missing field; it is required"
    taken: dict[str, int] = {}
    rows = [(index, row, row.get("id")) for index, row in _rows(value, "principles")]
    for index, _, name in rows:
        if isinstance(name, str) and name in inherited.principles:
            yield (
                ("principles", index, "id"),
                f'the id "{name}" is inherited from {inherited.source[name]}; write what is other '
                "here under `override`, or choose another id",
            )
        elif isinstance(name, str) and taken.setdefault(name, index) != index:
            yield (
                ("principles", index, "id"),
                f'the id "{name}" is already taken by principles[{taken[name]}]',
            )
    others = {**dict.fromkeys(inherited.principles, -1), **taken}
    for index, row, _ in rows:
        former = row.get("formerly")
        for at, name in enumerate(former if isinstance(former, list) else []):
            if isinstance(name, str) and others.setdefault(name, -2 - index) != -2 - index:
                yield (
                    ("principles", index, "formerly", at),
                    f'"{name}" already names another principle',
                )


def _in_use(value: Any, inherited: Inherited) -> Iterator[tuple[yamlio.Path_, str]]:
    """At least one principle is in use."""
    override, disable = _settings(value)
    out = {name for _, name in disable}
    state = {name: fields.get("enabled") for name, fields in override.items()}
    used = [
        state.get(name, p.enabled) is not False and name not in out
        for name, p in inherited.principles.items()
    ]
    used += [row.get("enabled") is not False for _, row in _rows(value, "principles")]
    if used and not any(used):
        path = "extends" if inherited.principles else "principles"
        yield (path,), "every principle is disabled; enable at least one"


def _inheritance(value: Any, inherited: Inherited) -> Iterator[tuple[yamlio.Path_, str]]:
    """What is overridden and disabled is inherited, and no principle is left with two meanings."""
    override, disable = _settings(value)
    own = [row.get("id") for _, row in _rows(value, "principles")]
    named: list[tuple[yamlio.Path_, str]] = [(("override", name), name) for name in override]
    named += [(("disable", index), name) for index, name in disable]
    for path, name in named:
        if name not in inherited.principles:
            words = "it stands in this file: change it there" if name in own else ""
            known = yamlio.did_you_mean(name, inherited.principles)
            yield path, f'no principle "{name}" is inherited; {words or known}'
    settled = {name for _, name in disable}
    settled |= {name for name, fields in override.items() if set(TEXTS) <= fields.keys()}
    for name, (number, first, second) in inherited.clashes.items():
        if name not in settled:
            yield (
                ("extends", number),
                f'the principle "{name}" means one thing in {first} and another in {second}; list '
                f"it under `disable`, or give all of {', '.join(TEXTS)} under override.{name}",
            )


def _extended(value: Any, inherited: Inherited) -> Iterator[tuple[yamlio.Path_, str]]:
    """The extended constitutions have ids of their own and one selection."""
    if not isinstance(value, dict):
        return
    if isinstance(here := value.get("id"), str) and here in inherited.ids:
        yield ("id",), f"is the id of {inherited.ids[here]}, which it extends; choose another"
    for number, name, first, second in inherited.twice:
        yield ("extends", number), f'{first} and {second} both have the id "{name}"; rename one'
    if len(inherited.selections) > 1 and "selection" not in value:
        each = ", ".join(f"{file}: {name}" for name, file in inherited.selections.items())
        yield ("extends",), f"their selections differ ({each}); write `selection` here"


def _settings(value: Any) -> tuple[dict[str, dict[str, Any]], list[tuple[int, str]]]:
    """What a raw value of any shape overrides (by id), and what it disables (with indices)."""
    fields = value if isinstance(value, dict) else {}
    override, disable = fields.get("override"), fields.get("disable")
    fields = {
        name: inner if isinstance(inner, dict) else {}
        for name, inner in (override.items() if isinstance(override, dict) else ())
    }
    names = enumerate(disable if isinstance(disable, list) else [])
    return fields, [(index, name) for index, name in names if isinstance(name, str)]


def _references(value: Any, inherited: Inherited) -> Iterator[tuple[yamlio.Path_, str]]:
    """Tests and examples speak of principles that exist."""
    known = [row["id"] for _, row in _rows(value, "principles") if isinstance(row.get("id"), str)]
    known += inherited.principles
    places: list[tuple[yamlio.Path_, dict[str, Any]]] = [
        (("tests", index, "principle"), row) for index, row in _rows(value, "tests")
    ]
    examples = value.get("examples") if isinstance(value, dict) else None
    for name in examples if isinstance(examples, dict) else ():
        places += [
            (("examples", name, index, "principle"), row) for index, row in _rows(examples, name)
        ]
    for path, row in places:
        name = row.get("principle")
        if isinstance(name, str) and name not in known:
            yield path, f'no principle has the id "{name}"; {yamlio.did_you_mean(name, known)}'


def _examples(value: Any) -> Iterator[tuple[yamlio.Path_, str]]:
    """Examples of the shipped templates have the fields that those templates show."""
    examples = value.get("examples") if isinstance(value, dict) else None
    for name in examples if isinstance(examples, dict) else ():
        for index, row in _rows(examples, name):
            for need in EXAMPLE_FIELDS.get(name, ()):
                if row.get(need) is None:
                    yield (
                        ("examples", name, index, need),
                        f'missing field; an example for "{name}" needs it',
                    )


def _tests(value: Any) -> Iterator[tuple[yamlio.Path_, str]]:
    """The two answers of a test differ."""
    for index, row in _rows(value, "tests"):
        if isinstance(row.get("a"), str) and row["a"] == row.get("b"):
            yield ("tests", index, "b"), "is the same text as a; a test compares two answers"


if __name__ == "__main__":
    if sys.argv[1:] == ["--schema"]:
        SCHEMA_PATH.write_text(schema_text(json_schema()), encoding="utf-8")
        print(f"wrote {SCHEMA_PATH}")
    else:
        sys.exit("usage: python -m prefab.factory.spec.constitution --schema")
