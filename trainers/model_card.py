"""The card of a trained model: what it came from, how it was trained, how it does, and what it is
not for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefab.factory import svg
from prefab.factory.charts import Chart, Point, Series
from prefab.factory.tables import as_markdown

CARD, CHART, EVALUATION_CHART = "README.md", "training.svg", "evaluation.svg"
OPEN = ("prefab-tiny", "prefab-nano")  # embedded models: CC0-1.0 (see NOTICE)
BEGIN, END = "<!-- evaluation -->", "<!-- end of evaluation -->"
NOT_EVALUATED = (
    "Not yet: `prefab eval policy` compares this model with its base on held-out prompts, and fills "
    "this part in."
)
NOT_FOR = {
    "reward": "It ranks answers to prompts like those it was trained on, by the labels it was trained on. It is no judge of "
    "truth or safety, and a policy that is optimised against it long enough finds its faults.",
    "policy": "It was trained towards labels that a model gave under one constitution. What those principles do not name was "
    "not improved, and nothing here says that it is safe to deploy.",
}


def write_card(
    folder: Path,
    stage: str,
    config: Any,
    told: str,
    metrics: Mapping[str, Any],
    chart: Chart | None,
    lineage: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
) -> None:
    """README.md beside the weights, and a chart of the training.

    Args:
        folder: The folder of the model.
        stage: The training stage.
        config: The stage's configuration.
        told: How long and on what it was trained, in a sentence.
        metrics: Figures at the end of the training.
        chart: The training's curve; None: there is none.
        lineage: Each run of a store whose data were trained on.
        notes: What was left out of the data.
    """
    sources = config.data.sources if config.data else []
    base = root_model(config.model)
    is_open = _is_open(base, lineage, sources)
    lines = [
        *_metadata(stage, config, base, is_open, sources, lineage),
        "",
        f"# {folder.name if folder.name != 'policy' else folder.parent.name}",
        "",
        f"Trained by Prefab's stage `{stage}` from `{config.model}`. {told}",
        "",
        _licence(is_open, base),
        "",
        *(() if stage == "reward" else ("## Beside its base", "", BEGIN, NOT_EVALUATED, END, "")),
        "## Results on the validation split",
        "",
        _table(metrics),
        *((f"![{chart.title}]({CHART})", "") if chart else ()),
        "## Where the data came from",
        "",
        *(f"- {json.dumps(s.model_dump(exclude_defaults=True))}" for s in sources),
        *(line for source in lineage for line in _lineage(source)),
        *(f"- {note}" for note in notes),
        "",
        "## Configuration",
        "",
        "```json",
        json.dumps(config.model_dump(mode="json"), indent=1),
        "```",
        "",
        "## What it is not for",
        "",
        NOT_FOR["reward" if stage == "reward" else "policy"],
        "",
    ]
    if chart:
        (folder / CHART).write_text(svg.image(chart), encoding="utf-8")
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def add_evaluation(
    folder: Path,
    told: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    chart: Chart | None,
    examples: Sequence[tuple[str, Sequence[tuple[str, str]]]],
) -> bool:
    """Fill in the part of a card that compares the model with its base; an earlier evaluation is
    replaced. Gives whether there is such a card: others' cards are left as they are.

    Args:
        folder: The folder of the model.
        told: On what, in a sentence.
        columns: Headers of the table.
        rows: Its rows: a figure of the base and of the model each.
        chart: The figures as a chart; None: there is none.
        examples: Prompts, each with (model, answer) pairs.
    """
    file = folder / CARD
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    before, found, rest = text.partition(BEGIN)
    if not found or END not in rest:
        return False
    lines = [told, "", as_markdown(columns, rows, intervals=True)]
    if chart:
        lines += [f"![{chart.title}]({EVALUATION_CHART})", ""]
        (folder / EVALUATION_CHART).write_text(svg.image(chart), encoding="utf-8")
    for prompt, answers in examples:
        lines += ["> " + prompt.replace("\n", "\n> "), ""]
        for name, answer in answers:
            lines += [f"**{name}**", "", *_fenced(answer), ""]
    made = "\n".join([BEGIN, *lines, END])
    file.write_text(before + made + rest.partition(END)[2], encoding="utf-8")
    return True


def loss_chart(history: Sequence[Mapping[str, Any]]) -> Chart | None:
    """The validation loss by step; None where it was measured once."""
    points = [Point(h["step"], h["eval_loss"]) for h in history if "eval_loss" in h]
    series = [Series("validation loss", points)]
    return Chart("Validation loss", "step", "loss", series) if len(points) > 1 else None


def reward_chart(steps: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Proxy and ground truth of a policy gradient by step, or the reward where neither was asked;
    None for a single step.
    """
    names = {"eval/proxy": "reward model's score", "eval/gold": "ground truth"}
    if not any("eval/gold" in step for step in steps):
        names = {"reward": "reward"}
    series = [
        Series(words, [Point(s["step"], s[name]) for s in steps if s.get(name) is not None])
        for name, words in names.items()
    ]
    drawn = [one for one in series if len(one.points) > 1]
    return Chart("Reward during training", "step", "mean of an answer", drawn) if drawn else None


