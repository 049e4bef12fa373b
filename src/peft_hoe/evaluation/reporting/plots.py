"""Fronts as pictures: two objectives as a plane, three as triangles and planes, more as parallel coordinates.

The first sweep is the one shown in detail; others are drawn beside it. All numbers are mean raw rewards with bootstrap
intervals, but parallel coordinates, whose axes share the payoff table's scale.

Shapes: K preferences, N objectives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import HoEError
from ...preference import FloatArray
from ..sweeps.result import SweepResult

# Okabe and Ito's palette, which colour-blind readers can tell apart, with Tol's wine in place of its yellow, which white hides.
# The first sweep's points have the colours of a map.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")  # one more than colours: 72 sweeps look different
_MAP = "viridis"
_EDGE = "#444444"


def plot(sweeps: Sequence[SweepResult], *, level: float = 0.95, replicates: int = 1000) -> Any:
    """A matplotlib Figure.

    Args:
        sweeps: the one to show, and others with the same objectives to show beside it.
        level: of the intervals.
        replicates: of the bootstrap that they come from.

    Raises:
        HoEError: matplotlib is missing, there is only one objective, or the sweeps have different objectives.
    """
    first, *others = sweeps
    for other in others:
        if other.objectives != first.objectives:
            raise HoEError(
                f"{other.name!r} has objectives {list(other.objectives)}, {first.name!r} {list(first.objectives)}",
                argument="objectives", value=list(other.objectives), allowed=list(first.objectives),
            )  # fmt: skip
    n = len(first.objectives)
    if n < 2:
        raise HoEError(
            "a front has at least two objectives; there is nothing to plot for one",
            argument="objectives", value=list(first.objectives), allowed="at least two",
        )  # fmt: skip
    if n > 3:
        return _parallel(sweeps)
    means = [sweep.intervals(level=level, replicates=replicates) for sweep in sweeps]
    title = f"Mean rewards on {len(first.prompts)} prompts, {level:.0%} intervals"
    if n == 2:
        figure = new_figure(7.0, 5.8)
        figure.suptitle(title)
        axes = figure.subplots()
        dots = _plane(axes, sweeps, means, (0, 1))
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(
            handles[::-1], labels[::-1], loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False
        )
        figure.colorbar(dots, ax=axes, label=f"weight of {first.objectives[0]}")
        return figure
    figure = new_figure(14.0, 9.4)
    figure.suptitle(title)
    grid = figure.subplots(2, 3)
    for i, axes in enumerate(grid[0]):
        _triangle(figure, axes, first, i)
    for axes, pair in zip(grid[1], itertools.combinations(range(3), 2), strict=True):
        dots = _plane(axes, sweeps, means, pair)
        figure.colorbar(dots, ax=axes, location="bottom", label=f"weight of {first.objectives[pair[0]]}", aspect=30)
    handles, labels = grid[1, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, frameon=False)
    return figure


def new_figure(width: float, height: float) -> Any:
    """An empty figure, without pyplot's global state.

    Raises:
        HoEError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HoEError('plots need matplotlib: pip install "peft-hoe[eval]"') from None
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def _plane(axes: Any, sweeps: Sequence[SweepResult], means: Sequence[Any], pair: tuple[int, int]) -> Any:
    """Two objectives against each other; returns what a colour bar needs."""
    x, y = pair
    dots: Any = None
    for i, (sweep, mean) in reversed(list(enumerate(zip(sweeps, means, strict=True)))):
        points = mean.estimate
        colour = COLOURS[i % len(COLOURS)]
        order = np.argsort(sweep.preferences[:, x], kind="stable")
        axes.errorbar(
            points[:, x], points[:, y], xerr=_bars(mean, x), yerr=_bars(mean, y), fmt="none", ecolor=colour, elinewidth=1.0,
            alpha=0.55, zorder=1,
        )  # fmt: skip
        if len(sweep.objectives) == 2:  # with more, neighbours in the grid are no neighbours in a plane
            axes.plot(points[order, x], points[order, y], color=colour, alpha=0.5, linewidth=1.2, zorder=2)
        style: dict[str, Any] = {"facecolor": "white", "edgecolor": colour, "zorder": 3}
        if i == 0:
            style = {"c": sweep.preferences[:, x], "cmap": _MAP, "vmin": 0, "vmax": 1, "edgecolor": colour, "zorder": 4}
        dots = axes.scatter(
            points[:, x],
            points[:, y],
            s=55,
            linewidth=1.2,
            marker=MARKERS[i % len(MARKERS)],
            label=sweep.name,
            **style,
        )
    names = sweeps[0].objectives
    axes.set(xlabel=f"mean reward: {names[x]}", ylabel=f"mean reward: {names[y]}")
    axes.margins(0.08)
    axes.grid(alpha=0.25)
    return dots


