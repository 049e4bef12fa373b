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
Sample = Mapping[str, Sequence[float] | None]


def sample_of(names: Sequence[str], read: Read) -> dict[str, list[float] | None]:
    """Some numbers of an adapter.

    Args:
        names: "module.part" of its tensors, such as "model.layers.0.mlp.up_proj.hoe_A.weight"; those of `PARTS` are looked at.
        read: gives one of them.

    Returns:
        `{name: entries}`; None for tensors that have no numbers at hand: sharded, offloaded or empty ones.
    """
    chosen: list[str] = []
    for part in PARTS:
        known = sorted(name for name in names if name.endswith(f".{part}"))
        chosen += known[:: max(1, -(-len(known) // _TENSORS))]
    return {name: _entries(read(name), turn) for turn, name in enumerate(chosen)}


def differing(sample: Sample, names: Sequence[str], read: Read) -> list[str]:
    """The tensors of an adapter whose numbers are not those of a sample, or that one of the two does not have.

    Args:
        sample: what `sample_of` gave.
        names: as there.
        read: as there.
    """
    found = sample_of(names, read)
    others = sample.keys() ^ found.keys()
    return sorted(others | {name for name in sample.keys() & found.keys() if not _close(sample[name], found[name])})


def _entries(tensor: Tensor, turn: int) -> list[float] | None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta or not tensor.numel():
        return None
    places = [int((i + (turn * _STEP) % 1) / _ENTRIES * tensor.numel()) for i in range(_ENTRIES)]
    entries = tensor.detach()[torch.unravel_index(torch.tensor(places), tensor.shape)]
    return [float(f"{number:.6g}") for number in entries.to("cpu", torch.float64).tolist()]


def _close(first: Sequence[float] | None, second: Sequence[float] | None) -> bool:
    if first is None or second is None:
        return True
    one, other = (torch.tensor(values, dtype=torch.float64) for values in (first, second))
    return torch.allclose(one, other, rtol=2**-7, atol=1e-7)
