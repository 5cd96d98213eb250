"""Numbers as people read them: with their digits, with their uncertainty, never as 0.000.

An estimate is anything with `value`, `low` and `high` (`factory.stats.Estimate` is one).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Any, Protocol, TypeGuard

from prefab.factory.printable import printable

SMALLEST_P = 0.001  # smaller p values are written as `<.001`
MOST_DECIMALS = 4


class HasInterval(Protocol):
    """A value with the bounds of its interval; None where it has none."""

    @property
    def value(self) -> float | None:
        """The value."""

    @property
    def low(self) -> float | None:
        """The lower bound."""

    @property
    def high(self) -> float | None:
        """The upper bound."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A value with the bounds of its interval, where these are not an `Estimate`'s own, and a mark
    to write after it.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    mark: str = ""


def is_estimate(value: Any) -> TypeGuard[HasInterval]:
    """Whether a value has an interval, or could have one."""
    return all(hasattr(value, name) for name in ("value", "low", "high"))


def number(x: float) -> str:
    """A float with at least three significant digits: 0.473, 17.97, 2e-05, 1,234."""
    if not isfinite(x):
        return {"inf": "∞", "-inf": "-∞"}.get(str(x), "")
    size = abs(x)
    if size == 0:
        return "0"
    if size >= 1000:
        return f"{x:,.0f}"
    if size >= 1:
        return f"{x:.{3 - floor(log10(size))}f}"
    return f"{x:.3f}" if size >= 0.1 else f"{x:.3g}"


def counted(n: int, one: str, many: str = "") -> str:
    """A number with what it counts: `1 row`, `1,234 rows`.

    Args:
        n: The number.
        one: What follows 1; it may end with a verb ("row is").
        many: What follows other numbers; left out: `one` with an s.
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def p_value(p: float | None) -> str:
    """`<.001`, `.012`, `.47`; nothing for None."""
    if p is None:
        return ""
    if p < SMALLEST_P:
        return "<.001"
    text = f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"
    return text.removeprefix("0")


def estimate(e: HasInterval, intervals: bool = False) -> str:
    """`0.43 ±.04`, or with `intervals` `0.43 (0.39 to 0.47)`; where the interval is not
    symmetrical, `0.98 -.05 +.01`. Without bounds the value alone, and `-` without a value.
    """
    if e.value is None:
        return "-"
    if e.low is None or e.high is None:
        return number(e.value)
    below, above = max(0.0, e.value - e.low), max(0.0, e.high - e.value)
    most = max(below, above)
    if not isfinite(most) or most == 0:
        return number(e.value)
    places = _decimals(most, abs(e.value))
    shown = _fixed(e.value, places)
    if intervals:
        return f"{shown} ({_fixed(e.low, places)} to {_fixed(e.high, places)})"
    if abs(below - above) <= max(1.5 * 10.0**-places, most / 4):
        return f"{shown} ±{_short(most, places)}"
    sides = ("-", _short(below, places)), ("+", _short(above, places))
    return " ".join([shown, *(sign + text for sign, text in sides if text.strip(".0"))])


def _decimals(half: float, size: float) -> int:
    """Decimals that show one significant digit of an interval's half width, two where the first
    is 1; at least two for a value below 1.
    """
    exponent = max(floor(log10(half)), -MOST_DECIMALS)  # 10.0**-324 would be zero
    digits = 1 if half / 10.0**exponent < 1.95 else 0
    return min(MOST_DECIMALS, max(2 if size <= 1 else 0, digits - exponent))


def _fixed(x: float, places: int) -> str:
    """With so many decimals, and without a negative zero."""
    return f"{round(x, places) + 0.0:,.{places}f}"


def _short(x: float, places: int) -> str:
    return _fixed(x, places).removeprefix("0") or "0"


def better(e: HasInterval, than: float = 0.0, more: bool = True) -> str:
    """▲ where the whole interval is better than a number, ▼ where it is worse, else nothing.

    Args:
        e: The estimate.
        than: What it is compared with.
        more: Whether a larger value is better.
    """
    if e.low is None or e.high is None or e.low <= than <= e.high:
        return ""
    return "▲" if (e.low > than) == more else "▼"


def marked(e: HasInterval, base: HasInterval, more: bool = True) -> Measured:
    """The estimate with ▲ where its whole interval is better than that of `base`, ▼ where worse."""
    mark = ""
    if None not in (e.low, e.high, base.low, base.high):
        above, below = e.low > base.high, e.high < base.low  # type: ignore[operator]  # not None
        mark = "▲" if (above if more else below) else "▼" if above or below else ""
    return Measured(e.value, e.low, e.high, mark)


def cell(value: Any, intervals: bool = False) -> str:
    """A value as printable text: see `number` and `estimate`; thousands separated, nothing for
    None.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if is_estimate(value):
        return f"{estimate(value, intervals)} {getattr(value, 'mark', '')}".rstrip()
    return printable(str(value))


def percent(e: HasInterval) -> str:
    """A share as `98.9% (97.1 to 99.6)`; a dash without a value. No bound is shown outside of 0 and
    100.
    """
    if e.value is None:
        return "-"
    if e.low is None or e.high is None:
        return f"{e.value:.1%}"
    return f"{e.value:.1%} ({100 * max(0.0, e.low):.1f} to {100 * min(1.0, e.high):.1f})"
