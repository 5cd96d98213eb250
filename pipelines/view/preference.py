"""The page of one preference: both answers word by word, what each judge said under each principle
in each order, how the answers came about, and every model call behind it.
"""

from __future__ import annotations

from typing import Any

from prefab.factory.errors import ConfigError
from prefab.factory.tool_calls import shown_conversation, stored_messages
from prefab.pipelines.quality.why import explain, find_preference
from prefab.pipelines.view.filters import Filters
from prefab.pipelines.view.grid import filtered, rows_of
from prefab.pipelines.view.pages import Page, Parameters, View, as_sql, one
from prefab.pipelines.view.reader import Row

_VERDICTS = """
SELECT v.principle, v.judge, v."order", v.repeat, v.p_a, v.winner, v.reason, v.mass, v.tie_mass, v.exactness, v.call
FROM verdicts v WHERE v.run = $run AND v.prompt = $prompt AND v.a = $a AND v.b = $b
ORDER BY v.principle, v.judge, v.repeat, v."order" """
_SAMPLES = 'SELECT * FROM samples WHERE run = $run AND prompt = $prompt ORDER BY "index"'
_CRITIQUES = 'SELECT * FROM critiques WHERE run = $run AND prompt = $prompt ORDER BY round, "index", principle'
# The same prompt and the same two answers in other runs: under another constitution, other judges.
_ELSEWHERE = """
SELECT p.preference, r.name || '@' || r.version AS named, c.title AS constitution, p.outcome, p.p_a, p.p_chosen
FROM preferences p JOIN runs r ON r.run = p.run LEFT JOIN constitutions c ON c.constitution = r.constitution
JOIN samples x ON x.run = p.run AND x.prompt = p.prompt AND x."index" = p.a
JOIN samples y ON y.run = p.run AND y.prompt = p.prompt AND y."index" = p.b
WHERE p.prompt = $prompt AND p.run <> $run AND x.text = $text_a AND y.text = $text_b ORDER BY r.last_start DESC"""
_LABELS = """
SELECT annotator, winner, value->>'$.principle' AS principle, value->>'$.a' AS a, labelled_at FROM human_labels
WHERE prompt = $prompt AND winner IS NOT NULL AND ((value->>'$.a' = $sample_a AND value->>'$.b' = $sample_b)
  OR (value->>'$.a' = $sample_b AND value->>'$.b' = $sample_a)) ORDER BY labelled_at"""
_MARKS = "SELECT rule, detail FROM marks WHERE run = $run AND preference = $preference"


def preference(view: View, parameters: Parameters) -> Page:
    """One preference, and which are before and after it in the grid that it was opened from."""
    name = one(parameters, "id")
    filters, _, _ = filtered(view, parameters)
    row = find(view, name, filters.run)
    found = explain(view.folder, row, view.reader.rows)
    del row["config"], row["messages"]  # not shown
    at = {key: row[key] for key in ("run", "prompt", "a", "b", "preference")}
    samples = {s["index"]: s for s in view.reader.rows(_SAMPLES, at)}
    sides = {side: samples.get(row[side], {}) for side in "ab"}
    values = at | {f"text_{side}": sides[side].get("text") for side in "ab"}
    values |= {f"sample_{side}": sides[side].get("sample") for side in "ab"}
    verdicts = view.reader.rows(_VERDICTS, at)
    critiques = view.reader.rows(_CRITIQUES, at)
    data = {
        "row": row,
        "run": row["named"],
        "text": {side: sides[side].get("text") for side in "ab"},
        "thinking": {side: sides[side].get("thinking") for side in "ab"},
        "context": {side: _context(sides[side]) for side in "ab"},
        "finish": {side: sides[side].get("finish") for side in "ab"},
        "verdicts": by_principle(verdicts, principles_of(view, row["constitution"])),
        "chains": {side: chain(sides[side], samples, critiques) for side in "ab"},
        "elsewhere": view.reader.rows(_ELSEWHERE, values),
        "labels": [_label(label, values) for label in view.reader.rows(_LABELS, values)],
        "marks": view.reader.rows(_MARKS, at),
        "why": found,
        "around": around(view, parameters, filters),
    }
    shown = {**{k: v for k, v in data.items() if k != "why"}, "why": found.data()}
    command = view.command("why", row["preference"][:12], "--calls", "--run", row["named"])
    title = f"Preference {row['preference'][:12]}"
    return Page("preference.jinja", title, data, command, as_sql(_VERDICTS, at), json=shown)


