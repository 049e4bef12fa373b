"""What is checked, chosen and told when an adapter is put into a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from ..base_sample import differing
from ..config import HoEConfig
from ..errors import ExpertError, HoEWarning, ModuleError
from .base_modules import check_root
from .embedding import HoEEmbedding, HoEHead, TiedHead
from .layer import HoELayer
from .linear import HoELinear
from .norm import HoENorm


def check_injectable(adapter_name: str, model: nn.Module) -> None:
    """See that a model can be steered, and that PEFT can save an adapter of that name."""
    check_root(model)
    if "." in adapter_name:
        raise ExpertError(
            f"the adapter name {adapter_name!r} holds a dot, which PEFT cannot save; choose another",
            argument="adapter_name",
            value=adapter_name,
        )


def check_named(model: nn.Module, config: HoEConfig) -> None:
    """See that `target_embeddings` and `target_norms` name modules of the model."""
    names = [name for name, _ in model.named_modules()]
    for field in ("target_embeddings", "target_norms"):
        for wanted in getattr(config, field) or ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
                raise ModuleError(
                    f"{field} names {wanted!r}, but {type(model).__name__} has no module of that name",
                    module=wanted,
                    argument=field,
                    value=wanted,
                )


def kind_of(target: nn.Module) -> type[HoELayer]:
    """The layer for a module that `target_embeddings` or `target_norms` names."""
    if isinstance(target, nn.Embedding):
        return HoEEmbedding
    return HoENorm if "Norm" in type(target).__name__ else HoEHead


def check_same_kind(layer: HoELayer, static: bool, adapter: str) -> None:
    """See that a second adapter names a module in the way that the first does."""
    if layer.votes_statically != static or isinstance(layer, TiedHead):
        raise ModuleError(
            f"{layer.module_name} already has an adapter, by target_modules or by target_embeddings; adapter {adapter!r} must "
            "name it in the same way",
            module=layer.module_name,
        )


def warn_of_another_base(model: nn.Module, adapter_name: str, config: HoEConfig) -> None:
    """Tell of a base that is not the one that the adapter was built on."""
    if config.base_sample is None:
        return
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, HoELinear)}
    weights: dict[str, Any] = {
        name: layer.get_base_layer().weight
        for name, layer in layers.items()
        if adapter_name in layer.hoe_A and not layer.votes_statically  # the record is of target_modules
    }
    found = differing(config.base_sample, weights)
    if found:
        built_on = str(config.base_model_name_or_path) + (f" (revision {config.revision})" if config.revision else "")
        here = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        warnings.warn(
            f"adapter {adapter_name!r} was built on {built_on!r}, but {here!r} has other weights: {len(found)} of "
            f"{len(config.base_sample['values'])} sampled modules differ, such as {found[0]!r}. Its experts change that base",
            HoEWarning,
            stacklevel=4,
        )


def warn_of_fused_experts(model: nn.Module, config: HoEConfig, names: Callable[[Any, str], Any] | None) -> None:
    """Say which expert tensors are left out: those of all experts in one Parameter have no linear module to adapt.

    `names` tells whether a configuration names a module; None where it names all.
    """
    fused = [
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and "experts" in name.split(".")
    ]
    left = [name for name in fused if names is None or names(config, name)]
    if left:
        warnings.warn(
            f"{len(left)} tensors that hold all experts of a mixture at once, such as {left[0]}, are left out: HoE adapts "
            "linear modules",
            HoEWarning,
            stacklevel=3,
        )
