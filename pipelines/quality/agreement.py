"""How far a run's labels can be trusted: judges one by one, between themselves, together, and what
divides them.

Everything is plain data, so that the tables and `--json` say the same. Shares have Wilson's
interval at the effective number of readings, coefficients that of a jackknife and of a bootstrap.
All are over whole groups of prompts (a prompt without a group is its own), since the answers to one
prompt, and the prompts of one group, are not independent. What cannot be said is undefined, with
its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefab.factory.errors import PrefabError
from prefab.factory.stats import Estimate, bootstrap, bounded, paired_difference, undefined
from prefab.factory.store.store import one_connection
from prefab.judges.stats import agreement, calibration, judge_metrics
from prefab.judges.stats.aggregate import dawid_skene, majority, mean_probability
from prefab.judges.stats.rating_table import group
from prefab.pipelines.quality.rating_matrix import (
    RATINGS,
    RatingMatrix,
    load_matrix,
)
from prefab.pipelines.store.calibrations import NOT_LEARNED, calibration_of
from prefab.pipelines.store.run_page import judges_of_own_answers
from prefab.pipelines.store.selection import Selection, select

if TYPE_CHECKING:
    import polars

FEWEST = 50  # decided comparisons in each half, below which a temperature is noise
BINS = 10
SHORT = 240  # characters of a text in a table
TWO_JUDGES = {name: agreement.PANEL[name] for name in ("percent", "cohen_kappa")}
ONE_PRINCIPLE = {
    name: agreement.PANEL[name] for name in ("percent", "gwet_ac1", "krippendorff_alpha nominal")
}
METHODS = ("mean probability", "majority", "Dawid-Skene")


class UnscoredError(PrefabError):
    """There are verdicts, and not one of them could be read."""


@one_connection()
def measure(
    folder: str | Path,
    run: str = "",
    principles: Sequence[str] = (),
    judges: Sequence[str] = (),
    tags: Sequence[str] = (),
    gold: str = "auto",
    examples: int = 3,
    resamples: int = 2000,
    seed: int = 0,
    sample: int = 0,
) -> dict[str, Any]:
    """Measure how reliable a run's labels are: agreement, bias and accuracy of the judges.

    Args:
        folder: The store.
        run: NAME or NAME@VERSION; default: the latest run.
        principles: Only these; empty: all.
        judges: Only these; empty: all.
        tags: Only principles or prompts with these tags; empty: all.
        gold: Gold labels to compare with: `human`, `oracle` (embedded world only), `none`, or
            `auto` for the first of these that exists.
        examples: Examples of disagreement for each principle.
        resamples: Bootstrap resamples for intervals; 0 for none.
        seed: Seed of the bootstrap.
        sample: Read about this many prompts, chosen at random in whole groups, when the run has
            more; 0: all. What is compared with people's labels stands on all of these.

    Returns:
        Plain data, as `prefab agreement --json` prints it. `sampled` is None, or one of how many
        groups of prompts is taken.

    Raises:
        ConfigError: The run, or a principle, judge or tag does not exist.
        UnscoredError: No verdict of the selection is scored.
    """
    selection = select(Path(folder), run, principles, judges, tags)
    if sample:
        selection = selection.sampled(sample)
    data, source = load_matrix(selection, gold)
    if np.isnan(data.p).all():
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in _totals(data.reasons).items())
        raise UnscoredError(
            f"{selection.name}: none of {data.reasons['n'].sum():,} verdicts could be read ({reasons}); there "
            "is nothing to agree on"
        )
    several = len(data.judges) > 1
    learned = calibration_of(selection.folder, selection.run["run"])
    found = {
        "run": selection.name,
        "gold": source,
        "orders": (selection.config.get("panel") or {}).get("orders", "both"),
        "comparisons": data.comparisons(),
        "items": data.items.height,
        "prompts": int(data.prompts.max()) + 1,
        "groups": len(np.unique(data.groups)),
        "resamples": resamples,
        "seed": seed,
        "sampled": None,
        "judges": judge_rows(selection, data),
        "between": between(data) if several else None,
        "coefficients": coefficients(data, resamples, seed) if several else None,
        "accuracy": accuracies(data, resamples, seed) if source else None,
        "calibration": calibrations(data) if source else None,
        "learned": asdict(learned) if learned else None,
        "p_chosen": learned.sentence() if learned else NOT_LEARNED,
        "principles": group_rows(data, "principle"),
        "constitution": _constitution(selection),
        "tags": group_rows(data, "tag"),
        "critiques": selection.critiques().to_dicts(),
    }
    found["divided"] = divided(
        selection, data, [row["name"] for row in found["principles"]], examples
    )
    found["limitations"] = [
        *limitations(data, source, found["orders"]),
        *judges_of_own_answers(selection.config),
    ]
    if selection.of_groups > 1:
        found["sampled"] = selection.of_groups
        _add_labelled(found, selection, gold, resamples, seed)
    return found


def _add_labelled(
    found: dict[str, Any], selection: Selection, gold: str, resamples: int, seed: int
) -> None:
    """Replace what a sample says of people's labels by what all of them do."""
    selection = replace(selection, of_groups=1, labelled=True)
    if gold not in ("auto", "human") or selection.unscored().is_empty():
        return
    data, source = load_matrix(selection, "human")
    if np.isnan(data.gold).all():
        return
    found |= {
        "gold": source,
        "accuracy": accuracies(data, resamples, seed),
        "calibration": calibrations(data),
    }
    for rows, of, name in (
        (found["judges"], judge_rows(selection, data), "judge"),
        (found["principles"], group_rows(data, "principle"), "name"),
        (found["tags"], group_rows(data, "tag"), "name"),
    ):
        known = {row[name]: row for row in of}
        for row in rows:
            row |= {
                k: known.get(row[name], {}).get(k) or undefined("no label of people")
                for k in ("accuracy", "exact")
                if k in row
            }


