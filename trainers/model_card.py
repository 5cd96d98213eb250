"""The card of a trained model: what it came from, how it was trained, how it does, and what it is
not for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_FOR = {
    "reward": "It ranks answers to prompts like those it was trained on, by the labels it was trained on. It is no judge of "
    "truth or safety, and a policy that is optimised against it long enough finds its faults.",
    "policy": "It was trained towards labels that a model gave under one constitution. What those principles do not name was "
    "not improved, and nothing here says that it is safe to deploy.",
}


def write_card(
    out: Path,
    stage: str,
    config: Any,
    result: Mapping[str, Any],
    record: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
) -> None:
    """README.md beside the weights. `record` holds identity, data digest, lineage and notes of the
    training.
    """
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [prefab, {stage}]",
        "---",
        "",
        f"# {out.name}",
        "",
        f"Trained by Prefab's stage `{stage}` from `{config.model}` ({record['identity']['weights'][:16]}) in "
        f"{result['steps']:,} steps on {result['train']:,} rows, validated on {result['val']:,}.",
        "",
        "## Results on the validation split",
        "",
        *_results(result["metrics"], history),
        "## Where the data came from",
        "",
        f"Token rows: digest `{record['data']}`.",
        "",
        *(f"- {json.dumps(s.model_dump(exclude_defaults=True))}" for s in config.data.sources),
        *(line for source in record["lineage"] for line in _lineage(source)),
        *(f"- {note}" for note in record["notes"]),
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
    (out / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _results(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of final metrics, and the validation loss by step."""
    numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
    lines = [
        "| | |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in sorted(numbers.items())),
        "",
    ]
    curve = [f"{h['step']}: {h['eval_loss']:.4f}" for h in history if "eval_loss" in h]
    return [*lines, f"Validation loss by step: {', '.join(curve)}", ""] if curve[1:] else lines


def _lineage(line: Mapping[str, Any]) -> list[str]:
    """The lines on one run of a store: its constitution, its judges, the models it used."""
    judges = [j.get("name", "") for j in (line["config"].get("panel") or {}).get("judges", [])]
    return [
        f"- run `{line['run']}` of `{line['store']}` (recipe {line['recipe']}), constitution "
        f"`{str(line['constitution'])[:16]}`, judges: {', '.join(judges) or 'none'}",
        *(f"  - model {name}: `{identity[:24]}`" for identity, name in line["models"].items()),
    ]
