"""Constitutions of other projects, read from the layouts in which they are published.

Their texts are kept word for word. Where a layout has no question for a judge of two answers, no
critique, or no statement of fault, that text is derived from what is there (see `FRAMES`).

Sources: the prompts of Bai et al. (2022), Constitutional AI (`CritiqueRevisionInstructions.json`
and its neighbours); llm-swarm's `constitution.json`; LangChain's `ConstitutionalPrinciple`;
HealthBench's rubrics (`criterion`, `points`, `tags`); Rubrics as Rewards (`title`, `description`,
`weight`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.numbers import counted
from prefab.factory.spec import yamlio
from prefab.factory.spec.composition import to_yaml
from prefab.factory.spec.constitution import parse_constitution
from prefab.factory.types import Constitution

UNKNOWN_LICENCE = "LicenseRef-unknown"
# What is derived from what: by the kind of text that a layout has, a frame for each other text.
FRAMES = {
    "critique": {
        "compare": "Choose the answer that gives less reason for this critique: {}",
        "criterion": "The answer has the fault that this critique asks about: {}",
    },
    "compare": {
        "critique": "Say where the answer falls short of what this asks for: {}",
        "revise": "Rewrite the answer so that it does better in what this asks for: {}",
        "criterion": "The answer falls short of what this asks for: {}",
    },
    "rule": {
        "compare": "Choose the answer that keeps better to this rule: {}",
        "critique": "Say where the answer breaks this rule: {}",
        "revise": "Rewrite the answer so that it keeps to this rule: {}",
        "criterion": "The answer breaks this rule: {}",
    },
    "merit": {
        "compare": "Choose the answer of which this statement is more true: {}",
        "critique": "Say how the answer falls short of this statement: {}",
        "revise": "Rewrite the answer so that this statement is true of it: {}",
        "criterion": "This statement is not true of the answer: {}",
    },
    "pitfall": {
        "compare": "Choose the answer of which this statement is less true: {}",
        "critique": "Say how this statement is true of the answer: {}",
        "revise": "Rewrite the answer so that this statement is no longer true of it: {}",
        "criterion": "This statement is true of the answer: {}",
    },
}
_TITLE = 60  # characters of a title that is made from a text


@dataclass(slots=True)
class ImportedConstitution:
    """A constitution made from other projects' files.

    Attributes:
        text: The YAML file.
        constitution: The same, read.
        layouts: The layout of each file.
        notes: What was derived, changed or left out.
    """

    text: str
    constitution: Constitution
    layouts: dict[str, str]
    notes: list[str]

    def data(self) -> dict[str, Any]:
        """As plain data, without the text."""
        return {
            "id": self.constitution.id,
            "principles": [principle.id for principle in self.constitution.principles],
            "examples": {name: len(rows) for name, rows in self.constitution.examples.items()},
            "layouts": self.layouts,
            "notes": self.notes,
        }


@dataclass(slots=True)
class _Builder:
    """The principles and examples read so far."""

    principles: list[dict[str, Any]] = field(default_factory=list)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)
    selection: str = "sample_one"
    taken: set[str] = field(default_factory=set)

    def add(self, name: str, kind: str, text: str, title: str = "", **fields: Any) -> None:
        """A principle from one text of a kind in `FRAMES`, and the texts that are given."""
        given = {"critique": text} if kind == "critique" else {}
        given = {"compare": text} if kind == "compare" else given
        texts = {which: frame.format(text) for which, frame in FRAMES[kind].items()} | given
        number = len(self.principles) + 1
        self.principles.append(
            {
                "id": self.new_id(name or f"principle-{number}"),
                "title": _shortened(title or text),
                **{which: texts.get(which, "") for which in ("compare", "critique")},
                "revise": fields.pop("revise", texts.get("revise", "")),
                "criterion": texts["criterion"],
                **{name: value for name, value in fields.items() if value not in (None, [], 1.0)},
            }
        )

    def new_id(self, name: str) -> str:
        """An id of its own from a name."""
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:56].strip("-")
        slug = slug or f"principle-{len(self.principles) + 1}"
        free, number = slug, 1
        while free in self.taken:
            number += 1
            free = f"{slug}-{number}"
        self.taken.add(free)
        return free

    def turn(self, prompt: str, answer: str, asked: str, critique: str, revision: str) -> None:
        """A few-shot conversation: answer, critique, and revision. Our critics say `None.` or
        `Fault: ...`; an answer that was not revised had no fault.
        """
        base = {"prompt": prompt, "answer": answer}
        principle = next((p["id"] for p in self.principles if p["critique"] == asked), None)
        if principle is not None:
            base = {"principle": principle, **base}
        same = revision.strip() == answer.strip()
        said = "None." if same else f"Fault: {critique}"
        self.examples.setdefault("critique", []).append({**base, "critique": said})
        if not same:
            rows = self.examples.setdefault("revise", [])
            rows.append({**base, "critique": said, "revision": revision})


@dataclass(frozen=True, slots=True)
class Layout:
    """One published layout: how it is recognised and read."""

    name: str
    shape: str
    fits: Callable[[Any], bool]
    read: Callable[[Any, _Builder], None]


def import_constitution(
    files: Sequence[str | Path],
    id: str = "",
    title: str = "",
    licence: str = "",
    source: str = "",
    commit: str = "",
) -> ImportedConstitution:
    """Make a constitution from files of other projects.

    Args:
        files: One or more files, each in one of `LAYOUTS`: principles, comparison strings and
            few-shot examples may stand in files of their own.
        id: The id of the constitution; default: from the first file's name.
        title: Its title; default: the first file's name.
        licence: The licence of the texts, an SPDX name; default: as the files say, else unknown.
        source: Where the files come from; default: as the files say.
        commit: The version of the source.

    Raises:
        ConfigError: A file cannot be read, has none of the layouts, or there is no principle.
    """
    built = _Builder()
    layouts = _read_files(files, built)
    if not built.principles:
        names = ", ".join(f"{file} ({name})" for file, name in layouts.items())
        raise ConfigError(f"{names}: there are only examples; name a file with principles too")
    origin = dict(built.origin)
    origin |= {name: text for name, text in (("source", source), ("commit", commit)) if text}
    stated = licence or origin.pop("licence", "")
    if not stated:
        built.notes.append(
            "the licence is not known: look it up, and state it with --licence before you share "
            "the file"
        )
    stem = Path(files[0]).stem
    data = {
        "id": _Builder().new_id(id or stem),
        "title": title or stem,
        "licence": stated or UNKNOWN_LICENCE,
        **{name: text for name, text in origin.items() if name != "licence"},
        "selection": built.selection,
        "principles": built.principles,
        "examples": built.examples,
    }
    names = ", ".join(f"{Path(file).name} ({name})" for file, name in layouts.items())
    text = f"# Imported by `prefab import-constitution` from {names}.\n" + to_yaml(data)
    return ImportedConstitution(text, parse_constitution(text, stem), layouts, built.notes)


def _read_files(files: Sequence[str | Path], built: _Builder) -> dict[str, str]:
    """Read files into `built`, principles before examples. Gives the layout of each file."""
    values = [(Path(file), _value(Path(file))) for file in files]
    known = [(file, value, _layout(file, value)) for file, value in values]
    for file, value, layout in sorted(known, key=lambda one: one[2].name in _EXAMPLES):
        try:
            layout.read(value, built)
        except _ShapeError as error:
            raise ConfigError([Problem(str(file), 0, 0, error.path, error.message)]) from None
    return {str(file): layout.name for file, _, layout in known}


class _ShapeError(Exception):
    """A value in a file is not what its layout has there."""

    def __init__(self, path: Sequence[str | int], message: str) -> None:
        self.path, self.message = yamlio.path_text(path), message


def _value(file: Path) -> Any:
    """What a file holds: JSON, JSON lines, YAML, or the text of a list."""
    text = yamlio.read_text(file)
    suffix = file.suffix.lower()
    if suffix in (".md", ".txt", ".markdown"):
        return text
    if suffix in (".yaml", ".yml"):
        document = yamlio.parse(text, str(file))
        if document.problems:
            raise ConfigError(document.problems)
        return document.value
    try:
        if suffix == ".jsonl":
            rows = enumerate(text.splitlines(), 1)
            return [_json(line, file, number) for number, line in rows if line.strip()]
        return _json(text, file)
    except RecursionError:
        raise ConfigError([Problem(str(file), 1, 1, "", "nested too deeply to be read")]) from None


def _json(text: str, file: Path, line: int = 0) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = (line or error.lineno, error.colno)
        raise ConfigError([Problem(str(file), *place, "", f"is no JSON: {error.msg}")]) from None


def _layout(file: Path, value: Any) -> Layout:
    found = next((layout for layout in LAYOUTS if layout.fits(value)), None)
    if found is not None:
        return found
    if rows := _rows(value, "rubrics", "rubric"):
        raise ConfigError(
            f"{file}: holds {counted(rows, 'prompt')} with a rubric each; name it as the `prompts` of a "
            "pipeline, where a judge of kind rubric reads them"
        )
    if isinstance(value, dict) and "principles" in value:
        raise ConfigError(f"{file}: is a constitution of Prefab already; `prefab check` reads it")
    shapes = "; ".join(f"{layout.name}: {layout.shape}" for layout in LAYOUTS)
    raise ConfigError(
        f"{file}: holds {_described(value)}, which is no layout that is read. {shapes}"
    )


def _rows(value: Any, *names: str) -> int:
    """How many mappings of a list hold a list under one of the names beside a prompt."""
    rows = value if isinstance(value, list) else [value]
    return sum(
        isinstance(row, dict)
        and bool({"prompt", "question"} & row.keys())
        and any(isinstance(row.get(name), list) for name in names)
        for row in rows
    )


def _described(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, list) and value:
        first = value[0]
        if isinstance(first, dict):
            return f"a list of {len(value)} mappings with the fields {_names(first)}"
        return f"a list of {len(value)}, the first of them {yamlio.describe(first)}"
    if isinstance(value, dict):
        return f"a mapping with the fields {_names(value)}"
    return (
        "an empty list"
        if value == []
        else "a text without a list in it"
        if isinstance(value, str)
        else yamlio.describe(value)
    )


def _names(row: dict[str, Any]) -> str:
    shown = ", ".join(yamlio.path_text((str(name),)) for name in list(row)[:6])
    return shown + ", ..." if len(row) > 6 else shown or "(none)"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _TITLE else line[: _TITLE - 1].rsplit(" ", 1)[0] + "…"


def _text(row: dict[str, Any], name: str, path: Sequence[str | int]) -> str:
    """The text under a name. Raises: _ShapeError where there is none."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "missing" if name not in row else f"must be text, not {yamlio.describe(value)}"
        raise _ShapeError((*path, name), found)
    return value.strip()


