"""The scale of a payoff table whose prompts are drawn."""

from __future__ import annotations

import numpy as np

from peft_hoe.objectives import RewardNormalizer
from peft_hoe.objectives.drawn_scale import DrawnScale

# Experts a and b on two prompts: in a 1 and 3 against 0 and 0, in b 2 and 0 against 0 and 6.
TABLE = RewardNormalizer.measured([[[[1.0, 0.0]], [[3.0, 6.0]]], [[[0.0, 2.0]], [[0.0, 0.0]]]], ["a", "b"])
DRAWS = np.asarray([[0, 0], [1, 1], [0, 1]])


def test_nadir_and_ideal_of_drawn_prompts_by_hand():
    """In b the better expert is the other one on each prompt: the ideal is the maximum of the drawn means."""
    scale = DrawnScale.of(TABLE, DRAWS, own_prompts=True, seed=0)
    np.testing.assert_allclose(scale.payoffs[2], [[2, 3], [0, 1]])  # experts by objectives
    np.testing.assert_allclose(scale.ideal, [[1, 2], [3, 6], [2, 3]])
    np.testing.assert_allclose(scale.nadir, [[0, 0], [0, 0], [0, 1]])
    points = np.asarray([[[1.0, 1.0]], [[1.0, 1.0]], [[1.0, 1.0]]])  # (R, K, N)
    np.testing.assert_allclose(scale.normalize(points), [[[1, 1 / 2]], [[1 / 3, 1 / 6]], [[1 / 2, 0]]])


def test_experts_that_do_not_differ_in_a_replicate_are_no_scale():
    same = RewardNormalizer.measured([[[[1.0, 0.0]], [[1.0, 0.0]]], [[[0.0, 2.0]], [[1.0, 1.0]]]], ["a", "b"])
    scale = DrawnScale.of(same, np.asarray([[1, 1]]), own_prompts=True, seed=0)
    np.testing.assert_allclose(scale.normalize(np.full((1, 1, 2), 0.5)), [[[np.nan, 0.5]]])


def test_a_table_of_other_prompts_is_drawn_on_its_own():
    """Also one of another number of prompts, whatever is said."""
    apart = DrawnScale.of(TABLE, np.zeros((400, 2), dtype=int), own_prompts=False, seed=0)
    np.testing.assert_allclose(sorted({*apart.ideal[:, 0].tolist()}), [1, 2, 3])
    assert abs(np.mean(apart.ideal[:, 0] == 2) - 0.5) < 0.1  # four standard errors
    more = DrawnScale.of(TABLE, np.zeros((400, 3), dtype=int), own_prompts=True, seed=0)
    np.testing.assert_array_equal(more.ideal, apart.ideal)


def test_given_numbers_are_the_same_in_each_replicate():
    scale = DrawnScale.of(RewardNormalizer([[2.0, 1.0], [0.0, 5.0]], ["a", "b"]), DRAWS, own_prompts=True, seed=0)
    np.testing.assert_array_equal(scale.ideal, [[2, 5]] * 3)
    np.testing.assert_array_equal(scale.nadir, [[0, 1]] * 3)
