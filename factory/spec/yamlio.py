"""Strict YAML: values mean what they look like, and every mistake is reported with file, line and
column.

YAML 1.1 quietly reads `no` as false, `1:30` as 90, `010` as 8 and lets the second of two equal keys
win. Here those are errors, as are tabs, tags, aliases and merge keys. Numbers, `true`, `false` and
`null` mean what they look like (`1e-5` is a number, which PyYAML reads as text).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.redaction import secrets_in
from prefab.factory.spec import bounded

Path_ = tuple[str | int, ...]
Place = tuple[int, int]
Model = TypeVar("Model", bound=BaseModel)
Check = Callable[[Any], Iterable[tuple[Path_, str]]]

# of names that people choose; they stand in paths and in reports
ID_PATTERN = r"^[a-z0-9]+([-_][a-z0-9]+)*$"
_NAME = re.compile(r"[\w ./@+-]{1,64}")
# of names that are shown and may stand in paths, in any script
NAME_PATTERN = r"^[^/\\\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069]{1,80}$"
_SURROGATE = re.compile("[\ud800-\udfff]")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_WORDS = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
    "null": None,
    "Null": None,
    "NULL": None,
    "~": None,
    "": None,
}
# Unquoted texts that other YAML readers turn into something else: (pattern, what it would become).
_QUIET = (
    (re.compile(r"(?i)(yes|on)\Z"), "true"),
    (re.compile(r"(?i)(no|off)\Z"), "false"),
    (re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?\Z"), "a number in base 60"),
    (re.compile(r"[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?\Z"), "a date"),
    (re.compile(r"[-+]?0[0-9_]+\Z"), "an octal number"),
    (re.compile(r"[-+]?0[xob][0-9a-fA-F_]+\Z"), "a number in another base"),
    (re.compile(r"[-+]?[0-9]+_[0-9_.]*\Z"), "a number without its underscores"),
    (re.compile(r"(?i)([-+]?\.inf|\.nan)\Z"), "a number that is not finite"),
)
ALIASES = "anchors and aliases (&x, *x) are not read; write the value out"
_STRING_TAG = "tag:yaml.org,2002:str"
_PLAIN_TAGS = (_STRING_TAG, "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


@dataclass(slots=True)
class Document:
    """A parsed file: its value as plain Python, where each value and key stands, and the mistakes
    met on the way.
    """

    file: str
    text: str
    value: Any = None
    values: dict[Path_, Place] = field(default_factory=dict)
    keys: dict[Path_, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    origins: dict[Path_, str] = field(default_factory=dict)

    def problem(self, path: Path_, message: str, at_key: bool = False) -> Problem:
        """A `Problem` at a path; where the path itself does not exist, its nearest parent is
        pointed at.
        """
        where = self.keys if at_key else self.values
        for length in range(len(path), -1, -1):
            part = path[:length]
            if part in self.origins:
                return Problem(self.origins[part], 0, 0, path_text(path), message)
            if part in where or part in self.values:
                line, column = where.get(part) or self.values[part]
                return Problem(self.file, line, column, path_text(path), message)
        return Problem(self.file, 0, 0, path_text(path), message)


def path_text(path: Sequence[str | int]) -> str:
    """`("principles", 2, "weight")` as `principles[2].weight`. Of a key that is no name, only its
    beginning: the file may be another one than was meant, such as a list of passwords.
    """
    text = ""
    for part in path:
        if isinstance(part, str) and not _NAME.fullmatch(part):
            part = re.match(r"[\w-]{0,20}", part)[0] + "…"  # type: ignore[index]  # matches always
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean "x"?` when something known is close, otherwise the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    return f"known: {', '.join(known)}" if known else "nothing is known here"


def file_or_preset(path: Path, presets: Path) -> Path:
    """The path, or a preset where it is a bare name such as `demo` and no file has it. A folder of
    that name, such as the output of an earlier command, changes nothing.

    Raises: ConfigError for a bare name that neither a file nor a preset has.
    """
    preset = presets / f"{path.name.removesuffix('.yaml')}.yaml"
    if len(path.parts) != 1 or (path.exists() and not path.is_dir()):
        return path
    if preset.exists():
        return preset
    if path.suffix or path.exists():
        return path
    hint = did_you_mean(path.name, (file.stem for file in presets.glob("*.yaml")))
    raise ConfigError([Problem(str(path), 0, 0, "", f"neither a file nor a preset; {hint}")])


def read_text(path: str | Path, most: int = bounded.MAX_DOCUMENT) -> str:
    """The text of a UTF-8 file of at most `most` bytes (a byte order mark is dropped).

    Raises: ConfigError when it is missing, a directory, a pipe, unreadable, too long, or not UTF-8
    (with line and column).
    """
    path = Path(path)
    try:
        data = bounded.read_bytes(path, most)
    except FileNotFoundError:
        raise ConfigError([Problem(str(path), 0, 0, "", f"no such file{_sibling(path)}")]) from None
    except IsADirectoryError:
        raise ConfigError(
            [Problem(str(path), 0, 0, "", "is a directory; name a file in it")]
        ) from None
    except OSError as error:
        raise ConfigError(
            [Problem(str(path), 0, 0, "", f"cannot be read: {error.strerror}")]
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start
        line = data.count(b"\n", 0, start) + 1
        column = start - (data.rfind(b"\n", 0, start) + 1) + 1
        message = f"not UTF-8 (byte 0x{data[start]:02x}); save the file as UTF-8"
        raise ConfigError([Problem(str(path), line, column, "", message)]) from None


def _sibling(path: Path) -> str:
    """A hint at a file of nearly the same name in the same folder."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"; the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def load_document(path: str | Path) -> Document:
    """Read and parse a file. Mistakes inside it are collected in `problems`.

    Raises: ConfigError when the file itself cannot be read.
    """
    return parse(read_text(path), str(path))


