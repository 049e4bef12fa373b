"""Steering: how a preference reaches the layers.

One `Steering` per base model, shared by its layers. A preference enters in one of four ways, the first that is there wins:
with the call (`preference=`), from a `use_preference` block, from the adapter's default, or as the uniform preference. It
is turned into a `Plan` once, at the entry: a hook on the root model, or `generate`. Layers read the plan; they never parse
a preference.

Threads and tasks: a block is a context variable, so other threads and tasks do not see it. It is read at the entry only;
from there the plan travels in the thread's `Frame`.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PreferenceError, StaticMergeError
from ..preference import FloatArray, parse_preference, read_preference
from ..routing import Route
from .frames import ACTIVE, Frame, extent, first_with_graph
from .plan import AdapterRouting, Plan

PREFERENCE_VARIABLE = "PEFT_HOE_PREFERENCE"  # set by `peft-hoe run --preference`


@dataclass(frozen=True, eq=False)
class _Block:
    steering: Steering
    value: Any


_BLOCKS: contextvars.ContextVar[tuple[_Block, ...]] = contextvars.ContextVar("peft_hoe_blocks", default=())


class Steering:
    """Owns the preferences of one base model; `Steering.of(model)` finds it."""

    def __init__(self) -> None:
        self.adapters: dict[str, AdapterRouting] = {}
        self.active: tuple[str, ...] = ()
        self.default = Plan({}, None)
        self.blocks_open = 0
        self.drop_routers = False
        self._hooks: list[Any] = []

    @staticmethod
    def of(model: nn.Module) -> Steering:
        """The steering of a model that carries HoE layers, however it came by them.

        Raises:
            PreferenceError: the model has no HoE adapter.
        """
        found = Steering.find(model)
        if found is None:
            raise PreferenceError(
                f"{type(model).__name__} has no HoE adapter; make one with peft.get_peft_model(model, "
                "HoEConfig(...)) or load one with PeftModel.from_pretrained"
            )
        return found

    @staticmethod
    def find(model: nn.Module) -> Steering | None:
        """As `of`, but None where there is no HoE adapter."""
        for module in model.modules():
            steering = getattr(module, "hoe_steering", None)
            if isinstance(steering, Steering):
                return steering
        return None

    # -- adapters and their defaults ---

    def add(self, name: str, routing: AdapterRouting) -> None:
        """Register an adapter, with the process's preference (`peft-hoe run --preference`) as its default if there is one."""
        text = os.environ.get(PREFERENCE_VARIABLE)
        if text:
            routing.default = parse_preference(read_preference(text), routing.objectives)
        self.adapters[name] = routing

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self.adapters.pop(name, None)
        self.refresh()

    def refresh(self) -> None:
        """Plan the defaults anew. Done whenever one changes, so that a compiled forward finds them ready."""
        self.default = Plan({name: routing.plan(routing.default) for name, routing in self.adapters.items()}, None)

    def set_preference(self, value: Any) -> None:
        """Make a preference the default of the active adapters, or of those that `{adapter: preference}` names."""
        for name, preference in self._by_adapter(value, rows=False).items():
            routing = self.adapters[name]
            routing.plan(preference)
            routing.default = preference
            routing.config.default_preference = preference.tolist()
        self.refresh()

    def route(self, value: Any, adapter: str | None) -> Route:
        """The route of a preference, or of the current one, in an adapter (default: the first active one)."""
        routing = self.adapters[self._adapter(adapter)]
        return routing.route(self.current(adapter) if value is None else parse_preference(value, routing.objectives))

    def current(self, adapter: str | None) -> FloatArray:
        """The preference that a call without `preference=` uses here and now, `(N,)`."""
        name = self._adapter(adapter)
        block = self._block()
        if block is not None:
            preference = self._by_adapter(block.value, rows=True).get(name)
            if preference is not None and preference.ndim == 1:
                return preference
            if preference is not None:
                raise PreferenceError("the open use_preference block has one preference per row, not a single one")
        return self.adapters[name].default

    def active_adapter(self) -> str:
        """The first active HoE adapter."""
        return self._active_names()[0]

    def _adapter(self, name: str | None) -> str:
        name = self.active_adapter() if name is None else name
        if name not in self.adapters:
            raise PreferenceError(f"there is no HoE adapter {name!r}; the adapters are {list(self.adapters)}")
        return name

    def _active_names(self) -> list[str]:
        active = [name for name in self.active if name in self.adapters]
        if not active:
            raise PreferenceError(f"no HoE adapter is active; activate one of {list(self.adapters)} with set_adapter")
        return active

    # -- from what a user wrote to a plan ---

    def resolve(self, value: Any) -> Plan:
        """The plan of a preference given with a call or block; adapters that it does not name keep their default."""
        preferences = self._by_adapter(value, rows=True)
        heights = {name: len(p) for name, p in preferences.items() if p.ndim == 2}
        if len(set(heights.values())) > 1:
            raise PreferenceError(f"preferences per row have different numbers of rows: {heights}")
        plans = dict(self.default.adapters)
        for name, preference in preferences.items():
            plans[name] = self.adapters[name].plan(preference)
        return Plan(plans, next(iter(heights.values()), None))

    def ambient(self) -> Plan:
        """The plan where a call brings no preference: the innermost block's, else the defaults'."""
        block = self._block()
        return self.default if block is None else self.resolve(block.value)

    def _by_adapter(self, value: Any, *, rows: bool) -> dict[str, FloatArray]:
        if isinstance(value, Mapping) and value and all(_holds_numbers(item) for item in value.values()):
            unknown = [name for name in value if name not in self.adapters]
            if unknown:
                raise PreferenceError(f"there is no HoE adapter {unknown}; the adapters are {list(self.adapters)}")
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
            raise PreferenceError(f"adapter {adapter!r}: {error}") from None

    def merge_weights(self, adapter: str) -> torch.Tensor:
        """`(L,)` float64: the votes that merging bakes in at the current preference.

        Raises:
            StaticMergeError: a trained router votes here, or the preference differs between rows.
        """
        preference = self.current(adapter)
        plan = self.adapters[adapter].plan(preference, drop_routers=self.drop_routers)
        if plan.live is not None:
            names = self.adapters[adapter].config.router_names
            voting = [names[r] for r in torch.nonzero(plan.live[0]).flatten().tolist()]
            raise StaticMergeError(
                f"adapter {adapter!r} cannot be merged at {preference.tolist()}: the trained routers {voting} choose experts "
                'by the input. Merge with routers="drop" for the static interpolation, or at a preference without them'
            )
        return plan.static[0]

    # -- blocks ---

    def _block(self) -> _Block | None:
        return next((block for block in reversed(_BLOCKS.get()) if block.steering is self), None)

    @contextlib.contextmanager
    def use_preference(self, value: Any) -> Iterator[None]:
        """Use a preference in this thread or task until the block ends."""
        self.resolve(value)  # errors belong to the entry of the block
        block = _Block(self, value)
        _BLOCKS.set((*_BLOCKS.get(), block))
        self.blocks_open += 1
        try:
            yield
        finally:
            self.blocks_open -= 1
            blocks = _BLOCKS.get()
            if blocks and blocks[-1] is block:
                _BLOCKS.set(blocks[:-1])
            else:
                _BLOCKS.set(tuple(other for other in blocks if other is not block))
                raise RuntimeError(
                    "use_preference blocks were left out of order, or in another thread or task than they were entered "
                    "in; leave the inner block first"
                )

    # -- entries ---

    @contextlib.contextmanager
    def entered(self, value: Any, expansion: int, batch: int | None) -> Iterator[None]:
        """Plan for everything inside; `generate` is the one who calls it."""
        frame = Frame(self, self.ambient() if value is None else self.resolve(value), expansion)
        _check_height(frame.plan.rows, batch)
        previous, ACTIVE.frame = ACTIVE.frame, frame
        try:
            yield
        finally:
            ACTIVE.frame = previous

    def attach(self, root: nn.Module) -> None:
        """Watch a root model: its forward is where a preference enters, its load_state_dict is where a bad file does."""
        from .loading import check_state_dict

        if not self._hooks:
            self._hooks = [
                root.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                root.register_forward_hook(self._after_forward, always_call=True),
                root.register_load_state_dict_pre_hook(check_state_dict),
            ]

    def detach(self) -> None:
        """Leave the root model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before_forward(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() and "preference" not in kwargs and not self.blocks_open:
            return None  # the defaults are ready; layers find them without a frame
        return self._enter_forward(args, kwargs)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _enter_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            value = kwargs.get("preference")
            frame = ACTIVE.frame
            batch, lengths = extent(args, kwargs)
            if frame is None or frame.steering is not self or value is not None:
                frame = Frame(self, self.ambient() if value is None else self.resolve(value))
                _check_height(frame.plan.rows, batch)
            frame.lengths = lengths
        except Exception:
            ACTIVE.failed = True  # _after_forward is called all the same, with nothing to leave
            raise
        ACTIVE.entries.append((self, ACTIVE.frame))
        ACTIVE.frame = frame
        return args, {name: item for name, item in kwargs.items() if name != "preference"}

    def _after_forward(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() and not ACTIVE.entries:
            return
        self._leave_forward(output)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _leave_forward(self, output: Any) -> None:
        if ACTIVE.failed:
            ACTIVE.failed = False
            return
        if not ACTIVE.entries or ACTIVE.entries[-1][0] is not self:
            return
        frame = ACTIVE.frame
        ACTIVE.frame = ACTIVE.entries.pop()[1]
        tensor = first_with_graph(output)
        if frame is not None and tensor is not None:
            tensor.register_hook(frame.keep_alive)


def _holds_numbers(item: Any) -> bool:
    """Whether a mapping's value is itself a preference, rather than one weight."""
    return isinstance(item, (Mapping, list, tuple)) or getattr(item, "ndim", 0) > 0


def _check_height(rows: int | None, batch: int | None) -> None:
    if rows is not None and batch is not None and rows != batch:
        raise PreferenceError(
            f"preference has {rows} rows, but the batch has {batch}; give one preference per row of the batch, or a "
            "single one for all"
        )
