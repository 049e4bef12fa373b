"""Quality indicators of fronts besides the hypervolume. All objectives are maximised.

Shapes: P and Q points, K preferences, N objectives.
"""

from __future__ import annotations

from typing import Any

import moocore
import numpy as np

from ..preference import FloatArray
from .dominance import _mask
from .validation import as_points, as_preferences


def igd_plus(points: Any, reference_front: Any) -> float:
    """IGD+ (Ishibuchi et al. 2015): mean over r of min over a of ‖max(r − a, 0)‖, the distance still to go; smaller is better.

    Args:
        points: a, `(P, N)`.
        reference_front: r, `(Q, N)`.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.

    >>> from peft_hoe.metrics import igd_plus
    >>> igd_plus([[0.5, 0.5]], [[0.5, 0.75], [0.75, 0.5]])  # 0.25 is missing to each
    0.25
    """
    front, reference = _pair(points, reference_front)
    return float(moocore.igd_plus(front, reference, maximise=True))


def epsilon(points: Any, reference_front: Any) -> float:
    """Additive ε: max over r of min over a of max_i (r_i − a_i), by how much all points must improve to cover the front.

    Negative where they cover it with room to spare. Smaller is better.

    Args:
        points: a, `(P, N)`.
        reference_front: r, `(Q, N)`.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.

    >>> from peft_hoe.metrics import epsilon
    >>> epsilon([[0.5, 0.5]], [[0.5, 0.75]])
    0.25
    """
    front, reference = _pair(points, reference_front)
    return float(moocore.epsilon_additive(front, reference, maximise=True))


def expected_utility(points: Any, preferences: Any) -> float:
    """Expected utility (EUM): mean over λ of max over a of λ·a, for a user who picks the best point; larger is better.

    Args:
        points: a, `(P, N)`.
        preferences: λ, `(K, N)`.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.
        PreferenceError: a row of `preferences` is no point of the simplex.

    >>> from peft_hoe.metrics import expected_utility
    >>> expected_utility([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.5, 0.5]])
    0.75
    """
    front = as_points(points)
    wanted = as_preferences(preferences, front.shape[1])
    return float((wanted @ front.T).max(axis=1).mean())


def spread(points: Any) -> float:
    """Maximum spread: √Σ_i (max a_i − min a_i)² over the non-dominated points, the diagonal of the box around them.

    Says how far the front reaches, not how good it is: report it beside the hypervolume only. A single point has 0.

    Args:
        points: a, `(P, N)`.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.

    >>> from peft_hoe.metrics import spread
    >>> spread([[0.0, 4.0], [3.0, 0.0]])
    5.0
    """
    front = _front(points)
    return float(np.linalg.norm(front.max(axis=0) - front.min(axis=0)))


def sparsity(points: Any) -> float:
    """Sparsity (Xu et al. 2020): Σ_i Σ_k (s_i(k+1) − s_i(k))² / (P − 1), with s_i objective i's values in order.

    Over the distinct non-dominated points; smaller is denser. A single point has 0, the best: report it beside the
    hypervolume only.

    Args:
        points: `(P, N)`.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.

    >>> from peft_hoe.metrics import sparsity
    >>> sparsity([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])  # (0.25 + 0.25) in each of two objectives, over 2 gaps
    0.5
    """
    front = _front(points)
    if len(front) == 1:
        return 0.0
    return float((np.diff(np.sort(front, axis=0), axis=0) ** 2).sum() / (len(front) - 1))


def _front(points: Any) -> FloatArray:
    """The distinct non-dominated points."""
    found = as_points(points)
    return np.asarray(np.unique(found[_mask(found)], axis=0))


def _pair(points: Any, reference_front: Any) -> tuple[FloatArray, FloatArray]:
    front = as_points(points)
    return front, as_points(reference_front, "reference_front", objectives=front.shape[1])
