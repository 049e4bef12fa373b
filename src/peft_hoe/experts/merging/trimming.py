"""Trimming: a task vector keeps its largest entries."""

from __future__ import annotations

import math

from torch import Tensor

from ..pieces import kth_smallest_magnitude
from ..pruning import drop_below, prune_rank


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep the ceil(density * n) largest of n entries of `delta` `(...)`; entries tied with the last one stay."""
    return drop_below(delta, trim_threshold(delta, density))


def trim_threshold(delta: Tensor, density: float) -> float:
    """The magnitude below which `trim` drops: 0 where all stay, infinity where none does."""
    n = delta.numel()
    kept = prune_rank(density, n)
    if kept == n:
        return 0.0
    return kth_smallest_magnitude(delta, n - kept + 1) if kept else math.inf
