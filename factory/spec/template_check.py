"""What a judge template may do: a small part of Jinja, checked when the template is loaded, and a
trial on sample values in a child process with limits.

Templates may come from strangers. Nothing here depends on Jinja's sandbox alone: a template that is
accepted reaches no attribute of Python's, and its time and memory are bounded by its own size and
by that of the texts that it shows.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from prefab.factory.errors import ConfigError, Problem

MAX_TEMPLATE = 256 * 1024  # characters of a template
MAX_NODES = 10_000  # of its syntax tree
MAX_DEPTH = 40  # of tags and expressions, one within the other
MAX_LOOPS = 2  # one within the other
MAX_TURNS = 10_000  # of all loops of one message together
MAX_READ = 50_000_000  # characters that filters, tests and operators read in its loops
MAX_RANGE = 100
MAX_TEXT = 4_000_000  # characters that a filter gives, or all messages of one rendering
MAX_GROWTH = 64  # how many texts a variable of {% set %} may be made of
TRIAL_CPU_S, TRIAL_WALL_S, TRIAL_BYTES = 1, 20, 512 * 2**20  # of the child process


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TAGS = "block, for, if, set"
# What a template may call on a value: on text, and on the mapping that an example is.
TEXT_METHODS = _words("""
    strip lstrip rstrip upper lower title capitalize startswith endswith split splitlines
    removeprefix removesuffix""")
MAPPING_METHODS = frozenset(("items", "keys", "values", "get"))
FILTERS = _words("""
    capitalize count d default first indent int float join last length list lower max min replace
    reverse sort string title tojson trim truncate upper wordcount""")
READ_NOTHING = _words("count d default first last length string")  # whatever a text's length
TESTS = _words("""
    boolean defined divisibleby eq equalto even false float ge gt in integer iterable le lower lt
    mapping ne none number odd sequence string true undefined upper == != > >= < <=""")
_ALLOWED = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.Block, nodes.If, nodes.For),
    *(nodes.Assign, nodes.Name, nodes.Const, nodes.Tuple, nodes.List, nodes.CondExpr),
    *(nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice),
    *(nodes.Concat, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Keyword),
    *(nodes.Neg, nodes.Pos, nodes.Add, nodes.Sub),
)
_WORDS: dict[type[nodes.Node], str] = {
    nodes.AssignBlock: "{% set %} with {% endset %}",
    nodes.Include: "{% include %}",
    nodes.Import: "{% import %}",
    nodes.FromImport: "{% from %}",
    nodes.Extends: "{% extends %}",
    nodes.Macro: "{% macro %}",
    nodes.CallBlock: "{% call %}",
    nodes.FilterBlock: "{% filter %}",
    nodes.With: "{% with %}",
    nodes.Scope: "{% autoescape %}",
    nodes.ScopedEvalContextModifier: "{% autoescape %}",
    nodes.NSRef: "namespace",
    nodes.Dict: "a mapping in braces",
    nodes.Mul: "*",
    nodes.Div: "/",
    nodes.FloorDiv: "//",
    nodes.Mod: "%",
    nodes.Pow: "**",
}


def _text_of(size: int, made: Callable[[], str]) -> str:
    if size > MAX_TEXT:
        raise ValueError(f"makes a text of {size:,} characters; at most {MAX_TEXT:,}")
    return made()


@jinja2.pass_context  # which also means: not when the template is compiled
def _join(_: Context, value: Iterable[Any], d: str = "") -> str:
    texts = [str(item) for item in value]
    size = sum(map(len, texts)) + len(d) * max(len(texts) - 1, 0)
    return _text_of(size, lambda: d.join(texts))


@jinja2.pass_context
def _replace(_: Context, s: Any, old: str, new: str) -> str:
    text = str(s)
    growth = text.count(old) * (len(new) - len(old))
    return _text_of(len(text) + max(growth, 0), lambda: text.replace(old, new))


@jinja2.pass_context
def _indent(_: Context, s: Any, width: int = 4, first: bool = False, blank: bool = False) -> str:
    text = str(s)
    size = len(text) + (text.count("\n") + 1) * max(int(width), 0)
    return _text_of(size, lambda: str(jinja2.filters.do_indent(text, width, first, blank)))


def _range(*bounds: int) -> range:
    found = range(*bounds)
    if len(found) > MAX_RANGE:
        raise ValueError(f"range gives {len(found):,} numbers; at most {MAX_RANGE}")
    return found


@jinja2.pass_context
def _counted(context: Context, items: Any) -> Any:
    """What a loop goes through, counted against the turns that one message may take."""
    found = items if hasattr(items, "__len__") else list(items)
    left = context.parent["loop turns"]
    left[0] -= len(found)
    if left[0] < 0:
        raise ValueError(f"its loops take more than {MAX_TURNS:,} turns")
    return found


@jinja2.pass_context
def _read(context: Context, value: Any) -> Any:
    """What a filter, a test or an operator in a loop reads, counted against what one message may
    read: ten thousand turns over a long text take minutes.
    """
    left = context.parent["loop turns"]
    items = value if isinstance(value, (list, tuple)) else (value,)
    left[1] -= sum(len(item) for item in items if isinstance(item, str))
    if left[1] < 0:
        raise ValueError(f"its loops read more than {MAX_READ:,} characters")
    return value


def _method(value: Any, name: str, *args: Any) -> Any:
    """`value.name(*args)` for the few methods that a template may call."""
    if isinstance(value, jinja2.Undefined):
        value._fail_with_undefined_error()
    methods = (
        TEXT_METHODS
        if isinstance(value, str)
        else MAPPING_METHODS
        if isinstance(value, Mapping)
        else frozenset()
    )
    if name not in methods:
        raise TypeError(f"{type(value).__name__} has no method {name} that a template may call")
    return getattr(value, name)(*args)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without functions: an attribute that can be called is not given out."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not callable(value) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing: not even a safe form of `str.format` is given out."""


