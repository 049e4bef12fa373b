"""Interpolation that keeps length.

Experts of different objectives are nearly orthogonal, so an average of them is shorter than they are: half of each of two
is 0.71 times as long, and the model falls back towards its base. With `interpolation="norm"` a module gives it back,

    y = base(x) + c(w) B (w * A x) ,   c(w) = sum_j w_j |e_j| / |sum_j w_j e_j| ,   at most 3

where e_j = B_j A_j (Frobenius norms) and w are the votes, of a preference or of a token. c is 1 where one expert has all votes.
Everything follows from the inner products of the experts, <e_i, e_j> = sum of (B_i^T B_j) * (A_i A_j^T), which are
measured once and stored with the adapter, in units of the longest expert's: c depends on ratios alone, and float16 can hold
them.

Not in the paper, which averages as it is; the rule is that of `rescale="policy_norm"` in a build. Shapes: L experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .kernels.gate import MAX_FACTOR, TINY, length_factor


class ExpertLengths(nn.Module):
    """One module's experts seen from c(w).

    Attributes:
        gram: `(L, L)`, their inner products, the greatest 1; 0 for experts that have no weights here.
    """

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        self.gram = nn.Parameter(torch.zeros(n_experts, n_experts), requires_grad=False)

    @torch.no_grad()
    def measure(self, weight_a: torch.Tensor, weight_b: torch.Tensor, ranks: tuple[int, ...]) -> None:
        """Take over the experts of A `(r, d_in)` and B `(d_out, r)`."""
        self.gram.copy_(gram(weight_a, weight_b, ranks))

    def forward(self, votes: torch.Tensor) -> torch.Tensor:
        """The factor c `(..., 1)` of votes `(..., L)`, in their dtype; 1 where nothing is left to be scaled."""
        return length_factor(votes, self.gram)


def gram_root(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inner products `(S, S)` as what c(w) is quickest from, float64 on the CPU.

    Returns:
        F `(S, S)` with F^T F = the products, so that F w is as long as sum_j w_j e_j; eigenvalues that rounding made negative
        count as 0. And |e_j| `(1, S)`.
    """
    products = products.detach().to("cpu", torch.float64)
    values, vectors = torch.linalg.eigh(products)
    lengths = products.diagonal().clamp_min(0).sqrt() + TINY  # not 0 / 0 where no expert has weights
    return values.clamp_min(0).sqrt()[:, None] * vectors.T, lengths[None]


def lengthened(votes: torch.Tensor, root: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """c(w) w `(T, S)` of votes w `(T, S)`, with what `gram_root` gives, in their dtype."""
    length = torch.linalg.vector_norm(F.linear(votes, root), dim=-1, keepdim=True)
    return votes / (length / F.linear(votes, lengths)).clamp_min(1 / MAX_FACTOR)


def gram(weight_a: torch.Tensor, weight_b: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """Inner products `(L, L)` float64 of the experts in A `(r, d_in)` and B `(d_out, r)`; `ranks` sum to r.

    Divided by the greatest; all 0 where no expert has weights.
    """
    products = raw_gram(weight_a, weight_b, ranks)
    return products / products.diagonal().max().clamp_min(torch.finfo(products.dtype).tiny)


def raw_gram(weight_a: torch.Tensor, weight_b: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """As `gram`, in the unit of the weights."""
    a, b = weight_a.double(), weight_b.double()
    owner = torch.eye(len(ranks), dtype=a.dtype).repeat_interleave(torch.tensor(ranks), dim=0).to(a.device)  # (r, L)
    return owner.T @ ((b.T @ b) * (a @ a.T)) @ owner
