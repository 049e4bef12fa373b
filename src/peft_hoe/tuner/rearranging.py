"""One module's tensors after an adapter has gained or lost an expert or a router. Pure: the old tensors stay as they are.

What stays is copied bit by bit. Inner products too: those of experts that stay are not measured again, since what is stored may
have been rounded since (a file in bfloat16), and outputs at old preferences would move.

Shapes: L experts of ranks that sum to r, A `(r, d_in)`, B `(d_out, r)`; V voting slots of all routers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import HoEConfig
from ..growth import Change
from .lengths import raw_gram


def rearranged(
    tensors: Mapping[str, Tensor], change: Change, module: str, added: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    """The tensors of one module by the names that they are saved under, such as "hoe_A.weight".

    Args:
        tensors: of the module before.
        change: of the adapter.
        module: its name.
        added: the weights of a new expert, of a norm its deltas (of the weight and, where there is one, of the bias), each
            `(d,)`; None for one without any here.
    """
    after = dict(tensors)
    if "hoe_norm.weight" in tensors:
        return _norms(tensors, change, added)
    ranks = change.before.ranks(module), change.after.ranks(module)
    weight_a, weight_b = tensors["hoe_A.weight"], tensors["hoe_B.weight"]
    if change.experts != tuple(range(len(ranks[0]))):
        rows = _stretches(weight_a, 0, change.experts, *ranks, None if added is None else added[0])
        columns = _stretches(weight_b, 1, change.experts, *ranks, None if added is None else added[1])
        after["hoe_A.weight"], after["hoe_B.weight"] = torch.cat(rows, 0), torch.cat(columns, 1)
    routed = not change.after.votes_statically(module)
    if routed and change.routers != tuple(range(len(change.before.routers or []))):
        after |= _routers(tensors, change, weight_a)
    if "hoe_length.gram" in tensors:
        after["hoe_length.gram"] = _products(tensors, after, change, ranks)
    return {name: tensor for name, tensor in after.items() if tensor.numel() or not name.startswith("hoe_router")}


def _norms(tensors: Mapping[str, Tensor], change: Change, added: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """The deltas of a norm's experts, `(L, d)`."""
    after = {}
    for place, (name, old) in enumerate(tensors.items()):
        new = old.new_zeros(old.shape[1]) if added is None else added[place].to(old)
        after[name] = torch.stack([new if source is None else old[source] for source in change.experts])
    return after


def _stretches(
    old: Tensor,
    axis: int,
    sources: Sequence[int | None],
    before: Sequence[int],
    ranks: Sequence[int],
    added: Tensor | None,
) -> list[Tensor]:
    """Each expert's part of A or B along the rank axis."""
    starts = [sum(before[:i]) for i in range(len(before))]
    parts = []
    for source, rank in zip(sources, ranks, strict=True):
        if source is not None and rank == before[source]:
            parts.append(old.narrow(axis, starts[source], rank))
        elif source is None and added is not None:
            parts.append(added.to(old))
        else:  # nothing, which holds the place in a module where no expert has weights
            parts.append(old.new_zeros([rank if i == axis else size for i, size in enumerate(old.shape)]))
    return parts


def _routers(tensors: Mapping[str, Tensor], change: Change, like: Tensor) -> dict[str, Tensor]:
    """Rows of the router linear; a new router's votes are its static ones."""
    before, sizes = _sizes(change.before), _sizes(change.after)
    old = tensors.get("hoe_router.weight"), tensors.get("hoe_router.bias")
    wide = torch.promote_types(like.dtype, torch.float32)  # routers are not rounded to 16 bits
    like = like.new_zeros(0, like.shape[1], dtype=wide) if old[0] is None else old[0]
    start = torch.from_numpy(change.after.initial_router_bias()).to(like)
    weights, biases = [like.new_zeros(0, like.shape[1])], [like.new_zeros(0)]
    for router, source in enumerate(change.routers):
        if source is None or old[0] is None or old[1] is None:
            weights.append(like.new_zeros(sizes[router], like.shape[1]))
            biases.append(start.narrow(0, sum(sizes[:router]), sizes[router]))
        else:
            rows = sum(before[:source]), before[source]
            weights.append(old[0].narrow(0, *rows))
            biases.append(old[1].narrow(0, *rows))
    return {"hoe_router.weight": torch.cat(weights), "hoe_router.bias": torch.cat(biases)}


def _sizes(config: HoEConfig) -> list[int]:
    return [len(members) for members in config.votes()]


def _products(
    tensors: Mapping[str, Tensor], after: Mapping[str, Tensor], change: Change, ranks: tuple[list[int], list[int]]
) -> Tensor:
    """Inner products of the experts, `(L, L)`, the greatest at most 1: old ones as they were, new ones in their unit."""
    old = tensors["hoe_length.gram"]
    kept = [(place, source) for place, source in enumerate(change.experts) if source is not None]
    places, sources = (torch.tensor(column, device=old.device) for column in zip(*kept, strict=True))
    if len(kept) == len(change.experts):
        return old[sources][:, sources].clone()
    measured = raw_gram(after["hoe_A.weight"], after["hoe_B.weight"], tuple(ranks[1])).to(old.device)
    before = old[sources][:, sources].double()
    lengths, units = measured[places, places], before.diagonal()
    longest = int(lengths.argmax())
    if not float(units[longest]) > 0 or not float(lengths[longest]) > 0:
        return (measured / measured.diagonal().max().clamp_min(torch.finfo(torch.float64).tiny)).to(old)
    measured *= units[longest] / lengths[longest]
    measured[places[:, None], places] = before
    greatest = float(measured.diagonal().max())
    if greatest > 1:  # by a power of four: c(w) does not see it, not even in its last bit
        measured *= 4.0 ** -math.ceil(math.log(greatest, 4))
    return measured.to(old)
