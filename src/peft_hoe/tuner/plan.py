"""A plan: what every layer does with a preference. Made once per preference, read by all layers.

Shapes: L experts, R routers, V voting slots (the voting experts of all routers, one router after the other), B rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..preference import FloatArray
from .lengths import Snapshot


@dataclass(frozen=True, eq=False)
class AdapterPlan:
    """The votes of one adapter.

    Attributes:
        key: identifies the preference and what was done with it.
        preferences: `(rows, N)`, as requested.
        static: `(rows, L)` float64 on the CPU, the votes that do not depend on the input; rows is 1 when shared.
        live: `(rows, R)`, the weight of each router whose softmax votes; 0 for untrained ones.
        is_live: whether some router's softmax votes.
        may_be_live: whether one does at another preference; the same for all plans of an adapter.
        selected: experts that some row can reach, ascending.
        scatter: `(V, L)`, 1 where a voting slot belongs to an expert.
    """

    key: bytes
    preferences: FloatArray
    static: torch.Tensor
    live: torch.Tensor
    is_live: bool
    may_be_live: bool
    selected: tuple[int, ...]
    scatter: torch.Tensor
    _placed: dict[Any, torch.Tensor] = field(default_factory=dict)
    _derived: dict[Any, tuple[Snapshot, torch.Tensor]] = field(default_factory=dict)
    _selections: dict[tuple[int, ...], Selection] = field(default_factory=dict)

    @property
    def is_shared(self) -> bool:
        """Whether all tokens of all rows have the same votes."""
        return not self.is_live and self.static.shape[0] == 1

    def placed(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """`static`, `live` or `scatter` on the device of `like`, in float32 (float64 for a float64 `like`)."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        source: torch.Tensor = getattr(self, name)
        if torch.compiler.is_compiling():
            return source.to(dtype).to(like.device)
        key = (name, like.device, dtype)
        return self._remembered(key, lambda: source.to(dtype).to(like.device))

    def _remembered(self, key: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        placed = self._placed.get(key)
        if placed is None:
            with torch.inference_mode(False):  # a later training step may use it
                placed = make()
            if type(placed) is torch.Tensor:  # a tracer's tensors are not for others
                self._placed[key] = placed
        return placed

    def derived(self, key: Any, source: torch.Tensor, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `make` returns, made once for a key and state of `source`, the Parameter that it is made from."""
        if type(source) is not torch.nn.Parameter or source.is_inference():  # these do not tell when they change
            return make()
        kept = self._derived.get(key)
        if kept is None or not kept[0].shows(source):
            with torch.inference_mode(False):
                kept = Snapshot(source), make()
            self._derived[key] = kept
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        """A copy derives anew: its modules go their own ways."""
        return {**self.__dict__, "_placed": {}, "_derived": {}}

    def selection(self, ranks: tuple[int, ...]) -> Selection:
        """Where the selected experts lie in tensors of these ranks."""
        if ranks not in self._selections:
            self._selections[ranks] = Selection.of(self.selected, ranks)
        return self._selections[ranks]

    def shared_scale(self, ranks: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """The votes of the selected experts over their ranks, `(r,)`, where all tokens share them."""
        selection = self.selection(ranks)
        return self._remembered(
            (ranks, like.device, like.dtype),
            lambda: over_ranks(selection.votes(self.placed("static", like)[0]), selection.ranks),
        )


@dataclass(frozen=True)
class Selection:
    """The selected experts in one module's tensors.

    Attributes:
        experts: ascending; None when all are selected.
        ranks: their ranks.
        spans: the stretches of the rank axis that hold them, neighbours joined.
    """

    experts: tuple[int, ...] | None
    ranks: tuple[int, ...]
    spans: tuple[slice, ...]

    @staticmethod
    def of(experts: tuple[int, ...], ranks: tuple[int, ...]) -> Selection:
        """The selection of `experts` among all the `ranks`."""
        spans: list[slice] = []
        for expert in experts:
            start = sum(ranks[:expert])
            if spans and spans[-1].stop == start:
                start = spans.pop().start
            spans.append(slice(start, sum(ranks[: expert + 1])))
        chosen = None if len(experts) == len(ranks) else experts
        return Selection(chosen, tuple(ranks[expert] for expert in experts), tuple(spans))

    def votes(self, votes: torch.Tensor) -> torch.Tensor:
        """`(..., L)` to the selected experts' `(..., S)`."""
        if self.experts is None:
            return votes
        return torch.stack([votes[..., expert] for expert in self.experts], dim=-1)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The selected rows of A `(r, d_in)`; a view where the experts are neighbours."""
        if self.experts is None:
            return weight
        return weight[self.spans[0]] if len(self.spans) == 1 else torch.cat([weight[span] for span in self.spans])

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """The selected columns of B `(d_out, r)`; a view where the experts are neighbours."""
        if self.experts is None:
            return weight
        parts = [weight[:, span] for span in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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


def over_ranks(votes: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor:
    """`(..., L)` to `(..., r)`: each expert's vote once per rank."""
    if len(set(ranks)) == 1:
        return votes.repeat_interleave(ranks[0], dim=-1)
    return torch.cat([votes[..., j : j + 1].expand(*votes.shape[:-1], rank) for j, rank in enumerate(ranks)], dim=-1)
