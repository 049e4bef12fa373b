from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from peft_hoe.errors import HoEError, HoEWarning, PreferenceError, RewardError
from peft_hoe.objectives import ObjectiveWeights


def test_two_updates_by_hand():
    weights = ObjectiveWeights([0.25, 0.75])  # α = β / μ = 1
    np.testing.assert_allclose(weights.w, [0.5, 0.5])
    np.testing.assert_allclose(weights.u, [0.25, 0.75])
    u = weights.update([0.25, 0.65])
    # gap = [.25 (1.05 - .25), .75 (1.05 - .65)] = [.2, .3]
    np.testing.assert_allclose(weights.gap, [0.2, 0.3])
    np.testing.assert_allclose(weights.log_w, [0.2, 0.3])
    e = np.exp([0.2, 0.3])
    np.testing.assert_allclose(weights.w, e / e.sum())
    np.testing.assert_allclose(u, [0.25 * e[0], 0.75 * e[1]] / (0.25 * e[0] + 0.75 * e[1]))
    weights.update([0.05, 1.05])  # gap = [.25, 0]; log w = .9 [.2, .3] + [.25, 0]
    np.testing.assert_allclose(weights.log_w, [0.43, 0.27])
    assert weights.updates == 2


def test_beta_one_is_eq_17():
    weights = ObjectiveWeights([0.5, 0.5], mu=0.2, beta=1)
    for means in ([0.9, 0.1], [0.3, 0.7]):
        weights.update(means)
    expected = np.exp(0.5 * (1.05 - np.asarray([0.3, 0.7])) / 0.2)  # only the last counts
    np.testing.assert_allclose(weights.w, expected / expected.sum())


def test_beta_zero_is_eq_18():
    weights = ObjectiveWeights([0.5, 0.5], mu=0, beta=0, step=2.0)
    weights.update([0.05, 0.55])
    weights.update([0.05, 0.55])
    np.testing.assert_allclose(weights.log_w, [2 * 2 * 0.5, 2 * 2 * 0.25])


def test_step_zero_is_linear_scalarisation():
    weights = ObjectiveWeights([0.2, 0.8], step=0)
    np.testing.assert_allclose(weights.update([0.0, 1.0]), [0.2, 0.8])


@pytest.mark.parametrize("settings", [{}, {"beta": 1}, {"beta": 0, "step": 5.0}])
def test_an_objective_of_preference_zero_gets_nothing(settings):
    weights = ObjectiveWeights([1, 0], **settings)
    for means in ([0.2, 0.9], [0.9, 0.0]):
        np.testing.assert_array_equal(weights.update(means), [1, 0])


def test_the_printed_form_gives_it_half():
    weights = ObjectiveWeights([1, 0], weighting="paper")
    np.testing.assert_allclose(weights.update([1.05, 0.0]), [0.5, 0.5])


def _front(angle: float) -> np.ndarray:
    """A concave front: the quarter circle."""
    return np.asarray([math.cos(angle), math.sin(angle)])


def _climb(weights: ObjectiveWeights, front, updates: int, rate: float = 0.05, angle: float = 0.2) -> float:
    """Gradient ascent on Σ u_i R_i along a front, the weights updated at each step."""
    for _ in range(updates):
        u = weights.update(front(angle))
        slope = (front(angle + 1e-6) - front(angle - 1e-6)) / 2e-6
        angle = min(max(angle + rate * float(u @ slope), 0.0), math.pi / 2)
    return angle


