"""Which modules of a base model can be adapted, and what shows that one cannot be after all.

An adapter acts through its module's forward. Some models read a module's weight past it (Mamba's `dt_proj`, the fast paths of
nn.TransformerEncoderLayer): an adapter there would do nothing until it is merged, in silence. While a model runs, such a weight
is therefore handed out as a `GuardedWeight`, which says what it is like but refuses to be computed with. A model may clamp its
weight in place (Gemma3n does while it trains): that changes the base, and the adapter still acts through the module's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ModuleError


def features(base: nn.Module, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a linear module.

    Raises:
        ModuleError: the module is not linear, its weight is read past its forward, or is a part of a tensor that several
            processes share; names it.
    """
    weight: Any = getattr(base, "weight", None)
    if hasattr(weight, "device_mesh"):
        raise ModuleError(
            f"Target module {name} has a weight that several processes share ({type(weight).__name__}): the base model is "
            "tensor-parallel or sharded already, which HoE does not support. Load it without tp_plan, and shard it after the "
            "adapter is in",
            module=name,
        )
    if isinstance(base, Conv1D):
        return int(base.weight.shape[0]), int(base.weight.shape[1])
    if type(base).__name__ == "NonDynamicallyQuantizableLinear":
        raise ModuleError(
            f"Target module {name} is the output projection of an nn.MultiheadAttention, which reads its weight past the "
            "module's forward, so an adapter there would do nothing; exclude it with exclude_modules",
            module=name,
        )
    linear = isinstance(base, nn.Linear) or "Linear" in type(base).__name__
    if linear and isinstance(getattr(base, "in_features", None), int) and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
    raise ModuleError(
        f"Target module {name} is a {type(base).__name__}, which is not supported. HoE adapts torch.nn.Linear, transformers' "
        "Conv1D and linear modules with in_features and out_features; change target_modules or exclude_modules",
        module=name,
    )


def check_root(model: nn.Module) -> None:
    """See that a model is whole on this process.

    Raises:
        ModuleError: transformers has split it by a tensor-parallel plan.
    """
    size = getattr(model, "_tp_size", None)
    if size is not None and size > 1:
        raise ModuleError(
            f"{type(model).__name__} is split over {size} processes by a tensor-parallel plan, which HoE does not support; "
            "load it without tp_plan",
            argument="tp_plan",
            value=size,
        )


class GuardedWeight(torch.Tensor):
    """A weight that may be looked at, but not computed with."""

    _module: str

    @staticmethod
    def of(weight: torch.Tensor, module: str) -> GuardedWeight:
        """The guarded weight of a module."""
        guarded = weight.detach().as_subclass(GuardedWeight)
        guarded._module = module
        return guarded

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LOOKS:
                return func(*args, **(kwargs or {}))
            if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
                return cls.of(args[0], args[0]._module)
            if func in _CHANGES:
                func(*args, **(kwargs or {}))
                return args[0]
        module = next((item._module for item in _flat((*args, *(kwargs or {}).values())) if isinstance(item, cls)), "")
        raise ModuleError(
            f"the model computes with the weight of {module} past the module's forward, so the adapter there would do nothing; "
            f"leave {module.rpartition('.')[2]!r} out of target_modules, or name it in exclude_modules",
            module=module,
        )


def _flat(items: Sequence[Any]) -> list[Any]:
    return [part for item in items for part in (_flat(item) if isinstance(item, (list, tuple)) else [item])]


_CHANGES = {torch.Tensor.clamp_, torch.Tensor.clamp_min_, torch.Tensor.clamp_max_, torch.Tensor.clip_}
_LOOKS = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("dtype", "device", "shape", "layout", "ndim", "requires_grad", "grad", "is_leaf", "is_meta")
    ),
    *(
        getattr(torch.Tensor, name)
        for name in ("size", "dim", "numel", "stride", "is_floating_point", "is_contiguous", "data_ptr", "element_size",
                     "get_device", "__repr__", "__len__", "is_complex", "nelement", "__hash__")
    ),
}  # fmt: skip
