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
    metrics = {k: v for k, v in result["metrics"].items() if isinstance(v, (int, float))}
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
        "| | |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in sorted(metrics.items())),
        "",
    ]
    curve = [h for h in history if "eval_loss" in h]
    if len(curve) > 1:
        lines += [
            "Validation loss by step: "
            + ", ".join(f"{h['step']}: {h['eval_loss']:.4f}" for h in curve),
            "",
        ]
    lines += ["## Where the data came from", "", f"Token rows: digest `{record['data']}`.", ""]
    for source in config.data.sources:
        lines.append(f"- {json.dumps(source.model_dump(exclude_defaults=True))}")
    for line in record["lineage"]:
        judges = (
            ", ".join(
                j.get("name", "") for j in (line["config"].get("panel") or {}).get("judges", [])
            )
            or "none"
        )
        lines += [
            f"- run `{line['run']}` of `{line['store']}` (recipe {line['recipe']}), constitution "
            f"`{str(line['constitution'])[:16]}`, judges: {judges}",
            *(f"  - model {name}: `{identity[:24]}`" for identity, name in line["models"].items()),
        ]
    lines += [f"- {note}" for note in record["notes"]]
    lines += [
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
