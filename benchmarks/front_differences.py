"""Fronts of several methods on the same prompts: hypervolumes, and paired differences with intervals."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from peft_hoe.errors import HoEWarning
from peft_hoe.evaluation import Sweep
from peft_hoe.evaluation.sweeps.replicates import scaled_replicates
from peft_hoe.metrics import REFERENCE_POINT, basic_interval, hypervolume, percentile_interval


def front_table(sweeps: Mapping[str, Sweep], against: Sequence[str], preferences: Any = None) -> str:
    """One line a method, and below it the difference that the design can see.

    Args:
        sweeps: of the methods, `hoe` and `rs_dense` among them.
        against: methods that each is compared with, where they were swept.
        preferences: `(K, N)` of each sweep, which alone count; None for all.
    """
    estimates, volumes = drawn_volumes(sweeps, preferences)
    header = " | ".join(["method", "runs", "hypervolume", *(f"− {other}" for other in against)])
    lines = [f"| {header} |", "|" + "---|" * (3 + len(against))]
    for name, sweep in sweeps.items():
        cells = [name, str(len(sweep.rewards)), cell(estimates[name], volumes[name])]
        for other in against:
            known = other in sweeps and other != name
            difference = cell(estimates[name] - estimates.get(other, 0), volumes[name] - volumes.get(other, 0), "+")
            cells.append(difference if known else "")
        lines.append(f"| {' | '.join(cells)} |")
    low, high = np.percentile(volumes["hoe"] - volumes["rs_dense"], [2.5, 97.5])
    half = float(high - low) / 2
    share = half / estimates["rs_dense"]
    lines += ["", f"A difference of {half:.3f} can be seen, {share:.1%} of `rs_dense`'s hypervolume."]
    return "\n".join(lines)


def drawn_volumes(sweeps: Mapping[str, Sweep], preferences: Any = None) -> tuple[dict[str, float], dict[str, Any]]:
    """The hypervolume of each method, and `(R,)` of its replicates; prompts, also the table's, are drawn once for all.

    Args:
        sweeps: of the methods, `hoe` among them.
        preferences: `(K, N)` of each sweep, which alone count; None for all.
    """
    first = sweeps["hoe"]
    values = {name: sweep.values[:, rows_at(sweep, preferences)] for name, sweep in sweeps.items()}
    drawn = scaled_replicates(values, first.normalizer, own_corners=False, replicates=1000, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HoEWarning)  # replicates that lie below the reference point enclose nothing: 0
        replicates = {name: np.asarray([volume(front) for front in points]) for name, points in drawn.points.items()}
        return {name: volume(front) for name, front in drawn.estimates.items()}, replicates


def rows_at(sweep: Sweep, preferences: Any) -> list[int]:
    """Which of a sweep's preferences are these `(K, N)`; None for all.

    Raises:
        ValueError: it has not all of them.
    """
    if preferences is None:
        return list(range(len(sweep.preferences)))
    away = np.abs(sweep.preferences[:, None] - np.asarray(preferences)).max(-1)  # (K', K)
    if away.min(0).max() > 1e-6:
        raise ValueError(f"the sweep has {sweep.preferences.tolist()}, not all of {np.asarray(preferences).tolist()}")
    return [int(row) for row in away.argmin(0)]


def volume(front: Any) -> float:
    """Hypervolume from the project's reference point."""
    return hypervolume(front, reference_point=REFERENCE_POINT)


def cell(estimate: float, replicates: Any, sign: str = "") -> str:
    """A number with its 95 % interval; with a sign it is a difference of two methods."""
    low, high = (percentile_interval if sign else basic_interval)(estimate, np.asarray(replicates))
    return f"{estimate:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
