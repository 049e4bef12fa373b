"""The leading singular triplets of a matrix from a randomised block Krylov space.

The space is that of (A A^T)^i A X, i = 0, 1, ..., with X a thin block of random vectors (Musco and Musco 2015; for a block of
one it is that of Golub and Kahan's bidiagonalisation). It grows block by block and keeps every direction that it has paid for.
Subspace iteration throws all but the last away: at equal cost in products with A this comes far closer to the optimum, on
flat spectra above all.

Shapes: A (m, n) with m <= n, rank r, block b, K directions so far: basis Q (K, m), one direction a row; image Q A (K, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .devices import CPU

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
_OVERLAP = 1e-5  # cosine between directions that count as orthogonal
_PASSES = 5


def leading_triplets(
    matrix: Tensor, rank: int, norm: float, *, tolerance: float, seed: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The singular triplets that hold the most energy.

    Args:
        matrix: A `(d_out, d_in)`, float32 and finite.
        rank: r, at most the smaller side.
        norm: Frobenius norm of A.
        tolerance: the space grows until the energy of the r triplets would gain less than this share of itself.
        seed: of the random block.

    Returns:
        U `(d_out, r)` float32, S `(r,)` float64 and descending, V^T `(r, d_in)` float32, and K.

    Raises:
        LinAlgError: a value is not finite, or the small eigenvalue problem does not converge.
    """
    if matrix.shape[0] > matrix.shape[1]:
        v, s, uh, directions = leading_triplets(matrix.T, rank, norm, tolerance=tolerance, seed=seed)
        return uh.T, s, v.T, directions
    smaller, width = len(matrix), min(max(rank // 4, 16), 64)  # few at once: each block sees all before it
    generator = torch.Generator().manual_seed(seed)  # of the CPU, so that the block is the same on every device
    random = torch.randn(width, matrix.shape[1], generator=generator).to(matrix)
    block, grown = _product(random, matrix.T), GrowingRows(smaller, matrix.dtype, matrix.device)
    images = GrowingRows(matrix.shape[1], torch.float64, matrix.device)
    gram = matrix.new_empty(0, 0, dtype=torch.float64)
    energies: list[float] = []
    while True:
        block = _orthonormal(block[: smaller - len(grown)], grown.rows)
        product = _product(block, matrix)
        gram = _bordered(gram, images.rows, product.double())
        grown.append(block)
        images.append(product)
        if len(grown) == smaller:
            break
        if len(grown) >= rank + width:
            energies.append(float(torch.linalg.eigvalsh(gram)[-rank:].sum()))
            if _enough(energies, norm**2 - float(gram.trace()), tolerance):
                break
        block = _product(product, matrix.T)
    u, s, vh = _triplets(gram, grown.rows, images.rows, rank)
    return u, s, vh, len(grown)


class GrowingRows:
    """A matrix to which rows are added, without copying it each time.

    >>> matrix = GrowingRows(3, torch.float32)
    >>> matrix.append(torch.ones(2, 3))
    >>> matrix.rows.shape
    torch.Size([2, 3])
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self._memory, self._used = torch.empty(0, width, dtype=dtype, device=device), 0

    def __len__(self) -> int:
        return self._used

    @property
    def rows(self) -> Tensor:
        """What was added so far, `(K, width)`."""
        return self._memory[: self._used]

    def append(self, rows: Tensor) -> None:
        """Add rows `(b, width)`, rounded to the matrix's dtype."""
        used = self._used + len(rows)
        if used > len(self._memory):
            larger = self._memory.new_empty(2 * used, self._memory.shape[1])
            larger[: self._used] = self.rows
            self._memory = larger
        self._memory[self._used : used] = rows
        self._used = used


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """A few rows `(b, m)` times a matrix `(m, n)`, in the order that is faster for how the matrix is stored."""
    return rows @ matrix if matrix.is_contiguous() else (matrix.T @ rows.T).T


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows `(b, m)` in the span of `block` and `basis` `(K, m)`, orthogonal to the latter.

    Projecting leaves rounding of the size of what was taken away. Twice is enough where something else is left; where the
    basis holds all that the block has, rounding is what is left, and it takes a third time.
    """
    block = torch.linalg.qr(block.T)[0].T
    for _ in range(_PASSES if len(basis) else 0):
        inside = block @ basis.T
        if float(inside.abs().max()) < _OVERLAP:
            break
        block = torch.linalg.qr((block - inside @ basis).T)[0].T
    return block


def _bordered(gram: Tensor, image: Tensor, product: Tensor) -> Tensor:
    """The Gram matrix `(K + b, K + b)` of the rows of `image` `(K, n)`, which is known, and `product` `(b, n)`."""
    cross = image @ product.T
    return torch.cat([torch.cat([gram, cross], 1), torch.cat([cross.T, product @ product.T], 1)])


def _enough(energies: list[float], outside: float, tolerance: float) -> bool:
    """Whether the energy of the leading triplets would gain less than the tolerance.

    What the space does not hold (`outside`) bounds the gain. Otherwise it is extrapolated: gains shrink at least geometrically.
    """
    allowed = tolerance * energies[-1]
    if outside <= allowed:
        return True
    if len(energies) < 3:
        return False
    before, last = energies[-2] - energies[-3], energies[-1] - energies[-2]
    return last < before and last**2 / (before - last) <= allowed


def _triplets(gram: Tensor, basis: Tensor, image: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of the best approximation within the space (Rayleigh-Ritz)."""
    squared, vectors = torch.linalg.eigh(gram)
    if not bool(torch.isfinite(squared).all()):
        raise LinAlgError("the randomised solver returned values that are not finite")
    s = squared[-rank:].flip(0).clamp_min(0).sqrt()
    vectors = vectors[:, -rank:].flip(1)
    vh = vectors.T @ image / s.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return basis.T @ vectors.to(basis.dtype), s, vh.to(basis.dtype)
