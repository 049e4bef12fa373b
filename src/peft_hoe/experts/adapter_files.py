"""The files of an adapter: its tensors in PEFT's layout, written as they are made, its configuration and its model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import HoEConfig
from ..errors import CheckpointError
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..output_directory import CARD, disk_errors
from ..tuner.lengths import gram
from .architecture import LinearModule
from .build_inputs import BuildInputs
from .checkpoints import PEFT_PREFIX
from .report import REPORT_FILE
from .task_heads import head_tensors
from .weight_writer import WeightWriter

# What a build writes
WRITTEN = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, REPORT_FILE)
_A, _B, _ROUTER, _BIAS = "hoe_A.weight", "hoe_B.weight", "hoe_router.weight", "hoe_router.bias"
_LENGTH = "hoe_length.gram"


class AdapterWriter:
    """Writes the tensors of one module after the other; a context manager that closes the file.

    Args:
        directory: where the adapter grows.
        output: how errors call it.
        inputs: base and policies.
        config: experts and routers; its ranks of a module are read when that is added.
        dtype: what is written.

    Raises:
        CheckpointError: heads that contradict each other, or a place that cannot be written to.
    """

    def __init__(
        self, directory: Path, output: Path, inputs: BuildInputs, config: HoEConfig, dtype: torch.dtype
    ) -> None:
        self._output, self._config, self._dtype = output, config, dtype
        self._votes = torch.from_numpy(config.initial_router_bias()).float()
        self._heads = head_tensors(inputs, dtype)
        targets, experts = inputs.architecture.targets, len(config.experts or [])
        parts = (_A, _B, _ROUTER, _BIAS, _LENGTH)
        names = [f"{PEFT_PREFIX}{target.name}.{part}" for target in targets for part in parts]
        lengths = experts**2 * torch.float32.itemsize
        others = len(targets) * lengths + sum(head.nbytes for head in self._heads.values())
        with disk_errors(output):
            self._weights = WeightWriter(directory / ADAPTER_WEIGHTS, dtype, [*names, *self._heads], others)

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._weights.__exit__(*error)

    def add_module(self, target: LinearModule, factors: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Write one module's experts: B `(d_out, r_j)` and A `(r_j, d_in)` of each, in the configuration's order.

        Raises:
            CheckpointError: a value that the dtype cannot hold, or the disk is full.
        """
        lengths = self._config.interpolation == "norm"
        tensors = module_tensors(target, factors, self._votes, self._dtype, lengths=lengths)
        self._add({f"{PEFT_PREFIX}{target.name}.{part}": tensor for part, tensor in tensors.items()})

    def finish(self) -> None:
        """Write the heads, and what makes the file complete.

        Raises:
            CheckpointError: the disk is full.
        """
        self._add(self._heads)
        with disk_errors(self._output):
            self._weights.finish()

    def _add(self, tensors: dict[str, Tensor]) -> None:
        with disk_errors(self._output):
            for name, tensor in tensors.items():
                self._weights.add(name, tensor)


def module_tensors(
    target: LinearModule,
    factors: Sequence[tuple[Tensor, Tensor]],
    votes: Tensor,
    dtype: torch.dtype,
    *,
    lengths: bool,
) -> dict[str, Tensor]:
    """The tensors of one module by the ends of their names, experts one after the other along the rank.

    Args:
        target: the module.
        factors: B `(d_out, r_j)` and A `(r_j, d_in)` of each expert, in the configuration's order.
        votes: initial biases of the routers, `(V,)`; V may be 0.
        dtype: what is written.
        lengths: whether the inner products of the experts are added, in float32, for `interpolation="norm"`.

    Raises:
        CheckpointError: a value that the dtype cannot hold.
    """
    tensors = {_A: torch.cat([a for _, a in factors]), _B: torch.cat([b for b, _ in factors], dim=1)}
    if len(votes):
        tensors |= {_ROUTER: torch.zeros(len(votes), target.d_in), _BIAS: votes}
    cast = {part: tensor.to(dtype).contiguous() for part, tensor in tensors.items()}
    for part, tensor in cast.items():
        if not bool(tensor.isfinite().all()):
            name = f"{PEFT_PREFIX}{target.name}.{part}"
            raise CheckpointError(
                f"{name} does not fit {dtype}; build with dtype=torch.float32 (--dtype float32)", tensor=name
            )
    if lengths:
        cast[_LENGTH] = gram(cast[_A], cast[_B], tuple(b.shape[1] for b, _ in factors)).float()
    return cast
