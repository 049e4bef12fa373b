from __future__ import annotations

import itertools

import numpy as np
import pytest

from peft_hoe import ExpertError
from peft_hoe.routing import (
    PreferenceRouter,
    Subdivision,
    check_apart,
    coarse_weights,
    in_hull,
    project_on_hull,
    voting_set,
)

CORNERS = np.eye(3)
FIGURE_2 = np.vstack([CORNERS, [[1 / 3] * 3]])
MIDPOINTS = np.array([[0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
NO_ROUTERS = np.zeros((0, 3))


def test_figure_2():
    router = PreferenceRouter(FIGURE_2, MIDPOINTS, ["e1", "e2", "e3", "centroid", "r12", "r13", "r23"])
    route = router.route(np.array([5, 3, 1]) / 9)
    assert route.experts.keys() == {"e1", "centroid", "r12"}
    for name, weight in {"e1": 2 / 9, "centroid": 3 / 9, "r12": 4 / 9}.items():
        assert abs(route.experts[name] - weight) < 1e-12
    assert route.distance == 0


@pytest.mark.parametrize("n", [2, 3, 5])
def test_weights_are_a_sparse_convex_combination_that_gives_the_preference(n):
    corners = np.vstack([np.eye(n), np.full((1, n), 1 / n)])
    pairs = itertools.combinations(range(n), 2)
    middles = np.array([(np.eye(n)[i] + np.eye(n)[j]) / 2 for i, j in pairs]) if n > 2 else np.array([[0.25, 0.75]])
    router = PreferenceRouter(corners, middles, [str(i) for i in range(len(corners) + len(middles))])
    points = np.vstack([corners, middles])
    for preference in np.random.default_rng(0).dirichlet(np.ones(n), 1000):
        weights, effective = router.weights(preference)
        assert (weights >= 0).all()
        assert abs(weights.sum() - 1) < 1e-9
        assert np.abs(weights @ points - preference).max() < 1e-9
        assert np.count_nonzero(weights) <= n
        assert effective is preference


@pytest.mark.parametrize("as_routers", [True, False])
def test_weights_are_continuous(as_routers):
    experts, routers = (FIGURE_2, MIDPOINTS) if as_routers else (np.vstack([FIGURE_2, MIDPOINTS]), NO_ROUTERS)
    router = PreferenceRouter(experts, routers, [str(i) for i in range(7)])
    generator = np.random.default_rng(1)
    for _ in range(100):
        start, end = generator.dirichlet(np.ones(3), 2)
        steps = np.linspace(0, 1, 401)[:, None]
        weights = np.array([router.weights(point)[0] for point in start + steps * (end - start)])
        jump = np.abs(np.diff(weights, axis=0)).max()
        assert jump <= 10 * np.linalg.norm(end - start) / 400


def test_every_expert_serves_its_own_preference_alone():
    router = PreferenceRouter(FIGURE_2, MIDPOINTS, ["e1", "e2", "e3", "c", "r12", "r13", "r23"])
    for name, point in zip(router.names, np.vstack([FIGURE_2, MIDPOINTS]), strict=True):
        assert router.route(point).experts == pytest.approx({name: 1.0})


def test_a_router_takes_the_place_of_an_expert_at_the_same_preference():
    router = PreferenceRouter(FIGURE_2, np.array([[1 / 3] * 3]), ["e1", "e2", "e3", "centroid", "r0"])
    assert router.route(np.full(3, 1 / 3)).experts == pytest.approx({"r0": 1.0})
    assert "centroid" not in router.route(np.array([0.5, 0.3, 0.2])).experts


def test_a_face_is_routed_by_its_own_experts():
    router = PreferenceRouter(FIGURE_2, MIDPOINTS, ["e1", "e2", "e3", "c", "r12", "r13", "r23"])
    assert router.route(np.array([0.75, 0.25, 0])).experts == pytest.approx({"e1": 0.5, "r12": 0.5})


def test_a_new_objective_changes_nothing_on_the_old_face():
    experts = np.vstack([CORNERS, MIDPOINTS])
    padded = np.hstack([np.vstack([experts, np.zeros((1, 3))]), [[0]] * 6 + [[1]]])
    for preference in np.random.default_rng(2).dirichlet(np.ones(3), 50):
        before = coarse_weights(preference, experts)
        after = coarse_weights(np.append(preference, 0), padded)
        np.testing.assert_allclose(after[:-1], before, atol=1e-9)


def test_outside_the_hull_the_nearest_point_is_in_effect():
    experts = np.array([[1, 0, 0], [0, 1, 0], [1 / 3] * 3])  # nobody serves the third objective alone
    router = PreferenceRouter(experts, NO_ROUTERS, ["e1", "e2", "c"])
    route = router.route(np.array([0, 0, 1.0]))
    assert route.effective == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert route.distance == pytest.approx(np.sqrt(2 / 3))
    assert route.experts == pytest.approx({"c": 1.0})


def test_projection_against_a_dense_search():
    generator = np.random.default_rng(3)
    points = generator.dirichlet(np.ones(3), 4)
    mixtures = generator.dirichlet(np.full(4, 0.4), 20000) @ points
    for target in generator.dirichlet(np.ones(3), 20):
        best = np.linalg.norm(mixtures - target, axis=1).min()
        found = np.linalg.norm(project_on_hull(target, points) - target)
        assert found <= best + 1e-9
        assert found >= best - 0.02
        assert in_hull(target, points) == (found < 1e-9)


def test_known_cells_give_what_the_linear_program_gives():
    points = np.vstack([FIGURE_2, MIDPOINTS])
    warm = Subdivision(points)
    for preference in np.random.default_rng(4).dirichlet(np.ones(3), 200):
        np.testing.assert_allclose(warm.weights(preference), Subdivision(points).weights(preference), atol=1e-12)


def test_voting_sets():
    assert voting_set(np.array([0.25, 0.75]), np.array([[1, 0], [0, 1], [0.5, 0.5]])) == [1, 2]
    # [.5, .5, 0] is carried by e1 and e2; the centroid is third.
    assert voting_set(MIDPOINTS[0], FIGURE_2) == [0, 1, 3]
    # The centroid carries itself; the three corners tie and all come in.
    assert voting_set(np.full(3, 1 / 3), FIGURE_2) == [0, 1, 2, 3]


def test_preferences_of_one_kind_must_be_apart():
    with pytest.raises(ExpertError, match="'x' and 'y'"):
        check_apart(np.array([[0.5, 0.5], [0.505, 0.495]]), ["x", "y"], "expert")
    check_apart(np.array([[0.5, 0.5], [0.51, 0.49]]), ["x", "y"], "expert")


def test_the_order_of_experts_does_not_matter_where_triangulations_tie():
    # The six midpoints of four corners are an octahedron: all on one sphere, so three triangulations are equally cheap.
    midpoints = np.array([(np.eye(4)[i] + np.eye(4)[j]) / 2 for i in range(4) for j in range(i)])
    generator = np.random.default_rng(5)
    for preference in generator.dirichlet(np.ones(6), 20) @ midpoints:
        expected = coarse_weights(preference, midpoints)
        for _ in range(5):
            order = generator.permutation(6)
            again = np.empty(6)
            again[order] = coarse_weights(preference, midpoints[order])
            np.testing.assert_allclose(again, expected, atol=1e-9)


def test_a_new_objective_leaves_the_choice_among_tied_triangulations_alone():
    # What breaks the tie must not change when every preference gets a 0 behind it.
    midpoints = np.array([(np.eye(4)[i] + np.eye(4)[j]) / 2 for i in range(4) for j in range(i)])
    padded = np.pad(midpoints, ((0, 0), (0, 1)))
    for preference in np.random.default_rng(5).dirichlet(np.ones(6), 20) @ midpoints:
        expected = coarse_weights(preference, midpoints)
        np.testing.assert_allclose(coarse_weights(np.append(preference, 0), padded), expected, atol=1e-9)
