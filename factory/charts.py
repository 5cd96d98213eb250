"""Charts: points or lines with their intervals, as a PNG and as SVG inside one HTML page.

Matplotlib draws (the extra `train`), without pyplot: no display and no state outside the figure. An
axis in nats of KL is drawn over its square root: gold first rises and then falls in that (Gao et
al. 2023, eq. 1).
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from prefab.factory.extras import missing_package

# the palette of Okabe and Ito, which colour-blind people can tell apart
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
MARKS = "os^Dvp*"
STYLE = (
    "body{font:14px sans-serif;max-width:70em;margin:2em auto}td,th{padding:4px 8px;text-align:right}"
    "th{text-align:left}svg{max-width:100%;height:auto}"
)


@dataclass(frozen=True, slots=True)
class Point:
    """A measured value `y` at `x`, with the bounds of its interval where it has one, and a name to
    write beside it.
    """

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind; `joined` draws a line through them in their order, `marked` the points
    themselves.
    """

    name: str
    points: Sequence[Point]
    joined: bool = True
    marked: bool = True


@dataclass(frozen=True, slots=True)
class Chart:
    """One pair of axes. `kl`: x is a KL divergence in nats, drawn over its square root (below 0, an
    estimate's noise: 0).
    """

    title: str
    x: str
    y: str
    series: Sequence[Series]
    kl: bool = False


def can() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def ready(what: str = "drawing charts") -> None:
    """Raises: ConfigError where matplotlib is not installed, before anything is measured that would
    be drawn.
    """
    if not can():
        raise missing_package("matplotlib", what)


def draw(charts: Sequence[Chart]) -> Any:
    """The charts under each other as one matplotlib figure. Raises: ConfigError without
    matplotlib.
    """
    ready()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2 * len(charts)), layout="constrained")
    for axes, chart in zip(figure.subplots(len(charts), squeeze=False)[:, 0], charts, strict=True):
        for i, series in enumerate(chart.series):
            _series(axes, series, chart.kl, COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)])
        axes.set_title(chart.title, parse_math=False)
        axes.set_xlabel(
            f"{chart.x}, over its square root" if chart.kl else chart.x, parse_math=False
        )
        axes.set_ylabel(chart.y, parse_math=False)
        axes.grid(alpha=0.3)
        if chart.kl:
            _root_scale(axes, max((p.x for s in chart.series for p in s.points), default=1.0))
        if len(chart.series) > 1:
            for text in axes.legend().get_texts():
                text.set_parse_math(False)
    return figure


def _series(axes: Any, series: Series, kl: bool, colour: str, mark: str) -> None:
    xs = [sqrt(max(p.x, 0.0)) if kl else p.x for p in series.points]
    axes.plot(
        xs,
        [p.y for p in series.points],
        color=colour,
        marker=mark if series.marked else "",
        label=series.name,
        linestyle="-" if series.joined else "none",
    )
    for x, p in zip(xs, series.points, strict=True):
        if p.low is not None and p.high is not None:
            axes.vlines(x, p.low, p.high, color=colour, alpha=0.7)
        if p.label:
            axes.annotate(
                p.label,
                (x, p.y),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=9,
                parse_math=False,
            )


def _root_scale(axes: Any, most: float) -> None:
    """Ticks at round numbers of nats, on an axis of square roots."""
    from matplotlib.ticker import MaxNLocator

    ticks = [t for t in MaxNLocator(6).tick_values(0.0, max(most, 1e-3)) if t >= 0]
    axes.set_xticks([sqrt(t) for t in ticks], [f"{t:g}" for t in ticks])


def write(out: Path, name: str, title: str, charts: Sequence[Chart], body: str = "") -> list[Path]:
    """NAME.png and NAME.html in `out`; the page holds `body` (HTML) and the charts as SVG, and
    needs nothing beside it.

    Without charts only the page is written. Raises: ConfigError without matplotlib.
    """
    out.mkdir(parents=True, exist_ok=True)
    written, svg = [out / f"{name}.html"], ""
    if charts:
        figure = draw(charts)
        written.append(out / f"{name}.png")
        figure.savefig(written[-1], dpi=150)
        svg = _svg(figure)
    written[0].write_text(
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1>{body}{svg}",
        encoding="utf-8",
    )
    return written


def as_svg(charts: Sequence[Chart]) -> list[str]:
    """The charts as one SVG element; empty without any. Raises: ConfigError without matplotlib."""
    return [_svg(draw(charts))] if charts else []


def _svg(figure: Any) -> str:
    """The figure as an SVG element. Equal numbers give equal bytes; text stays text."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "prefab", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]
