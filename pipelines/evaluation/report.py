"""What `prefab eval policy` found, as tables on the console, and as files: every answer, a page,
and charts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prefab.factory import charts
from prefab.factory.console import say, table
from prefab.factory.numbers import better, cell, counted, marked, p_value
from prefab.factory.pages import write_page
from prefab.factory.types import Prompt
from prefab.pipelines.evaluation.policy_metrics import PolicyAnswer
from prefab.trainers.model_card import add_evaluation

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
    "refuses",
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


EXAMPLES, LONGEST = 8, 1_500  # prompts that are shown, and characters of a text


def examples(
    report: Any, prompts: Sequence[Prompt], found: Mapping[str, Sequence[PolicyAnswer]]
) -> list[dict[str, Any]]:
    """The first answers of all policies to the prompts on which their scores differ most (half of
    them), and to others.

    Returns:
        For each prompt its `turns` (role and text each), and `answers` (policy, text and score
        each; without a score that compares policies: None).
    """

    def score(answer: PolicyAnswer) -> float | None:
        return answer.gold["gold"] if report.value == "gold" and answer.gold else answer.proxy

    first: dict[int, list[tuple[str, str, float | None]]] = {}
    for policy, some in found.items():
        seen: set[int] = set()
        for a in some:
            if a.prompt not in seen:
                seen.add(a.prompt)
                first.setdefault(a.prompt, []).append((policy, a.text[:LONGEST], score(a)))

    def apart(prompt: int) -> float:
        scores = [value for _, _, value in first[prompt] if value is not None]
        return min(scores) - max(scores) if scores else 0.0

    ordered = sorted(first, key=lambda prompt: (apart(prompt), prompt))
    rest = ordered[EXAMPLES // 2 :]
    chosen = ordered[: EXAMPLES // 2] + rest[:: max(1, -(-len(rest) // (EXAMPLES // 2)))]
    return [
        {
            "turns": [(m.role, m.content[:LONGEST]) for m in prompts[prompt].messages],
            "answers": first[prompt],
        }
        for prompt in chosen
    ]


_BODY = """
<h1>{{ title }}</h1>
<p>{{ marks }}</p>
{{ plain_table(columns, figures) }}
{% if wins %}<h2>Against {{ base }}, by {{ value }}</h2>
<p>win rate: how often the policy's answer is better, of the pairs that differ (decided); length
controlled: if both wrote equally long; p: paired by prompt.</p>
{{ plain_table(win_columns, wins) }}{% endif %}
{% if charts %}<h2>Charts</h2><div class="charts">{% for chart in charts %}{{ chart }}{% endfor %}</div>{% endif %}
<h2>Examples</h2>
<p class="quiet">Half of them are the prompts on which the scores differ most. answers.jsonl has every answer.</p>
{% for e in examples %}<section class="example">
{% for role, text in e.turns %}<p class="text"><b>{{ role }}</b> {{ text }}</p>
{% endfor %}<div class="pair">{% for policy, text, score in e.answers %}<div><b>{{ policy }}</b>
{% if score is not none %}<span class="quiet">{{ value }} {{ cell(score) }}</span>{% endif %}
<div class="text">{{ text }}</div></div>
{% endfor %}</div></section>
{% endfor %}
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}"""


def write_report(
    out: Path, report: Any, prompts: Sequence[Prompt], found: dict[str, list[PolicyAnswer]]
) -> None:
    """answers.jsonl (every answer with its numbers), report.html (every figure, win rates, charts
    and examples) and report.png.
    """
    import orjson

    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in PolicyAnswer.__dataclass_fields__ if name != "prompt"]
    with open(out / "answers.jsonl", "wb") as file:
        for policy, some in found.items():
            for a in some:
                row = {"policy": policy, "prompt": prompts[a.prompt].id}
                row |= {name: getattr(a, name) for name in names}
                file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
    made = drawn(report.policies, report.value)
    if made:
        charts.draw(made).savefig(out / "report.png", dpi=150)

    def texts(rows: Iterable[Sequence[Any]]) -> list[list[str]]:
        return [[cell(value, True) for value in row] for row in rows]

    every = dict.fromkeys([*SHOWN, *(k for f in report.policies.values() for k in f)])
    write_page(
        out / "report.html",
        f"Policies on {counted(report.prompts, 'held-out prompt')} in {counted(report.groups, 'group')}, "
        f"{counted(report.samples, 'answer')} each",
        _BODY,
        marks=MARKS.format(base=report.baseline),
        columns=["", *report.policies],
        figures=texts(figures(report, tuple(every), zeros=True)),
        base=report.baseline,
        value=report.value,
        win_columns=WIN_COLUMNS,
        wins=texts(win_rates(report)),
        charts=[Markup(text) for text in charts.as_svg(made)],
        examples=examples(report, prompts, found),
        cell=cell,
        notes=report.notes,
    )


def write_cards(
    policies: Mapping[str, str], report: Any, shown: Sequence[Mapping[str, Any]]
) -> None:
    """Fill in the evaluation on the card of each policy that was trained here: its base against
    it.
    """
    told = (
        f"{counted(report.prompts, 'held-out prompt')} in {counted(report.groups, 'group')}, {counted(report.samples, 'answer')} "
        "each, with 95% intervals. " + MARKS.format(base=report.baseline)
    )
    for name, folder in policies.items():
        if name == report.baseline:
            continue
        pair = {name: report.policies[name]}
        base = {report.baseline: report.policies[report.baseline]}
        both = replace(report, policies=base | pair)
        wins = report.against.get(name)
        won = [("win rate", "", wins.win_rate)] if wins else []
        bars = drawn(both.policies, report.value)
        answers = [
            (
                row["turns"][-1][1],
                [(who, text) for who, text, _ in row["answers"] if who in both.policies],
            )
            for row in shown[:CARD_EXAMPLES]
        ]
        columns = ("", report.baseline, name)
        rows = [*figures(both, SHOWN), *won]
        add_evaluation(Path(folder), told, columns, rows, bars[-1] if bars else None, answers)


CARD_EXAMPLES = 3


CALLED = {"gold": "ground truth", "proxy": "reward model's score"}  # in charts


def drawn(policies: Mapping[str, Mapping[str, Any]], value: str) -> list[charts.Chart]:
    """The value that policies are compared by and the proxy, over the KL from the reference and by
    checkpoint.

    `policies` are `Estimate`s by figure, by policy; a chart whose numbers nobody knows is left out.
    """
    names, made = list(dict.fromkeys(name for name in (value, "proxy") if name)), []
    words = {name: CALLED.get(name, name) for name in names}
    over_kl = [
        charts.Series(words[name], _points(policies, name, "kl"), joined=False) for name in names
    ]
    if over_kl := [s for s in over_kl if s.points]:
        made.append(
            charts.Chart(
                "Score of each policy over its distance from the reference, 95% intervals",
                "KL from the reference, nats an answer",
                " and ".join(s.name for s in over_kl),
                over_kl,
                kl=True,
            )
        )
    if by_policy := [
        s for name in names if (s := charts.Series(words[name], _points(policies, name))).points
    ]:
        made.append(
            charts.Chart(
                "Score of each policy, 95% intervals over groups of prompts",
                "policy, in the order given",
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
        f"What each policy does: {counted(report.prompts, 'held-out prompt')} in {counted(report.groups, 'group')}, "
        f"{counted(report.samples, 'answer')} each",
        ("", *report.policies),
        figures(report, shown),
        f"{MARKS.format(base=report.baseline)}. kl and entropy: in nats an answer"
        + (
            "; broken: incoherent, or at least one principle, by the oracle"
            if report.value == "gold"
            else ""
        ),
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


def figures(
    report: Any, shown: Sequence[str] = SHOWN, zeros: bool = False
) -> list[tuple[Any, ...]]:
    """A row for each figure that there is, with the value of each policy, marked where it is better
    or worse than the baseline's. Rows in which no policy has more than zero or rounding are left
    out, unless `zeros` are wanted.
    """
    base = report.policies.get(report.baseline, {})
    return [
        (name, *(_marked(name, f.get(name), base.get(name)) for f in report.policies.values()))
        for name in shown
        if any(name in f for f in report.policies.values())
        and (zeros or _is_told(name, report.policies.values()))
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
