"""`prefab agreement` as tables: what is measured in `prefab.pipelines.quality.agreement`, in the
order in which a person asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefab.factory.console import say, table, warn
from prefab.factory.numbers import Measured, better, cell, percent
from prefab.factory.stats import Estimate

_JUDGE = (
    ("readings", "readings"),
    ("unscored", "verdicts unscored"),
    ("label_mass", "label mass, mean"),
    ("label_mass_low", "label mass, 5% quantile"),
    ("accuracy", "right, of those it decides"),
    ("exact", "right, ties included"),
    ("ties", "ties"),
    ("position_consistency", "both orders agree"),
    ("first_slot_share", "first slot picked"),
    ("slot_lean", "preference fairness: lean when torn, -1 to +1"),
    ("stability", "the same when asked again"),
)
SHOWN = 12  # principles or tags in a table; --json has all
ENOUGH = (
    (0.8, "enough to rely on (0.8)"),
    (0.667, "enough for tentative conclusions (0.667), not for firm ones (0.8)"),
)
NAMES = {
    "percent": "share that agrees",
    "cohen_kappa": "Cohen's kappa",
    "conger_kappa": "Conger's kappa",
    "fleiss_kappa": "Fleiss's kappa",
    "randolph_kappa": "Randolph's kappa",
    "brennan_prediger": "Brennan-Prediger",
    "scott_pi": "Scott's pi",
    "krippendorff_alpha": "Krippendorff's alpha",
    "gwet_ac1": "Gwet's AC1",
    "gwet_ac2": "Gwet's AC2",
}


def show(found: dict[str, Any], groups: int = 3) -> None:
    """All of it; comparisons of the first `groups` principles."""
    say(
        f"{found['run']}: {found['comparisons']:,} comparisons of {found['prompts']:,} prompts "
        f"in {found['groups']:,} groups, on which all intervals stand; "
        f"{found['items']:,} with their principles"
        + (f" · a sample: one of {found['sampled']} groups of prompts" if found["sampled"] else "")
        + (f" · gold: {found['gold']}" if found["gold"] else "")
    )
    if found["constitution"]["digest"]:
        version = found["constitution"]
        say(f"  constitution {version['id']}, version {version['digest'][:8]}")
    for line in in_brief(found):
        say(f"  {line}")
    _judges(found["judges"])
    if found["between"]:
        _between(found["between"])
        _coefficients(found["coefficients"])
    if found["accuracy"]:
        if found["between"]:
            _accuracy(found["accuracy"])
        _calibration(found["calibration"])
    if found["learned"]:
        _learned(found["learned"])
    else:
        warn(found["p_chosen"].replace("`", ""))
    _groups("Principles, the least agreed on first", found["principles"])
    if found["tags"]:
        _groups("Tags, likewise", found["tags"])
    if found["critiques"]:
        _critiques(found["critiques"])
    _divided(found["divided"], [row["name"] for row in found["principles"]][:groups])
    for words in found["limitations"]:
        warn(words)


def in_brief(found: dict[str, Any]) -> list[str]:
    """What somebody who reads no further should know, in sentences; only what was measured.

    Source: the bounds of alpha are Krippendorff's (Content Analysis, 2004, p. 241).
    """
    lines = []
    for row in found["judges"]:
        right, same = row["accuracy"], row["position_consistency"]
        told = [
            f"is right in {percent(right)} of what it decides" if right.value is not None else "",
            f"says the same in both orders in {percent(same)}" if same.value is not None else "",
            f"could not be read in {row['unscored']:.1%} of {row['verdicts']:,} verdicts"
            if row["unscored"]
            else "",
        ]
        if any(told):
            lines.append(f"{row['judge']} " + ", ".join(filter(None, told)))
    alpha = (found["coefficients"] or {}).get("krippendorff_alpha nominal")
    if alpha is not None and alpha.value is not None:
        lines.append(f"between the judges Krippendorff's alpha is {_alpha(alpha)}")
    best = found["accuracy"] and found["accuracy"]["over_best"].get("mean probability")
    if best is not None and best.value is not None and best.low is not None:
        over = (
            "more often right than"
            if best.low > 0
            else "less often right than"
            if best.high < 0
            else ("neither more nor less often right, as far as can be told, than")
        )
        lines.append(
            f"the panel (mean probability) is {over} its best judge, {found['accuracy']['best']}"
        )
    return lines


def _alpha(e: Estimate) -> str:
    assert e.value is not None
    low = e.boot_low if e.boot_low is not None else e.low
    if low is not None and low <= 0 and e.value < ENOUGH[-1][0]:
        return f"{e.value:.3f}: they agree no more than by chance, as far as can be told"
    above = next((words for bound, words in ENOUGH if e.value >= bound), None)
    return f"{e.value:.3f}: " + (
        above
        or "they agree more than by chance, but too little for even tentative conclusions (0.667)"
    )


def over_prompts(e: Estimate) -> Measured:
    """The estimate with the interval of the bootstrap over groups of prompts."""
    return Measured(e.value, e.boot_low, e.boot_high)


def _judges(rows: Sequence[dict[str, Any]]) -> None:
    lines = [
        [words, *(row[name] for row in rows)]
        for name, words in _JUDGE
        if any(not isinstance(row[name], Estimate) or row[name].value is not None for row in rows)
    ]
    reasons = [
        f"{row['judge']}: "
        + ", ".join(f"{reason} {n:,}" for reason, n in row["unscored_reasons"].items())
        for row in rows
        if row["unscored_reasons"]
    ]
    inexact = [line for row in rows for line in _inexact(row)]
    table(
        "Judges",
        ("", *(row["judge"] for row in rows)),
        lines,
        note="\n".join([*(f"unscored, {x}" for x in reasons), *inexact, *_missing(rows)]),
    )


def _inexact(row: Mapping[str, Any]) -> list[str]:
    """What is to be said of a judge whose verdicts have no exact probabilities."""
    hard, bounds = row["hard"], row["inexact"] - row["hard"]
    told = {
        f"{row['judge']}: {hard:,} of {row['verdicts']:,} verdicts are hard labels, without a "
        "probability: its server gives no log-probabilities, or it answers in words": hard,
        f"{row['judge']}: {bounds:,} of {row['verdicts']:,} verdicts are bounds: a label was not "
        "among the tokens that the server gives": bounds,
    }
    return [words for words, n in told.items() if n]


def _missing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What could not be said of judges, and why: a line a reason."""
    why: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        of: dict[str, list[str]] = {}
        for name, words in _JUDGE:
            if (
                isinstance(row[name], Estimate)
                and row[name].undefined
                and name not in ("accuracy", "exact")
            ):
                of.setdefault(row[name].undefined, []).append(words)
        for reason, measures in of.items():
            why.setdefault((", ".join(measures), reason), []).append(row["judge"])
    return [f"{', '.join(judges)}: {words}: {reason}" for (words, reason), judges in why.items()]