def _bars(mean: Any, column: int) -> FloatArray:
    """Lengths of error bars `(2, K)`."""
    middle = mean.estimate[:, column]
    return np.maximum([middle - mean.low[:, column], mean.high[:, column] - middle], 0.0)


def _triangle(figure: Any, axes: Any, sweep: SweepResult, objective: int) -> None:
    """Mean reward of one objective over the simplex of preferences."""
    corners = np.asarray([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
    spots = sweep.preferences @ corners
    reward = sweep.points[:, objective]
    axes.fill(*corners.T, facecolor="#f6f6f6", edgecolor=_EDGE, linewidth=1.0, zorder=0)
    if len(spots) > 3 and np.linalg.matrix_rank(spots - spots[0]) == 2:
        axes.tricontourf(*spots.T, reward, levels=14, cmap=_MAP, alpha=0.55, zorder=1)
    dots = axes.scatter(*spots.T, c=reward, cmap=_MAP, s=90, edgecolor=_EDGE, zorder=3)
    for corner, name, shift in zip(corners, sweep.objectives, ((0, -0.06), (0, -0.06), (0, 0.04)), strict=True):
        side = "top" if shift[1] < 0 else "bottom"
        axes.text(*(corner + shift), f"all {name}", ha="center", va=side, fontsize=9)
    axes.set(
        xlim=(-0.15, 1.15),
        ylim=(-0.17, 1.0),
        aspect="equal",
        title=f"{sweep.name}: mean reward {sweep.objectives[objective]}",
    )
    axes.axis("off")
    figure.colorbar(dots, ax=axes, shrink=0.75)


def _parallel(sweeps: Sequence[SweepResult]) -> Any:
    """One panel for each sweep, one axis for each objective, one line for each preference."""
    names = sweeps[0].objectives
    figure = new_figure(max(7.0, 1.7 * len(names)), 0.9 + 3.6 * len(sweeps))
    panels = figure.subplots(len(sweeps), 1, squeeze=False, sharey=True)[:, 0]
    low, high = _range(sweeps)
    from matplotlib.lines import Line2D

    for axes, sweep in zip(panels, sweeps, strict=True):
        lines = (sweeps[0].normalized(sweep.points) - low) / (high - low)
        for preference, line in zip(sweep.preferences, lines, strict=True):
            most = np.flatnonzero(preference >= preference.max() - 1e-9)
            colour = COLOURS[int(most[0]) % len(COLOURS)] if len(most) == 1 else "#999999"
            corner = preference.max() > 1 - 1e-9
            axes.plot(
                range(len(names)), line, color=colour, alpha=1.0 if corner else 0.4, linewidth=2.4 if corner else 1.0
            )
        for i in range(len(names)):
            axes.axvline(i, color=_EDGE, linewidth=0.8, zorder=0)
        axes.set_xticks(range(len(names)), names)
        axes.set(title=sweep.name, xlim=(-0.1, len(names) - 0.9), ylabel=_scale_label(sweeps[0]))
        axes.grid(axis="y", alpha=0.25)
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], label=f"most weight on {name}") for i, name in enumerate(names)
    ]
    handles += [
        Line2D([], [], color="#999999", label="several alike"),
        Line2D([], [], color=_EDGE, linewidth=2.4, label="one-hot"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _range(sweeps: Sequence[SweepResult]) -> tuple[Any, Any]:
    """Where axes begin and end: on the payoff table's scale as it is, else from the worst to the best of each objective."""
    if sweeps[0].normalizer is not None:
        return 0.0, 1.0
    points = np.concatenate([sweep.points for sweep in sweeps])
    low, high = points.min(axis=0), points.max(axis=0)
    return low, np.where(high > low, high, low + 1)


def _scale_label(sweep: SweepResult) -> str:
    return "normalised reward" if sweep.normalizer is not None else "reward, worst to best"
