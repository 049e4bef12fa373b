from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.merging.tsv import tsv


@pytest.fixture
def deltas():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 11, generator=generator) for _ in range(2)]


def test_policies_in_orthogonal_directions_do_not_disturb_each_other():
    """Nothing interferes, so that nothing is changed: the result is the weighted sum."""
    first, second = torch.zeros(6, 8), torch.zeros(6, 8)
    first[:3, :4] = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    second[3:, 4:] = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    merged = tsv([first, second], [0.3, 0.7], density=1.0)
    torch.testing.assert_close(merged, 0.3 * first + 0.7 * second, atol=1e-5, rtol=0)


def test_tsv_is_the_formula_with_polar_factors_from_a_decomposition(deltas):
    weights, k = [0.3, 0.7], 4
    triplets = [torch.linalg.svd(delta.double(), full_matrices=False) for delta in deltas]
    factors = []
    for side in (torch.cat([u[:, :k] for u, _, _ in triplets], 1), torch.cat([vh[:k].T for *_, vh in triplets], 1)):
        p, _, qh = torch.linalg.svd(side, full_matrices=False)
        factors.append(p @ qh)
    s = torch.cat([weight * s[:k] for weight, (_, s, _) in zip(weights, triplets, strict=True)])
    expected = factors[0] * s @ factors[1].T
    torch.testing.assert_close(tsv(deltas, weights, density=1.0).double(), expected, atol=1e-4, rtol=1e-3)


def test_one_policy_alone_keeps_its_leading_directions(deltas):
    u, s, vh = torch.linalg.svd(deltas[0], full_matrices=False)
    expected = (u[:, :3] * s[:3]) @ vh[:3]
    torch.testing.assert_close(tsv(deltas[:1], [1.0], density=3 / 8), expected, atol=1e-4, rtol=1e-3)


def test_equal_directions_count_as_interference(deltas):
    """Two equal policies share each direction: 1/sqrt(2) of it for each, on both sides."""
    u, s, vh = torch.linalg.svd(deltas[0], full_matrices=False)
    expected = 0.5 * (u[:, :4] * s[:4]) @ vh[:4]
    torch.testing.assert_close(tsv([deltas[0]] * 2, [0.5, 0.5], density=1.0), expected, atol=1e-4, rtol=1e-3)


def test_a_policy_that_changed_nothing_here_stands_in_nobodys_way(deltas):
    u, s, vh = torch.linalg.svd(deltas[0], full_matrices=False)
    expected = 0.5 * (u[:, :4] * s[:4]) @ vh[:4]
    merged = tsv([deltas[0], torch.zeros(8, 11)], [0.5, 0.5], density=1.0)
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-3)
