"""TSV-Merge: the leading singular directions of all policies side by side, made orthogonal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pruning import prune_rank
from ..svd import singular_triplets

_RANK = 1e-6  # what is below this share of the largest is rounding


def tsv(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """TSV-Merge: singular vectors of different policies that point the same way interfere; whitening takes that out.

    Of each policy the leading triplets (u, s, v) are kept, an equal share for each of K policies. The u of all policies form
    one matrix, which is replaced by the nearest one with orthonormal columns (its polar factor), and so are the v; the result
    is U diag(lambda_i s_i) V^T.

    Each policy costs a full singular value decomposition where its share is more than a third of all directions.

    Args:
        deltas: K matrices `(d_out, d_in)`.
        weights: K numbers.
        density: share of the min(d_out, d_in) directions that all policies keep together, in [0, 1].
    """
    size = prune_rank(density / len(deltas), min(deltas[0].shape))
    if size == 0:
        return torch.zeros_like(deltas[0])
    if len(deltas) == 1 and density == 1:
        return deltas[0] * weights[0]
    left, values, right = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vh, _ = singular_triplets(delta, size)
        held = s > _RANK * s[0]  # directions without energy point anywhere, and would stand in the way of others
        left.append(u[:, held].double())
        values.append(weight * s[held].double())
        right.append(vh[held].double().T)
    u, v = _polar(torch.cat(left, 1)), _polar(torch.cat(right, 1))
    return (u * torch.cat(values) @ v.T).to(deltas[0].dtype)


def _polar(columns: Tensor) -> Tensor:
    """The polar factor `(m, n)` of a matrix: its columns whitened; directions that it lacks stay lacking."""
    if not columns.shape[1]:
        return columns
    values, vectors = torch.linalg.eigh(columns.T @ columns)
    held = values > _RANK * values[-1]
    root = torch.where(held, values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0)
    return columns @ (vectors * root @ vectors.T)