def find(view: View, name: str, run: str) -> Row:
    """The preference with this id, or whose id begins so; of the run that is named, else of the
    latest.

    Raises: ConfigError when there is none, or several.
    """
    read = view.reader.rows
    try:
        row = find_preference(view.folder, name, run, read)
    except ConfigError:
        if not run:
            raise
        row = find_preference(view.folder, name, "", read)
    return {**row, "named": f"{row['name']}@{row['version']}"}


def _context(sample: Row) -> str:
    """The turns between the prompt and an answer that has a context of its own; empty without."""
    return shown_conversation(stored_messages(sample.get("context") or "[]"))


def _label(label: Row, values: dict[str, Any]) -> Row:
    """A person's label, in the order of this preference."""
    if label["a"] != values["sample_a"]:
        label["winner"] = {"a": "b", "b": "a"}.get(label["winner"], label["winner"])
    return label


def principles_of(view: View, constitution: str | None) -> dict[str, Row]:
    """A constitution's principles by their ids."""
    sql = "SELECT * FROM principles WHERE constitution = $constitution ORDER BY position"
    rows = view.reader.cached(
        f"principles {constitution}", lambda: view.reader.rows(sql, {"constitution": constitution})
    )
    return {row["principle"]: row for row in rows}


def by_principle(verdicts: list[Row], principles: dict[str, Row]) -> list[dict[str, Any]]:
    """Verdicts grouped by principle, then judge, with the mean of each judge's orders."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for v in verdicts:
        judge = v["judge"] + (f" (asked again, {v['repeat']})" if v["repeat"] else "")
        groups.setdefault(v["principle"], {}).setdefault(judge, []).append(v)
    found = []
    for name, judges in groups.items():
        about = principles.get(name, {})
        read = []
        for judge, said in judges.items():
            known = [v["p_a"] for v in said if v["p_a"] is not None]
            whole = len(known) == len(said)
            sides = {v["winner"] for v in said} & {"a", "b"}
            mean = sum(known) / len(known) if whole and known else None
            read.append({"judge": judge, "verdicts": said, "mean": mean, "flipped": len(sides) > 1})
        found.append(
            {
                "principle": name,
                "title": about.get("title"),
                "compare": about.get("compare"),
                "judges": read,
            }
        )
    return sorted(found, key=_undecided)


def _undecided(group: dict[str, Any]) -> float:
    """How near to a half the judges' mean under a principle is: the decisive ones come first."""
    means = [judge["mean"] for judge in group["judges"] if judge["mean"] is not None]
    return -abs(sum(means) / len(means) - 0.5) if means else 1.0


def chain(sample: Row, samples: dict[int, Row], critiques: list[Row]) -> list[dict[str, Any]]:
    """The steps from the first draft to an answer: each revision with the text before it and the
    critiques that led to it. Empty for a draft.
    """
    steps: list[dict[str, Any]] = []
    while sample and sample["parent"] >= 0 and len(steps) < 50:
        before = samples.get(sample["parent"], {})
        of = [
            c
            for c in critiques
            if c["index"] == sample["parent"]
            and (c["round"], c["principle"]) == (sample["round"], sample["principle"])
        ]
        steps.append(
            {
                "from": before.get("text"),
                "to": sample["text"],
                "index": sample["index"],
                "principle": sample["principle"],
                "round": sample["round"],
                "critiques": of,
            }
        )
        sample = before
    return steps[::-1]


def around(view: View, parameters: Parameters, filters: Filters) -> dict[str, str]:
    """Addresses of the preferences before and after this one, where it was opened from the grid."""
    place, found = one(parameters, "at"), {"previous": "", "next": "", "back": ""}
    if not (place.isdecimal() and len(place) < 9):
        return found
    at = int(place)
    filters, about, _ = filtered(view, parameters)
    first = max(0, at - 1)
    rows = rows_of(view, filters, about, first, at - first + 2)
    kept = filters.query()
    found["back"] = f"preferences?{kept}"
    for i, row in enumerate(rows):
        if (step := first + i - at) in (-1, 1):
            name = "previous" if step < 0 else "next"
            found[name] = f"preference?id={row['preference']}&at={at + step}&{kept}"
    return found


def raw_text(view: View, name: str, run: str, side: str) -> str:
    """The whole text of an answer."""
    row = find(view, name, run)
    if side not in ("a", "b"):
        raise ConfigError("side: a or b")
    sql = 'SELECT text FROM samples WHERE run = $run AND prompt = $prompt AND "index" = $index'
    text = view.reader.value(sql, {"run": row["run"], "prompt": row["prompt"], "index": row[side]})
    return str(text or "")
