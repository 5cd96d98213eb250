"""The filters of the preferences page: read from an address, and as SQL."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any
from urllib.parse import urlencode

from prefab.factory.errors import ConfigError

OUTCOMES = ("a", "b", "tie", "unscored")
SORTS = {
    "unsure": "p.identical, abs(p.p_a - 0.5) NULLS LAST",
    "sure": "-abs(p.p_a - 0.5) NULLS LAST",
    "spread": "-p.spread NULLS LAST",
    "length": "-abs(length) NULLS LAST",
    "stored": "",
}
RANGES = ("p", "spread", "length")
TEXT = 200  # characters of a filter's value
WORD = r"[\pL\pM\pN_]+"  # letters, marks on them, and digits, as DuckDB's expressions name them
_CHOICES: dict[str, Sequence[str]] = {
    "people": ("", "labelled", "agree", "disagree"),
    "orders": ("", "differ", "agree"),
    "sort": tuple(SORTS),
    "was": ("", *OUTCOMES),
}
# The preferred answer's length less the other's; for ties and unscored ones A's less B's.
_LENGTHS = """
JOIN (SELECT prompt, "index", length(text)::INTEGER AS n FROM samples WHERE run = $run) x
  ON x.prompt = p.prompt AND x."index" = p.a
JOIN (SELECT prompt, "index", length(text)::INTEGER AS n FROM samples WHERE run = $run) y
  ON y.prompt = p.prompt AND y."index" = p.b"""
LENGTH = "CASE WHEN p.outcome = 'b' THEN y.n - x.n ELSE x.n - y.n END"
# What most people say of a comparison, over all principles: 1 for a, -1 for b, 0: they are split.
PEOPLE = """
(SELECT prompt, a, b, sign(sum(vote)) AS said FROM (
  SELECT s.prompt, least(s."index", t."index") AS a, greatest(s."index", t."index") AS b,
    CASE h.winner WHEN 'a' THEN 1 WHEN 'b' THEN -1 ELSE 0 END * CASE WHEN s."index" < t."index" THEN 1 ELSE -1 END AS vote
  FROM human_labels h
  JOIN samples s ON s.run = $run AND s.prompt = h.prompt AND s.sample = h.value->>'$.a'
  JOIN samples t ON t.run = $run AND t.prompt = h.prompt AND t.sample = h.value->>'$.b'
  WHERE h.winner IN ('a', 'b', 'tie')
    AND h.label NOT IN (SELECT value->>'$.undo' FROM human_labels WHERE value->>'$.undo' IS NOT NULL))
GROUP BY ALL)"""

# The preference of another run about the same prompt and the same two answers.
SAME_ANSWERS = """
JOIN preferences o ON o.run = $against AND o.prompt = p.prompt AND o.a = p.a AND o.b = p.b
JOIN samples sa ON sa.run = p.run AND sa.prompt = p.prompt AND sa."index" = p.a
JOIN samples sb ON sb.run = p.run AND sb.prompt = p.prompt AND sb."index" = p.b
JOIN samples oa ON oa.run = o.run AND oa.prompt = p.prompt AND oa."index" = p.a AND oa.text = sa.text
JOIN samples ob ON ob.run = o.run AND ob.prompt = p.prompt AND ob."index" = p.b AND ob.text = sb.text"""


@dataclass(frozen=True, slots=True)
class Filters:
    """What of a run's preferences is shown, and in which order. Empty: not filtered."""

    run: str = ""
    outcome: tuple[str, ...] = ()
    p_min: float | None = None
    p_max: float | None = None
    spread_min: float | None = None
    spread_max: float | None = None
    length_min: float | None = None
    length_max: float | None = None
    principle: str = ""
    judge: str = ""
    judges: str = ""  # two names with a comma between: they prefer other answers
    tag: str = ""
    reason: str = ""  # of an unscored verdict
    mark: str = ""  # of an audit of the data
    orders: str = ""
    people: str = ""
    against: str = ""  # another run, where the outcome is another one
    was: str = ""  # the outcome there
    q: str = ""
    sort: str = "unsure"

    def query(self, **changes: Any) -> str:
        """The filters as the query of an address, with changes."""
        other = replace(self, **changes)
        pairs: list[tuple[str, str]] = []
        for one in fields(other):
            value = getattr(other, one.name)
            if value in (None, "", ()) or (one.name == "sort" and value == "unsure"):
                continue
            values = value if isinstance(value, tuple) else (value,)
            pairs += [(one.name, f"{v:g}" if isinstance(v, float) else str(v)) for v in values]
        return urlencode(pairs)

    def without(self, *names: str) -> Filters:
        """The filters, those of these names not set."""
        empty = Filters()
        kept: dict[str, Any] = {
            one.name: getattr(empty if one.name in names else self, one.name)
            for one in fields(self)
        }
        return Filters(**kept)

    def named(self) -> list[tuple[str, str]]:
        """The filters that are set, each with the query of an address without it."""
        found = []
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in ("run", "sort") or value in (None, "", ()):
                continue
            shown = ", ".join(value) if isinstance(value, tuple) else value
            empty = () if isinstance(value, tuple) else None if isinstance(value, float) else ""
            words = (
                f"{one.name.replace('_', ' ')}: {shown:g}"
                if isinstance(shown, float)
                else (f"{one.name}: {shown}")
            )
            found.append((words, self.query(**{one.name: empty})))
        return found


