"""What a forward under way knows: its plan, how rows repeat, and which plan a replayed forward must use.

Between the entry of a call and the layers there is no await and no change of thread, so the plan travels in a
`threading.local`, which torch.compile can trace (it cannot trace a context variable).

A forward's plan is its backward's: gradient checkpointing runs layers again during the backward pass, perhaps after the
preference has changed, and on CUDA in another thread. `ForwardMemory` gives such a replay the plan of its forward.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .plan import Plan

if TYPE_CHECKING:
    from .steering import Steering


class Frame:
    """One forward or generate under way in this thread.

    Attributes:
        plan: in effect for all layers of `steering`.
        expansion: how often generate repeats each row (beams, num_return_sequences).
        lengths: sequence lengths of the current forward; a layer that is given (batch x length, d) is told by them.
        grad: whether gradients were on at the entry. Inside reentrant checkpointing they are off.
    """

    def __init__(self, steering: Steering, plan: Plan, expansion: int = 1) -> None:
        self.steering = steering
        self.plan = plan
        self.expansion = expansion
        self.lengths: frozenset[int] = frozenset()
        self.grad = torch.is_grad_enabled()

    def keep_alive(self, gradient: torch.Tensor) -> None:
        """A tensor hook that does nothing: it ties this frame's life to the autograd graph that holds the hook."""


class _Active(threading.local):
    """What this thread is doing: the current frame, how the root's calls began, who records votes."""

    def __init__(self) -> None:
        self.frame: Frame | None = None
        self.entries: list[tuple[Steering, Frame | None]] = []
        self.failed = False
        self.recorder: dict[str, torch.Tensor] | None = None


ACTIVE = _Active()


@dataclass
class ForwardMemory:
    """The plans of one layer's forwards whose backward may still come."""

    frames: list[weakref.ref[Frame]] = field(default_factory=list)
    last: Plan | None = None
    replayed: bool = False

    def remember(self, plan: Plan, frame: Frame | None) -> None:
        """Called by each forward that is not a replay."""
        if self.replayed:
            self.frames, self.replayed = [], False
        self.last = plan
        if frame is not None:
            self.frames = [reference for reference in self.frames if reference() is not None]
            self.frames.append(weakref.ref(frame))

    def replay(self, module: str) -> Plan | None:
        """The plan for a forward that runs again during the backward pass.

        Raises:
            RuntimeError: forwards with different preferences await this backward.
        """
        self.replayed = True
        alive = [frame for frame in (reference() for reference in self.frames) if frame is not None]
        if len({frame.plan.key for frame in alive}) > 1:
            raise RuntimeError(
                f"gradient checkpointing runs {module} again, but forwards with {len(alive)} different preferences await "
                "this backward pass; call backward() after each forward, or pass one preference per row in one forward"
            )
        return self.last


_NOT_INPUTS = ("mask", "position", "bias", "past", "cache", "encoder_outputs")


def extent(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | None, frozenset[int]]:
    """The batch size (None where no tensor tells) and the sequence lengths of a call."""
    named = [item for name, item in kwargs.items() if not any(part in name for part in _NOT_INPUTS)]
    tensors = [item for item in (*args, *named) if isinstance(item, torch.Tensor) and item.ndim > 0]
    batch = int(tensors[0].shape[0]) if tensors else None
    return batch, frozenset(int(tensor.shape[1]) for tensor in tensors if tensor.ndim > 1)


def first_with_graph(output: Any) -> torch.Tensor | None:
    """The first tensor of a model's output that a backward pass can start from."""
    if isinstance(output, torch.Tensor):
        return output if output.requires_grad else None
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for found in map(first_with_graph, items) if found is not None), None)