def _between(found: dict[str, Any]) -> None:
    rows = [
        (
            " · ".join(pair["judges"]),
            pair["percent"].n_items,
            pair["percent"],
            pair["cohen_kappa"],
            pair["error_correlation"],
        )
        for pair in found["pairs"]
    ]
    told = (
        ""
        if found["effective"].value is None
        else f"errors correlate by {cell(found['mean_error_correlation'], True)} on the mean: "
        f"these judges are worth {cell(found['effective'], True)} independent ones"
    )
    table(
        "Between judges",
        ("", "both scored", "agree", "Cohen's kappa", "errors correlate"),
        rows,
        note=told,
    )


def _coefficients(found: dict[str, Estimate]) -> None:
    rows = [
        (
            _named(name),
            e,
            over_prompts(e),
            e.n_items,
        )
        for name, e in found.items()
        if e.value is not None
    ]
    undefined: dict[str, list[str]] = {}
    for name, e in found.items():
        if e.undefined:
            undefined.setdefault(e.undefined, []).append(_named(name))
    table(
        "The panel's agreement on a, b or tie",
        ("", "value, 95%", "value, 95% by bootstrap", "comparisons"),
        rows,
        note="\n".join(
            [
                "1: they always agree; 0 (but of the share): as often as by chance, of which each has its own idea.",
                "comparisons: with two readings or more. Both intervals, of a jackknife and of a bootstrap, are over "
                "whole groups of prompts, whose comparisons are not independent.",
                *(
                    f"undefined: {', '.join(names)}: {reason}"
                    for reason, names in undefined.items()
                ),
            ]
        ),
    )


def _named(name: str) -> str:
    """A coefficient as people call it: its name and its weights or metric."""
    plain, _, more = name.partition(" ")
    return f"{NAMES.get(plain, plain)} {more}".rstrip()


def _accuracy(found: dict[str, Any]) -> None:
    rows = [
        (
            row["what"],
            row["kind"],
            row["accuracy"],
            row["accuracy"].n_items,
            _gain(found["over_best"].get(row["what"])) if row["kind"] == "panel" else None,
            better(found["over_best"][row["what"]]) if row["what"] in found["over_best"] else "",
        )
        for row in found["rows"]
    ]
    of = found["rows"][0]["of"]
    table(
        "Right, where gold decides",
        ("", "", "right", "decided", f"more than {found['best']}", ""),
        rows,
        note=f"right: of the comparisons that both decide; gold decides {of:,}. The best judge was "
        "chosen on these same comparisons, which flatters it a little",
    )


def _gain(e: Estimate | None) -> Estimate | None:
    return e if e is not None and e.value is not None else None


