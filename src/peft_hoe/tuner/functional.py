"""Steering for any model that carries HoE layers, also without a tuner object.

`peft.inject_adapter_in_model` and transformers' `load_adapter` leave a plain model behind; these functions are what a
`HoEModel` offers as methods.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from ..errors import ExpertError
from ..routing import Route
from .frames import ACTIVE
from .steering import Steering


def get_preference(model: nn.Module) -> Mapping[str, float]:
    """`HoEModel.preference` for any model that carries HoE layers."""
    steering = Steering.of(model)
    objectives = steering.adapters[steering.active_adapter()].objectives
    return MappingProxyType(dict(zip(objectives, steering.current(None).tolist(), strict=True)))


def set_preference(model: nn.Module, preference: Any) -> None:
    """`HoEModel.set_preference` for any model that carries HoE layers."""
    Steering.of(model).set_preference(preference)


def use_preference(model: nn.Module, preference: Any) -> contextlib.AbstractContextManager[None]:
    """`HoEModel.use_preference` for any model that carries HoE layers."""
    return Steering.of(model).use_preference(preference)


def route(model: nn.Module, preference: Any = None, adapter_name: str | None = None) -> Route:
    """`HoEModel.route` for any model that carries HoE layers."""
    return Steering.of(model).route(preference, adapter_name)


def mark_trained(
    model: nn.Module,
    routers: str | list[str] | None = None,
    *,
    trained: bool = True,
    adapter_name: str | None = None,
) -> None:
    """`HoEModel.mark_trained` for any model that carries HoE layers."""
    steering = Steering.of(model)
    name = steering.active_adapter() if adapter_name is None else adapter_name
    routing = steering.adapters[name]
    known = routing.config.router_names
    wanted = known if routers is None else [routers] if isinstance(routers, str) else list(routers)
    unknown = [router for router in wanted if router not in known]
    if unknown:
        raise ExpertError(f"adapter {name!r} has no router {unknown}; its routers are {known}")
    for spec in routing.config.routers or []:
        if spec.name in wanted:
            spec.trained = trained
    routing.refresh()
    steering.refresh()


@contextlib.contextmanager
def record_votes(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Collect how the experts were weighed, per module and token, in the forwards of this thread.

    Yields:
        `{module name: votes}` of the last forward: `(L,)` where all tokens share them, else broadcastable to `(..., L)`.
    """
    Steering.of(model)
    previous, ACTIVE.recorder = ACTIVE.recorder, {}
    try:
        yield ACTIVE.recorder
    finally:
        ACTIVE.recorder = previous
