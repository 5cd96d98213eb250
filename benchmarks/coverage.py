"""Do the intervals hold the truth as often as they say? Each is simulated where its items are not
independent: few groups of prompts of unequal sizes, an effect that a group shares, missing ratings,
ties, skewed values, few seeds.

    python -m benchmarks.coverage            # 2,000 simulations a setting, some minutes
    python -m benchmarks.coverage --quick    # 100 simulations a setting

A row tells an interval, its setting, and in how many simulations of 100 the true value lies within
it. 95 is what is stated; 93 to 97 is wanted. A setting is a draw of data whose truth is known, or
is computed from 20,000 groups."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.common import asked, table, write
from prefab.factory.stats import (
    Estimate,
    clustered_mean,
    clustered_share,
    length_controlled_win_rate,
    over_seeds,
)
from prefab.judges.stats import agreement
from prefab.judges.stats.calibration import calibration_error
from prefab.judges.stats.judge_metrics import errors_together

Draw = Callable[[np.random.Generator], Mapping[str, tuple[float, Estimate]]]
RESAMPLES = 400
COEFFICIENTS = {
    name: agreement.PANEL[name]
    for name in (
        "percent",
        "cohen_kappa",
        "conger_kappa",
        "gwet_ac1",
        "krippendorff_alpha nominal",
        "krippendorff_alpha ordinal",
    )
}


def groups_of(rng: np.random.Generator, m: int, sizes: tuple[int, ...]) -> np.ndarray:
    """Each item's group: `m` groups of one of the sizes each."""
    return np.repeat(np.arange(m), rng.choice(sizes, size=m))


def share(rng: np.random.Generator, m: int, sizes: tuple[int, ...], p: float, effect: float) -> Any:
    """A share whose groups differ: their own shares are beta distributed, correlated by `effect`
    within a group."""
    groups = groups_of(rng, m, sizes)
    own = np.full(m, p)
    if effect:
        own = rng.beta(p * (1 - effect) / effect, (1 - p) * (1 - effect) / effect, size=m)
    return {"share": (p, clustered_share(rng.random(len(groups)) < own[groups], groups))}


def mean(rng: np.random.Generator, m: int, sizes: tuple[int, ...], skewed: bool) -> Any:
    """A mean of normal or of exponential values, a third of whose variance is the group's."""
    groups = groups_of(rng, m, sizes)
    make = rng.exponential if skewed else rng.normal
    values = make(size=m)[groups] * 3**-0.5 + make(size=len(groups)) * (2 / 3) ** 0.5
    truth = 3**-0.5 + (2 / 3) ** 0.5 if skewed else 0.0
    found = clustered_mean(values, groups, RESAMPLES, int(rng.integers(1 << 30)))
    return {"mean": (truth, found)}


def seeds(rng: np.random.Generator, n_seeds: int, m: int, seed_sd: float, group_sd: float) -> Any:
    """A mean of policies that were trained with several seeds, on the same groups of prompts."""
    seed, group = (x.ravel() for x in np.indices((n_seeds, m, 6))[:2])
    values = (
        seed_sd * rng.normal(size=n_seeds)[seed]
        + group_sd * rng.normal(size=m)[group]
        + seed_sd * rng.normal(size=(n_seeds, m))[seed, group]
        + 0.3 * rng.normal(size=len(seed))
    )
    return {"mean over seeds": (0.0, over_seeds(values, seed, group))}


@lru_cache
def true_share(p: float, spread: float) -> float:
    """The mean share where log-odds are normal around those of `p`."""
    x, weight = np.polynomial.hermite_e.hermegauss(60)
    return float((weight / weight.sum()) @ (1 / (1 + (1 - p) / p * np.exp(-spread * x))))


FAULTY = (0.86, 0.71, 0.0, -0.14)  # gold scores of answers with a fault, equally likely here


def trained_shares(
    rng: np.random.Generator, n_seeds: int, m: int, each: int, p: float, seed_sd: float
) -> Any:
    """A share near 1, and a gold score that is 1 of such answers, of policies that were trained
    with several seeds; their log-odds differ by `seed_sd`, those of groups by .5."""
    seed, group = (x.ravel() for x in np.indices((n_seeds, m, each))[:2])
    odds = p / (1 - p) * np.exp(seed_sd * rng.normal(size=n_seeds)[seed])
    odds *= np.exp(0.5 * rng.normal(size=m)[group])
    good = (rng.random(len(seed)) < odds / (1 + odds)).astype(float)
    gold = np.where(good > 0, 1.0, rng.choice(FAULTY, size=len(good)))
    truth = true_share(p, float(np.hypot(seed_sd, 0.5)))
    return {
        "share over seeds": (truth, over_seeds(good, seed, group, bounds=(0.0, 1.0))),
        "gold over seeds": (
            truth + (1 - truth) * float(np.mean(FAULTY)),
            over_seeds(gold, seed, group, bounds=(-1.0, 1.0)),
        ),
    }


@lru_cache
def true_win_rate(effect: float) -> float:
    """The win rate at equal length, over groups whose skill differs by `effect`."""
    x, weight = np.polynomial.hermite_e.hermegauss(60)
    return float((weight / weight.sum()) @ (1 / (1 + np.exp(-0.4 - effect * x))))


