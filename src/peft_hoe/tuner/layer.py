"""The HoE layer: a frozen linear module, its LoRA experts and its routers.

Shapes: x `(..., d_in)`; L experts of ranks r_1 ... r_L with sum r; A `(r, d_in)` and B `(d_out, r)` hold the experts one
after the other, every scale folded into B; V voting slots; votes w `(..., L)`, at least 0 and summing to 1 per token.

    w(x) = static + sum over live routers of weight * scatter softmax((W x + b) / T)        (paper eq. 11)
    y    = base(x) + B (w(x) expanded over the ranks * A x)                                  (paper eq. 12)

The paper prints raw logits in eq. 11; those cannot be mixed with the one-hot votes of LoRA experts, so each router votes
with its softmax. Nothing of shape (tokens, experts, d_out) is ever made.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import HoEConfig
from ..errors import PreferenceError, StaticMergeError
from ..preference import FloatArray
from .plan import AdapterPlan, Plan
from .steering import ACTIVE, ForwardMemory, Frame, Steering


@dataclass(frozen=True)
class ExpertLayout:
    """How one adapter's experts and routers lie in the layer's tensors.

    Attributes:
        ranks: of each expert, 0 where it has nothing here.
        slots: number of voting slots of each router.
        temperature: T of the routers' softmax.
        train_experts: whether A and B train.
    """

    ranks: tuple[int, ...]
    slots: tuple[int, ...]
    temperature: float
    train_experts: bool


class HoELayer(BaseTunerLayer):
    """What makes a module a HoE layer: adapter tensors, trainability, votes and the plan in effect."""

    adapter_layer_names: tuple[str, ...] = ("hoe_A", "hoe_B", "hoe_router")
    other_param_names: tuple[str, ...] = ()

    base_layer: nn.Module
    training: bool

    def _init_hoe(self, base_layer: nn.Module, name: str, steering: Steering) -> None:
        self.base_layer = base_layer
        self.hoe_A = nn.ModuleDict()
        self.hoe_B = nn.ModuleDict()
        self.hoe_router = nn.ModuleDict()
        self.hoe_steering = steering
        self.hoe_layouts: dict[str, ExpertLayout] = {}
        self.module_name = name
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._merged: dict[str, tuple[FloatArray, torch.Tensor]] = {}  # preference and votes merged in
        self._router_grads: dict[str, bool] = {}
        self._memory = ForwardMemory()

    # -- adapters --------------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: HoEConfig) -> None:
        """Add an adapter: experts with a zero delta, routers that repeat their static votes."""
        layout = ExpertLayout(
            ranks=tuple(config.ranks(self.module_name)),
            slots=tuple(len(members) for members in config.votes()),
            temperature=config.router_temperature,
            train_experts=config.train_experts,
        )
        self.hoe_layouts[adapter_name] = layout
        rank = sum(layout.ranks)
        self.hoe_A[adapter_name] = nn.Linear(self.in_features, rank, bias=False)
        self.hoe_B[adapter_name] = nn.Linear(rank, self.out_features, bias=False)
        if layout.slots:
            self.hoe_router[adapter_name] = nn.Linear(self.in_features, sum(layout.slots))
        if config.init_weights:
            self.reset_parameters(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, config: HoEConfig) -> None:
        """A as in LoRA, B = 0; router weights 0 and biases T log max(c, 1e-3)."""
        nn.init.kaiming_uniform_(self.hoe_A[adapter_name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.hoe_B[adapter_name].weight)
        if adapter_name in self.hoe_router:
            router = self.hoe_router[adapter_name]
            nn.init.zeros_(router.weight)
            with torch.no_grad():
                router.bias.copy_(torch.from_numpy(config.initial_router_bias()))

    def tensors(self) -> Iterator[tuple[str, str, torch.Size]]:
        """(adapter, key below this layer, shape) of every adapter tensor."""
        for part in self.adapter_layer_names:
            for adapter, linear in getattr(self, part).items():
                for name, parameter in linear.named_parameters():
                    yield adapter, f"{part}.{adapter}.{name}", parameter.shape

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self.hoe_layouts.pop(adapter_name, None)
        self._router_grads.pop(adapter_name, None)

    # -- what trains -----------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Activate adapters. Experts stay frozen unless the adapter was made with `train_experts=True`."""
        super().set_adapter(adapter_names, *args, **kwargs)
        self._freeze_experts()
        self.hoe_steering.active = tuple(self.active_adapters)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """As PEFT's, but experts stay frozen unless the adapter was made with `train_experts=True`."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_experts()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off; what trained before trains afterwards, and nothing else does."""
        parts = [(part, name) for part in self.adapter_layer_names for name in getattr(self, part)]
        if not enabled and not self._disable_adapters:
            self._router_grads = {f"{part}.{name}": _trains(getattr(self, part)[name]) for part, name in parts}
        super().enable_adapters(enabled)
        if enabled:
            for part, name in parts:
                if f"{part}.{name}" in self._router_grads:
                    getattr(self, part)[name].requires_grad_(self._router_grads[f"{part}.{name}"])
            self._router_grads = {}

    def _freeze_experts(self) -> None:
        for name, layout in self.hoe_layouts.items():
            if not layout.train_experts and name in self.hoe_B:
                self.hoe_A[name].requires_grad_(False)
                self.hoe_B[name].requires_grad_(False)

    # -- the plan in effect ------------------------------------------------------------------------------------------------

    def _plan(self) -> tuple[Plan, Frame | None]:
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._current_graph_task_id() != -1:
            replayed = self._memory.replay(self.module_name)
            if replayed is not None:
                return replayed, None
        frame = ACTIVE.frame
        if frame is not None and frame.steering is not self.hoe_steering:
            frame = None
        if frame is not None:
            plan = frame.plan
        else:
            plan = self.hoe_steering.default if compiling else self.hoe_steering.ambient()
        if not compiling and self.training and (frame is None or frame.grad):
            self._memory.remember(plan, frame)
        return plan, frame

    def _votes(self, x: torch.Tensor, adapter: str, plan: AdapterPlan, repeat: int) -> torch.Tensor:
        """w: `(L,)` where it is the same for all tokens, else `(..., L)` to be broadcast over x's tokens."""
        static = _per_row(plan.placed("static", x), repeat, x.ndim)
        if plan.live is None:
            return static
        router, layout = self.hoe_router[adapter], self.hoe_layouts[adapter]
        logits = router(self._cast_input_dtype(x, router.weight.dtype))
        logits = logits.to(static.dtype) / layout.temperature
        live = _per_row(plan.placed("live", x), repeat, x.ndim)
        votes = [
            choice.softmax(-1) * live[..., r : r + 1] for r, choice in enumerate(logits.split(layout.slots, dim=-1))
        ]
        return static + torch.cat(votes, dim=-1) @ plan.placed("scatter", x)

    def _delta(self, x: torch.Tensor, adapter: str, plan: AdapterPlan, repeat: int) -> torch.Tensor:
        """B (w * A x), `(..., d_out)`."""
        x = self._cast_input_dtype(x, self.hoe_A[adapter].weight.dtype)
        votes = self._votes(x, adapter, plan, repeat)
        if ACTIVE.recorder is not None and not torch.compiler.is_compiling():
            ACTIVE.recorder[self.module_name] = votes.detach()
        if self._calls_modules(adapter):
            return self._delta_by_modules(x, adapter, votes)
        return self._delta_fused(x, adapter, votes, plan.selected)

    def _calls_modules(self, adapter: str) -> bool:
        """Whether A and B must be called as modules: training, compilation, and weights that hooks or wrappers fetch."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return True
        return any(
            type(part) is not nn.Linear
            or bool(part._forward_hooks or part._forward_pre_hooks)
            or hasattr(part, "_hf_hook")
            or type(part.weight) not in (nn.Parameter, torch.Tensor)
            or hasattr(part.weight, "ds_id")
            for part in (self.hoe_A[adapter], self.hoe_B[adapter])
        )

    def _delta_by_modules(self, x: torch.Tensor, adapter: str, votes: torch.Tensor) -> torch.Tensor:
        inner = self.hoe_A[adapter](x)
        expanded = _over_ranks(votes, self.hoe_layouts[adapter].ranks).to(inner.dtype)
        delta: torch.Tensor = self.hoe_B[adapter](inner * expanded)
        return delta

    def _delta_fused(
        self, x: torch.Tensor, adapter: str, votes: torch.Tensor, selected: tuple[int, ...]
    ) -> torch.Tensor:
        """The same over the selected experts only: two products on the rows of A and the columns of B that matter."""
        ranks = self.hoe_layouts[adapter].ranks
        weight_a, weight_b = self.hoe_A[adapter].weight, self.hoe_B[adapter].weight
        if len(selected) < len(ranks):
            starts = [sum(ranks[:j]) for j in range(len(ranks) + 1)]
            spans = [slice(starts[j], starts[j + 1]) for j in selected]
            if spans[-1].stop - spans[0].start == sum(ranks[j] for j in selected):  # neighbours: no copy
                span = slice(spans[0].start, spans[-1].stop)
                weight_a, weight_b = weight_a[span], weight_b[:, span]
            else:
                weight_a = torch.cat([weight_a[span] for span in spans])
                weight_b = torch.cat([weight_b[:, span] for span in spans], dim=1)
            votes = torch.stack([votes[..., j] for j in selected], dim=-1)
            ranks = tuple(ranks[j] for j in selected)
        inner = F.linear(x, weight_a)
        return F.linear(inner * _over_ranks(votes, ranks).to(inner.dtype), weight_b)

    def _repeat(self, x: torch.Tensor, plan: Plan, frame: Frame | None) -> int:
        """How often each row of the plan stands in x: 1, what generate expands by, or also the length for flat inputs.

        Raises:
            PreferenceError: the rows of x are no such multiple, so they are not samples in order.
        """
        if plan.rows is None:
            return 1
        expansions = {1, frame.expansion if frame is not None else 1}
        lengths = frame.lengths if frame is not None and x.ndim == 2 else frozenset()
        allowed = expansions | {length * expansion for length in lengths for expansion in expansions}
        rows, rest = divmod(x.shape[0], plan.rows)
        if rest or rows not in allowed:
            raise PreferenceError(
                f"{self.module_name} was given an input of shape {tuple(x.shape)}, whose rows are not the {plan.rows} rows "
                "that preferences were given for (dispatched experts, packed batches and patches are not); use one "
                "preference for the whole batch, or exclude this module"
            )
        return rows

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True where no router that was trained votes at the current preference."""
        try:
            self.hoe_steering.merge_weights(adapter_name)
        except ValueError:
            return False
        return True