def _mappings(value: Any, *names: str) -> bool:
    """Whether a value is a list whose first item is a mapping with these fields."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and set(names) <= first.keys()


def _each(
    value: Any, path: Sequence[str | int] = ()
) -> list[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """The mappings of a list, each with its path. Raises: _ShapeError for anything else."""
    for index, row in enumerate(value):
        if not isinstance(row, dict):
            raise _ShapeError((*path, index), f"must be a mapping, not {yamlio.describe(row)}")
    return [((*path, index), row) for index, row in enumerate(value)]


def _inner(text: str, head: str, tail: str) -> str:
    """A request without the words that frame it in the paper's prompts."""
    return text.strip().removeprefix(f"{head}:").removesuffix(f"{tail}:").strip()


def _is_paper(value: Any) -> bool:
    rows = list(value.values()) if isinstance(value, dict) else []
    return bool(rows) and isinstance(rows[0], dict) and {"prompt", "edit_request"} <= rows[0].keys()


def _read_paper(value: Any, built: _Builder) -> None:
    for key, row in value.items():
        if not isinstance(row, dict):
            raise _ShapeError((key,), f"must be a mapping, not {yamlio.describe(row)}")
        prompts = row.get("prompt")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise _ShapeError((key, "prompt"), "must be a list of texts")
        revise = _inner(_text(row, "edit_request", (key,)), "RevisionRequest", "Revision")
        for number, prompt in enumerate(prompts, 1):
            name = key if len(prompts) == 1 else f"{key}-{number}"
            critique = _inner(prompt, "CritiqueRequest", "Critique")
            built.add(name, "critique", critique, title=key, revise=revise)


