"""Metrics and tables of sweeps whose points are known."""

from __future__ import annotations

import numpy as np
import pytest

from peft_hoe import metrics, preference_grid
from peft_hoe.errors import HoEWarning
from peft_hoe.evaluation import REFERENCE_POINT
from peft_hoe.objectives import RewardNormalizer

LINE = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]


def test_the_reference_point_is_the_projects():
    assert REFERENCE_POINT == metrics.REFERENCE_POINT


def test_metrics_by_hand(make_sweep):
    found = make_sweep(LINE, preferences=LINE).metrics(replicates=50)
    # From (-0.1, -0.1): 1.1 x 0.1, and the steps 0.6 x 0.5 and 0.1 x 0.5 above them.
    assert float(found.values["hypervolume"].estimate) == pytest.approx(1.1 * 0.1 + 0.6 * 0.5 + 0.1 * 0.5)
    assert float(found.values["expected utility"].estimate) == pytest.approx((1 + 0.5 + 1) / 3)
    assert float(found.values["control regret"].estimate) == 0
    assert float(found.values["Spearman a"].estimate) == pytest.approx(1)
    assert float(found.values["order violations b"].estimate) == 0
    assert float(found.values["spread"].estimate) == pytest.approx(np.sqrt(2))
    assert found.front.reference_point == [-0.1, -0.1]
    assert (found.front.non_dominated, found.front.clipped) == (3, 0)
    # Without noise all replicates are the same.
    assert float(found.values["hypervolume"].low) == pytest.approx(float(found.values["hypervolume"].high))
    assert "reference point -0.1, normalised by the payoff table (given); 3 points, 3 not dominated" in found.table()


def test_gaps_are_those_between_neighbours(make_sweep):
    found = make_sweep([[1.0, 0.0], [0.75, 0.25], [0.0, 1.0]], preferences=LINE).metrics(replicates=10)
    assert float(found.values["CV of gaps"].estimate) == pytest.approx(0.5)  # steps of 1 and 3 quarters
    assert float(found.values["gap ratio"].estimate) == pytest.approx(3)
    still = make_sweep([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], preferences=LINE).metrics(replicates=10)
    assert float(still.values["gap ratio"].estimate) == np.inf  # a step that does nothing
    assert float(still.values["CV of gaps"].estimate) == pytest.approx(1)


def test_points_below_the_reference_point_are_counted(make_sweep):
    with pytest.warns(
        HoEWarning, match=r"'A' steered to 'b' alone lies at \[2.0, -0.2\], below the reference point -0.1"
    ):
        found = make_sweep([[1.0, 1.0], [2.0, -0.2]]).metrics(replicates=10)
    assert found.front.clipped == 1
    assert float(found.values["hypervolume"].estimate) == pytest.approx(1.1**2)


def test_metrics_are_on_the_payoff_tables_scale(make_sweep):
    scale = RewardNormalizer([[20.0, 0.0], [10.0, 4.0]], ["a", "b"])
    raw = [[20.0, 0.0], [15.0, 2.0], [10.0, 4.0]]
    found = make_sweep(raw, preferences=LINE, normalizer=scale).metrics(replicates=10)
    assert float(found.values["hypervolume"].estimate) == pytest.approx(0.46)


def test_a_scale_of_own_corners_is_drawn_with_the_prompts(make_sweep):
    """Each replicate's corners are 0 and 1 by its own table, whatever prompts it drew; the raw corners are not the same."""
    generator = np.random.default_rng(0)
    rewards = np.asarray(LINE)[None, :, None, None] + generator.normal(0, 0.3, (1, 3, 12, 1, 2))
    scale = RewardNormalizer.measured(rewards[0][[0, 2]], ["a", "b"])
    sweep = make_sweep(
        LINE, preferences=LINE, prompts=12, rewards=rewards, normalizer=scale, payoff_source="own corners"
    )
    points = sweep.replicates(50).points["A"]
    np.testing.assert_allclose(points[:, [0, 2]].max(1), 1, atol=1e-12)
    np.testing.assert_allclose(points[:, [0, 2]].min(1), 0, atol=1e-12)
    assert points[:, 1].std(0).min() > 0