def parse(text: str, file: str = "") -> Document:
    """Parse one YAML document. Never raises for what the text says: mistakes are in `problems`."""
    document = Document(file, text)
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        if root is None:
            document.problems.append(Problem(file, 1, 1, "", "the file is empty"))
        else:
            document.value = _Builder(document).build(root, ())
    except yaml.MarkedYAMLError as error:
        document.problems.extend(_scan_problems(document, error))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        message = f"the control character U+{code:04X} is not allowed; remove it"
        document.problems.append(Problem(file, line, column, "", message))
    except RecursionError:
        document.problems.append(Problem(file, 1, 1, "", "nested too deeply to be read"))
    return document


def scalar(text: str) -> Any:
    """The value of an unquoted scalar. Raises ValueError for what YAML would quietly turn into
    something else.
    """
    for pattern, becomes in _QUIET:
        if pattern.match(text):
            meant = f"{becomes}, or " if becomes in ("true", "false") else ""
            raise ValueError(
                f'`{text}` would be read by YAML as {becomes}; write {meant}"{text}" in quotes'
            )
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.match(text):
        return int(text) if len(text) < 4000 else text  # Python refuses to read longer integers
    if _FLOAT.match(text):
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"`{text}` is too large for a number")
        return value
    return text


class _Builder:
    """Turns composed nodes into plain Python, noting places and problems."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.seen: set[int] = set()

    def build(self, node: yaml.Node, path: Path_) -> Any:
        """The value of one node."""
        place = (node.start_mark.line + 1, node.start_mark.column + 1)
        self.document.values[path] = place
        if id(node) in self.seen:
            # A few nested aliases expand to gigabytes; and a value defined elsewhere cannot be read
            # where it stands.
            return self.complain(place, path, ALIASES)
        self.seen.add(id(node))
        if node.tag not in _PLAIN_TAGS:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.complain(place, path, f"the tag {tag} is not read; remove it")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index)) for index, child in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or node.style is not None:
            return self.whole(node.value, place, path)
        try:
            return scalar(node.value)
        except ValueError as error:
            self.complain(place, path, str(error))
            return node.value

    def mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        """A mapping with text keys, each once."""
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            place = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            key = self.key(key_node, place, path)
            if key is None:
                continue
            if key in result:
                self.complain(
                    place, (*path, key), f'duplicate key "{key}" (first in line {lines[key]})'
                )
                continue
            lines[key] = place[0]
            self.document.keys[(*path, key)] = place
            result[key] = self.build(value_node, (*path, key))
        return result

    def key(self, node: yaml.Node, place: Place, path: Path_) -> str | None:
        """The text of a key, or None when it is no text."""
        if not isinstance(node, yaml.ScalarNode):
            self.complain(place, path, "a key must be text; put it in quotes")
            return None
        if node.style is not None:
            return self.whole(str(node.value), place, path, "unknown field: its name ")
        if node.value == "<<":
            self.complain(place, path, "merge keys (<<) are not read; write the values out")
            return None
        try:
            value = scalar(node.value)
        except ValueError as error:
            self.complain(place, path, f"key {error}")
            return None
        if not isinstance(value, str):
            self.complain(place, path, f"the key `{node.value}` is not text; put it in quotes")
            return None
        return self.whole(value, place, path, "unknown field: its name ")

    def whole(self, text: str, place: Place, path: Path_, what: str = "") -> str | None:
        """The text, or None (and a problem) when it holds half of a surrogate pair."""
        if text.isascii() or not _SURROGATE.search(text):
            return text
        message = f"{what}holds half of a surrogate pair, which is not valid Unicode"
        self.complain(place, path, message)
        return None

    def complain(self, place: Place, path: Path_, message: str) -> None:
        """Record a problem."""
        self.document.problems.append(Problem(self.document.file, *place, path_text(path), message))


def _scan_problems(document: Document, error: yaml.MarkedYAMLError) -> list[Problem]:
    """What the scanner met, in words that help. It stops at its first mistake, except for tabs: all
    are shown.
    """
    problem, mark = error.problem or "cannot be read", error.problem_mark
    place, index = ((mark.line + 1, mark.column + 1), mark.index) if mark else ((1, 1), 0)
    if "'\\t'" in problem:
        places = [
            (number, line.index("\t") + 1)
            for number, line in enumerate(document.text.splitlines(), 1)
            if "\t" in line[: len(line) - len(line.lstrip())]
        ]
        message = "a tab; YAML is indented with spaces"
        return [Problem(document.file, *where, "", message) for where in places or [place]]
    messages = {
        "mapping values are not allowed": 'a ": " inside unquoted text, or wrong indentation; put the text in quotes',
        "could not find expected ':'": 'expected "key: value"; longer text needs quotes or a block (|)',
        "but found another document": "a second document (---); one a file",
        "found unexpected end of stream": "a quote is opened and never closed",
        "expected the node content": "a value is missing here",
        "expected <block end>": "wrong indentation, or a quote or bracket that ends too early",
        "expected ',' or ']'": "a list opened with [ is not closed before this",
        "expected ',' or '}'": "a mapping opened with { is not closed before this",
        "alias": ALIASES,
        "duplicate anchor": ALIASES,
        "undefined tag handle": "tags (!x) are not read; remove it",
        "that cannot start any token": f"text that starts with {document.text[index:][:1]} needs quotes",
    }
    for part, message in messages.items():
        if part in problem:
            return [Problem(document.file, *place, "", message)]
    return [Problem(document.file, *place, "", problem)]


def validate(document: Document, model: type[Model], checks: Sequence[Check] = ()) -> Model:
    """The document as `model`, or every mistake at once: those of the YAML, of the model, and of
    `checks`.

    `checks` are functions of the raw value that yield (path, message); they must accept values of
    any shape.
    Raises: ConfigError.
    """
    if foreign := _foreign(document, model):
        raise ConfigError([*safe_problems(document), foreign])
    problems: list[Problem] = [
        document.problem(path, message) for path, message in secrets_in(document.value)
    ]
    problems += document.problems
    result = None
    if document.value is not None or not problems:
        try:
            result = model.model_validate(document.value)
        except ValidationError as error:
            problems += model_problems(error, document, model)
        problems += [
            document.problem(path, message)
            for check in checks
            for path, message in check(document.value)
        ]
    if problems or result is None:
        raise ConfigError(tidy(problems))
    return result


def safe_problems(document: Document) -> list[Problem]:
    """The problems of a document that show nothing of its content."""
    told = (replace(problem, path="") for problem in document.problems)
    return list(dict.fromkeys(p for p in told if p.message == ALIASES))


def _foreign(document: Document, model: type[BaseModel]) -> Problem | None:
    """The one problem of a file that is something else altogether. It shows nothing of what the
    file holds, which may be anything: a file of passwords that was named by mistake.
    """
    value, known = document.value, set(model.model_fields)
    if isinstance(value, (str, int, float)):
        return Problem(document.file, 1, 1, "", "must be a mapping (key: value), not text")
    if isinstance(value, dict) and value and not known & value.keys():
        close = {c for key in value for c in difflib.get_close_matches(key, known, n=1, cutoff=0.6)}
        if not close:
            message = f"holds none of the fields that it should; known: {', '.join(sorted(known))}"
            return Problem(document.file, 1, 1, "", message)
    return None


def tidy(problems: list[Problem]) -> list[Problem]:
    """At most one problem for each place (the first; later ones mostly follow from it), in the
    order of the file.
    """
    first: dict[tuple[str, int, int, str], Problem] = {}
    for problem in problems:
        first.setdefault((problem.file, problem.line, problem.column, problem.path), problem)
    return sorted(first.values(), key=lambda problem: (problem.file, problem.line, problem.column))


def model_problems(
    error: ValidationError,
    document: Document,
    model: type[BaseModel],
    as_written: Callable[[Path_], Path_] = lambda path: path,
) -> list[Problem]:
    """Pydantic's errors as problems in the file. `as_written` gives by a field's path in the model
    where it stands in the document.
    """
    problems = []
    for entry in error.errors(include_url=False):
        inner = tuple(
            part
            for part in entry["loc"]
            if not (isinstance(part, str) and part.startswith("function-"))
        )
        unknown = entry["type"] == "extra_forbidden"
        message = unknown_field(inner, json_schema(model)) if unknown else _message(entry)
        if not inner and isinstance(entry.get("input"), str):
            message = "must be a mapping (key: value), not text"
        at_key = unknown or entry["type"] == "unknown_field"  # the latter: of a kind's own model
        problems.append(document.problem(as_written(inner), message, at_key=at_key))
    return problems


@cache
def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON schema, which for a pipeline takes 0.3 s to make. Not to be changed."""
    return model.model_json_schema()


