"""Task vectors: what training changed, tau = policy - base, float32, one module at a time.

Shapes: a module's task vector is (d_out, d_in) however its weight is stored; K policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CheckpointError
from .architecture import LinearModule
from .devices import CPU
from .lora_policy import LoraPolicy
from .model_weights import ModelWeights
from .pieces import Memory, frobenius_norm, row_ranges


@dataclass(frozen=True)
class TaskVectors:
    """The task vectors of one module.

    Attributes:
        deltas: `{policy: (d_out, d_in)}` float32, contiguous; overwritten by the next module that is read.
        norms: `{policy: Frobenius norm}`.
    """

    deltas: dict[str, Tensor]
    norms: dict[str, float]


class TaskVectorReader:
    """Reads the task vectors of one module after the other into the same memory, which is cheaper than fresh memory.

    Args:
        base: its weights; None where all policies are LoRA adapters.
        policies: by objective.
        device: where they are computed, and stay.
    """

    def __init__(
        self, base: ModelWeights | None, policies: Mapping[str, ModelWeights | LoraPolicy], device: torch.device = CPU
    ) -> None:
        self.base, self.policies, self._device = base, policies, device
        self._memory = Memory(device)

    def expect(self, target: LinearModule) -> None:
        """Say that a module will be read soon."""
        for weights in (self.base, *self.policies.values()):
            if isinstance(weights, ModelWeights):
                weights.expect(target.weight)

    def read(self, target: LinearModule, names: Iterable[str] | None = None) -> TaskVectors:
        """The task vectors of a module; the base's weight is read once.

        Args:
            target: the module.
            names: of the policies; default all.

        Raises:
            CheckpointError: NaN or infinity; the message names the tensor.
        """
        chosen = {name: self.policies[name] for name in (self.policies if names is None else names)}
        full = {name: policy for name, policy in chosen.items() if isinstance(policy, ModelWeights)}
        differences = self._differences(full, target)
        deltas = {
            name: differences[name] if name in full else self._product(name, policy, target)
            for name, policy in chosen.items()
        }
        norms = {name: frobenius_norm(delta) for name, delta in deltas.items()}
        for name in full:
            if not bool(torch.isfinite(torch.tensor(norms[name]))):
                raise CheckpointError(
                    f"{full[name].label}: the difference from the base in tensor {target.weight!r} holds NaN or infinity; "
                    "the checkpoint is damaged, or its training diverged",
                    tensor=target.weight,
                )
        return TaskVectors(deltas, norms)

    def _differences(self, policies: Mapping[str, ModelWeights], target: LinearModule) -> dict[str, Tensor]:
        if not policies:
            return {}
        if self.base is None:
            policy = next(iter(policies.values()))
            raise CheckpointError(
                f"{policy.label} is a full set of weights, which needs the base's weights",
                argument="base", path=policy.checkpoint.directory,
            )  # fmt: skip
        deltas = {name: self._memory.take(name, target.d_out, target.d_in) for name in policies}
        stored = {name: delta.T if target.transposed else delta for name, delta in deltas.items()}
        for start, stop in row_ranges(target.shape):
            before = _wide(self.base.rows(target.weight, start, stop).to(self._device))
            for name, policy in policies.items():
                rows = policy.rows(target.weight, start, stop).to(self._device)
                stored[name][start:stop].copy_(_wide(rows).sub(before))
        return deltas

    def _product(self, name: str, policy: ModelWeights | LoraPolicy, target: LinearModule) -> Tensor:
        factors = policy.factors(target.name) if isinstance(policy, LoraPolicy) else None
        delta = self._memory.take(name, target.d_out, target.d_in)
        if factors is None:
            return delta.zero_()
        b, a = (factor.to(self._device) for factor in factors)
        return torch.mm(b, a, out=delta)


def _wide(rows: Tensor) -> Tensor:
    """In float32, or in float64 where the file has that."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