def read_filters(parameters: Sequence[tuple[str, str]]) -> Filters:
    """The filters in the parameters of an address; others are left alone.

    Raises: ConfigError for a number that is none, or a choice that does not exist.
    """
    known = {one.name: one for one in fields(Filters)}
    found: dict[str, Any] = {}
    for name, text in parameters:
        text = text.strip()
        if name not in known or not text:
            continue
        if len(text) > TEXT:
            raise ConfigError(f"{name}: at most {TEXT} characters")
        if name == "outcome":
            if text not in OUTCOMES:
                raise ConfigError(f"outcome: {text!r} is none of {', '.join(OUTCOMES)}")
            found[name] = (*found.get(name, ()), text)
        elif name.endswith(("_min", "_max")):
            found[name] = _number(name, text)
        elif text not in _CHOICES.get(name, (text,)):
            raise ConfigError(f"{name}: {text!r} is none of {', '.join(_CHOICES[name])}")
        else:
            found[name] = text
    return Filters(**found)


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise ConfigError(f"{name}: {text!r} is not a number")
    return value


def words_of(text: str) -> list[str]:
    """The words of a search, in lower case; each is looked for within the words of the texts."""
    kept = "".join(
        c if unicodedata.category(c)[0] in "LMN" or c == "_" else " " for c in text.lower()
    )
    return list(dict.fromkeys(kept.split()))


@dataclass(slots=True)
class Query:
    """The FROM and WHERE of a query of preferences (`p`), and its values."""

    joins: list[str] = field(default_factory=list)
    conditions: list[str] = field(default_factory=lambda: ["p.run = $run"])
    values: dict[str, Any] = field(default_factory=dict)
    lengths: bool = False

    def source(self) -> str:
        """From FROM on, without an order."""
        joins = " ".join([*([_LENGTHS] if self.lengths else []), *self.joins])
        return f"FROM preferences p {joins} WHERE {' AND '.join(self.conditions)}"

    def add(self, condition: str, **values: Any) -> None:
        """Another condition, with the values that it names."""
        self.conditions.append(condition)
        self.values |= values

    def verdicts(
        self, conditions: Sequence[str], having: str = "", by: str = "", negated: bool = False
    ) -> None:
        """Only comparisons that have (or do not have) verdicts for which the conditions hold, all
        of them together; `having` is of those of one comparison and `by`.
        """
        group = f" GROUP BY prompt, a, b{by} HAVING {having}" if having else ""
        where = " AND ".join(["run = $run", *conditions])
        self.add(
            f"{'NOT ' if negated else ''}EXISTS (SELECT 1 FROM (SELECT prompt, a, b FROM verdicts "
            f"WHERE {where}{group}) v WHERE v.prompt = p.prompt AND v.a = p.a AND v.b = p.b)"
        )


