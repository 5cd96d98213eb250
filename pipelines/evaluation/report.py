"""What `prefab eval policy` found, as tables on the console, and as files: every answer, a page,
and charts.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

from prefab.factory import charts
from prefab.factory.console import say, table
from prefab.factory.numbers import better, cell, marked, p_value
from prefab.factory.types import Prompt
from prefab.pipelines.evaluation.policy_metrics import PolicyAnswer

SHOWN = (
    "gold",
    "broken",
    "helps_harmless",
    "coherent",
    "proxy",
    "kl",
    "entropy",
    "sampler_gap",
    "words",
    "ended",
    "refuses_harmless",
    "complies_harmful",
    "flatters",
    "sycophancy",
    "sycophancy_over_baseline",
    "right_plain",
    "right_told_right",
    "right_told_wrong",
    "unread",
    "distinct_2",
    "self_bleu",
)
MORE_IS_BETTER = {"gold", "helps_harmless", "coherent", "proxy", "ended", "right_plain"}
LESS_IS_BETTER = {"broken", "refuses_harmless", "complies_harmful", "flatters", "sycophancy"}
MARKS = "▲ better, ▼ worse than {base} (the intervals do not overlap); intervals are over groups of prompts"
TO_BE_TOLD = 5e-4  # of a sampler's gap, on the console: below it is rounding, and a row of zeros


def write_report(
    out: Path, report: Any, prompts: Sequence[Prompt], found: dict[str, list[PolicyAnswer]]
) -> None:
    """answers.jsonl (every answer with its numbers), report.html (the table and the charts) and
    report.png.
    """
    import orjson

    out.mkdir(parents=True, exist_ok=True)
    with open(out / "answers.jsonl", "wb") as file:
        for name, some in found.items():
            for a in some:
                file.write(
                    orjson.dumps(
                        {
                            "policy": name,
                            "prompt": prompts[a.prompt].id,
                            **{
                                k: getattr(a, k)
                                for k in PolicyAnswer.__dataclass_fields__
                                if k != "prompt"
                            },
                        }
                    )
                    + b"\n"
                )
    title = (
        f"Policies on {report.prompts:,} held-out prompts in {report.groups:,} groups, "
        f"{report.samples} answers each"
    )
    head = "".join(f"<th>{k}</th>" for k in SHOWN)
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell(f.get(k), True))}</td>" for k in SHOWN)
        + "</tr>"
        for name, f in report.policies.items()
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report.notes)
    charts.write(
        out,
        "report",
        title,
        drawn(report.policies, report.value),
        f"<table><tr><th></th>{head}</tr>{rows}</table>{notes}",
    )


def drawn(policies: Mapping[str, Mapping[str, Any]], value: str) -> list[charts.Chart]:
    """The value that policies are compared by and the proxy, over the KL from the reference and by
    checkpoint.

    `policies` are `Estimate`s by figure, by policy; a chart whose numbers nobody knows is left out.
    """
    names, made = list(dict.fromkeys(name for name in (value, "proxy") if name)), []
    over_kl = [charts.Series(name, _points(policies, name, "kl"), joined=False) for name in names]
    if over_kl := [s for s in over_kl if s.points]:
        made.append(
            charts.Chart(
                "What the distance from the reference bought",
                "KL from the reference, nats an answer",
                " and ".join(s.name for s in over_kl),
                over_kl,
                kl=True,
            )
        )
    if by_policy := [
        s for name in names if (s := charts.Series(name, _points(policies, name))).points
    ]:
        made.append(
            charts.Chart(
                "By checkpoint, intervals over groups of prompts",
                "checkpoint, in the order given",
                " and ".join(s.name for s in by_policy),
                by_policy,
            )
        )
    return made


def _points(
    policies: Mapping[str, Mapping[str, Any]], name: str, over: str = ""
) -> list[charts.Point]:
    found = []
    for place, (policy, figures) in enumerate(policies.items(), 1):
        value, x = figures.get(name), figures.get(over)
        at = x.value if over and x is not None else None if over else place
        if value is not None and value.value is not None and at is not None:
            found.append(charts.Point(at, value.value, value.low, value.high, policy))
    return found


def show(report: Any, shown: Sequence[str] = SHOWN) -> None:
    """Print the tables of an evaluation; of the figures, those in `shown`."""
    table(
        f"What each policy does: {report.prompts:,} held-out prompts in {report.groups:,} groups, "
        f"{report.samples} answers each",
        ("", *report.policies),
        figures(report, shown),
        f"{MARKS.format(base=report.baseline)}. kl and entropy: in nats an answer"
        + ("; broken: at least one principle, by the oracle" if report.value == "gold" else ""),
    )
    if report.against:
        table(
            f"Each policy against {report.baseline}, by {report.value}: how often its answer is better",
            WIN_COLUMNS,
            win_rates(report),
            "win rate: of the pairs that differ; p: paired by group of prompts",
        )
    for note in report.notes:
        say(note)


def figures(report: Any, shown: Sequence[str] = SHOWN) -> list[tuple[Any, ...]]:
    """A row for each figure that there is, with the value of each policy, marked where it is better
    or worse than the baseline's.
    """
    base = report.policies.get(report.baseline, {})
    return [
        (name, *(_marked(name, f.get(name), base.get(name)) for f in report.policies.values()))
        for name in shown
        if _is_told(name, report.policies.values())
    ]


def _is_told(name: str, policies: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a figure is there, and more than a row of zeros."""
    found = [f[name] for f in policies if name in f]
    least = TO_BE_TOLD if name == "sampler_gap" else -inf
    return any((e.value or 0.0) > least for e in found)


def _marked(name: str, e: Any, base: Any) -> Any:
    if e is None or base is None or e is base or name not in MORE_IS_BETTER | LESS_IS_BETTER:
        return e
    return marked(e, base, name in MORE_IS_BETTER)


WIN_COLUMNS = ("", "win rate", "", "win rate, length controlled", "difference", "decided", "p")


def win_rates(report: Any) -> list[tuple[Any, ...]]:
    """A row for each comparison with the baseline, by `WIN_COLUMNS`."""
    return [
        (
            name,
            a.win_rate,
            better(a.win_rate, 0.5),
            a.length_controlled,
            a.difference,
            a.decided,
            p_value(a.p),
        )
        for name, a in report.against.items()
    ]
