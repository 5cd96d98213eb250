"""`prefab demo --real`: real questions to a small real model, from drafts to trained policies."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefab.factory.console import duration, every_table_notes, say, table, warn
from prefab.factory.engines.packaged import PACKAGED, set_up
from prefab.factory.errors import ConfigError
from prefab.factory.paths import PACKAGE
from prefab.pipelines.cli.options import hint_command

MODEL = "smollm2-135m"
# Measured by benchmarks/human.py on 120 pairs of LLMBar: benchmarks/human.md
WORTH = (
    "smollm2-135m as a judge: 65 of 120 LLMBar pairs could be read, of those .65 are right (.52 to "
    ".75; chance .5), and none gets the same verdict in both orders: this shows how the loop works, "
    "not which answer is better"
)
PRESET = PACKAGE / "pipelines" / "presets" / "real.yaml"
CHECKS = PACKAGE / "prompts" / "everyday-checks.jsonl"
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"learning_rate": 2e-4, "epochs": 1},
    "dpo": {"learning_rate": 1e-4, "epochs": 2},
}
EXAMPLE = """
SELECT p.messages, d.text AS draft, c.principle, c.text AS critique, r.text AS revision
FROM samples d JOIN prompts p USING (prompt)
JOIN samples r ON r.run = d.run AND r.prompt = d.prompt AND r.parent = d."index"
JOIN critiques c ON c.run = d.run AND c.prompt = d.prompt AND c."index" = d."index" AND c.principle = r.principle
WHERE d.run = ? AND d.parent < 0 AND c.fault AND r.text IS NOT NULL ORDER BY length(d.text) LIMIT 1
"""
SAMPLES = 4  # answers of each policy to each held-out prompt


def demo_real(
    store: Path,
    sets: Sequence[str],
    train: bool,
    as_json: bool,
    write: Callable[[Any], None],
) -> int:
    """Set the model up, run the preset, measure agreement, export, train and evaluate.

    Args:
        store: Where the answers are kept; the same command continues a run that was stopped.
        sets: Overrides of the preset, as `--set` takes them.
        train: Whether to train and evaluate policies too.
        as_json: Print one JSON object instead of tables.
        write: Prints that object.

    Returns:
        The exit code.
    """
    from prefab.pipelines.cli.run_report import next_command
    from prefab.pipelines.run.runner import run

    say(f"{PACKAGED[MODEL].summary}.", stderr=True)
    took: dict[str, float] = {}
    began = time.monotonic()
    set_up(MODEL)
    took["model"] = time.monotonic() - began
    result = run(PRESET, [f"store={store}", *sets], quiet=False)
    took["data"] = time.monotonic() - began - sum(took.values())
    if result.state != "done":
        return next_command(result, shlex.join(["prefab", "demo", "--real", "--store", str(store)]))
    with every_table_notes(WORTH):
        found = {"policies": None, "right": None} | _after_run(store, result, as_json)
        if train:
            try:
                found |= train_and_evaluate(store, result, as_json)
            except ConfigError as error:  # so few prompts that a split is empty
                warn(f"no training: {error}")
            took["training"] = time.monotonic() - began - sum(took.values())
    if as_json:
        write({"run": result.summary(), **found, "worth": WORTH, "seconds": took})
    else:
        took["in all"] = time.monotonic() - began
        say(" · ".join(f"{part} {duration(s)}" for part, s in took.items()))
    hint_command("sql", "--store", store, "SELECT prompt, text FROM samples LIMIT 5")
    say("A model whose data is of use:")
    hint_command("run", "real", "--set", "engines.local.model=Qwen/Qwen3-8B")
    return 0


def _after_run(store: Path, result: Any, as_json: bool) -> dict[str, Any]:
    """What was made, with an example; agreement of the judges; the exported files."""
    from prefab.pipelines.cli.run_report import report
    from prefab.pipelines.quality import agreement
    from prefab.pipelines.quality.agreement_tables import show
    from prefab.pipelines.store.export.base import export

    name = f"{result.name}@{result.version}"
    agreed = agreement.measure(store, name, gold="none", examples=1)
    out = store.with_name(f"{store.name}-out")
    exported = export(store, out, "trl", name)
    if not as_json:
        report(result)
        _show_example(store, result.run)
        show(agreed, groups=1)
        table(f"Exported to {out}", ("data", "split", "rows"), exported.rows())
    return {"agreement": agreed, "export": exported.data()}


def _show_example(store: Path, run: int) -> None:
    """One question with a draft, its critique, its revision and the preference about its drafts."""
    from prefab.pipelines.store.fill import query

    rows = query(store, EXAMPLE, [run])
    for row in rows.iter_rows(named=True):
        question = json.loads(row["messages"])[-1][1]
        cells = [("question", question), ("draft", row["draft"])]
        cells += [
            (f"critique ({row['principle']})", row["critique"]),
            ("revision", row["revision"]),
        ]
        table("An example, as the model wrote it", ("", ""), cells)


def train_and_evaluate(
    store: Path, result: Any, as_json: bool, model: str = MODEL
) -> dict[str, Any]:
    """Train SFT and DPO with LoRA on the run, and set them against the model as it was, on prompts
    of the test split.
    """
    from prefab.pipelines.cli.demo_training import overrides
    from prefab.pipelines.evaluation.policy import PolicyEvalConfig, evaluate_policies
    from prefab.pipelines.evaluation.report import show
    from prefab.pipelines.training import stages

    name = f"{result.name}@{result.version}"
    out = store / "trained" / f"{result.name}-{result.version}"
    source = {"store": str(store), "run": name, "truncated": True}
    for stage, settings in STAGES.items():
        changes = overrides(
            model=model,
            out=str(out / stage),
            data__sources=[source],
            lora={"rank": 16, "alpha": 32.0},
            batch_size=8,
            micro_batch=4,
            keep="last",
            **settings,
        )
        stages.train(stage, Path(stage), changes, as_json)
    config = PolicyEvalConfig.model_validate(
        {
            "policies": {"base": model, **{stage: str(out / stage) for stage in STAGES}},
            "prompts": {"source": str(PACKAGE / "prompts" / "everyday.jsonl"), "split": "test"},
            "samples": SAMPLES,
            "batch": 16,
            "store": str(store),
            "out": str(out / "evaluation"),
        }
    )
    report = evaluate_policies(config, as_json)
    checked = check_answers(out / "evaluation" / "answers.jsonl")
    if not as_json:
        show(report)
        table(
            "Answers to held-out questions with a known answer",
            ("policy", "answers", "right"),
            [(policy, n, right) for policy, (right, n) in checked.items()],
        )
    return {"policies": report.data(), "right": checked}


def check_answers(file: Path) -> dict[str, tuple[float, int]]:
    """By policy, the share of right answers to the questions whose answer is known, and their
    number.
    """
    known = {
        row["prompt"]: re.compile(row["reference"])
        for row in map(json.loads, CHECKS.read_text(encoding="utf-8").splitlines())
    }
    hits: dict[str, list[bool]] = {}
    for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        pattern = known.get(row["prompt"])
        if pattern is not None:
            hits.setdefault(row["policy"], []).append(bool(pattern.search(row["text"])))
    return {policy: (sum(found) / len(found), len(found)) for policy, found in hits.items()}
