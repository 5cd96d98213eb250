"""`prefab eval weak-to-strong`: the same policy trained on labels of rising strength, and how much
of the gap to the strongest labels each of them recovers.

The performance gap recovered by a policy is (its score - floor) / (ceiling - floor). The ceiling is
the policy trained on the last labels, which should be the best there are; the floor is the policy
before any training, or the one trained on labels that are named. 0: no better than the floor; 1: as
good as the ceiling. All policies answer the same held-out prompts.
Source: Burns et al. 2023, section 3; there the floor is the weak model itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import isnan
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import Field, ValidationError, model_validator

from prefab.factory import charts
from prefab.factory.console import warn
from prefab.factory.errors import ConfigError
from prefab.factory.keys import digest
from prefab.factory.numbers import cell, counted
from prefab.factory.spec import yamlio
from prefab.factory.stats import (
    Estimate,
    bounded,
    clustered_mean,
    over_seeds,
    ratio_over_seeds,
    undefined,
)
from prefab.factory.tables import as_markdown
from prefab.factory.tool_calls import message_turn, stored_messages
from prefab.factory.types import Prompt
from prefab.pipelines.evaluation import policy_metrics
from prefab.pipelines.evaluation.policy import (
    HeldOut,
    PolicyEvalConfig,
    held_out,
    sample_all,
    value_of,
)
from prefab.pipelines.evaluation.policy_metrics import PolicyAnswer
from prefab.pipelines.store.ground_truth import find_gold
from prefab.pipelines.store.selection import Selection, select
from prefab.pipelines.training import stages
from prefab.trainers.common import Strict, model_folder, record_eval, write_json
from prefab.trainers.data import DataConfig, read_rows
from prefab.trainers.registry import STAGES

BASE = "untrained"
RESULT = "weak-to-strong"


class LabelSource(Strict):
    """Whose labels of the run's comparisons a policy is trained on."""

    gold: Literal["human", "oracle"] | None = Field(
        None, description="The ground truth's labels instead of a judge's."
    )
    run: str = Field("", description="Another run of the store; left out: that of the file.")
    judges: list[str] = Field([], description="Decide by these judges' readings alone.")
    principles: list[str] = Field(
        [], description="Decide by the readings under these principles alone."
    )
    margin: float = Field(
        0.0, ge=0, lt=0.5, description="Keep pairs whose p_chosen is at least this far from a half."
    )

    @model_validator(mode="after")
    def _one(self) -> LabelSource:
        if self.gold and (self.judges or self.principles or self.margin):
            raise ValueError("gold: the ground truth has no judges, principles or margin to choose")
        return self


class WeakToStrongConfig(Strict):
    """Which labels train which policy, and how the policies are measured."""

    store: str = Field(description="The folder of ledger.sqlite and prefab.duckdb.")
    run: str = Field("", description="NAME or NAME@VERSION; left out: the run that ran last.")
    labels: dict[str, LabelSource] = Field(
        min_length=2, description="By name, from the weakest; the last ones are the ceiling."
    )
    floor: str = Field(
        "", description="Labels whose policy has recovered nothing; left out: the untrained policy."
    )
    stage: Literal["dpo", "kto"] = Field("dpo", description="How the policies are trained.")
    train: dict[str, Any] = Field(
        description="Fields of the stage but for out, seed, store and data.sources."
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        [0, 1, 2], min_length=1, description="Trainings with each set of labels."
    )
    out: str = Field(description="The folder of all policies, of the report and of its card.")
    prompts: HeldOut = HeldOut()
    samples: int = Field(4, ge=1, le=64)
    max_new_tokens: int = Field(96, ge=1)
    seed: int = Field(0, description="Of sampling.")
    batch: int = Field(64, ge=1)
    threads: int | None = Field(None, ge=1)
    reward: str | None = Field(
        None, description="A reward model's folder: the score outside the embedded world."
    )
    constitution: str | None = Field(
        None, description="Whose weights the gold score takes; left out: all weigh the same."
    )
    template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> WeakToStrongConfig:
        ceiling = list(self.labels)[-1]
        if self.floor and (self.floor not in self.labels or self.floor == ceiling):
            raise ValueError(
                f"floor: {self.floor!r} must be one of the labels before the last one, {ceiling!r}"
            )
        if BASE in self.labels:
            raise ValueError(f"labels: {BASE!r} is the name of the policy before any training")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: name each once")
        if given := {"out", "seed", "store"} & {*self.train}:
            raise ValueError(f"train: {', '.join(sorted(given))} is set for each policy")
        data = self.train.get("data") or {}
        if not isinstance(data, dict):
            raise ValueError(f"train.data: must be a mapping, not {yamlio.describe(data)}")
        if "sources" in data:
            raise ValueError("train: data.sources is set for each policy, from labels")
        if not isinstance(self.train.get("model"), str):
            raise ValueError("train: model is missing: name the policy that is trained")
        return self


