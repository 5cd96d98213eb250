"""What was learned of how a run's readings become a probability, as the ledger records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import orjson

from prefab.factory.store.store import Read, read_frame
from prefab.judges.stats.preference_calibration import Calibration, Fit

CALIBRATION = "calibration"  # the name of the evaluations that hold one
Source = Literal["human", "oracle", "retest", ""]
RETEST = "the judges' own second answers"
SHARE = "`p_chosen` is the share of the judges' vote for `chosen`, not a calibrated probability"
NOT_LEARNED = f"{SHARE}: the better answers of too few comparisons are known."


@dataclass(slots=True)
class Learned:
    """A run's calibration, and whose word it was learned from.

    Args:
        run: NAME@VERSION.
        kind: Whose word: people's labels, the embedded world's oracle, or the judges' own second
            answers; empty: nobody's.
        source: The same in words, with numbers.
        calibration: How the run's readings become a probability.
    """

    run: str
    kind: Source
    source: str
    calibration: Calibration

    @classmethod
    def from_data(cls, value: Mapping[str, Any]) -> Learned:
        """From the evaluation that records it."""
        calibration = Calibration.from_data(value["calibration"])
        return cls(value["subject"], value["kind"], value["source"], calibration)

    @property
    def fitted(self) -> bool:
        """Whether `p_chosen` is derived with it."""
        return self.calibration.method != "none"

    def sentence(self) -> str:
        """What `p_chosen` of the run is, for its card."""
        c = self.calibration
        if not self.fitted:
            return f"{SHARE}: {c.reason}."
        if self.kind == "retest":
            return (
                "`p_chosen` is the judges' own probability that `chosen` is better: no better answer "
                "is known, so it is not checked against the truth. The log-odds of their readings are "
                f"added up and divided by {c.temperature:.2f}, because the judges' second answers to "
                f"{c.n_outcomes:,} comparisons name the same answer in {_right(c.after)}. "
                "`vote_share` is the share of the judges' vote."
            )
        return (
            f"`p_chosen` is the probability that `chosen` is better, calibrated ({c.method}) on "
            f"{c.n_outcomes:,} comparisons of {c.n_groups:,} groups of prompts whose better answer "
            f"is known from {self.source}; expected calibration error {_error(c.before)} before and "
            f"{_error(c.after)} after, on prompts that it was not fitted on. `vote_share` is the "
            "share of the judges' vote."
        )


def _error(fit: Fit | None) -> str:
    if fit is None:
        return "unknown"
    if fit.ece_low is None or fit.ece_high is None:
        return f"{fit.ece:.3f}"
    return f"{fit.ece:.3f} ({fit.ece_low:.3f} to {fit.ece_high:.3f})"


def _right(fit: Fit | None) -> str:
    """The share of the outcomes that are the more probable answer."""
    if fit is None:
        return "an unknown share"
    n = sum(n for _, _, n in fit.reliability)
    return f"{sum(share * n for _, share, n in fit.reliability) / n:.1%}"


def record_of(folder: Path, run: int, read: Read | None = None) -> dict[str, Any] | None:
    """The evaluation that records what was learned last for a run, as the store lies; None where
    nothing was. `read`: of the open store.
    """
    sql = (
        "SELECT value FROM evals WHERE name = ? AND (value->>'$.run')::INTEGER = ? "
        "ORDER BY rowid DESC LIMIT 1"
    )
    rows = (read or partial(read_frame, folder))(sql, [CALIBRATION, run]).rows()
    return orjson.loads(rows[0][0]) if rows else None


def calibration_of(folder: Path, run: int) -> Learned | None:
    """What was learned last for a run, as the store lies; None where nothing was."""
    value = record_of(folder, run)
    return None if value is None else Learned.from_data(value)
