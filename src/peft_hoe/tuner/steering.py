"""Steering: from what a user wrote to the plan that layers read.

One `Steering` per base model, shared by its layers. A preference enters in one of four ways, the first that is there wins:

| where | kept as |
|---|---|
| the call (`preference=`) | the `Call` of the forward or generate (`root_hooks.py`) |
| a `use_preference` block | a context variable: other threads and tasks do not see it |
| the adapter's default | its configuration's `default_preference` |
| nothing | the uniform preference |

A call and a block may also say what routers do (`ROUTERS`); nothing else does.

It becomes a `Plan` once, where the call enters. Layers never parse a preference.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import PreferenceError, StaticMergeError, check_choice
from ..preference import FloatArray, parse_preference, read_preference
from ..routing import Route
from .adapter import ROUTERS, Adapter
from .blocks import Block, innermost, opened
from .plan import AdapterPlan, Place, Plan, place_of
from .root_hooks import RootHooks

PREFERENCE_VARIABLE = "PEFT_HOE_PREFERENCE"  # set by `peft-hoe run --preference`


_COUNTING = threading.Lock()


class Steering:
    """Owns the preferences of one base model; `Steering.of(model)` finds it."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.default = Plan({}, None)
        self.places: set[Place] = set()  # where layers lie
        self.blocks_open = 0
        self.hooks = RootHooks(self)

    @staticmethod
    def of(model: nn.Module) -> Steering:
        """The steering of a model that carries HoE layers, however it came by them.

        Raises:
            PreferenceError: the model has no HoE adapter.
        """
        found = Steering.find(model)
        if found is None:
            raise PreferenceError(
                f"{type(model).__name__} has no HoE adapter; build one from policies with peft_hoe.build_adapter and load it "
                "with PeftModel.from_pretrained, or make an empty one with peft.get_peft_model(model, HoEConfig(...))",
                argument="model",
                value=type(model).__name__,
            )
        return found

    @staticmethod
    def find(model: nn.Module) -> Steering | None:
        """As `of`, but None where there is no HoE adapter.

        Raises:
            PreferenceError: the model holds several models that are steered apart, or is no model.
        """
        if not isinstance(model, nn.Module):
            what = f"the name {model!r}" if isinstance(model, str) else repr(model)
            raise PreferenceError(
                f"model is {what}; load it, and its adapter with PeftModel.from_pretrained",
                argument="model",
                value=model,
            )
        found = {id(steering): steering for steering in map(_steering_of, model.modules()) if steering is not None}
        if len(found) > 1:
            raise PreferenceError(
                f"{type(model).__name__} holds {len(found)} models with HoE adapters of their own; pass the one you mean",
                argument="model",
                value=type(model).__name__,
            )
        return next(iter(found.values()), None)

    # -- adapters and their defaults ---

    def add(self, adapter: Adapter) -> None:
        """Register an adapter, with the process's preference (`peft-hoe run --preference`) as its default if there is one."""
        text = os.environ.get(PREFERENCE_VARIABLE)
        if text:
            try:
                adapter.config.default_preference = parse_preference(read_preference(text), adapter.objectives).tolist()
            except PreferenceError as error:
                raise PreferenceError(
                    f"adapter {adapter.name!r} does not take the preference of `peft-hoe run --preference` "
                    f"({PREFERENCE_VARIABLE}={text}): {error}",
                    value=text,
                    allowed=error.allowed,
                ) from None
        adapter.places = self.places
        self.adapters[adapter.name] = adapter
        adapter.follow(self.refresh)

    def lies_at(self, weight: torch.Tensor) -> None:
        """Note where a layer's weights lie, so that a compiled forward finds the defaults there."""
        place = place_of(weight)
        if place not in self.places and weight.device.type != "meta":
            self.places.add(place)
            self.refresh()

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        removed = self.adapters.pop(name, None)
        if removed is not None:
            removed.config.release()
            self.refresh()

    def refresh(self) -> None:
        """Plan the defaults anew. Done whenever one changes, so that a compiled forward finds them ready."""
        self.default = Plan({name: adapter.plan(adapter.default) for name, adapter in self.adapters.items()}, None)

    def set_preference(self, value: Any, *, calibrated: bool = False) -> None:
        """Make a preference the default of the active adapters, or of those that `{adapter: preference}` names."""
        parsed = self.calibrated(value) if calibrated else self._by_adapter(value, rows=False)
        for name, preference in parsed.items():
            self.adapters[name].plan(preference)
        for name, preference in parsed.items():
            self.adapters[name].config.default_preference = preference.tolist()

    def calibrated(self, value: Any) -> dict[str, FloatArray]:
        """The preference of each adapter that a value, read as positions of their calibrated dials, leads to.

        Raises:
            PreferenceError: it is no preference, or an adapter has no calibration that fits.
        """
        read = self._by_adapter(value, rows=True)
        return {name: self.adapters[name].calibrated(position) for name, position in read.items()}

    def route(self, value: Any, adapter: str | None) -> Route:
        """The route of a preference, or of the current one, in an adapter (default: the first active one)."""
        routed = self.adapters[self.adapter_named(adapter)]
        preference = self.current(adapter) if value is None else parse_preference(value, routed.objectives)
        return routed.route(preference, innermost(self).routers)

    def current(self, adapter: str | None) -> FloatArray:
        """The preference that a call without `preference=` uses here and now, `(N,)`."""
        name = self.adapter_named(adapter)
        preference = innermost(self).preferences.get(name, self.adapters[name].default)
        if preference.ndim > 1:
            raise PreferenceError(
                "the open use_preference block has one preference per row, not a single one",
                argument="preference",
                value=preference.tolist(),
                allowed="one preference",
            )
        return preference

    def active_adapter(self) -> str:
        """The first active HoE adapter."""
        return self._active_names()[0]

    def adapter_named(self, name: str | None) -> str:
        """`name`, or the first active adapter for None.

        Raises:
            PreferenceError: there is no such adapter.
        """
        name = self.active_adapter() if name is None else name
        if name not in self.adapters:
            raise PreferenceError(
                f"there is no HoE adapter {name!r}; the adapters are {list(self.adapters)}",
                argument="adapter_name",
                value=name,
                allowed=list(self.adapters),
            )
        return name

    def _active_names(self) -> list[str]:
        active = [name for name in self.active if name in self.adapters]
        if not active:
            raise PreferenceError(
                f"no HoE adapter is active; activate one of {list(self.adapters)} with set_adapter",
                argument="adapter_name",
                value=list(self.active),
                allowed=list(self.adapters),
            )
        return active

    # -- from what a user wrote to a plan ---

    def plan_for(self, value: Any = None, routers: str | None = None) -> Plan:
        """The plan of a call that brings a preference, or says what routers do (`ROUTERS`), or neither.

        What it does not bring, also for an adapter that it does not name, is as in the block around it, or else the default.
        """
        wanted = self._within_block(value, routers)
        if not wanted.preferences and wanted.routers == "keep":
            return self.default
        heights = {name: len(p) for name, p in wanted.preferences.items() if p.ndim == 2}
        if len(set(heights.values())) > 1:
            raise PreferenceError(f"preferences per row have different numbers of rows: {heights}", value=value)
        plans = {
            name: adapter.plan(wanted.preferences.get(name, adapter.default), wanted.routers)
            for name, adapter in self.adapters.items()
        }
        return Plan(plans, next(iter(heights.values()), None))

    def _by_adapter(self, value: Any, *, rows: bool) -> dict[str, FloatArray]:
        if isinstance(value, Mapping) and value and all(_holds_numbers(item) for item in value.values()):
            unknown = [name for name in value if name not in self.adapters]
            if unknown:
                raise PreferenceError(
                    f"there is no HoE adapter {unknown}; the adapters are {list(self.adapters)}",
                    argument="preference",
                    value=unknown,
                    allowed=list(self.adapters),
                )
            named = dict(value)
        else:
            named = dict.fromkeys(self._active_names(), value)
        return {name: self._parse(name, preference, rows=rows) for name, preference in named.items()}

    def _parse(self, adapter: str, preference: Any, *, rows: bool) -> FloatArray:
        try:
            return parse_preference(preference, self.adapters[adapter].objectives, rows=rows)
        except PreferenceError as error:
            if len(self.adapters) == 1:
                raise
            raise PreferenceError(
                f"adapter {adapter!r}: {error}", argument=error.argument, value=error.value, allowed=error.allowed
            ) from None

    def mergeable_plan(self, adapter: str) -> AdapterPlan:
        """The plan that merging bakes in at the current preference; its votes are those of a module, whatever it reads.

        Raises:
            StaticMergeError: a trained router votes by the input here, or the preference differs between rows.
        """
        preference = self.current(adapter)
        plan = self.adapters[adapter].plan(preference, innermost(self).routers)
        if plan.is_live:
            names = self.adapters[adapter].router_names
            voting = [names[r] for r in torch.nonzero(plan.live[0]).flatten().tolist()]
            raise StaticMergeError(
                f"adapter {adapter!r} cannot be merged at {preference.tolist()}: the trained routers {voting} choose experts "
                'by the input. Merge with routers="drop" for the static interpolation, or at a preference without them',
                value=preference.tolist(),
                routers=voting,
            )
        return plan

    # -- blocks ---

    def _within_block(self, value: Any, routers: str | None) -> Block:
        """The open block, changed by what a call or an inner block brings."""
        outer = innermost(self)
        if routers is not None:
            check_choice("routers", routers, ROUTERS)
        brought = {} if value is None else self._by_adapter(value, rows=True)
        return Block(self, outer.preferences | brought, outer.routers if routers is None else routers)

    @contextlib.contextmanager
    def use_preference(
        self, value: Any = None, *, routers: str | None = None, calibrated: bool = False
    ) -> Iterator[None]:
        """Use a preference, and say what routers do (`ROUTERS`), in this thread or task until the block ends."""
        if value is None and routers is None:
            raise PreferenceError(
                "use_preference was given nothing to use; pass a preference, or routers=", value=value
            )
        block = self._within_block(self.calibrated(value) if calibrated else value, routers)
        with opened(block):
            self.plan_for()  # errors belong to the entry of the block
            with _COUNTING:
                self.blocks_open += 1
            try:
                yield
            finally:
                with _COUNTING:
                    self.blocks_open -= 1


def _steering_of(module: nn.Module) -> Steering | None:
    steering = getattr(module, "hoe_steering", None)
    return steering if isinstance(steering, Steering) else None


def _holds_numbers(item: Any) -> bool:
    """Whether a mapping's value is itself a preference, rather than one weight."""
    return isinstance(item, (Mapping, list, tuple)) or getattr(item, "ndim", 0) > 0