@dataclass(frozen=True, slots=True)
class LabelResult:
    """What labels are worth, and the policies trained on them.

    Attributes:
        name: The labels' name; BASE: the policy before any training.
        pairs: Rows of the train and validation splits.
        agree: Of the pairs that the ceiling's labels also decide, the share decided alike.
        score: Of the policies' answers.
        gain: The score less that of the floor.
        recovered: The gain as a share of the ceiling's.
        figures: Of the policies' answers, as in `prefab eval policy`.
    """

    name: str
    pairs: int
    agree: Estimate
    score: Estimate
    gain: Estimate
    recovered: Estimate
    figures: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class WeakToStrong:
    """The report: results in the order of the labels, after that of the untrained policy."""

    value: str
    floor: str
    ceiling: str
    seeds: int
    prompts: int
    groups: int
    results: Sequence[LabelResult]
    notes: Sequence[str]
    files: Sequence[str]

    def data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def weak_to_strong(path: str | Path, sets: Iterable[str] = (), quiet: bool = False) -> WeakToStrong:
    """Train the same policy on labels of rising strength, and measure how much of the gap to the
    strongest labels is recovered. The same call continues a report that was stopped.

    Args:
        path: A configuration file, or the name of a preset in `trainers/presets/`.
        sets: Overrides of fields, for example `["seeds=[0, 1]"]`.
        quiet: Do not show progress.

    Raises:
        ConfigError: A mistake in the configuration or the data.
        StoreError: The store is missing or damaged, or another program holds it (HeldError).
        TrainError: A training cannot continue.
    """
    document = stages.document(Path(path), sets)
    config = yamlio.validate(document, WeakToStrongConfig)
    charts.ready()  # not after hours
    prompts = held_out(_evaluation(config, {BASE: config.train["model"]}))
    stages.catch_up([config.store])
    sources = {name: _source(config, name) for name in config.labels}
    runs = {
        (name, seed): _stage_config(config, name, seed, source, document)
        for seed in config.seeds
        for name, source in sources.items()
    }
    rows = {name: _labelled(source, config) for name, source in sources.items()}
    for k, ((name, seed), stage) in enumerate(runs.items(), 1):
        if not quiet:
            warn(f"{name}, seed {seed} ({k} of {len(runs)})")
        STAGES[config.stage].run(stage, quiet)
    answers = {(BASE, 0): _answers(config, BASE, 0, config.train["model"], prompts, quiet)}
    for (name, seed), stage in runs.items():
        answers[name, seed] = _answers(config, name, seed, stage.out, prompts, quiet)
    report = measured(config, prompts, rows, answers)
    write(config, report)
    return report


def _source(config: WeakToStrongConfig, name: str) -> dict[str, Any]:
    """The data source of labels; those of the ground truth are written into a file."""
    labels = config.labels[name]
    run = labels.run or config.run
    if not labels.gold:
        chosen = {k: v for k in ("judges", "principles", "margin") if (v := getattr(labels, k))}
        return {"store": config.store, "run": run, **chosen}
    file = Path(config.out) / "labels" / f"{name}.jsonl"
    write_gold(select(Path(config.store), run), labels.gold, file)
    return {"files": str(file)}


_PAIRS = """
SELECT p.prompt, p.a, p.b, '' AS principle, q.messages, q.split, a.text AS text_a, b.text AS text_b
FROM preferences p JOIN prompts q ON q.prompt = p.prompt
JOIN samples a ON a.run = p.run AND a.prompt = p.prompt AND a."index" = p.a
JOIN samples b ON b.run = p.run AND b.prompt = p.prompt AND b."index" = p.b
WHERE p.run = $run AND NOT p.identical AND q.split IN ('train', 'val')
    AND a.text <> b.text AND a.finish = 'stop' AND b.finish = 'stop'
    AND a.context IS NULL AND b.context IS NULL
ORDER BY ALL"""


