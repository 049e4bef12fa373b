"""The votes of one plan as tensors of one device.

    w(x) = static + sum over live routers of weight * scatter softmax((W x + b) / T)        (paper eq. 11)

The paper prints raw logits, which cannot be mixed with the one-hot votes of LoRA experts, so each router votes with its
softmax. Static votes and the routers' weights belong to a preference, and so to a row; only the softmax belongs to a token.
A router that votes by module has W = 0: its softmax belongs to a module, and so its vote to a row again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .kernels.gate import Votes, token_votes


class PlacedVotes(NamedTuple):
    """The votes of a plan.

    Attributes:
        votes: for the gate.
        rows: of the adapter's router linear that hold the slots of the live routers, one router after the other: a slice
            where they are neighbours, else indices `(slots,)`; None without live routers.
        modules: what routers that vote by module add, with their rows and without static votes; None without such routers.
    """

    votes: Votes
    rows: slice | torch.Tensor | None
    modules: Any = None

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return self.votes.mix.numel() + (0 if self.modules is None else self.modules.numbers)

    def with_rows(self, added: torch.Tensor) -> PlacedVotes:
        """The same, with further votes of the rows, `(B, S)`, as they stand when no module's votes are left to be computed."""
        mix, routers = self.votes.mix, self.votes.routers
        if routers:
            share = added / routers
            added = share[0].unsqueeze(1) if mix.ndim == 2 else share.unsqueeze(1)
        return PlacedVotes(self.votes._replace(mix=mix + added), self.rows)


def module_votes(placed: PlacedVotes, bias: torch.Tensor, temperature: float) -> torch.Tensor:
    """What routers that vote by module give to each expert in play, `(B, S)`.

    Args:
        placed: `PlacedVotes.modules`.
        bias: b of all routers of the module, `(slots,)`.
        temperature: T.
    """
    mix = placed.votes.mix
    logits = (bias.to(mix.dtype).to(mix.device)[placed.rows] / temperature).unsqueeze(0)
    return token_votes(placed.votes, logits if mix.ndim == 2 else logits.expand(len(mix), -1))


def placed_votes(
    static: torch.Tensor,
    live: torch.Tensor,
    slots: Sequence[Sequence[int]],
    experts: Sequence[int],
    routers: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> PlacedVotes:
    """The votes of certain experts and routers on a device.

    Args:
        static: `(B, L)`.
        live: `(B, all routers)`, their weights.
        slots: of every router the experts that its slots belong to.
        experts: that are in play, ascending; they hold all static votes and all slots of `routers`.
        routers: whose softmax votes, ascending.
        device: for the tensors.
        dtype: for the tensors.
    """
    static = static[:, list(experts)]
    if not routers:
        return PlacedVotes(Votes(static.to(dtype).to(device), 0, None), None)
    sizes, starts = [len(slots[r]) for r in routers], [sum(map(len, slots[:r])) for r in routers]
    widest, total = max(sizes), sum(sizes)
    place_of = {expert: place for place, expert in enumerate(experts)}
    places = torch.full((len(routers), widest), total)
    mix = (static / len(routers))[:, None, None].repeat(1, len(routers), widest, 1)
    for k, router in enumerate(routers):
        places[k, : sizes[k]] = torch.arange(sum(sizes[:k]), sum(sizes[: k + 1]))
        mix[:, k, torch.arange(sizes[k]), [place_of[member] for member in slots[router]]] += live[:, router, None]
    mix = mix.flatten(1, 2)
    if len(mix) == 1:
        mix = mix[0].T.contiguous()
    rows = [row for start, size in zip(starts, sizes, strict=True) for row in range(start, start + size)]
    neighbours = rows[-1] - rows[0] == total - 1
    votes = Votes(mix.to(dtype).to(device), len(routers), None if min(sizes) == widest else places.flatten().to(device))
    return PlacedVotes(votes, slice(rows[0], rows[-1] + 1) if neighbours else torch.tensor(rows, device=device))
