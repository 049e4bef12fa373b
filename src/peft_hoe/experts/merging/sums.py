"""Merges that are weighted sums of the task vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from ..pieces import inner_product


def linear(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Task arithmetic: sum_i lambda_i tau_i."""
    merged = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged.add_(delta, alpha=weight)
    return merged


def model_stock(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Model Stock: t sum_i lambda_i tau_i, the less the policies agree the closer to the base.

    Fine-tunes are seen as mu + noise, and the point nearest to mu between the base and their average is sought. With a
    preference, t = c / (s + (1 - s) c), s = sum_i lambda_i^2 and c the mean cosine of pairs, weighted by lambda_i lambda_j and
    at least 0. Equal weights give the paper's K c / (1 + (K - 1) c). One policy has no pairs: t = 1.
    """
    if len(deltas) == 1:
        return linear(deltas, weights)
    norms = [inner_product(delta, delta) ** 0.5 for delta in deltas]
    agreed = mass = 0.0
    for i, j in itertools.combinations(range(len(deltas)), 2):
        length = norms[i] * norms[j]
        agreed += weights[i] * weights[j] * (inner_product(deltas[i], deltas[j]) / length if length else 0.0)
        mass += weights[i] * weights[j]
    cosine = max(0.0, agreed / mass)
    squares = sum(weight**2 for weight in weights)
    return linear(deltas, weights).mul_(cosine / (squares + (1 - squares) * cosine))
