"""Experts of norms: small deltas of their weights, weighed by the preference alone.

With one preference for all rows, y = norm(x; weight + sum_j w_j delta_j), and nothing else runs. A norm is linear in its
weight, so with a preference per row, what a weight of 1 adds, norm(x; 1) - norm(x; 0), is multiplied by each row's delta.
All routers vote as before their training (`AdapterPlan.fixed`), and lengths are not given back: a delta is a shift of few
numbers.

Shapes: L experts, d the norm's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..config import HoEConfig
from ..errors import ModuleError
from .calls import THIS_THREAD
from .kernels.gate import without_autocast
from .layer import HoELayer
from .plan import AdapterPlan
from .rows import check_rows
from .steering import Steering


class NormDeltas(nn.Module):
    """The deltas of one adapter's experts in one norm.

    Attributes:
        weight: `(L, d)`.
        bias: `(L, d)`; None where the norm has none.
    """

    def __init__(self, n_experts: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_experts, width))
        self.bias = nn.Parameter(torch.zeros(n_experts, width)) if bias else None

    def forward(self, votes: torch.Tensor) -> dict[str, torch.Tensor]:
        """The deltas `(rows, d)` at votes `(rows, L)`, by the name of the norm's Parameter."""
        return {name: votes.to(deltas.dtype) @ deltas for name, deltas in self.named_parameters()}


