from __future__ import annotations

import torch

from peft_hoe.experts.merging.ties import ties


def test_ties_by_hand():
    deltas = torch.tensor([[4.0, -1.0, 2.0, 1.0], [2.0, 3.0, -2.0, 0.0]])
    # Entry 0: both agree, the weighted mean. 1: the second wins. 2: an exact conflict. 3: only the first has a say.
    merged = ties(deltas, [0.5, 0.5], density=1.0)
    assert merged.tolist() == [3.0, 3.0, 0.0, 1.0]
    # At 3:1 the first wins entry 2 as well, and entry 1 is a draw: 0.75 * -1 + 0.25 * 3 = 0.
    merged = ties(deltas, [0.75, 0.25], density=1.0)
    assert merged.tolist() == [3.5, 0.0, 2.0, 1.0]


def test_ties_does_not_shrink_policies_that_agree():
    # PEFT's ties divides by the count of policies and returns half of this.
    delta = torch.tensor([1.0, -2.0])
    assert torch.equal(ties([delta, delta], [0.5, 0.5], density=1.0), delta)


def test_ties_is_the_formula_written_out():
    generator = torch.Generator().manual_seed(0)
    deltas = [torch.randn(30, 20, generator=generator) for _ in range(4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    kept = []
    for delta in deltas:
        threshold = delta.abs().flatten().sort(descending=True).values[int(0.3 * 600) - 1]
        kept.append(torch.where(delta.abs() >= threshold, delta, 0).double())
    total = sum(weight * delta for weight, delta in zip(weights, kept, strict=True))
    agree = [(delta.sign() == total.sign()) & (delta != 0) for delta in kept]
    above = sum(weight * delta * mask for weight, delta, mask in zip(weights, kept, agree, strict=True))
    below = sum(weight * mask for weight, mask in zip(weights, agree, strict=True))
    expected = torch.where(below > 0, above / below, 0)
    torch.testing.assert_close(ties(deltas, weights, density=0.3).double(), expected, rtol=1e-5, atol=1e-6)
