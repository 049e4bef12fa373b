"""Where a preference enters: the root model's forward, and generate.

The root is watched by hooks, because it is the one thing that PeftModel, transformers' `load_adapter` and
`inject_adapter_in_model` have in common. Hooks are not a `finally`: torch skips them on KeyboardInterrupt, and a compiled
forward skips them on any error. So a forward that enters ignores what an earlier one of the same model left behind.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import PreferenceError
from .cache_owner import cache_name, check_cache, given_cache, mark_cache, returned_cache
from .calls import THIS_THREAD, Call, Media, tensors_with_graph
from .generate import SteeredGenerate
from .plan import Plan
from .rows import extent, media_of

_BROUGHT = {"preference", "routers"}  # what a call may bring that the base model's forward does not know


class Plans(Protocol):
    """What the hooks ask of the model's `Steering`."""

    blocks_open: int

    def plan_for(self, value: Any = None, routers: str | None = None) -> Plan:
        """The plan of a call that brings a preference, or says what routers do, or neither."""


class RootHooks:
    """The hooks on one root model."""

    def __init__(self, steering: Plans) -> None:
        self.steering = steering
        self._handles: list[Any] = []
        self._check: Callable[[nn.Module], None] | None = None
        self._batching: Plan | None = None
        self._one_batch = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Without what cannot be copied."""
        return {name: item for name, item in self.__dict__.items() if name != "_one_batch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has a lock of its own."""
        self.__dict__.update(state)
        self._one_batch = threading.RLock()

    def attach(self, root: nn.Module, check_loading: Callable[..., None], check: Callable[[nn.Module], None]) -> None:
        """Watch a root model's forward and loading, and give it a `generate` that takes a preference, if it has one.

        Args:
            root: the model that is called.
            check_loading: a hook that sees every state dict before it is loaded.
            check: sees the root before its next forward, once, however its weights were loaded.
        """
        self._check = check
        if not self._handles:
            self._handles = [
                root.register_forward_pre_hook(self._before, with_kwargs=True),
                root.register_forward_hook(self._after, always_call=True),
                root.register_load_state_dict_pre_hook(check_loading),
            ]
            if hasattr(type(root), "generate"):
                generate: Any = SteeredGenerate(root, self)
                root.generate = generate

    def detach(self, root: nn.Module) -> None:
        """Leave the root model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        generate = vars(root).get("generate")
        if isinstance(generate, SteeredGenerate):
            generate.restore()

    @contextlib.contextmanager
    def generating(
        self,
        root: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        preference: Any,
        routers: str | None,
        expansions: Iterable[int],
    ) -> Iterator[None]:
        """One plan for all the forwards of the root's generate, which may repeat each row `expansions` times."""
        call = Call(self.steering, self.steering.plan_for(preference, routers))
        call.expansions |= set(expansions)
        batch, _ = extent(args, kwargs)
        _check_height(call, batch)
        call.media = _media(call, root, args, kwargs)
        outer, THIS_THREAD.generating = THIS_THREAD.generating, call
        try:
            yield
        finally:
            THIS_THREAD.generating = outer

    @contextlib.contextmanager
    def batching(self, preference: Any, routers: str | None) -> Iterator[None]:
        """One plan for transformers' continuous batching, which runs forwards in a thread of its own; one batch at a time.

        Raises:
            PreferenceError: rows have different preferences; there, requests share forwards, and prompts share caches.
        """
        plan = self.steering.plan_for(preference, routers)
        if plan.rows is not None:
            raise PreferenceError(
                "generate_batch runs several requests in one row, so they cannot have a preference each; call it once for each "
                "preference, or use generate",
                argument="preference",
                value=preference,
                allowed="one preference",
            )
        with self._one_batch:
            outer, self._batching = self._batching, plan
            try:
                yield
            finally:
                self._batching = outer

    def _plan_of_batch(self) -> Plan:
        """The plan of a forward of continuous batching, whichever thread it runs in."""
        if self._batching is None and self.steering.blocks_open:
            raise PreferenceError(
                "continuous batching runs in a thread of its own, which does not see use_preference blocks; call "
                "generate_batch of the PeftModel, or set_preference before",
                argument="preference",
            )
        return self.steering.plan_for() if self._batching is None else self._batching

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if (
            torch.compiler.is_compiling()
            and not _BROUGHT & kwargs.keys()
            and THIS_THREAD.forward is None
            and not self.steering.blocks_open
        ):
            return None  # the defaults are ready; layers find them without a call
        return self._enter(root, args, kwargs)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _enter(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        around = THIS_THREAD.forward
        hidden = None if around is None or around.steering is self.steering else around
        # In place before anything can fail: _after is called on an error too, and takes it away again.
        call = THIS_THREAD.forward = Call(self.steering, hidden=hidden, grad=torch.is_grad_enabled())
        if self._check is not None:
            self._check(root)
            self._check = None
        preference, routers = kwargs.get("preference"), kwargs.get("routers")
        batch, call.lengths = extent(args, kwargs)
        generating = THIS_THREAD.generating
        if preference is None and routers is None and generating is not None and generating.steering is self.steering:
            call.plan, call.expansions, call.heights = generating.plan, generating.expansions, generating.heights
        elif preference is None and routers is None and type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
            call.plan = self._plan_of_batch()
        else:
            call.plan = self.steering.plan_for(preference, routers)
            _check_height(call, batch)
        cache = given_cache(kwargs)
        if cache is not None and call.plan is not None:
            check_cache(cache_name(kwargs), cache, call.plan)
        call.media = _media(call, root, args, kwargs)
        return args, {name: item for name, item in kwargs.items() if name not in _BROUGHT}

    def _after(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() and THIS_THREAD.forward is None:
            return
        self._leave(output)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _leave(self, output: Any) -> None:
        call = THIS_THREAD.forward
        if call is None or call.steering is not self.steering:
            return
        THIS_THREAD.forward = call.hidden
        if (cache := returned_cache(output)) is not None and call.plan is not None:
            mark_cache(cache, call.plan)
        if call.grad:
            call.tie_to(tensors_with_graph(output))


def _media(call: Call, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Media | None:
    rows = call.plan.rows if call.plan is not None else None
    return media_of(root, args, kwargs) if rows is not None and rows > 1 else None


def _check_height(call: Call, batch: int | None) -> None:
    rows = call.plan.rows if call.plan is not None else None
    if rows is not None and batch is not None and rows != batch:
        raise PreferenceError(
            f"preference has {rows} rows, but the batch has {batch}; give one preference per row of the batch, or a "
            "single one for all",
            argument="preference",
            value=rows,
            allowed=batch,
        )
