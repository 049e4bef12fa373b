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

from ..errors import ExpertError, PreferenceError
from ..routing import Route
from .adapter import Adapter
from .calls import THIS_THREAD
from .layer import HoELayer
from .steering import Steering


def adapter_of(model: nn.Module, adapter_name: str | None = None) -> Adapter:
    """What an adapter serves, and where preferences lead in it, read-only.

    Args:
        model: any model that carries HoE layers.
        adapter_name: default the first active adapter.

    Raises:
        PreferenceError: there is no such adapter.
    """
    steering = Steering.of(model)
    return steering.adapters[steering.adapter_named(adapter_name)]


def check_in_effect(model: nn.Module, adapter_name: str | None = None, *, unmerged: bool = False) -> None:
    """See that a preference changes what a model does.

    Args:
        model: any model that carries HoE layers.
        adapter_name: default the first active adapter.
        unmerged: whether the adapter must not be merged either; a merged one serves its own preference and refuses others.

    Raises:
        PreferenceError: all of the adapter's layers are disabled, or merged.
    """
    name = adapter_of(model, adapter_name).name
    layers = [layer for layer in model.modules() if isinstance(layer, HoELayer) and name in layer.hoe_layouts]
    problem = None
    if layers and all(layer.disable_adapters for layer in layers):
        problem = "disabled, so that the model is its base at every preference; call enable_adapter_layers() first"
    elif unmerged and any(name in layer.merged_adapters for layer in layers):
        problem = "merged into the base, so that it has one preference; call unmerge_adapter() first"
    if problem is not None:
        raise PreferenceError(f"adapter {name!r} is {problem}", argument="model", value=name)


def get_preference(model: nn.Module) -> Mapping[str, float]:
    """`HoEModel.preference` for any model that carries HoE layers.

    >>> import peft_hoe
    >>> model = peft_hoe.demo.load_demo_adapter()
    >>> dict(peft_hoe.get_preference(model))
    {'cheerful': 0.5, 'vivid': 0.5}
    """
    steering = Steering.of(model)
    return MappingProxyType(dict(zip(adapter_of(model).objectives, steering.current(None).tolist(), strict=True)))


def set_preference(model: nn.Module, preference: Any, *, calibrated: bool = False) -> None:
    """`HoEModel.set_preference` for any model that carries HoE layers.

    >>> import peft_hoe
    >>> model = peft_hoe.demo.load_demo_adapter()
    >>> peft_hoe.set_preference(model, {"cheerful": 0.75, "vivid": 0.25})
    >>> dict(model.preference)
    {'cheerful': 0.75, 'vivid': 0.25}
    """
    Steering.of(model).set_preference(preference, calibrated=calibrated)


def use_preference(
    model: nn.Module, preference: Any = None, *, routers: str | None = None, calibrated: bool = False
) -> contextlib.AbstractContextManager[None]:
    """`HoEModel.use_preference` for any model that carries HoE layers.

    >>> import peft_hoe
    >>> model = peft_hoe.demo.load_demo_adapter()
    >>> with peft_hoe.use_preference(model, [1, 0]):
    ...     dict(model.preference)
    {'cheerful': 1.0, 'vivid': 0.0}
    """
    return Steering.of(model).use_preference(preference, routers=routers, calibrated=calibrated)


def route(model: nn.Module, preference: Any = None, adapter_name: str | None = None) -> Route:
    """`HoEModel.route` for any model that carries HoE layers.

    >>> import peft_hoe
    >>> experts = peft_hoe.route(peft_hoe.demo.load_demo_adapter(), [0.25, 0.75]).experts
    >>> {name: round(weight, 9) for name, weight in experts.items()}
    {'vivid': 0.5, 'centroid': 0.5}
    """
    return Steering.of(model).route(preference, adapter_name)


def mark_trained(
    model: nn.Module,
    routers: str | list[str] | None = None,
    *,
    trained: bool = True,
    adapter_name: str | None = None,
) -> None:
    """`HoEModel.mark_trained` for any model that carries HoE layers.

    >>> import peft_hoe
    >>> model = peft_hoe.demo.load_demo_adapter(routers=[[0.75, 0.25]])
    >>> peft_hoe.mark_trained(model, "r0")
    >>> model.peft_config["default"].routers[0].trained
    True
    """
    adapter = adapter_of(model, adapter_name)
    known = adapter.router_names
    wanted = known if routers is None else [routers] if isinstance(routers, str) else list(routers)
    unknown = [router for router in wanted if router not in known]
    if unknown:
        raise ExpertError(
            f"adapter {adapter.name!r} has no router {unknown}; its routers are {known}", value=unknown, allowed=known
        )
    for spec in adapter.config.routers or []:
        if spec.name in wanted:
            spec.trained = trained


@contextlib.contextmanager
def record_votes(model: nn.Module, adapter_name: str | None = None) -> Iterator[dict[str, Any]]:
    """Collect how an adapter's experts were weighed, per module and token, in the model's forwards of this thread.

    Args:
        model: any model that carries HoE layers.
        adapter_name: default the first active adapter.

    Yields:
        `{module name: votes}` of the last forward: `(L,)` where all tokens share them, else broadcastable to `(..., L)`.

    >>> import peft_hoe
    >>> model, tokenizer = peft_hoe.demo.load_demo_adapter(), peft_hoe.demo.load_tokenizer()
    >>> with peft_hoe.record_votes(model) as votes:
    ...     _ = model(**tokenizer("Once upon a time", return_tensors="pt"), preference=[0.75, 0.25])
    >>> [round(vote, 3) for vote in votes["model.layers.0.self_attn.q_proj"].flatten().tolist()]  # cheerful, vivid, centroid
    [0.5, 0.0, 0.5]
    """
    steering = Steering.of(model)
    votes: dict[str, Any] = {}
    outer, THIS_THREAD.recorder = THIS_THREAD.recorder, (steering, steering.adapter_named(adapter_name), votes)
    try:
        yield votes
    finally:
        THIS_THREAD.recorder = outer
