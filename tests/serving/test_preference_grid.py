from __future__ import annotations

import numpy as np
import pytest

from peft_hoe import PreferenceError
from peft_hoe.serving.preference_grid import PreferenceGrid


def test_points_and_names_of_a_grid():
    grid = PreferenceGrid(["a", "b"], 0.25)
    assert [grid.spell(point) for point in grid.points] == ["1,0", "0.75,0.25", "0.5,0.5", "0.25,0.75", "0,1"]


@pytest.mark.parametrize(
    ("preference", "name"),
    [
        ([0.7, 0.3], "0.7,0.3"),
        ([0.70000001, 0.29999999], "0.7,0.3"),
        ({"b": 0.3, "a": 0.7}, "0.7,0.3"),
        ([0.66, 0.34], "0.7,0.3"),
        ([0.64, 0.36], "0.6,0.4"),
        ([1, 0], "1,0"),
    ],
)
def test_one_spelling_of_the_nearest_point(preference, name):
    assert PreferenceGrid(["a", "b"], 0.1).spell(preference) == name


def test_rounding_keeps_the_sum_and_the_points():
    rng = np.random.default_rng(0)
    grid = PreferenceGrid(list("abcd"), 0.05)
    for preference in rng.dirichlet(np.ones(4), 200):
        point = grid.nearest(preference)
        assert point.sum() == pytest.approx(1, abs=1e-12)
        assert np.abs(point - preference).max() < 0.05
        others = np.abs(grid.points - preference).sum(1)
        assert np.abs(point - preference).sum() == pytest.approx(others.min(), abs=1e-9)
    for point in grid.points:
        np.testing.assert_allclose(grid.nearest(point), point, atol=1e-12)


def test_thirds_have_a_name_that_leads_back_to_them():
    grid = PreferenceGrid(list("abc"), 1 / 3)
    assert grid.spell([1 / 3, 1 / 3, 1 / 3]) == "0.333333,0.333333,0.333333"
    assert grid.spell([0.333333, 0.333333, 0.333333]) == "0.333333,0.333333,0.333333"


@pytest.mark.parametrize("step", [0, -0.1, 0.3, 2, float("nan")])
def test_other_steps_are_refused(step):
    with pytest.raises(PreferenceError, match="1 divided by a whole number"):
        PreferenceGrid(["a", "b"], step)


def test_a_step_of_endless_points_is_refused_before_they_are_counted_out():
    with pytest.raises(PreferenceError, match="1e-07, which makes 10000001 preferences of 2 objectives"):
        PreferenceGrid(["a", "b"], 1e-7)
    with pytest.raises(PreferenceError, match="176851 preferences of 4"):  # 103! / (3! 100!)
        PreferenceGrid(list("abcd"), 0.01)
    fine = PreferenceGrid(["a", "b"], 1 / 19999)
    assert len({fine.spell(point) for point in fine.points[:2000]}) == 2000
