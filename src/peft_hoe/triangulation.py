"""A mesh over preferences: simplices with preferences at their corners, and where in them another preference lies.

Shapes: K points, N objectives, M simplices of N corners each, E edges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Delaunay, QhullError

from .errors import PreferenceError
from .preference import FloatArray

IntArray = NDArray[np.int64]
_FLAT = 1e-9  # volume of a simplex, relative to that of all preferences, that counts as none
_OUTSIDE = 1e-9


def triangulate(points: FloatArray, what: str = "preferences") -> IntArray:
    """The Delaunay triangulation of points of the simplex.

    Args:
        points: `(K, N)`, N ≥ 2, no two alike.
        what: to call them in errors.

    Returns:
        rows of points, `(M, N)`.

    Raises:
        PreferenceError: fewer than N points, or all on a face or a line of fewer dimensions.
    """
    n = points.shape[1]
    if n == 2:
        order = np.argsort(points[:, 0])
        found = np.stack([order[:-1], order[1:]], axis=1)
    else:
        try:
            found = (
                Delaunay(points[:, :-1]).simplices.astype(np.int64) if len(points) >= n else np.zeros((0, n), np.int64)
            )
        except QhullError:
            found = np.zeros((0, n), np.int64)
    found = found[np.abs(np.linalg.det(points[found])) > _FLAT]  # relative: that of the corners is 1
    if not len(found):
        raise PreferenceError(
            f"the {len(points)} {what} lie on fewer than {n - 1} dimensions, so that nothing lies between them; give at "
            f"least {n} that do not",
            argument=what,
            value=points.tolist(),
        )
    return found


def edges(simplices: IntArray) -> IntArray:
    """Which points are neighbours, each pair once: `(E, 2)`, ascending."""
    i, j = np.triu_indices(simplices.shape[1], 1)
    pairs = np.sort(np.concatenate([simplices[:, [a, b]] for a, b in zip(i, j, strict=True)]), axis=1)
    found: IntArray = np.unique(pairs, axis=0)
    return found


def weights_at(point: FloatArray, points: FloatArray, simplices: IntArray) -> FloatArray | None:
    """The corners of the simplex that a point `(N,)` lies in, as weights `(K,)`; None outside of all."""
    corners = np.swapaxes(points[simplices], 1, 2)
    shares = np.linalg.solve(corners, np.broadcast_to(point, (len(simplices), len(point)))[..., None])[..., 0]
    best = int(np.argmax(shares.min(axis=1)))
    if shares[best].min() < -_OUTSIDE:
        return None
    found: Any = np.zeros(len(points))
    found[simplices[best]] = np.clip(shares[best], 0.0, None)
    weights: FloatArray = found / found.sum()
    return weights
