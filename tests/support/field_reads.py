"""Which fields of configuration classes some code reads: a small type inference over syntax trees.

A read is `receiver.field` where the receiver is known to hold the class: a name or an attribute
that is annotated with it, `self.config` inside a class made for it, a call of a function that
returns it, or a name that was assigned from one of those. `keys_read` gives the keys that are
looked up in mappings, for configurations that are stored as plain data.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from tests.support.syntax import parse


def words_of(annotation: ast.AST | None) -> set[str]:
    """The names in an annotation, whether it is code or text."""
    found = set()
    for node in ast.walk(annotation) if annotation is not None else ():
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                found |= words_of(ast.parse(node.value, mode="eval").body)
            except SyntaxError:
                continue
    return found


class Reads(ast.NodeVisitor):
    """Collects (class, field) pairs from the trees that it visits.

    Args:
        fields: By class name, the fields of the class (inherited ones too).
        family: By class name, the names under which its objects are passed: itself, its bases and
            its subclasses.
    """

    def __init__(self, fields: Mapping[str, Iterable[str]], family: Mapping[str, set[str]]) -> None:
        self.fields = {name: set(of) for name, of in fields.items()}
        self.named: dict[str, set[str]] = defaultdict(set)  # word -> classes with it as a name
        for name, words in family.items():
            for word in words:
                self.named[word].add(name)
        self.found: set[tuple[str, str]] = set()
        self.attributes: dict[str, set[str]] = defaultdict(set)  # attribute or function -> classes
        self.scopes: list[dict[str, set[str]]] = [{}]
        self.inside: list[str] = []  # names of the classes around
        self.own_of: dict[str, dict[str, set[str]]] = {}  # class -> attribute of self -> classes
        self.bases_of: dict[str, set[str]] = {}
        self.bounds: dict[str, set[str]] = {}  # type variable -> names in its bound

    def classes_in(self, annotation: ast.AST | None) -> set[str]:
        """The configuration classes that an annotation speaks of."""
        words = words_of(annotation)
        words |= {word for name in words for word in self.bounds.get(name, ())}
        return {name for word in words & self.named.keys() for name in self.named[word]}

    def learn(self, trees: Sequence[ast.AST]) -> None:
        """Note which attributes and functions hold which classes."""
        nodes = [node for tree in trees for node in ast.walk(tree)]
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                bound = [k.value for k in node.value.keywords if k.arg == "bound"]
                if bound:  # a type variable
                    self.bounds[ast.unparse(node.targets[0])] = words_of(bound[0])
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                for line in node.body:
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                        self.attributes[line.target.id] |= self.classes_in(line.annotation)
                self.learn_class(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self.attributes[node.name] |= self.classes_in(node.returns)

    def learn_class(self, node: ast.ClassDef) -> None:
        """Note what `self.x` holds: what `__init__` assigns from its parameters, and `self.config`
        where the class is made for a configuration (`Generic[Config]`, `Config = ...`).
        """
        own = self.own_of[node.name] = {}
        self.bases_of[node.name] = {w for base in node.bases for w in words_of(base)}
        made_for = {w for n in node.body if isinstance(n, ast.Assign) for w in words_of(n.value)}
        configs = {name for name in self.fields if name in made_for | self.bases_of[node.name]}
        if configs and node.name not in self.fields:
            own["config"] = configs
            self.attributes["config"] |= configs
        for init in node.body:
            if not (isinstance(init, ast.FunctionDef) and init.name == "__init__"):
                continue
            typed = {a.arg: self.classes_in(a.annotation) for a in init.args.args}
            for line in ast.walk(init):
                if not isinstance(line, ast.Assign):
                    continue
                for target in line.targets:
                    pairs = [(target, line.value)]
                    if isinstance(target, ast.Tuple) and isinstance(line.value, ast.Tuple):
                        pairs = list(zip(target.elts, line.value.elts, strict=False))
                    for name, value in pairs:
                        if isinstance(name, ast.Attribute) and isinstance(value, ast.Name):
                            own.setdefault(name.attr, typed.get(value.id, set()))
                            self.attributes[name.attr] |= typed.get(value.id, set())

    def own(self, name: str) -> dict[str, set[str]]:
        """What the attributes of a class's `self` hold, inherited ones too."""
        found: dict[str, set[str]] = {}
        for base in self.bases_of.get(name, set()) & self.own_of.keys() - {name}:
            found |= self.own(base)
        return found | self.own_of.get(name, {})

    def holds(self, node: ast.AST) -> set[str]:
        """The classes that an expression's value may have."""
        if isinstance(node, ast.Name):
            return next((s[node.id] for s in reversed(self.scopes) if node.id in s), set())
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self" and self.inside:
                known = self.own(self.inside[-1])
                if node.attr in known:
                    return known[node.attr]
            return self.attributes.get(node.attr, set())
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in self.fields:
                return {node.func.id}
            if isinstance(node.func, ast.Attribute) and node.func.attr in (
                "model_copy",
                "model_validate",
            ):
                return self.holds(node.func.value)
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("next", "list", "sorted", "max", "min", "enumerate", "reversed", "items"):
                return self.holds(node.args[0] if node.args else node.func.value)
            named = {arg.id for arg in node.args if isinstance(arg, ast.Name)} & self.fields.keys()
            return named or self.attributes.get(name, set())
        if isinstance(node, ast.Tuple):
            return set().union(*map(self.holds, node.elts))
        if isinstance(node, ast.BoolOp):
            return set().union(*map(self.holds, node.values))
        if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.DictComp):
            for generator in node.generators:
                self.bind(generator.target, self.holds(generator.iter))
            return self.holds(node.value if isinstance(node, ast.DictComp) else node.elt)
        if isinstance(node, ast.IfExp):
            return self.holds(node.body) | self.holds(node.orelse)
        if isinstance(node, ast.Await | ast.Starred | ast.Subscript | ast.NamedExpr):
            return self.holds(node.value)
        return set()

    def bind(self, target: ast.AST, classes: set[str], value: ast.AST | None = None) -> None:
        """Note what a name holds from here on."""
        if isinstance(target, ast.Name):
            self.scopes[-1][target.id] = classes
        elif isinstance(target, ast.Tuple):
            parts = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
            for name, part in zip(target.elts, parts, strict=False):
                self.bind(name, self.holds(part) if part is not None else classes, part)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.bind(target, self.holds(node.value), node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        self.bind(node.target, self.classes_in(node.annotation))

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self.bind(node.target, self.holds(node.value))

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, self.holds(node.iter))
        self.generic_visit(node)

    def visit_comprehension_like(self, node: ast.AST) -> None:
        for generator in node.generators:  # type: ignore[attr-defined]
            self.bind(generator.target, self.holds(generator.iter))
        self.generic_visit(node)

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_like

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = {arg.arg: self.classes_in(arg.annotation) for arg in every}
        if self.inside and every and every[0].arg == "self" and self.inside[-1] in self.fields:
            scope["self"] = {self.inside[-1]}
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if getattr(node.func, "id", "") == "getattr" and isinstance(node.args[1], ast.Constant):
            held = self.holds(node.args[0])  # a probe: of subclasses too
            kin = {name for word in held for name in self.named.get(word, ())}
            self.note(kin, str(node.args[1].value))

    def note(self, held: set[str], field: str) -> None:
        """Count a read of a field."""
        self.found |= {(name, field) for name in held if field in self.fields[name]}

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            self.note(self.holds(node.value), node.attr)


