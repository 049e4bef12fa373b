"""A calibrated dial: a map of the simplex onto itself, so that equal steps of the dial are equal steps along the front.

The map is linear on each simplex of a mesh: dial positions at its corners lead to the preferences that were measured there.
Corners of the preference simplex, its edges and its faces stay what they are, and no two positions lead to the same preference.
Made by `peft_hoe.evaluation.calibrate`; a configuration holds it as plain data.

Shapes: K positions, N objectives, M simplices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import PreferenceError
from .preference import FloatArray
from .triangulation import IntArray, weights_at


@dataclass(frozen=True, eq=False)
class Calibration:
    """The map.

    Args:
        positions: of the dial, points of the simplex `(K, N)`.
        preferences: what they lead to, `(K, N)`.
        simplices: of the mesh, rows of both, `(M, N)`.
        made_for: what it holds for, see `HoEConfig.calibrates`.
    """

    positions: FloatArray
    preferences: FloatArray
    simplices: IntArray
    made_for: dict[str, Any]

    @classmethod
    def of(cls, given: Any, n: int) -> Calibration:
        """From the plain data of a configuration with `n` objectives.

        Raises:
            PreferenceError: it is no calibration, or one of another number of objectives.
        """
        try:
            positions, preferences = (
                np.asarray(given[name], dtype=np.float64) for name in ("positions", "preferences")
            )
            simplices = np.asarray(given["simplices"], dtype=np.int64)
            made_for = dict(given["made_for"])
            fits = positions.shape == preferences.shape and positions.ndim == 2 and positions.shape[1] == n
            fits = fits and simplices.ndim == 2 and simplices.shape[1] == n and len(simplices) > 0
            fits = fits and simplices.min() >= 0 and simplices.max() < len(positions)
            points = np.concatenate([positions, preferences]) if fits else np.zeros((0, n))
            fits = fits and bool(np.isfinite(points).all() and (points >= 0).all() and np.allclose(points.sum(1), 1))
            fits = fits and bool((np.abs(np.linalg.det(positions[simplices])) > 0).all())
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise PreferenceError(
                f"calibration is no calibration of {n} objectives; take what peft_hoe.evaluation.calibrate makes, or None",
                argument="calibration",
                value=given,
            )
        return cls(positions, preferences, simplices, made_for)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, from which `of` makes it again."""
        return {
            "positions": self.positions.tolist(),
            "preferences": self.preferences.tolist(),
            "simplices": self.simplices.tolist(),
            "made_for": dict(self.made_for),
        }

    def preference(self, position: FloatArray) -> FloatArray:
        """The preference `(N,)` that a position `(N,)` of the dial leads to."""
        weights = weights_at(position, self.positions, self.simplices)
        if weights is None:  # a rounding outside: the mesh covers the simplex
            nearest = int(np.argmin(np.linalg.norm(self.positions - position, axis=1)))
            weights = np.eye(len(self.positions))[nearest]
        found: FloatArray = weights @ self.preferences
        return found / found.sum()
