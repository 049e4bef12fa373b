"""A front as text: a table of mean rewards, and two objectives as characters in a plane.

Shapes: K preferences, N objectives. `alone` are sweeps of models that know of no preference; they have one point.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ..evaluation import Sweep
from ..preference import written

_WIDTH, _HEIGHT = 60, 16


def pairs(front: Sweep) -> Iterator[tuple[int, int]]:
    """Indices of every two objectives; each pair is one picture."""
    return itertools.combinations(range(len(front.objectives)), 2)


def draw_text(front: Sweep, alone: Sequence[Sweep], x: int, y: int) -> str:
    """Two objectives as characters: digits are the front at ten times the first one's weight, letters are models alone."""
    points = [*front.points.tolist(), *(sweep.points[0].tolist() for sweep in alone)]
    marks = [_digit(row[x]) for row in front.preferences.tolist()]
    marks += [chr(ord("A") + i) for i in range(len(alone))]
    columns = _scaled([point[x] for point in points], _WIDTH)
    rows = _scaled([point[y] for point in points], _HEIGHT)
    canvas = [[" "] * (_WIDTH + 8) for _ in range(_HEIGHT)]
    for mark, column, row in reversed(list(zip(marks, columns, rows, strict=True))):
        line = canvas[_HEIGHT - 1 - row]
        line[next(c for c in range(column, len(line)) if line[c] == " ")] = mark
    highest, lowest = max(point[y] for point in points), min(point[y] for point in points)
    edge = {0: f"{highest:8.3g}", _HEIGHT - 1: f"{lowest:8.3g}"}
    lines = [f"{front.objectives[y]:>8}"]
    lines += [f"{edge.get(i, ''):>8} |{''.join(line).rstrip()}" for i, line in enumerate(canvas)]
    left, right = min(point[x] for point in points), max(point[x] for point in points)
    lines.append(" " * 9 + "+" + "-" * _WIDTH + f" {front.objectives[x]}")
    lines.append(" " * 10 + f"{left:<{_WIDTH - 8}.3g}{right:>8.3g}")
    named = ", ".join(f"{chr(ord('A') + i)} {sweep.name}" for i, sweep in enumerate(alone))
    lines.append(
        " " * 10 + f"0 .. 9, X: ten times the preference for {front.objectives[x]}" + f"; {named}" * bool(named)
    )
    return "\n".join(lines)


def table(front: Sweep, alone: Sequence[Sweep]) -> str:
    """Preferences and mean rewards, then the models alone."""
    wide = max(12, *(len(name) + 2 for name in front.objectives))
    rows = [
        *((written(preference), point) for preference, point in zip(front.preferences, front.points, strict=True)),
        *((sweep.name, sweep.points[0]) for sweep in alone),
    ]
    lines = [f"{'preference':<28}" + "".join(f"{name:>{wide}}" for name in front.objectives)]
    lines += [f"{name:<28}" + "".join(f"{value:>{wide}.3f}" for value in point) for name, point in rows]
    return "\n".join(lines)


def _digit(weight: float) -> str:
    return "X" if weight > 0.95 else str(round(10 * weight))


def _scaled(values: Sequence[float], cells: int) -> list[int]:
    """Cell of each value, the smallest in 0 and the largest in `cells - 1`."""
    low, high = min(values), max(values)
    return [round((value - low) / (high - low) * (cells - 1)) if high > low else 0 for value in values]
