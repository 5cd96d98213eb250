"""Judge templates: sandboxed Jinja whose blocks are the messages, and fences that mark candidates'
text as data.

A template has the blocks `system`, `user`, `assistant`, `user_2`, `assistant_2`, `user_3` and so on
(any of them up to the last, in the order of a conversation). The variables that a template may use
are fixed by its kind and checked when it is loaded. Front matter, YAML between two lines `---`, may
name the labels that a critique begins with.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.paths import PACKAGE
from prefab.factory.spec import control_tokens, template_check, yamlio
from prefab.factory.spec.control_tokens import break_tokens, neutralise
from prefab.factory.tool_calls import shown_conversation
from prefab.factory.types import Message

TEMPLATES = PACKAGE / "judges" / "templates"
BLOCKS = "system, user, assistant, user_2, assistant_2, user_3 and so on"
_BLOCK = re.compile(r"(user|assistant)(?:_([2-9]|[1-9]\d))?|system")
_ONE = {"conversation", "answer", "question", "examples"}
_TWO = {"conversation", "answer_a", "answer_b", "question", "examples"}
VARIABLES: dict[str, set[str]] = {
    "pairwise": _TWO,
    "pairwise_cot": _TWO,
    "pairwise_scored": _TWO | {"reasoning"},
    "pointwise": _ONE,
    "rubric": _ONE,
    "listwise": {"conversation", "answers", "question", "examples"},
    "critique": _ONE,
    "revise": _ONE | {"critique"},
    "propose": {"conversation", "answer_a", "answer_b"},
}


class Template:
    """One loaded template. `digest` names its text; `render` gives its messages. `labels`, of a
    critique: the first words that say "no fault" and "a fault", whose probabilities are read.

    Raises: ConfigError: when loaded with bad syntax, something that `template_check` does not
        allow, an unknown variable, or no known block; names file and line.
    """

    __slots__ = (
        "_blocks",
        "_compiled",
        "_new_context",
        "_ours",
        "digest",
        "file",
        "kind",
        "labels",
        "name",
        "text",
    )

    def __init__(self, name: str, kind: str, text: str, file: str = "") -> None:
        self.name, self.kind, self.text, self.file = name, kind, text, file or name
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        self._ours = Path(self.file).parent == TEMPLATES
        front, body = split_front_matter(text)
        self.labels = _labels(front, kind, self.file)
        self._compiled = compiled = _compile(kind, body, self.file)
        self._blocks = [
            (block.partition("_")[0], compiled.blocks[block])
            for block in sorted(compiled.blocks, key=_place)
        ]
        compiled.globals = dict(
            compiled.globals
        )  # jinja's is a ChainMap, which each context would walk twice
        self._new_context = compiled.new_context

    def render(self, specials: tuple[str, ...] = (), /, **variables: Any) -> tuple[Message, ...]:
        """The messages of this template for these variables; a block that comes out empty gives no
        message.

        Args:
            specials: Control tokens of the served tokenizer; none is left whole in a template that
                is not one of Prefab's.
            variables: Their values, without control tokens.

        Raises:
            ConfigError: It cannot be filled in: a variable that it uses was not given, an example
                lacks a field, or it makes too much text. Names the file and the line.
        """
        variables["loop turns"] = [template_check.MAX_TURNS, template_check.MAX_READ]
        context = self._new_context(variables)
        join = "".join if self._ours else _joined
        messages, total = [], 0
        try:
            for role, block in self._blocks:
                text = join(block(context)).strip()
                total += len(text)
                if total > template_check.MAX_TEXT:
                    raise ValueError(_TOO_MUCH)
                if specials and not self._ours:
                    text = break_tokens(text, specials)
                if text:
                    messages.append(Message(role, text))
        except Exception as error:  # whatever a template that is not ours does
            raise ConfigError([self._problem(error)]) from None
        return tuple(messages)

    def _problem(self, error: Exception) -> Problem:
        """What went wrong while rendering, with its line."""
        line, trace = 0, error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_globals.get("__jinja_template__") is self._compiled:
                line = self._compiled.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        words = str(getattr(error, "message", None) or error) or type(error).__name__
        return Problem(self.file, line, 1 if line else 0, "", f"cannot be filled in: {words[:500]}")


_TOO_MUCH = f"makes more than {template_check.MAX_TEXT:,} characters"


def _joined(parts: Iterable[str]) -> str:
    """The parts as one text. Raises: ValueError before they take too much memory."""
    kept, total = [], 0
    for part in parts:
        kept.append(part)
        total += len(part)
        if total > template_check.MAX_TEXT:
            raise ValueError(_TOO_MUCH)
    return "".join(kept)


def load_template(name: str | Path, kind: str | None = None) -> Template:
    """The template of this name from `judges/templates`, or at this path, tried out on sample
    values. `kind` decides which variables it may use; left out, it is the file's own name.

    Raises:
        ConfigError: no such file, or a fault in it.
    """
    path = Path(name)
    if not path.exists() and path.name == str(name):  # a name, not a path
        path = TEMPLATES / (path.name if path.suffix else f"{path.name}.jinja")
    if not path.is_file() and not path.exists():
        known = ", ".join(sorted(p.name for p in TEMPLATES.glob("*.jinja")))
        raise ConfigError([Problem(str(name), 0, 0, "", f"no such template; there are: {known}")])
    text = yamlio.read_text(path)
    return _loaded(path.name, kind or path.stem, text, str(path))


@lru_cache(maxsize=64)
def _loaded(name: str, kind: str, text: str, file: str) -> Template:
    template = Template(name, kind, text, file)
    if not template._ours:

        def render() -> None:
            for values in template_check.samples(VARIABLES[kind]):
                template.render(**values)

        template_check.try_out(render, file)
    return template


_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)


def split_front_matter(text: str) -> tuple[str, str]:
    """The front matter of a template, and the rest. Both have the other's lines empty, so that
    problems are found at their line.
    """
    found = _FRONT_MATTER.match(text)
    if found is None:
        return "", text
    return "\n" + (found[1] or ""), "\n" * found[0].count("\n") + text[found.end() :]


def critique_labels(text: str) -> tuple[str, ...]:
    """The labels that a critique template's text names; none without, or where they are faulty."""
    try:
        return _labels(split_front_matter(text)[0], "critique", "")
    except ConfigError:
        return ()


