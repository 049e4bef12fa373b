"""Numbers that a reader can check, and every input that is refused."""

from __future__ import annotations

import importlib
import re
import sys

import numpy as np
import pytest
import torch

import peft_hoe
from peft_hoe import HoEError, HoEWarning, PreferenceError, metrics
from peft_hoe.errors import MetricError

FRONT = [[0.2, 0.9], [0.7, 0.5]]


def test_dominance_is_strict():
    assert metrics.dominates([1, 2], [1, 1])
    assert not metrics.dominates([1, 1], [1, 1])
    assert not metrics.dominates([2, 0], [1, 1])
    assert metrics.non_dominated_mask([[1, 1], [1, 1], [0, 1], [2, 0]]).tolist() == [True, True, False, True]
    assert metrics.non_dominated_mask([[3], [1], [3]]).tolist() == [True, False, True]


def test_coverage_of_equal_points():
    assert metrics.coverage(FRONT, FRONT) == 0
    assert metrics.coverage(FRONT, FRONT, strict=False) == 1
    assert metrics.coverage([[1, 1]], [[1, 0], [0, 1], [1, 1], [2, 0]]) == 0.5
    assert metrics.coverage([[1, 0], [0, 1], [1, 1], [2, 0]], [[1, 1]]) == 0
    assert metrics.front_dominates([[1, 1]], [[1, 0], [0, 1]])
    assert not metrics.front_dominates([[1, 1]], [[1, 0], [1, 1]])
    assert metrics.union_shares([[1, 1], [0, 3]], [[1, 0], [0, 2]]) == (1.0, 0.0)


def test_hypervolume():
    assert metrics.hypervolume(FRONT, reference_point=[0, 0]) == pytest.approx(0.2 * 0.9 + 0.5 * 0.5)
    assert metrics.hypervolume(FRONT, reference_point=-0.1) == pytest.approx(0.3 * 1.0 + 0.5 * 0.6)
    assert metrics.hypervolume([[1, 2, 3]], reference_point=[0, 0, 1]) == 4
    assert metrics.hypervolume([[3], [5]], reference_point=1) == 4  # moocore 0.1.7 ends the process here


def test_hypervolume_record_counts_what_is_clipped():
    record = metrics.hypervolume_record([[0.5, 0.5], [0.4, 0.4], [-1, 3], [0.5, 0.5]], reference_point=[0, 0])
    assert record.hypervolume == 0.25
    assert record.reference_point == [0.0, 0.0]
    assert (record.points, record.non_dominated, record.clipped, record.warnings) == (4, 3, 1, [])


@pytest.mark.parametrize("points", [[[-1, 3], [3, -1]], [[0.0, 5.0]]])
def test_a_reference_point_that_nothing_is_above_is_never_silent(points):
    with pytest.warns(HoEWarning, match=r"hypervolume is 0: no point is above the reference point \[0.0, 0.0\]"):
        record = metrics.hypervolume_record(points, reference_point=0)
    assert record.hypervolume == 0
    assert "no point is above" in record.warnings[0]


def test_relative_hypervolume():
    assert metrics.relative_hypervolume([[1, 1]], [[2, 2]], reference_point=0) == 0.25
    assert metrics.relative_hypervolume([[2, 2]], [[1, 1]], reference_point=0) == 4
    with pytest.warns(HoEWarning, match="hypervolume is 0"):
        assert metrics.relative_hypervolume([[-1, 1]], [[2, 2]], reference_point=0) == 0
    with pytest.raises(MetricError, match="reference front has hypervolume 0"):
        metrics.relative_hypervolume([[1, 1]], [[-1, 2]], reference_point=0)


def test_distances():
    assert metrics.igd_plus([[1, 1]], [[4, 5], [0, 0]]) == 2.5  # 5 and 0
    assert metrics.epsilon([[1, 1]], [[4, 5], [0, 0]]) == 4
    assert metrics.epsilon([[4, 5]], [[1, 1]]) == -3


def test_utility_spread_and_sparsity():
    assert metrics.expected_utility([[1, 0], [0, 2], [0.9, 0.9]], [[1, 0], [0.5, 0.5]]) == pytest.approx((1 + 1) / 2)
    points = [[0, 4], [3, 0], [1, 1], [0, 0], [1, 1]]  # the last two: dominated, duplicate
    assert metrics.spread(points) == 5
    assert metrics.sparsity(points) == (1 + 4 + 1 + 9) / 2  # steps 1, 2 and 1, 3
    assert metrics.spread([[1, 2]]) == metrics.sparsity([[1, 2]]) == 0


def test_gaps():
    line = [[0, 1], [0.2, 0.8], [1, 0]]
    rewards = [[0, 0], [3, 4], [3, 14]]  # gaps of 5 and 10
    assert metrics.gap_variation(rewards, line) == pytest.approx(1 / 3, abs=1e-12)
    assert metrics.gap_ratio(rewards, line) == 2
    assert metrics.gap_ratio([[0, 0], [0, 0], [3, 14]], line) == np.inf
    assert metrics.mean_inner_product(rewards, line) == pytest.approx((0 + 3.8 + 3) / 3, abs=1e-12)
    corners = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert metrics.gap_variation(corners, corners) == pytest.approx(0, abs=1e-12)  # a triangle of equal sides
    with pytest.raises(MetricError, match="there is no gap"):
        metrics.gap_variation([[1, 1]] * 3, line)
    with pytest.raises(MetricError, match="at least two objectives"):
        metrics.gap_ratio([[1], [2]], [[1], [1]])
    with pytest.raises(MetricError, match="2 rows of rewards, but 3 preferences"):
        metrics.mean_inner_product(rewards[:2], line)


