"""What `prefab diff` and `prefab watch` show: on the terminal, and as a page to send."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from prefab.factory.console import console, say, table
from prefab.factory.numbers import counted
from prefab.factory.pages import write_page
from prefab.factory.printable import printable
from prefab.factory.stats import Estimate
from prefab.factory.word_diff import Piece, word_differences
from prefab.pipelines.run.diff import Diff, Moved, PrincipleMoved

OUTCOMES = {"a": "A wins", "b": "B wins", "tie": "tie", "unscored": "unscored"}
COLUMNS = ("principle", "compared", "moved", "flipped", "mean move")
NOTE = "moved: P(A) by more than .05; flipped: the verdict names the other answer"
ON_A_PAGE = 500  # comparisons in full


def show_diff(found: Diff, only: str = "", examples: int = 10) -> None:
    """Print the difference of two versions.

    Args:
        found: The difference.
        only: `flips`: leave out what did not flip, and the tables.
        examples: How many comparisons to show in full.
    """
    if not only:
        for change in found.changes or ["no principle changed its meaning"]:
            say(f"  {change}")
        rows = [_row(line) for line in _lines(found)]
        if rows:
            table(title(found), COLUMNS, rows, note=NOTE)
        else:
            say(f"{title(found)}: no verdict moved")
    for line in sentences(found):
        say(line)
    listed = found.flips if only else found.moved
    for number, one in enumerate(listed[:examples], 1):
        _show_moved(number, one)
    left = len(listed) - min(examples, len(listed))
    if left:
        say(f"{left:,} more; --examples N shows more, --html FILE and --json all")


def title(found: Diff) -> str:
    """Both versions by name and digest."""
    return " -> ".join(
        f"{side.name} ({side.digest})" if side.digest else side.name
        for side in (found.old, found.new)
    )


def sentences(found: Diff) -> list[str]:
    """The result in words, the share of flips first."""
    n, flips = found.comparisons, len(found.flips)
    other = sum(one.changed for one in found.moved) - flips
    lines = [
        f"{flips:,} of {n:,} preferences flip{_interval(found.flip_rate)}; {other:,} more change "
        "between a winner, a tie and unscored",
        f"agreement between the versions: alpha {_value(found.alpha)}, AC1 {_value(found.ac1)}",
    ]
    asked = sum(side.asked for side in (found.old, found.new))
    reused = sum(side.reused for side in (found.old, found.new))
    if asked or reused:
        lines.append(f"{counted(reused, 'answer')} reused, {asked:,} asked")
    if failed := found.old.failed + found.new.failed:
        lines.append(
            f"{counted(failed, 'call')} failed, so some comparisons are left out; the same command asks again"
        )
    return lines


def _lines(found: Diff) -> list[PrincipleMoved]:
    """The principles that were edited or whose verdicts moved."""
    return [
        line
        for line in found.principles
        if line.why or line.mean_move or line.only_new or line.only_old
    ]


def _row(line: PrincipleMoved) -> tuple[str, int, int, int, float]:
    return line.principle, line.compared, line.moved, line.flips, line.mean_move


def _interval(share: Estimate) -> str:
    if share.value is None:
        return ""
    if share.low is None or share.high is None:
        return f" ({share.value:.1%})"
    return f" ({share.value:.1%}, 95% interval {share.low:.1%} to {share.high:.1%})"


def _value(estimate: Estimate) -> str:
    if estimate.value is None:
        return f"undefined ({estimate.undefined})"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _probability(p: float | None) -> str:
    return "none" if p is None else f"{p:.2f}"


def _heading(one: Moved, side: str) -> str:
    marks = [word for word, was in (("before", one.old), ("now", one.new)) if was == side]
    return side.upper() + (f" (preferred {' and '.join(marks)})" if marks else "")


def _summary(one: Moved) -> str:
    return (
        f"{OUTCOMES[one.old]}, P(A) {_probability(one.p_old)} -> "
        f"{OUTCOMES[one.new]}, P(A) {_probability(one.p_new)}"
    )


def _moves(one: Moved) -> list[str]:
    """What the principles that moved most say before and after."""
    return [
        f"{name}: P(A) {_probability(was)} -> {_probability(now)}"
        for name, was, now in one.principles[:5]
    ]


def _show_moved(number: int, one: Moved) -> None:
    """One comparison in full: the prompt, both answers side by side, and what moved. What only one
    of the answers has is underlined, or in brackets where there is no colour.
    """
    coloured = console().color_system is not None and not console().no_color
    console().print("")
    say(one.text, f"{number}. {one.preference[:12]}", "bold")
    view = Table(box=box.SIMPLE_HEAD, expand=True, show_edge=False, pad_edge=False)
    for side in "ab":
        style = "green" if one.new == side else "red" if one.old == side else ""
        view.add_column(_heading(one, side), ratio=1, header_style=style, overflow="fold")
    pieces = word_differences(one.answer_a, one.answer_b)
    view.add_row(*(_marked(side, coloured) for side in pieces))
    console().print(view, soft_wrap=False)
    say(f"  {_summary(one)}")
    for line in _moves(one):
        say(f"    {line}")


def _marked(pieces: Sequence[Piece], coloured: bool) -> Text:
    """An answer with its own words marked."""
    shown = Text()
    for text, own in pieces:
        text = printable(text)
        bare = text.rstrip()
        if own and coloured:
            shown.append(bare, "bold underline").append(text[len(bare) :])
        else:
            shown.append(f"[{bare}]{text[len(bare) :]}" if own and bare else text)
    return shown


@dataclass(frozen=True, slots=True)
class _Side:
    """One answer on a page."""

    heading: str
    style: str
    pieces: list[Piece]


_DIFF = """
<h1>{{ title }}</h1>
<p class="quiet">Comparisons: {{ found.source }}. Judged under both versions by the same judges.</p>
<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>
<h2>What was edited</h2>
<ul>{% for line in found.changes or ["no principle changed its meaning"] %}<li>{{ line }}</li>{% endfor %}</ul>
{% if not only %}
<h2>Outcomes</h2>
{{ plain_table(["before \\u2193, now \\u2192"] + outcomes, matrix) }}
<h2>Principles</h2>
{{ plain_table(columns, rows) if rows else "No verdict moved." }}
<p class="quiet">{{ note }}</p>
{% endif %}
<h2>{{ "Flipped preferences" if only else "Comparisons that moved, the most telling first" }}</h2>
{% for one, summary, moves, sides in shown %}
<h3>{{ loop.index }}. {{ one.preference[:12] }}</h3>
<p class="text">{{ one.text }}</p>
<div class="pair">{% for side in sides %}<div class="{{ side.style }}"><b>{{ side.heading }}</b>
<div class="text">
{%- for text, own in side.pieces %}{% if own %}<mark>{{ text }}</mark>{% else %}{{ text }}{% endif %}{% endfor -%}
</div></div>{% endfor %}</div>
<p>{{ summary }}{% for move in moves %}<br><span class="quiet">{{ move }}</span>{% endfor %}</p>
{% else %}<p>None.</p>
{% endfor %}
{% if left %}<p>{{ left }} more are not on this page; <code>prefab diff --json</code> has all.</p>{% endif %}
"""


def write_diff(found: Diff, path: Path, only: str = "") -> None:
    """Write the difference as an HTML page that needs no other file.

    Raises: ConfigError when the file cannot be written.
    """
    listed = found.flips if only else found.moved
    names = [name for name in OUTCOMES if name in found.table or _reached(found, name)]
    rows = [
        (name, line.compared, line.moved, line.flips, f"{line.mean_move:.3f}")
        for line in _lines(found)
        for name in [line.principle]
    ]
    write_page(
        path,
        title(found),
        _DIFF,
        found=found,
        only=only,
        lines=sentences(found),
        outcomes=[OUTCOMES[name] for name in names],
        matrix=[
            (OUTCOMES[old], *(found.table.get(old, {}).get(new, 0) for new in names))
            for old in names
        ],
        columns=list(COLUMNS),
        rows=rows,
        note=NOTE,
        shown=[(one, _summary(one), _moves(one), _sides(one)) for one in listed[:ON_A_PAGE]],
        left=max(0, len(listed) - ON_A_PAGE),
    )


def _reached(found: Diff, outcome: str) -> bool:
    """Whether a comparison has this outcome now."""
    return any(outcome in after for after in found.table.values())


def _sides(one: Moved) -> list[_Side]:
    pieces = word_differences(one.answer_a, one.answer_b)
    return [
        _Side(
            _heading(one, side),
            "now" if one.new == side else "before" if one.old == side else "",
            own,
        )
        for side, own in zip("ab", pieces, strict=True)
    ]
