"""The intervals hold the truth as often as they say, by a small run of the simulation."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import coverage


@pytest.mark.parametrize(
    ("runs", "least"), [(20, 0.7), pytest.param(80, 0.87, marks=pytest.mark.slow)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(runs, least):
    """Each in at least 87% of 80 simulations, which one that covers 95% misses once in 300
    times; all together in 93 to 97%. `python -m benchmarks.coverage` has 2,000 a setting."""
    found = {
        (name, setting): row["covered"]
        for number, (setting, (of, arguments)) in enumerate(coverage.SETTINGS.items())
        for name, row in coverage.simulate(of, arguments, runs, 100 + number).items()
    }
    assert len(found) > 40
    assert {place: covered for place, covered in found.items() if covered < least} == {}
    assert 0.93 <= np.mean(list(found.values())) <= 0.97
