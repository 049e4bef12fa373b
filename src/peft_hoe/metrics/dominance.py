"""Pareto dominance of points and fronts, all maximised.

a dominates b where a is nowhere worse and somewhere better: a_i ≥ b_i for all i and a_i > b_i for some i. Equal points do not
dominate each other, so no front covers itself.

Shapes: P and Q points, N objectives.
"""

from __future__ import annotations

from typing import Any

import moocore
import numpy as np
from numpy.typing import NDArray

from ..preference import FloatArray
from .validation import as_point, as_points


def dominates(a: Any, b: Any) -> bool:
    """Whether point `a` `(N,)` dominates point `b` `(N,)`.

    Raises:
        MetricError: not two points of the same N, NaN or infinite.

    >>> from peft_hoe.metrics import dominates
    >>> dominates([1.0, 2.0], [1.0, 1.5]), dominates([1.0, 2.0], [1.0, 2.0])
    (True, False)
    """
    first = as_point(a, "a")
    second = as_point(b, "b", objectives=len(first))
    return bool((first >= second).all() and (first > second).any())


def non_dominated_mask(points: Any) -> NDArray[np.bool_]:
    """Which of `points` `(P, N)` no other one dominates, `(P,)`; duplicates of such a point are all True.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.

    >>> from peft_hoe.metrics import non_dominated_mask
    >>> non_dominated_mask([[0.0, 1.0], [1.0, 0.0], [0.5, 0.2], [0.4, 0.1]]).tolist()
    [True, True, True, False]
    """
    return _mask(as_points(points))


def _mask(front: FloatArray) -> NDArray[np.bool_]:
    if front.shape[1] == 1:  # moocore 0.1.7 keeps one of several equal points here
        return np.asarray(front[:, 0] == front.max())
    return np.asarray(moocore.is_nondominated(front, maximise=True, keep_weakly=True), dtype=bool)


def coverage(a: Any, b: Any, *, strict: bool = True) -> float:
    """Set coverage C(A, B): the share of the points of `b` that some point of `a` dominates.

    Not symmetric: report C(A, B) and C(B, A). Memory grows with P · Q · N.

    Args:
        a: `(P, N)`.
        b: `(Q, N)`.
        strict: False counts equal points as covered too, as Zitzler and Thiele (1999) do.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.

    >>> from peft_hoe.metrics import coverage
    >>> coverage([[1.0, 1.0]], [[0.5, 0.5], [2.0, 0.0]])
    0.5
    """
    first, second = _fronts(a, b)
    covered = (first[:, None] >= second).all(axis=-1)  # (P, Q)
    if strict:
        covered &= (first[:, None] > second).any(axis=-1)
    return float(covered.any(axis=0).mean())


def front_dominates(a: Any, b: Any) -> bool:
    """Whether some point of `a` `(P, N)` dominates each point of `b` `(Q, N)`: C(A, B) = 1.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.

    >>> from peft_hoe.metrics import front_dominates
    >>> front_dominates([[1.0, 1.0]], [[0.5, 0.5], [0.2, 0.9]])
    True
    """
    return coverage(a, b) == 1.0


def union_shares(a: Any, b: Any) -> tuple[float, float]:
    """The share of the points of `a` `(P, N)`, and of `b` `(Q, N)`, that nothing in A ∪ B dominates.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.

    >>> from peft_hoe.metrics import union_shares
    >>> union_shares([[1.0, 1.0]], [[0.5, 0.5], [2.0, 0.0]])
    (1.0, 0.5)
    """
    first, second = _fronts(a, b)
    mask = _mask(np.concatenate([first, second]))
    return float(mask[: len(first)].mean()), float(mask[len(first) :].mean())


def _fronts(a: Any, b: Any) -> tuple[FloatArray, FloatArray]:
    first = as_points(a, "a")
    return first, as_points(b, "b", objectives=first.shape[1])
