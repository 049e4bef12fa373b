"""Every indicator on 500 random fronts, against moocore and against the definition as a loop."""

from __future__ import annotations

import itertools
import math
import warnings

import moocore
import numpy as np
import pytest

from peft_hoe import HoEWarning, metrics


def random_fronts(count, seed):
    """Fronts of 1 to 7 points in 2, 3 and 4 objectives; every third on a coarse grid, so that there are ties and duplicates."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        points = rng.normal(0.5, 0.5, size=(rng.integers(1, 8), 2 + k % 3))
        yield points.round(0 if k % 9 == 0 else 1) if k % 3 == 0 else points


def naive_dominates(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


def naive_hypervolume(points, reference):
    """Inclusion-exclusion: the boxes' volumes, minus those of the pairs' intersections, plus those of the triples' ..."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            corner = [min(column) for column in zip(*subset, strict=True)]
            box = math.prod(max(c - r, 0.0) for c, r in zip(corner, reference, strict=True))
            total += box if size % 2 else -box
    return total


def sweep(points, reference):
    """Two objectives: rectangles from right to left, each above what has been counted."""
    area, height = 0.0, reference[1]
    for x, y in sorted(points, key=lambda p: -p[0]):
        if x > reference[0] and y > height:
            area += (x - reference[0]) * (y - height)
            height = y
    return area


def naive_igd_plus(points, reference_front):
    return np.mean(
        [
            min(math.hypot(*(max(r - a, 0.0) for r, a in zip(z, p, strict=True))) for p in points)
            for z in reference_front
        ]
    )


def naive_epsilon(points, reference_front):
    return max(min(max(r - a for r, a in zip(z, p, strict=True)) for p in points) for z in reference_front)


def naive_coverage(a, b):
    return sum(any(naive_dominates(p, q) for p in a) for q in b) / len(b)


def naive_sparsity(points):
    front = {tuple(p) for p in points if not any(naive_dominates(q, p) for q in points)}
    columns = [sorted(column) for column in zip(*front, strict=True)]
    gaps = [(high - low) ** 2 for column in columns for low, high in itertools.pairwise(column)]
    return sum(gaps) / (len(front) - 1) if len(front) > 1 else 0.0


FRONTS = list(random_fronts(500, seed=0))
PAIRS = list(zip(FRONTS, [*FRONTS[3:], *FRONTS[:3]], strict=True))  # three further on has the same number of objectives
PAIRS = [(a, b) for a, b in PAIRS if a.shape[1] == b.shape[1]]


def hypervolume(points, reference_point):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HoEWarning)  # many a random front is below its reference point
        return metrics.hypervolume(points, reference_point=reference_point)


def test_there_are_fronts_of_every_kind():
    assert len(FRONTS) == 500
    assert {front.shape[1] for front in FRONTS} == {2, 3, 4}
    assert len(PAIRS) >= 490
    assert any(len(np.unique(front, axis=0)) < len(front) for front in FRONTS)
    assert sum(hypervolume(front, 0.2) == 0 for front in FRONTS) > 20
    assert sum(hypervolume(front, 0.2) > 0 for front in FRONTS) > 200


def test_hypervolume():
    for k, front in enumerate(FRONTS):
        reference = np.linspace(-0.1, 0.3, front.shape[1]) if k % 2 else np.full(front.shape[1], -0.1)
        value = hypervolume(front, reference)
        assert value == pytest.approx(naive_hypervolume(front.tolist(), reference.tolist()), abs=1e-12)
        assert value == pytest.approx(moocore.hypervolume(front, ref=reference, maximise=True), abs=1e-12)
        if front.shape[1] == 2:
            assert value == pytest.approx(sweep(front.tolist(), reference.tolist()), abs=1e-12)


def test_non_dominated_mask():
    for front in FRONTS:
        expected = [not any(naive_dominates(q, p) for q in front) for p in front]
        assert metrics.non_dominated_mask(front).tolist() == expected
        assert moocore.is_nondominated(front, maximise=True, keep_weakly=True).tolist() == expected


def test_igd_plus_and_epsilon():
    for a, b in PAIRS:
        assert metrics.igd_plus(a, b) == pytest.approx(naive_igd_plus(a, b), abs=1e-12)
        assert metrics.igd_plus(a, b) == pytest.approx(moocore.igd_plus(a, b, maximise=True), abs=1e-12)
        assert metrics.epsilon(a, b) == pytest.approx(naive_epsilon(a, b), abs=1e-12)
        assert metrics.epsilon(a, b) == pytest.approx(moocore.epsilon_additive(a, b, maximise=True), abs=1e-12)