class HoELinear(nn.Module, HoELayer):
    """HoE around nn.Linear, transformers' Conv1D, or another linear module that is used through its own forward."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: HoEConfig, name: str, steering: Steering
    ) -> None:
        super().__init__()
        self._init_hoe(base_layer, name, steering)
        self.in_features, self.out_features = features(self.get_base_layer(), name)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        if config.fan_in_fan_out and isinstance(self.get_base_layer(), nn.Linear):
            warnings.warn(f"{name} is an nn.Linear, which stores (out, in); fan_in_fan_out is ignored", stacklevel=2)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """base(x) plus the deltas of the active adapters, `(..., d_out)` in the base's dtype."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            result: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return result
        plan, frame = self._plan()
        if self.merged:
            self._check_merged(plan)
            result = self.base_layer(x, *args, **kwargs)
            return result
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        repeat = self._repeat(x, plan, frame)
        for adapter in self.active_adapters:
            if adapter in self.hoe_A and adapter in plan.adapters:
                result = result + self._delta(x, adapter, plan.adapters[adapter], repeat)
        return result.to(dtype)

    # -- merging -----------------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str, votes: torch.Tensor | None = None) -> torch.Tensor:
        """Sum of w_j B_j A_j at the current preference, in the base weight's orientation, float32 or better.

        Raises:
            StaticMergeError: the votes depend on the input, or the rows differ.
        """
        votes = self.hoe_steering.merge_weights(adapter) if votes is None else votes
        weight_a, weight_b = self.hoe_A[adapter].weight, self.hoe_B[adapter].weight
        dtype = torch.promote_types(weight_b.dtype, torch.float32)
        expanded = _over_ranks(votes.to(dtype).to(weight_b.device), self.hoe_layouts[adapter].ranks)
        delta = (weight_b.to(dtype) * expanded) @ weight_a.to(dtype)
        return delta.T if self.fan_in_fan_out else delta

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
            votes = self.hoe_steering.merge_weights(adapter)
            merged = self._shifted_weight(self.get_delta_weight(adapter, votes))
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
            self.get_base_layer().weight.data = merged
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
                self.get_base_layer().weight.data = self._shifted_weight(-delta)

    def _shifted_weight(self, delta: torch.Tensor) -> torch.Tensor:
        weight = self.get_base_layer().weight.data
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shifted: torch.Tensor = (weight.to(dtype) + delta.to(weight.device, dtype)).to(weight.dtype)
        return shifted

    def check_mergeable(self, adapter: str) -> None:
        """Raise what `merge` would raise, before anything is changed."""
        self.hoe_steering.merge_weights(adapter)
        weight = self.get_base_layer().weight
        shape = (self.in_features, self.out_features) if self.fan_in_fan_out else (self.out_features, self.in_features)
        if type(weight) not in (nn.Parameter, torch.Tensor) or not weight.dtype.is_floating_point:
            reason = f"its weight is a quantised {type(weight).__name__} of {weight.dtype}"
        elif weight.dtype.itemsize < 2 or tuple(weight.shape) != shape:
            reason = f"its weight is stored as {tuple(weight.shape)} {weight.dtype}"
        else:
            return
        raise StaticMergeError(
            f"{self.module_name} cannot be merged: {reason}, and adding to a quantised weight would lose or change the "
            "adapter. Keep it unmerged, or load the base without quantisation"
        )

    def _check_merged(self, plan: Plan) -> None:
        for adapter, (preference, _) in self._merged.items():
            wanted = plan.adapters.get(adapter)
            if wanted is not None and not bool((wanted.preferences == preference).all()):
                raise PreferenceError(
                    f"adapter {adapter!r} is merged at {preference.tolist()}, but {wanted.preferences.tolist()} is asked for; "
                    "call unmerge_adapter() first, or merge_and_unload() for a model of its own"
                )

    def __repr__(self) -> str:
        return "hoe." + super().__repr__()


