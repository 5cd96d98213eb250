"""Recorded evaluations of a store (the table `evals`), arranged for its pages: policies on the same
prompts, win rates, and the bias probes of judges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Recorded = Mapping[str, Any]  # the value of a row of `evals`
WIN_FIGURES = ("win_rate", "length_controlled", "difference")
AGAINST = "against "  # begins the names of figures that compare a policy with the baseline


def latest_policies(rows: Iterable[Recorded]) -> dict[str, Recorded]:
    """The last evaluation of each policy, by its name. `rows` come oldest first."""
    found: dict[str, Recorded] = {}
    for value in rows:
        if value.get("name") == "eval policy":
            found[str(value.get("policy") or value["subject"])] = value
    return found


def latest_probes(rows: Iterable[Recorded]) -> dict[str, Recorded]:
    """The last result of `prefab audit judge` for each judge; of each probe the last one. `rows`
    come oldest first.
    """
    found: dict[str, dict[str, Any]] = {}
    for value in rows:
        if value.get("name") == "audit judge":
            former = found.get(str(value["subject"]), {}).get("metrics", {})
            found[str(value["subject"])] = {**value, "metrics": {**former, **value["metrics"]}}
    return dict(found)


def win_rates(policies: Mapping[str, Recorded]) -> list[dict[str, Any]]:
    """How often each policy's answer beats the baseline's on the same prompts: policy, against
    whom, which figure, and its value.
    """
    found = []
    for policy, value in policies.items():
        for key, e in value["metrics"].items():
            against, _, what = key.rpartition(": ")
            if against.startswith(AGAINST) and what in WIN_FIGURES:
                found.append({"policy": policy, "against": against, "what": what, "e": e})
    return found


def side_by_side(policies: Mapping[str, Recorded], most: int = 8) -> list[dict[str, Any]]:
    """The recorded answers of policies to the same prompts: `turns` (role and text each) and
    `answers` (policy, text and score each), for prompts that two policies or more answered.
    """
    found: dict[str, dict[str, Any]] = {}
    for policy, value in policies.items():
        for example in value.get("examples", ()):
            key = str(example["turns"])
            row = found.setdefault(key, {"turns": example["turns"], "answers": []})
            row["answers"].append((policy, example["text"], example.get("score")))
    return [row for row in found.values() if len(row["answers"]) > 1][:most]


def checkpoint_samples(steps: Sequence[Recorded]) -> list[dict[str, Any]]:
    """The recorded answers at each evaluation of a training: `turns` of each prompt, and `answers`
    (step, text, reward model's score and ground truth each).

    Args:
        steps: The metrics of the training's steps, in order.
    """
    found: dict[str, dict[str, Any]] = {}
    for metrics in steps:
        for sample in metrics.get("eval/samples", ()):
            row = found.setdefault(str(sample["turns"]), {"turns": sample["turns"], "answers": []})
            row["answers"].append(
                (metrics["step"], sample["text"], sample["proxy"], sample["gold"])
            )
    return list(found.values())
