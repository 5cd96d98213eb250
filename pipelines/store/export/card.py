"""What stands beside exported data: the dataset card, a page with charts and examples, the
constitution and the pipeline file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from prefab.pipelines.store.run_page import (
    RunPage,
    cut,
    model_names,
    write_run_page,
)

CARD, PAGE = "README.md", "report.html"
CONSTITUTION, PIPELINE = "source/constitution.yaml", "source/pipeline.yaml"
BESIDE = (CARD, PAGE, CONSTITUTION, PIPELINE)
SIZES = (
    (1e3, "n<1K"),
    (1e4, "1K<n<10K"),
    (1e5, "10K<n<100K"),
    (1e6, "100K<n<1M"),
    (1e7, "1M<n<10M"),
)
BARS = "▁▂▃▄▅▆▇█"
PAGE_EXAMPLES = 2  # of each kind, on the page beside the data
OPEN = ("prefab-tiny", "prefab-nano")  # embedded models: what they write is CC0-1.0 (see NOTICE)
WHAT = {
    "preference": "decided pairs (DPO, reward models)",
    "conversations": "decided pairs whose answers follow different turns (reward models)",
    "reward": "decided pairs of one question (reward models)",
    "unpaired": "single answers with a thumb up or down (KTO)",
    "prompts": "prompts alone (GRPO, PPO)",
    "sft": "demonstrations (SFT)",
}
# of the formats `trl`, `jsonl` and `text`
COLUMNS = {
    "preference": ": `prompt`, `chosen`, `rejected`, `p_chosen`; `method` chose the pair",
    "conversations": ": `chosen`, `rejected` as whole conversations, `p_chosen`",
    "unpaired": ": `prompt`, `completion`, `label`, `p_win`",
    "prompts": ": `prompt`",
    "sft": ": `prompt`, `completion`; `revised` says whether the text was rewritten",
}


@dataclass(slots=True)
class ExportReport:
    """What was written: rows by dataset and split, and what was left out and why."""

    run: str
    format: str
    out: Path
    dry_run: bool = False
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # by dataset/split: a file, or a pattern
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)  # a row of each dataset
    repository: str = ""  # the address on the hub that it was pushed to

    def rows(self) -> list[tuple[str, str, int]]:
        """One row a file."""
        return [
            (name, split, n) for name, splits in self.counts.items() for split, n in splits.items()
        ]

    def first(self) -> str:
        """A dataset that there is."""
        return next(iter(self.counts), "")

    def data(self) -> dict[str, Any]:
        """As plain data, with the examples only where nothing was written."""
        rest = asdict(self)
        if not self.dry_run:
            del rest["examples"]
        return {**rest, "out": str(self.out)}


def write_beside(stage: Path, page: RunPage, record: dict[str, Any], report: ExportReport) -> None:
    """Write `BESIDE` into an export's folder.

    Args:
        stage: The folder with the data.
        page: What the page of the run shows.
        record: The run's row of the table `runs`.
        report: What was exported.
    """
    config = json.loads(record["config"])
    (stage / "source").mkdir()
    write_run_page(stage / PAGE, page, record["started_at"])
    (stage / CONSTITUTION).write_text(
        page.constitution["source"] or "# this run has no constitution\n", encoding="utf-8"
    )
    text = yaml.safe_dump(_portable(config), sort_keys=False, allow_unicode=True)
    (stage / PIPELINE).write_text(text, encoding="utf-8")
    card = _card(config, str(record["recipe"]), page, report)
    (stage / CARD).write_text(card, encoding="utf-8")


def _portable(value: Any) -> Any:
    """The configuration without the folders of the machine that it ran on."""
    if isinstance(value, dict):
        return {name: _portable(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_portable(one) for one in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _card(
    config: dict[str, Any],
    recipe: str,
    page: RunPage,
    report: ExportReport,
) -> str:
    """The dataset card: what the hub and `datasets` read, then what a person should know."""
    models = model_names(config)
    lines = [
        *_metadata(config, models, report),
        "",
        f"# {report.run}",
        "",
        f"**{page.headline}**",
        "",
        *(f"{line}\n" for line in page.trust),
        _origin(config, recipe, models, page.constitution["version"]),
        "",
        _licence(config, models, page.constitution["licence"]),
        "",
        "| dataset | split | rows |",
        "|---|---|---|",
        *(f"| {name} | {split} | {n:,} |" for name, split, n in report.rows()),
        "",
        *(f"- `{name}`: {_what(name, report.format)}" for name in report.counts),
        "",
        "```python",
        "from datasets import load_dataset",
        f'data = load_dataset("{report.out.name}", "{report.first()}", split="train")',
        "```",
        "",
        *_histogram(page.histogram),
        f"A row of `{report.first()}`:",
        "",
        "```json",
        json.dumps(
            shortened(report.examples[report.first()]), indent=1, ensure_ascii=False, default=str
        ),
        "```",
        "",
        "`prompt_id`, `preference`, `chosen_sample`, `rejected_sample`, `sample` and `run` lead "
        "back to the store. Rows that share a group never stand in two splits. "
        f"[{PAGE}]({PAGE}) has charts and examples, [{CONSTITUTION}]({CONSTITUTION}) the "
        f"constitution, [{PIPELINE}]({PIPELINE}) the configuration.",
        "",
        *(f"- {note}" for note in report.notes),
        "",
        "| principle | title | version | question to the judge |",
        "|---|---|---|---|",
        *(
            f"| {p['principle']} | {p['title']} | {p['digest'][:12]} | {(p['compare'] or '').replace('|', ' ')} |"
            for p in page.constitution["principles"]
        ),
    ]
    return "\n".join(lines) + "\n"


def _what(name: str, format: str) -> str:
    """What a dataset holds."""
    columns = COLUMNS.get(name, "") if format in ("trl", "jsonl", "text", "csv") else ""
    return WHAT.get(name, "a table of the store") + columns


def _metadata(config: dict[str, Any], models: list[str], report: ExportReport) -> list[str]:
    """The card's first lines, which the hub reads."""
    rows = sum(n for _, _, n in report.rows())
    size = next((words for most, words in SIZES if rows < most), "n>10M")
    lines = [
        "---",
        f"pretty_name: {report.run}",
        f"license: {'cc0-1.0' if _is_open(config, models) else 'other'}",
        f"size_categories: ['{size}']",
        "task_categories: [text-generation]",
        "tags: [prefab, rlaif, preference]",
        "configs:",
    ]
    for name, splits in report.counts.items():
        lines.append(f"- config_name: {name}")
        lines += ["  default: true"] if name == report.first() else []
        lines.append("  data_files:")
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {report.files[f'{name}/{split}']}"]
    return [*lines, "---"]


