from __future__ import annotations

import itertools

import numpy as np
import pytest

from peft_hoe import HoEWarning, PreferenceError, metrics, preference_grid
from peft_hoe.errors import MetricError

PREFERENCES = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
REWARDS = [[0.9, 0.2], [0.6, 0.8], [0.1, 0.7]]


def test_by_hand():
    found = metrics.steerability(REWARDS, PREFERENCES)
    assert found.spearman == pytest.approx([1.0, 0.5])  # ranks 1, 2, 3 against 1, 3, 2
    assert found.order_violations == pytest.approx([0, 1 / 3])
    assert found.expected_utility == pytest.approx((0.9 + 0.7 + 0.8) / 3)
    assert found.control_regret == pytest.approx(0.1 / 3)  # λ = (0, 1) would rather have the second policy
    assert (found.rows, found.preferences, found.warnings) == (3, 3, [])
    assert metrics.spearman(REWARDS, PREFERENCES).tolist() == found.spearman
    assert metrics.order_violations(REWARDS, PREFERENCES).tolist() == found.order_violations
    assert metrics.control_regret(REWARDS, PREFERENCES) == found.control_regret


def test_perfect_and_reversed_control():
    grid = preference_grid(3)
    best = metrics.steerability(np.sqrt(grid), grid)  # the reward of every objective grows with its weight
    assert best.spearman == pytest.approx([1, 1, 1])
    assert best.order_violations == [0, 0, 0]
    worst = metrics.steerability(-grid, grid)
    assert worst.spearman == pytest.approx([-1, -1, -1])
    assert worst.order_violations == [1, 1, 1]
    assert worst.control_regret > 0.3


def test_order_violations_against_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        wanted = preference_grid(3)
        rewards = rng.normal(size=wanted.shape).round(1)
        for i, found in enumerate(metrics.order_violations(rewards, wanted)):
            pairs = [(a, b) for a, b in itertools.permutations(range(13), 2) if wanted[a, i] > wanted[b, i] + 1e-9]
            assert found == np.mean([rewards[a, i] < rewards[b, i] for a, b in pairs])


def test_rows_of_the_same_preference_are_averaged():
    rewards = [[1.0, 0.2], [0.8, 0.2], [0.6, 0.8], [0.1, 0.7]]
    found = metrics.steerability(rewards, [PREFERENCES[0], *PREFERENCES])
    expected = metrics.steerability(REWARDS, PREFERENCES)
    assert (found.rows, found.preferences) == (4, 3)
    assert found.control_regret == pytest.approx(expected.control_regret)
    assert found.spearman == expected.spearman


def test_order_duplicates_and_scale_make_no_difference():
    rng = np.random.default_rng(1)
    wanted = preference_grid(2)
    rewards = rng.normal(size=wanted.shape)
    expected = metrics.steerability(rewards, wanted)
    order = rng.permutation([*range(11), 3, 3, 7])
    for found in (
        metrics.steerability(rewards[order], wanted[order]),
        metrics.steerability(rewards * [2.0, 0.5] + 3, wanted),
    ):
        assert found.spearman == pytest.approx(expected.spearman)
        assert found.order_violations == pytest.approx(expected.order_violations)
    assert metrics.control_regret(rewards * 3 + 1, wanted) == pytest.approx(3 * expected.control_regret)
    assert metrics.control_regret(rewards[order], wanted[order]) == pytest.approx(expected.control_regret)


def test_equal_rows_stay_ties_when_they_are_averaged():
    """0.1 three times has the mean 0.10000000000000002 when it is summed."""
    wanted = [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]
    assert metrics.order_violations([[0.1, 0.1]] * 4, wanted).tolist() == [0, 0]


def test_weights_that_differ_by_rounding_are_equal():
    wanted = [[0.3, 0.7], [0.1 * 3, 0.7], [0.6, 0.4]]
    assert metrics.steerability([[1, 1], [2, 1], [3, 1.5]], wanted).preferences == 2


def test_constant_columns_are_undefined_and_say_so():
    with pytest.warns(HoEWarning, match="objective 1 has the same reward 0.2"):
        found = metrics.steerability([[0.9, 0.2], [0.6, 0.2], [0.1, 0.2]], PREFERENCES)
    assert found.spearman[0] == pytest.approx(1)
    assert np.isnan(found.spearman[1])
    assert found.order_violations == [0, 0]
    assert len(found.warnings) == 1
    with pytest.warns(HoEWarning, match="objective 2 has the same weight 0.2"):
        violations = metrics.order_violations(np.eye(3)[:2], [[0.8, 0, 0.2], [0, 0.8, 0.2]])
    assert violations.tolist()[:2] == [0, 0]
    assert np.isnan(violations[2])


def test_bad_input():
    with pytest.raises(MetricError, match="3 rows of rewards, but 2 preferences"):
        metrics.steerability(REWARDS, PREFERENCES[:2])
    with pytest.raises(MetricError, match="needs at least two"):
        metrics.control_regret(REWARDS, [[0.5, 0.5]] * 3)
    with pytest.raises(MetricError, match="preferences has 3 objectives"):
        metrics.spearman(REWARDS, np.eye(3))
    with pytest.raises(PreferenceError, match="negative"):
        metrics.order_violations(REWARDS, [[1, 0], [2, -1], [0, 1]])
