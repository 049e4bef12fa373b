"""Checks what is loaded into HoE layers, before any of it is."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import CheckpointError, HoEWarning
from .layer import HoELayer
from .layout import ExpertLayout
from .norm import HoENorm

# PEFT puts the adapter's name only into keys that it finds a place for.
_PARTS = (*HoELayer.adapter_layer_names, *HoENorm.adapter_layer_names)
_OURS = re.compile(r"(?P<module>.+)\.(?P<part>hoe_\w+?)(\.(?P<adapter>[^.]+))?\.\w+")


def check_whole(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors that an adapter is saved with, if this process has them whole.

    They are not gathered here: PEFT's save_pretrained may be called by one process alone, which would wait for ever.

    Raises:
        CheckpointError: one is sharded over processes, as torch's fully_shard (FSDP2) does it.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise CheckpointError(
                f"{name} is sharded over processes, and an adapter is saved whole. On all processes, call state = "
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)) of "
                "torch.distributed.checkpoint.state_dict, then model.save_pretrained(directory, state_dict=state, "
                "is_main_process=rank == 0)",
                tensor=name,
            )
    return tensors


def check_state_dict(root: nn.Module, state_dict: Mapping[str, Any], prefix: str, *unused: Any) -> None:
    """A load_state_dict pre-hook: an adapter is loaded whole, as its configuration describes it and finite, or not at all.

    A state dict with any expert tensor of an adapter must hold them all. One with router tensors alone is a router checkpoint
    and is let through.

    Raises:
        CheckpointError: names the tensor, what is wrong with it and the remedy.
    """
    layers = {f"{prefix}{name}": module for name, module in root.named_modules() if isinstance(module, HoELayer)}
    expected = {
        f"{name}.{key}": (adapter, shape) for name, layer in layers.items() for adapter, key, shape in layer.tensors()
    }
    whole = {adapter for key, (adapter, _) in expected.items() if key in state_dict and ".hoe_router." not in key}
    if not any(key in state_dict for key in expected):
        return
    _check_places(state_dict, layers, expected)
    _check_base(root, state_dict, prefix)
    for key, (adapter, shape) in expected.items():
        if key in state_dict:
            _check_tensor(key, state_dict[key], shape)
            if key.endswith(f".hoe_router.{adapter}.weight"):
                layer = layers[key.removesuffix(f".hoe_router.{adapter}.weight")]
                _check_unread(key, state_dict[key], layer.hoe_layouts[adapter])
        elif adapter in whole:
            _refuse_missing(key, adapter, shape)


def settle_loaded(root: nn.Module) -> None:
    """Check all adapter tensors of a model, and lay them in memory as they are read, once, however they were loaded.

    Raises:
        CheckpointError: as `check_loaded`.
    """
    check_loaded(root)
    for layer in root.modules():
        if isinstance(layer, HoELayer) and layer.low_rank:
            for adapter in layer.hoe_layouts:
                layer.lay_out(adapter)


def check_loaded(root: nn.Module) -> None:
    """Check all adapter tensors of a model once, however they were loaded.

    transformers' own loader does not go through load_state_dict. It reports missing and mismatched tensors itself, but not NaN,
    and not experts in another order.

    Raises:
        CheckpointError: names the tensor and the remedy.
    """
    for name, layer in root.named_modules():
        if isinstance(layer, HoELayer):
            for part in layer.adapter_layer_names:
                for key, parameter in getattr(layer, part).named_parameters():
                    _check_tensor(f"{name}.{part}.{key}", parameter, parameter.shape)
            for adapter, router in layer.hoe_router.items():
                weight: Any = router.weight
                _check_unread(f"{name}.hoe_router.{adapter}.weight", weight, layer.hoe_layouts[adapter])


def _refuse_missing(key: str, adapter: str, shape: torch.Size) -> None:
    if ".hoe_length." in key:
        raise CheckpointError(
            f"adapter {adapter!r}: the file lacks the tensor {key!r}, which interpolation='norm' needs; it is incomplete, "
            "or was saved with interpolation='linear': load it with that, or build it again",
            tensor=key,
        )
    raise CheckpointError(
        f"adapter {adapter!r}: the file lacks the tensor {key!r} of shape {tuple(shape)}; it is incomplete, or its "
        "adapter_config.json belongs to another adapter. Save or download it again",
        tensor=key,
    )


def _check_places(
    state_dict: Mapping[str, Any], layers: Mapping[str, HoELayer], expected: Mapping[str, tuple[str, torch.Size]]
) -> None:
    """Refuse tensors of an adapter that its configuration has no place for: the model would be another without them."""
    adapters = {adapter for adapter, _ in expected.values()}
    for key in state_dict:
        match = _OURS.fullmatch(key)
        if match is None or key in expected or match["part"] not in _PARTS:
            continue
        if match["adapter"] not in {None, *adapters}:
            continue  # of an adapter that this model does not have
        if match["module"] in layers and match["part"] == "hoe_length":
            continue  # saved with interpolation="norm", loaded with "linear"
        raise CheckpointError(
            f"the file holds the tensor {key!r}, but the configuration has no place for it; its "
            "target_modules or routers are not those that the adapter was saved with, or the base model is another one",
            tensor=key,
        )


def _check_base(root: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Refuse weights of the base model in an adapter's file, but those of resized embeddings. A whole model has them all."""
    base = {f"{prefix}{name}": tensor for name, tensor in root.named_parameters() if not _is_adapters(name)}
    given = [key for key in base if key in state_dict]
    if not given or len(given) == len(base):
        return
    embeddings = {id(parameter) for module in _embeddings(root) for parameter in module.parameters()}
    others = [key for key in given if id(base[key]) not in embeddings]
    if others:
        raise CheckpointError(
            f"the adapter's file holds {others[0]!r}, a weight of the base model, which it would overwrite; take it out of the "
            "file, or name its module in modules_to_save",
            tensor=others[0],
        )
    changed = [key for key in given if not _same(base[key], state_dict[key])]
    if changed:
        warnings.warn(
            f"the adapter's file replaces the base model's embeddings {changed}, as PEFT saves them for a resized vocabulary",
            HoEWarning,
            stacklevel=2,
        )


