"""`prefab sweep`: PPO over beta, seeds and rewards (an ensemble against one model); gold beside
proxy over sqrt(KL).

Every run is one of `prefab train ppo`, in a folder of its own: it goes on where it was stopped, and
is not repeated once it has ended. Its own evaluations are the points, always of the same held-out
prompts. To the gold of each arm, relative to that of the reference, Gao's form for RL is fitted
over all its betas and seeds.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import log, sqrt
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import orjson
from pydantic import Field

from prefab.factory import charts
from prefab.factory.console import warn
from prefab.factory.errors import ConfigError
from prefab.factory.numbers import cell
from prefab.factory.spec import yamlio
from prefab.factory.stats import student
from prefab.pipelines.training import stages
from prefab.trainers.common import Strict, TrainError, write_json
from prefab.trainers.rl import overoptimization
from prefab.trainers.rl.config import PpoConfig
from prefab.trainers.rl.rewards import RewardConfig


class SweepConfig(Strict):
    """Which runs there are: every arm with every beta and seed."""

    ppo: str = Field(
        "ppo",
        description="A configuration of `prefab train ppo`, or a preset: what all runs share.",
    )
    sets: list[str] = Field([], description="Overrides of it.")
    out: str = Field(description="The folder of all runs, of the chart and of sweep.json.")
    betas: list[float] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field([0], min_length=1)
    arms: dict[str, list[RewardConfig]] = Field(
        {},
        description="By name, the rewards to train against; left out: one arm, "
        "those of the configuration.",
    )


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation, KL in nats an answer; `gained` is gold less that of the reference on the same
    prompts and seed.
    """

    arm: str
    beta: float
    seed: int
    step: int
    kl: float
    proxy: float
    gold: float
    gained: float


@dataclass(frozen=True, slots=True)
class Mean:
    """The evaluations of an arm, beta and step over seeds; bounds are of 95% (Student's t), None
    for one seed.
    """

    arm: str
    beta: float
    step: int
    seeds: int
    kl: float
    proxy: float
    gained: float
    low: float | None
    high: float | None


