"""Arithmetic in pieces is arithmetic on the whole."""

from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.pieces import Memory, count_nonzero, frobenius_norm, kth_smallest_magnitude, pieces, row_ranges


def test_pieces_are_the_same_entries_of_every_tensor(monkeypatch):
    monkeypatch.setattr("peft_hoe.experts.pieces.PIECE", 4)
    first = torch.arange(15.0).view(3, 5)
    second = -first
    found = list(pieces(first, second))
    assert [len(one) for one, _ in found] == [4, 4, 4, 3]
    assert torch.cat([one for one, _ in found]).tolist() == list(range(15))
    assert all(torch.equal(one, -other) for one, other in found)
    found[0][0].zero_()  # views, so that results can be written to them
    assert first[0].tolist() == [0, 0, 0, 0, 4]


@pytest.mark.parametrize("shape", [(), (7,), (7, 3), (5, 1000), (3, 0)])
def test_row_ranges_cover_all_rows_once(shape, monkeypatch):
    monkeypatch.setattr("peft_hoe.experts.pieces.PIECE", 2)
    covered = [row for start, stop in row_ranges(shape) for row in range(start, stop)]
    assert covered == list(range(shape[0] if shape else 1))


def test_norms_and_counts_are_those_of_torch():
    tensor = torch.randn(33, 17, generator=torch.Generator().manual_seed(0))
    tensor[tensor.abs() < 0.3] = 0
    assert frobenius_norm(tensor) == pytest.approx(tensor.double().norm().item(), rel=1e-6)
    assert count_nonzero(tensor) == int((tensor != 0).sum())
    assert frobenius_norm(torch.zeros(0, 3)) == 0


def test_a_norm_whose_squares_are_beyond_float32_is_finite():
    assert frobenius_norm(torch.full((2, 2), 1e30)) == pytest.approx(2e30)


def test_the_kth_smallest_magnitude_is_that_of_torch_and_the_tensor_stays_as_it_is():
    tensor = torch.randn(40, 25, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # with ties
    before = tensor.clone()
    for k in (1, 2, 400, 999, 1000):
        assert kth_smallest_magnitude(tensor, k) == torch.kthvalue(tensor.abs().flatten(), k).values.item()
    assert torch.equal(tensor, before)


def test_memory_is_kept_by_name_and_grows():
    memory = Memory(torch.device("cpu"))
    first = memory.take("a", 2, 3)
    assert memory.take("a", 3, 2).data_ptr() == first.data_ptr()
    assert memory.take("b", 2, 3).data_ptr() != first.data_ptr()
    assert memory.take("a", 20, 30).shape == (20, 30)
