"""The measured front of a sweep, with the measured preference that is nearest to the chosen one."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...preference import FloatArray


def draw_front(sweep: Any, preference: FloatArray) -> Figure:
    """Mean rewards over prompts: a plane for two objectives, parallel axes for more.

    Args:
        sweep: a `Sweep`.
        preference: `(N,)`.
    """
    means = np.nanmean(sweep.rewards, axis=(0, 2, 3))  # (K, N)
    nearest = int(np.linalg.norm(np.asarray(sweep.preferences) - preference, axis=1).argmin())
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    names = list(sweep.objectives)
    if means.shape[1] == 2:
        order = np.argsort(np.asarray(sweep.preferences)[:, 0])
        axes.plot(*means[order].T, "o-", color="#9bb8cc", markersize=5)
        axes.plot(*means[nearest], "o", color="#D55E00", markersize=11)
        axes.set(xlabel=f"mean reward: {names[0]}", ylabel=f"mean reward: {names[1]}")
    else:
        axes.plot(range(len(names)), means.T, color="#c9d5de")
        axes.plot(range(len(names)), means[nearest], "o-", color="#D55E00", linewidth=2.5)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel("mean reward")
    weights = ", ".join(f"{weight:.2g}" for weight in np.asarray(sweep.preferences)[nearest])
    axes.set_title(f"{len(sweep.prompts)} prompts; measured at {weights}", fontsize=10)
    return figure
