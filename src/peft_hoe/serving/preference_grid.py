"""Preferences rounded to a grid, each with one spelling: what names files and served models.

Shapes: N objectives, K points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import PreferenceError
from ..preference import FloatArray, das_dennis, parse_preference

MAX_POINTS = 20_000  # all are gone through when a server starts; and six digits tell their spellings apart
_SAME = 1e-6


class PreferenceGrid:
    """The points of the simplex whose weights are multiples of a step.

    Args:
        objectives: the N names.
        step: 1 divided by a whole number, such as 0.1.

    Raises:
        PreferenceError: another step, or one with more than `MAX_POINTS` points.
    """

    def __init__(self, objectives: Sequence[str], step: float) -> None:
        partitions = round(1 / step) if 0 < step <= 1 else 0
        if partitions < 1 or abs(partitions * step - 1) > _SAME:
            raise PreferenceError(
                f"the step of the grid is {step!r}; it must be 1 divided by a whole number, such as 0.1",
                argument="step", value=step, allowed="1 divided by a whole number",
            )  # fmt: skip
        points = math.comb(partitions + len(objectives) - 1, len(objectives) - 1)
        if points > MAX_POINTS:
            raise PreferenceError(
                f"the step of the grid is {step!r}, which makes {points} preferences of {len(objectives)} objectives; at most "
                f"{MAX_POINTS} are possible, so take a larger step",
                argument="step", value=step, allowed=f"a step of at most {MAX_POINTS} points",
            )  # fmt: skip
        self.objectives, self.partitions = list(objectives), partitions

    @property
    def points(self) -> FloatArray:
        """All of them, `(K, N)`."""
        return das_dennis(len(self.objectives), self.partitions)

    def nearest(self, preference: Any) -> FloatArray:
        """The grid point `(N,)` nearest to a preference; it sums to 1 as well.

        Raises:
            PreferenceError: not a point of the simplex.
        """
        scaled = parse_preference(preference, self.objectives) * self.partitions
        floor = np.floor(scaled + _SAME)
        missing = self.partitions - int(floor.sum())
        # The weights that lost most by rounding down get one step each.
        floor[np.argsort(floor - scaled, kind="stable")[:missing]] += 1
        return np.asarray(floor / self.partitions)

    def spell(self, preference: Any) -> str:
        """The one spelling of the nearest grid point, such as `0.7,0.3`; no other point has it."""
        return ",".join(f"{weight:.6g}" for weight in self.nearest(preference))
