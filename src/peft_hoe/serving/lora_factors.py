"""One module's experts at fixed votes, as the two factors of an ordinary LoRA.

    c(w) sum_j w_j B_j A_j  =  [w_1 c B_1 ... w_L c B_L] [A_1; ...; A_L]

The right side is a LoRA of rank r_1 + ... + r_L: nothing is approximated.
Shapes: A `(r, d_in)`, B `(d_out, r)`, votes w `(L,)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CheckpointError
from ..experts.svd import keep_factors, reduce_factors
from .source import AdapterSource


@dataclass(frozen=True)
class LoraFactors:
    """One module of an export.

    Attributes:
        a: `(r, d_in)`.
        b: `(d_out, r)`, votes and factor c folded in.
        norm: Frobenius norm of the exact B A.
        lost: norm of the exact B A less this one; 0 where nothing was rounded or cut.
    """

    a: Tensor
    b: Tensor
    norm: float
    lost: float

    @property
    def rank(self) -> int:
        """The number r, at least 1."""
        return self.a.shape[0]

    @property
    def bytes(self) -> int:
        """Size of both factors."""
        return self.a.nbytes + self.b.nbytes

    def transposed(self) -> LoraFactors:
        """Those of the transposed delta: what experts of embeddings are in a head that is tied to them."""
        return replace(self, a=self.b.T.contiguous(), b=self.a.T.contiguous())

    def widened(self, rank: int) -> LoraFactors:
        """The same delta at a larger rank, filled up with zeros."""
        missing = rank - self.rank
        a, b = F.pad(self.a, (0, 0, 0, missing)), F.pad(self.b, (0, missing))
        return replace(self, a=a.contiguous(), b=b.contiguous())


def lora_factors(
    source: AdapterSource, module: str, votes: Tensor, *, rank: int | None = None, dtype: torch.dtype | None = None
) -> LoraFactors:
    """The factors of a module.

    Args:
        source: the adapter.
        module: its name.
        votes: `(L,)` float64.
        rank: cut to this rank by SVD where it is larger; None keeps it exact.
        dtype: what is returned; default what the adapter is stored in, but at least float32.

    Raises:
        CheckpointError: damaged tensors, or a value that the dtype cannot hold.
    """
    a, b = source.factors(module)
    exact = torch.promote_types(a.dtype, torch.float32)
    a, b = _scaled(a.to(exact), b.to(exact), source.ranks(module), votes * source.length_factor(module, votes))
    whole = keep_factors(b, a)
    short_a, short_b = a, b
    if rank is not None and rank < a.shape[0]:
        cut = reduce_factors(b, a, rank)
        short_a, short_b = (cut.a, cut.b) if cut.rank else (a[:1], b[:, :1])
    written = dtype or exact
    short_a, short_b = short_a.to(written).contiguous(), short_b.to(written).contiguous()
    if not bool(torch.isfinite(short_a).all() and torch.isfinite(short_b).all()):
        raise CheckpointError(
            f"{module} does not fit {written}; export with dtype=torch.float32 (--dtype float32)",
            argument="dtype", value=written, allowed=[torch.float32],
        )  # fmt: skip
    unchanged = short_a.dtype.itemsize >= exact.itemsize and short_a.shape == a.shape
    return LoraFactors(short_a, short_b, whole.norm, 0.0 if unchanged else _distance(b, a, short_b, short_a))


def cut_error(factors: LoraFactors, rank: int) -> float:
    """Norm of what an SVD to a smaller rank would lose."""
    return reduce_factors(factors.b, factors.a, rank).residual if rank < factors.rank else 0.0


def _scaled(a: Tensor, b: Tensor, ranks: list[int], scale: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of the experts that have votes, B times their scale `(L,)`; one row of zeros where there are none."""
    repeats = torch.tensor(ranks)
    over_ranks = scale.repeat_interleave(repeats).to(b.dtype)
    kept = over_ranks != 0
    if not bool(kept.any()):
        return a.new_zeros(1, a.shape[1]), b.new_zeros(b.shape[0], 1)
    return a[kept], (b * over_ranks)[:, kept]


def _distance(b: Tensor, a: Tensor, other_b: Tensor, other_a: Tensor) -> float:
    """Frobenius norm of B A less another B A."""
    return keep_factors(
        torch.cat([b.double(), -other_b.double()], dim=1), torch.cat([a.double(), other_a.double()])
    ).norm
