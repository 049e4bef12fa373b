"""What an adapter's file must hold for its configuration, told from the file's header: before anything is made or read.

Keys are PEFT's: `base_model.model.<module>.hoe_A.weight`. L experts of ranks r_1 ... r_L, R routers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NoReturn, Protocol

from .errors import CheckpointError
from .files import TensorInfo

_OURS = re.compile(r"(base_model\.model\.)?(?P<module>.+)\.(?P<part>hoe_\w+)\.(?P<leaf>\w+)")
FLOATS = {"F64", "F32", "F16", "BF16"}


class Asks(Protocol):
    """What is asked of a configuration."""

    interpolation: str

    def ranks(self, module: str) -> list[int]:
        """Rank of each expert in a module."""

    def votes_statically(self, module: str) -> bool:
        """Whether a module has no routers."""

    def votes(self) -> list[list[int]]:
        """For each router the experts that it votes for."""


def check_contents(config: Asks, tensors: Mapping[str, TensorInfo], path: str | os.PathLike[str]) -> None:
    """See that a file can be the one that a configuration was saved with.

    Args:
        config: a resolved configuration.
        tensors: the file's header.
        path: of the file, for errors.

    Raises:
        CheckpointError: names the tensor and what contradicts what.
    """
    found = {key: match for key in tensors if (match := _OURS.fullmatch(key))}
    if not any(match["part"] == "hoe_A" for match in found.values()):
        raise CheckpointError(
            f"{os.fspath(path)} holds no expert: none of its {len(tensors)} tensors is a hoe_A. It is another file, or it was "
            "saved without the adapter; save or download the adapter again",
            path=path,
        )
    slots = sum(len(members) for members in config.votes())
    for key, match in found.items():
        ranks = config.ranks(match["module"])
        routed = 0 if config.votes_statically(match["module"]) else slots
        wanted = _wanted(f"{match['part']}.{match['leaf']}", sum(ranks), routed, len(ranks))
        _check(key, tensors[key], wanted, path)


def _wanted(part: str, rank: int, slots: int, experts: int) -> dict[int, int] | None:
    """The lengths that a configuration fixes, by axis; None for a tensor that it has no place for."""
    return {
        "hoe_A.weight": {0: rank},
        "hoe_B.weight": {1: rank},
        "hoe_router.weight": {0: slots} if slots else None,
        "hoe_router.bias": {0: slots} if slots else None,
        "hoe_norm.weight": {0: experts},
        "hoe_norm.bias": {0: experts},
        "hoe_length.gram": {0: experts, 1: experts},
    }.get(part, {})


def _check(key: str, tensor: TensorInfo, wanted: dict[int, int] | None, path: str | os.PathLike[str]) -> None:
    def refuse(reason: str) -> NoReturn:
        raise CheckpointError(
            f"{os.fspath(path)}: the tensor {key!r} {reason}; the weights and adapter_config.json do not belong together",
            path=path,
            tensor=key,
        )

    if wanted is None:
        refuse("is a router's, but the configuration has no routers there")
    if tensor.dtype not in FLOATS:
        refuse(f"holds {tensor.dtype}, not one of {sorted(FLOATS)}")
    for axis, length in wanted.items():
        if len(tensor.shape) <= max(wanted) or tensor.shape[axis] != length:
            refuse(f"has shape {tensor.shape}, but the configuration asks for {length} along axis {axis}")