def fields_read(
    fields: Mapping[str, Iterable[str]],
    bases: Mapping[str, set[str]],
    sources: Iterable[str],
) -> set[tuple[str, str]]:
    """The (class, field) pairs of `fields` that the code reads.

    Args:
        fields: By class name, the fields of the class, inherited ones too.
        bases: By class name, the classes of `fields` that it inherits from: an object is passed
            under their names too.
        sources: The code.
    """
    trees = [parse(source) for source in sources]
    family = {
        name: {name, *bases[name], *(sub for sub in fields if name in bases[sub])}
        for name in fields
    }
    reads = Reads(fields, family)
    reads.learn(trees)
    for tree in trees:
        reads.scopes = [{}]
        reads.visit(tree)
    return reads.found


@lru_cache
def keys_read(source: str) -> set[str]:
    """The texts that the code looks up in mappings: `x["key"]`, `x.get("key")`, and the members of
    tuples, with which it goes through several.
    """
    found: set[str] = set()
    for node in ast.walk(parse(source)):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Subscript):
            parts = [node.slice]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get":
            parts = node.args[:1]
        elif isinstance(node, ast.Call) and (
            getattr(node.func, "id", getattr(node.func, "attr", "")) in ("getattr", "mapping")
        ):
            parts = node.args[1:2]
        elif isinstance(node, ast.Tuple):
            parts = list(node.elts)
        found |= {
            p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)
        }
    return found
