"""Task-SVD (paper eq. 3): a matrix becomes B A of rank r, B = U sqrt(S), A = sqrt(S) V^T.

Shapes: matrix (d_out, d_in), B (d_out, r), A (r, d_in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ExpertError, check_choice
from .krylov import LinAlgError, leading_triplets
from .pieces import frobenius_norm

SOLVERS = ("randomized", "exact")
TOLERANCE = 1e-4
_FULL = 3  # a rank above this part of the smaller side is cheaper by the full decomposition


@dataclass(frozen=True)
class LowRank:
    """A factored matrix.

    Attributes:
        b: `(d_out, r)` float32.
        a: `(r, d_in)` float32.
        norm: Frobenius norm of B A.
        energy: share of the matrix's squared norm that B A holds; 1 for a zero matrix.
        half_energy: the same for the first half of the directions, rounded up.
        residual: Frobenius norm of the matrix less B A.
        solver: what was used, with the size of its space and any fallback.
    """

    b: Tensor
    a: Tensor
    norm: float
    energy: float
    residual: float
    solver: str
    half_energy: float = 1.0

    @property
    def rank(self) -> int:
        """The number r."""
        return self.a.shape[0]

    def scaled(self, factor: float) -> LowRank:
        """B A times a factor, folded into B; energy and residual still describe the unscaled one."""
        return replace(self, b=self.b * factor, norm=self.norm * abs(factor))


def truncated_svd(
    matrix: Tensor,
    rank: int | None,
    *,
    share: float | None = None,
    solver: str = "randomized",
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> LowRank:
    """The best (exact) or nearly best (randomized) approximation of a rank.

    Args:
        matrix: `(d_out, d_in)`, finite.
        rank: r; None for full rank. Clamped to the numerical rank of the matrix.
        share: keep the fewest of these directions that hold this share of the energy.
        solver: "randomized" or "exact". Where r is more than a third of the smaller side, exact is used: it is faster there.
        tolerance: the share of the energy that the randomised solver may leave; see `krylov.leading_triplets`.
        seed: of the random block.

    Raises:
        ExpertError: unknown solver.
    """
    check_choice("svd", solver, SOLVERS, ExpertError)
    matrix = matrix.float()
    smaller = min(matrix.shape)
    wanted = smaller if rank is None else min(rank, smaller)
    total = frobenius_norm(matrix)
    if total == 0:
        empty = matrix.new_zeros
        return LowRank(empty(matrix.shape[0], 0), empty(0, matrix.shape[1]), 0.0, 1.0, 0.0, "none")
    u, s, vh, used = singular_triplets(matrix, wanted, total, solver=solver, tolerance=tolerance, seed=seed)
    if share is not None:
        enough = 1 + int(((s.double() ** 2).cumsum(0) < share * total**2).sum())
        u, s, vh = u[:, :enough], s[:enough], vh[:enough]
    return _factors(u, s, vh, total, matrix.shape, used)


def singular_triplets(
    matrix: Tensor,
    rank: int,
    norm: float | None = None,
    *,
    solver: str = "randomized",
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, str]:
    """U `(d_out, r)`, S `(r,)`, V^T `(r, d_in)` of the leading r triplets, and what was used.

    Args:
        matrix: `(d_out, d_in)` float32.
        rank: r, at most the smaller side.
        norm: Frobenius norm of the matrix, where it is known.
        solver: as for `truncated_svd`, and so are the rest.
        tolerance: see there.
        seed: see there.
    """
    if solver == "exact" or _FULL * rank > min(matrix.shape):
        u, s, vh, used = _exact(matrix)
    else:
        norm = frobenius_norm(matrix) if norm is None else norm
        try:
            u, s, vh, directions = leading_triplets(matrix, rank, norm, tolerance=tolerance, seed=seed)
            used = f"randomized ({directions} directions)"
        except LinAlgError:
            u, s, vh, used = _exact(matrix)
            used += " (randomized failed)"
    return u[:, :rank], s[:rank], vh[:rank], used


def reduce_factors(b: Tensor, a: Tensor, rank: int) -> LowRank:
    """The best approximation of B A of a smaller rank by two QR and one small SVD; B A itself is never made.

    Args:
        b: `(d_out, R)`.
        a: `(R, d_in)`.
        rank: r < R.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    total = float(s.norm())
    shape = torch.Size((b.shape[0], a.shape[1]))
    if total == 0:
        return LowRank(b.new_zeros(shape[0], 0), a.new_zeros(0, shape[1]), 0.0, 1.0, 0.0, "none")
    return _factors(qb @ u[:, :rank], s[:rank], vh[:rank] @ qa.T, total, shape, "qr")


def keep_factors(b: Tensor, a: Tensor) -> LowRank:
    """B A as it is; its norm from the small Gram matrices."""
    gram = (b.double().T @ b.double()) * (a.double() @ a.double().T)
    return LowRank(b.float(), a.float(), math.sqrt(max(float(gram.sum()), 0.0)), 1.0, 0.0, "as it is")


def _factors(u: Tensor, s: Tensor, vh: Tensor, total: float, shape: torch.Size, used: str) -> LowRank:
    # Singular values below float32's resolution are rounding, not rank.
    rank = max(1, int((s > s[0] * max(shape) * torch.finfo(torch.float32).eps).sum()))
    s = s[:rank].double()
    root = s.sqrt()
    energy = min(float((s**2).sum()) / total**2, 1.0)
    return LowRank(
        b=(u[:, :rank].double() * root).float(),
        a=(root[:, None] * vh[:rank].double()).float(),
        norm=float(s.norm()),
        energy=energy,
        residual=total * math.sqrt(1 - energy),
        solver=used,
        half_energy=min(float((s[: -(-rank // 2)] ** 2).sum()) / total**2, 1.0),
    )


def _exact(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, str]:
    try:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        if bool(torch.isfinite(s).all()):
            return u, s, vh, "exact"
    except LinAlgError:
        pass  # float32 did not converge: float64 nearly always does
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u, s, vh, "exact float64 (float32 failed)"
