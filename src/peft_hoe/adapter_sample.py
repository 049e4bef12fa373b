"""Which weights an adapter has, told from a few of them: recorded with a sweep, compared with the files of an adapter.

A configuration's fingerprint tells where experts and routers stand; adapters of other policies, or whose routers were trained
again, have the same one. Numbers are compared up to the rounding of 16 bits, so that the precision of a model makes no
difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

PARTS = ("hoe_A.weight", "hoe_B.weight", "hoe_router.weight", "hoe_router.bias")
_TENSORS, _ENTRIES = 8, 4  # that are sampled: tensors of each part, spread over all; entries of each
_STEP = 0.618034  # moves the entries from tensor to tensor, so that they come to lie in all experts and routers

Read = Callable[[str], Tensor]


def sample_of(names: Sequence[str], read: Read) -> dict[str, list[float]]:
    """Some numbers of an adapter.

    Args:
        names: "module.part" of its tensors, such as "model.layers.0.mlp.up_proj.hoe_A.weight"; those of `PARTS` are looked at.
        read: gives one of them.

    Returns:
        `{name: entries}`; without tensors that have no numbers at hand: sharded, offloaded or empty ones.
    """
    found: dict[str, list[float]] = {}
    for part in PARTS:
        known = sorted(name for name in names if name.endswith(f".{part}"))
        for name in known[:: max(1, -(-len(known) // _TENSORS))]:
            tensor = read(name)
            if type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and tensor.numel():
                found[name] = _entries(tensor, len(found))
    return found


def differing(sample: Mapping[str, Sequence[float]], names: Sequence[str], read: Read) -> list[str]:
    """The tensors of an adapter whose numbers are not those of a sample, or that are missing on one side.

    Args:
        sample: what `sample_of` gave.
        names: as there.
        read: as there.
    """
    found = sample_of(names, read)
    return sorted(
        name
        for name in sample.keys() | found.keys()
        if name not in sample or name not in found or not _close(sample[name], found[name])
    )


def _entries(tensor: Tensor, turn: int) -> list[float]:
    places = [int((i + (turn * _STEP) % 1) / _ENTRIES * tensor.numel()) for i in range(_ENTRIES)]
    entries = tensor.detach()[torch.unravel_index(torch.tensor(places), tensor.shape)]
    return [float(f"{number:.6g}") for number in entries.to("cpu", torch.float64).tolist()]


def _close(first: Sequence[float], second: Sequence[float]) -> bool:
    one, other = (torch.tensor(values, dtype=torch.float64) for values in (first, second))
    return torch.allclose(one, other, rtol=2**-7, atol=1e-7)