def _constitution(selection: Selection) -> dict[str, Any]:
    """The version of the constitution that the run was made under: its id and digest, and the
    digests of its principles.
    """
    rows = selection.query(
        "SELECT c.id, p.principle, p.digest FROM principles p JOIN constitutions c "
        "USING (constitution) WHERE constitution = $constitution ORDER BY p.position"
    ).rows()
    return {
        "id": rows[0][0] if rows else "",
        "digest": selection.run["constitution"] or "",
        "principles": {principle: digest for _, principle, digest in rows},
    }


def judge_rows(selection: Selection, data: RatingMatrix) -> list[dict[str, Any]]:
    """One row a judge: what it read, its accuracy, its pull to a slot, its stability, and its label
    mass.
    """
    masses = {row["judge"]: row for row in selection.masses().iter_rows(named=True)}
    repeated = any(mass["repeats"] > 1 for mass in masses.values())
    again, ratings = selection.again() if repeated else None, data.ratings()
    return [
        _judge_row(data, j, ratings[:, j], masses[name], again)
        for j, name in enumerate(data.judges)
    ]


def _judge_row(
    data: RatingMatrix,
    j: int,
    ratings: np.ndarray,
    mass: dict[str, Any],
    again: polars.DataFrame | None,
) -> dict[str, Any]:
    import polars as pl

    name, p = data.judges[j], data.p[:, j]
    reasons = _totals(data.reasons.filter(pl.col("judge") == name))
    scored = ~np.isnan(ratings)
    return {
        "judge": name,
        "readings": int(data.asked[:, j].sum()),
        "scored": int(scored.sum()),
        "verdicts": mass["verdicts"],
        "unscored": sum(reasons.values()) / mass["verdicts"],
        "unscored_reasons": reasons,
        "ties": float((ratings[scored] == 0.5).mean()) if scored.any() else None,
        "label_mass": mass["mean"],
        "label_mass_low": mass["low"],
        "inexact": mass["inexact"],
        "hard": mass["hard"],
        "accuracy": judge_metrics.accuracy(p, data.gold, data.groups),
        "exact": judge_metrics.exact(ratings, data.gold, data.groups),
        **_position(data, j, mass["unordered"]),
        "stability": _stability(again.filter(pl.col("judge") == name))
        if again is not None and mass["repeats"] > 1
        else undefined("asked once (panel.repeats asks again)"),
    }


def _totals(unscored: polars.DataFrame) -> dict[str, int]:
    """By reason, the most frequent first."""
    import polars as pl

    rows = unscored.filter(pl.col("reason").is_not_null()).group_by("reason").agg(pl.col("n").sum())
    return dict(rows.sort("n", "reason", descending=[True, False]).iter_rows())


def _position(data: RatingMatrix, j: int, unordered: bool) -> dict[str, Estimate]:
    """Consistency, first-slot share and lean, where both orders were asked."""
    ab, ba = data.won_ab[:, j], data.won_ba[:, j]
    measures = {
        "position_consistency": judge_metrics.position_consistency,
        "first_slot_share": judge_metrics.first_slot_share,
        "slot_lean": judge_metrics.slot_lean,
    }
    if not (~np.isnan(ab) & ~np.isnan(ba)).any():
        reason = (
            "asked without an order" if unordered else "no comparison was scored in both orders"
        )
        return dict.fromkeys(measures, undefined(reason))
    return {name: of(ab, ba, data.groups) for name, of in measures.items()}


