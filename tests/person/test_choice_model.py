"""What a choice tells, against numbers by hand."""

import numpy as np

from peft_hoe.person.choice_model import grid, information, log_choice


def test_information_of_two_people_who_want_opposites():
    """Each takes the own text with probability 3/4, so the choice tells ln 2 less the entropy of 3/4."""
    points = np.array([[1.0, 0.0], [0.0, 1.0]])
    differences = np.array([[1.0, -1.0], [0.5, 0.5]])
    found = information(differences, points, np.array([np.log(3.0)]), np.ones((2, 1)))
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(found[0], np.log(2) - entropy, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[1], 0, rtol=0, atol=1e-12)  # both gain the same: the choice says nothing of λ


def test_an_unknown_sharpness_is_averaged_given_the_preference():
    """κ = ln 3 or 0, equally likely: p = (3/4 + 1/2) / 2 = 5/8 for the one, 3/8 for the other."""
    points = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = information(np.array([[1.0, -1.0]]), points, np.array([np.log(3.0), 0.0]), np.full((2, 2), 0.5))
    entropy = -(0.625 * np.log(0.625) + 0.375 * np.log(0.375))
    np.testing.assert_allclose(found, [np.log(2) - entropy], rtol=0, atol=1e-12)


def test_log_probability_of_a_choice():
    found = np.exp(log_choice(np.array([1.0, -1.0]), np.array([np.log(3.0), 0.0])))
    np.testing.assert_allclose(found, [[0.75, 0.5], [0.25, 0.5]], rtol=0, atol=1e-12)


def test_the_grid_lies_on_the_simplex():
    for n in (1, 2, 3, 4, 5):
        np.testing.assert_allclose(grid(n).sum(axis=1), 1, rtol=0, atol=1e-12)
