"""The frozen policy over several processes: each holds a share of its weights and gathers one layer at a time.

Only weights that never train are sharded (torch's `fully_shard`). What trains, and what is written with the adapter, stays
whole on every process: the router and the critic, whose gradients DistributedDataParallel averages as without sharding, and
the experts. So nothing that reads or writes them has to know of shards.
"""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...errors import HoEError
from ...tuner.layer import HoELayer
from ...tuner.linear import HoELinear

_TORCH = "2.7"  # fully_shard's ignored_params


def shard(policy: Any, device: torch.device) -> None:
    """Leave on this process its share of the base's weights, in place; nothing is done to a policy that is sharded.

    From now on all processes must call the policy equally often. transformers' `generate` sees to it: a process whose
    responses have ended runs on until all have.

    Args:
        policy: a PeftModel with a HoE adapter, the same on every process.
        device: of this process.

    Raises:
        HoEError: there is one process, torch is too old, or the policy cannot be sharded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = policy.get_base_model()
    if isinstance(model, FSDPModule):
        return
    whole = written_with_adapter(model)
    layers = _decoder_layers(model)
    _check_weights(model, whole)
    _check_processes()
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [*layers, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for parameter in whole:  # the shards are there already
        parameter.data = parameter.data.to(device)


def written_with_adapter(model: Any) -> set[nn.Parameter]:
    """The Parameters that are saved with the adapter; they stay whole."""
    kept: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, HoELayer):
            for part in module.adapter_layer_names:
                kept.update(getattr(module, part).parameters())
        elif isinstance(module, ModulesToSaveWrapper):
            kept.update(module.parameters())
    head = model.get_output_embeddings()
    if isinstance(head, HoELinear):  # PEFT writes the base's weight too
        kept.update(head.parameters())
    return kept


def _check_processes() -> None:
    if Version(torch.__version__).release < Version(_TORCH).release:
        raise HoEError(
            f"shard_policy=True needs torch {_TORCH} or newer, but torch is {torch.__version__}",
            argument="shard_policy",
            value=True,
        )
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if distributed else 1
    if processes < 2:
        raise HoEError(
            f"shard_policy=True, but the number of processes is {processes}; start several, one for each GPU, with "
            "accelerate launch --multi_gpu --num_processes N or torchrun --nproc_per_node N",
            argument="shard_policy",
            value=True,
        )


def _decoder_layers(model: Any) -> list[nn.Module]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise HoEError(
            f"shard_policy=True, but {type(model).__name__} does not say what its layers are (`_no_split_modules` is "
            f"{sorted(names)}); leave shard_policy out, or use a model of transformers that does",
            argument="shard_policy",
            value=True,
        )
    return layers


def _check_weights(model: nn.Module, whole: set[nn.Parameter]) -> None:
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) > 1:
        raise HoEError(
            f"shard_policy=True, but the policy was loaded with a device_map over {sorted(map(str, places))}; load it "
            "without device_map",
            argument="shard_policy",
            value=True,
        )
    for name, parameter in model.named_parameters():
        if parameter not in whole and not parameter.is_floating_point():
            raise HoEError(
                f"shard_policy=True, but {name} is a quantised {parameter.dtype}; load the base with plain weights, or leave "
                "shard_policy out",
                argument="shard_policy",
                value=True,
            )