def win_rate(rng: np.random.Generator, m: int, sizes: tuple[int, ...], effect: float) -> Any:
    """The length-controlled win rate where groups differ in skill and answers in length; an eighth
    of the comparisons are ties."""
    groups = groups_of(rng, m, sizes)
    longer = rng.normal(0, 30, size=len(groups))
    logit = 0.4 + effect * rng.normal(size=m)[groups] + 0.5 * np.tanh(longer / 30)
    won = (rng.random(len(groups)) < 1 / (1 + np.exp(-logit))).astype(float)
    found = length_controlled_win_rate(won, 100 + longer, np.full(len(won), 100.0), clusters=groups)
    return {"length-controlled win rate": (true_win_rate(effect), found)} if found.low else {}


def ratings(
    rng: np.random.Generator, m: int, sizes: tuple[int, ...], right: float, effect: float
) -> tuple[np.ndarray, np.ndarray]:
    """Labels a, b or tie by two judges, a tenth missing; groups differ in how hard they are and in
    which answer wins."""
    groups = groups_of(rng, m, sizes)
    n = len(groups)
    sure = right + effect * (1 - right) * (2 * rng.random(m)[groups] - 1)
    base = rng.beta(2, 2, size=m)[groups] if effect else np.full(n, 0.5)
    truth = np.where(rng.random(n) < 0.1, 0.5, rng.random(n) < base)
    guess = rng.choice([0, 0.5, 1], p=[0.45, 0.1, 0.45], size=(n, 2))
    found = np.where(rng.random((n, 2)) < sure[:, None], truth[:, None], guess)
    return np.where(rng.random((n, 2)) < 0.1, np.nan, found), groups


@lru_cache
def true_coefficients(right: float, effect: float) -> Mapping[str, float]:
    """The coefficients of 20,000 groups."""
    found, _ = ratings(np.random.default_rng(1), 20_000, (4,), right, effect)
    estimates = agreement.panel_coefficients(
        found, categories=(0, 0.5, 1), resamples=0, kinds=COEFFICIENTS
    )
    return {name: float(e.value or 0.0) for name, e in estimates.items()}


def coefficients(
    rng: np.random.Generator, m: int, sizes: tuple[int, ...], right: float, effect: float
) -> Any:
    """Coefficients of agreement, by the jackknife and by the bootstrap over groups."""
    found, groups = ratings(rng, m, sizes, right, effect)
    estimates = agreement.panel_coefficients(
        found,
        categories=(0, 0.5, 1),
        resamples=RESAMPLES,
        seed=int(rng.integers(1 << 30)),
        clusters=groups,
        kinds=COEFFICIENTS,
    )
    truth, made = true_coefficients(right, effect), {}
    for name, e in estimates.items():
        if e.low is not None:
            made[name] = (truth[name], e)
        if e.boot_low is not None:
            made[f"{name}, bootstrap"] = (
                truth[name],
                Estimate(e.value, None, e.boot_low, e.boot_high),
            )
    return made


def chance_of(p: np.ndarray, slope: float, shift: float, u: Any = 0.0) -> np.ndarray:
    """The chance that p comes true of a judge whose log-odds are `slope` times too small."""
    result: np.ndarray = 1 / (1 + np.exp(-(slope * np.log(p / (1 - p)) + shift + u)))
    return result


@lru_cache
def true_calibration_error(slope: float, shift: float, effect: float) -> float:
    """Over ten bins of p between .5 and 1."""
    p = np.linspace(0.5, 1, 2002)[1:-1]
    x, weight = np.polynomial.hermite_e.hermegauss(40)
    came = sum(
        w * chance_of(p, slope, shift, effect * u)
        for u, w in zip(x, weight / weight.sum(), strict=True)
    )
    return float(np.abs((came - p).reshape(10, -1).mean(axis=1)).mean())


def error_of_calibration(
    rng: np.random.Generator, n: int, m: int, slope: float, shift: float, effect: float
) -> Any:
    """The error of calibration of a judge that is calibrated (slope 1, shift 0, effect 0) or not;
    groups differ by `effect` in log-odds."""
    groups, p = rng.integers(0, m, size=n), rng.uniform(0.5, 1, size=n)
    y = rng.random(n) < chance_of(p, slope, shift, effect * rng.normal(size=m)[groups])
    found = calibration_error(p, y.astype(float), 10, groups, 400, int(rng.integers(1 << 30)))
    truth = true_calibration_error(slope, shift, effect)
    return {"calibration error": (truth, found)}


def judges(rng: np.random.Generator, m: int, sizes: tuple[int, ...], effect: float) -> Any:
    """Errors of three judges on the same groups of comparisons."""
    groups = groups_of(rng, m, sizes)
    shared = effect**0.5 * (
        0.5**0.5 * rng.normal(size=m)[groups] + 0.5**0.5 * rng.normal(size=len(groups))
    )
    own = (1 - effect) ** 0.5 * rng.normal(size=(len(groups), 3))
    return np.where(shared[:, None] + own > 0.84, 0.1, 0.9), groups  # a fifth of them wrong