def unknown_field(loc: Path_, schema: dict[str, Any]) -> str:
    """The message about an unknown field: the known one that it resembles, or all known ones."""
    node = schema
    for part in loc[:-1]:
        node = _resolve(node, schema)
        node = (
            node.get("items", {})
            if isinstance(part, int)
            else (
                node.get("properties", {}).get(part)
                or node.get("additionalProperties")
                or next(iter(node.get("patternProperties", {}).values()), {})
            )
        )
    return (
        f"unknown field; {did_you_mean(str(loc[-1]), _resolve(node, schema).get('properties', {}))}"
    )


def _resolve(node: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """Follow references, and the one non-null branch of an optional value."""
    while isinstance(node, dict) and ("$ref" in node or "anyOf" in node or "allOf" in node):
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        else:
            node = next(
                (part for part in node.get("anyOf") or node["allOf"] if part.get("type") != "null"),
                {},
            )
    return node if isinstance(node, dict) else {}


_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
    "model_attributes_type": "a mapping (key: value)",
    "mapping_type": "a mapping (key: value)",
}


def _message(entry: Any) -> str:
    """One pydantic error in plain words, with the remedy."""
    kind, value, context = entry["type"], entry.get("input"), entry.get("ctx", {})
    if kind == "missing":
        return "missing field; it is required"
    if kind in _KINDS:
        quotes = (
            "; put it in quotes"
            if kind == "string_type" and isinstance(value, (bool, int, float))
            else ""
        )
        return f"must be {_KINDS[kind]}, not {describe(value)}{quotes}"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", context.get("expected", ""))
        return f"must be one of {', '.join(known)}, not {describe(value)}" + _close(value, known)
    if kind in ("value_error", "unknown_field"):
        return str(context.get("error", entry["msg"]))
    if kind == "string_pattern_mismatch" and context.get("pattern") == r"\S":
        return "is empty; write some text"
    if kind == "string_pattern_mismatch" and context.get("pattern") == ID_PATTERN:
        return f"must be small letters and digits, joined by - or _, not {describe(value)}"
    if kind == "string_pattern_mismatch" and context.get("pattern") == NAME_PATTERN:
        return (
            f"must be at most 80 characters without / and control characters, not {describe(value)}"
        )
    text = entry["msg"].replace("Input should", "must", 1).replace("must be a valid", "must be a")
    text = re.sub(r"^(String|List|Dictionary|Value) should", "must", text)
    return (
        f"{text}, not {describe(value)}" if kind not in ("too_short", "string_too_short") else text
    )


def _close(value: Any, known: list[str]) -> str:
    close = difflib.get_close_matches(str(value), known, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def describe(value: Any) -> str:
    """A value in words, for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 40 else f'"{value[:37]}..."'
    return "a list" if isinstance(value, (list, tuple)) else "a mapping"
