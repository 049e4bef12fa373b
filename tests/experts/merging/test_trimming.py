from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.merging.trimming import trim


def test_trimming_keeps_the_largest_and_its_edges_are_all_and_nothing():
    delta = torch.tensor([1.0, -5.0, 3.0, -2.0, 4.0])
    assert trim(delta, 0.6).tolist() == [0.0, -5.0, 3.0, 0.0, 4.0]
    assert trim(delta, 0.2).tolist() == [0.0, -5.0, 0.0, 0.0, 0.0]
    assert trim(delta, 1.0).tolist() == delta.tolist()
    assert trim(delta, 0.0).tolist() == [0.0] * 5
    assert trim(torch.tensor([2.0, -2.0, 1.0]), 0.3).tolist() == [2.0, -2.0, 0.0]


@pytest.mark.parametrize("n", [1, 2, 7, 100, 127])
def test_trimming_keeps_as_many_as_the_density_says(n):
    delta = torch.arange(1.0, n + 1)
    for hundredths in range(101):
        assert int((trim(delta, hundredths / 100) != 0).sum()) == -(-hundredths * n // 100)