def _is_adapters(name: str) -> bool:
    return ".modules_to_save." in name or any(part.startswith("hoe_") for part in name.split("."))


def _embeddings(root: Any) -> list[nn.Module]:
    try:
        found = [root.get_input_embeddings(), root.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return []
    return [module for module in found if isinstance(module, nn.Module)]


def _same(mine: torch.Tensor, other: Any) -> bool:
    if mine.is_meta or not isinstance(other, torch.Tensor):
        return True
    return mine.shape == other.shape and bool(torch.equal(mine.detach(), other.to(mine)))


def _check_unread(key: str, weight: Any, layout: ExpertLayout) -> None:
    """Refuse a router that votes by module but was trained by token: its weights would be left out without a word."""
    rows = layout.unread_rows
    if not rows or type(weight) not in (torch.Tensor, nn.Parameter) or weight.is_meta:
        return
    if bool(weight[rows].any()):
        raise CheckpointError(
            f'the tensor {key!r} has weights of a router of kind="module", which has a bias alone; it was trained with '
            'kind="token": load it with the adapter_config.json that was saved with it',
            tensor=key,
        )


def _largest(key: str, dtype: torch.dtype) -> float:
    """How large a finite number may be: what it is multiplied with overflows beyond, and then the model's numbers are NaN."""
    if ".hoe_length." in key:
        return 1.01  # inner products in units of the greatest
    return 1e30 if torch.finfo(dtype).max > 1e30 else 4096.0


def _check_tensor(key: str, tensor: Any, shape: torch.Size) -> None:
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return  # sharded tensors have their own ideas of shape
    if tensor.shape != shape:
        raise CheckpointError(
            f"the tensor {key!r} has shape {tuple(tensor.shape)}, but the configuration asks for {tuple(shape)}; the "
            "weights and adapter_config.json do not belong together, or the base model is another one",
            tensor=key,
            value=tuple(tensor.shape),
            allowed=tuple(shape),
        )
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"the tensor {key!r} holds {tensor.dtype}, not floating-point numbers; the file is damaged",
            tensor=key,
            value=tensor.dtype,
        )
    if tensor.device.type == "meta" or not tensor.numel():
        return
    low, high = (tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()).aminmax()
    largest = max(-float(low), float(high))  # NaN if any is
    if not largest <= _largest(key, tensor.dtype):
        problem = f"numbers as large as {largest:.3g}" if largest < float("inf") else "NaN or infinity"
        raise CheckpointError(
            f"the tensor {key!r} holds {problem}; the file is damaged or training diverged", tensor=key, value=largest
        )
