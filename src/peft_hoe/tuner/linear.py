"""The module that replaces a linear one: forward, merge and unmerge."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import HoEConfig
from ..errors import StaticMergeError
from .base_modules import features
from .calls import THIS_THREAD
from .kernels.gate import over_ranks
from .layer import HoELayer
from .mixture import ExpertMixture
from .rows import check_rows
from .steering import Steering
from .votes import module_votes


class HoELinear(nn.Module, ExpertMixture):
    """HoE around nn.Linear, transformers' Conv1D, or another linear module that is used through its own forward."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: HoEConfig, name: str, steering: Steering
    ) -> None:
        super().__init__()
        HoELayer.__init__(self, base_layer, name, steering)
        self._measure(config)
        self._before_merging: weakref.ref[torch.Tensor] | None = None  # the base weight that other modules may share
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def _measure(self, config: HoEConfig) -> None:
        base, name = self.get_base_layer(), self.module_name
        self.in_features, self.out_features = features(base, name)
        self.fan_in_fan_out = isinstance(base, Conv1D)
        if config.fan_in_fan_out and isinstance(base, nn.Linear):
            warnings.warn(f"{name} is an nn.Linear, which stores (out, in); fan_in_fan_out is ignored", stacklevel=3)

    @staticmethod
    def _in_rows(x: torch.Tensor) -> torch.Tensor:
        """The input as `check_rows` reads it, features last."""
        return x

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x) plus the deltas of the active adapters, `(..., d_out)` in the base's dtype."""
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            result: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return result
        plan, call = self._plan()
        result = self._modules["base_layer"](x, *args, **kwargs)  # type: ignore[misc]
        if self.merged_adapters:
            self.check_merged(plan)
            return result
        if plan.rows is not None:
            check_rows(self._in_rows(x), plan, call, self.module_name)
        for adapter in self.active_adapters:
            if adapter in self.hoe_layouts and adapter in plan.adapters:
                result = self._add_experts(result, x, adapter, plan.adapters[adapter])
        if call is not None and call.grad and call is not THIS_THREAD.forward and result.requires_grad:
            call.tie_to([result])  # no root does it
        return result

    def _apply(self, *args: Any, **kwargs: Any) -> HoELinear:
        """As torch's: for all that moves or casts a module. What was prepared holds the old weights' memory."""
        super()._apply(*args, **kwargs)
        self._steps.clear()
        for adapter in self.hoe_A:
            self.hoe_steering.lies_at(self.factors(adapter)[0])
        return self

    # -- merging ---

    def get_delta_weight(self, adapter: str, votes: torch.Tensor | None = None) -> torch.Tensor:
        """c(w) times the sum of w_j B_j A_j at the current preference, in the base weight's orientation, float32 or better.

        Raises:
            StaticMergeError: the votes depend on the input, or the rows differ.
        """
        votes = self.merged_votes(adapter) if votes is None else votes
        weight_a, weight_b = self.factors(adapter)
        dtype = torch.promote_types(weight_b.dtype, torch.float32)
        votes = votes.to(dtype).to(weight_b.device)
        if adapter in self.hoe_length:
            votes = votes * self.hoe_length[adapter](votes)
        expanded = over_ranks(votes, self.hoe_layouts[adapter].ranks)
        delta = (weight_b.to(dtype) * expanded) @ weight_a.to(dtype)
        return delta.T if self.fan_in_fan_out else delta

    def merged_votes(self, adapter: str) -> torch.Tensor:
        """`(L,)` float64: the votes of this module that merging bakes in at the current preference.

        Raises:
            StaticMergeError: the votes depend on the input, or the rows differ.
        """
        plan = self.hoe_steering.mergeable_plan(adapter)
        if self.votes_statically:
            return plan.fixed[0]
        if not plan.is_by_module:
            return plan.static[0]
        router: Any = self.hoe_router[adapter]
        bias = router.bias.detach().double()
        placed = plan.votes(bias.cpu(), tuple(range(plan.static.shape[1])))
        added = module_votes(placed.modules, bias, self.hoe_layouts[adapter].temperature)
        return plan.static[0] + added[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the deltas at the current preference to the base weight.

        Args:
            safe_merge: check that the merged weight is finite before replacing the old one.
            adapter_names: adapters to merge; default the active ones.

        Raises:
            StaticMergeError: a trained router votes, the rows differ, or the base weight is quantised.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.hoe_A:
                continue
            self.check_mergeable(adapter)
            votes = self.merged_votes(adapter)
            merged = self._shifted_weight(self.get_delta_weight(adapter, votes))
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            if not self.merged_adapters:
                self._before_merging = weakref.ref(self._base_weight())
            self._set_base_weight(merged)
            self._merged[adapter] = (self.hoe_steering.current(adapter), votes)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Subtract again what `merge` added."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            _, votes = self._merged.pop(adapter)
            if adapter in self.hoe_A:
                delta = self.get_delta_weight(adapter, votes)
                self._set_base_weight(self._shifted_weight(-delta))
        before = self._before_merging() if self._before_merging is not None else None
        if before is not None:
            self.get_base_layer().weight = before  # a tied weight is one again
        self._before_merging = None

    def _set_base_weight(self, weight: torch.Tensor) -> None:
        """Give the base module a weight of its own: what other modules share with it, such as embeddings, stays theirs."""
        base: Any = self.get_base_layer()
        if isinstance(base.weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=base.weight.requires_grad)
        base.weight = weight

    def _base_weight(self) -> torch.Tensor:
        base: Any = self.get_base_layer()
        weight: torch.Tensor = base.weight
        return weight

    def _shifted_weight(self, delta: torch.Tensor) -> torch.Tensor:
        weight = self._base_weight().data
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shifted: torch.Tensor = (weight.to(dtype) + delta.to(weight.device, dtype)).to(weight.dtype)
        return shifted

    def check_mergeable(self, adapter: str) -> None:
        """Raise what `merge` would raise, before anything is changed."""
        self.hoe_steering.mergeable_plan(adapter)
        weight = self._base_weight()
        shape = (self.in_features, self.out_features) if self.fan_in_fan_out else (self.out_features, self.in_features)
        if type(weight) not in (nn.Parameter, torch.Tensor) or not weight.dtype.is_floating_point:
            reason = f"its weight is a quantised {type(weight).__name__} of {weight.dtype}"
        elif weight.dtype.itemsize < 2 or tuple(weight.shape) != shape:
            reason = f"its weight is stored as {tuple(weight.shape)} {weight.dtype}"
        else:
            return
        raise StaticMergeError(
            f"{self.module_name} cannot be merged: {reason}, and adding to it would lose or change the adapter. Keep it "
            "unmerged, or load the base with plain weights",
            module=self.module_name,
            value=(tuple(weight.shape), weight.dtype),
            allowed=(shape, "a floating dtype of 2 bytes or more"),
        )

    def __repr__(self) -> str:
        return "hoe." + super().__repr__()
