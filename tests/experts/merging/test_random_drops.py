from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.merging.random_drops import _rank, dare, dare_ties, della
from peft_hoe.experts.merging.ties import ties

DELTA = torch.arange(1.0, 401.0).view(20, 20) * torch.tensor([1.0, -1.0]).repeat(10)


def draws(function, count, **options):
    """`(count, 20, 20)`: results with one seed after the other."""
    return torch.stack([function([DELTA], [1.0], **options, seeds=[seed]) for seed in range(count)])


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_what_dare_keeps_is_divided_by_the_density_and_its_share_is_the_density(density):
    found = draws(dare, 200, density=density)
    kept = found != 0
    assert torch.allclose(found[kept], (DELTA / density).expand_as(found)[kept])
    deviation = (density * (1 - density) / kept.numel()) ** 0.5
    assert kept.double().mean().item() == pytest.approx(density, abs=5 * deviation)


@pytest.mark.parametrize(("function", "options"), [(dare, {"density": 0.5}), (della, {"density": 0.5, "epsilon": 0.4})])
def test_nothing_is_lost_on_average(function, options):
    found = draws(function, 2000, **options)
    spread = found.std(0) / 2000**0.5
    assert ((found.mean(0) - DELTA).abs() < 5 * spread).all()


def test_dare_is_a_weighted_sum_and_dare_ties_an_average_of_the_elected_sign():
    other = DELTA.roll(7).neg()
    kept = [dare([delta], [1.0], density=0.5, seeds=[seed]) for delta, seed in ((DELTA, 4), (other, 5))]
    both = [DELTA, other]
    torch.testing.assert_close(dare(both, [0.3, 0.7], density=0.5, seeds=[4, 5]), 0.3 * kept[0] + 0.7 * kept[1])
    expected = ties(kept, [0.3, 0.7], density=1.0)
    torch.testing.assert_close(dare_ties(both, [0.3, 0.7], density=0.5, seeds=[4, 5]), expected)


def test_della_keeps_large_entries_with_a_larger_probability_in_each_row():
    epsilon, density, count = 0.4, 0.5, 2000
    found = draws(della, count, density=density, epsilon=epsilon)
    share = (found != 0).double().mean(0)
    # In a row the magnitudes rise from left to right: probabilities 0.3 to 0.7.
    expected = density + epsilon * (torch.arange(20) / 19 - 0.5)
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((share - expected).abs() < 5 * deviation).all()
    kept = found[0] != 0
    torch.testing.assert_close(found[0][kept], (DELTA / expected)[kept])


@pytest.mark.parametrize("density", [0.0, 0.05, 0.95, 1.0])
def test_dellas_interval_is_narrowed_so_that_no_probability_leaves_the_unit_interval(density):
    found = draws(della, 300, density=density, epsilon=0.8)
    assert (found != 0).double().mean().item() == pytest.approx(density, abs=0.005)
    assert found.isfinite().all()


def test_ranks_are_places_among_the_magnitudes_of_a_row():
    assert _rank(torch.tensor([[3.0, -1.0, 2.0], [0.0, 0.0, -5.0]])).tolist() == [[1.0, 0.0, 0.5], [0.0, 0.5, 1.0]]
    assert _rank(torch.tensor([[4.0]])).tolist() == [[0.5]]


def test_a_row_alone_is_a_matrix_of_one_row():
    row = torch.arange(1.0, 9.0)
    expected = della([row[None]], [1.0], density=0.5, epsilon=0.2, seeds=[3])
    assert torch.equal(della([row], [1.0], density=0.5, epsilon=0.2, seeds=[3]), expected[0])
