"""Which experts a plan reaches, and where they lie along the rank axis of one module's A and B.

Shapes: L experts of ranks r_1 ... r_L with sum r, of which S are selected, with ranks that sum to r_S.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

_CACHED = 1024


@dataclass(frozen=True, eq=False)
class Selection:
    """The selected experts in tensors of certain ranks.

    Attributes:
        experts: ascending, S of L.
        ranks: of the selected experts, `(S,)`; 0 where one has nothing here.
        spans: the stretches of the rank axis that hold them, neighbours joined, without empty ones.
        whole: whether the spans cover the rank axis.
    """

    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    spans: tuple[slice, ...]
    whole: bool
    _owners: dict[Any, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(experts: tuple[int, ...], ranks: tuple[int, ...]) -> Selection:
        """The selection of `experts` among all the `ranks`."""
        starts = [0]
        for rank in ranks:
            starts.append(starts[-1] + rank)
        spans: list[slice] = []
        for expert in experts:
            start, stop = starts[expert], starts[expert + 1]
            if start == stop:
                continue
            if spans and spans[-1].stop == start:
                start = spans.pop().start
            spans.append(slice(start, stop))
        whole = spans == [slice(0, starts[-1])]
        return Selection(experts, tuple(ranks[expert] for expert in experts), tuple(spans), whole)

    @property
    def rank(self) -> int:
        """r_S."""
        return sum(self.ranks)

    def owners(self, device: torch.device) -> torch.Tensor:
        """`(r_S,)`: of each selected rank its expert's place among `experts`."""
        known = self._owners.get(device)
        if known is None:
            places = torch.arange(len(self.ranks))
            known = places.repeat_interleave(torch.tensor(self.ranks, dtype=torch.long)).to(device)
            if type(known) is torch.Tensor:  # a tracer's tensors are not for others
                self._owners[device] = known
        return known


class Selections:
    """All selections of one adapter, each made once and shared by the plans that reach the same experts."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], Selection] = {}

    def of(self, experts: tuple[int, ...], ranks: tuple[int, ...]) -> Selection:
        """`Selection.of`, remembered."""
        known = self._known.get((experts, ranks))
        if known is None:
            known = self._known[experts, ranks] = Selection.of(experts, ranks)
            for oldest in list(self._known)[:-_CACHED]:
                self._known.pop(oldest, None)
        return known
