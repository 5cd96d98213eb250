"""Judge templates: sandboxed Jinja whose blocks are the messages, and fences that mark candidates'
text as data.

A template has the blocks `system`, `user`, `assistant`, `user_2` (any of them, in the order of a
conversation). The variables that a template may use are fixed by its kind and checked when it is
loaded.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prefab.factory.errors import ConfigError, Problem
from prefab.factory.paths import PACKAGE
from prefab.factory.types import Message

TEMPLATES = PACKAGE / "judges" / "templates"
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "user_2": "user"}
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
}
_ENV = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
)
# Control tokens of the model families in use. A served tokenizer's own are added to these by the
# engine.
_CONTROL = re.compile(
    r"<\|[^<>|\s][^<>|]{0,40}\|>|<｜[^<>｜]{1,40}｜>|</?s>|\[/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|AVAILABLE_TOOLS|CLS|SEP|MASK|PAD|UNK)\]"
    r"|<</?SYS>>|</?(?:start|end)_of_(?:turn|image)>|<(?:bos|eos|pad|unk|mask|cls|sep)>|</?(?:think|tool_call|tool_response)>",
    re.IGNORECASE,
)


class Template:
    """One loaded template. `digest` names its text; `render` gives its messages.

    Raises: ConfigError: when loaded with bad syntax, an unknown variable, or no known block; names
        file and line.
    """

    __slots__ = ("_blocks", "_new_context", "digest", "kind", "name", "text")

    def __init__(self, name: str, kind: str, text: str, file: str = "") -> None:
        self.name, self.kind, self.text = name, kind, text
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        compiled = _compile(kind, text, file or name)
        self._blocks = [
            (role, compiled.blocks[block])
            for block, role in ROLES.items()
            if block in compiled.blocks
        ]
        compiled.globals = dict(
            compiled.globals
        )  # jinja's is a ChainMap, which each context would walk twice
        self._new_context = compiled.new_context

    def render(self, **variables: Any) -> tuple[Message, ...]:
        """The messages of this template for these variables; a block that comes out empty gives no
        message.

        Raises:
            ConfigError: a variable that it uses was not given, or an example lacks a field.
        """
        context = self._new_context(variables)
        try:
            texts = [(role, "".join(block(context)).strip()) for role, block in self._blocks]
        except jinja2.UndefinedError as error:
            raise ConfigError(
                [Problem(self.name, 0, 0, "", f"cannot be filled in: {error.message}")]
            ) from None
        return tuple(Message(role, text) for role, text in texts if text)


def load_template(name: str | Path, kind: str | None = None) -> Template:
    """The template of this name from `judges/templates`, or at this path. `kind` decides which
    variables it may use; left out, it is the file's own name.

    Raises:
        ConfigError: no such file, or a fault in it.
    """
    path = Path(name)
    if not path.is_file():
        path = TEMPLATES / (path.name if path.suffix else f"{path.name}.jinja")
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in TEMPLATES.glob("*.jinja")))
        raise ConfigError([Problem(str(name), 0, 0, "", f"no such template; there are: {known}")])
    return Template(path.name, kind or path.stem, path.read_text(encoding="utf-8"), str(path))


def _compile(kind: str, text: str, file: str) -> jinja2.Template:
    if kind not in VARIABLES:
        raise ConfigError(
            [
                Problem(
                    file,
                    0,
                    0,
                    "",
                    f"unknown kind of template {kind!r}; kinds: {', '.join(VARIABLES)}",
                )
            ]
        )
    try:
        tree = _ENV.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError([Problem(file, error.lineno, 1, "", str(error.message))]) from None
    problems = [
        Problem(
            file,
            _line_of(text, name),
            1,
            name,
            f"unknown variable; a {kind} template may use " + ", ".join(sorted(VARIABLES[kind])),
        )
        for name in sorted(meta.find_undeclared_variables(tree) - VARIABLES[kind])
    ]
    blocks = {node.name: node.lineno for node in tree.find_all(jinja2.nodes.Block)}
    problems += [
        Problem(file, line, 1, name, f"unknown block; the blocks are {', '.join(ROLES)}")
        for name, line in blocks.items()
        if name not in ROLES
    ]
    if "user" not in blocks:
        problems.append(Problem(file, 1, 1, "", "has no {% block user %}: nothing would be asked"))
    if problems:
        raise ConfigError(problems)
    return _ENV.from_string(text)


def _line_of(text: str, name: str) -> int:
    found = re.search(rf"\b{re.escape(name)}\b", text)
    return text.count("\n", 0, found.start()) + 1 if found else 0


def neutralise(text: str, specials: Iterable[str] = ()) -> str:
    """The text with every control token's spelling broken by a space, so that no tokenizer reads it
    as one.

    A space, not an invisible character: some normalisers remove those and put the token together
    again. `specials` are the served tokenizer's own control tokens, beside the families known here.
    """
    if "<" in text or "[" in text:
        text = _CONTROL.sub(lambda m: m[0][0] + " " + m[0][1:], text)
    for special in specials:
        if len(special) > 1 and special in text:
            text = text.replace(special, special[0] + " " + special[1:])
    return text


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
    line a turn.
    """
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{m.role.capitalize()}: {m.content}" for m in messages)


def embedded_templates() -> list[Path]:
    """The shipped templates that the embedded models are trained with: those with an example are
    for other models.
    """
    return sorted(p for p in TEMPLATES.glob("*.jinja") if not p.stem.endswith("_one_shot"))


def templates_digest() -> str:
    """One digest over the templates of the embedded models, which record the one they were trained
    with.
    """
    digest = hashlib.sha256()
    for path in embedded_templates():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]