def _stability(again: polars.DataFrame) -> Estimate:
    side = {"a": 1.0, "tie": 0.5, "b": 0.0}
    first, second = (
        again[name].replace_strict(side).to_numpy() if again.height else np.empty(0)
        for name in ("first", "again")
    )
    return judge_metrics.stability(first, second, again["group"].to_numpy())


def between(data: RatingMatrix) -> dict[str, Any]:
    """Every two judges: agreement, kappa and how their errors go together; and how many judges they
    are worth.
    """
    ratings = data.ratings()
    together = judge_metrics.errors_together(data.p, data.gold, data.groups)
    pairs = []
    for j in range(len(data.judges)):
        for k in range(j + 1, len(data.judges)):
            two = agreement.panel_coefficients(
                ratings[:, [j, k]],
                categories=RATINGS,
                resamples=0,
                clusters=data.groups,
                kinds=TWO_JUDGES,
            )
            pairs.append(
                {
                    "judges": [data.judges[j], data.judges[k]],
                    **two,
                    "error_correlation": _number(together.correlation[j, k]),
                    "n_errors": int(together.n_shared[j, k]),
                }
            )
    return {
        "pairs": pairs,
        "mean_error_correlation": together.mean,
        "effective": together.effective,
    }


def coefficients(data: RatingMatrix, resamples: int, seed: int) -> dict[str, Estimate]:
    """Every coefficient over the labels b, tie, a, and alpha over the probabilities themselves (in
    hundredths).
    """
    found = agreement.panel_coefficients(
        data.ratings(), categories=RATINGS, resamples=resamples, seed=seed, clusters=data.groups
    )
    soft = agreement.panel_coefficients(
        np.round(data.p, 2),
        resamples=resamples,
        seed=seed,
        clusters=data.groups,
        kinds={"krippendorff_alpha of probabilities": ("alpha", "interval")},
    )
    return {**found, **soft}


def aggregates(data: RatingMatrix) -> dict[str, np.ndarray]:
    """The panel's probability that a is better by each method: NaN where it has none. Shapes: N
    each.

    A majority is 1, 0 or 0.5 (for a tie that most saw); a split vote has none.
    """
    table = group(data.ratings())
    fit = dawid_skene(table)
    posterior = np.full(len(data.p), np.nan)
    if fit.undefined is None:
        assert table.pattern_of is not None  # the table is made of ratings
        rated = table.pattern_of >= 0
        posterior[rated] = (fit.posterior @ table.values)[table.pattern_of[rated]]
    return {
        "mean probability": mean_probability(
            data.p, data.weights, 0.5 if len(data.judges) > 1 else 0.0
        ).p,
        "majority": majority(data.ratings())[0],
        "Dawid-Skene": posterior,
    }


def accuracies(data: RatingMatrix, resamples: int, seed: int) -> dict[str, Any]:
    """Each judge's own accuracy beside the panel's by each method, and the difference to the best
    judge, over the comparisons that both decided.
    """
    judged = {name: data.p[:, j] for j, name in enumerate(data.judges)}
    panel = aggregates(data) if len(data.judges) > 1 else {}
    rows: list[dict[str, Any]] = [
        {
            "what": name,
            "kind": "judge" if name in judged else "panel",
            "accuracy": judge_metrics.accuracy(p, data.gold, data.groups),
            "of": int(np.isin(data.gold, (0, 1)).sum()),
        }
        for name, p in {**judged, **panel}.items()
    ]
    best = max(
        (row for row in rows if row["kind"] == "judge" and row["accuracy"].value is not None),
        key=lambda row: row["accuracy"].value,
        default=None,
    )
    gains = (
        {name: gain(p, judged[best["what"]], data, resamples, seed) for name, p in panel.items()}
        if best
        else {}
    )
    return {"rows": rows, "best": best["what"] if best else None, "over_best": gains}