ENV = _Environment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
)
ENV.filters = {
    **{name: filter_ for name, filter_ in ENV.filters.items() if name in FILTERS},
    "join": _join,
    "replace": _replace,
    "indent": _indent,
    "the turns of a loop": _counted,
    "a method": _method,
    "what is read": _read,
}
ENV.tests = {name: test for name, test in ENV.tests.items() if name in TESTS}
ENV.globals = {"range": _range}


def parse_template(text: str, file: str) -> nodes.Template:
    """The syntax tree of a template that does only what a template may, with its loops counted.

    Args:
        text: The template.
        file: Named in errors.

    Raises:
        ConfigError: Every fault with its line: a syntax error, or what is not allowed.
    """
    if len(text) > MAX_TEMPLATE:
        message = f"has {len(text):,} characters; a template has at most {MAX_TEMPLATE:,}"
        raise ConfigError([Problem(file, 0, 0, "", message)])
    try:
        tree = ENV.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError([Problem(file, error.lineno, 1, "", str(error.message))]) from None
    except (RecursionError, MemoryError):
        raise ConfigError([Problem(file, 1, 1, "", "is nested too deeply")]) from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError([Problem(file, 1, 1, "", f"cannot be read: {error}")]) from None
    problems = [
        Problem(file, line, 1, "", message) for line, message in dict.fromkeys(_faults(tree))
    ]
    if problems:
        raise ConfigError(problems)
    _Growth(file).statements(tree.body, {})
    guarded: nodes.Template = _Guards().visit(tree)
    return guarded


def compile_template(tree: nodes.Template, file: str) -> jinja2.Template:
    """The template that renders a tree of `parse_template`. Raises: ConfigError."""
    try:
        code = ENV.compile(tree)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError([Problem(file, error.lineno, 1, "", str(error.message))]) from None
    except (RecursionError, MemoryError, SyntaxError):
        raise ConfigError([Problem(file, 1, 1, "", "is nested too deeply")]) from None
    return ENV.template_class.from_code(ENV, code, dict(ENV.globals))


def _faults(tree: nodes.Template) -> Iterator[tuple[int, str]]:
    """(line, message) of everything that a template may not do."""
    count = 0
    waiting: list[tuple[nodes.Node, int, int, int]] = [(tree, 1, 0, 0)]
    while waiting:
        node, line, depth, loops = waiting.pop()
        inner = (child.lineno for child in node.find_all(nodes.Node) if child.lineno)
        count, line = count + 1, node.lineno or next(inner, line)
        if depth > MAX_DEPTH or count > MAX_NODES:
            yield line, "is nested too deeply" if depth > MAX_DEPTH else "is too long"
            return
        if (message := _fault(node)) is not None:
            yield line, message
        loops += isinstance(node, nodes.For)
        if loops > MAX_LOOPS:
            yield line, f"more than {MAX_LOOPS} loops, one within the other"
            return
        waiting += [(child, line, depth + 1, loops) for child in node.iter_child_nodes()]


