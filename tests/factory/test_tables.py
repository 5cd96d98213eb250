"""Numbers keep their digits and their uncertainty; tables fit the width without breaking words."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from prefab.factory.numbers import (
    Measured,
    better,
    cell,
    counted,
    estimate,
    marked,
    number,
    p_value,
)
from prefab.factory.tables import as_csv, as_markdown, fitted, wrap


def test_one_is_not_several():
    assert [counted(n, "row") for n in (0, 1, 2, 1234)] == [
        "0 rows",
        "1 row",
        "2 rows",
        "1,234 rows",
    ]
    assert [counted(n, "row is", "rows are") for n in (1, 3)] == ["1 row is", "3 rows are"]


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0"),
        (2e-5, "2e-05"),
        (0.000123456, "0.000123"),
        (0.0125, "0.0125"),
        (0.4731, "0.473"),
        (17.97, "17.97"),
        (123.456, "123.5"),
        (1234.5, "1,234"),
        (-0.5, "-0.500"),
        (float("inf"), "∞"),
        (float("nan"), ""),
    ],
)
def test_a_number_keeps_its_digits(x, text):
    assert number(x) == text


@given(st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) > 1e-300))
def test_no_number_that_is_not_zero_reads_as_zero(x):
    read = float(number(x).replace(",", ""))
    assert read != 0 and abs(read / x - 1) < 0.006


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.0, "<.001"), (0.0004, "<.001"), (0.012, ".012"), (0.47, ".47"), (1.0, "1.00"), (None, "")],
)
def test_a_p_value_is_never_zero(p, text):
    assert p_value(p) == text


@pytest.mark.parametrize(
    ("e", "short", "long"),
    [
        ((0.43, 0.39, 0.47), "0.43 ±.04", "0.43 (0.39 to 0.47)"),
        ((0.953, 0.941, 0.964), "0.953 ±.012", "0.953 (0.941 to 0.964)"),
        ((17.343, 16.48, 18.13), "17.3 ±.9", "17.3 (16.5 to 18.1)"),
        ((1.0, 0.97, 1.0), "1.00 -.03", "1.00 (0.97 to 1.00)"),
        ((0.02, 0.0, 0.3), "0.02 -.02 +.28", "0.02 (0.00 to 0.30)"),
        ((0.1, -0.001, 0.2), "0.10 ±.10", "0.10 (0.00 to 0.20)"),
        ((0.0, 0.0, 0.0), "0", "0"),
        ((0.0, 0.0, 5e-324), "0.0000 ±.0000", "0.0000 (0.0000 to 0.0000)"),
        ((0.25, None, None), "0.250", "0.250"),
        ((None, None, None), "-", "-"),
    ],
)
def test_an_estimate_is_written_with_its_interval(e, short, long):
    assert (estimate(Measured(*e)), estimate(Measured(*e), intervals=True)) == (short, long)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_share_is_never_written_outside_of_its_bounds(x, y, z):
    low, value, high = sorted((x, y, z))
    parts = estimate(Measured(value, low, high)).split(" ")
    shown = float(parts[0])
    slack = 0.26 * (high - low) + 0.02  # a nearly symmetrical interval is written with one number
    for part in parts[1:]:
        size = float("0" + part[1:]) if part[1] == "." else float(part[1:])
        assert part[0] == "+" or shown - size >= low - slack
        assert part[0] == "-" or shown + size <= high + slack


def test_better_and_worse_are_signs():
    high, low = Measured(0.9, 0.8, 1.0), Measured(0.4, 0.3, 0.5)
    assert (better(high, 0.5), better(low, 0.6), better(low, 0.45)) == ("▲", "▼", "")
    assert better(high, 0.5, more=False) == "▼"
    assert cell(marked(high, low)) == "0.90 ±.10 ▲" and cell(marked(high, low, False))[-1] == "▼"
    assert cell(marked(high, Measured(0.85, 0.7, 0.9))) == "0.90 ±.10"


HEADS = ("principle", "label mass, 5% quantile", "the same when asked again", "unscored", "note")
ROWS = [
    ("flattery", 0.1, Measured(0.9, 0.87, 0.93), 12, "a text of several words that can be broken"),
    ("helpfulness", 0.25, Measured(0.91, 0.9, 0.94), 1_234, ""),
]


def text_of(parts):
    return "\n\n".join("\n".join([*part.header, *part.body]) for part in parts)


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_fits_and_breaks_no_word_of_its_headers(width):
    parts = fitted(HEADS, ROWS, width)
    words = {word for head in HEADS for word in head.split()}
    for part in parts:
        assert all(cell_len(line) <= width for line in [*part.header, *part.body])
        assert {word for line in part.header for word in line.split()} <= words
    assert len(parts) == 1 or width < 80


def test_a_table_that_is_too_wide_is_cut_and_repeats_its_first_column():
    columns = [f"column_{i}" for i in range(14)]
    parts = fitted(columns, [[f"value {i}" for i in range(14)]], 80)
    assert len(parts) == 2 and all("value 0" in part.body[-1] for part in parts)
    (records,) = fitted([f"column_{i}" for i in range(60)], [range(60)], 80)
    assert records.body[0] == "row 1" and records.body[60].split() == ["column_59", "59"]


def test_without_a_width_a_row_is_one_line():
    (part,) = fitted(HEADS, [("a\nb", *[None] * 3, "x" * 300)], None, rule=False)
    assert (
        part.body == ["a\\nb" + " " * (len(part.header[0]) - 8) + "x" * 300] and not part.body[1:]
    )


@given(st.text(max_size=60), st.integers(1, 20))
def test_wrapped_text_fits_and_loses_nothing(text, width):
    lines = wrap(text, width)
    if width > 1:  # a wide character needs two cells
        assert all(cell_len(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_csv_has_all_digits_and_the_bounds():
    rows = [("a,b", 0.123456789, Measured(0.5, 0.25, 0.75)), ("c", None, Measured(None))]
    found = list(csv.reader(io.StringIO(as_csv(("name", "x", "share"), rows))))
    assert found == [
        ["name", "x", "share", "share low", "share high"],
        ["a,b", "0.123456789", "0.5", "0.25", "0.75"],
        ["c", "", "", "", ""],
    ]


def test_markdown_escapes_what_would_break_it():
    made = as_markdown(("a|b", "n"), [("<b>x</b>\n*y*", 3)])
    assert made == "| a\\|b | n |\n| --- | ---: |\n| \\<b\\>x\\</b\\> \\*y\\* | 3 |\n"
