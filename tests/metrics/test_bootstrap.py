from __future__ import annotations

import numpy as np
import pytest

from peft_hoe import HoEWarning, metrics
from peft_hoe.errors import MetricError


def rewards(shape, seed=0, missing=0.0):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=shape)
    table[rng.random(size=shape) < missing] = np.nan
    return table


def naive(table, seeds, prompts):
    """Mean over the drawn seeds of the mean over the drawn prompts, one replicate and preference at a time."""
    points = np.zeros((len(prompts), table.shape[1], table.shape[3]))
    for r in range(len(prompts)):
        for k in range(table.shape[1]):
            points[r, k] = np.nanmean([np.nanmean(table[s, k, prompts[r]], axis=0) for s in seeds[r]], axis=0)
    return points


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_against_a_loop_with_the_same_indices(missing):
    values = {"a": rewards((3, 4, 20, 2), 0, missing), "b": rewards((5, 2, 20, 2), 1, missing)}
    found = metrics.bootstrap(values, replicates=40, seed=7)
    assert found.prompts.shape == (40, 20)
    for name, table in values.items():
        assert found.seeds[name].shape == (40, len(table))
        np.testing.assert_allclose(found.points[name], naive(table, found.seeds[name], found.prompts), atol=1e-12)
        np.testing.assert_allclose(found.estimates[name], np.nanmean(np.nanmean(table, axis=2), axis=0), atol=1e-12)


def test_methods_share_the_prompts():
    """A constant lead on every prompt is the same lead in every replicate, however much the prompts differ."""
    table = rewards((1, 3, 10, 2)) * 100
    found = metrics.bootstrap({"a": table + 0.01, "b": table}, replicates=200)
    np.testing.assert_allclose(found.points["a"] - found.points["b"], 0.01, atol=1e-10)
    assert np.ptp(found.points["a"]) > 10
    assert found.share(metrics.front_dominates, "a", "b") == 1
    assert found.share(metrics.front_dominates, "b", "a") == 0


def test_seeds_are_resampled_too():
    """Without noise over prompts, what is left is the spread of the seeds: 0 and 1 give means 0, 1/2 and 1."""
    table = np.zeros((2, 1, 5, 1))
    table[1] = 1
    found = metrics.bootstrap({"a": table}, replicates=2000)
    values, counts = np.unique(found.points["a"], return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(counts / 2000, [0.25, 0.5, 0.25], atol=0.05)


def test_interval_covers_what_theory_says():
    """The mean of 400 standard normal numbers has a standard error of 0.05."""
    found = metrics.bootstrap({"a": rewards((1, 1, 400, 1), 3)}, replicates=4000)
    interval = found.interval(np.mean)
    assert interval.estimate == found.estimates["a"].mean()
    assert interval.low < interval.estimate < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.05, rel=0.1)
    narrow = found.interval(np.mean, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high
    assert interval.low == pytest.approx(np.percentile(found.points["a"], 2.5))
    basic = found.interval(np.mean, kind="basic")
    assert basic.low == pytest.approx(2 * interval.estimate - interval.high)
    with pytest.raises(MetricError, match="kind is 'bca'; use one of 'percentile', 'basic'"):
        found.interval(np.mean, kind="bca")


def test_statistics_of_several_methods_and_of_arrays():
    values = {"a": rewards((2, 3, 30, 2), 0) + 2, "b": rewards((2, 3, 30, 2), 1)}
    found = metrics.bootstrap(values, replicates=50)
    ratio = found.interval(lambda a, b: metrics.relative_hypervolume(a, b, reference_point=-2), "a", "b")
    assert ratio.low > 1
    points = found.interval(lambda a: a, "a")
    assert points.low.shape == points.high.shape == points.estimate.shape == (3, 2)
    assert (points.low <= points.high).all()
    assert found.share(lambda a, b: metrics.coverage(a, b) >= 0.9) == 1.0


def test_a_method_at_the_end_changes_nothing_and_a_seed_repeats():
    a, b = rewards((3, 2, 8, 2), 0), rewards((2, 2, 8, 2), 1)
    alone, both = metrics.bootstrap({"a": a}, seed=5), metrics.bootstrap({"a": a, "b": b}, seed=5)
    np.testing.assert_array_equal(alone.points["a"], both.points["a"])
    assert not np.array_equal(alone.prompts, metrics.bootstrap({"a": a}, seed=6).prompts)


def test_warnings_are_counted_and_said_once():
    table = np.linspace(-1, 1, 9).reshape(1, 1, 9, 1)
    found = metrics.bootstrap({"a": table}, replicates=100)
    with pytest.warns(HoEWarning, match=r"warnings in 100 replicates; the first: the hypervolume is 0") as caught:
        interval = found.interval(lambda a: metrics.hypervolume(a, reference_point=-0.05))
    assert len(caught) == len(interval.warnings) == 1
    below = int((found.points["a"] <= -0.05).sum())
    assert 0 < below < 100
    assert interval.warnings[0].startswith(f"{below} warnings")


def test_the_bias_of_a_maximum_is_taken_off():
    """Five means of noise: their maximum is above the true one, which is 0, and those of the replicates more so."""
    held = []
    for seed in range(60):
        drawn = metrics.bootstrap({"a": rewards((1, 5, 40, 1), seed)}, replicates=200)
        interval = drawn.interval(np.max, kind="basic")
        assert interval.low <= interval.estimate <= interval.high
        low, high = np.percentile(drawn.points["a"].max(axis=(1, 2)), [2.5, 97.5])
        held.append([interval.low <= 0 <= interval.high, low <= 0 <= high])
    basic, percentiles = np.mean(held, axis=0)
    assert basic > percentiles + 0.3


def test_an_interval_ends_where_the_statistic_does():
    drawn = metrics.bootstrap({"a": rewards((1, 30, 40, 1))}, replicates=200)
    regret = drawn.interval(lambda a: a.max() - a.mean(), kind="basic", bounds=(0, np.inf))
    free = drawn.interval(lambda a: a.max() - a.mean() - 0.4, kind="basic")
    assert regret.low == pytest.approx(max(0, free.low + 0.4))
    alone = drawn.interval(np.max)
    pair = drawn.interval(lambda a: [a.max(), a.max()], bounds=([-10, 5], [10, 10]))
    assert pair.low.tolist() == [alone.low, 5]


def test_undefined_replicates_are_left_out_and_counted():
    found = metrics.bootstrap({"a": rewards((1, 1, 9, 1))}, replicates=100)
    positive = found.points["a"].ravel() > 0
    with pytest.warns(HoEWarning, match=f"NaN in up to {(~positive).sum()} of 100 replicates"):
        interval = found.interval(lambda a: a.mean() if a.mean() > 0 else np.nan)
    assert interval.undefined == (~positive).sum() > 0
    assert interval.low == pytest.approx(np.percentile(found.points["a"].ravel()[positive], 2.5))
    with pytest.warns(HoEWarning, match="NaN in up to 100 of 100"):
        assert np.isnan(found.interval(lambda a: np.nan).low)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "mapping of one or more"),
        ([[1.0]], "mapping of one or more"),
        ({"a": np.zeros((2, 3, 4))}, r"shape \(2, 3, 4\).*rewards\[None\]"),
        ({"a": np.zeros((0, 3, 4, 2))}, "none of them 0"),
        ({"a": np.full((1, 1, 2, 1), np.inf)}, "infinity"),
        ({"a": np.full((1, 1, 2, 1), np.nan)}, "no reward at all for objective 0 at seed 0, preference 0"),
        ({"a": np.zeros((1, 1, 2, 1)), "b": np.zeros((1, 1, 3, 1))}, r"'a' has.*\(2, 1\), 'b' has \(3, 1\)"),
        ({"a": [[[[1.0], [None]]]]}, "too few rewards: .* of 1000 replicates"),
    ],
)
def test_bad_values(values, match):
    with pytest.raises(MetricError, match=match):
        metrics.bootstrap(values)


