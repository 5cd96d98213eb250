"""Discriminated unions over the registries: which configuration class checks an engine or a judge.

A union is built when a pipeline is first checked, and imports only the kinds that the pipeline
names. Kinds of other packages (entry points) are checked in the same way, and a JSON schema made at
run time has them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from functools import reduce
from operator import or_
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from prefab.factory.plugins import Registry
from prefab.factory.spec import yamlio

_KNOWN_ERRORS = frozenset(get_args(core_schema.ErrorType))


BUNDLED_ONLY: ContextVar[bool] = ContextVar("BUNDLED_ONLY", default=False)


def _in_schema(registry: Registry) -> list[str]:
    """The kinds that a JSON schema names: all that are installed, or the bundled ones."""
    return list(registry.builtin if BUNDLED_ONLY.get() else registry)


def config_class(registry: Registry, kind: str) -> type[BaseModel]:
    """The pydantic model of this kind's fields: the registered class itself, or its `Config`.

    Raises: KeyError for a kind that does not exist.
    """
    found = registry[kind]
    return found if isinstance(found, type) and issubclass(found, BaseModel) else found.Config


class OneOf:
    """Annotation of a field that holds one of a registry's kinds, chosen by the field `by`.

    With `keep_raw` the checked value stays as it was written, without the kind's defaults: a run
    is identified by its configuration, and a new option of an engine makes no new run.
    """

    def __init__(self, registry: Registry, by: str, noun: str, keep_raw: bool = False) -> None:
        self.registry, self.by, self.noun, self.keep_raw = registry, by, noun, keep_raw

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                _dump, info_arg=True, return_schema=core_schema.any_schema()
            ),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        classes = [config_class(self.registry, kind) for kind in _in_schema(self.registry)]
        union: Any = Annotated[reduce(or_, classes), Field(discriminator=self.by)]
        return handler(TypeAdapter(union).core_schema)

    def _validate(self, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError(
                "value_error", "must be a mapping (key: value), not " + yamlio.describe(value)
            )
        kind = value.get(self.by)
        if not isinstance(kind, str) or kind not in self.registry:
            raise _errors(self.noun, [_error(self._unknown(kind), (self.by,), value)])
        model = config_class(self.registry, kind)
        given = {k: v for k, v in value.items() if k != self.by or self.by in model.model_fields}
        try:
            checked = model.model_validate(given)
        except ValidationError as error:
            raise _errors(self.noun, _rewritten(error, model)) from None
        return dict(value) if self.keep_raw else checked

    def _unknown(self, kind: Any) -> str:
        known = list(self.registry)
        if kind is None:
            return f"missing field; it is required ({', '.join(known)})"
        return (
            f"there is no {self.noun} {yamlio.describe(kind)}; "
            f"{yamlio.did_you_mean(str(kind), known)}"
        )


class KindName:
    """Annotation of a field that names one kind of a registry."""

    def __init__(self, registry: Registry, noun: str) -> None:
        self.registry, self.noun = registry, noun

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._validate, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "enum": _in_schema(self.registry)}

    def _validate(self, name: str) -> str:
        if name not in self.registry:
            raise ValueError(
                f'there is no {self.noun} "{name}"; '
                f"{yamlio.did_you_mean(name, list(self.registry))}"
            )
        return name


def checked_raw(model: type[BaseModel]) -> Any:
    """Validator for a mapping of one model's fields that stays as it was written."""

    def check(value: Any) -> Any:
        if isinstance(value, Mapping):
            try:
                model.model_validate(value)
            except ValidationError as error:
                raise _errors(model.__name__, _rewritten(error, model)) from None
        return value

    return check


def _dump(value: Any, info: core_schema.SerializationInfo) -> Any:
    return value.model_dump(mode=info.mode) if isinstance(value, BaseModel) else value


def _rewritten(error: ValidationError, model: type[BaseModel]) -> list[InitErrorDetails]:
    """The errors of one kind's model; an unknown field is told with the nearest known one."""
    lines: list[InitErrorDetails] = []
    for entry in error.errors(include_url=False):
        loc, kind = entry["loc"], entry["type"]
        if kind == "extra_forbidden":
            words = yamlio.unknown_field(loc, yamlio.json_schema(model))
            lines.append(_error(words, loc, entry["input"], "unknown_field"))
        elif kind in _KNOWN_ERRORS:
            line: InitErrorDetails = {"type": kind, "loc": loc, "input": entry["input"]}
            if "ctx" in entry:
                line["ctx"] = entry["ctx"]
            lines.append(line)
        else:
            lines.append(_error(entry["msg"], loc, entry["input"]))
    return lines


def _error(
    words: str, loc: tuple[int | str, ...], value: Any, kind: str = "value_error"
) -> InitErrorDetails:
    # PydanticCustomError fills in {braces} from a context; without one the words stay as they are.
    return {"type": PydanticCustomError(kind, words), "loc": loc, "input": value}


def _errors(title: str, lines: list[InitErrorDetails]) -> ValidationError:
    return ValidationError.from_exception_data(title, lines)