def _fault(node: nodes.Node) -> str | None:
    """What is wrong with one node of a template; None where it may stand."""
    if type(node) not in _ALLOWED:
        what = _WORDS.get(type(node), type(node).__name__)
        return f"a template may not use {what}; its tags are {TAGS}"
    if isinstance(node, nodes.For) and node.recursive:
        return "a loop may not be recursive"
    if isinstance(node, (nodes.Filter, nodes.Test)):
        return _filter_or_test(node)
    if isinstance(node, nodes.Name) and node.name == "self":
        return "a template may not use self"
    if isinstance(node, nodes.Getattr):
        return _private(node.attr)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return _private(node.arg.value)
    return _call(node) if isinstance(node, nodes.Call) else None


def _filter_or_test(node: nodes.Filter | nodes.Test) -> str | None:
    what, known = ("filter", FILTERS) if isinstance(node, nodes.Filter) else ("test", TESTS)
    if node.name not in known:
        names = ", ".join(sorted(name for name in known if name.isalpha()))
        return f"unknown {what} {node.name!r}; a template may use {names}"
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        return f"the {what} {node.name} takes plain arguments only"
    if node.name == "tojson" and (node.args or node.kwargs):
        return "the filter tojson takes no arguments here"
    return None


def _private(name: Any) -> str | None:
    if isinstance(name, str) and name.startswith("_"):
        return f"a template may not read {name!r}"
    return None


def _call(node: nodes.Call) -> str | None:
    """Calls are those of `range` and of a few methods, with plain arguments."""
    called = node.node
    if node.kwargs or node.dyn_args is not None or node.dyn_kwargs is not None:
        return "a call takes plain arguments only"
    if isinstance(called, nodes.Name) and called.name == "range":
        return None
    methods = TEXT_METHODS | MAPPING_METHODS
    if isinstance(called, nodes.Getattr) and called.attr in methods:
        return None
    return f"a template may call range and the methods {', '.join(sorted(methods))} only"


