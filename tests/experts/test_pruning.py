from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from peft_hoe.experts.pruning import ThresholdSearch, drop_below, magnitude_threshold, prune_rank

SIZES = [*range(1, 201), 10**6 + 1, 10**9, 10**10 + 1, 3 * 10**11 + 7]


def test_rank_is_the_ceiling_in_exact_arithmetic():
    """A product that is whole but for rounding is whole (0.07 * 100 is above 7 in float64), and no other one is."""
    for n in SIZES:
        for hundredths in range(100):
            assert prune_rank(hundredths / 100, n) == -(-hundredths * n // 100)


def test_rounding_of_a_share_does_not_move_the_rank():
    assert math.ceil(0.07 * 100) == 8  # what the guard is for
    assert all(prune_rank(rank / n, n) == rank for n in SIZES for rank in range(min(n, 300)))
    assert all(prune_rank((rank + 1e-6) / n, n) == rank + 1 for n in SIZES[:200] for rank in range(n))


def search_for(share, tensors, sample=None):
    """A search that has seen the tensors, and whether it had to see them twice."""
    search = ThresholdSearch(share, sample)
    for tensor in tensors:
        search.count(tensor)
    again = search.narrow()
    for tensor in tensors if again else []:
        search.count_inside(tensor)
    return search, again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.4, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("guess", ["none", "right", "wrong"])
def test_streamed_threshold_equals_kthvalue(share, dtype, guess, monkeypatch):
    monkeypatch.setattr("peft_hoe.experts.pieces.PIECE", 1000)
    monkeypatch.setattr("peft_hoe.experts.pruning._PENDING", 100)
    generator = torch.Generator().manual_seed(0)
    tensors = [(torch.randn(shape, generator=generator) * 1e-3).to(dtype) for shape in ((37, 11), (5,), (64, 64))]
    everything = torch.cat([tensor.flatten() for tensor in tensors]).float().abs()
    samples = {"none": None, "right": everything, "wrong": everything * 1000}
    search, again = search_for(share, tensors, samples[guess])
    assert again is (guess != "right")
    expected = torch.kthvalue(everything, prune_rank(share, everything.numel())).values.item()
    assert search.threshold == expected
    assert search.dropped == (everything < expected).double().mean().item()


@pytest.mark.parametrize("sample", [None, torch.tensor([1.0, 2.0]), torch.zeros(3), torch.tensor([3e38, 1e-45])])
def test_entries_equal_to_the_threshold_stay(sample):
    values = torch.tensor([0.0, 1.0, -1.0, 1.0, 2.0])
    assert magnitude_threshold(values, 0.4) == 1.0
    assert drop_below(values, 1.0).tolist() == [0.0, 1.0, -1.0, 1.0, 2.0]
    search, _ = search_for(0.4, [values], sample)
    assert (search.threshold, search.dropped) == (1.0, 0.2)


@pytest.mark.parametrize("threshold", [1e-45, 1e-40, 1e-38, 0.1, 1.0, 3.4e38])
def test_dropping_compares_exactly(threshold):
    threshold = torch.tensor(threshold).item()  # a float32
    above, below = np.nextafter(np.float32(threshold), np.float32([np.inf, 0]))
    values = torch.tensor([threshold, above, below, -threshold, -below, 0.0])
    assert torch.equal(drop_below(values, threshold), torch.where(values.abs() >= threshold, values, 0))
    assert drop_below(values, math.inf).tolist() == [0.0] * 6
    into = torch.ones(6)
    assert drop_below(values, threshold, out=into) is into


def test_subnormal_and_extreme_magnitudes_keep_their_order():
    values = torch.tensor([1e-45, -1e-40, 1e-38, 3e38, -0.0])
    assert magnitude_threshold(values, 0.6) == torch.kthvalue(values.abs(), 3).values.item()


def test_nothing_is_dropped_at_share_zero_or_where_all_is_zero():
    assert magnitude_threshold(torch.randn(5), 0.0) == 0.0
    assert magnitude_threshold(torch.zeros(5), 0.4) == 0.0
    assert drop_below(torch.ones(2), 0.0).tolist() == [1.0, 1.0]
