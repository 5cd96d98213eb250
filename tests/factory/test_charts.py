"""Charts show the numbers they were given, where they belong, and are the same bytes each time."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from prefab.factory import charts, svg
from prefab.factory.charts import Chart, Point, Series
from prefab.factory.stats import Estimate
from prefab.pipelines.evaluation.report import drawn


def chart(**more):
    points = [
        Point(0.0, 0.5, 0.4, 0.6, "base"),
        Point(4.0, 0.9, 0.8, 1.0, "a $b$ <c>"),
        Point(9.0, 0.7),
    ]
    return Chart(
        "Title",
        "KL",
        "gold",
        [Series("gold", points), Series("proxy $p", points, joined=False)],
        **more,
    )


def test_values_intervals_and_names_are_drawn():
    axes = charts.draw([chart(kl=True)]).axes[0]
    line, dots = axes.get_lines()
    assert line.get_xdata() == pytest.approx([0, 2, 3]) and line.get_ydata() == pytest.approx(
        [0.5, 0.9, 0.7]
    )
    assert line.get_linestyle() == "-" and dots.get_linestyle() == "None"
    bars = [c.get_segments()[0].tolist() for c in axes.collections]
    assert (
        bars[:2] == [[[0.0, 0.4], [0.0, 0.6]], [[2.0, 0.8], [2.0, 1.0]]] and len(bars) == 4
    )  # none without an interval
    assert [t.get_text() for t in axes.texts][:2] == ["base", "a $b$ <c>"]
    ticks = {
        float(t.get_text()): place
        for t, place in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
    }
    assert (
        len(ticks) > 3
        and max(ticks) >= 9
        and all(place**2 == pytest.approx(nats) for nats, place in ticks.items())
    )
    assert charts.draw([chart()]).axes[0].get_lines()[0].get_xdata() == pytest.approx([0, 4, 9])


def test_an_image_is_a_file_of_its_own_with_title_legend_axes_and_intervals():
    made = ElementTree.fromstring(svg.image(chart()))
    name = "{http://www.w3.org/2000/svg}"
    texts = ["".join(e.itertext()).strip() for e in made.iter(f"{name}text")]
    assert {"Title", "KL", "gold", "● gold", "● proxy $p"} <= set(texts)
    bars = [e for e in made.iter(f"{name}line") if "interval" in e.get("class", "")]
    assert len(bars) == 4 and len(list(made.iter(f"{name}polyline"))) == 1
    marks = list(made.iter(f"{name}circle"))
    assert "95% interval 0.4 to 0.6" in "".join(marks[0].itertext())


def test_an_estimate_of_kl_below_zero_stands_at_zero():
    axes = charts.draw([Chart("t", "x", "y", [Series("s", [Point(-0.01, 1.0)])], kl=True)]).axes[0]
    assert axes.get_lines()[0].get_xdata() == [0.0]


def test_the_page_stands_alone_and_is_the_same_again(tmp_path):
    pages = []
    for name in ("a", "b"):
        page, png = charts.write(
            tmp_path / name, "report", "A <title>", [chart(), chart(kl=True)], "<p>body</p>"
        )
        assert png.read_bytes()[:4] == b"\x89PNG" and png.stat().st_size > 5000
        pages.append(page.read_text())
    assert pages[0] == pages[1] and "A &lt;title&gt;" in pages[0] and "<p>body</p>" in pages[0]
    svg = pages[0][pages[0].index("<svg") :]
    texts = [
        "".join(e.itertext()).strip()
        for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"base", "a $b$ <c>", "proxy $p"} <= set(texts)
    assert not re.search(r'(?:href|src)="https?:', svg)
    assert charts.write(tmp_path / "c", "report", "none", []) == [tmp_path / "c/report.html"]


def test_what_is_not_known_is_not_drawn():
    def made(**values):
        return {
            name: Estimate(v, None, v - 0.1, v + 0.1) if v is not None else Estimate(None)
            for name, v in values.items()
        }

    both = drawn(
        {
            "base": made(gold=0.2, kl=0.0),
            "sft": made(gold=0.6, kl=2.0),
            "best of 4": made(gold=None, kl=3.0),
        },
        "gold",
    )
    assert [len(s.points) for c in both for s in c.series] == [2, 2] and [c.kl for c in both] == [
        True,
        False,
    ]
    assert both[0].series[0].points[1] == Point(
        2.0, 0.6, pytest.approx(0.5), pytest.approx(0.7), "sft"
    )
    assert [p.x for p in both[1].series[0].points] == [1, 2]
    two = drawn({"base": made(gold=0.2, proxy=0.1), "ppo": made(gold=0.1, proxy=0.8)}, "gold")
    assert [s.name for s in two[0].series] == ["ground truth", "reward model's score"]
    assert len(two) == 1
    axes = charts.draw(both + two).axes
    assert [a.get_title() for a in axes] == [c.title for c in both + two]
    assert all("Score of each policy" in c.title and "95% intervals" in c.title for c in both)
    assert axes[0].get_xlabel() == "KL from the reference, nats an answer, over its square root"
    assert axes[0].get_legend() is None  # one series
    legend = [text.get_text() for text in axes[2].get_legend().get_texts()]
    assert legend == ["ground truth", "reward model's score"]
    assert drawn({"base": made(words=3.0)}, "") == []
