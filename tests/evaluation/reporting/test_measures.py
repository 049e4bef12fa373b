"""Metrics, comparisons, tables and stacks of sweeps whose points are known."""

from __future__ import annotations

import numpy as np
import pytest

from peft_hoe import metrics, preference_grid
from peft_hoe.errors import HoEError, HoEWarning
from peft_hoe.evaluation import REFERENCE_POINT, Sweep
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


def test_a_comparison_shows_differences_first_and_clipped_points_of_both(make_sweep):
    a, b = make_sweep([[1.0, 1.0], [2.0, 0.0]]), make_sweep([[0.5, 0.5], [-0.2, 1.0]], name="other")
    found = a.compare(b, replicates=10)
    assert [*found.values][:2] == ["hypervolume A - B", "expected utility A - B"]
    assert [*found.values][-1] == "relative hypervolume A / B"
    assert found.clipped == (0, 1)
    assert "below it (clipped) 0 of A and 1 of other" in found.note()


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


def test_a_better_front_dominates(make_sweep):
    a = make_sweep(np.asarray(LINE) + 0.3, preferences=LINE, noise=0.5)
    b = make_sweep(LINE, preferences=LINE, name="B", noise=0.5)
    found = a.compare(b, replicates=100)
    # The same prompts are drawn for both, so the noise that they share cancels.
    assert found.dominates == 1
    assert found.dominated == 0
    assert found.verdict() == "A dominates B (100.0% of the replicates)"
    values = {name: float(interval.estimate) for name, interval in found.values.items()}
    assert values["coverage C(A, B)"] == 1
    assert values["coverage C(B, A)"] == 0
    assert values["additive epsilon A to B"] == pytest.approx(-0.3)
    assert values["IGD+ A to union"] == 0
    assert values["IGD+ B to union"] == pytest.approx(0.3 * np.sqrt(2))
    assert values["hypervolume A - B"] == pytest.approx(values["hypervolume A"] - values["hypervolume B"])
    assert values["relative hypervolume A / B"] == pytest.approx(values["hypervolume A"] / values["hypervolume B"])
    assert values["expected utility A - B"] == pytest.approx(0.3)
    back = b.compare(a, replicates=100)
    assert back.verdict() == "A dominates B (100.0% of the replicates)"
    assert "A = B, B = A" in back.table()


def test_equal_fronts_do_not_dominate(make_sweep):
    found = make_sweep(LINE, preferences=LINE).compare(make_sweep(LINE, preferences=LINE, name="B"), replicates=10)
    assert found.dominates == found.dominated == 0
    assert "neither front dominates the other" in found.table()


def test_comparisons_use_the_first_ones_scale(make_sweep):
    a = make_sweep(LINE, preferences=LINE)
    b = make_sweep(LINE, preferences=LINE, name="B", normalizer=RewardNormalizer(9 * np.eye(2), ["a", "b"]))
    assert float(a.compare(b, replicates=10).values["hypervolume B"].estimate) == pytest.approx(0.46)


def test_incomparable_sweeps(make_sweep):
    a = make_sweep(LINE, preferences=LINE)
    with pytest.raises(HoEError, match="different prompts"):
        a.compare(make_sweep(LINE, preferences=LINE, prompts=5))
    with pytest.raises(HoEError, match="different objectives"):
        a.compare(make_sweep(np.eye(3)))
    with pytest.raises(HoEError, match="shape"):
        make_sweep(LINE, preferences=LINE[:2])


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


def test_the_papers_grids():
    """Appendix E.5: eleven points, and thirteen with thirds written as .33."""
    text = (
        "(0.0,0.0,1.0),(0.0,1.0,0.0),(0.1,0.1,0.8),(0.1,0.8,0.1),(0.2,0.2,0.6),(0.2,0.4,0.4),(0.2,0.6,0.2),"
        "(0.33,0.33,0.33),(0.4,0.4,0.2),(0.4,0.2,0.4),(0.6,0.2,0.2),(0.8,0.1,0.1),(1.0,0.0,0.0)"
    )
    paper = np.asarray([float(number) for number in text.replace("(", "").replace(")", "").split(",")]).reshape(13, 3)
    np.testing.assert_allclose(preference_grid(3), paper, atol=0.0034)
    np.testing.assert_allclose(preference_grid(2), [[i / 10, 1 - i / 10] for i in range(11)])