def test_lists_arrays_and_tensors_are_the_same_and_unchanged():
    array = np.asarray(FRONT)
    tensor = torch.tensor(FRONT, dtype=torch.float64, requires_grad=True)
    expected = metrics.hypervolume(FRONT, reference_point=0)
    for points in (array, tensor, np.asfortranarray(array), [list(row) for row in array]):
        assert metrics.hypervolume(points, reference_point=0) == expected
        assert metrics.igd_plus(points, [[1, 1]]) == metrics.igd_plus(FRONT, [[1, 1]])
    assert array.tolist() == FRONT
    halves = torch.tensor([[0.5, 1.0]], dtype=torch.bfloat16)
    assert metrics.hypervolume(halves, reference_point=torch.tensor(0.0)) == 0.5


BAD_POINTS = [
    ([], "is empty"),
    ([[]], "is empty"),
    (np.zeros((0, 2)), "is empty"),
    ([0.2, 0.9], "wrap a single point in a list"),
    ([[[1, 2]]], r"shape \(1, 1, 2\)"),
    (3.0, r"shape \(\)"),
    ([[1, 2], [1]], "its rows have 1, 2 numbers"),
    ([[1, 2], [1, float("nan")], [None, 2]], r"NaN \(no reward\) in 2 of 3 rows \(row 1, 2\)"),
    ([[1, 2], [1, float("-inf")]], r"infinity in 1 of 2 rows \(row 1\)"),
    (np.ma.masked_equal([[1, 2], [1, 9]], 9), r"NaN \(no reward\) in 1 of 2 rows \(row 1\)"),
    ([["a", "b"]], "rows of numbers"),
    ([["1", "2"]], "rows of numbers"),
    ([[1j, 2]], "rows of numbers"),
    ({"a": 1}, "rows of numbers"),
    (None, r"shape \(\)"),
    (np.zeros((2, 32)), "32 objectives; at most 31"),
]
TAKE_POINTS = {
    "hypervolume": lambda points: metrics.hypervolume(points, reference_point=0),
    "non_dominated_mask": metrics.non_dominated_mask,
    "coverage": lambda points: metrics.coverage(points, [[1, 1]]),
    "covered": lambda points: metrics.coverage([[1, 1]], points),
    "igd_plus": lambda points: metrics.igd_plus(points, [[1, 1]]),
    "igd_plus reference": lambda points: metrics.igd_plus([[1, 1]], points),
    "epsilon": lambda points: metrics.epsilon(points, [[1, 1]]),
    "expected_utility": lambda points: metrics.expected_utility(points, [[0.5, 0.5]]),
    "spread": metrics.spread,
    "sparsity": metrics.sparsity,
    "steerability": lambda points: metrics.steerability(points, [[1, 0], [0, 1]]),
    "compare_fronts": lambda points: metrics.compare_fronts([[1, 1]], points),
}


@pytest.mark.parametrize("take", TAKE_POINTS.values(), ids=TAKE_POINTS)
def test_bad_points(take):
    for points, match in BAD_POINTS:
        with pytest.raises(MetricError, match=match):
            take(points)


@pytest.mark.parametrize(
    "take", [metrics.coverage, metrics.igd_plus, metrics.epsilon, metrics.union_shares, metrics.compare_fronts]
)
def test_fronts_of_different_width(take):
    with pytest.raises(MetricError, match="has 3 objectives, but what it belongs to has 2"):
        take([[1, 2]], [[1, 2, 3]])


def test_bad_single_points():
    for a, b, match in (([1, 2], [1], "1 objectives"), ([[1, 2]], [1, 2], "one point"), ([1, None], [1, 2], "NaN")):
        with pytest.raises(MetricError, match=match):
            metrics.dominates(a, b)


@pytest.mark.parametrize(
    ("reference_point", "match"),
    [
        (None, "reference_point is missing.*REFERENCE_POINT = -0.1"),
        ([0, 0, 0], "3 numbers, but there are 2 objectives"),
        ([[0, 0]], r"shape \(1, 2\)"),
        ([], r"shape \(0,\)"),
        ([0, float("nan")], "must be finite"),
        (float("inf"), "must be finite"),
        ("zero", "rows of numbers"),
    ],
)
def test_bad_reference_points(reference_point, match):
    with pytest.raises(MetricError, match=match):
        metrics.hypervolume(FRONT, reference_point=reference_point)


def test_the_reference_point_has_no_default():
    with pytest.raises(TypeError, match="reference_point"):
        metrics.hypervolume(FRONT)
    assert metrics.REFERENCE_POINT == -0.1


def test_bad_preferences():
    with pytest.raises(PreferenceError, match="sums to 2"):
        metrics.expected_utility(FRONT, [[1, 1]])
    with pytest.raises(MetricError, match="preferences has 3 objectives"):
        metrics.expected_utility(FRONT, [[1, 0, 0]])
    with pytest.raises(MetricError, match="preferences is empty"):
        metrics.expected_utility(FRONT, [])


def test_errors_are_ours_and_value_errors():
    assert issubclass(MetricError, HoEError)
    assert issubclass(MetricError, ValueError)


@pytest.mark.slow
def test_metrics_resolve_when_they_are_first_used(imported_by):
    assert peft_hoe.metrics is metrics
    assert "moocore" not in imported_by("peft_hoe.training")
    assert "moocore" in imported_by("peft_hoe.metrics.hypervolume")
    assert "evaluate" not in imported_by("peft_hoe.metrics.hypervolume")


def test_without_moocore_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "moocore", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "peft_hoe.metrics")
    with pytest.raises(ImportError, match=re.escape("peft_hoe.metrics needs moocore: pip install 'peft-hoe[eval]'")):
        importlib.import_module("peft_hoe.metrics")