def write_gold(selection: Selection, gold: str, file: Path) -> None:
    """Write the comparisons of a run that the ground truth decides as a file of pairs.

    Args:
        selection: The run.
        gold: `human` or `oracle`.
        file: The file; an earlier one is replaced.

    Raises: ConfigError where there is no such ground truth, or it decides nothing.
    """
    items = selection.query(_PAIRS)
    truth, _ = find_gold(selection, items, gold)
    lines = []
    for row, p_a in zip(items.iter_rows(named=True), truth, strict=True):
        if isnan(p_a) or p_a == 0.5:
            continue
        better, worse = ("a", "b") if p_a > 0.5 else ("b", "a")
        turns = [message_turn(m) for m in stored_messages(row["messages"])]
        pair = {"chosen": row[f"text_{better}"], "rejected": row[f"text_{worse}"]}
        lines.append(orjson.dumps({"prompt": turns, **pair, "split": row["split"]}))
    if not lines:
        raise ConfigError(
            f"labels: {gold} decides no comparison of {selection.name}"
            + (". Label some with `prefab label`" if gold == "human" else "")
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"\n".join(lines) + b"\n")


def _stage_config(
    config: WeakToStrongConfig,
    name: str,
    seed: int,
    source: Mapping[str, Any],
    document: yamlio.Document,
) -> Any:
    """The configuration of one training. Raises: ConfigError for mistakes under `train`."""
    more = {
        "out": str(Path(config.out) / f"{name}-seed-{seed}"),
        "seed": seed,
        "store": config.store,
        "data": {**(config.train.get("data") or {}), "sources": [source]},
    }
    if config.threads:
        more["threads"] = config.threads
    model = STAGES[config.stage].config
    try:
        made = model.model_validate({**config.train, **more})
    except ValidationError as error:
        problems = yamlio.model_problems(error, document, model, lambda path: ("train", *path))
        raise ConfigError(yamlio.tidy(problems)) from error
    made.data.written_as("train.data", f"labels.{name}")
    return made


# By prompt and texts of a pair, in the order of the texts: whether the first is the better one, and
# the prompt's name.
Labelled = dict[tuple[str, str, str], tuple[bool, str]]


def _labelled(source: Mapping[str, Any], config: WeakToStrongConfig) -> Labelled:
    """The pairs that labels decide. Raises: ConfigError where there are none."""
    data = DataConfig.model_validate({"sources": [source]})
    found = read_rows("preference", data)
    rows: Labelled = {}
    for row in (*found.train, *found.val):
        prompt = json.dumps([(turn["role"], turn["content"]) for turn in row["prompt"]])
        first, second = sorted((str(row["chosen"]), str(row["rejected"])))
        rows[prompt, first, second] = first == row["chosen"], prompt
    return rows


def _evaluation(config: WeakToStrongConfig, policies: dict[str, str]) -> PolicyEvalConfig:
    """The evaluation of some policies, with KL from the untrained one."""
    return PolicyEvalConfig(
        policies=policies,
        reference=config.train["model"],
        prompts=config.prompts,
        samples=config.samples,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        batch=config.batch,
        threads=config.threads,
        reward=config.reward,
        constitution=config.constitution,
        template_kwargs=config.template_kwargs,
    )


def _answers(
    config: WeakToStrongConfig,
    name: str,
    seed: int,
    folder: str,
    prompts: Sequence[Prompt],
    quiet: bool,
) -> list[PolicyAnswer]:
    """A policy's answers to all prompts. They are kept in a file and not sampled again, unless the
    policy or the evaluation is another one.
    """
    from prefab.factory.keys import model_identity

    policy = f"{name}-seed-{seed}"
    evaluation = _evaluation(config, {policy: folder})
    settings = evaluation.model_dump(mode="json", exclude={"policies", "batch", "threads"})
    made = digest(settings, model_identity(model_folder(folder)), [p.id for p in prompts])
    file = Path(config.out) / "answers" / f"{policy}.json"
    if file.exists():
        kept = orjson.loads(file.read_bytes())
        if kept["of"] == made:
            return [PolicyAnswer(**row) for row in kept["answers"]]
    found = sample_all(evaluation, prompts, quiet)[policy]
    write_json(file, {"of": made, "answers": [asdict(a) for a in found]})
    return [PolicyAnswer(**row) for row in json.loads(file.read_text())["answers"]]


