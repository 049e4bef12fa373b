"""PCB-Merging: policies compete for every entry."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pieces import kth_smallest, pieces
from ..pruning import prune_rank
from .trimming import trim

_LEAST = 1e-6  # the share of an entry that is kept, at least


def pcb(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """PCB-Merging: policies compete for every entry with what is large and what the others share.

    n_i = sgn(tau_i) minmax(|tau_i|); the score of an entry is exp(K n_i^2) sum_j tanh(n_i n_j). Of each policy the entries with
    the best scores stay, scaled to [0, 1] as beta_i (at least 1e-6, also for a negative score); the result is
    sum_i beta_i lambda_i tau_i / sum_i beta_i lambda_i.

    Args:
        deltas: K tensors `(...)`.
        weights: K numbers.
        density: share of entries that each policy keeps, in [0, 1]; entries tied with the last one stay.

    Scores are float64. The cut is a jump: an entry that only one policy keeps becomes that policy's whole tau, however low its
    score. In float32 the order of two scores at the cut may be that of their rounding, and two such entries can be 2 % of a
    merged vector's length.
    """
    if len(deltas) == 1:  # beta cancels, and the score grows with |tau|
        return trim(deltas[0], density)
    ranges = [_range_of_magnitudes(delta) for delta in deltas]
    total = torch.zeros_like(deltas[0], memory_format=torch.contiguous_format)
    mass, scores = torch.zeros_like(total), torch.empty_like(total, dtype=torch.float64)
    for i, weight in enumerate(weights):
        for out, *parts in pieces(scores, *deltas):
            signed = [_normalised(part.double(), *bounds) for part, bounds in zip(parts, ranges, strict=True)]  # n
            out.copy_(_score(signed[i], signed))
        lowest = _threshold(scores, density)
        least, most = _range_of_kept(scores, lowest)
        for sum_, share_, score, delta in pieces(total, mass, scores, deltas[i]):
            share = weight * _balance(score, lowest, least, most).to(sum_.dtype)
            sum_.add_(share * delta)
            share_.add_(share)
    return total.div_(mass.clamp_min_(torch.finfo(mass.dtype).tiny))


def _range_of_magnitudes(delta: Tensor) -> tuple[float, float]:
    bounds = [(float(part.abs().min()), float(part.abs().max())) for (part,) in pieces(delta)]
    return min(low for low, _ in bounds), max(high for _, high in bounds)


def _normalised(delta: Tensor, low: float, high: float) -> Tensor:
    """Magnitudes stretched to [0, 1], signs kept; 0 where all magnitudes are equal."""
    return torch.sign(delta) * (delta.abs() - low) / (high - low) if high > low else torch.zeros_like(delta)


def _score(own: Tensor, signed: Sequence[Tensor]) -> Tensor:
    # The factor e^-K cancels in beta, and keeps the exponential from overflowing.
    intra = torch.exp(len(signed) * (own.square() - 1))
    return intra * sum((torch.tanh(own * other) for other in signed), torch.zeros_like(own))


def _threshold(scores: Tensor, density: float) -> float:
    """The lowest score that stays; infinity where none does."""
    n = scores.numel()
    kept = prune_rank(density, n)
    return kth_smallest(scores, n - kept + 1) if kept else float("inf")


def _range_of_kept(scores: Tensor, lowest: float) -> tuple[float, float]:
    """Least and greatest of the scores that stay, negative ones counted as 0."""
    highest = max(float(part.max()) for (part,) in pieces(scores))
    return max(lowest, 0.0), max(highest, 0.0)


def _balance(scores: Tensor, lowest: float, least: float, most: float) -> Tensor:
    """The beta of entries from their scores; 0 where they are dropped."""
    beta = (scores.clamp_min(0) - least) / (most - least) if most > least else torch.zeros_like(scores)
    return torch.where(scores >= lowest, beta.clamp_min(_LEAST), 0)
