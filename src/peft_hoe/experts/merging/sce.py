"""SCE: select, calculate, erase."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pieces import kth_smallest_magnitude, pieces
from ..pruning import prune_rank
from .ties import average_of_the_elected_sign
from .trimming import trim


def sce(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """SCE (FuseChat): entries on which the policies differ are kept, and policies that changed more of them weigh more.

    Select the entries of the largest variance over the policies; calculate each policy's weight lambda_i m_i, m_i the mean of
    its squared entries there; erase entries against the sign of the weighted sum, and average the others.

    One policy alone has no variance: its largest entries stay.

    Args:
        deltas: K tensors `(...)`.
        weights: K numbers.
        density: share of entries that are selected, in [0, 1]; entries tied with the last one stay.
    """
    if len(deltas) == 1:
        return trim(deltas[0], density)
    merged = torch.zeros_like(deltas[0], memory_format=torch.contiguous_format)
    variance = torch.empty_like(merged)
    for out, *parts in pieces(variance, *deltas):
        out.copy_(torch.stack(parts).var(0, unbiased=False))
    n = merged.numel()
    selected = prune_rank(density, n)
    if selected == 0:
        return merged
    threshold = kth_smallest_magnitude(variance, n - selected + 1)
    squares = [0.0] * len(deltas)
    for spread, *parts in pieces(variance, *deltas):
        for i, part in enumerate(parts):
            squares[i] += float(part[spread >= threshold].square().sum())
    shares = [weight * square for weight, square in zip(weights, squares, strict=True)]
    total = sum(shares)
    if total == 0:
        return merged
    shares = [share / total for share in shares]
    for out, spread, *parts in pieces(merged, variance, *deltas):
        out.copy_(torch.where(spread >= threshold, average_of_the_elected_sign(parts, shares), 0))
    return merged