def measured(
    config: WeakToStrongConfig,
    prompts: Sequence[Prompt],
    rows: Mapping[str, Labelled],
    answers: Mapping[tuple[str, int], Sequence[PolicyAnswer]],
) -> WeakToStrong:
    """The report on policies that are trained and have answered.

    Args:
        config: The configuration.
        prompts: The held-out prompts.
        rows: The pairs of each set of labels.
        answers: By labels and seed; of the untrained policy with seed 0.

    Raises: ConfigError where nothing scores the answers.
    """
    value = _score_name(config, answers)
    ceiling, floor = list(config.labels)[-1], config.floor or BASE
    names = [BASE, *config.labels]
    scores = {
        (name, seed): _by_prompt(answers[name, 0 if name == BASE else seed], value)
        for name in names
        for seed in config.seeds
    }
    scores_S = {
        name: np.concatenate([scores[name, seed] for seed in config.seeds]) for name in names
    }
    seeds = np.repeat(config.seeds, len(prompts))
    groups = [p.group or p.id for p in prompts] * len(config.seeds)
    gap = scores_S[ceiling] - scores_S[floor]
    results = []
    for name in names:
        gain = scores_S[name] - scores_S[floor]
        recovered = undefined("not measured")
        if name not in (floor, ceiling):
            recovered = ratio_over_seeds(gain, gap, seeds, groups)
        figures = _figures(config, name, prompts, answers)
        results.append(
            LabelResult(
                name,
                len(rows.get(name, ())),
                _agreement(rows[name], rows[ceiling]) if name in rows else undefined("no labels"),
                figures[value],
                over_seeds(gain, seeds, groups) if name != floor else undefined("it is the floor"),
                recovered,
                figures,
            )
        )
    return WeakToStrong(
        value,
        floor,
        ceiling,
        len(config.seeds),
        len(prompts),
        len(set(groups)),
        results,
        _notes(results, ceiling, floor, len(config.seeds)),
        [str(Path(config.out) / f"{RESULT}.{kind}") for kind in ("json", "html", "png")],
    )


def _score_name(
    config: WeakToStrongConfig, answers: Mapping[tuple[str, int], Sequence[PolicyAnswer]]
) -> str:
    """What scores the answers: gold, or else the proxy. Raises: ConfigError where neither does."""
    if all(a.gold for some in answers.values() for a in some):
        return "gold"
    if config.reward:
        return "proxy"
    raise ConfigError(
        "these prompts have no ground truth: name a reward model that scores the answers (reward)"
    )


def _figures(
    config: WeakToStrongConfig,
    name: str,
    prompts: Sequence[Prompt],
    answers: Mapping[tuple[str, int], Sequence[PolicyAnswer]],
) -> dict[str, Estimate]:
    """The figures of the policies trained on labels, all seeds together."""
    harmful = ["harmful" in p.tags for p in prompts]
    pooled = (
        answers[BASE, 0]
        if name == BASE
        else [replace(a, seed=s) for s in config.seeds for a in answers[name, s]]
    )
    return policy_metrics.figures(pooled, harmful if any(harmful) else None, config.seed)


def _by_prompt(answers: Sequence[PolicyAnswer], value: str) -> np.ndarray:
    """The mean score of the answers to each prompt, in the order of the prompts."""
    number = value_of(value)
    places = np.array([a.prompt for a in answers])
    totals: np.ndarray = np.bincount(places, weights=[number(a) for a in answers])
    return totals / np.bincount(places)


def _agreement(mine: Labelled, ceiling: Labelled) -> Estimate:
    """The share of the pairs that both decide on which they say the same; an interval over
    prompts.
    """
    both = [
        (side == ceiling[pair][0], prompt)
        for pair, (side, prompt) in mine.items()
        if pair in ceiling
    ]
    if not both:
        return undefined("no pair is decided by both")
    return bounded(
        clustered_mean([float(same) for same, _ in both], [prompt for _, prompt in both])
    )


def _notes(results: Sequence[LabelResult], ceiling: str, floor: str, seeds: int) -> list[str]:
    """What a reader must know: an undefined share, a single seed, labels that are out of order."""
    by_name = {r.name: r for r in results}
    gap, notes = by_name[ceiling].gain, []
    if gap.low is None or gap.low <= 0:
        notes.append(
            f"no share is told: with 95% confidence the policy trained on {ceiling} may be no better "
            f"than {floor}, so there is no gap to recover. Train longer, or use more data, prompts or seeds"
        )
    if seeds < 2:
        notes.append("one seed: the intervals are over groups of prompts alone")
    agree = [(r.name, r.agree.value) for r in results if r.agree.value is not None]
    for (weak, before), (strong, after) in pairwise(agree):
        if after < before:
            notes.append(
                f"the labels of {strong} agree less with {ceiling} than those of {weak}: the order "
                "under labels is not that of their strength"
            )
    return notes


