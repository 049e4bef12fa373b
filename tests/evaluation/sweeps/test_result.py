"""Runs of training as one sweep."""

from __future__ import annotations

import numpy as np
import pytest

from peft_hoe.errors import HoEError
from peft_hoe.evaluation import Sweep
from peft_hoe.objectives import RewardNormalizer

LINE = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]


def test_stacks_hold_the_runs_spread(make_sweep):
    runs = [make_sweep(np.asarray(LINE) + shift, preferences=LINE) for shift in (-0.1, 0.0, 0.1)]
    stacked = Sweep.stack(runs)
    assert stacked.values.shape == (3, 3, 4, 2)
    np.testing.assert_allclose(stacked.points, LINE, atol=1e-12)
    interval = stacked.intervals(replicates=300)
    assert interval.low[0, 0] == pytest.approx(0.9)  # three times the worst run, 1 in 27
    assert interval.high[0, 0] == pytest.approx(1.1)
    assert stacked.metrics(replicates=10).runs == 3


def test_stacks_of_own_corners_have_the_mean_corners(make_sweep):
    settings = {"preferences": LINE, "payoff_source": "own corners"}
    runs = []
    for shift in (0.0, 0.2):
        corners = np.asarray([LINE[0], LINE[2]]) + shift
        runs.append(make_sweep(np.asarray(LINE) + shift, normalizer=RewardNormalizer(corners, ["a", "b"]), **settings))
    np.testing.assert_allclose(Sweep.stack(runs).normalizer.payoff, [[1.1, 0.1], [0.1, 1.1]])


def test_stacks_of_what_differs(make_sweep):
    first = make_sweep(LINE, preferences=LINE)
    for other, match in (
        (make_sweep(LINE, preferences=LINE, prompts=5), "differ in prompts"),
        (make_sweep(LINE, preferences=LINE[::-1]), "differ in preferences"),
        (make_sweep(LINE, preferences=LINE, normalizer=RewardNormalizer(2 * np.eye(2), ["a", "b"])), "payoff tables"),
        (make_sweep(LINE, preferences=LINE, reference_point=-0.2), "reference_point"),
    ):
        with pytest.raises(HoEError, match=match):
            Sweep.stack([first, other])
    with pytest.raises(HoEError, match="no sweeps"):
        Sweep.stack([])
