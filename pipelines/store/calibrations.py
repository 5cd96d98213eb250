"""What was learned of how a run's readings become a probability, as the store has it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from prefab.factory.store.store import read_frame
from prefab.judges.stats.preference_calibration import Calibration, Fit

CALIBRATION = "calibration"  # the name of the evaluations that hold one


@dataclass(slots=True)
class Learned:
    """A run's calibration, and whose word it was learned from."""

    run: str
    source: str
    calibration: Calibration

    def sentence(self) -> str:
        """What `p_chosen` of the run is, for its card."""
        c = self.calibration
        if c.method == "none":
            return (
                f"`p_chosen` is the share of the judges' vote for `chosen`, not a calibrated "
                f"probability: {c.reason} ({self.source})."
            )
        return (
            f"`p_chosen` is the probability that `chosen` is better, calibrated ({c.method}) on "
            f"{c.n_outcomes:,} comparisons of {c.n_groups:,} groups of prompts whose better answer "
            f"is known from {self.source}; expected calibration error {_error(c.before)} before and "
            f"{_error(c.after)} after, on prompts that it was not fitted on. `vote_share` is the "
            "share of the judges' vote."
        )


NOT_LEARNED = (
    "`p_chosen` is the share of the judges' vote for `chosen`, the mean of both orders unless a line "
    "below says otherwise. It is not a calibrated probability: `prefab calibrate` makes it one, from "
    "people's labels."
)


def _error(fit: Fit | None) -> str:
    return "unknown" if fit is None else f"{fit.ece:.3f}"


def calibration_of(folder: Path, run: int) -> Learned | None:
    """What was learned last for a run, as the store lies; None where nothing was."""
    sql = "SELECT value FROM evals WHERE name = ? ORDER BY rowid DESC"
    values: list[dict[str, Any]] = [
        orjson.loads(text) for (text,) in read_frame(folder, sql, [CALIBRATION]).iter_rows()
    ]
    value = next((value for value in values if value["run"] == run), None)
    if value is None:
        return None
    return Learned(value["subject"], value["source"], Calibration.from_data(value["calibration"]))
