"""HTML pages that need no other file: no script, no font, no request to anywhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefab.factory.errors import ConfigError
from prefab.factory.printable import printable

if TYPE_CHECKING:
    from jinja2 import Template

# Threat: prompts and answers are written by others. All text is escaped, and the policy lets a
# browser load and run nothing, should a mark slip through.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8885; --less: #c62828; --more: #2e7d32; --mark: #ffd54f66 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2rem } h3 { font-size: 1rem }
table { border-collapse: collapse; margin: .7rem 0 }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.text, pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 }
pre { background: #8881; padding: .5rem; font-size: .85rem }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }
.pair > div { border: 1px solid var(--line); border-top: 4px solid var(--line); padding: .5rem .8rem }
.pair > div.now { border-top-color: var(--more) } .pair > div.before { border-top-color: var(--less) }
mark { background: var(--mark); color: inherit } .quiet { opacity: .75 }
details, .below { margin-left: 1.2rem } summary { cursor: pointer }
.headline { font-size: 1.2rem; font-weight: 600 }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 2rem }
figure { margin: .5rem 0; max-width: 36rem; min-width: min(24rem, 100%); flex: 1 }
figcaption { font-weight: 600 } svg { width: 100%; height: auto } svg text { fill: currentColor; font: 11px system-ui, sans-serif }
svg .grid, svg .base { stroke: var(--line) } svg .diagonal { stroke: currentColor; stroke-dasharray: 4 4 }
.line { fill: none; stroke-width: 2 } .interval { stroke-width: 2; opacity: .7 } .bar { fill: #0b5fc0 } .brush { display: none }
.s0 { fill: #0b5fc0; stroke: #0b5fc0 } .s1 { fill: #d55e00; stroke: #d55e00 } .s2 { fill: #009e73; stroke: #009e73 }
.s3 { fill: #cc79a7; stroke: #cc79a7 } .s4 { fill: #e69f00; stroke: #e69f00 } .s5 { fill: #56b4e9; stroke: #56b4e9 }
polyline.line { fill: none } .key { width: 14px; height: 10px }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0; font-size: .9rem }
.example { border-top: 1px solid var(--line); padding: .5rem 0 }
@media print { body { max-width: none; margin: 0 } .pair, table, figure { break-inside: avoid } details { display: block } }
@media (max-width: 45rem) { .pair { grid-template-columns: 1fr } }
</style>
</head>
<body>
{%- macro plain_table(columns, rows, numbers_from=1) %}
<table>
<tr>{% for c in columns %}<th{% if loop.index0 >= numbers_from %} class="n"{% endif %}>{{ c }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for c in row %}<td{% if loop.index0 >= numbers_from %} class="n"{% endif %}>{{ c }}</td>{% endfor %}</tr>
{% endfor %}</table>
{%- endmacro %}
BODY
</body>
</html>
"""


def write_page(path: Path, title: str, body: str, **values: Any) -> None:
    """Write a page.

    Args:
        path: The file; one that exists is replaced.
        title: The page's title.
        body: A jinja template of the page's content. All values are escaped, and made printable.
        values: What the template shows.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        path.write_text(_template(body).render(title=title, **values), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


@cache
def _template(body: str) -> Template:
    """The compiled template of a page: compiling one takes longer than rendering most pages."""
    from jinja2 import Environment, StrictUndefined

    def shown(value: Any) -> Any:
        return printable(value) if type(value) is str else value

    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=shown)
    return environment.from_string(_PAGE.replace("BODY", body))
