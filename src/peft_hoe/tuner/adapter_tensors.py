"""What an adapter has in a module: its tensors, their dtypes, and which of them train.

L experts of ranks r_1 ... r_L with sum r; A `(r, d_in)` and B `(d_out, r)` hold the experts one after the other, every scale
folded into B.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import HoEConfig
from ..errors import ExpertError
from .layout import ExpertLayout
from .lengths import ExpertLengths
from .memory_order import columns_together, rows_together
from .step import Steps

# What a configuration may ask for in one module: it may be a stranger's.
MOST_NUMBERS = 2**24
MOST_TIMES = 64  # times the numbers that the module itself has

_NEVER_ROUNDED = ("hoe_router", "hoe_length")


class AdapterTensors(BaseTunerLayer):
    """The tensors of adapters in one module; a subclass says what is computed with them.

    Args:
        base_layer: the module.
        name: its name.
    """

    adapter_layer_names: tuple[str, ...] = ("hoe_A", "hoe_B", "hoe_router", "hoe_length")
    other_param_names: tuple[str, ...] = ()

    votes_statically = False  # whether routers vote here as before their training
    low_rank = True  # whether experts are A and B here

    base_layer: nn.Module
    in_features: int
    out_features: int
    training: bool
    _modules: dict[str, nn.Module | None]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        self.base_layer = base_layer
        self.hoe_A = nn.ModuleDict()
        self.hoe_B = nn.ModuleDict()
        self.hoe_router = nn.ModuleDict()
        self.hoe_length = nn.ModuleDict()
        self.hoe_layouts: dict[str, ExpertLayout] = {}
        self.module_name = name
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._trained_before: dict[tuple[str, str], bool] = {}
        self._steps = Steps()  # what is prepared of the tensors
        whole: Any = self
        whole.register_state_dict_post_hook(rows_together)

    # -- adapters ---

    def update_layer(self, adapter_name: str, config: HoEConfig) -> None:
        """Add an adapter: experts with a zero delta, routers that repeat their static votes."""
        layout = self._layout(config)
        self.check_ranks(config)
        for part in self.adapter_layer_names:
            if adapter_name in getattr(self, part):  # an earlier adapter of this name
                del getattr(self, part)[adapter_name]
        self.hoe_layouts[adapter_name] = layout
        self._steps.clear()
        self._make(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _make(self, adapter: str, config: HoEConfig) -> None:
        """Make the tensors of an adapter, whose layout is there."""
        layout = self.hoe_layouts[adapter]
        rank = sum(layout.ranks)
        self.hoe_A[adapter] = nn.Linear(self.in_features, rank, bias=False)
        self.hoe_B[adapter] = nn.Linear(rank, self.out_features, bias=False)
        if layout.slots:
            self.hoe_router[adapter] = nn.Linear(self.in_features, sum(layout.slots))
        if config.interpolation == "norm":
            self.hoe_length[adapter] = ExpertLengths(len(layout.ranks))
        if config.init_weights:
            self.reset_parameters(adapter, config)
        elif layout.slots:
            router: Any = self.hoe_router[adapter]
            with torch.no_grad():
                router.weight[layout.unread_rows] = 0
        self.measure_lengths(adapter)

    def _layout(self, config: HoEConfig) -> ExpertLayout:
        return ExpertLayout(
            ranks=tuple(config.ranks(self.module_name)),
            slots=() if self.votes_statically else tuple(len(members) for members in config.votes()),
            by_module=() if self.votes_statically else tuple(spec.kind == "module" for spec in config.routers or ()),
            temperature=config.router_temperature,
            train_experts=config.train_experts,
        )

    def check_ranks(self, config: HoEConfig) -> None:
        """Refuse ranks that a module of this size has no use for, before anything of that size is made.

        A delta of d_in x d_out has at most the rank min(d_in, d_out); 32 experts of that rank are still allowed.
        """
        layout = self._layout(config)
        asked = sum(layout.ranks) * (self.in_features + self.out_features)
        most = max(MOST_NUMBERS, MOST_TIMES * self.in_features * self.out_features)
        if asked > most:
            raise ExpertError(
                f"{self.module_name} maps {self.in_features} to {self.out_features} numbers, but its experts have ranks "
                f"{list(layout.ranks[:8])}{'...' if len(layout.ranks) > 8 else ''}, {sum(layout.ranks)} together, which ask "
                f"for {asked} numbers; at most {most} are allowed. Lower r, or the ranks in rank_pattern",
                argument="r",
                value=list(layout.ranks),
                allowed=most,
            )

    def reset_parameters(self, adapter_name: str, config: HoEConfig) -> None:
        """A as in LoRA, B = 0; router weights 0 and biases T log max(c, 1e-3)."""
        weight_a, weight_b = self.factors(adapter_name)
        nn.init.kaiming_uniform_(weight_a, a=math.sqrt(5))
        nn.init.zeros_(weight_b)
        if adapter_name in self.hoe_router:
            router: Any = self.hoe_router[adapter_name]
            nn.init.zeros_(router.weight)
            with torch.no_grad():
                router.bias.copy_(torch.from_numpy(config.initial_router_bias()))

    def take(self, adapter: str, config: HoEConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        """Hold other tensors of an adapter, and go by another configuration.

        Args:
            adapter: its name.
            config: the configuration that the tensors are of.
            tensors: under the names of `adapter_tensors`. What is the same tensor as before stays where it is.
        """
        before = self.adapter_tensors(adapter)
        for part in ("hoe_A", "hoe_B", "hoe_router"):
            group = getattr(self, part)
            weight, bias = (tensors.get(f"{part}.{name}") for name in ("weight", "bias"))
            if weight is before.get(f"{part}.weight"):
                continue
            trains = _trains(group[adapter]) if adapter in group else self._trains_when_new(adapter, config)
            if adapter in group:
                del group[adapter]
            if weight is not None:
                group[adapter] = _linear(weight, bias, trains).train(self.training)
        if "hoe_length.gram" in tensors:
            lengths = ExpertLengths(len(config.ranks(self.module_name)))
            lengths.gram = nn.Parameter(tensors["hoe_length.gram"], requires_grad=False)
            self.hoe_length[adapter] = lengths.train(self.training)
        self.hoe_layouts[adapter] = self._layout(config)
        self._steps.clear()
        if self.low_rank:
            self.lay_out(adapter)

    def forget_steps(self) -> None:
        """What was prepared of the tensors is no longer so: they are others."""
        self._steps.clear()

    def _trains_when_new(self, adapter: str, config: HoEConfig) -> bool:
        """Whether a router linear that an adapter has not had before trains, as one that it was made with would."""
        trains = adapter in self.active_adapters and not config.inference_mode
        if self._disable_adapters:
            self._trained_before["hoe_router", adapter] = trains
        return trains and not self._disable_adapters

    def fresh_factors(self, rank: int, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a new expert whose delta is zero, drawn as in `reset_parameters`."""
        weight_a, weight_b = self.factors(adapter)
        new_a, new_b = weight_a.new_empty(rank, self.in_features), weight_b.new_zeros(self.out_features, rank)
        nn.init.kaiming_uniform_(new_a, a=math.sqrt(5))
        return new_a, new_b

    def adapter_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """An adapter's tensors by the names that they are saved under, such as "hoe_A.weight"."""
        found: dict[str, torch.Tensor] = {}
        for part in self.adapter_layer_names:
            group = getattr(self, part)
            if adapter in group:
                tensors = (*group[adapter].named_parameters(), *group[adapter].named_buffers())
                found |= {f"{part}.{name}": tensor for name, tensor in tensors}
        return found

    def measure_lengths(self, adapter: str) -> None:
        """Take what `interpolation="norm"` needs from the experts' weights; only for those who change these by hand."""
        if adapter in self.hoe_length:
            lengths: Any = self.hoe_length[adapter]
            lengths.measure(*self.factors(adapter), self.hoe_layouts[adapter].ranks)

    def factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A `(r, d_in)` and B `(d_out, r)` of an adapter."""
        part_a: Any = self.hoe_A[adapter]
        part_b: Any = self.hoe_B[adapter]
        return part_a.weight, part_b.weight

    def tensors(self) -> Iterator[tuple[str, str, torch.Size]]:
        """(adapter, key below this layer, shape) of every adapter tensor."""
        for part in self.adapter_layer_names:
            for adapter, linear in getattr(self, part).items():
                for name, tensor in (*linear.named_parameters(), *linear.named_buffers()):
                    yield adapter, f"{part}.{adapter}.{name}", tensor.shape

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer."""
        super().delete_adapter(adapter_name)
        self._steps.clear()
        self.hoe_layouts.pop(adapter_name, None)

    # -- dtypes ---

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's, which takes the base's dtype too; but routers and lengths are small, and are not rounded to 16 bits."""
        groups = {part: getattr(self, part) for part in _NEVER_ROUNDED if part in self.adapter_layer_names}
        exact = {part: group.pop(adapter_name) for part, group in groups.items() if adapter_name in group}
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        like = next(iter(self.adapter_tensors(adapter_name).values()), None)
        for part, module in exact.items() if like is not None else ():
            wide = torch.promote_types(like.dtype, torch.float32)  # type: ignore[union-attr]
            groups[part][adapter_name] = module if like.is_meta else module.to(like.device, wide)  # type: ignore[union-attr]

    def settle_dtypes(self, adapter: str) -> None:
        """Give weights that have been loaded the dtypes that they compute in: routers and lengths at least float32.

        Experts that do not train need no more than the base has, so on a 16-bit base they take its dtype.
        """
        own = next(iter(self.get_base_layer().parameters()), None)
        narrow = own is not None and own.is_floating_point() and own.dtype.itemsize == 2
        for part in self.adapter_layer_names:
            group = getattr(self, part)
            for tensor in group[adapter].parameters() if adapter in group else ():
                if part in _NEVER_ROUNDED:
                    dtype = torch.promote_types(tensor.dtype, torch.float32)
                elif narrow and not self.hoe_layouts[adapter].train_experts:
                    dtype = own.dtype  # type: ignore[union-attr]
                else:
                    continue
                if tensor.dtype != dtype and type(tensor) is nn.Parameter:
                    tensor.data = tensor.data.to(dtype)
        self.lay_out(adapter)

    def lay_out(self, adapter: str) -> None:
        """Lay B in memory as decoding reads it, see `memory_order`; for those who put other weights there."""
        columns_together(self.hoe_B[adapter])

    # -- what trains ---

    def set_adapter(self, adapter_names: str | list[str], *args: Any, **kwargs: Any) -> None:
        """Activate adapters. Experts stay frozen unless the adapter was made with `train_experts=True`."""
        super().set_adapter(adapter_names, *args, **kwargs)
        self._freeze_experts()

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """As PEFT's, but experts stay frozen unless the adapter was made with `train_experts=True`."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze_experts()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off; what trained before trains afterwards, and nothing else does."""
        parts = [(part, name) for part in self.adapter_layer_names for name in getattr(self, part)]
        if not self._disable_adapters:
            self._trained_before = {(part, name): _trains(getattr(self, part)[name]) for part, name in parts}
        super().enable_adapters(enabled)
        if enabled:
            for part, name in parts:
                if (part, name) in self._trained_before:
                    getattr(self, part)[name].requires_grad_(self._trained_before[part, name])
            self._trained_before = {}

    def _freeze_experts(self) -> None:
        self.hoe_length.requires_grad_(False)
        for name, layout in self.hoe_layouts.items():
            for part in () if layout.train_experts else self.adapter_layer_names:
                if part != "hoe_router" and name in getattr(self, part):
                    getattr(self, part)[name].requires_grad_(False)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, trains: bool) -> nn.Linear:
    """A linear module around tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=trains)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=trains)
    return linear


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
