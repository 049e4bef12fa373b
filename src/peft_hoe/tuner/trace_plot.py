"""A trace as a picture: the experts' shares on top of one another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import HoEError
from .trace_page import colour


def stacked(places: Iterable[int], votes: Sequence[Sequence[float]], experts: Sequence[str], axis: str) -> Any:
    """A matplotlib Figure of votes `(K, L)` at K places.

    Raises:
        HoEError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HoEError('plots need matplotlib: pip install "peft-hoe[eval]"') from None
    figure = Figure(figsize=(7.5, 3.4), layout="constrained")
    axes: Any = figure.subplots()
    where, below = list(places), [0.0] * len(votes)
    for j, name in enumerate(experts):
        heights = [float(vote[j]) for vote in votes]
        axes.bar(where, heights, bottom=below, width=0.9, color=colour(j), label=name)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(xlabel=axis, ylabel="mean vote", ylim=(0, 1), xlim=(min(where) - 0.6, max(where) + 0.6))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=min(len(experts), 4), frameon=False)
    return figure