def _is_few_shot(value: Any) -> bool:
    return _is_texts(value) and all("CritiqueRequest:" in text for text in value)


_TURN = re.compile(
    r"(?:^|\n\n)(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision): ?"
)


def _read_few_shot(value: Any, built: _Builder) -> None:
    for index, text in enumerate(value):
        parts = _TURN.split(text.strip())
        turns = [(name, said.strip()) for name, said in zip(parts[1::2], parts[2::2], strict=False)]
        said = dict(turns)
        start = [name for name, _ in turns].index("CritiqueRequest")
        missing = {"Assistant", "Critique", "Revision"} - said.keys()
        if missing or start < 2:
            raise _ShapeError(
                (index,), f"a part is missing: {', '.join(sorted(missing)) or 'Human'}"
            )
        before = turns[:start]
        asked, told, made = (said[n] for n in ("CritiqueRequest", "Critique", "Revision"))
        built.turn(_conversation(before[:-1]), before[-1][1], asked, told, made)


def _conversation(turns: Sequence[tuple[str, str]]) -> str:
    """One turn as it is; several with the names of the speakers."""
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{name}: {text}" for name, text in turns)


def _is_comparisons(value: Any) -> bool:
    return _is_texts(value) and not _is_few_shot(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _read_comparisons(value: Any, built: _Builder) -> None:
    for number, text in enumerate(value, 1):
        asked = text.strip().removesuffix("Options:").strip()
        if not asked:
            raise _ShapeError((number - 1,), "is empty")
        built.add(f"compare-{number}", "compare", asked)


def _read_pairs(value: Any, built: _Builder) -> None:
    rows = built.examples.setdefault("pairwise", [])
    for path, row in _each(value):
        prompt = re.sub(r"^Human:|Assistant:$", "", _text(row, "prompt", path)).strip()
        for right in row["corrects"]:
            for wrong in row["incorrects"]:
                first = len(rows) % 2 == 0  # a and b in turn, so that no side is learned
                a, b = (right, wrong) if first else (wrong, right)
                rows.append({"prompt": prompt, "a": a, "b": b, "prefer": "a" if first else "b"})


def _is_swarm(value: Any) -> bool:
    inner = value.get("constitutions") if isinstance(value, dict) else value
    return _mappings(inner, "critic", "revision")


def _read_swarm(value: Any, built: _Builder) -> None:
    inner = value.get("constitutions") if isinstance(value, dict) else value
    at: tuple[str, ...] = ("constitutions",) if isinstance(value, dict) else ()
    for path, row in _each(inner, at):
        critique, revise = _text(row, "critic", path), _text(row, "revision", path)
        built.add("", "critique", critique, title=revise, revise=revise)
    _take_origin(value, built)
    chats = value.get("system_chat", []) if isinstance(value, dict) else []
    for index, turns in enumerate(chats):
        said = [(row.get("role"), _text(row, "content", ("system_chat", index, i)))
                for (_, row), i in zip(_each(turns), range(len(turns)), strict=True)]  # fmt: skip
        if len(said) < 6 or len(said) % 2:
            words = "must be question, answer, critic, critique, revision request and revision"
            raise _ShapeError(("system_chat", index), words)
        speakers = {"user": "Human", "assistant": "Assistant"}
        before = [(speakers.get(str(role), str(role)), text) for role, text in said[:-5]]
        texts = [text for _, text in said[-5:]]
        built.turn(_conversation(before), texts[0], texts[1], texts[2], texts[4])


def _take_origin(value: Any, built: _Builder) -> None:
    """Source, commit and licence, where the file states them."""
    if isinstance(value, dict):
        for name, key in (
            ("source", "source"),
            ("commit", "commit"),
            ("licence", "licence"),
            ("licence", "license"),
        ):
            if isinstance(value.get(key), str) and value[key].strip():
                built.origin.setdefault(name, value[key].strip())


_LANGCHAIN = (("critique_request", "revision_request"), ("critiqueRequest", "revisionRequest"))


def _langchain_rows(value: Any) -> list[Any]:
    if (
        isinstance(value, dict)
        and "critique_request" not in value
        and "critiqueRequest" not in value
    ):
        rows = list(value.values())
        return (
            [{"name": key, **row} if isinstance(row, dict) else row for key, row in value.items()]
            if all(isinstance(row, dict) for row in rows)
            else []
        )
    return value if isinstance(value, list) else [value]


def _is_langchain(value: Any) -> bool:
    return any(_mappings(_langchain_rows(value), *names) for names in _LANGCHAIN)


def _read_langchain(value: Any, built: _Builder) -> None:
    for path, row in _each(_langchain_rows(value)):
        critic, revision = _LANGCHAIN["critiqueRequest" in row]
        name = row.get("name") if isinstance(row.get("name"), str) else ""
        critique, revise = _text(row, critic, path), _text(row, revision, path)
        built.add(name or "", "critique", critique, title=name or revise, revise=revise)


def _rubric_rows(value: Any) -> tuple[tuple[str, ...], Any]:
    """The items of a rubric, and the name under which they stand."""
    for name in ("rubrics", "rubric", "criteria"):
        if isinstance(value, dict) and isinstance(value.get(name), list):
            return (name,), value[name]
    return (), value


def _is_rubric(value: Any) -> bool:
    inner = _rubric_rows(value)[1]
    return not _rows(value, "rubrics", "rubric") and (
        _mappings(inner, "criterion", "points") or _mappings(inner, "description", "weight")
    )


def _read_rubric(value: Any, built: _Builder) -> None:
    at, inner = _rubric_rows(value)
    built.selection = "all"
    _take_origin(value, built)
    left = 0
    for path, row in _each(inner, at):
        text, number = ("criterion", "points") if "criterion" in row else ("description", "weight")
        said, points = _text(row, text, path), _points(row, number, path)
        if not points:
            left += 1
            continue
        tags = [tag for tag in row.get("tags") or [] if isinstance(tag, str) and tag.strip()]
        title = row.get("title") if isinstance(row.get("title"), str) else ""
        kind, weight = ("merit" if points > 0 else "pitfall"), abs(points)
        built.add(title or "", kind, said, title=title or said, weight=weight, tags=tags)
    if left:
        built.notes.append(f"{left} criteria without points were left out")


def _points(row: dict[str, Any], name: str, path: Sequence[str | int]) -> float:
    """The number under a name. Raises: _ShapeError where there is none."""
    points = row.get(name)
    if isinstance(points, bool) or not isinstance(points, (int, float)) or abs(points) > 1e6:
        message = f"must be a number up to a million, not {yamlio.describe(points)}"
        raise _ShapeError((*path, name), message)
    return float(points)


_BULLET = re.compile(r"^(?P<margin>\s*)(?:[-*+•‣–]|\(?\d{1,3}[.)])\s+(?P<text>\S.*)$")
_NAMED = re.compile(r"^\*\*(.{1,80}?):?\*\*\s*[:–—-]?\s*(\S.*)$")
_CHOICE = re.compile(r"(?i)^(?:please )?(?:choose|pick|select|prefer)\b|^which\b")


def _bullets(text: str) -> list[str]:
    """The items of a list, each with its lines joined."""
    items: list[str] = []
    inside = False
    for line in text.splitlines():
        found = _BULLET.match(line)
        if found:
            items.append(found["text"].strip())
        elif inside and line.startswith((" ", "\t")) and line.strip():
            items[-1] += " " + line.strip()
            continue
        inside = bool(found)
    return items


def _is_bullets(value: Any) -> bool:
    return isinstance(value, str) and bool(_bullets(value))


def _read_bullets(value: Any, built: _Builder) -> None:
    for item in _bullets(value):
        named = _NAMED.match(item)
        title, text = (named[1], named[2]) if named else ("", item)
        kind = "compare" if _CHOICE.match(text) else "rule"
        built.add(title, kind, text, title=title or text)


LAYOUTS = (
    Layout(
        "paper",
        "{key: {prompt: [...], edit_request}}, critiques and revisions of the CAI paper",
        _is_paper,
        _read_paper,
    ),
    Layout(
        "paper-few-shot",
        "a list of texts with CritiqueRequest: and Revision:",
        _is_few_shot,
        _read_few_shot,
    ),
    Layout(
        "paper-pairs",
        "[{prompt, corrects: [...], incorrects: [...]}], comparison examples",
        lambda value: _mappings(value, "prompt", "corrects", "incorrects"),
        _read_pairs,
    ),
    Layout("comparisons", "a list of questions for a judge", _is_comparisons, _read_comparisons),
    Layout(
        "llm-swarm",
        "{constitutions: [{critic, revision}], system_chat: [...]}, or only the list",
        _is_swarm,
        _read_swarm,
    ),
    Layout(
        "langchain",
        "[{name, critique_request, revision_request}]",
        _is_langchain,
        _read_langchain,
    ),
    Layout(
        "rubric",
        "[{criterion, points, tags}] or [{title, description, weight}]",
        _is_rubric,
        _read_rubric,
    ),
    Layout("bullets", "a .md or .txt file with a list of rules", _is_bullets, _read_bullets),
)
_EXAMPLES = ("paper-few-shot", "paper-pairs")