@lru_cache
def true_panel(effect: float) -> tuple[float, float]:
    """Mean correlation of errors and effective number of judges, of 20,000 groups."""
    p, _ = judges(np.random.default_rng(2), 20_000, (8,), effect)
    found = errors_together(p, np.ones(len(p)))
    return float(found.mean.value or 0.0), float(found.effective.value or 0.0)


def panel(rng: np.random.Generator, m: int, sizes: tuple[int, ...], effect: float) -> Any:
    """The mean correlation of judges' errors and the effective number of judges."""
    p, groups = judges(rng, m, sizes, effect)
    found = errors_together(p, np.ones(len(p)), groups)
    if found.mean.low is None:
        return {}
    mean_correlation, effective = true_panel(effect)
    return {
        "correlation of errors": (mean_correlation, found.mean),
        "effective judges": (effective, found.effective),
    }


MIXED = (1, 2, 3, 6, 12)
SETTINGS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "10 groups of 5, p .8": (share, (10, (5,), 0.8, 0.1)),
    "20 unequal groups, p .8": (share, (20, MIXED, 0.8, 0.1)),
    "20 groups of 5, p .5, strong effect": (share, (20, (5,), 0.5, 0.4)),
    "50 unequal groups, p .9": (share, (50, MIXED, 0.9, 0.1)),
    "40 single items, p .7": (share, (40, (1,), 0.7, 0.0)),
    "8 groups of 5, normal": (mean, (8, (5,), False)),
    "20 unequal groups, normal": (mean, (20, MIXED, False)),
    "20 groups of 5, exponential": (mean, (20, (5,), True)),
    "50 unequal groups, exponential": (mean, (50, MIXED, True)),
    "3 seeds, 20 groups": (seeds, (3, 20, 0.05, 0.1)),
    "5 seeds, 20 groups, seeds differ more": (seeds, (5, 20, 0.1, 0.05)),
    "5 seeds, 60 groups, seeds alike": (seeds, (5, 60, 0.01, 0.1)),
    "3 seeds, 20 groups of 2, p .95": (trained_shares, (3, 20, 2, 0.95, 0.5)),
    "3 seeds that differ more, p .9": (trained_shares, (3, 20, 2, 0.9, 0.8)),
    "5 seeds, 65 groups of 2, p .92": (trained_shares, (5, 65, 2, 0.92, 0.6)),
    "20 groups of 10": (win_rate, (20, (10,), 0.8)),
    "40 unequal groups": (win_rate, (40, MIXED, 0.8)),
    "80 single comparisons": (win_rate, (80, (1,), 0.0)),
    "20 groups of 6, judges right half the time": (coefficients, (20, (6,), 0.5, 0.8)),
    "20 unequal groups, judges mostly right": (coefficients, (20, MIXED, 0.85, 0.8)),
    "60 groups of 3, judges mostly right": (coefficients, (60, (3,), 0.85, 0.8)),
    "300 items in 300 groups, calibrated": (error_of_calibration, (300, 300, 1.0, 0.0, 0.0)),
    "300 items in 40 groups, too sure": (error_of_calibration, (300, 40, 0.6, 0.0, 0.5)),
    "300 items in 40 groups, shifted": (error_of_calibration, (300, 40, 1.0, -0.5, 0.5)),
    "1,000 items in 60 groups, too sure": (error_of_calibration, (1000, 60, 0.8, 0.0, 0.5)),
    "30 groups of 8, errors shared": (panel, (30, (8,), 0.5)),
    "60 unequal groups, errors nearly apart": (panel, (60, MIXED, 0.1)),
}


def simulate(
    of: Callable[..., Any], arguments: tuple[Any, ...], runs: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Of each interval that a setting gives: the truth, the mean estimate, the share of runs whose
    interval holds the truth, and its mean width."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[tuple[float, float, bool, float]]] = {}
    for _ in range(runs):
        for name, (truth, e) in of(rng, *arguments).items():
            low = -np.inf if e.low is None else e.low
            high = np.inf if e.high is None else e.high
            inside = low - 1e-12 <= truth <= high + 1e-12
            rows.setdefault(name, []).append((truth, e.value, inside, high - low))
    return {
        name: {
            "truth": found[0][0],
            "mean": float(np.mean([x[1] for x in found])),
            "covered": float(np.mean([x[2] for x in found])),
            "width": float(np.median([x[3] for x in found])),
            "runs": len(found),
        }
        for name, found in rows.items()
    }


def main() -> None:
    """Simulate, tell, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000, help="Simulations of each setting.")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.runs = 100
    rows, found = [], {}
    for number, (setting, (of, arguments)) in enumerate(SETTINGS.items()):
        found[setting] = simulate(of, arguments, args.runs, number)
        rows += [
            [name, setting, x["truth"], x["mean"], f"{100 * x['covered']:.1f}"]
            for name, x in found[setting].items()
        ]
    table(["interval", "setting", "truth", "mean estimate", "covered, of 100"], rows)
    write("coverage", args.quick, arguments=asked(args), intervals=found)


if __name__ == "__main__":
    main()
