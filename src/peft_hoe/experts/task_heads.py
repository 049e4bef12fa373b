"""Task heads: what PEFT's models of a task keep whole beside the adapter, such as a classifier's last layer.

An expert cannot hold a head, and one adapter has one. Where all policies have the same head, as those do that were trained
with a frozen one, it is theirs; otherwise it is the base's, and what the policies changed in it is reported as not captured.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CheckpointError
from .build_inputs import BuildInputs
from .checkpoints import PEFT_PREFIX
from .model_weights import ModelWeights


def head_tensors(inputs: BuildInputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of all heads under their names in the adapter's file; empty where the task has none.

    Args:
        inputs: base and policies.
        dtype: of floating-point tensors.

    Raises:
        CheckpointError: the policies' heads differ, and the base has none.
    """
    tensors = {}
    for names in inputs.architecture.heads.values():
        for name in names:
            tensor = _head_tensor(inputs, name)
            tensors[f"{PEFT_PREFIX}{name}"] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensors


def heads_agree(inputs: BuildInputs) -> bool:
    """Whether all policies have the same heads, so that the adapter holds what they changed there."""
    return all(_shared(inputs, name) is not None for names in inputs.architecture.heads.values() for name in names)


def _head_tensor(inputs: BuildInputs, name: str) -> Tensor:
    shared = _shared(inputs, name)
    if shared is not None:
        return shared
    if inputs.base is None or name not in inputs.base.located:
        raise CheckpointError(
            f"the policies have different heads {name!r}, and the base has none that the adapter could carry; pass a base "
            "with a head of its own (a LoRA adapter cannot hold one for each policy)",
            tensor=name,
        )
    return inputs.base.stored(name)


def _shared(inputs: BuildInputs, name: str) -> Tensor | None:
    """The policies' common tensor; None where one lacks it, or where they differ."""
    full = [policy for policy in inputs.policies.values() if isinstance(policy, ModelWeights)]
    if len(full) < len(inputs.policies) or any(name not in policy.located for policy in full):
        return None
    first = full[0].stored(name)
    return first if all(torch.equal(first, policy.stored(name)) for policy in full[1:]) else None
