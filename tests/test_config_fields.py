"""Every key that a configuration accepts is read by product code."""

from __future__ import annotations

import importlib
import re
from dataclasses import fields as fields_of_dataclass
from functools import cache
from pathlib import Path

from pydantic import BaseModel

from prefab.factory.types import Constitution, Principle, Prompt
from tests.support.field_reads import fields_read, keys_read

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("factory", "judges", "pipelines", "trainers")
# Looked up by key, since a run's record holds its configuration as plain data, or read of an
# object whose class the reader does not know: (class, where, fields).
BY_KEY = (
    ("ConstitutionModel", "factory/spec/constitution.py", {"extends"}),
    (
        "ChooseConfig",
        "factory/store/datasets.py",
        {"method", "margin", "demonstrations", "min_score"},
    ),
    ("EscalateConfig", "pipelines/store/derive.py", {"decides"}),
    ("PanelConfig", "pipelines/store/derive.py", {"combine"}),
    ("PanelConfig", "pipelines/config/schema.py", {"min_label_mass", "repeats", "weights"}),
    ("PipelineConfig", "factory/store/datasets.py", {"choose"}),
    ("Example", "pipelines/run/context.py", {"principle", "prefer", "fault", "score"}),
    ("VllmConfig", "factory/engines/vllm_process.py", {"log_file", "start_timeout_s"}),
    (
        "VerifierConfig",
        "judges/kinds/verifier.py",
        {"absolute", "ignore_case", "ignore_space", "tolerance", "whole"}
        | {"file_mb", "memory_mb", "packages", "processes", "timeout_s"},
    ),
)
# The discriminators of the unions choose the class, so nothing else need read them.
DISCRIMINATORS = {"engine", "kind"}
# Accepted and checked, but without effect: each with the reason.
WITHOUT_EFFECT = {
    **{("TestCase", name): "as above" for name in ("prompt", "a", "b", "prefer", "principle")},
}


def sources() -> dict[str, str]:
    """The product's code by path."""
    paths = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    return {p.relative_to(ROOT).as_posix(): p.read_text() for p in paths}


@cache
def models() -> dict[str, type[BaseModel]]:
    """Every configuration class, by its name."""
    found = {}
    for path, source in sources().items():
        if "BaseModel" in source or "Config" in source or "Strict" in source:
            name = "prefab." + path.removesuffix(".py").replace("/", ".")
            if "microworld.builder" in name or name.endswith("vllm_worker"):
                continue
            for value in vars(importlib.import_module(name)).values():
                ours = isinstance(value, type) and issubclass(value, BaseModel)
                if ours and value.__module__.startswith("prefab.") and value.model_fields:
                    found[value.__name__] = value
    return found


def unread(
    classes: dict[str, type], code: dict[str, str], own: dict[str, set[str]]
) -> set[tuple[str, str]]:
    """The fields (of the class that declares them) that the code reads of no class with them."""
    every = {
        name: set(cls.model_fields)
        if issubclass(cls, BaseModel)
        else {field.name for field in fields_of_dataclass(cls)}
        for name, cls in classes.items()
    }
    bases = {
        name: {o for o, other in classes.items() if other is not cls and issubclass(cls, other)}
        for name, cls in classes.items()
    }
    found = fields_read(every, bases, code.values())
    keys = {name: keys_of(name, code) for name in classes}
    found |= {(base, field) for name, field in found for base in bases[name]}
    return {
        (name, field)
        for name in classes
        for field in own[name]
        if (name, field) not in found and field not in keys[name]
    }


def keys_of(name: str, code: dict[str, str]) -> set[str]:
    """The fields of a class that are looked up by key, or printed by the templates."""
    found = {
        field
        for cls, path, fields in BY_KEY
        if cls == name and path in code
        for field in fields
        if field in keys_read(code[path]) or f"config.{field}" in code[path]
    }
    if name == "Example":
        for template in (ROOT / "judges" / "templates").glob("*.jinja"):
            found |= set(re.findall(r"\be\.(\w+)", template.read_text()))
    return found


def own_fields(cls: type) -> set[str]:
    """The fields that a class declares itself."""
    known = cls.model_fields if issubclass(cls, BaseModel) else cls.__annotations__
    return {name for name in cls.__annotations__ if name in known} - DISCRIMINATORS


def test_every_field_of_every_configuration_is_read():
    classes = {**models(), **{c.__name__: c for c in (Constitution, Principle, Prompt)}}
    assert len(classes) > 35 and {"PipelineConfig", "VllmConfig", "PpoConfig"} <= classes.keys()
    own = {name: own_fields(cls) for name, cls in classes.items()}
    dead = unread(classes, sources(), own)
    assert dead == WITHOUT_EFFECT.keys()


class Section(BaseModel):
    used: int = 0
    dead: int = 0
    other: int = 0


class Whole(BaseModel):
    section: Section = Section()
    name: str = ""


TOY = """
class Whole:
    section: Section

class Stranger:
    dead = other = 0

def work(whole: Whole, stranger: Stranger):
    section = whole.section
    stranger.dead, whole.section.other = stranger.other, 1
    return section.used, whole.name
"""


def test_a_dead_field_is_found_though_others_have_one_of_its_name():
    classes = {"Whole": Whole, "Section": Section}
    own = {name: own_fields(cls) for name, cls in classes.items()}
    assert unread(classes, {"toy.py": TOY}, own) == {("Section", "dead"), ("Section", "other")}
    used = TOY.replace("section.used", "section.used, section.dead")
    assert unread(classes, {"toy.py": used}, own) == {("Section", "other")}
