"""FR-Merging by hand, and what is particular about it."""

from __future__ import annotations

import math

import pytest
import torch

from peft_hoe.experts.merging.fr import fr


def wave(rows, columns, up, across):
    """A cosine with so many periods down and across, `(rows, columns)`."""
    phase = up * torch.arange(rows)[:, None] / rows + across * torch.arange(columns) / columns
    return torch.cos(2 * math.pi * phase)


def test_low_frequencies_are_dropped_and_high_ones_stay():
    slow, fast = wave(8, 8, 1, 0), wave(8, 8, 3, 2)
    torch.testing.assert_close(fr([slow + fast], [1.0], density=0.5), fast, atol=1e-5, rtol=0)
    constant = torch.full((8, 8), 3.0)
    torch.testing.assert_close(fr([constant + fast], [1.0], density=63 / 64), fast, atol=1e-5, rtol=0)
    row = wave(1, 8, 0, 3)[0] + 1
    torch.testing.assert_close(fr([row], [1.0], density=0.5), row - 1, atol=1e-5, rtol=0)


def test_each_policy_is_filtered_before_the_sum():
    first, second = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(0))
    alone = [fr([delta], [1.0], density=0.4) for delta in (first, second)]
    expected = 0.3 * alone[0] + 0.7 * alone[1]
    torch.testing.assert_close(fr([first, second], [0.3, 0.7], density=0.4), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("density", [0.3, 0.8])
def test_it_depends_on_the_order_of_neurons(density):
    delta = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert not torch.allclose(fr([delta[order]], [1.0], density=density), fr([delta], [1.0], density=density)[order])
    assert torch.equal(fr([delta[order]], [1.0], density=1.0), delta[order])
