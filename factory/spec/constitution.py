"""Constitutions: what people write in YAML, validated by one model that also gives editors their
JSON schema.

`python -m prefab.factory.spec.constitution --schema` writes
`constitutions/constitution.schema.json`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from prefab.factory.paths import PACKAGE
from prefab.factory.spec import yamlio
from prefab.factory.types import Constitution, Principle

SCHEMA_PATH = PACKAGE / "constitutions" / "constitution.schema.json"

Id = Annotated[str, StringConstraints(pattern=yamlio.ID_PATTERN, max_length=64)]
Text = Annotated[str, StringConstraints(pattern=r"\S")]

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
    selection: Literal["sample_one", "all", "weighted", "lexicographic"] = Field(
        "sample_one",
        description="Which principles judge a comparison: one drawn at random, all, one drawn by weight, "
        "or in the order of the file until one decides.",
    )
    principles: list[PrincipleModel] = Field(min_length=1)
    examples: dict[Id, list[Example]] = Field(
        {}, description="Few-shot examples by the template's name."
    )
    tests: list[TestCase] = Field([], description="Comparisons whose outcome is known.")


def load_constitution(path: str | Path) -> Constitution:
    """Read and validate a constitution.

    Args:
        path: A YAML file.

    Raises:
        ConfigError: Every mistake in the file.
    """
    return parse_constitution(yamlio.read_text(path), str(path))


@lru_cache(maxsize=32)
def parse_constitution(text: str, file: str = "") -> Constitution:
    """As `load_constitution`, from text (as the ledger keeps it). `file` is named in errors."""
    model = yamlio.validate(
        yamlio.parse(text, file), ConstitutionModel, [_names, _references, _examples, _tests]
    )
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
    )


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
    return _digest(
        {
            "compare": principle.compare,
            "critique": principle.critique,
            "revise": principle.revise,
            "criterion": principle.criterion,
            "weight": principle.weight,
            "enabled": principle.enabled,
            "applies_when": sorted(set(principle.applies_when)),
        }
    )


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
    }
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


def _names(value: Any) -> Iterator[tuple[yamlio.Path_, str]]:
    """Every id, present or former, names one principle; at least one principle is in use."""
    taken: dict[str, int] = {}
    rows = list(_rows(value, "principles"))
    for index, row in rows:
        name = row.get("id")
        if isinstance(name, str) and name in taken:
            yield (
                ("principles", index, "id"),
                f'the id "{name}" is already taken by principles[{taken[name]}]',
            )
        elif isinstance(name, str):
            taken[name] = index
    for index, row in rows:
        former = row.get("formerly")
        for at, name in enumerate(former if isinstance(former, list) else []):
            if isinstance(name, str) and taken.setdefault(name, -1 - index) not in (-1 - index,):
                yield (
                    ("principles", index, "formerly", at),
                    f'"{name}" already names another principle',
                )
    if rows and all(row.get("enabled") is False for _, row in rows):
        yield ("principles",), "every principle is disabled; enable at least one"


def _references(value: Any) -> Iterator[tuple[yamlio.Path_, str]]:
    """Tests and examples speak of principles that exist."""
    known = [row["id"] for _, row in _rows(value, "principles") if isinstance(row.get("id"), str)]
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
