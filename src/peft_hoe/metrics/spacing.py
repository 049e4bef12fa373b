"""How evenly a dial goes through its front.

Gaps are the distances between the rewards of neighbouring preferences: of those that follow each other for two objectives, and
of those that share an edge of the Delaunay triangulation for more. Rewards must be comparable between objectives (normalised).

Shapes: K preferences, N objectives.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import MetricError
from ..preference import FloatArray
from ..triangulation import edges, triangulate
from .validation import as_points, as_preferences


def gap_variation(rewards: Any, preferences: Any) -> float:
    """Coefficient of variation of the gaps (standard deviation over mean): 0 where steps are equal; smaller is better.

    Args:
        rewards: `(K, N)`, N ≥ 2.
        preferences: λ, `(K, N)`, each once.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite, or no gap at all.
        PreferenceError: a row of `preferences` is no point of the simplex, or they span too little.

    >>> from peft_hoe.metrics import gap_variation
    >>> gap_variation([[0, 1], [0.25, 0.75], [1, 0]], [[0, 1], [0.5, 0.5], [1, 0]])  # steps of 1 and 3: 1 over 2
    0.5
    """
    gaps = _gaps(rewards, preferences)
    return float(gaps.std() / gaps.mean())


def gap_ratio(rewards: Any, preferences: Any) -> float:
    """The largest gap over the smallest: 1 where steps are equal, infinite where one does nothing; smaller is better.

    Args and errors as `gap_variation`.

    >>> from peft_hoe.metrics import gap_ratio
    >>> gap_ratio([[0, 4], [1, 4], [4, 4]], [[0, 1], [0.5, 0.5], [1, 0]])
    3.0
    """
    gaps = _gaps(rewards, preferences)
    return float(gaps.max() / gaps.min()) if gaps.min() > 0 else np.inf


def mean_inner_product(rewards: Any, preferences: Any) -> float:
    """Mean over λ of λ·R(π_λ) (MIP, PARM): what users get on average; larger is better.

    Args and errors as `gap_variation`; one preference is enough.

    >>> from peft_hoe.metrics import mean_inner_product
    >>> mean_inner_product([[0.0, 1.0], [0.5, 0.5]], [[0, 1], [0.5, 0.5]])
    0.75
    """
    points, wanted = _pair(rewards, preferences)
    return float((points * wanted).sum(axis=1).mean())


def _pair(rewards: Any, preferences: Any) -> tuple[FloatArray, FloatArray]:
    points = as_points(rewards, "rewards")
    wanted = as_preferences(preferences, points.shape[1])
    if len(points) != len(wanted):
        raise MetricError(
            f"there are {len(points)} rows of rewards, but {len(wanted)} preferences; give one for each row",
            argument="preferences", value=len(wanted), allowed=len(points),
        )  # fmt: skip
    return points, wanted


def _gaps(rewards: Any, preferences: Any) -> FloatArray:
    points, wanted = _pair(rewards, preferences)
    if points.shape[1] < 2:
        raise MetricError(
            "gaps need at least two objectives: with one there is nothing to steer between",
            argument="rewards", value=points.shape, allowed="at least two objectives",
        )  # fmt: skip
    pairs = edges(triangulate(wanted))
    gaps: FloatArray = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
    if not gaps.any():
        raise MetricError(
            "the rewards are the same at all preferences: there is no gap",
            argument="rewards", value=points.tolist(), allowed="not the same at all preferences",
        )  # fmt: skip
    return gaps