class _Growth:
    """Refuses expressions of very many texts, and variables that double: {% set a = a ~ a %} forty
    times over is a terabyte.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def statements(self, body: Iterable[nodes.Node], known: dict[str, int]) -> None:
        """Follow the assignments of a list of statements, in order."""
        for node in body:
            for part in node.iter_child_nodes():
                if isinstance(part, nodes.Expr):
                    self.check(part, known)
            if isinstance(node, nodes.Assign):
                size = self.size(node.node, known)
                for name in node.target.find_all(nodes.Name):
                    known[name.name] = max(size, known.get(name.name, 1))
                if isinstance(node.target, nodes.Name):
                    known[node.target.name] = max(size, known.get(node.target.name, 1))
            elif isinstance(node, (nodes.Block, nodes.For)):
                self.statements(node.body, dict(known))
                self.statements(getattr(node, "else_", None) or (), dict(known))
            elif isinstance(node, nodes.If):
                self.statements([*node.body, *node.elif_, *node.else_], known)

    def check(self, node: nodes.Expr, known: dict[str, int]) -> None:
        """Raises ConfigError for an expression that is made of too many texts."""
        if self.size(node, known) > MAX_GROWTH:
            message = f"an expression is made of more than {MAX_GROWTH} texts"
            raise ConfigError([Problem(self.file, node.lineno, 1, "", message)])

    def size(self, node: nodes.Node, known: dict[str, int]) -> int:
        """How many texts an expression is made of, at most."""
        if isinstance(node, nodes.Name):
            return known.get(node.name, 1)
        if isinstance(node, (nodes.Const, nodes.TemplateData)):
            return 1
        return sum(self.size(child, known) for child in node.iter_child_nodes())


class _Guards(NodeTransformer):
    """Has loops counted, with what is read in them, and methods called by `_method`."""

    def __init__(self) -> None:
        self._loops = 0

    def visit_For(self, node: nodes.For) -> nodes.For:
        """A loop whose turns are counted."""
        self._loops += 1
        self.generic_visit(node)
        self._loops -= 1
        node.iter = _filter(node.iter, "the turns of a loop", [])
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Filter:
        """A filter whose text is counted where it is in a loop."""
        self.generic_visit(node)
        if self._loops and node.node is not None and node.name not in READ_NOTHING:
            node.node = _filter(node.node, "what is read", [])
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Test:
        """As a filter."""
        self.generic_visit(node)
        if self._loops and node.name in ("lower", "upper", "in"):
            node.node = _filter(node.node, "what is read", [])
        return node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Operand:
        """A text in which another one is looked for."""
        self.generic_visit(node)
        if self._loops and node.op in ("in", "notin"):
            node.expr = _filter(node.expr, "what is read", [])
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        """The text that is put together in a loop."""
        self.generic_visit(node)
        return _filter(node, "what is read", []) if self._loops else node

    def visit_Add(self, node: nodes.Add) -> nodes.Expr:
        """As `visit_Concat`."""
        self.generic_visit(node)
        return _filter(node, "what is read", []) if self._loops else node

    def visit_Call(self, node: nodes.Call) -> nodes.Expr:
        """A call of `range` as it is; that of a method by `_method`."""
        self.generic_visit(node)
        if not isinstance(node.node, nodes.Getattr):
            return node
        value = node.node.node
        value = _filter(value, "what is read", []) if self._loops else value
        return _filter(value, "a method", [nodes.Const(node.node.attr), *node.args])


def _filter(node: nodes.Node, name: str, args: list[nodes.Expr]) -> nodes.Filter:
    made = nodes.Filter(cast(nodes.Expr, node), name, args, [], None, None, lineno=node.lineno)
    return made.set_environment(ENV)  # type: ignore[return-value]  # it returns the node itself


class _Example(dict[str, str]):
    """A few-shot example that has every field."""

    def __missing__(self, name: str) -> str:
        return f"Sample {name}."


def samples(names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Values for the variables of a template: without examples, with examples, and long ones."""
    names = set(names)
    for n_examples, n_words in ((0, 1), (2, 1), (2, 3000)):
        text = "Sample text. " * n_words
        yield {
            name: [_Example()] * n_examples
            if name == "examples"
            else [text] * 4
            if name == "answers"
            else text
            for name in names
        }


def try_out(render: Callable[[], object], file: str, what: str = "") -> None:
    """Call `render` in a child process that may take little time and memory.

    Raises:
        ConfigError: `render` raised one (it is passed on), or went past a limit.
    """
    if not hasattr(os, "fork"):
        render()
        return
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(render, writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = _answer(pipe.fileno(), child)
    _, status = os.waitpid(child, 0)
    if data:
        line, _, message = data.decode("utf-8", "replace").partition(" ")
        raise ConfigError([Problem(file, int(line), 1 if line != "0" else 0, "", message)])
    if os.waitstatus_to_exitcode(status) != 0:
        message = (
            f"{what}takes more than {TRIAL_CPU_S} s or {TRIAL_BYTES >> 20} MB on sample values; make it "
            "simpler"
        )
        raise ConfigError([Problem(file, 0, 0, "", message)])


def _answer(pipe: int, child: int) -> bytes:
    """What the child writes, at most 64 kB; it is killed when it takes too long."""
    data, until = b"", time.monotonic() + TRIAL_WALL_S
    while len(data) < 65536:
        ready, _, _ = select.select([pipe], [], [], max(until - time.monotonic(), 0))
        part = os.read(pipe, 65536) if ready else b""
        if not ready:
            os.kill(child, signal.SIGKILL)
        if not part:
            break
        data += part
    return data


def _child(render: Callable[[], object], writing: int) -> NoReturn:
    """The child's whole life: limits, one call, one line about how it went."""
    status = 1
    try:
        import gc

        gc.disable()  # objects of the parent are left alone
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_CPU_S, TRIAL_CPU_S))
        if (used := _address_space()) is not None:
            resource.setrlimit(resource.RLIMIT_AS, (used + TRIAL_BYTES, used + TRIAL_BYTES))
        try:
            render()
        except ConfigError as error:
            first = error.problems[0]
            os.write(writing, f"{first.line} {first.message}".encode("utf-8", "replace")[:60000])
        status = 0
    finally:
        os._exit(status)


def _address_space() -> int | None:
    """Bytes of this process's address space; None where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
