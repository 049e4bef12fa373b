"""The gate: from A x and the routers' logits to c(w) w A x, and back.

Pure functions on tensors, float32 or wider between input and output. Shapes: T tokens of B rows, in order, T / B to each
(B is 1 where all share a preference); S experts of ranks that sum to r; R routers with at most K slots each, V = R K.

    p = softmax of each router's logits
    w = p mix                                or, without routers, the static votes
    y = c(w) w over the ranks * A x          c(w) = sum_j w_j |e_j| / |sum_j w_j e_j|, at most 3, or 1
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

MAX_FACTOR = 3.0
TINY = 1e-30
PLAIN = (torch.Tensor, torch.nn.Parameter)  # no tracer's


class Votes(NamedTuple):
    """What the votes of a preference, or of one preference per row, are made of.

    Attributes:
        mix: without routers the static votes `(B, S)`. With them what a slot's share of its router's softmax gives to each
            expert, `(S, V)` where all rows share it, else `(B, V, S)`: the router's weight to the slot's expert, and the
            static votes over R, since R shares sum to 1 each.
        routers: R; 0 without.
        places: `(V,)`: for each router K places among the logits, one behind the last where it has fewer slots; None where
            all have K.
    """

    mix: torch.Tensor
    routers: int
    places: torch.Tensor | None


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """A block whose numbers autocast does not round to 16 bits."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def shares(votes: Votes, logits: torch.Tensor) -> torch.Tensor:
    """Softmax of each router, `(T, V)`, of logits `(T, slots)` over the temperature."""
    if votes.places is not None:
        logits = F.pad(logits, (0, 1), value=-torch.inf).index_select(1, votes.places)
    grouped = logits if votes.routers == 1 else logits.unflatten(1, (votes.routers, logits.shape[1] // votes.routers))
    return grouped.softmax(-1).flatten(1)


def token_votes(votes: Votes, logits: torch.Tensor) -> torch.Tensor:
    """The votes w `(T, S)`, at least 0 and summing to 1, of logits `(T, slots)` in the dtype of `mix`."""
    parts = shares(votes, logits)
    if votes.mix.ndim == 2:
        return F.linear(parts, votes.mix)
    return torch.bmm(parts.unflatten(0, (votes.mix.shape[0], -1)), votes.mix).flatten(0, 1)


def length_factor(votes: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """The factor c `(..., 1)` of votes `(..., S)` from inner products `(S, S)`; 1 where nothing is left to be scaled."""
    products = gram.to(votes.dtype)
    # No matrix products, which autocast would round.
    lengths = (votes * products.diagonal().clamp_min(0).sqrt()).sum(-1, keepdim=True)
    squared = ((votes.unsqueeze(-2) * products).sum(-1) * votes).sum(-1, keepdim=True)
    factor = (lengths / squared.clamp_min(TINY).sqrt()).clamp_max(MAX_FACTOR)
    return torch.where(squared > TINY, factor, torch.ones_like(factor))


def over_ranks(votes: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """`(..., S)` to `(..., r)`: each expert's vote once per rank."""
    if len(set(ranks)) == 1:
        return votes.unsqueeze(-1).expand(*votes.shape, ranks[0]).flatten(-2)
    return votes.index_select(-1, owners_of(ranks, votes))


def owners_of(ranks: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """`(r,)` int32 where `like` lies: of each rank its expert; shared by all modules with these ranks."""
    if torch.compiler.is_compiling() or type(like) not in PLAIN:  # a constant of the graph
        return torch.tensor(_owners(ranks), dtype=torch.int32, device=like.device)
    return _placed_owners(ranks, like.device)


def _owners(ranks: tuple[int, ...]) -> list[int]:
    return [expert for expert, rank in enumerate(ranks) for _ in range(rank)]


@lru_cache(maxsize=256)
def _placed_owners(ranks: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_owners(ranks), dtype=torch.int32).to(device)


def scaled(inner: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A x `(T, r)` times a scale of the rows, `(B, r)`, or of the tokens, `(T, r)`."""
    if scale.dtype != inner.dtype:
        scale = scale.to(inner.dtype)
    if scale.shape[0] in (1, inner.shape[0]):
        return inner * scale
    return (inner.unflatten(0, (scale.shape[0], -1)) * scale.unsqueeze(1)).flatten(0, 1)


def gated(
    inner: torch.Tensor,
    logits: torch.Tensor,
    votes: Votes,
    gram: torch.Tensor | None,
    ranks: tuple[int, ...],
    temperature: float,
) -> torch.Tensor:
    """The definition, c(w) w over the ranks * A x `(T, r)`; what kernels are held against.

    Args:
        inner: A x `(T, r)`.
        logits: `(T, slots)`.
        votes: of the S experts.
        gram: their inner products, `(S, S)`; None where c is 1.
        ranks: of the experts.
        temperature: T of the softmax.
    """
    weights = token_votes(votes, logits.to(votes.mix.dtype) / temperature)
    if gram is not None:
        weights = weights * length_factor(weights, gram)
    return scaled(inner, over_ranks(weights, ranks))
