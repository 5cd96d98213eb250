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
from typing import Any

import orjson
from pydantic import Field

from prefab.factory import charts
from prefab.factory.console import cell, warn
from prefab.factory.errors import ConfigError
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
    seeds: list[int] = Field([0], min_length=1)
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


def sweep(path: Path, sets: Iterable[str] = (), quiet: bool = False) -> dict[str, Any]:
    """Train what is not trained yet, then measure, draw and write. The result is what
    `OUT/sweep.json` holds.

    Raises: ConfigError for mistakes in file or data; KeyboardInterrupt, and what has been trained
    is kept.
    """
    config = yamlio.validate(stages.document(path, sets), SweepConfig)
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
        except TrainError as error:  # the others may yet tell something
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
    """Points, their means over seeds, each arm's fit, and its sweet spot: where mean gold is
    highest, and where the fit is.
    """
    means = over_seeds(points)
    arms = {}
    for arm in dict.fromkeys(p.arm for p in points):
        some = [p for p in points if p.arm == arm]
        fit = overoptimization.gao_fit([p.kl for p in some], [p.gained for p in some], "rl")
        highest = max((m for m in means if m.arm == arm), key=lambda m: (m.gained, -m.kl))
        furthest = sqrt(max(max(p.kl for p in some), 0.0))
        peak = (
            fit.peak if fit.peak is not None and fit.peak <= furthest else None
        )  # beyond what was seen is a guess
        arms[arm] = {
            "best": asdict(highest),
            "fit": asdict(fit),
            "peak_kl": None if peak is None else peak**2,
            "peak_gained": None
            if peak is None
            else curve(fit.a.value or 0.0, fit.b.value or 0.0, peak),
        }
    last = {(m.arm, m.beta): m for m in sorted(means, key=lambda m: m.step)}
    best = {
        key: max((m for m in means if (m.arm, m.beta) == key), key=lambda m: (m.gained, -m.kl))
        for key in last
    }
    table = [
        {
            "arm": arm,
            "beta": beta,
            "seeds": last[arm, beta].seeds,
            "end": asdict(last[arm, beta]),
            "best": asdict(best[arm, beta]),
            "alarms": sum(alarms.get((arm, beta), [])),
        }
        for arm, beta in sorted(last)
    ]
    return {
        "points": [asdict(p) for p in points],
        "means": [asdict(m) for m in means],
        "arms": arms,
        "table": table,
        "equal_kl": at_equal_kl(points),
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
NOTE = "The best is the highest of many means, so partly luck: measure it again on other prompts before you quote it."


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
    """`sweep.png` and `sweep.html`: proxy, and gold with fit and sweet spot, over the square root
    of KL.
    """
    proxy, gold = [], []
    for arm, told in found["arms"].items():
        for beta in sorted({m["beta"] for m in found["means"] if m["arm"] == arm}):
            some = sorted(
                (m for m in found["means"] if (m["arm"], m["beta"]) == (arm, beta)),
                key=lambda m: m["step"],
            )
            name = f"{arm}, beta {beta:g}"
            proxy.append(charts.Series(name, [charts.Point(m["kl"], m["proxy"]) for m in some]))
            gold.append(
                charts.Series(
                    name, [charts.Point(m["kl"], m["gained"], m["low"], m["high"]) for m in some]
                )
            )
        best, fit = told["best"], told["fit"]
        gold.append(
            charts.Series(
                f"{arm}: sweet spot",
                [
                    charts.Point(
                        best["kl"],
                        best["gained"],
                        label=f"beta {best['beta']:g}, {best['kl']:.1f} nats",
                    )
                ],
                joined=False,
            )
        )
        furthest = sqrt(max(max(m["kl"] for m in found["means"] if m["arm"] == arm), 0.0))
        if fit["a"]["value"] is not None and furthest > 0:
            ds = [furthest * (k + 1) / 100 for k in range(100)]
            line = [charts.Point(d * d, curve(fit["a"]["value"], fit["b"]["value"], d)) for d in ds]
            gold.append(charts.Series(f"{arm}: fit", line, marked=False))
        if told["peak_kl"] is not None:
            gold.append(
                charts.Series(
                    f"{arm}: the fit's peak",
                    [charts.Point(told["peak_kl"], told["peak_gained"])],
                    joined=False,
                )
            )
    body = (
        "<table><tr>"
        + "".join(f"<th>{html.escape(c)}</th>" for c in COLUMNS)
        + "</tr>"
        + "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell(value))}</td>" for value in row) + "</tr>"
            for row in rows(found)
        )
        + "</table>"
    )
    files = charts.write(
        out,
        "sweep",
        "Proxy and gold over the distance from the reference",
        [
            charts.Chart("What is trained on", "KL, nats an answer", "proxy", proxy, kl=True),
            charts.Chart(
                "What nothing trains on",
                "KL, nats an answer",
                "gold less the reference's",
                gold,
                kl=True,
            ),
        ],
        body + f"<p>{html.escape(NOTE)}</p>",
    )
    return sorted(files, reverse=True)


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
    """Gold gained by each arm at a quarter, half and all of the KL to which every arm came with
    every seed.

    With several betas an arm's gain is the mean over those runs of a seed that came so far. `more`
    is the gain less the first arm's, paired by seed. Both are means over seeds with Student's
    intervals (`prefab.factory.stats.student`).
    """
    paths: dict[tuple[str, int], dict[float, list[tuple[float, float]]]] = {}
    for p in points:
        paths.setdefault((p.arm, p.seed), {}).setdefault(p.beta, []).append((p.kl, p.gained))
    arms, seeds = list(dict.fromkeys(arm for arm, _ in paths)), sorted({seed for _, seed in paths})
    if len(paths) < len(arms) * len(seeds):  # a run failed: seeds cannot be paired
        return []
    reach = min(max(kl for path in runs.values() for kl, _ in path) for runs in paths.values())

    def gain(arm: str, seed: int, kl: float) -> float:
        return fmean(
            g
            for path in paths[arm, seed].values()
            if (g := overoptimization.gained_at(path, kl)) is not None
        )

    rows = []
    for share in (0.25, 0.5, 1.0) if reach > 0 else ():
        first = [gain(arms[0], seed, share * reach) for seed in seeds]
        for arm in arms:
            gains = [gain(arm, seed, share * reach) for seed in seeds]
            more = (
                student([a - b for a, b in zip(gains, first, strict=True)])
                if arm != arms[0]
                else None
            )
            rows.append(
                {
                    "kl": share * reach,
                    "arm": arm,
                    "gained": asdict(student(gains)),
                    "more": more and asdict(more),
                }
            )
    return rows
