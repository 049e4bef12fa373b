"""Comparisons of sweeps whose points are known."""

from __future__ import annotations

import numpy as np
import pytest

from peft_hoe.errors import HoEError, HoEWarning
from peft_hoe.objectives import RewardNormalizer

LINE = [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]


def test_a_comparison_shows_differences_first_and_clipped_points_of_both(make_sweep):
    a, b = make_sweep([[1.0, 1.0], [2.0, 0.0]]), make_sweep([[0.5, 0.5], [-0.2, 1.0]], name="other")
    with pytest.warns(HoEWarning, match=r"'other' steered to 'b' alone lies at \[-0.2, 1.0\]"):
        found = a.compare(b, replicates=10)
    assert [*found.values][:2] == ["hypervolume A - B", "expected utility A - B"]
    assert [*found.values][-1] == "relative hypervolume A / B"
    assert found.clipped == (0, 1)
    assert "below it (clipped) 0 of A and 1 of other" in found.note()


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


@pytest.mark.filterwarnings("default:the experts hardly differ")
def test_a_comparison_tells_of_its_scale(make_sweep):
    """As the metrics of its first sweep do, and of both sweeps' corners on that scale."""
    scale = RewardNormalizer(np.eye(2), ["a", "b"], measurement={"spread_errors": [0.1, 0.5]})
    a, b = make_sweep([[1.0, 1.0], [2.0, -0.2]], normalizer=scale), make_sweep(np.eye(2), name="B")
    with pytest.warns(HoEWarning) as told:
        a.compare(b, replicates=10)
    said = [str(item.message) for item in told]
    assert any("'A' steered to 'b' alone lies at [2.0, -0.2], below the reference point" in text for text in said)
    assert any("hardly differ in objective 'b'" in text for text in said)
    with pytest.warns(HoEWarning, match=r"'A' steered to 'b' alone lies at \[2.0, -0.2\], below the reference point"):
        b.compare(make_sweep([[1.0, 1.0], [2.0, -0.2]]), replicates=10)


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