def _is_open(config: dict[str, Any], models: list[str]) -> bool:
    """Whether all texts are of the embedded world."""
    world = (config.get("prompts") or {}).get("source") == "microworld"
    return world and set(models) <= set(OPEN)


def _origin(config: dict[str, Any], recipe: str, models: list[str], version: str) -> str:
    if config.get("origin"):
        return "Made elsewhere, and imported by Prefab: a line below says from what file."
    named = config.get("constitution")
    names = "`, `".join(
        Path(name).name for name in ([named] if isinstance(named, str) else named or [])
    )
    asked = f" Models: {', '.join(f'`{name}`' for name in models)}." if models else ""
    return (
        f"Made by Prefab's recipe `{recipe}` under the constitution `{names}` (version {version}).{asked} The answers, "
        "critiques and judgments are a model's, not people's."
    )


def _licence(config: dict[str, Any], models: list[str], constitution: str) -> str:
    if _is_open(config, models):
        return "Licence: CC0-1.0, as everything that the embedded world generates."
    told = f" The constitution is under {constitution}." if constitution else ""
    return (
        "Licence: that of the prompts, and the terms of the models that wrote the answers. Fill in "
        f"`license` above before you publish this data.{told}"
    )


def _histogram(counts: list[int]) -> list[str]:
    """The numbers of decided preferences by `p_chosen`, as bars of text; nothing without any."""
    upper = counts[len(counts) // 2 :]
    most = max(upper, default=0)
    if not most:
        return []
    bars = "".join(BARS[min(len(BARS) - 1, n * len(BARS) // most)] if n else " " for n in upper)
    told = f"{sum(upper):,} decided preferences by `p_chosen`, from .5 to 1"
    return [f"{told} (highest bar: {most:,}):", "", f"    .5 |{bars}| 1", ""]


def shortened(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose long texts are cut."""

    def short(value: Any) -> Any:
        if isinstance(value, str):
            return cut(value)
        if isinstance(value, list):
            return [short(one) for one in value]
        return {k: short(v) for k, v in value.items()} if isinstance(value, dict) else value

    return {name: short(value) for name, value in row.items()}
