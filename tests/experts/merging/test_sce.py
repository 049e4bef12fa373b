from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.merging.sce import sce
from peft_hoe.experts.merging.trimming import trim


def test_sce_by_hand():
    first, second = torch.tensor([4.0, 1.0, -2.0, 1.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    # Variances 2.25, 0, 4 and 0.25: half of the entries are 0 and 2. Mean squares there: 10 and 2.5.
    # Weights 0.8 and 0.2. Entry 2: 0.8 * -2 + 0.2 * 2 < 0, the second is erased.
    merged = sce([first, second], [0.5, 0.5], density=0.5)
    torch.testing.assert_close(merged, torch.tensor([0.8 * 4 + 0.2 * 1, 0.0, -2.0, 0.0]))
    # A preference of 1 : 9 turns the weights into 1 * 10 : 9 * 2.5, and entry 2 with them.
    merged = sce([first, second], [0.1, 0.9], density=0.5)
    torch.testing.assert_close(merged, torch.tensor([(10 * 4 + 22.5 * 1) / 32.5, 0.0, 2.0, 0.0]))


def test_one_policy_alone_keeps_its_largest_entries():
    delta = torch.tensor([1.0, -5.0, 3.0, -2.0, 4.0])
    assert torch.equal(sce([delta], [1.0], density=0.6), trim(delta, 0.6))


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_where_policies_differ_nowhere_all_entries_are_selected(density):
    delta = torch.tensor([1.0, -5.0, 3.0])
    torch.testing.assert_close(sce([delta, delta], [0.5, 0.5], density=density), delta)
