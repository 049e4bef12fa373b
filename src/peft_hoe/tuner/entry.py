"""Where a preference enters: the root model's forward, and generate.

The root is watched by hooks, because it is the one thing that PeftModel, transformers' `load_adapter` and
`inject_adapter_in_model` have in common. Hooks are not a `finally`: torch skips them on KeyboardInterrupt, and a compiled
forward skips them on any error. So a forward that enters ignores what an earlier one of the same model left behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import PreferenceError
from .frames import ACTIVE, Frame, tensors_with_graph
from .plan import Plan

_BROUGHT = {"preference", "routers"}  # what a call may bring that the base model's forward does not know


class Plans(Protocol):
    """What an entry asks of the model's `Steering`."""

    blocks_open: int

    def plan_for(self, value: Any = None, routers: str | None = None) -> Plan:
        """The plan of a call that brings a preference, or says what routers do, or neither."""

    def publish(self) -> None:
        """Write defaults and marks into the configurations."""


class Entry:
    """The hooks on one root model."""

    def __init__(self, steering: Plans) -> None:
        self.steering = steering
        self._hooks: list[Any] = []
        self._check: Callable[[nn.Module], None] | None = None

    def attach(self, root: nn.Module, check_loading: Callable[..., None], check: Callable[[nn.Module], None]) -> None:
        """Watch a root model's forward, loading and saving.

        Args:
            root: the model that is called.
            check_loading: a hook that sees every state dict before it is loaded.
            check: sees the root before its next forward, once, however its weights were loaded.
        """
        self._check = check
        if not self._hooks:
            self._hooks = [
                root.register_forward_pre_hook(self._before, with_kwargs=True),
                root.register_forward_hook(self._after, always_call=True),
                root.register_load_state_dict_pre_hook(check_loading),
                root.register_state_dict_pre_hook(self._before_saving),
            ]

    def detach(self) -> None:
        """Leave the root model as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before_saving(self, *unused: Any) -> None:
        # Saving reads the state dict, then the configurations: let them be this model's.
        self.steering.publish()

    @contextlib.contextmanager
    def generating(
        self, preference: Any, routers: str | None, expansions: Iterable[int], batch: int | None
    ) -> Iterator[None]:
        """One plan for all the forwards of a generate, which may repeat each row `expansions` times."""
        frame = Frame(self.steering, self.steering.plan_for(preference, routers))
        frame.expansions |= set(expansions)
        _check_height(frame, batch)
        outer, ACTIVE.generating = ACTIVE.generating, frame
        try:
            yield
        finally:
            ACTIVE.generating = outer

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (
            torch.compiler.is_compiling()
            and not _BROUGHT & kwargs.keys()
            and ACTIVE.frame is None
            and not self.steering.blocks_open
        ):
            return None  # the defaults are ready; layers find them without a frame
        return self._enter(root, args, kwargs)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _enter(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = ACTIVE.frame if ACTIVE.frame is None or ACTIVE.frame.steering is not self.steering else None
        # In place before anything can fail: _after is called on an error too, and takes it away again.
        frame = ACTIVE.frame = Frame(self.steering, previous=hidden, grad=torch.is_grad_enabled())
        if self._check is not None:
            self._check(root)
            self._check = None
        preference, routers = kwargs.get("preference"), kwargs.get("routers")
        batch, frame.lengths = extent(args, kwargs)
        outer = ACTIVE.generating
        if preference is None and routers is None and outer is not None and outer.steering is self.steering:
            frame.plan, frame.expansions = outer.plan, outer.expansions
        else:
            frame.plan = self.steering.plan_for(preference, routers)
            _check_height(frame, batch)
        return args, {name: item for name, item in kwargs.items() if name not in _BROUGHT}

    def _after(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() and ACTIVE.frame is None:
            return
        self._leave(output)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _leave(self, output: Any) -> None:
        frame = ACTIVE.frame
        if frame is None or frame.steering is not self.steering:
            return
        ACTIVE.frame = frame.previous
        if frame.grad:
            frame.hang_on(tensors_with_graph(output))


def _check_height(frame: Frame, batch: int | None) -> None:
    rows = frame.plan.rows if frame.plan is not None else None
    if rows is not None and batch is not None and rows != batch:
        raise PreferenceError(
            f"preference has {rows} rows, but the batch has {batch}; give one preference per row of the batch, or a "
            "single one for all",
            argument="preference",
            value=rows,
            allowed=batch,
        )


_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "inputs",
    "pixel_values",
    "labels",
)


def extent(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | None, frozenset[int]]:
    """The batch size (None where no tensor tells) and the sequence lengths of a call."""
    named = [kwargs[name] for name in _INPUTS if name in kwargs]
    tensors = [item for item in (*args, *named) if isinstance(item, torch.Tensor) and item.ndim > 0]
    batch = int(tensors[0].shape[0]) if tensors else None
    return batch, frozenset(int(tensor.shape[1]) for tensor in tensors if tensor.ndim > 1)
