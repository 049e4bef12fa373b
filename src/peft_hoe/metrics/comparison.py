"""Two fronts side by side: who dominates whom, and by how much. All objectives are maximised.

Shapes: P and Q points, N objectives.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from ..errors import HoEWarning
from .dominance import _mask, coverage, union_shares
from .indicators import epsilon
from .validation import as_points


@dataclass(frozen=True)
class Comparison:
    """Front A (predictions) and front B (references).

    >>> from peft_hoe.metrics import compare_fronts
    >>> found = compare_fronts([[1.0, 1.0]], [[0.5, 0.5], [2.0, 0.0]])
    >>> found.dominates, found.coverage_predictions, found.epsilon_predictions
    (False, 0.5, 1.0)
    """

    dominates: bool
    """Whether each point of B is dominated by some point of A."""
    dominated: bool
    """The other way round."""
    coverage_predictions: float
    """C(A, B): the share of B's points that A dominates."""
    coverage_references: float
    """C(B, A)."""
    share_predictions: float
    """The share of A's points that nothing in A ∪ B dominates."""
    share_references: float
    epsilon_predictions: float
    """Additive ε of A towards B: by how much A's points must improve to cover B; negative where they do with room to spare."""
    epsilon_references: float
    points_predictions: int
    points_references: int
    non_dominated_predictions: int
    """How many points of A no other one of A dominates."""
    non_dominated_references: int
    warnings: list[str] = field(default_factory=list)


def compare_fronts(a: Any, b: Any) -> Comparison:
    """All comparisons of fronts `a` and `b`.

    Args:
        a: `(P, N)`.
        b: `(Q, N)`.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite.

    Warns:
        HoEWarning: both fronts have the same points, so that neither dominates the other.

    >>> from peft_hoe.metrics import compare_fronts
    >>> compare_fronts([[1.0, 1.0]], [[0.5, 0.5]]).dominates
    True
    """
    first = as_points(a, "front A (predictions)")
    second = as_points(b, "front B (references)", objectives=first.shape[1])
    forward, backward = coverage(first, second), coverage(second, first)
    shares = union_shares(first, second)
    notes = []
    if {*map(tuple, first.tolist())} == {*map(tuple, second.tolist())}:
        notes.append("both fronts have the same points: neither dominates the other")
    for note in notes:
        warnings.warn(note, HoEWarning, stacklevel=2)
    return Comparison(
        dominates=forward == 1.0,
        dominated=backward == 1.0,
        coverage_predictions=forward,
        coverage_references=backward,
        share_predictions=shares[0],
        share_references=shares[1],
        epsilon_predictions=epsilon(first, second),
        epsilon_references=epsilon(second, first),
        points_predictions=len(first),
        points_references=len(second),
        non_dominated_predictions=int(_mask(first).sum()),
        non_dominated_references=int(_mask(second).sum()),
        warnings=notes,
    )
