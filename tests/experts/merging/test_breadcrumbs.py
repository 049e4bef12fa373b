from __future__ import annotations

import pytest
import torch

from peft_hoe.experts.merging.breadcrumbs import breadcrumbs

DELTA = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0])


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.2, [4, 5, 6, 7, 8]),  # 9 and 10 are outliers
        (0.5, 0.0, [6, 7, 8, 9, 10]),
        (1.0, 0.0, range(1, 11)),
        (0.9, 0.3, range(1, 8)),  # no more than are left
        (0.3, 0.15, [7, 8, 9]),  # gamma counts whole entries, rounded down
        (0.0, 0.2, []),
        (0.5, 1.0, []),
    ],
)
def test_what_one_policy_keeps(density, gamma, kept):
    expected = [value if abs(value) in kept else 0.0 for value in DELTA.tolist()]
    assert breadcrumbs([DELTA], [1.0], density=density, gamma=gamma).tolist() == expected


def test_entries_tied_with_a_bound_stay():
    tied = torch.tensor([1.0, 2.0, 2.0, 3.0, 3.0, 3.0])
    assert breadcrumbs([tied], [1.0], density=0.5, gamma=1 / 6).tolist() == [0.0, 2.0, 2.0, 3.0, 3.0, 3.0]


def test_policies_are_added_by_weight():
    other = DELTA.flip(0)
    merged = breadcrumbs([DELTA, other], [0.25, 0.75], density=0.3, gamma=0.1)
    kept = [torch.where((delta.abs() >= 7) & (delta.abs() <= 9), delta, 0) for delta in (DELTA, other)]
    torch.testing.assert_close(merged, 0.25 * kept[0] + 0.75 * kept[1])
