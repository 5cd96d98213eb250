"""The simulation of the alarm: it is silent where nothing changes, and comes soon after a fall."""

from __future__ import annotations

import numpy as np

from benchmarks import alarm


def test_a_simulated_run_is_watched_as_a_real_one():
    rng, setting = np.random.default_rng(0), alarm.Setting(0.05, 400, 10, 3)
    assert alarm.watch(rng, lambda u, step: (u < 0.8).astype(float), setting) is None
    step = alarm.watch(rng, lambda u, step: (u < 0.9 - 0.05 * step).astype(float), setting)
    assert step is not None and step < 12


def test_the_loss_is_a_share_of_what_a_recorded_run_gained():
    gold = [0.5, 0.6, 0.7, 0.8, 0.9, 0.85, 0.8, 0.75]
    run = {
        "start": 0.5,
        "best": 0.9,
        "evaluations": [{"step": 3 * k, "gold": g} for k, g in enumerate(gold)],
    }
    lost = alarm.lost_at_alarm(np.random.default_rng(0), run, alarm.Setting(0.02, 900, 12, 3), 3)
    assert all(0 < x < 0.5 for x in lost)