@pytest.mark.parametrize("preference", [[0.5, 0.5], [0.25, 0.75], [0.8, 0.2]])
@pytest.mark.parametrize("mu", [0.1, 0.3])
def test_the_fixed_point_is_the_stch_solution(preference, mu):
    weights = ObjectiveWeights(preference, mu=mu)
    angle = _climb(weights, _front, 4000)
    gap = np.asarray(preference) * (1.05 - _front(angle))
    expected = np.exp(gap / mu) / np.exp(gap / mu).sum()
    np.testing.assert_allclose(weights.w, expected, atol=1e-6)
    best = minimize_scalar(
        lambda x: mu * np.log(np.exp(np.asarray(preference) * (1.05 - _front(x)) / mu).sum()),
        bounds=(0, math.pi / 2),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert angle == pytest.approx(best.x, abs=1e-5)


def test_eq_18_drifts_to_one_hot_where_gaps_cannot_be_equalised_and_the_default_does_not():
    def uneven(angle):  # the first objective's gap is at least .425, the second's at most .275
        return _front(angle) * [0.2, 0.5] + [0.0, 0.5]

    drifting = ObjectiveWeights([0.5, 0.5], beta=0, step=1.0)
    angle = _climb(drifting, uneven, 2000)
    assert drifting.w[0] > 1 - 1e-6
    assert angle < 0.01  # all for the objective that lags, whatever it costs the other
    default = ObjectiveWeights([0.5, 0.5])
    angle = _climb(default, uneven, 2000)
    assert angle > 0.1
    gap = 0.5 * (1.05 - uneven(angle))
    np.testing.assert_allclose(default.w, np.exp(gap / 0.1) / np.exp(gap / 0.1).sum(), atol=1e-6)


def test_an_objective_without_a_mean_stays_as_it_was():
    weights = ObjectiveWeights({"a": 0.5, "b": 0.5})
    assert np.isnan(weights.gap).all()
    weights.update([0.05, 0.45])
    with pytest.warns(HoEWarning, match="objective 'a' has no reward in a batch"):
        weights.update([float("nan"), 0.45])
    np.testing.assert_allclose(weights.log_w, [0.5, 0.9 * 0.3 + 0.3])
    np.testing.assert_allclose(weights.gap, [0.5, 0.3])
    before = weights.u
    with pytest.warns(HoEWarning, match="objective 'b' has no reward in a batch"):
        np.testing.assert_array_equal(weights.update([None, None]), before)


def test_an_absent_objective_is_told_of_now_and_then():
    """Not in every batch of a dataset of several tasks; one that is given no weight is not missed."""
    weights = ObjectiveWeights([0.5, 0.5, 0.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            weights.update([0.5, None, None])
        weights.update([0.5, 0.5, None])
        weights.update([0.5, None, None])
    told = [str(item.message).partition(", only")[0] for item in caught]
    assert told == [f"objective '1' has no reward in {when}" for when in ("a batch", "10 batches in a row", "a batch")]


def test_weights_stay_finite_far_out():
    weights = ObjectiveWeights([0.5, 0.5, 0.0], beta=0, step=1e4)
    u = weights.update([-1.0, 1.0, 0.0])
    assert np.isfinite(u).all()
    np.testing.assert_allclose(u, [1, 0, 0], atol=1e-12)
    behind = ObjectiveWeights([0.5, 0.5, 0.0], beta=0, step=1e4)  # w is one-hot on the objective of preference 0
    np.testing.assert_allclose(behind.update([9.0, 9.0, 0.0]), [0.5, 0.5, 0.0])


def test_state_survives_json():
    weights = ObjectiveWeights({"a": 0.3, "b": 0.7}, mu=0.2)
    fresh = json.dumps(weights.state_dict(), allow_nan=False)
    weights.update(torch.tensor([0.5, 0.2]))
    again = ObjectiveWeights({"a": 0.3, "b": 0.7}, mu=0.2)
    again.load_state_dict(json.loads(json.dumps(weights.state_dict(), allow_nan=False)))
    assert again.state_dict() == weights.state_dict()
    np.testing.assert_array_equal(again.update([0.1, 0.9]), weights.update([0.1, 0.9]))
    again.load_state_dict(json.loads(fresh))
    assert np.isnan(again.gap).all()
    with pytest.raises(HoEError, match=r"mu: 0\.2 saved, 0\.1 here"):
        ObjectiveWeights({"a": 0.3, "b": 0.7}).load_state_dict(weights.state_dict())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mu": 0}, "step="),
        ({"mu": -1}, "mu is -1"),
        ({"beta": 0}, "never move"),
        ({"beta": 1.5}, "beta is 1.5"),
        ({"step": -1}, "step is -1"),
        ({"reference_point": [1, 2, 3]}, "one for each of the 2"),
        ({"weighting": "none"}, "saddle"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(HoEError, match=match):
        ObjectiveWeights([0.5, 0.5], **settings)


def test_bad_input():
    with pytest.raises(PreferenceError, match="sums to"):
        ObjectiveWeights([0.5, 0.9])
    weights = ObjectiveWeights({"a": 1}, objectives=["a", "b"])
    for means in ([0.1], [0.1, float("inf")], ["x", 0], 0.3, None):
        with pytest.raises(RewardError, match="expected 2 finite"):
            weights.update(means)
    assert weights.updates == 0
