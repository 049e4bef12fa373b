"""A sweep as text.

Shapes: K preferences, N objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...preference import written

if TYPE_CHECKING:
    from ...metrics import Interval
    from ..sweeps.result import SweepResult
    from .comparison import SweepComparison


def sweep_table(sweep: SweepResult, interval: Interval) -> str:
    """Preferences, mean raw rewards with their intervals, and normalised ones where there is a scale.

    Args:
        sweep: what to show.
        interval: of its mean raw rewards, arrays `(K, N)`.
    """
    return "\n".join(map(_line, aligned([header(sweep), *rows(sweep, interval)])))


def header(sweep: SweepResult) -> list[str]:
    """The columns' names."""
    normalized = [] if sweep.normalizer is None else [f"{name} (0-1)" for name in sweep.objectives]
    return ["", f"preference ({', '.join(sweep.objectives)})", *sweep.objectives, *normalized]


def rows(sweep: SweepResult, interval: Interval) -> list[list[str]]:
    """Cells of each preference; the first one is * where no other point dominates it."""
    front = set(sweep.front().indices.tolist())
    scaled = sweep.normalized(sweep.points)
    return [
        [
            "*" if k in front else "",
            written(point),
            *(f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in zip(*numbers, strict=True)),
            *([] if sweep.normalizer is None else [f"{value:.3f}" for value in scaled[k]]),
        ]
        for k, (point, *numbers) in enumerate(
            zip(sweep.preferences, interval.estimate, interval.low, interval.high, strict=True)
        )
    ]


def overview(name: str, comparisons: Sequence[SweepComparison]) -> list[list[str]]:
    """Cells of a table of several fronts, each compared with the first: a header, and a row for each.

    Args:
        name: the first one's.
        comparisons: at least one; A is the first.
    """
    against = {"hypervolume A - B": f"{name} has more by", "expected utility A - B": f"{name}'s utility is more by"}
    head = ["method", "hypervolume", *against.values()]
    first = [name, _interval(comparisons[0].values["hypervolume A"]), *("" for _ in against)]
    others = [
        [pair.names[1], *(_interval(pair.values[label]) for label in ("hypervolume B", *against))]
        for pair in comparisons
    ]
    return [head, first, *others]


def _interval(interval: Interval) -> str:
    return f"{float(interval.estimate):.3f} [{float(interval.low):.3f}, {float(interval.high):.3f}]"


def rounded(value: Any, digits: int = 4) -> Any:
    """Plain JSON with its fractions rounded to so many digits, for people to read."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, (list, tuple)) else value


def aligned(cells: list[list[str]]) -> list[list[str]]:
    """Cells of a column at the same width: the first two on the left, the others on the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]


def _line(cells: list[str]) -> str:
    return "  ".join(cells).rstrip()