def build(filters: Filters, run: int, against: int | None = None) -> Query:
    """The filters as SQL.

    Args:
        filters: The filters.
        run: The number of the run that they name.
        against: That of `filters.against`.
    """
    query = Query(values={"run": run})
    if filters.outcome:
        query.add("list_contains($outcome, p.outcome)", outcome=list(filters.outcome))
    columns = {"p": "p.p_chosen", "spread": "p.spread", "length": LENGTH}
    for name in RANGES:
        for end, sign in (("min", ">="), ("max", "<=")):
            if (value := getattr(filters, f"{name}_{end}")) is not None:
                query.add(f"{columns[name]} {sign} ${name}_{end}", **{f"{name}_{end}": value})
                query.lengths |= name == "length"
    query.lengths |= filters.sort == "length"
    _of_verdicts(query, filters)
    if filters.tag:
        query.add(
            "p.prompt IN (SELECT prompt FROM prompts WHERE list_contains(tags, $tag))",
            tag=filters.tag,
        )
    if filters.mark:
        query.add(
            "p.preference IN (SELECT preference FROM marks WHERE run = $run AND rule = $mark)",
            mark=filters.mark,
        )
    if filters.people:
        query.joins.append(f"JOIN {PEOPLE} h ON h.prompt = p.prompt AND h.a = p.a AND h.b = p.b")
        sides = "h.said * CASE p.outcome WHEN 'a' THEN 1 WHEN 'b' THEN -1 ELSE 0 END"
        query.add(
            {"labelled": "true", "agree": f"{sides} > 0", "disagree": f"{sides} < 0"}[
                filters.people
            ]
        )
    if filters.against and against is not None:
        query.joins.append(SAME_ANSWERS)
        query.add("o.outcome <> p.outcome", against=against)
        if filters.was:
            query.add("o.outcome = $was", was=filters.was)
    for i, word in enumerate(words_of(filters.q) or ([filters.q] if filters.q else [])):
        has = f"FROM samples WHERE run = $run AND contains(lower(text), $q{i})"
        query.add(
            f'((p.prompt, p.a) IN (SELECT prompt, "index" {has}) '
            f'OR (p.prompt, p.b) IN (SELECT prompt, "index" {has}) '
            f"OR p.prompt IN (SELECT prompt FROM prompts WHERE contains(lower(text), $q{i})))",
            **{f"q{i}": word},
        )
    return query


def _of_verdicts(query: Query, filters: Filters) -> None:
    """The conditions on verdicts: principle, judge and reason hold together, of the same verdicts;
    so do they with orders that differ, and with two judges that do.
    """
    conditions = []
    for name in ("principle", "judge", "reason"):
        if text := getattr(filters, name):
            conditions.append(f"{name} = ${name}")
            query.values[name] = text
    if filters.orders:
        two = "bool_or(winner = 'a') AND bool_or(winner = 'b')"
        by = ", principle, judge, repeat"
        query.verdicts(conditions, two, by, negated=filters.orders == "agree")
    if filters.judges:
        one, _, other = filters.judges.partition(",")
        query.values |= {"judge_one": one.strip(), "judge_other": other.strip()}
        mean = "avg(p_a - 0.5) FILTER (judge = ${})"
        both = f"{mean.format('judge_one')} * {mean.format('judge_other')} < -1e-9"
        query.verdicts([*conditions, "judge IN ($judge_one, $judge_other)"], both)
    if conditions and not (filters.orders or filters.judges):
        query.verdicts(conditions)
