from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.pruning import ThresholdSearch, drop_below, magnitude_threshold, prune_rank


@pytest.mark.parametrize(
    ("share", "n", "rank"), [(0.4, 10, 4), (0.4, 11, 5), (0.1, 30, 3), (0.0, 7, 0), (0.99, 100, 99)]
)
def test_rank_is_the_ceiling_despite_rounding(share, n, rank):
    assert prune_rank(share, n) == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.4, 0.5, 0.9, 0.999])
def test_streamed_threshold_equals_kthvalue(share, dtype):
    generator = torch.Generator().manual_seed(0)
    pieces = [(torch.randn(shape, generator=generator) * 1e-3).to(dtype) for shape in ((37, 11), (5,), (64, 64))]
    search = ThresholdSearch(share)
    for piece in pieces:
        search.count(piece)
    search.narrow()
    for piece in pieces:
        search.count_inside(piece)
    everything = torch.cat([piece.flatten() for piece in pieces]).float().abs()
    expected = torch.kthvalue(everything, prune_rank(share, everything.numel())).values.item()
    assert search.threshold == expected
    assert search.dropped == (everything < expected).double().mean().item()


def test_entries_equal_to_the_threshold_stay():
    values = torch.tensor([0.0, 1.0, -1.0, 1.0, 2.0])
    assert magnitude_threshold(values, 0.4) == 1.0
    assert drop_below(values, 1.0).tolist() == [0.0, 1.0, -1.0, 1.0, 2.0]
    search = ThresholdSearch(0.4)
    search.count(values)
    search.narrow()
    search.count_inside(values)
    assert search.dropped == 0.2


def test_subnormal_and_extreme_magnitudes_keep_their_order():
    values = torch.tensor([1e-45, -1e-40, 1e-38, 3e38, -0.0])
    assert magnitude_threshold(values, 0.6) == torch.kthvalue(values.abs(), 3).values.item()


def test_nothing_is_dropped_at_share_zero_or_where_all_is_zero():
    assert magnitude_threshold(torch.randn(5), 0.0) == 0.0
    assert magnitude_threshold(torch.zeros(5), 0.4) == 0.0
    assert drop_below(torch.ones(2), 0.0).tolist() == [1.0, 1.0]
