"""A plan: what every layer does with a preference. Made once per preference, read by all layers.

Shapes: L experts, R routers, B rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..preference import FloatArray
from .selection import Selection, Selections
from .votes import PlacedVotes, placed_votes

Place = tuple[torch.device, torch.dtype]


@dataclass(frozen=True, eq=False)
class AdapterPlan:
    """The votes of one adapter.

    Attributes:
        key: identifies the preference and what was done with it.
        preferences: `(rows, N)`, as requested.
        static: `(rows, L)` float64 on the CPU, the votes that do not depend on the input; rows is 1 when shared.
        fixed: as `static`, with all routers voting as before their training: what modules without routers go by.
        live: `(rows, R)`, the weight of each router whose softmax votes for each token; 0 for untrained ones.
        by_module: `(rows, R)`, the same of routers that vote once for each module.
        is_live: whether some router's softmax votes for each token.
        may_be_live: the routers of which one does at another preference; the same for all plans of an adapter.
        may_be_by_module: the routers of which one votes for each module at another preference, likewise.
        selected: experts that some row can reach, ascending.
        slots: of every router the experts that it votes for, ascending.
        selections: the adapter's.
        constant_shape: the votes of all experts and routers, by place.
    """

    key: bytes
    preferences: FloatArray
    static: torch.Tensor
    fixed: torch.Tensor
    live: torch.Tensor
    by_module: torch.Tensor
    is_live: bool
    may_be_live: tuple[int, ...]
    may_be_by_module: tuple[int, ...]
    selected: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]
    selections: Selections
    constant_shape: dict[Place, PlacedVotes] = field(default_factory=dict)
    _votes: dict[Any, PlacedVotes] = field(default_factory=dict)
    _fixed: dict[Place, torch.Tensor] = field(default_factory=dict)

    def selection(self, ranks: tuple[int, ...], *, whole: bool) -> Selection:
        """Where the experts that it reaches, or all, lie in tensors of these ranks."""
        return self.selections.of(tuple(range(self.static.shape[1])) if whole else self.selected, ranks)

    def votes(self, like: torch.Tensor, experts: tuple[int, ...], *, every_router: bool = False) -> PlacedVotes:
        """Its votes on the device of `like`, in float32 (float64 for a float64 `like`).

        Args:
            like: what they will be multiplied with.
            experts: in play, ascending; those that it reaches or more.
            every_router: reckon with all routers as soon as some preference has a use for one.
        """
        key = (experts, every_router, *place_of(like))
        known = self._votes.get(key)
        if known is None:
            tokens, modules = (_used(self.live), _used(self.by_module))
            if every_router:
                tokens, modules = self.may_be_live, self.may_be_by_module
            with torch.inference_mode(False):  # a later training step may use it
                known = placed_votes(self.static, self.live, self.slots, experts, tokens, *key[2:])
                if modules:
                    none = torch.zeros_like(self.static)
                    own = placed_votes(none, self.by_module, self.slots, experts, modules, *key[2:])
                    known = known._replace(modules=own)
            if type(known.votes.mix) is torch.Tensor:  # a tracer's tensors are not for others
                self._votes[key] = known
        return known

    def fixed_votes(self, like: torch.Tensor) -> torch.Tensor:
        """`fixed` on the device of `like`, in float32 (float64 for a float64 `like`)."""
        place = place_of(like)
        known = self._fixed.get(place)
        if known is None:
            with torch.inference_mode(False):
                known = self.fixed.to(place[1]).to(place[0])
            if type(known) is torch.Tensor:
                self._fixed[place] = known
        return known

    def place(self, places: Iterable[Place]) -> None:
        """Make the votes of all experts and routers, whose shapes do not depend on the preference, where compilers look."""
        for place in places:
            if place not in self.constant_shape:
                like = torch.empty(0, device=place[0], dtype=place[1])
                self.constant_shape[place] = self.votes(like, tuple(range(self.static.shape[1])), every_router=True)
                self.fixed_votes(like)

    @property
    def is_by_module(self) -> bool:
        """Whether some router votes for each module."""
        return bool(self.may_be_by_module) and bool(self.by_module.any())

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        placed = (*self.constant_shape.values(), *self._votes.values())
        return self.static.numel() + 2 * self.live.numel() + sum(each.numbers for each in placed)

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes its own way, perhaps to another device."""
        return {**self.__dict__, "constant_shape": {}, "_votes": {}, "_fixed": {}}


def _used(weights: torch.Tensor) -> tuple[int, ...]:
    """The routers to which some row of `(rows, R)` gives a weight."""
    return tuple(torch.nonzero(weights.any(0)).flatten().tolist())


def place_of(like: torch.Tensor) -> Place:
    """Where votes for a tensor lie: its device; float32, or float64 for a float64 tensor."""
    return like.device, torch.float64 if like.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Plan:
    """The votes of every adapter of a model.

    Attributes:
        adapters: by adapter name.
        rows: B when each row of the batch has its own preference, None when all share one.
    """

    adapters: dict[str, AdapterPlan]
    rows: int | None

    @property
    def key(self) -> tuple[tuple[str, bytes], ...]:
        """Equal for equal plans."""
        return tuple(sorted((name, plan.key) for name, plan in self.adapters.items()))
