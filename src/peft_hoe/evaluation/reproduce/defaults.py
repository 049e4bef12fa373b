"""The paper's merged experts and routers (D.2) by the number of objectives."""

from __future__ import annotations

from ...preference import uniform


def default_experts(n: int) -> list[list[float]]:
    """The centroid; for five objectives the mean of the first three."""
    return [[1 / 3] * 3 + [0.0] * 2] if n == 5 else [uniform(n).tolist()]


def default_routers(n: int) -> list[list[float]]:
    """One router: [.25, .25, .5] for three objectives, the centroid for five.

    For two objectives the paper adds one "adaptively" and prints no preference: [.25, .75] here. Other numbers are not in the
    paper: half for the last objective and the rest even, as with three.
    """
    if n == 5:
        return [[0.2] * 5]
    return [[0.25, 0.75]] if n == 2 else [[0.5 / (n - 1)] * (n - 1) + [0.5]]
