"""Arithmetic on tensors of many million entries, in pieces that stay in the processor's cache.

An operation on a whole matrix writes its result to memory, which takes longer than the arithmetic; a chain of operations on one
piece after the other does not. A GPU gets larger pieces, because starting an operation there takes longer than a small piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PIECE = 1 << 17  # entries of a piece: half a megabyte in float32
GPU_PIECE = 1 << 22  # a count up to it is exact in float32


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same entries of tensors of one size, as flat views, one piece after the other."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    step = PIECE if flat[0].device.type == "cpu" else GPU_PIECE
    for start in range(0, flat[0].numel(), step):
        yield tuple(tensor[start : start + step] for tensor in flat)


class Memory:
    """Matrices that are written anew for each module, in memory that stays: fresh memory costs more than the arithmetic.

    Args:
        device: where they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """A float32 matrix `(rows, columns)` of any content; the one of this name that was taken before is lost."""
        flat = self._flat.get(name)
        if flat is None or flat.numel() < rows * columns:
            flat = self._flat[name] = torch.empty(rows * columns, device=self._device)
        return flat[: rows * columns].view(rows, columns)


def sampled(rows: int) -> range:
    """Some rows of a tensor, spread over it, that stand for all: at most 16."""
    return range(0, rows, max(1, -(-rows // 16)))


def row_ranges(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of pieces of a tensor; a tensor without dimensions has one row."""
    if not shape:
        yield 0, 1
        return
    step = max(1, 8 * PIECE // max(1, torch.Size(shape[1:]).numel()))  # large enough that reading is fast
    yield from ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def frobenius_norm(matrix: Tensor) -> float:
    """The norm of a matrix `(d_out, d_in)`: rows in their own dtype, which is ten times as fast, and their sum in float64."""
    rows = torch.linalg.vector_norm(matrix, dim=1).double()
    if not bool(rows.isfinite().all()):  # squares beyond float32
        rows = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float64)
    return float(rows.norm())


def count_nonzero(tensor: Tensor) -> int:
    """How many entries of a tensor are not 0."""
    return sum(int(torch.count_nonzero(piece)) for (piece,) in pieces(tensor))


def kth_smallest_magnitude(tensor: Tensor, k: int) -> float:
    """The k-th smallest |entry| of a float32 tensor, k from 1; as `torch.kthvalue`, several times as fast."""
    return _select(tensor.abs(), k)


def kth_smallest(tensor: Tensor, k: int) -> float:
    """The k-th smallest entry of a tensor, k from 1."""
    return _select(tensor.clone(), k)


def _select(tensor: Tensor, k: int) -> float:
    """The k-th smallest entry; reorders the tensor."""
    if tensor.device.type != "cpu":
        return float(torch.kthvalue(tensor.reshape(-1), k).values)
    values = tensor.reshape(-1).numpy()
    values.partition(k - 1)
    return float(values[k - 1])


def inner_product(first: Tensor, second: Tensor) -> float:
    """The sum of products of the entries of two tensors of one size; pieces in their own dtype, their sum in float64."""
    return sum(float(torch.dot(one, other)) for one, other in pieces(first, second))
