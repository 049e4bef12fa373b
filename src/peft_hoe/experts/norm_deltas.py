"""What policies changed in norms: a delta of each parameter for each expert, taken as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import HoEConfig
from ..errors import CheckpointError
from .build_inputs import BuildInputs
from .checkpoints import PEFT_PREFIX
from .model_weights import ModelWeights
from .module_builder import expert_shares


def norm_tensors(inputs: BuildInputs, config: HoEConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The deltas `(L, d)` of all norms under their names in the adapter's file; fills in `config.target_norms`.

    A multi-objective expert's delta is the weighted mean of the policies', and a LoRA policy's is 0. Norms that no policy
    changed are left out.

    Args:
        inputs: base and policies.
        config: the experts.
        dtype: what is written.

    Raises:
        CheckpointError: a policy lacks a norm, or a value that is not finite or that the dtype cannot hold.
    """
    shares = expert_shares(inputs, config)
    tensors: dict[str, Tensor] = {}
    changed = []
    for module, parameters in inputs.architecture.norms.items():
        deltas = {name: _deltas(inputs, name, shares) for name in parameters}
        if not any(bool(delta.any()) for delta in deltas.values()):
            continue
        changed.append(module)
        for name, delta in deltas.items():
            tensors[f"{PEFT_PREFIX}{module}.hoe_norm.{name.rpartition('.')[2]}"] = _cast(name, delta, dtype)
    config.target_norms = changed or None
    return tensors


def _deltas(inputs: BuildInputs, parameter: str, shares: list[dict[str, float]]) -> Tensor:
    """The experts' deltas of one parameter, `(L, d)`."""
    if inputs.base is None:  # LoRA policies alone
        return torch.zeros(len(shares), 1)
    before = _wide(inputs.base, parameter)
    taus = {name: torch.zeros_like(before) for name in inputs.policies}
    for name, policy in inputs.policies.items():
        if isinstance(policy, ModelWeights):
            if parameter not in policy.located or policy.shape(parameter) != tuple(before.shape):
                raise CheckpointError(
                    f"{policy.label} has no {parameter!r} of shape {tuple(before.shape)}, whose change capture=['norms'] asks "
                    "for; build without it",
                    tensor=parameter,
                )
            taus[name] = _wide(policy, parameter) - before
    means = [
        torch.stack([taus[name] * (weight / sum(each.values())) for name, weight in each.items()]) for each in shares
    ]
    return torch.stack([mean.sum(dim=0) for mean in means])


def _wide(weights: ModelWeights, parameter: str) -> Tensor:
    tensor = weights.stored(parameter)
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _cast(name: str, delta: Tensor, dtype: torch.dtype) -> Tensor:
    cast = delta.to(dtype)
    if not bool(cast.isfinite().all()):
        raise CheckpointError(
            f"the change of {name!r} holds NaN or infinity, or does not fit {dtype}; the checkpoint is damaged, or build with "
            "dtype=torch.float32 (--dtype float32)",
            tensor=name,
        )
    return cast