def _labels(front: str, kind: str, file: str) -> tuple[str, ...]:
    """The labels of the front matter. Raises: ConfigError for anything else in it."""
    if not front.strip():
        return ()
    document = yamlio.parse(front, file)
    if document.problems:
        raise ConfigError(list(document.problems))
    value = document.value
    found = value.get("labels") if isinstance(value, dict) else None
    words = found if isinstance(found, list) else []
    right = [word for word in words if isinstance(word, str) and re.fullmatch(r"\w{2,32}", word)]
    distinct = len({word.lower() for word in right}) == len(words) == 2
    if kind != "critique" or not distinct or list(value) != ["labels"]:
        message = (
            "front matter has `labels: [None, Fault]` alone: of a critique, the first word that "
            "says there is no fault, and the one that says there is"
        )
        raise ConfigError([Problem(file, 2, 1, "labels", message)])
    return tuple(right)


def _compile(kind: str, text: str, file: str) -> jinja2.Template:
    if kind not in VARIABLES:
        message = f"unknown kind of template {kind!r}; kinds: {', '.join(VARIABLES)}"
        raise ConfigError([Problem(file, 0, 0, "", message)])
    tree = template_check.parse_template(text, file)
    try:
        used = meta.find_undeclared_variables(tree)
    except jinja2.TemplateSyntaxError as error:  # a block that is there twice
        raise ConfigError([Problem(file, error.lineno, 1, "", str(error.message))]) from None
    problems = [
        Problem(
            file,
            _line_of(text, name),
            1,
            name,
            f"unknown variable; a {kind} template may use " + ", ".join(sorted(VARIABLES[kind])),
        )
        for name in sorted(used - VARIABLES[kind] - {"range"})
    ]
    blocks = {node.name: node.lineno for node in tree.find_all(nodes.Block)}
    problems += [
        Problem(file, line, 1, name, f"unknown block; the blocks are {BLOCKS}")
        for name, line in blocks.items()
        if not _BLOCK.fullmatch(name)
    ]
    problems += [
        Problem(file, line, 1, name, f"the block {before} is missing before it")
        for name, line in blocks.items()
        if (before := _before(name)) not in blocks and before
    ]
    if "user" not in blocks:
        problems.append(Problem(file, 1, 1, "", "has no {% block user %}: nothing would be asked"))
    problems += _control_tokens(tree, file)
    if problems:
        raise ConfigError(problems)
    return template_check.compile_template(tree, file)