class HoENorm(nn.Module, HoELayer):
    """HoE around a norm with a weight, such as LayerNorm or RMSNorm."""

    adapter_layer_names = ("hoe_norm",)
    low_rank = False
    votes_statically = True

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: HoEConfig, name: str, steering: Steering
    ) -> None:
        super().__init__()
        HoELayer.__init__(self, base_layer, name, steering)
        self.in_features = self.out_features = norm_width(self.get_base_layer(), name)
        self.hoe_norm = nn.ModuleDict()
        self._before_merging: dict[str, nn.Parameter] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def _make(self, adapter: str, config: HoEConfig) -> None:
        deltas = NormDeltas(len(config.experts or []), self.in_features, bias="bias" in self._parameters_of_base())
        if not config.init_weights:
            for parameter in deltas.parameters():
                nn.init.normal_(parameter, std=0.02)
        self.hoe_norm[adapter] = deltas

    def check_ranks(self, config: HoEConfig) -> None:
        """Nothing: a norm's experts have no ranks."""

    def take(self, adapter: str, config: HoEConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        """See `HoELayer.take`."""
        trains = any(parameter.requires_grad for parameter in self.hoe_norm[adapter].parameters())
        deltas = NormDeltas(0, self.in_features, bias=False)
        deltas.weight = nn.Parameter(tensors["hoe_norm.weight"], requires_grad=trains)
        if "hoe_norm.bias" in tensors:
            deltas.bias = nn.Parameter(tensors["hoe_norm.bias"], requires_grad=trains)
        self.hoe_norm[adapter] = deltas.train(self.training)
        self.hoe_layouts[adapter] = self._layout(config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The norm of x `(..., d)` with the deltas of the active adapters."""
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        if self._disable_adapters:
            plain: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        plan, call = self._plan()
        if self.merged_adapters:
            self.check_merged(plan)
            merged: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return merged
        if plan.rows is not None:
            check_rows(x, plan, call, self.module_name)
        active = [name for name in self.active_adapters if name in self.hoe_layouts and name in plan.adapters]
        result = self._shifted(x, [self._deltas(name, plan.adapters[name], x) for name in active], args, kwargs)
        if call is not None and call.grad and call is not THIS_THREAD.forward and result.requires_grad:
            call.tie_to([result])  # no root does it
        return result

    def _deltas(self, adapter: str, plan: AdapterPlan, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """Deltas `(rows, d)` of an adapter, by Parameter."""
        deltas: Any = self.hoe_norm[adapter]
        with without_autocast(like.device.type):
            found: dict[str, torch.Tensor] = deltas(plan.fixed_votes(deltas.weight))
        return found

    def _shifted(
        self, x: torch.Tensor, deltas: list[dict[str, torch.Tensor]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """The norm of x with its weight and bias shifted by the deltas of all adapters."""
        base = self._parameters_of_base()

        def norm(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
            result: torch.Tensor = torch.func.functional_call(self.base_layer, parameters, (x, *args), kwargs)
            return result

        shared = [each for each in deltas if each["weight"].shape[0] == 1]
        result = norm({name: _plus(tensor, *(each[name][0] for each in shared)) for name, tensor in base.items()})
        by_row = [each for each in deltas if each["weight"].shape[0] > 1]
        if not by_row:
            return result
        zero = {**base, "weight": torch.zeros_like(base["weight"])}
        unit = norm({**base, "weight": torch.ones_like(base["weight"])}) - norm(zero)
        for each in by_row:
            result = result + (unit * _over_rows(each["weight"], x)).to(result.dtype)
            if "bias" in each:
                result = result + _over_rows(each["bias"], x).to(result.dtype)
        return result

    def _parameters_of_base(self) -> dict[str, torch.Tensor]:
        found = self.get_base_layer()._parameters
        return {name: tensor for name in ("weight", "bias") if (tensor := found.get(name)) is not None}

    # -- merging ---

    def parameters_before_merging(self) -> dict[str, torch.Tensor]:
        """The base's weight, and bias where it has one, as they are while nothing is merged, `(d,)` each."""
        return {**self._parameters_of_base(), **self._before_merging}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas at the current preference to the norm's weight; see `HoELinear.merge`."""
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.hoe_norm:
                continue
            votes = self.hoe_steering.mergeable_plan(adapter).fixed[0]
            base, part = self._parameters_of_base(), self.hoe_norm[adapter]
            deltas = part(
                votes.to(base["weight"].device, torch.promote_types(base["weight"].dtype, torch.float32))[None]
            )
            merged = {name: _plus(tensor, deltas[name][0]).detach() for name, tensor in base.items()}
            if safe_merge and not all(bool(tensor.isfinite().all()) for tensor in merged.values()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            module: Any = self.get_base_layer()
            for name, tensor in merged.items():
                self._before_merging.setdefault(name, module._parameters[name])
                setattr(module, name, nn.Parameter(tensor, requires_grad=module._parameters[name].requires_grad))
            self._merged[adapter] = (self.hoe_steering.current(adapter), votes)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Put the weights of before `merge` back."""
        for name, parameter in self._before_merging.items():
            setattr(self.get_base_layer(), name, parameter)
        self._before_merging, self._merged = {}, {}
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "hoe." + super().__repr__()


def _plus(tensor: torch.Tensor, *deltas: torch.Tensor) -> torch.Tensor:
    """A Parameter and its deltas, summed in float32 or wider, in its dtype."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    total = tensor.to(wide)
    for delta in deltas:
        total = total + delta.to(tensor.device, wide)
    return total.to(tensor.dtype)


def _over_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(B, d)`, each row once for each of its rows in `like` `(B k, ..., d)`, with the same number of dimensions."""
    repeated = rows.repeat_interleave(like.shape[0] // rows.shape[0], dim=0)
    return repeated.view(like.shape[0], *[1] * (like.ndim - 2), rows.shape[-1])


def norm_width(base: Any, name: str) -> int:
    """The width d of a norm.

    Raises:
        ModuleError: the module is no norm with a plain weight of one dimension; names it.
    """
    weight = getattr(base, "weight", None)
    if "Norm" not in type(base).__name__ or type(weight) is not nn.Parameter or weight.ndim != 1:
        raise ModuleError(
            f"target_norms names {name}, a {type(base).__name__}; HoE adapts norms with a weight of one dimension, such as "
            "LayerNorm and RMSNorm. Leave it out",
            module=name,
        )
    return int(weight.shape[0])
