"""What averaging both orders, probabilities, panels, Dawid-Skene and escalation are worth, against
the oracle.

    prefab run benchmarks/label_quality.yaml        (two servers; about 66,000 verdicts)
    python -m benchmarks.label_quality

Everybody was asked everything, so every method is counted on the same verdicts: one that asks fewer
is given fewer of them. Score of a label: 1 where it picks the side that gold picks, 0 on the other
side, a half where it picks none (a coin would be right on half); over readings (a comparison under
a principle) that gold decides and every method of a row has scored. Differences are paired, their
intervals over groups of prompts, 10,000 resamples. A method `helps` or `hurts` where its interval
leaves out 0; else no difference was seen, which is not to say that there is none."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from prefab.factory.stats import Estimate, bootstrap, clustered_mean, undefined
from prefab.judges import escalation as escalate
from prefab.judges.stats.aggregate import dawid_skene, majority, mean_probability
from prefab.judges.stats.rating_table import group
from prefab.pipelines.quality.rating_matrix import RATINGS, RatingMatrix, load_matrix
from prefab.pipelines.store.selection import select

RESAMPLES = 10_000
THIRD = 1 / 3
EDGE = 0.01  # a hard label as a probability: 0 or 1 would make one mistake infinitely bad


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison of two methods: their scores, the difference, and whether the first helps."""

    question: str
    method: str
    against: str
    measure: str
    value: Estimate
    other: Estimate
    difference: Estimate

    @property
    def verdict(self) -> str:
        """In a word."""
        low, high = self.difference.low, self.difference.high
        if low is None or high is None:
            return self.difference.undefined or "too few prompts"
        return "helps" if low > 0 else "hurts" if high < 0 else "no difference seen"