def gain(
    p: np.ndarray, other: np.ndarray, data: RatingMatrix, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """How much more often `p` is right than `other`, where both decide and gold does; bootstrap
    over groups of prompts.
    """
    truth, sides = np.sign(data.gold - 0.5), [np.sign(x - 0.5) for x in (p, other)]
    both = np.abs(truth * sides[0] * sides[1]) == 1
    if not both.any():
        return undefined("no comparison that both decided has gold")
    mine, others = ((side[both] == truth[both]).astype(float) for side in sides)
    if not resamples:
        return Estimate(float((mine - others).mean()), n_items=int(both.sum()))
    return paired_difference(mine, others, data.groups[both], resamples, seed)


def calibrations(data: RatingMatrix) -> list[dict[str, Any]]:
    """For each judge and the panel: does `p_chosen` come true? Temperature from one half of the
    groups of prompts, measured on the other.
    """
    sources = {name: data.p[:, j] for j, name in enumerate(data.judges)}
    if len(data.judges) > 1:
        sources |= {name: p for name, p in aggregates(data).items() if name != "majority"}
    return [
        {"what": name, **calibrate(p, data.gold, data.groups, data.tie_margin)}
        for name, p in sources.items()
    ]


def calibrate(
    p: np.ndarray, gold: np.ndarray, groups: np.ndarray, tie_margin: float = 0.02
) -> dict[str, Any]:
    """Errors of calibration of the chosen side's probability, over comparisons that it decides:
    those that would be trained on. A gold tie is half true. (To take only those that gold decides
    would be to choose by the outcome.)
    """
    known = (np.abs(p - 0.5) > tie_margin + 1e-12) & ~np.isnan(gold)
    p, y, groups = p[known], gold[known], groups[known]
    p, y = np.where(p >= 0.5, p, 1 - p), np.where(p >= 0.5, y, 1 - y)
    found = {
        "n": len(p),
        **_errors(p, y, groups),
        "reliability": _reliability(p, y, groups),
    }
    fit, test = groups % 2 == 0, groups % 2 == 1
    if min(fit.sum(), test.sum()) < FEWEST:
        return {
            **found,
            "temperature": None,
            "why": f"fewer than {FEWEST} decided comparisons in a half",
        }
    temperature = calibration.fit_temperature(p[fit], y[fit])
    if temperature is None:
        return {**found, "temperature": None, "why": "every probability is a half"}
    held_out = {
        "before": _errors(p[test], y[test], groups[test]),
        "after": _errors(
            calibration.apply_temperature(p[test], temperature), y[test], groups[test]
        ),
    }
    return {
        **found,
        "temperature": temperature,
        "n_fitted": int(fit.sum()),
        "n_held_out": int(test.sum()),
        **held_out,
    }


def _reliability(p: np.ndarray, y: np.ndarray, groups: np.ndarray) -> list[dict[str, Any]]:
    """The bins of the reliability table, each share with its interval over groups of prompts."""
    rows = [asdict(row) for row in calibration.reliability(p, y, BINS)]
    bin_of = calibration.bins_of(p, BINS) if rows else np.empty(0)
    for k, row in enumerate(rows):
        share = bounded(bootstrap(y[bin_of == k], groups[bin_of == k], resamples=200))
        row |= {"low": share.low, "high": share.high, "groups": share.n_groups}
    return rows


def _errors(p: np.ndarray, y: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    return {
        "ece": calibration.calibration_error(p, y, BINS, groups),
        "brier": calibration.brier(p, y),
        "log_loss": calibration.log_loss(p, y),
    }


def group_rows(data: RatingMatrix, by: str) -> list[dict[str, Any]]:
    """One row a principle or tag, what is least agreed on and least consistent first."""
    import polars as pl

    column = data.items["principle"] if by == "principle" else data.items["tags"]
    names = sorted((column if by == "principle" else column.explode()).unique().drop_nulls())
    rows = []
    for name in names:
        mask = (column == name if by == "principle" else column.list.contains(name)).to_numpy()
        counts = data.reasons.filter(pl.col("principle") == name) if by == "principle" else None
        rows.append({"name": name, **_group_row(data.take(mask), counts)})
    return sorted(rows, key=lambda row: (row["worst"] is None, row["worst"], row["name"]))


def _group_row(data: RatingMatrix, counts: polars.DataFrame | None) -> dict[str, Any]:
    """`worst` is the lower of agreement and position consistency: what the rows are sorted by."""
    import polars as pl

    ratings, j = data.ratings(), len(data.judges)
    coefficients = agreement.panel_coefficients(
        ratings, categories=RATINGS, resamples=0, clusters=data.groups, kinds=ONE_PRINCIPLE
    )
    consistency = judge_metrics.position_consistency(
        data.won_ab.ravel(), data.won_ba.ravel(), np.repeat(data.groups, j)
    )
    percent = coefficients["percent"]
    scored = ~np.isnan(ratings)
    panel = mean_probability(data.p, data.weights, 0.5 if j > 1 else 0.0).p
    values = [e.value for e in (percent, consistency) if e.value is not None]
    unread = None
    if counts is not None:
        lost = counts.filter(pl.col("reason").is_not_null())
        unread = int(lost["n"].sum()) / max(1, int(counts["n"].sum()))
    return {
        "items": data.items.height,
        "worst": min(values, default=None),
        "percent": percent,
        "gwet_ac1": coefficients["gwet_ac1"],
        "krippendorff_alpha": coefficients["krippendorff_alpha nominal"],
        "position_consistency": consistency,
        "ties": float((ratings[scored] == 0.5).mean()) if scored.any() else None,
        "unscored": unread,
        "accuracy": judge_metrics.accuracy(panel, data.gold, data.groups),
    }


def divided(
    selection: Selection, data: RatingMatrix, principles: list[str], n: int
) -> list[dict[str, Any]]:
    """Of each principle, in their order, the `n` comparisons that divide the judges most; with one
    judge, or where they all say the same, those whose two orders differ most.
    """
    spread = _distance(data)
    names, found = data.items["principle"], []
    for principle in principles:
        rows = np.flatnonzero((names == principle).to_numpy() & (spread > 0))
        rows = rows[np.argsort(-spread[rows], kind="stable")][:n]
        found += [
            {"principle": principle, "spread": float(spread[row]), **_said(data, int(row))}
            for row in rows
        ]
    _add_texts(selection, found)
    return found


def _distance(data: RatingMatrix) -> np.ndarray:
    """How far apart the judges' probabilities are (greatest less smallest); with one judge, its
    winners by order.
    """
    if len(data.judges) == 1:
        result: np.ndarray = np.nan_to_num(np.abs(data.won_ab[:, 0] - data.won_ba[:, 0]))
        return result
    several = (~np.isnan(data.p)).sum(axis=1) > 1
    high, low = (of(data.p, axis=1, initial=np.nan) for of in (np.fmax.reduce, np.fmin.reduce))
    return np.where(several, high - low, 0.0)


def _said(data: RatingMatrix, row: int) -> dict[str, Any]:
    prompt, a, b = data.items.select("prompt", "a", "b").row(row)
    word = {1.0: "a", 0.5: "tie", 0.0: "b"}
    judges = {
        name: {
            "p_a": _number(data.p[row, j]),
            "ab": word.get(data.won_ab[row, j]),
            "ba": word.get(data.won_ba[row, j]),
        }
        for j, name in enumerate(data.judges)
        if data.asked[row, j]
    }
    return {"prompt": prompt, "a": a, "b": b, "gold": word.get(data.gold[row]), "judges": judges}


def _add_texts(selection: Selection, rows: list[dict[str, Any]]) -> None:
    """The prompt, both answers, and the preference's id, of these few comparisons."""
    if not rows:
        return
    of = {"prompts": sorted({row["prompt"] for row in rows})}
    these = "prompt IN (SELECT unnest($prompts))"
    prompts = dict(
        selection.query(f"SELECT prompt, text FROM prompts WHERE {these}", of).iter_rows()
    )
    texts = {
        (prompt, index): text
        for prompt, index, text in selection.query(
            f'SELECT prompt, "index", text FROM samples WHERE run = $run AND {these}', of
        ).iter_rows()
    }
    ids = {
        (prompt, a, b): name
        for prompt, a, b, name in selection.query(
            f"SELECT prompt, a, b, preference FROM preferences WHERE run = $run AND {these}", of
        ).iter_rows()
    }
    for row in rows:
        row["preference"] = ids.get((row["prompt"], row["a"], row["b"]))
        row["text"] = {
            "prompt": short(prompts.get(row["prompt"])),
            "a": short(texts.get((row["prompt"], row["a"]))),
            "b": short(texts.get((row["prompt"], row["b"]))),
        }


def short(text: str | None) -> str | None:
    """One line of at most `SHORT` characters."""
    line = None if text is None else " ".join(text.split())
    return line if line is None or len(line) <= SHORT else line[: SHORT - 1] + "…"


def limitations(data: RatingMatrix, source: str, orders: str) -> list[str]:
    """Limitations of this run's data, and how to lift each."""
    words = []
    if len(data.judges) == 1:
        words.append(
            f"one judge ({data.judges[0]}): nothing can be said of agreement between judges, of errors that they "
            "share, or of a panel; another judge in panel.judges would tell"
        )
    if not source:
        words.append(
            "no gold: nothing can be said of accuracy or calibration, nor how many independent judges these are "
            "worth; judges that agree may err together"
        )
    if orders != "both":
        words.append(
            f"orders: {orders}: each comparison was asked in one order, so a pull to a slot is not seen and not "
            "evened out"
        )
    if len(data.judges) == 2:
        words.append(
            "two judges: a majority is where both say the same, and Dawid-Skene cannot tell who of the two errs"
        )
    return words


def _number(x: float) -> float | None:
    return None if np.isnan(x) else float(x)
