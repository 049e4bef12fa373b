"""A front as a picture and as characters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import HoEError
from .steering import Front

_WIDTH, _HEIGHT = 60, 16


def pairs(front: Front) -> Iterator[tuple[int, int]]:
    """Indices of every two objectives; each pair is one picture."""
    return itertools.combinations(range(len(front.objectives)), 2)


def draw_png(front: Front, path: Path) -> None:
    """One panel for each pair of objectives.

    Raises:
        HoEError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HoEError('drawing the front needs matplotlib: pip install "peft-hoe[eval]"') from None
    panels = list(pairs(front))
    figure = Figure(figsize=(5.6 * len(panels), 5.2), layout="constrained", dpi=120)
    for axes, (x, y) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        xs, ys = [row[x] for row in front.rewards], [row[y] for row in front.rewards]
        if len(panels) == 1:  # with more objectives, neighbours in the grid are no neighbours in a panel
            axes.plot(xs, ys, color="#4c72b0", alpha=0.4, zorder=1)
        dots = axes.scatter(
            xs, ys, c=[row[x] for row in front.preferences], cmap="viridis", s=60, zorder=3, label="HoE adapter"
        )
        for marker, (name, point) in zip(itertools.cycle("XsD^vP"), front.references.items()):
            label = "base" if name == "base" else f"policy {name}"
            axes.scatter(point[x], point[y], marker=marker, s=110, facecolor="none", edgecolor="#c44e52", label=label)
        axes.set(xlabel=f"mean reward: {front.objectives[x]}", ylabel=f"mean reward: {front.objectives[y]}")
        axes.margins(0.08)
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
        figure.colorbar(dots, ax=axes, label=f"preference for {front.objectives[x]}")
    figure.suptitle("Rewards of one model at different preferences (greedy)")
    figure.savefig(path)


def draw_text(front: Front, x: int, y: int) -> str:
    """Two objectives as characters: digits are the adapter at ten times the first one's weight, letters the references."""
    points = [*front.rewards, *front.references.values()]
    marks = [_digit(row[x]) for row in front.preferences]
    marks += [chr(ord("A") + i) for i in range(len(front.references))]
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
    named = ", ".join(f"{chr(ord('A') + i)} {_named(name)}" for i, name in enumerate(front.references))
    lines.append(
        " " * 10 + f"0 .. 9, X: ten times the preference for {front.objectives[x]}" + f"; {named}" * bool(named)
    )
    return "\n".join(lines)


def table(front: Front) -> str:
    """Preferences and mean rewards, then the references."""
    names = front.objectives
    wide = max(12, *(len(name) + 2 for name in names))
    lines = [f"{'preference':<28}" + "".join(f"{name:>{wide}}" for name in names)]
    for preference, row in zip(front.preferences, front.rewards, strict=True):
        lines.append(f"{written(preference):<28}" + "".join(f"{value:>{wide}.3f}" for value in row))
    for name, row in front.references.items():
        lines.append(f"{_named(name):<28}" + "".join(f"{value:>{wide}.3f}" for value in row))
    return "\n".join(lines)


def written(preference: Sequence[float]) -> str:
    """A preference as a person writes it."""
    return "[" + ", ".join(f"{weight:.3g}" for weight in preference) + "]"


def _named(reference: str) -> str:
    return "base" if reference == "base" else f"policy {reference}"


def _digit(weight: float) -> str:
    return "X" if weight > 0.95 else str(round(10 * weight))


def _scaled(values: Sequence[float], cells: int) -> list[int]:
    """Cell of each value, the smallest in 0 and the largest in `cells - 1`."""
    low, high = min(values), max(values)
    return [round((value - low) / (high - low) * (cells - 1)) if high > low else 0 for value in values]
