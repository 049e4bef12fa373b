"""Where a front is weak: regret, the gap to the hull, and contribution, all computable by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from peft_hoe import HoEError, HoEWarning, RewardNormalizer
from peft_hoe.evaluation import weaknesses
from peft_hoe.evaluation.front.weakness import hull_gap

from .test_front import sweep_of

SCALE = RewardNormalizer([[1, 0], [0, 1]], ["a", "b"])
AT = [[0, 1], [0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [1, 0]]


def scaled(points, preferences=AT, **options):
    found = sweep_of(points, preferences, **options)
    found.normalizer = SCALE
    return found


def test_the_three_measures():
    """At [.25, .75] the point is (.2, .2): [0, 1] has .75 there and it .2. A mixture of (0, 1) and (1, 0) has .5 of both."""
    points = [[0, 1], [0.2, 0.2], [0.7, 0.7], [0.9, 0.4], [1, 0]]
    found = weaknesses(scaled(points))
    first = found[0]
    assert first.preference == {"a": 0.25, "b": 0.75}
    assert (first.regret, first.error) == pytest.approx((0.75 - 0.2, 0.0))
    assert first.hull == pytest.approx(0.5)  # of the mixture that is nearest above: (.7, .7) alone
    assert first.contribution == 0.0
    rest = {tuple(weak.preference.values()): weak for weak in found[1:]}
    assert all(weak.regret == pytest.approx(0.0) for weak in rest.values())
    # (.7, .7) alone encloses what is left of it in a, down to (0, 1), and below it in b, down to (.9, .4).
    assert rest[0.5, 0.5].contribution == pytest.approx((0.7 - 0.0) * (0.7 - 0.4))
    contributions = [weak.contribution for weak in found[1:]]
    assert contributions == sorted(contributions, reverse=True)  # of those without regret, the sparsest first


def test_the_gap_to_the_hull_is_the_least_regret_of_any_preference():
    """The duality that makes it a part of the regret, on a grid of preferences."""
    rng = np.random.default_rng(0)
    grid = np.asarray([row for row in itertools.product(np.linspace(0, 1, 51), repeat=3) if abs(sum(row) - 1) < 1e-9])
    for _ in range(5):
        points = rng.normal(size=(6, 3))
        k = int(np.argmin(points.sum(axis=1)))
        least = min(float((points @ row).max() - points[k] @ row) for row in grid)
        assert hull_gap(points, k) == pytest.approx(least, abs=0.05)
        assert hull_gap(points, k) <= least + 1e-9


def test_regret_within_its_error_counts_for_nothing():
    """Noise alone ranks no preference: the sparsest comes first."""
    rng = np.random.default_rng(1)
    points = np.asarray([[0, 1], [0.5, 0.95], [0.8, 0.8], [0.95, 0.5], [1, 0]])
    sweep = sweep_of(points, AT)
    values = np.repeat(sweep.rewards, 6, axis=2)
    sweep.rewards, sweep.prompts = values + rng.normal(0, 0.2, values.shape), sweep.prompts * 6
    sweep.completions = [[row * 6 for row in sweep.completions[0]]]
    sweep.normalizer = SCALE
    found = weaknesses(sweep)
    for weak in found:
        assert weak.beyond_error == max(0.0, weak.regret - weak.error)
        assert weak.error > 0 or weak.regret == 0
    quiet = [weak.contribution for weak in found if weak.beyond_error == 0]
    assert quiet == sorted(quiet, reverse=True)


def test_what_has_no_scale_or_no_front_is_refused():
    with pytest.raises(HoEError, match="are not normalised"):
        weaknesses(sweep_of([[0, 1], [1, 0]], [[0, 1], [1, 0]]))
    with pytest.raises(HoEError, match="has one preference"):
        weaknesses(scaled([[0, 1]], [[0, 1]]))


def test_replicates_without_a_scale_are_told():
    """The table's corners are two prompts; where one of them is drawn twice, objective a has no spread."""
    sweep = scaled([[0.6, 1.0], [1.0, 0.1]], [[0, 1], [1, 0]])
    table = np.asarray([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 1.0], [0.0, 1.0]]])
    sweep.normalizer = RewardNormalizer(table.mean(axis=1), ("a", "b"), samples=table)
    with pytest.warns(HoEWarning, match=r"has no spread in \d+ of 100 replicates, which are left out"):
        weaknesses(sweep, replicates=100)