def right(p: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """The score of each label, NaN where unscored or gold decides nothing. Shapes: N."""
    decided = (gold == 0.0) | (gold == 1.0)
    return np.where(
        np.isnan(p) | ~decided, np.nan, 0.5 + 0.5 * np.sign(p - 0.5) * np.sign(gold - 0.5)
    )


def three_way(rating: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Whether a label a, b or tie is gold's, ties included."""
    return np.where(np.isnan(rating) | np.isnan(gold), np.nan, (rating == gold).astype(float))


def closeness(p: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Minus the squared error of a probability (Brier), so that more is better."""
    return np.where((gold == 0.0) | (gold == 1.0), -((p - gold) ** 2), np.nan)


def surprise(p: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Minus the log loss in nats, probabilities held 0.01 off 0 and 1."""
    p = np.clip(p, EDGE, 1 - EDGE)
    return np.where((gold == 0.0) | (gold == 1.0), np.log(np.where(gold == 1.0, p, 1 - p)), np.nan)


def compare(
    question: str,
    method: str,
    mine: np.ndarray,
    against: str,
    other: np.ndarray,
    groups: np.ndarray,
    measure: str = "right",
) -> Row:
    """A row from two scores of the same readings."""
    both = ~np.isnan(mine) & ~np.isnan(other)
    if not both.any():
        nothing = undefined("no reading that gold decides was scored by both")
        return Row(question, method, against, measure, nothing, nothing, nothing)
    value, of_other, difference = (
        of(x[both], groups[both], resamples=RESAMPLES)
        for of, x in ((bootstrap, mine), (bootstrap, other), (clustered_mean, mine - other))
    )
    return Row(question, method, against, measure, value, of_other, difference)


def both_orders(data: RatingMatrix) -> Iterator[Row]:
    """For each judge, the mean of both orders against one order, which is drawn for each
    reading."""
    drawn = np.random.default_rng(0).random(len(data.p)) < 0.5
    for j, name in enumerate(data.judges):
        one = np.where(drawn, data.p_ab[:, j], data.p_ba[:, j])
        yield compare(
            "both orders or one",
            f"{name}: mean of both",
            right(data.p[:, j], data.gold),
            f"{name}: one order",
            right(one, data.gold),
            data.groups,
        )


def soft_or_hard(data: RatingMatrix) -> Iterator[Row]:
    """Probabilities against votes: of one judge's two orders, and of a panel; as labels and as
    training targets."""
    for j, name in enumerate(data.judges):
        votes = (data.won_ab[:, j] + data.won_ba[:, j]) / 2
        yield from _soft_or_hard(name, data.p[:, j], votes, data)
    members = honest(data)
    panel, winner = mean_probability(members.p).p, majority(members.ratings())[0]
    split = np.where(np.isnan(winner) & ~np.isnan(panel), 0.5, winner)
    yield from _soft_or_hard("panel", panel, split, members)


def _soft_or_hard(
    name: str, soft: np.ndarray, hard: np.ndarray, data: RatingMatrix
) -> Iterator[Row]:
    label = np.where(np.isnan(hard), np.nan, 0.5 + 0.5 * np.sign(hard - 0.5))
    for measure, of in (("right", right), ("-Brier", closeness), ("-log loss", surprise)):
        yield compare(
            "soft or hard",
            f"{name}: probabilities",
            of(soft, data.gold),
            f"{name}: votes",
            of(label, data.gold),
            data.groups,
            measure,
        )


BAD = "contrary"


def honest(data: RatingMatrix) -> RatingMatrix:
    """Without the judge that is bad on purpose."""
    return without(data, [j for j, name in enumerate(data.judges) if name == BAD])


def without(data: RatingMatrix, left_out: list[int]) -> RatingMatrix:
    """Without these judges."""
    kept = [j for j in range(len(data.judges)) if j not in left_out]
    arrays = {
        name: getattr(data, name)[:, kept]
        for name in ("p", "tie", "asked", "won_ab", "won_ba", "p_ab", "p_ba")
    }
    return replace(
        data, judges=tuple(data.judges[j] for j in kept), weights=data.weights[kept], **arrays
    )


def panel_or_member(data: RatingMatrix) -> Iterator[Row]:
    """The mean of the honest judges, and of the two models each under its own template, against the
    best one."""
    members = honest(data)
    few = without(members, [j for j, name in enumerate(members.judges) if "-" in name])
    for what, panel in (
        (f"panel of {len(members.judges)}", members),
        (f"panel of {len(few.judges)}", few),
    ):
        best, names = best_member(panel)
        yield compare(
            "panel or its best member",
            what,
            right(mean_probability(panel.p).p, data.gold),
            f"best member ({names})",
            best,
            data.groups,
        )


def best_member(data: RatingMatrix) -> tuple[np.ndarray, str]:
    """The scores of the member that is best on the other half of the prompts, so that none is
    chosen by its luck."""
    scores = np.column_stack([right(data.p[:, j], data.gold) for j in range(len(data.judges))])
    half, found, names = data.prompts % 2, np.full(len(data.p), np.nan), []
    for mine in (0, 1):
        best = int(np.nanmean(scores[half != mine], axis=0).argmax())
        found[half == mine] = scores[half == mine, best]
        names.append(data.judges[best])
    return found, " and ".join(sorted(set(names)))


def dawid_skene_or_majority(data: RatingMatrix) -> Iterator[Row]:
    """With the bad judge in the panel, and without. Ties are a class; a split vote picks nobody."""
    for what, panel in (("one judge bad", data), ("none bad", honest(data))):
        methods = fits(panel)
        score = {name: right(p, data.gold) for name, p in methods.items()}
        for other in ("majority", "mean probability"):
            yield compare(
                "Dawid-Skene",
                f"Dawid-Skene, {what}",
                score["Dawid-Skene"],
                other,
                score[other],
                data.groups,
            )
        best, names = best_member(panel)
        yield compare(
            "Dawid-Skene",
            f"Dawid-Skene, {what}",
            score["Dawid-Skene"],
            f"best member ({names})",
            best,
            data.groups,
        )


def fits(data: RatingMatrix) -> dict[str, np.ndarray]:
    """The panel's probability by each method; a half where votes are split."""
    ratings = data.ratings()
    mean, (winner, _) = mean_probability(data.p).p, majority(ratings)
    posterior = dawid_skene(ratings, tolerance=1e-10).posterior @ group(ratings).values
    return {
        "mean probability": mean,
        "majority": np.where(np.isnan(winner) & ~np.isnan(mean), 0.5, winner),
        "Dawid-Skene": posterior,
    }


def escalation(data: RatingMatrix, cheap: str, strong: str) -> tuple[list[Row], dict[str, float]]:
    """The cheap judge, with the strong one asked about a third of each prompt's readings: those
    nearest to a half, those whose likeliest label is least certain (as the panel's `escalate`
    does), or any."""
    few, many = data.judges.index(cheap), data.judges.index(strong)
    p, label = data.p.copy(), data.ratings()
    doubt = {
        "nearest to a half": np.abs(p[:, few] - 0.5),
        "least certain label": certainty(p[:, few], data.tie[:, few]),
        "drawn": np.random.default_rng(1).random(len(p)),
    }
    asked = {name: third(value, data) for name, value in doubt.items()}
    rows = []
    for measure, of, labels in (("right", right, p), ("right, ties included", three_way, label)):
        alone, always = of(labels[:, few], data.gold), of(labels[:, many], data.gold)
        score = {
            name: of(np.where(mask, labels[:, many], labels[:, few]), data.gold)
            for name, mask in asked.items()
        }
        for name in ("nearest to a half", "least certain label"):
            method = f"{strong} for a third, {name}"
            for other, scores in (
                (f"{cheap} alone", alone),
                (f"{strong} for a third, drawn", score["drawn"]),
                (f"{strong} always", always),
            ):
                rows.append(
                    compare("escalation", method, score[name], other, scores, data.groups, measure)
                )
    return rows, {name: float(mask.mean()) for name, mask in asked.items()}


def certainty(p: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """The likeliest of the labels a, b and tie has this much: a tie of which a judge is sure is no
    doubt."""
    return np.fmax(np.fmax(p - tie / 2, 1 - p - tie / 2), tie)


def third(value: np.ndarray, data: RatingMatrix) -> np.ndarray:
    """The third of each prompt's readings with the least value, by the panel's own quota; unscored
    ones first."""
    chosen = np.zeros(len(value), dtype=bool)
    order = np.lexsort((np.where(np.isnan(value), -1.0, value), data.prompts))
    names = data.items["prompt"].to_numpy()
    for rows in np.split(order, np.flatnonzero(np.diff(data.prompts[order])) + 1):
        chosen[rows[: escalate.quota(len(rows), THIRD, 0, names[rows[0]])]] = True
    return chosen


def measure(store: Path, run: str, cheap: str, strong: str) -> dict[str, Any]:
    """All rows, and what they stand on."""
    selection = select(store, run)
    data, source = load_matrix(selection)
    absent = [name for name in (cheap, strong) if name not in data.judges]
    if absent or not source:
        raise SystemExit(
            f"{selection.name} has no " + (f"judge {', '.join(absent)}" if absent else "gold")
        )
    data = replace(data, weights=np.ones(len(data.judges)))
    escalated, shares = escalation(data, cheap, strong)
    rows = [
        *both_orders(data),
        *soft_or_hard(data),
        *panel_or_member(data),
        *dawid_skene_or_majority(data),
        *escalated,
    ]
    decided = np.isin(data.gold, (0.0, 1.0))
    own = {
        name: asdict(
            bootstrap(score[~np.isnan(score)], data.groups[~np.isnan(score)], None, RESAMPLES)
        )
        for name, score in (
            (name, right(data.p[:, j], data.gold)) for j, name in enumerate(data.judges)
        )
    }
    return {
        "run": selection.name,
        "gold": source,
        "readings": len(data.p),
        "decided": int(decided.sum()),
        "prompts": int(data.prompts.max()) + 1,
        "groups": int(data.groups.max()) + 1,
        "judges": own,
        "escalated": shares,
        "unscored": {
            name: float(np.isnan(data.p[:, j]).mean()) for j, name in enumerate(data.judges)
        },
        "labels": {name: _shares(data.ratings()[:, j]) for j, name in enumerate(data.judges)},
        "rows": [asdict(row) | {"verdict": row.verdict} for row in rows],
    }


def _shares(ratings: np.ndarray) -> dict[str, float]:
    return {
        name: float((ratings == value).mean())
        for name, value in zip(("b", "tie", "a"), RATINGS, strict=True)
    }


def cell(e: dict[str, Any], sign: str = "") -> str:
    """`0.953 (0.941 to 0.964)`."""
    if e["value"] is None:
        return e["undefined"]
    spread = f" ({e['low']:{sign}.3f} to {e['high']:{sign}.3f})" if e["low"] is not None else ""
    return f"{e['value']:{sign}.3f}{spread}"


def main() -> None:
    """Measure, print a table, write label_quality.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, default=Path("label-quality-store"))
    parser.add_argument("--run", default="label-quality")
    parser.add_argument("--cheap", default="nano")
    parser.add_argument("--strong", default="tiny")
    parser.add_argument("--quick", action="store_true", help="write beside the committed results")
    options = parser.parse_args()
    started = time.monotonic()
    found = measure(options.store, options.run, options.cheap, options.strong)
    print(
        json.dumps(
            {name: found[name] for name in ("run", "prompts", "readings", "decided", "escalated")}
        )
    )
    common.table(
        ["judge", "right", "ties"],
        [[name, cell(e), found["labels"][name]["tie"]] for name, e in found["judges"].items()],
    )
    common.table(
        ["question", "method", "against", "measure", "method's", "other's", "difference", ""],
        [
            [
                row["question"],
                row["method"],
                row["against"],
                row["measure"],
                cell(row["value"]),
                cell(row["other"]),
                cell(row["difference"], "+"),
                row["verdict"],
            ]
            for row in found["rows"]
        ],
    )
    common.write("label_quality", options.quick, minutes=(time.monotonic() - started) / 60, **found)


if __name__ == "__main__":
    main()