def features(base: nn.Module, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a linear module.

    Raises:
        TypeError: the module is not linear, or its weight is read past its forward; names it.
    """
    if isinstance(base, Conv1D):
        return int(base.weight.shape[0]), int(base.weight.shape[1])
    if type(base).__name__ == "NonDynamicallyQuantizableLinear":
        raise TypeError(
            f"Target module {name} is the output projection of an nn.MultiheadAttention, which reads its weight past the "
            "module's forward, so an adapter there would do nothing; exclude it with exclude_modules"
        )
    linear = isinstance(base, nn.Linear) or "Linear" in type(base).__name__
    if linear and isinstance(getattr(base, "in_features", None), int) and hasattr(base, "out_features"):
        return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
    raise TypeError(
        f"Target module {name} is a {type(base).__name__}, which is not supported. HoE adapts torch.nn.Linear, transformers' "
        "Conv1D and linear modules with in_features and out_features; change target_modules or exclude_modules"
    )


def _per_row(weights: torch.Tensor, repeat: int, ndim: int) -> torch.Tensor:
    """`(rows, K)` as `(K,)` where all rows share it, else `(rows * repeat, 1, ..., K)` to go with an input of `ndim`."""
    if weights.shape[0] == 1 and repeat == 1:
        return weights[0]
    weights = weights.repeat_interleave(repeat, dim=0)
    return weights.reshape(weights.shape[0], *([1] * (ndim - 2)), weights.shape[1])


def _over_ranks(votes: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """`(..., L)` to `(..., r)`: each expert's vote once per rank."""
    if len(set(ranks)) == 1:
        return votes.repeat_interleave(ranks[0], dim=-1)
    return torch.cat([votes[..., j : j + 1].expand(*votes.shape[:-1], rank) for j, rank in enumerate(ranks)], dim=-1)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
