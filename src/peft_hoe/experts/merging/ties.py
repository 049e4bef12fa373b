"""TIES: policies that pull an entry the other way are left out of its average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pieces import pieces
from ..pruning import drop_below
from .sums import linear
from .trimming import trim_threshold


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """TIES: trim, elect a sign per entry, average those that agree with it.

    Args:
        deltas: K tensors `(...)`.
        weights: K numbers.
        density: share of entries that each policy keeps, in [0, 1].
    """
    thresholds = [trim_threshold(delta, density) for delta in deltas]
    merged = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    for out, *parts in pieces(merged, *deltas):
        trimmed = [drop_below(part, threshold) for part, threshold in zip(parts, thresholds, strict=True)]
        out.copy_(average_of_the_elected_sign(trimmed, weights))
    return merged


def average_of_the_elected_sign(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Of each entry the sign of its weighted sum is elected, and the weighted average of those that have it is taken.

    PEFT's divides the weighted sum by the *count* of policies that agree, which shrinks the result by up to K. Here the divisor
    is the sum of the weights that agree.
    """
    elected = torch.sign(linear(deltas, weights))  # gamma
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = torch.relu(delta * elected)  # |tau_i| where its sign is the elected one
        total.add_(agreeing, alpha=weight)
        mass.add_(torch.sign(agreeing), alpha=weight)
    return elected * total / mass.clamp_min_(torch.finfo(mass.dtype).tiny)
