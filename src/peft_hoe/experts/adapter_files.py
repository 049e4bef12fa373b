"""The files of an adapter: its tensors in PEFT's layout, written as they are made, its configuration and its model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import HoEConfig
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..output_directory import CARD, disk_errors
from .architecture import LinearModule
from .build_inputs import BuildInputs
from .checkpoints import PEFT_PREFIX
from .journal import from_json, to_json
from .module_tensors import LENGTH, A, B, ModuleResult
from .norm_deltas import norm_tensors
from .report import REPORT_FILE
from .task_heads import head_tensors
from .weight_writer import WeightWriter

# What a build writes
WRITTEN = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, REPORT_FILE)
_ROUTER, _BIAS = "hoe_router.weight", "hoe_router.bias"


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
        self._heads = head_tensors(inputs, dtype) | norm_tensors(inputs, config, dtype)
        targets, experts = inputs.architecture.targets, len(config.experts or [])
        parts = (A, B, _ROUTER, _BIAS, LENGTH)
        names = [f"{PEFT_PREFIX}{target.name}.{part}" for target in targets for part in parts]
        lengths = experts**2 * torch.float32.itemsize
        others = len(targets) * lengths + sum(head.nbytes for head in self._heads.values())
        with disk_errors(output):
            self._weights = WeightWriter(directory / ADAPTER_WEIGHTS, dtype, [*names, *self._heads], others)

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._weights.__exit__(*error)

    def add_module(self, target: LinearModule, result: ModuleResult) -> dict[str, Any]:
        """Write one module's experts.

        Returns:
            what `add_again` must know of it, in JSON types.

        Raises:
            CheckpointError: the disk is full.
        """
        tensors = dict(result.tensors)
        if len(self._votes) and not target.apart:
            a = tensors[A]
            tensors |= {_ROUTER: a.new_zeros(len(self._votes), target.d_in), _BIAS: self._votes.to(a.dtype)}
        named = {f"{PEFT_PREFIX}{target.name}.{part}": tensor for part, tensor in tensors.items()}
        self._add(named)
        straight = {name: list(tensor.shape) for name, tensor in named.items() if tensor.dtype == self._dtype}
        others = {name: tensor for name, tensor in named.items() if tensor.dtype != self._dtype}
        return {"shapes": straight, "others": to_json(others), "checksum": self._weights.checksum}

    def add_again(self, record: dict[str, Any]) -> bool:
        """Take one module that an earlier process wrote, from what `add_module` returned; whether the file holds it."""
        shapes = {name: tuple(shape) for name, shape in record["shapes"].items()}
        with disk_errors(self._output):
            return self._weights.add_again(shapes, from_json(record["others"]), record["checksum"])

    def go_on(self) -> None:
        """Forget what follows the modules that were added again."""
        with disk_errors(self._output):
            self._weights.go_on()

    def finish(self) -> None:
        """Write heads and norms, and what makes the file complete.

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