def test_bad_questions():
    found = metrics.bootstrap({"a": np.ones((1, 1, 2, 1))}, replicates=3)
    with pytest.raises(MetricError, match="no method 'b'; the methods are"):
        found.share(metrics.front_dominates, "a", "b")
    with pytest.raises(MetricError, match="must return True or False"):
        found.share(lambda a: a > 0, "a")
    with pytest.raises(MetricError, match="level is 95"):
        found.interval(np.mean, level=95)
    with pytest.raises(MetricError, match="replicates is 0"):
        metrics.bootstrap({"a": np.ones((1, 1, 2, 1))}, replicates=0)


@pytest.mark.parametrize(("seeds", "count"), [(1, 11), (1, 13), (3, 5)])
def test_equal_rewards_have_equal_means(seeds, count):
    """The same texts at several preferences, and by several methods, dominate nothing: no difference in the last digit."""
    rewards = np.random.default_rng(0).normal(size=(1, 1, 37, 2))
    found = metrics.bootstrap(
        {"a": np.tile(rewards, (1, 11, 1, 1)), "b": np.tile(rewards, (seeds, count, 1, 1))}, replicates=200
    )
    assert found.share(lambda a, b: metrics.coverage(a, b) == metrics.coverage(b, a) == 0) == 1
    assert metrics.non_dominated_mask(np.concatenate([found.estimates["a"], found.estimates["b"]])).all()


def test_an_interval_holds_its_estimate_where_replicates_are_biased():
    """The maximum of four means of two prompts: equal in the data, one of them greater in almost every replicate."""
    rewards = np.asarray([[1.0, -1.0], [-1.0, 1.0]] * 2)[None, :, :, None]
    interval = metrics.bootstrap({"a": rewards}, replicates=200).interval(lambda points: points.max(), level=0.4)
    assert float(interval.estimate) == 0
    assert float(interval.low) <= 0 <= float(interval.high)


def test_replicates_without_points_are_told_in_shares():
    """They counted as false without a word; a scale that collapses in a replicate leaves NaN."""
    found = metrics.bootstrap({"a": rewards((1, 1, 9, 1))}, replicates=10)
    found.points["a"][:3] = np.nan
    with pytest.warns(HoEWarning, match="3 of 10 replicates have no scale; the statement counts as false there"):
        assert found.share(lambda a: True) == 0.7


@pytest.mark.parametrize("level", [0.4, 0.95])
def test_the_basic_interval_holds_the_estimate_where_percentiles_do(level):
    """2 e - high <= e <= 2 e - low says low <= e <= high: it would be no remedy where replicates are biased."""
    found = metrics.bootstrap({"a": rewards((1, 4, 9, 1), 2)}, replicates=200)
    values = found.points["a"].max(axis=(1, 2))
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    estimate = found.estimates["a"].max()
    assert (2 * estimate - high <= estimate <= 2 * estimate - low) == (low <= estimate <= high)
