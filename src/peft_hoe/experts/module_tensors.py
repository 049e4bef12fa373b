"""What one module's experts become: their tensors in PEFT's layout, and what is reported on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..tuner.lengths import gram
from .architecture import LinearModule
from .checkpoints import PEFT_PREFIX
from .report import ModuleReport

A, B, LENGTH = "hoe_A.weight", "hoe_B.weight", "hoe_length.gram"  # ends of names


@dataclass
class ModuleResult:
    """One module's experts.

    Attributes:
        ranks: of the experts, in the configuration's order; 0 where one has no weights here.
        tensors: what `module_tensors` gives; empty where no expert has weights.
        rows: the report on each expert.
        dropped: `{policy: [entries that pruning dropped, entries]}`.
        comparison: of the task vectors, where it was not made before; as `agreement.compare` gives it.
    """

    ranks: list[int]
    tensors: dict[str, Tensor]
    rows: dict[str, ModuleReport]
    dropped: dict[str, list[int]] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None


def module_tensors(
    target: LinearModule, factors: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype, *, lengths: bool
) -> dict[str, Tensor]:
    """The experts' tensors of one module by the ends of their names, experts one after the other along the rank.

    Args:
        target: the module.
        factors: B `(d_out, r_j)` and A `(r_j, d_in)` of each expert, in the configuration's order.
        dtype: what is written.
        lengths: whether the inner products of the experts are added, in float32, for `interpolation="norm"`.

    Raises:
        CheckpointError: a value that the dtype cannot hold.
    """
    tensors = {A: torch.cat([a for _, a in factors]), B: torch.cat([b for b, _ in factors], dim=1)}
    cast = {part: tensor.to(dtype).contiguous() for part, tensor in tensors.items()}
    for part, tensor in cast.items():
        if not bool(tensor.isfinite().all()):
            name = f"{PEFT_PREFIX}{target.name}.{part}"
            raise CheckpointError(
                f"{name} does not fit {dtype}; build with dtype=torch.float32 (--dtype float32)", tensor=name
            )
    if lengths:
        cast[LENGTH] = gram(cast[A], cast[B], tuple(b.shape[1] for b, _ in factors)).float()
    return {part: tensor.cpu() for part, tensor in cast.items()}
