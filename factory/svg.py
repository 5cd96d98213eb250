"""Charts as SVG, drawn on the server: a title, axes with units, a legend, intervals. Colours and
fonts are classes of the stylesheet, so that they follow the light and the dark theme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from markupsafe import Markup, escape

from prefab.factory.charts import Chart, Point, Series

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
BARS = 90  # height of a histogram
MANY = 20  # points of a series, above which they are drawn small
KINDS = 6  # series of a chart that have a class of their own


@dataclass(frozen=True, slots=True)
class Scale:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(self.start + share * (self.end - self.start), 2)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two values: steps of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    raw = span / about
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = ceil(low / step - 1e-9)
    return [i * step for i in range(first, floor(high / step + 1e-9) + 1)]


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: significant digits, and never 0.000 for what is not 0."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.{digits}g}"


def _axes(x: Scale, y: Scale, x_name: str, y_name: str) -> str:
    parts = []
    for t in ticks(x.low, x.high):
        parts.append(
            f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="{y.end}" y2="{y.start}"/>'
            f'<text class="tick" x="{x(t)}" y="{y.start + 16}" text-anchor="middle">{number(t)}</text>'
        )
    for t in ticks(y.low, y.high):
        parts.append(
            f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(t)}" y2="{y(t)}"/>'
            f'<text class="tick" x="{x.start - 6}" y="{y(t) + 4}" text-anchor="end">{number(t)}</text>'
        )
    middle_x, middle_y = (x.start + x.end) / 2, (y.start + y.end) / 2
    parts.append(
        f'<text class="axis" x="{middle_x}" y="{y.start + 36}" text-anchor="middle">{escape(x_name)}</text>'
        f'<text class="axis" transform="translate(14 {middle_y}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_name)}</text>"
    )
    return "".join(parts)


def _figure(
    title: str, body: str, legend: Sequence[str], height: int, width: int = WIDTH
) -> Markup:
    keys = "".join(
        f'<li><svg class="key" viewBox="0 0 14 10" aria-hidden="true"><rect class="s{i % KINDS}" '
        f'width="14" height="10" rx="2"/></svg>{escape(name)}</li>'
        for i, name in enumerate(legend)
    )
    listed = f'<ul class="legend">{keys}</ul>' if len(legend) > 1 else ""
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{body}</svg>'
        f"{listed}</figure>"
    )


def _bounds(values: Sequence[float], low: float | None, high: float | None) -> tuple[float, float]:
    least = min(values) if low is None else low
    most = max(values) if high is None else high
    room = 0.06 * ((most - least) or abs(most) or 1.0)
    return (least - room if low is None else low), (most + room if high is None else high)


def lines(
    chart: Chart,
    x_range: tuple[float | None, float | None] = (None, None),
    y_range: tuple[float | None, float | None] = (None, None),
    diagonal: bool = False,
    links: dict[str, str] | None = None,
) -> Markup:
    """Points, joined or not, with their intervals.

    Args:
        chart: What is drawn.
        x_range: The ends of the axis; None: from the points.
        y_range: The same, of the other axis.
        diagonal: Also draw the line of equal values.
        links: Addresses by the label of a point.
    """
    points = [p for series in chart.series for p in series.points]
    if not points:
        return Markup('<p class="none">nothing to draw</p>')
    x = Scale(*_bounds([p.x for p in points], *x_range), LEFT, WIDTH - RIGHT)
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y = Scale(*_bounds(ends, *y_range), HEIGHT - BOTTOM, TOP)
    body = [_axes(x, y, chart.x, chart.y)]
    if diagonal:
        low, high = max(x.low, y.low), min(x.high, y.high)
        body.append(
            f'<line class="diagonal" x1="{x(low)}" y1="{y(low)}" x2="{x(high)}" y2="{y(high)}"/>'
        )
    for i, series in enumerate(chart.series):
        body.append(_series(series, x, y, f"s{i % KINDS}", links or {}))
    return _figure(chart.title, "".join(body), [s.name for s in chart.series], HEIGHT)


def _series(series: Series, x: Scale, y: Scale, name: str, links: dict[str, str]) -> str:
    parts = []
    if series.joined and len(series.points) > 1:
        path = " ".join(f"{x(p.x)},{y(p.y)}" for p in series.points)
        parts.append(f'<polyline class="line {name}" points="{path}"/>')
    if series.marked:
        radius = 4.5 if len(series.points) <= MANY else 2.2
        parts += [
            _mark(p, x, y, name, series.name, links.get(p.label), radius) for p in series.points
        ]
    return "".join(parts)


def _mark(
    p: Point, x: Scale, y: Scale, name: str, series: str, link: str | None, radius: float
) -> str:
    told = f"{series}: {number(p.y)}"
    bar = ""
    if p.low is not None and p.high is not None:
        told += f" (95% interval {number(p.low)} to {number(p.high)})"
        bar = f'<line class="interval {name}" x1="{x(p.x)}" x2="{x(p.x)}" y1="{y(p.low)}" y2="{y(p.high)}"/>'
    told = f"{told}{f', {p.label}' if p.label else ''}"
    mark = f'<circle class="{name}" cx="{x(p.x)}" cy="{y(p.y)}" r="{radius}"><title>{escape(told)}</title></circle>'
    if link:
        mark = f'<a href="{escape(link)}" aria-label="{escape(told)}">{mark}</a>'
    return bar + mark


COLOURS = ("#0b5fc0", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
STYLE = "".join(f".s{i}{{fill:{c};stroke:{c}}}" for i, c in enumerate(COLOURS)) + (
    "text{font:11px sans-serif;fill:#333;stroke:none}.title{font-weight:bold}.grid{stroke:#ccc}"
    "polyline{fill:none!important;stroke-width:2}.interval{stroke-width:2}"
)


def image(chart: Chart) -> str:
    """A chart of `lines` as an SVG file of its own, with title, legend and colours, on white."""
    drawn = str(lines(chart))
    start, end = drawn.index("<svg"), drawn.index("</svg>")
    body = drawn[drawn.index(">", start) + 1 : end]
    many = len(chart.series) > 1
    legend = "".join(
        f'<text class="s{i % KINDS}" x="{LEFT + 130 * (i % 3)}" y="{34 + 14 * (i // 3)}">'
        f'<tspan class="s{i % KINDS}">●</tspan> {escape(series.name)}</text>'
        for i, series in enumerate(chart.series if many else ())
    )
    top = 24 + (14 * -(-len(chart.series) // 3) if many else 0)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + top}" '
        f'width="{WIDTH}" role="img"><title>{escape(chart.title)}</title><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="{LEFT}" y="17">{escape(chart.title)}</text>{legend}'
        f'<g transform="translate(0 {top})">{body}</g></svg>\n'
    )


def intervals(
    title: str,
    x_name: str,
    rows: Sequence[tuple[str, float, float | None, float | None]],
    middle: float | None = None,
) -> Markup:
    """Values from 0 to 1 with their intervals under each other: (name, value, low, high) each.
    `middle` is drawn as a dashed line.
    """
    step, left = 30, 130
    bottom = TOP + step * len(rows)
    x = Scale(0.0, 1.0, left, WIDTH - RIGHT)
    body = []
    for t in ticks(0.0, 1.0):
        body.append(
            f'<line class="grid" x1="{x(t)}" x2="{x(t)}" y1="{TOP}" y2="{bottom}"/>'
            f'<text class="tick" x="{x(t)}" y="{bottom + 16}" text-anchor="middle">{number(t)}</text>'
        )
    if middle is not None:
        body.append(
            f'<line class="diagonal" x1="{x(middle)}" x2="{x(middle)}" y1="{TOP}" y2="{bottom}"/>'
        )
    level = Scale(0.0, float(len(rows)) or 1.0, TOP, bottom)
    for i, (name, value, low, high) in enumerate(rows):
        y = level(i + 0.5)
        shown = name if len(name) <= 18 else name[:17] + "…"
        told = f"{name}: {number(value)}"
        body.append(
            f'<text class="axis" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>'
        )
        if low is not None and high is not None:
            told += f" (95% interval {number(low)} to {number(high)})"
            body.append(
                f'<line class="interval s0" x1="{x(low)}" x2="{x(high)}" y1="{y}" y2="{y}"/>'
            )
        body.append(
            f'<circle class="s0" cx="{x(value)}" cy="{y}" r="5"><title>{escape(told)}</title></circle>'
        )
    body.append(
        f'<text class="axis" x="{(left + WIDTH - RIGHT) / 2}" y="{bottom + 36}" '
        f'text-anchor="middle">{escape(x_name)}</text>'
    )
    return _figure(title, "".join(body), (), bottom + BOTTOM)


def histogram(
    title: str,
    name: str,
    low: float,
    high: float,
    counts: Sequence[int],
    chosen: tuple[float | None, float | None] = (None, None),
) -> Markup:
    """A histogram over equal steps from `low` to `high`; dragging over it sets the filters NAME_min
    and NAME_max. `chosen` are their values now.
    """
    width, height = 260, BARS + 24
    most, step = max(counts, default=0) or 1, (high - low) / max(1, len(counts))
    x = Scale(low, high, 4, width - 4)
    bars = []
    for i, n in enumerate(counts):
        start, end = low + i * step, low + (i + 1) * step
        out = (chosen[0] is not None and end <= chosen[0]) or (
            chosen[1] is not None and start >= chosen[1]
        )
        tall = round(BARS * n / most, 1) if n else 0
        tall = max(tall, 1.5) if n else 0
        bars.append(
            f'<rect class="bar{" out" if out else ""}" x="{x(start) + 0.5}" y="{BARS - tall + 4}" '
            f'width="{x(end) - x(start) - 1:.2f}" height="{tall}"><title>{number(start)} to {number(end)}: '
            f"{n:,}</title></rect>"
        )
    labels = "".join(
        f'<text class="tick" x="{x(t)}" y="{height - 4}" text-anchor="middle">{number(t)}</text>'
        for t in ticks(low, high, 4)
        if x(t) > 8 and x(t) < width - 8
    )
    return Markup(
        f'<figure class="hist" data-name="{escape(name)}" data-low="{low:g}" data-high="{high:g}">'
        f"<figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Histogram: {escape(title)}">'
        f'<line class="base" x1="4" x2="{width - 4}" y1="{BARS + 4}" y2="{BARS + 4}"/>{"".join(bars)}{labels}'
        f'<rect class="brush" x="0" y="4" width="0" height="{BARS}"/></svg></figure>'
    )


def probability_bar(p_a: float | None, mass: float | None, tie: float | None, told: str) -> Markup:
    """P(A is better) as a bar from a half, with the label mass below it; both from 0 to 1."""
    width, middle = 220, 110
    if p_a is None:
        body = f'<text class="tick" x="{middle}" y="14" text-anchor="middle">unscored</text>'
    else:
        x = Scale(0, 1, 2, width - 2)(1 - p_a)
        side = "tie" if abs(p_a - 0.5) < 0.005 else "a" if p_a > 0.5 else "b"
        start, long = min(x, middle), abs(x - middle)
        body = f'<rect class="p-{side}" x="{start}" y="3" width="{max(long, 1.5):.1f}" height="11" rx="2"/>'
    if mass is not None:
        body += f'<rect class="mass" x="2" y="18" width="{mass * (width - 4):.1f}" height="3" rx="1.5"/>'
    if tie:
        body += f'<rect class="mass-tie" x="2" y="18" width="{tie * (width - 4):.1f}" height="3" rx="1.5"/>'
    return Markup(
        f'<svg class="pbar" viewBox="0 0 {width} 23" role="img" aria-label="{escape(told)}">'
        f"<title>{escape(told)}</title>"
        f'<rect class="track" x="2" y="3" width="{width - 4}" height="11" rx="2"/>{body}'
        f'<line class="half" x1="{middle}" x2="{middle}" y1="1" y2="16"/></svg>'
    )


def share_bar(parts: Sequence[tuple[str, float, str]], told: str) -> Markup:
    """Shares of a whole beside each other: (class, share, what it is called) each."""
    width, x, rects = 300, 0.0, []
    for name, share, words in parts:
        rects.append(
            f'<rect class="{escape(name)}" x="{x:.1f}" y="0" width="{share * width:.1f}" height="12">'
            f"<title>{escape(words)}</title></rect>"
        )
        x += share * width
    return Markup(
        f'<svg class="shares" viewBox="0 0 {width} 12" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(told)}">{"".join(rects)}</svg>'
    )
