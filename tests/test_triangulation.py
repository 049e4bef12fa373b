"""The mesh over preferences."""

import numpy as np
import pytest

from peft_hoe import PreferenceError, das_dennis
from peft_hoe.triangulation import edges, triangulate, weights_at


def test_two_objectives_are_neighbours_in_order():
    points = np.asarray([[1, 0], [0, 1], [0.3, 0.7]])
    assert triangulate(points).tolist() == [[1, 2], [2, 0]]
    assert edges(triangulate(points)).tolist() == [[0, 2], [1, 2]]


@pytest.mark.parametrize(("n", "partitions"), [(2, 7), (3, 4), (3, 6), (4, 3)])
def test_a_grid_is_covered_once(n, partitions):
    points = das_dennis(n, partitions)
    simplices = triangulate(points)
    assert np.abs(np.linalg.det(points[simplices])).sum() == pytest.approx(1, abs=1e-9)  # the whole has determinant 1
    rng = np.random.default_rng(0)
    for point in [*rng.dirichlet(np.ones(n), size=20), *points]:
        weights = weights_at(point, points, simplices)
        np.testing.assert_allclose(weights @ points, point, rtol=0, atol=1e-9)
        assert weights.min() >= 0
        assert (weights > 0).sum() <= n


def test_outside_of_all():
    points = np.asarray([[1, 0], [0.5, 0.5]])
    assert weights_at(np.asarray([0.2, 0.8]), points, triangulate(points)) is None


@pytest.mark.parametrize("points", [np.eye(3)[:2], np.asarray([[1, 0, 0], [0, 1, 0], [0.5, 0.5, 0]])])
def test_points_on_a_line(points):
    with pytest.raises(PreferenceError, match="lie on fewer than 2 dimensions"):
        triangulate(points)
