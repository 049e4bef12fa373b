"""Merges that drop entries at random and make up for it: on average over the draws nothing is lost.

Each policy has a seed of its own, so that the order of policies does not matter, and a policy's mask is the same in every merge
that takes it. Masks are drawn on the CPU, and so are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..pieces import pieces, row_ranges
from .sums import linear
from .ties import average_of_the_elected_sign

_Combine = Callable[[Sequence[Tensor], Sequence[float]], Tensor]


def dare(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, seeds: Sequence[int]) -> Tensor:
    """DARE: every entry stays with probability k and is divided by it; then the weighted sum.

    Args:
        deltas: K tensors `(...)`.
        weights: K numbers.
        density: the probability k, in [0, 1].
        seeds: K seeds.
    """
    return _dare(deltas, weights, density, seeds, linear)


def dare_ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, seeds: Sequence[int]) -> Tensor:
    """DARE with TIES: entries are dropped as `dare` does; then those of the elected sign are averaged.

    Args:
        deltas: as for `dare`, and so are the rest.
        weights: see there.
        density: see there.
        seeds: see there.
    """
    return _dare(deltas, weights, density, seeds, average_of_the_elected_sign)


def _dare(
    deltas: Sequence[Tensor], weights: Sequence[float], density: float, seeds: Sequence[int], combine: _Combine
) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    merged = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    for out, *parts in pieces(merged, *deltas):
        kept = [_sampled(part, density, generator) for part, generator in zip(parts, generators, strict=True)]
        out.copy_(combine(kept, weights))
    return merged


def della(
    deltas: Sequence[Tensor], weights: Sequence[float], *, density: float, epsilon: float, seeds: Sequence[int]
) -> Tensor:
    """DELLA: large entries stay with a larger probability than small ones; then those of the elected sign are averaged.

    In a row of the matrix the probability rises with the rank of the magnitude, evenly over an interval of width epsilon around
    the density; what stays is divided by its probability. The interval is narrowed where it would leave [0, 1].

    Args:
        deltas: K tensors `(d_out, d_in)`, or of one row `(n,)`.
        weights: K numbers.
        density: mean probability to stay, in [0, 1].
        epsilon: width of the interval, in [0, 1].
        seeds: K seeds.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    rows = [delta if delta.ndim > 1 else delta[None] for delta in deltas]
    width = min(epsilon, 2 * density, 2 * (1 - density))
    merged = torch.empty_like(rows[0], memory_format=torch.contiguous_format)
    for start, stop in row_ranges(merged.shape):
        kept = [
            _sampled(part[start:stop], density + width * (_rank(part[start:stop]) - 0.5), generator)
            for part, generator in zip(rows, generators, strict=True)
        ]
        merged[start:stop] = average_of_the_elected_sign(kept, weights)
    return merged.view(deltas[0].shape)


def _rank(rows: Tensor) -> Tensor:
    """The place of each entry among the magnitudes of its row, 0 for the smallest and 1 for the largest."""
    n = rows.shape[-1]
    places = torch.arange(n, dtype=rows.dtype, device=rows.device).expand_as(rows) / max(1, n - 1)
    order = rows.abs().argsort(dim=-1, stable=True)
    return torch.empty_like(rows).scatter_(-1, order, places) if n > 1 else torch.full_like(rows, 0.5)


def _sampled(delta: Tensor, probability: float | Tensor, generator: torch.Generator) -> Tensor:
    """Entries that stay with a probability, divided by it."""
    stays = torch.rand(delta.shape, generator=generator).to(delta.device) < probability
    return torch.where(stays, delta / probability, 0)
