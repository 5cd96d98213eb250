"""What `prefab why` shows: a tree on the terminal, and as a page to send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from prefab.factory.console import console
from prefab.factory.pages import write_page
from prefab.pipelines.quality.why import CallMade, Node, Why


def show_why(found: Why, calls: bool = False) -> None:
    """Print the tree; with `calls` also the messages of every model call."""
    tree = Tree(_line(found.root, calls))
    _grow(tree, found.root, calls)
    console().print(tree, soft_wrap=False, overflow="fold")


def _grow(tree: Tree, node: Node, calls: bool) -> None:
    for below in node.below:
        _grow(tree.add(_line(below, calls)), below, calls)


def _line(node: Node, calls: bool) -> Text:
    facts = _facts(node.facts)
    line = Text.assemble((node.title, "bold"), f"  {facts}" if facts else "")
    if node.text:
        line.append("\n" + node.text)
    if calls and node.call:
        line.append(f"\n{_call_line(node.call)}", "cyan")
        for role, content in node.call.messages:
            line.append(f"\n{role}:", "cyan").append(f"\n{content}")
    return line


NAMES = {"p_a": "P(A)", "mass": "label mass", "tie_mass": "mass on tie", "p_chosen": "P(chosen)"}


def _facts(facts: dict[str, Any]) -> str:
    return ", ".join(
        f"{NAMES.get(name, name.replace('_', ' '))} {_fact(value)}"
        for name, value in facts.items()
        if value is not None and value != ""
    )


def _fact(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _call_line(call: CallMade) -> str:
    """Which call it was, how it was sampled, and which labels were read."""
    sampling = ", ".join(f"{name} {value}" for name, value in call.sampling.items())
    labels = f"; labels read: {', '.join(map(repr, call.labels))}" if call.labels else ""
    return f"call {call.key[:12]} of {call.model}: {sampling or 'greedy'}{labels}"


_WHY = """
{%- macro show(node) %}
<p><b>{{ node.title }}</b> <span class="quiet">{{ facts(node.facts) }}</span></p>
{% if node.text %}<div class="text">{{ node.text }}</div>{% endif %}
{% if node.call %}<details><summary>{{ call_line(node.call) }}</summary>
{% for role, content in node.call.messages %}<b>{{ role }}</b><pre>{{ content }}</pre>{% endfor %}
</details>{% endif %}
{% for below in node.below %}<div class="below">{{ show(below) }}</div>{% endfor %}
{%- endmacro %}
<h1>{{ title }}</h1>
{{ show(root) }}
"""


def write_why(found: Why, path: Path) -> None:
    """Write the tree, with the messages of every model call, as an HTML page that needs no other
    file.

    Raises: ConfigError when the file cannot be written.
    """
    title = f"Preference {found.preference[:12]} of {found.run}"
    write_page(path, title, _WHY, root=found.root, facts=_facts, call_line=_call_line)
