"""Merging: several policies' task vectors become one, for a preference (paper eq. 4).

Every method is a pure function `(deltas, weights, **options) -> delta (...)` of one module's raw task vectors, K float32
tensors `(...)` of one shape, and the preference, K numbers above 0 that sum to 1. `merge` is the way in: it drops policies of
weight 0 and lets the weights sum to 1. For every method a one-hot weight gives that policy's (trimmed) task vector, the order
of policies does not matter, and scaling all task vectors scales the result. Everywhere 0/0 = 0.

Deviation from PEFT's `ties`: that one divides a sum weighted by lambda by the *count* of policies that agree, which
shrinks the result by up to K. Here the divisor is the sum of the weights that agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ExpertError, check_choice
from .pieces import kth_smallest_magnitude, pieces
from .pruning import drop_below, prune_rank


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


def linear(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Task arithmetic (Ilharco et al. 2023): sum_i lambda_i tau_i."""
    merged = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged.add_(delta, alpha=weight)
    return merged


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """TIES (Yadav et al. 2023): trim, elect a sign per entry, average those that agree with it.

    Args:
        deltas: K tensors `(...)`.
        weights: K numbers.
        density: share of entries that each policy keeps, in [0, 1].
    """
    thresholds = [trim_threshold(delta, density) for delta in deltas]
    merged = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    for out, *parts in pieces(merged, *deltas):
        trimmed = [drop_below(part, threshold) for part, threshold in zip(parts, thresholds, strict=True)]
        out.copy_(_average_of_the_elected_sign(trimmed, weights))
    return merged


def _average_of_the_elected_sign(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    elected = torch.sign(linear(parts, weights))  # gamma
    total, mass = torch.zeros_like(elected), torch.zeros_like(elected)
    for part, weight in zip(parts, weights, strict=True):
        agreeing = torch.relu(part * elected)  # |tau_i| where its sign is the elected one
        total.add_(agreeing, alpha=weight)
        mass.add_(torch.sign(agreeing), alpha=weight)
    return elected * total / mass.clamp_min_(torch.finfo(mass.dtype).tiny)


def pcb(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """PCB-Merging (Du et al. 2024): policies compete for every entry with what is large and what the others share.

    n_i = sgn(tau_i) minmax(|tau_i|); the score of an entry is exp(K n_i^2) sum_j tanh(n_i n_j). Of each policy the entries with
    the best scores stay, scaled to [0, 1] as beta_i (at least 1e-6, 0 for a negative score); the result is
    sum_i beta_i lambda_i tau_i / sum_i beta_i lambda_i.

    Args:
        deltas: K tensors `(...)`.
        weights: K numbers.
        density: share of entries that each policy keeps, in [0, 1]; entries tied with the last one stay.
    """
    if len(deltas) == 1:  # beta cancels, and the score grows with |tau|
        return trim(deltas[0], density)
    signed = torch.stack([torch.sign(delta) * _unit_range(delta.abs()) for delta in deltas])  # n
    total, mass = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight, own in zip(deltas, weights, signed, strict=True):
        intra = torch.exp(len(deltas) * (own.square() - 1))  # the factor e^-K cancels, and keeps it from overflowing
        inter = sum((torch.tanh(own * other) for other in signed), torch.zeros_like(own))
        share = weight * _balance(intra * inter, density)
        total, mass = total + share * delta, mass + share
    return torch.where(mass > 0, total / mass.clamp_min(torch.finfo(mass.dtype).tiny), 0)


def _balance(scores: Tensor, density: float) -> Tensor:
    """The beta `(...)` of one policy from its scores; 0 where an entry is dropped."""
    n = scores.numel()
    rank = prune_rank(density, n)
    if rank == 0:
        return torch.zeros_like(scores)
    kept = scores >= torch.kthvalue(scores.flatten(), n - rank + 1).values
    beta = torch.zeros_like(scores)
    beta[kept] = _unit_range(scores[kept].clamp_min(0)).clamp_min(1e-6)
    return beta


def _unit_range(values: Tensor) -> Tensor:
    """(x - min) / (max - min); 0 where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


@dataclass(frozen=True)
class MergeMethod:
    """A merge method.

    Attributes:
        function: what it computes.
        options: defaults of its options.
        sums: whether the result is the policies' weighted sum, so that low-rank policies can be merged by their factors.
    """

    function: Callable[..., Tensor]
    options: Mapping[str, float]
    sums: bool = False


METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod(linear, {}, sums=True),
    "ties": MergeMethod(ties, {"density": 0.6}),
    "pcb": MergeMethod(pcb, {"density": 0.2}),
}


def check_merge(method: str, options: Mapping[str, Any] | None) -> dict[str, float]:
    """All options of a method, defaults filled in.

    Raises:
        ExpertError: unknown method or option, or a share outside [0, 1].
    """
    check_choice("merge method", method, sorted(METHODS), ExpertError)
    known = METHODS[method].options
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ExpertError(
            f"merge {method!r} has no option {unknown}; it has {sorted(known) or 'none'}",
            argument="merging", value=unknown, allowed=sorted(known),
        )  # fmt: skip
    chosen = {**known, **(options or {})}
    for name, value in chosen.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ExpertError(
                f"merge option {name} is {value!r}; it must be a number from 0 to 1",
                argument=name, value=value, allowed="from 0 to 1",
            )  # fmt: skip
    return chosen


def merge(deltas: Sequence[Tensor], weights: Sequence[float], method: str, options: Mapping[str, float]) -> Tensor:
    """One task vector for a preference.

    Args:
        deltas: K raw task vectors of one shape, float32.
        weights: the preference, `(K,)`, non-negative; policies of weight 0 are dropped, the rest renormalised.
        method: a key of `METHODS`.
        options: as returned by `check_merge`.

    Returns:
        a tensor of the task vectors' shape.
    """
    kept = [i for i, weight in enumerate(weights) if weight > 0]
    total = sum(weights[i] for i in kept)
    return METHODS[method].function([deltas[i] for i in kept], [weights[i] / total for i in kept], **options)
