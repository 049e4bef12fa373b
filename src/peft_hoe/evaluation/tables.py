"""A sweep as text.

Shapes: K preferences, N objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..metrics import Interval
    from .result import Sweep


def sweep_table(sweep: Sweep, interval: Interval) -> str:
    """Preferences, mean raw rewards with their intervals, and normalised ones where there is a scale.

    Args:
        sweep: what to show.
        interval: of its mean raw rewards, arrays `(K, N)`.
    """
    return "\n".join(map(_line, aligned([header(sweep), *rows(sweep, interval)])))


def header(sweep: Sweep) -> list[str]:
    """The columns' names."""
    normalized = [] if sweep.normalizer is None else [f"{name} (0-1)" for name in sweep.objectives]
    return ["", f"preference ({', '.join(sweep.objectives)})", *sweep.objectives, *normalized]


def rows(sweep: Sweep, interval: Interval) -> list[list[str]]:
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


def written(preference: Sequence[float]) -> str:
    """A preference as a person writes it."""
    return ", ".join(f"{weight:.3g}" for weight in preference)


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