def test_coverage_and_dominance():
    for a, b in PAIRS:
        assert metrics.coverage(a, b) == naive_coverage(a, b)
        assert metrics.front_dominates(a, b) == all(any(naive_dominates(p, q) for p in a) for q in b)
        assert metrics.dominates(a[0], b[0]) == naive_dominates(a[0], b[0])
        union = [*a, *b]
        free = [not any(naive_dominates(q, p) for q in union) for p in union]
        assert metrics.union_shares(a, b) == (np.mean(free[: len(a)]), np.mean(free[len(a) :]))


def test_expected_utility_spread_and_sparsity():
    rng = np.random.default_rng(1)
    for front in FRONTS:
        wanted = rng.dirichlet(np.ones(front.shape[1]), size=5)
        by_hand = np.mean([max(sum(w * x for w, x in zip(u, p, strict=True)) for p in front) for u in wanted])
        assert metrics.expected_utility(front, wanted) == pytest.approx(by_hand, abs=1e-12)
        assert metrics.sparsity(front) == pytest.approx(naive_sparsity(front.tolist()), abs=1e-12)
        best = front[metrics.non_dominated_mask(front)]
        assert metrics.spread(front) == pytest.approx(np.sqrt(sum(np.ptp(column) ** 2 for column in best.T)), abs=1e-12)


def everything(front, other, wanted):
    """All indicators at once; the reference point moves with the points."""
    return {
        "igd_plus": metrics.igd_plus(front, other),
        "epsilon": metrics.epsilon(front, other),
        "coverage": metrics.coverage(front, other),
        "covered": metrics.coverage(other, front[metrics.non_dominated_mask(front)]) == 1.0,
        "expected_utility": metrics.expected_utility(front, wanted),
        "spread": metrics.spread(front),
        "sparsity": metrics.sparsity(front),
    }


def test_order_and_duplicates_make_no_difference():
    rng = np.random.default_rng(2)
    for a, b in PAIRS[::5]:
        wanted = rng.dirichlet(np.ones(a.shape[1]), size=3)
        expected = everything(a, b, wanted) | {"hypervolume": hypervolume(a, -0.1)}
        for other in (rng.permutation(a), np.concatenate([a, a[:1]]), np.concatenate([a, a])):
            found = everything(other, b, wanted) | {"hypervolume": hypervolume(other, -0.1)}
            assert found == pytest.approx(expected, abs=1e-12)
        for other in (rng.permutation(b), np.concatenate([b, b])):
            found = everything(a, other, wanted) | {"hypervolume": expected["hypervolume"]}
            assert found == pytest.approx(expected, abs=1e-12)


def test_scaling_and_translation():
    rng = np.random.default_rng(3)
    for a, b in PAIRS[::5]:
        n = a.shape[1]
        wanted = rng.dirichlet(np.ones(n), size=3)
        shift, scales, scale = rng.normal(size=n), rng.uniform(0.5, 2, size=n), rng.uniform(0.5, 2)
        # each objective on its own scale: volumes are multiplied, dominance is the same
        assert hypervolume(a * scales + shift, -0.1 * scales + shift) == pytest.approx(
            hypervolume(a, -0.1) * scales.prod(), abs=1e-9
        )
        assert metrics.coverage(a * scales + 1, b * scales + 1) == metrics.coverage(a, b)
        assert metrics.non_dominated_mask(a * scales + 1).tolist() == metrics.non_dominated_mask(a).tolist()
        # one scale for all: distances are multiplied
        before, after = everything(a, b, wanted), everything(a * scale + shift, b * scale + shift, wanted)
        assert after["expected_utility"] == pytest.approx(
            before["expected_utility"] * scale + (wanted @ shift).mean(), abs=1e-9
        )
        for name, power in (("igd_plus", 1), ("epsilon", 1), ("spread", 1), ("sparsity", 2)):
            assert after[name] == pytest.approx(before[name] * scale**power, abs=1e-9)


def test_more_points_never_hurt():
    for a, b in PAIRS[::5]:
        union = np.concatenate([a, b])
        assert hypervolume(union, -0.1) >= hypervolume(a, -0.1) - 1e-12
        assert metrics.igd_plus(union, b) == metrics.epsilon(union[len(a) :], b) == 0
        assert metrics.coverage(union, b) >= metrics.coverage(a, b)
