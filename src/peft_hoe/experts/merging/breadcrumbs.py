"""Model Breadcrumbs: neither the smallest entries, which are noise, nor the very largest, which are outliers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..pieces import kth_smallest_magnitude, pieces
from ..pruning import drop_below, prune_rank
from .sums import linear


def breadcrumbs(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, gamma: float) -> Tensor:
    """Model Breadcrumbs: each policy drops its largest entries, keeps the next ones, drops the rest; then the weighted sum.

    Args:
        deltas: K tensors `(...)`.
        weights: K numbers.
        density: share of entries that each policy keeps, in [0, 1]; as many as there are where gamma leaves fewer.
        gamma: share of its largest entries that each policy drops, in [0, 1]; 0 drops none of them.
    """
    bounds = [_bounds(delta, density, gamma) for delta in deltas]
    merged = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    for out, *parts in pieces(merged, *deltas):
        kept = [
            torch.where(part.abs() <= highest, drop_below(part, lowest), 0)
            for part, (lowest, highest) in zip(parts, bounds, strict=True)
        ]
        out.copy_(linear(kept, weights))
    return merged


def _bounds(delta: Tensor, density: float, gamma: float) -> tuple[float, float]:
    """The magnitudes between which entries stay, both included."""
    n = delta.numel()
    left = prune_rank(1 - gamma, n)  # all but the floor(gamma n) largest
    kept = min(prune_rank(density, n), left)
    if kept == 0:
        return math.inf, math.inf
    highest = math.inf if left == n else kth_smallest_magnitude(delta, left)
    return (0.0 if kept == left else kth_smallest_magnitude(delta, left - kept + 1)), highest