def _place(block: str) -> tuple[int, bool]:
    """Where a block stands in the conversation."""
    found = _BLOCK.fullmatch(block)
    if found is None or found[1] is None:
        return (0, False)
    return (int(found[2] or 1), found[1] == "assistant")


def _before(block: str) -> str:
    """The block that a later pair of turns needs before it; empty where none is needed."""
    number, answers = _place(block)
    if answers and number > 1:
        return f"user_{number}"
    return "" if number < 3 else f"assistant_{number - 1}"


def _control_tokens(tree: nodes.Template, file: str) -> list[Problem]:
    """A problem for each control token that a template writes itself: it would begin or end a turn
    in the middle of a message.
    """
    problems = []
    for node in tree.find_all((nodes.TemplateData, nodes.Const)):
        text = getattr(node, "data" if isinstance(node, nodes.TemplateData) else "value")
        for token in control_tokens.FORMS.finditer(text) if isinstance(text, str) else ():
            if "think" not in token[0] and "tool_" not in token[0].lower():
                line = node.lineno + text.count("\n", 0, token.start())
                message = f"writes the control token {token[0]}; leave it to the chat template"
                problems.append(Problem(file, line, 1, "", message))
    return problems


def _line_of(text: str, name: str) -> int:
    found = re.search(rf"\b{re.escape(name)}\b", text)
    return text.count("\n", 0, found.start()) + 1 if found else 0


@lru_cache(maxsize=4096)
def fence(prompt_text: str, text: str, specials: tuple[str, ...] = ()) -> str:
    """The text between tags whose id it cannot contain: the first 6 hex digits of SHA-256(prompt,
    text, i) for the smallest i whose id is not in the text. The same in both orders and under every
    principle.
    """
    text = neutralise(text, specials)
    i = 0
    while (
        tag := hashlib.sha256(
            f"{prompt_text}\0{text}\0{i}".encode(errors="surrogatepass")
        ).hexdigest()[:6]
    ) in text:
        i += 1
    return f"<{tag}>\n{text}\n</{tag}>"


def conversation_text(messages: Sequence[Message]) -> str:
    """A conversation as plain text: the words alone for a single question, else one `Role: words`
    line a turn, and with tools also these and a line a call.
    """
    if any(m.more for m in messages):
        return shown_conversation(messages)
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{m.role.capitalize()}: {m.content}" for m in messages)


def embedded_templates() -> list[Path]:
    """The shipped templates that the embedded models are trained with. Those with an example, and
    the one that asks for rules, are for other models; those with labels have the same words as
    those without.
    """
    others = ("_one_shot", "_labels", "propose")
    return sorted(p for p in TEMPLATES.glob("*.jinja") if not p.stem.endswith(others))


def templates_digest() -> str:
    """One digest over the templates of the embedded models, which record the one they were trained
    with.
    """
    digest = hashlib.sha256()
    for path in embedded_templates():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]
