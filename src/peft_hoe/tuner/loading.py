"""Checks what is loaded into HoE layers, before any of it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from .layer import HoELayer


def check_state_dict(root: nn.Module, state_dict: Mapping[str, Any], prefix: str, *unused: Any) -> None:
    """A load_state_dict pre-hook: an adapter is loaded whole, in its own shapes and finite, or not at all.

    A state dict with any expert tensor of an adapter must hold them all. One with router tensors alone is a router
    checkpoint and is let through.

    Raises:
        CheckpointError: names the tensor, what is wrong with it and the remedy.
    """
    layers = [(name, module) for name, module in root.named_modules() if isinstance(module, HoELayer)]
    expected = {
        f"{prefix}{name}.{key}": (adapter, shape) for name, layer in layers for adapter, key, shape in layer.tensors()
    }
    present = {expected[key][0] for key in expected if key in state_dict and ".hoe_router." not in key}
    for key, (adapter, shape) in expected.items():
        if key in state_dict:
            _check_tensor(key, state_dict[key], shape)
        elif adapter in present and ".hoe_length." in key:
            raise CheckpointError(
                f"adapter {adapter!r}: the file lacks the tensor {key!r}, which interpolation='norm' needs; it is incomplete, "
                "or was saved with interpolation='linear': load it with that, or build it again"
            )
        elif adapter in present:
            raise CheckpointError(
                f"adapter {adapter!r}: the file lacks the tensor {key!r} of shape {tuple(shape)}; it is incomplete, or its "
                "adapter_config.json belongs to another adapter. Save or download it again"
            )


def check_finite(root: nn.Module) -> None:
    """Check all adapter tensors of a model once, however they were loaded.

    transformers' own loader does not go through load_state_dict. It reports missing and mismatched tensors itself, but not
    NaN.

    Raises:
        CheckpointError: names the tensor and the remedy.
    """
    for name, layer in root.named_modules():
        if isinstance(layer, HoELayer):
            for part in layer.adapter_layer_names:
                for key, parameter in getattr(layer, part).named_parameters():
                    _check_tensor(f"{name}.{part}.{key}", parameter, parameter.shape)


def _check_tensor(key: str, tensor: Any, shape: torch.Size) -> None:
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return  # sharded tensors have their own ideas of shape
    if tensor.shape != shape:
        raise CheckpointError(
            f"the tensor {key!r} has shape {tuple(tensor.shape)}, but the configuration asks for {tuple(shape)}; the "
            "weights and adapter_config.json do not belong together, or the base model is another one"
        )
    if tensor.device.type != "meta" and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"the tensor {key!r} holds NaN or infinity; the file is damaged or training diverged")
