"""The gate between the two products of a LoRA that carries its routers (`routed_lora.py`), for all adapters in memory at once.

What the layer of an adapter does with its plan (`tuner/kernels/gate.py`), read from tensors that an engine keeps: nothing
depends on which adapter has which slot of the memory, so adapters may come and go, and a captured graph stays right.

Shapes: T tokens; M adapters in memory, of rank r; L experts, V voting slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tuner.kernels.gate import MAX_FACTOR, TINY
from .routed_lora import SLOT_NUMBERS, Header, RoutedFormat


class Tables(NamedTuple):
    """What the adapters in memory say.

    Attributes:
        ours: `(M,)`, which of them carry routers.
        header: of each.
        owner: `(M, r)`, the expert of each rank; L where it is none's.
        places: `(M, V)`, the ranks where the slots' logits are.
        router: `(M, V)`, from 1 on; 0 where there is no slot.
        mix: `(M, V, L)`, the router's weight to the slot's expert.
        bias: `(M, V)`.
    """

    ours: Tensor
    header: Header
    owner: Tensor
    places: Tensor
    router: Tensor
    mix: Tensor
    bias: Tensor


def fits(layout: RoutedFormat, d_out: int, rank: int) -> bool:
    """Whether a module of these dimensions can hold a LoRA of the format."""
    return d_out >= SLOT_NUMBERS and layout.rank(d_out, 0) <= rank


def read_tables(lora_b: Tensor, layout: RoutedFormat) -> Tables:
    """Read B `(M, 1, d_out, r)` of all adapters in memory."""
    stacked = lora_b[:, 0]
    d_out, rank = stacked.shape[1:]
    first = layout.columns(d_out)
    header = stacked[:, :, :first].mT.flatten(1)[:, : 4 + 2 * layout.numbers].float()
    ours = (header[:, :4] == header.new_tensor(layout.magic)).all(1)
    # What stands there in another adapter is anything.
    numbers = torch.where(ours[:, None], header[:, 4:].unflatten(1, (-1, 2)).sum(-1), 0.0)
    parts = layout.split(numbers)
    place = torch.arange(rank, device=lora_b.device) - first
    owner = (place[:, None] >= parts.ends.unsqueeze(1)).sum(-1)
    owner = torch.where(place >= 0, owner, layout.experts)
    places = first + parts.ends[:, -1:].long() + torch.arange(layout.slots, device=lora_b.device)
    columns = stacked[:, :SLOT_NUMBERS].gather(2, places.unsqueeze(1).expand(-1, SLOT_NUMBERS, -1)).float()
    columns = torch.where(ours[:, None, None], columns, 0.0)
    experts = torch.arange(layout.experts, device=lora_b.device)
    mix = (columns[:, 2] + columns[:, 3]).unsqueeze(-1) * (columns[:, 1].unsqueeze(-1) == experts)
    return Tables(ours, parts, owner, places, columns[:, 0], mix, columns[:, 4] + columns[:, 5])


def gate(inner: Tensor, lora_b: Tensor, memory: Tensor, layout: RoutedFormat) -> None:
    """Multiply A x by c(w) w over the ranks, in place, where a token's adapter carries routers.

    A token without an adapter gets 0: vLLM's products on the CPU take the last adapter in memory for it (index -1).

    Args:
        inner: A x, `(T, r)` float32.
        lora_b: B of all adapters in memory, `(M, 1, d_out, r)`.
        memory: `(T,)`, the place in memory of each token's adapter; -1 for none.
        layout: the format.
    """
    if not fits(layout, *lora_b.shape[2:]):
        return
    tables = read_tables(lora_b, layout)
    at = memory.clamp_min(0)
    votes = _votes(inner, tables, at)
    votes = votes * _length_factor(votes, tables.header.lengths[at], tables.header.root[at])
    # One expert more, whose ranks (header, routers, none) add nothing.
    scale = torch.nn.functional.pad(votes, (0, 1)).gather(1, tables.owner[at])
    gated = torch.where(tables.ours[at][:, None], inner * scale, inner)
    inner.copy_(torch.where((memory >= 0)[:, None], gated, 0.0))


def _votes(inner: Tensor, tables: Tables, at: Tensor) -> Tensor:
    """The votes w `(T, L)` of tokens whose adapters are `at` `(T,)`."""
    places, router = tables.places[at], tables.router[at]
    logits = inner.gather(1, places) + inner.gather(1, places + router.shape[1]) + tables.bias[at]
    same = (router.unsqueeze(-1) == router.unsqueeze(-2)) & (router > 0).unsqueeze(-2)  # (T, V, V)
    highest = torch.where(same, logits.unsqueeze(-2), -torch.inf).amax(-1)
    powers = torch.where(router > 0, (logits - highest).exp(), 0.0)
    shares = powers / torch.where(same, powers.unsqueeze(-2), 0.0).sum(-1).clamp_min(TINY)
    return tables.header.static[at] + torch.bmm(shares.unsqueeze(1), tables.mix[at]).squeeze(1)


def _length_factor(votes: Tensor, lengths: Tensor, root: Tensor) -> Tensor:
    """The factor c `(T, 1)`."""
    sums = (votes * lengths).sum(-1, keepdim=True)
    length = torch.linalg.vector_norm(torch.bmm(root, votes.unsqueeze(-1)).squeeze(-1), dim=-1, keepdim=True)
    return (sums / length.clamp_min(TINY)).clamp_max(MAX_FACTOR)
