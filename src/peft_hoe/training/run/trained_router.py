"""The one router that trains, as Parameters of its own.

All routers of a module lie in one linear. An optimizer that held that linear would move the other routers' rows too, by
weight decay and by old momentum. So the router's rows are copied into a linear of their own, each HoE layer reads that one
in place of its rows while the router is attached, and `write` copies it back.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import ExpertError, HoEWarning
from ...preference import FloatArray
from ...tuner.adapter import Adapter
from ...tuner.functional import adapter_of
from ...tuner.layer import HoELayer, ModuleBias
from ...tuner.steering import Steering


class TrainedRouter(nn.Module):
    """A router of a HoE adapter: one small linear for each HoE layer, or for a router that votes by module its bias alone.

    Args:
        model: a model that carries HoE layers.
        router: the router's name; None for the only one.
        adapter: the adapter's name; None for the first active one.

    Raises:
        PreferenceError: the model has no HoE adapter.
        ExpertError: there is no such router, or the experts that it votes for hold no weights.
    """

    def __init__(self, model: nn.Module, router: str | None = None, adapter: str | None = None) -> None:
        super().__init__()
        steering = Steering.of(model)
        self.adapter = steering.active_adapter() if adapter is None else adapter
        if self.adapter not in steering.adapters:
            raise ExpertError(
                f"there is no HoE adapter {adapter!r}; the adapters are {list(steering.adapters)}",
                argument="model_adapter_name",
                value=adapter,
                allowed=list(steering.adapters),
            )
        adapted = steering.adapters[self.adapter]
        self.router = _router_name(adapted, router)
        self.index = adapted.router_names.index(self.router)
        members = adapted.votes()[self.index]
        self.kind: str = (adapted.config.routers or [])[self.index].kind
        self.voting_experts = [adapted.expert_names[i] for i in members]
        self.layers: list[HoELayer] = [
            module for module in model.modules() if isinstance(module, HoELayer) and self.adapter in module.hoe_router
        ]
        _check_weights(self.layers, adapted, self.router, members)
        before = sum(len(votes) for votes in adapted.votes()[: self.index])
        self.rows = slice(before, before + len(members))
        self.linears = nn.ModuleList(self._own(layer) for layer in self.layers)

    @property
    def preference(self) -> FloatArray:
        """The point of the simplex that the router serves, `(N,)`."""
        adapted = adapter_of(self.layers[0], self.adapter)  # type: ignore[arg-type]
        row: FloatArray = adapted.router_preferences[self.index]
        return row

    @property
    def voted(self) -> FloatArray:
        """The preferences of the V experts that it votes for, `(V, N)`."""
        config = adapter_of(self.layers[0], self.adapter).config  # type: ignore[arg-type]
        points: FloatArray = config.expert_preferences[config.votes()[self.index]]
        return points

    @property
    def dial(self) -> FloatArray:
        """Its own preference, and halfway from there to each expert that it votes for, `(1 + V, N)`."""
        return np.concatenate([self.preference[None], (self.preference + self.voted) / 2])

    def _own(self, layer: HoELayer) -> nn.Module:
        source: Any = layer.hoe_router[self.adapter]
        weight = source.weight
        # 16-bit Parameters lose Adam's small steps.
        dtype = weight.dtype if weight.dtype.itemsize >= 4 else torch.float32
        if self.kind == "module":
            return ModuleBias(source.bias[self.rows].to(dtype))
        rows = len(self.voting_experts)
        own = nn.Linear(weight.shape[1], rows, device=weight.device, dtype=dtype)
        with torch.no_grad():
            own.weight.copy_(weight[self.rows])
            own.bias.copy_(source.bias[self.rows])
        return own

    @torch.no_grad()
    def read(self) -> None:
        """Take over what the model's router holds."""
        own: Any
        for layer, own in zip(self.layers, self.linears, strict=True):
            source: Any = layer.hoe_router[self.adapter]
            own.bias.copy_(source.bias[self.rows])
            if self.kind == "token":
                own.weight.copy_(source.weight[self.rows])

    @torch.no_grad()
    def write(self, values: dict[str, torch.Tensor] | None = None) -> None:
        """Put the router's weights into their place in the model.

        Args:
            values: other weights for this router, in the keys of `state_dict`, such as an average.
        """
        values = dict(self.state_dict() if values is None else values)
        for i, layer in enumerate(self.layers):
            target: Any = layer.hoe_router[self.adapter]
            if self.kind == "token":
                target.weight[self.rows] = values[f"linears.{i}.weight"].to(target.weight)
            target.bias[self.rows] = values[f"linears.{i}.bias"].to(target.bias)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While the block lasts, layers read the router from here."""
        for layer, own in zip(self.layers, self.linears, strict=True):
            layer.trained_rows[self.adapter] = (self.rows, own)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.trained_rows.pop(self.adapter, None)


def _router_name(adapter: Adapter, router: str | None) -> str:
    known = adapter.router_names
    if not known:
        raise ExpertError(
            f"adapter {adapter.name!r} has no routers; make it with HoEConfig(routers=[...])",
            argument="router",
            value=router,
        )
    if router is None and len(known) > 1:
        raise ExpertError(
            f"adapter {adapter.name!r} has the routers {known}; say which one to train with router=",
            argument="router",
            value=router,
            allowed=known,
        )
    if router is not None and router not in known:
        raise ExpertError(
            f"adapter {adapter.name!r} has no router {router!r}; its routers are {known}",
            argument="router",
            value=router,
            allowed=known,
        )
    return known[0] if router is None else router


def _check_weights(layers: list[HoELayer], adapter: Adapter, router: str, members: list[int]) -> None:
    names = adapter.expert_names
    empty = [names[i] for i in members if not any(holds_weights(layer, adapter.name, i) for layer in layers)]
    if len(empty) == len(members):
        raise ExpertError(
            f"router {router!r} votes for {empty}, which hold no weights (their deltas are zero in every module), so there is "
            "nothing to choose between; build the experts first, for example with peft_hoe.build_adapter",
            argument="router",
            value=router,
        )
    if empty:
        warnings.warn(
            f"router {router!r} votes for {empty}, whose deltas are zero: they are the base model",
            HoEWarning,
            stacklevel=3,
        )


def holds_weights(layer: HoELayer, adapter: str, expert: int) -> bool:
    """Whether an expert's delta in a layer is anything but zero."""
    ranks = layer.hoe_layouts[adapter].ranks
    start = sum(ranks[:expert])
    _, weight_b = layer.factors(adapter)
    return bool(weight_b[:, start : start + ranks[expert]].any())


class RunningMean:
    """Mean of the state dicts added so far, in float32 or wider."""

    def __init__(self) -> None:
        self.count = 0
        self.values: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take one more into the mean."""
        self.count += 1
        for name, value in values.items():
            if name not in self.values:
                self.values[name] = torch.zeros_like(value)
            self.values[name] += (value - self.values[name]) / self.count

    def state_dict(self) -> dict[str, Any]:
        """Count and mean."""
        return {"count": self.count, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any], device: Any) -> None:
        """Continue from `state_dict`."""
        self.count = state["count"]
        self.values = {name: value.to(device) for name, value in state["values"].items()}