def _calibration(rows: Sequence[dict[str, Any]]) -> None:
    lines = [
        (
            row["what"],
            row["n"],
            row["ece"],
            row["brier"],
            row["log_loss"],
            row["temperature"],
            row["before"]["ece"] if "before" in row else None,
            row["after"]["ece"] if "after" in row else None,
        )
        for row in rows
    ]
    why = sorted({f"{row['what']}: no temperature: {row['why']}" for row in rows if "why" in row})
    stuck = [
        f"{row['what']}: a temperature of {row['temperature']:g} is the end of the range: no temperature mends it"
        for row in rows
        if row["temperature"] in (0.01, 100.0)
    ]
    table(
        "Does p_chosen come true?",
        (
            "",
            "n",
            "ECE",
            "Brier",
            "log loss",
            "temperature",
            "ECE, other half",
            "ECE there, mended",
        ),
        lines,
        note="\n".join(
            [
                "of comparisons that each decides; a gold tie is half true. The temperature is fitted on one half "
                "of the prompts' groups and measured on the other",
                *why,
                *stuck,
            ]
        ),
    )
    last = next((row for row in rows if row["what"] == "mean probability"), rows[0])
    table(
        f"Reliability of {last['what']}",
        ("p_chosen, mean", "came true", "n"),
        [(b["mean_p"], b["mean_y"], b["n"]) for b in last["reliability"]],
    )


def _error_of(fit: dict[str, Any]) -> Measured:
    return Measured(fit["ece"], fit.get("ece_low"), fit.get("ece_high"))


def _learned(found: dict[str, Any]) -> None:
    """The run's own calibration: its quality before and after, and its reliability diagram."""
    c = found["calibration"]
    if c["method"] == "none":
        warn(f"p_chosen is a share of the vote, not a probability: {c['reason']}")
        return
    told = "not checked against the truth: " if found["kind"] == "retest" else ""
    table(
        f"p_chosen was calibrated ({c['method']}) on {c['n_outcomes']:,} comparisons: {told}"
        f"{found['source']}",
        ("", "ECE", "log loss"),
        [
            (name, _error_of(c[key]), c[key]["log_loss"])
            for name, key in (("share of the vote", "before"), ("p_chosen", "after"))
        ],
        note="p_chosen: of prompts that it was not fitted on. It is the readings' log-odds, added up "
        f"with a discount for their correlation of {c['correlation']:.2f}, then calibrated",
    )
    for name, key in (("the share of the vote", "before"), ("p_chosen", "after")):
        rows = c[key]["reliability"]
        table(f"Reliability of {name}", ("mean", "came true", "n"), rows)


def _groups(title: str, rows: Sequence[dict[str, Any]]) -> None:
    lines = [
        (
            row["name"] or "(none)",
            row["items"],
            row["percent"],
            row["gwet_ac1"],
            row["position_consistency"],
            row["ties"],
            row["unscored"],
            row["accuracy"],
        )
        for row in rows[:SHOWN]
    ]
    columns = [
        "",
        "comparisons",
        "judges agree",
        "Gwet's AC1",
        "both orders agree",
        "ties",
        "unscored",
        "right",
    ]
    kept = [i for i in range(len(columns)) if any(cell(line[i]) not in ("", "-") for line in lines)]
    note = f"the first {SHOWN} of {len(rows)}; --json has all" if len(rows) > SHOWN else ""
    table(title, [columns[i] for i in kept], [[line[i] for i in kept] for line in lines], note=note)


def _critiques(rows: Sequence[dict[str, Any]]) -> None:
    """What the critic said under each principle, and how sure it was."""
    names = ("critiques", "faults", "p_fault", "unsure", "hard", "unscored")
    columns = {
        "critiques": "critiques",
        "faults": "faults",
        "p_fault": "mean P(fault)",
        "unsure": "unsure",
        "hard": "hard labels",
        "unscored": "unscored",
    }
    kept = [name for name in names if any(row[name] for row in rows)]
    lines = [[row["principle"] or "(none)", *(row[name] for name in kept)] for row in rows[:SHOWN]]
    note = "P(fault) is read at a critique's first word; unsure: between 0.2 and 0.8"
    shown = note if "p_fault" in kept else "no probability of a fault was read"
    table("Critiques", ["", *(columns[name] for name in kept)], lines, note=shown)


def _divided(rows: Sequence[dict[str, Any]], principles: Sequence[str]) -> None:
    """The comparisons themselves, so that whoever wrote the principle sees what is ambiguous in
    it.
    """
    shown = [row for row in rows if row["principle"] in principles]
    if shown:
        say("What divides them:")
    for row in shown:
        who = (
            f"preference {row['preference'][:12]}"
            if row["preference"]
            else f"prompt {row['prompt'][:12]}"
        )
        gold = f" · gold: {row['gold']}" if row["gold"] else ""
        say(
            f"\n  {row['principle'] or '(no principle)'} · {who} · answers {row['a']} and {row['b']}{gold}"
        )
        for name, text in row["text"].items():
            say(f"    {name:6} {text}")
        for judge, said in row["judges"].items():
            p = "unscored" if said["p_a"] is None else f"{said['p_a']:.3f}"
            orders = (
                ""
                if said["ab"] is None and said["ba"] is None
                else (
                    f" (a first: {said['ab'] or 'unscored'}; b first: {said['ba'] or 'unscored'})"
                )
            )
            say(f"    {judge}: P(a) {p}{orders}")