COLUMNS = ("labels", "pairs", "agree with the ceiling", "score", "gain over the floor", "recovered")


def table_rows(report: WeakToStrong) -> list[tuple[Any, ...]]:
    """A row for each policy, by `COLUMNS`."""
    words = {report.floor: "floor", report.ceiling: "ceiling"}
    return [
        (
            r.name,
            r.pairs or None,
            r.agree,
            r.score,
            r.gain,
            words.get(r.name, r.recovered),
        )
        for r in report.results
    ]


def write(config: WeakToStrongConfig, report: WeakToStrong) -> None:
    """Write the report as JSON, page, chart and card (README.md), and record it in the store."""
    from markupsafe import Markup

    from prefab.factory.pages import write_page

    out = Path(config.out)
    write_json(out / f"{RESULT}.json", report.data())
    chart = _chart(report)
    charts.draw([chart]).savefig(out / f"{RESULT}.png", dpi=150)
    told = (
        f"{config.train['model']} trained by {config.stage} on each set of labels with "
        f"{counted(report.seeds, 'seed')}, measured on {counted(report.prompts, 'held-out prompt')} in "
        f"{counted(report.groups, 'group')}, {counted(config.samples, 'answer')} each. Score: "
        f"{charted(report.value)}. Intervals of 95%, for another seed and another group."
    )
    figures = shown_figures(report)
    rows = table_rows(report)
    columns = ("", *(r.name for r in report.results))
    write_page(
        out / f"{RESULT}.html",
        "From weak to strong labels",
        _BODY,
        told=told,
        columns=COLUMNS,
        rows=[[cell(value, True) for value in row] for row in rows],
        more_columns=columns,
        more=[[cell(value, True) for value in row] for row in figures],
        charts=[Markup(text) for text in charts.as_svg([chart])],
        notes=report.notes,
    )
    card = [
        "# From weak to strong labels",
        told,
        as_markdown(COLUMNS, rows, True).rstrip(),
        *report.notes,
        f"![Scores]({RESULT}.png)",
        "## All figures",
        as_markdown(columns, figures, True).rstrip(),
        "## Configuration",
        f"```json\n{json.dumps(config.model_dump(mode='json'), indent=1)}\n```",
        "## What it does not say",
        "The share is that of this policy, this training and these prompts. It says how far labels "
        "take the policy, not that its answers are safe or true.",
    ]
    (out / "README.md").write_text("\n\n".join(card) + "\n", encoding="utf-8")
    metrics = {
        r.name: {"gain": asdict(r.gain), "recovered": asdict(r.recovered)} for r in report.results
    }
    record_eval(config.store, "eval weak-to-strong", config.out, metrics, seeds=config.seeds)


_BODY = """
<h1>{{ title }}</h1>
<p>{{ told }}</p>
{{ plain_table(columns, rows) }}
{% for note in notes %}<p>{{ note }}</p>
{% endfor %}<div class="charts">{% for chart in charts %}{{ chart }}{% endfor %}</div>
<h2>All figures</h2>
{{ plain_table(more_columns, more) }}"""


def charted(value: str) -> str:
    """What a score is, in words."""
    return "ground truth" if value == "gold" else "a reward model's score, not the truth"


def shown_figures(report: WeakToStrong) -> list[tuple[Any, ...]]:
    """A row for each figure of the policies, in the order of `prefab eval policy`."""
    from prefab.pipelines.evaluation.report import SHOWN

    return [
        (name, *(r.figures.get(name) for r in report.results))
        for name in SHOWN
        if any(name in r.figures for r in report.results)
    ]


def _chart(report: WeakToStrong) -> charts.Chart:
    """The score of each policy, in the order of the labels."""
    points = [
        charts.Point(place, r.score.value, r.score.low, r.score.high, r.name)
        for place, r in enumerate(report.results)
        if r.score.value is not None
    ]
    return charts.Chart(
        "Score of the policy trained on each set of labels, 95% intervals",
        "labels, from the weakest",
        charted(report.value),
        [charts.Series("score", points)],
    )