def root_model(model: str) -> str:
    """The model that a chain of trainings began with: of a folder that was trained here, the one
    that its record names.
    """
    for _ in range(20):  # a chain that names itself ends too
        offline, online = Path(model) / "training.json", Path(model).parent / "origin.json"
        if offline.is_file():
            model = str(json.loads(offline.read_text(encoding="utf-8"))["identity"]["model"])
        elif online.is_file():
            model = str(json.loads(online.read_text(encoding="utf-8"))["model"])
        else:
            break
    return model


def _is_open(base: str, lineage: Sequence[Mapping[str, Any]], sources: Sequence[Any]) -> bool:
    """Whether model and data are all of the embedded world."""
    worlds = [(line["config"].get("prompts") or {}).get("source") for line in lineage]
    names = {name for line in lineage for name in line["models"].values()}
    of_stores = all(source.store for source in sources) and len(lineage) == len(sources)
    return {base, *names} <= set(OPEN) and of_stores and set(worlds) == {"microworld"}


def _metadata(
    stage: str,
    config: Any,
    base: str,
    is_open: bool,
    sources: Sequence[Any],
    lineage: Sequence[Mapping[str, Any]],
) -> list[str]:
    """The card's first lines, which the hub reads."""
    runs = [line["run"] for line in lineage]
    data = [*runs, *(Path(s.files).name for s in sources if s.files)]
    adapter = getattr(config, "lora", None) and not getattr(config, "merge_lora", True)
    return [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-classification' if stage == 'reward' else 'text-generation'}",
        f"base_model: {json.dumps(Path(base).name if Path(base).is_absolute() else base)}",
        f"base_model_relation: {'adapter' if adapter else 'finetune'}",
        f"datasets: {json.dumps(list(dict.fromkeys(data)))}",
        f"license: {'cc0-1.0' if is_open else 'other'}",
        f"tags: [prefab, {stage}]",
        "---",
    ]


def _licence(is_open: bool, base: str) -> str:
    if is_open:
        return "Licence: CC0-1.0, as everything of the embedded world."
    return (
        f"Licence: that of `{base}`, of the data, and of the models that wrote and judged them. Fill "
        "in `license` above before you publish this model."
    )


def _table(metrics: Mapping[str, Any]) -> str:
    """The final metrics as a table."""
    numbers = [(k, float(v)) for k, v in sorted(metrics.items()) if isinstance(v, int | float)]
    return as_markdown(("", ""), numbers)


def _fenced(text: str) -> list[str]:
    """A text that a model wrote, in a fence that nothing in it ends."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{ticks}text", text, ticks]


def _lineage(line: Mapping[str, Any]) -> list[str]:
    """The lines on one run of a store: its constitution, its judges, the models it used."""
    judges = [j.get("name", "") for j in (line["config"].get("panel") or {}).get("judges", [])]
    return [
        f"- run `{line['run']}` of `{line['store']}` (recipe {line['recipe']}), constitution "
        f"`{str(line['constitution'])[:16]}`, judges: {', '.join(judges) or 'none'}",
        *(f"  - model {name}: `{identity[:24]}`" for identity, name in line["models"].items()),
    ]