def test_the_error_of_a_measured_table_is_in_every_interval(make_sweep):
    """Means of 16 prompts at +-0.5 around a spread of 1: a table of mere numbers is taken as exact."""
    noise = np.random.default_rng(0).normal(0, 0.5, (2, 16, 1, 2))
    scale = RewardNormalizer.measured(np.eye(2)[:, None, None] + noise - noise.mean(1, keepdims=True), ["a", "b"])
    exact = RewardNormalizer(scale.payoff, ["a", "b"])
    widths = []
    for normalizer in (exact, scale):
        interval = (
            make_sweep(LINE, preferences=LINE, normalizer=normalizer).metrics(replicates=200).values["hypervolume"]
        )
        assert interval.low <= interval.estimate <= interval.high
        widths.append(float(interval.high - interval.low))
    assert widths[0] == pytest.approx(0)
    assert widths[1] > 0.2


def test_a_spread_within_its_error_is_told_again_where_it_is_used(make_sweep):
    scale = RewardNormalizer(np.eye(2), ["a", "b"], measurement={"spread_errors": [0.1, 0.5]})
    with pytest.warns(HoEWarning, match="hardly differ in objective 'b'.* 2.0 standard errors"):
        make_sweep(LINE, preferences=LINE, normalizer=scale).metrics(replicates=10)


def test_intervals_hold_what_prompts_vary(make_sweep):
    sweep = make_sweep(LINE, preferences=LINE, noise=0.2, prompts=10)
    interval = sweep.intervals(replicates=400)
    np.testing.assert_allclose(interval.estimate, LINE, atol=1e-12)
    half = 1.96 * 0.2 / np.sqrt(10)  # of a mean of 10 prompts at +-0.2
    np.testing.assert_allclose(interval.high - interval.estimate, half, rtol=0.25)


def test_one_preference_has_no_steerability(make_sweep):
    found = make_sweep([[1.0, 1.0]], preferences=[[0.5, 0.5]]).metrics(replicates=10)
    assert set(found.values) == {"hypervolume", "spread", "sparsity"}


def test_front_leaves_out_what_is_dominated(make_sweep):
    front = make_sweep([[1.0, 0.0], [0.4, 0.4], [0.5, 0.5], [0.0, 1.0]]).front()
    assert front.indices.tolist() == [0, 2, 3]
    np.testing.assert_array_equal(front.rewards, [[1, 0], [0.5, 0.5], [0, 1]])
    np.testing.assert_array_equal(front.normalized, front.rewards)


def test_table_shows_front_and_intervals(make_sweep):
    lines = make_sweep([[1.0, 0.0], [0.4, 0.4], [0.5, 0.5], [0.0, 1.0]]).table(replicates=10).splitlines()
    assert lines[0].split() == ["preference", "(a,", "b)", "a", "b", "a", "(0-1)", "b", "(0-1)"]
    assert [line.startswith("*") for line in lines[1:]] == [True, False, True, True]
    assert "0.400 [0.400, 0.400]" in lines[2]


def test_the_papers_grids():
    """Appendix E.5: eleven points, and thirteen with thirds written as .33."""
    text = (
        "(0.0,0.0,1.0),(0.0,1.0,0.0),(0.1,0.1,0.8),(0.1,0.8,0.1),(0.2,0.2,0.6),(0.2,0.4,0.4),(0.2,0.6,0.2),"
        "(0.33,0.33,0.33),(0.4,0.4,0.2),(0.4,0.2,0.4),(0.6,0.2,0.2),(0.8,0.1,0.1),(1.0,0.0,0.0)"
    )
    paper = np.asarray([float(number) for number in text.replace("(", "").replace(")", "").split(",")]).reshape(13, 3)
    np.testing.assert_allclose(preference_grid(3), paper, atol=0.0034)
    np.testing.assert_allclose(preference_grid(2), [[i / 10, 1 - i / 10] for i in range(11)])