def sweep(path: str | Path, sets: Iterable[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Train PPO for several values of beta, seeds and rewards, and find the best beta. The same
    call continues a sweep that was stopped.

    Args:
        path: A configuration file, or the name of a preset in `trainers/presets/`.
        sets: Overrides of fields, for example `["betas=[0.1, 0.3]"]`.
        quiet: Do not show progress.

    Returns:
        The content of `OUT/sweep.json`.

    Raises:
        ConfigError: A mistake in the configuration or the data.
        KeyboardInterrupt: The sweep was stopped; trained policies are kept.
    """
    config = yamlio.validate(stages.document(Path(path), sets), SweepConfig)
    runs = settings(config)
    charts.ready()  # not after hours
    data = runs[0][2].data
    assert data is not None  # or `settings` had refused
    stages.catch_up(source.store for source in data.sources)
    points: list[Point] = []
    alarms: dict[tuple[str, float], list[bool]] = {}
    failed: dict[str, str] = {}
    for k, (arm, name, run) in enumerate(runs, 1):
        try:
            done = trained(run, f"{name} ({k} of {len(runs)})", quiet)
        except TrainError as error:  # the other runs go on
            failed[name] = str(error)
            warn(f"{name}: {error}")
            continue
        start, *later = done["evaluations"]
        points += [
            Point(
                arm,
                run.beta,
                run.seed,
                e["step"],
                e["kl"],
                e["proxy"],
                e["gold"],
                e["gold"] - start["gold"],
            )
            for e in later
        ]
        alarms.setdefault((arm, run.beta), []).append(bool(done["alarm"]))
    if not points:
        raise TrainError(
            "no run came as far as its first evaluation"
            + "".join(f"; {n}: {e}" for n, e in failed.items())
        )
    found = measured(points, alarms) | {"failed": failed}
    out = Path(config.out)
    found["files"] = [str(p) for p in drawn(out, found)]
    write_json(out / "sweep.json", found)
    return found


def settings(config: SweepConfig) -> list[tuple[str, str, PpoConfig]]:
    """(arm, name, configuration) of each run: all betas of a seed come before the next seed's.

    Raises: ConfigError with every mistake.
    """
    document = stages.document(Path(config.ppo), config.sets)
    document.value = {**(document.value or {}), "out": config.out}
    base = yamlio.validate(document, PpoConfig)
    arms = config.arms or {"reward": base.rewards}
    wrong = [
        message
        for message, is_so in (
            (
                "gold: a sweep sets proxy against gold: name a score that nothing trains on",
                base.gold is None,
            ),
            ("data: no prompts are named", base.data is None),
            ("kl: beta is what is swept: it must be fixed", base.kl != "fixed"),
            (
                "reference: gains are measured from where the policy begins: leave it out",
                base.reference is not None,
            ),
            (
                "eval_every: must be at most steps, or nothing is evaluated",
                base.eval_every > base.steps,
            ),
            ("betas: must be at least 0", min(config.betas) < 0),
            (
                "betas, seeds: name each once",
                len({*config.betas}) < len(config.betas)
                or len({*config.seeds}) < len(config.seeds),
            ),
            ("arms: every arm needs a reward", not all(arms.values())),
        )
        if is_so
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))
    runs = []
    for seed in config.seeds:
        for beta in config.betas:
            for arm, some in arms.items():
                name = f"{arm}-beta-{beta:g}-seed-{seed}"
                changes = {
                    "beta": beta,
                    "seed": seed,
                    "rewards": list(some),
                    "out": str(Path(config.out) / name),
                }
                runs.append((arm, name, base.model_copy(update=changes)))
    return runs


def trained(config: PpoConfig, name: str, quiet: bool) -> dict[str, Any]:
    """What a run's evaluations found, after training it where it has not ended.

    Raises: ConfigError where its folder holds another run, TrainError.
    """
    file = Path(config.out) / "evaluations.json"
    wanted = config.model_dump(mode="json", exclude={"store", "save_every"})
    if file.exists():
        done: dict[str, Any] = orjson.loads(file.read_bytes())
        if changed := sorted(k for k in wanted if done["config"].get(k) != wanted[k]):
            raise ConfigError(
                f"{config.out}: holds a run that differs in {', '.join(changed)}. Name another folder with out, "
                "or delete this one"
            )
        return done
    if not quiet:
        warn(name)
    found = stages.fit("ppo", config, quiet)
    done = {"config": wanted, **{name: found[name] for name in ("stopped", "alarm", "evaluations")}}
    write_json(file, done)
    return done


def measured(
    points: Sequence[Point], alarms: dict[tuple[str, float], list[bool]]
) -> dict[str, Any]:
    """Points, their means over seeds, each arm's fit and where its mean gold is highest, the table
    of arms and betas, and the arms at equal KL.
    """
    means = over_seeds(points)
    table = []
    for arm, beta in sorted({(m.arm, m.beta) for m in means}):
        some = [m for m in means if (m.arm, m.beta) == (arm, beta)]
        end = max(some, key=lambda m: m.step)
        table.append(
            {
                "arm": arm,
                "beta": beta,
                "seeds": end.seeds,
                "end": asdict(end),
                "best": asdict(max(some, key=_by_gold)),
                "alarms": sum(alarms.get((arm, beta), [])),
            }
        )
    return {
        "points": [asdict(p) for p in points],
        "means": [asdict(m) for m in means],
        "arms": {
            arm: _arm([p for p in points if p.arm == arm], [m for m in means if m.arm == arm])
            for arm in dict.fromkeys(p.arm for p in points)
        },
        "table": table,
        "equal_kl": at_equal_kl(points),
    }


def _by_gold(mean: Mean) -> tuple[float, float]:
    """Sorts by gold gained; of equals, the nearer to the reference is higher."""
    return mean.gained, -mean.kl


def _arm(points: Sequence[Point], means: Sequence[Mean]) -> dict[str, Any]:
    """An arm's highest mean, its fit, and the fit's peak where that lies within what was
    measured.
    """
    fit = overoptimization.gao_fit([p.kl for p in points], [p.gained for p in points], "rl")
    d = fit.peak
    if d is not None and d > sqrt(max(max(p.kl for p in points), 0.0)):
        d = None  # an extrapolation
    return {
        "best": asdict(max(means, key=_by_gold)),
        "fit": asdict(fit),
        "peak_kl": None if d is None else d**2,
        "peak_gained": None if d is None else curve(fit.a.value or 0.0, fit.b.value or 0.0, d),
    }


COLUMNS = (
    "rewards",
    "beta",
    "seeds",
    "KL at the end",
    "proxy",
    "gold gained",
    "most gold gained",
    "at KL",
    "at step",
    "alarms",
)
NOTE = "The best is the highest of many means, so partly chance: measure it again on other prompts before you quote it."


def rows(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The table of arms and betas, by `COLUMNS`."""
    return [
        (
            r["arm"],
            r["beta"],
            r["seeds"],
            r["end"]["kl"],
            r["end"]["proxy"],
            r["end"]["gained"],
            r["best"]["gained"],
            r["best"]["kl"],
            r["best"]["step"],
            r["alarms"],
        )
        for r in found["table"]
    ]


def drawn(out: Path, found: dict[str, Any]) -> list[Path]:
    """`sweep.png` and `sweep.html`: proxy, and gold with fit and best point, over the square root
    of KL.
    """
    proxy, gold = [], []
    for arm, told in found["arms"].items():
        means = [m for m in found["means"] if m["arm"] == arm]
        for beta in sorted({m["beta"] for m in means}):
            some = sorted((m for m in means if m["beta"] == beta), key=lambda m: m["step"])
            name = f"{arm}, beta {beta:g}"
            proxy.append(charts.Series(name, [charts.Point(m["kl"], m["proxy"]) for m in some]))
            gold.append(
                charts.Series(
                    name, [charts.Point(m["kl"], m["gained"], m["low"], m["high"]) for m in some]
                )
            )
        gold += _best_and_fit(arm, told, max(m["kl"] for m in means))
    nats = "KL from the reference, nats an answer"
    files = charts.write(
        out,
        "sweep",
        "Reward model's score and ground truth over the distance from the reference",
        [
            charts.Chart("Reward model's score", nats, "mean of an answer", proxy, kl=True),
            charts.Chart(
                "Ground truth, 95% intervals over seeds",
                nats,
                "gain over the reference",
                gold,
                kl=True,
            ),
        ],
        f"{_html_table(found)}<p>{html.escape(NOTE)}</p>",
    )
    return sorted(files, reverse=True)


def _best_and_fit(arm: str, told: dict[str, Any], most_kl: float) -> list[charts.Series]:
    """An arm's highest mean, its fitted curve up to `most_kl`, and the curve's peak."""
    best, a, b = told["best"], told["fit"]["a"]["value"], told["fit"]["b"]["value"]
    label = f"beta {best['beta']:g}, {best['kl']:.1f} nats"
    point = charts.Point(best["kl"], best["gained"], label=label)
    made = [charts.Series(f"{arm}: highest mean", [point], joined=False)]
    if a is not None and most_kl > 0:
        ds = [sqrt(most_kl) * (k + 1) / 100 for k in range(100)]
        line = [charts.Point(d * d, curve(a, b, d)) for d in ds]
        made.append(charts.Series(f"{arm}: fit", line, marked=False))
    if told["peak_kl"] is not None:
        point = charts.Point(told["peak_kl"], told["peak_gained"])
        made.append(charts.Series(f"{arm}: the fit's peak", [point], joined=False))
    return made


def _html_table(found: dict[str, Any]) -> str:
    def line(tag: str, values: Iterable[str]) -> str:
        cells = "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)
        return f"<tr>{cells}</tr>"

    body = "".join(line("td", map(cell, row)) for row in rows(found))
    return f"<table>{line('th', COLUMNS)}{body}</table>"


def curve(a: float, b: float, d: float) -> float:
    """Gold gained at distance d = sqrt(KL): d (a - b log d)."""
    return 0.0 if d <= 0 else d * (a - b * log(d))


def over_seeds(points: Sequence[Point]) -> list[Mean]:
    """One mean an arm, beta and step."""
    groups: dict[tuple[str, float, int], list[Point]] = {}
    for p in points:
        groups.setdefault((p.arm, p.beta, p.step), []).append(p)
    means = []
    for (arm, beta, step), some in groups.items():
        gained = student([p.gained for p in some])
        assert gained.value is not None  # a group has at least one point
        means.append(
            Mean(
                arm,
                beta,
                step,
                len(some),
                fmean(p.kl for p in some),
                fmean(p.proxy for p in some),
                gained.value,
                gained.low,
                gained.high,
            )
        )
    return means


def at_equal_kl(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Gold gained by each arm at a quarter, half and all of the KL that every arm reached with
    every seed.

    With several betas an arm's gain is the mean over those runs of a seed that went so far. `more`
    is the gain less the first arm's, paired by seed. Both are means over seeds with Student's
    intervals (`prefab.factory.stats.student`). Empty where a run failed, since seeds then cannot be
    paired.
    """
    paths: Paths = {}
    for p in points:
        paths.setdefault((p.arm, p.seed), {}).setdefault(p.beta, []).append((p.kl, p.gained))
    arms, seeds = list(dict.fromkeys(arm for arm, _ in paths)), sorted({seed for _, seed in paths})
    reach = min(max(kl for path in runs.values() for kl, _ in path) for runs in paths.values())
    if len(paths) < len(arms) * len(seeds) or reach <= 0:
        return []
    rows = []
    for kl in (0.25 * reach, 0.5 * reach, reach):
        gains = {arm: [_gain(paths[arm, seed], kl) for seed in seeds] for arm in arms}
        for arm in arms:
            more = [a - b for a, b in zip(gains[arm], gains[arms[0]], strict=True)]
            rows.append(
                {
                    "kl": kl,
                    "arm": arm,
                    "gained": asdict(student(gains[arm])),
                    "more": asdict(student(more)) if arm != arms[0] else None,
                }
            )
    return rows


# Of an arm and seed: each beta's (KL, gold gained) along the run.
Paths = dict[tuple[str, int], dict[float, list[tuple[float, float]]]]


def _gain(paths: dict[float, list[tuple[float, float]]], kl: float) -> float:
    """The mean gold gained at `kl` over the betas whose run went so far."""
    gains = [overoptimization.gained_at(path, kl) for path in paths.values()]
    return fmean(gain for gain in gains if gain is not None)
