"""The calls under way in a thread: what each is steered by, how its rows repeat, and what a forward must use that is replayed.

Between the entry of a call and the layers there is no await and no change of thread, so the plan travels in a
`threading.local`, which torch.compile can trace (it cannot trace a context variable).

A forward's plan is its backward's. Gradient checkpointing runs layers again during the backward pass, perhaps after the
preference has changed, and on CUDA in another thread. Every call therefore leaves a hook on the tensors that its forward
returned: the hook keeps the call alive as long as the autograd graph, and tells which backward pass has reached it, before
that pass replays any layer. `ForwardMemory` finds the call of a replay by that.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .plan import Plan


@dataclass(frozen=True)
class Media:
    """Pictures and sounds beside the text of a call.

    Attributes:
        even: whether each row has as many.
        text: name of the part of the model that reads text; None where that is the whole model, or unknown.
    """

    even: bool
    text: str | None


class Call:
    """One forward or generate under way in this thread.

    Attributes:
        steering: whose layers it is for; known by its identity alone.
        plan: in effect for all of them; None while it is being made.
        hidden: the call that it hides, restored when it ends.
        expansions: how often generate may repeat each row (beams, num_return_sequences); 1 is always among them.
        lengths: sequence lengths of the current forward; a layer that is given (batch x length, d) is told by them.
        media: the pictures and sounds that come beside the text, None without any.
        heights: rows of each module's input so far; within a generate they do not shrink, or rows would have been dropped.
        grad: whether a backward pass may come. Inside reentrant checkpointing gradients are off, so it is noted at the entry.
        backward: the autograd pass that has reached what this forward returned.
    """

    def __init__(
        self, steering: object, plan: Plan | None = None, hidden: Call | None = None, *, grad: bool = False
    ) -> None:
        self.steering = steering
        self.plan = plan
        self.hidden = hidden
        self.expansions: frozenset[int] = frozenset({1})
        self.lengths: frozenset[int] = frozenset()
        self.media: Media | None = None
        self.heights: dict[str, int] = {}
        self.grad = grad
        self.backward = -1

    def replayed(self) -> Call:
        """What the layers of a forward that runs again need of this call, which does not keep it."""
        return Call(self.steering, self.plan).joined(self)

    def joined(self, other: Call) -> Call:
        """This call, with what another of the same plan allows: either may be the one that is replayed."""
        self.expansions |= other.expansions
        self.lengths |= other.lengths
        if self.media is None or (other.media is not None and not other.media.even):
            self.media = other.media
        return self

    def tie_to(self, tensors: Iterable[torch.Tensor]) -> None:
        """Keep this call as long as the autograd graph of the tensors."""
        for tensor in tensors:
            tensor.register_hook(self._reached)

    def _reached(self, gradient: torch.Tensor) -> None:
        self.backward = torch._C._current_graph_task_id()


class _ThisThread(threading.local):
    """What this thread is doing.

    Attributes:
        forward: the root's forward under way.
        generating: of the generate under way, in which forwards follow one another.
        recorder: (steering, adapter, votes by module) while votes are recorded.
    """

    def __init__(self) -> None:
        self.forward: Call | None = None
        self.generating: Call | None = None
        self.recorder: tuple[object, str, dict[str, torch.Tensor]] | None = None

    def call_of(self, steering: object) -> Call | None:
        """The call that the layers of `steering` go by."""
        for call in (self.forward, self.generating):
            if call is not None and call.steering is steering and call.plan is not None:
                return call
        return None


THIS_THREAD = _ThisThread()


class ForwardMemory:
    """The forwards of one layer whose backward may still come."""

    def __init__(self) -> None:
        self._calls: list[weakref.ref[Call]] = []
        self._last: Call | None = None

    def __reduce__(self) -> tuple[type[ForwardMemory], tuple[()]]:
        return ForwardMemory, ()  # a copy or a pickled model awaits no backward

    def remember(self, call: Call) -> None:
        """Called by each forward that is not a replay."""
        self._last = call.replayed()
        self._calls = [reference for reference in self._calls if reference() is not None]
        self._calls.append(weakref.ref(call))

    def replay(self, module: str) -> Call | None:
        """The call of a forward that runs again during the backward pass; None where no forward is known.

        Raises:
            RuntimeError: it could be one of several forwards with different preferences.
        """
        alive = [call for call in (reference() for reference in self._calls) if call is not None]
        now = torch._C._current_graph_task_id()
        candidates = [call for call in alive if call.backward == now] or alive
        by_plan: dict[Any, Call] = {}
        for call in candidates:
            if call.plan is not None:
                key = call.plan.key
                by_plan[key] = by_plan[key].joined(call) if key in by_plan else call.replayed()
        if len(by_plan) > 1:
            raise RuntimeError(
                f"gradient checkpointing runs {module} again, but forwards with {len(by_plan)} different preferences await "
                "this backward pass; call backward() after each forward, or pass one preference per row in one forward"
            )
        return next(iter(by_plan.values()), self._last)


def tensors_with_graph(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of a model's output that a backward pass can start from."""
    if isinstance(output, torch.Tensor):
        if output.requires_grad:
            yield output
        return
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for item in items:
        yield from tensors_with_graph(item)
