"""Hypervolume: how much of the objective space a front dominates above a reference point. All objectives are maximised.

The value means nothing without its reference point, so that is required, recorded, and the same for everything that is
compared. Fix it before any method is run: a reference point taken from the union of what is compared lets a bad baseline
change the ratios. The project's own is `REFERENCE_POINT` in rewards normalised by the payoff table.

Shapes: P points, N objectives.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import moocore
import numpy as np

from ..errors import HoEWarning, MetricError
from ..preference import FloatArray
from .dominance import _mask
from .validation import as_points, as_reference_point

ROUNDING = 1e-9  # hypervolumes that differ by no more are equal: those of the same points in another order


@dataclass(frozen=True)
class HypervolumeRecord:
    """A hypervolume with what it depends on.

    >>> from peft_hoe.metrics import hypervolume_record
    >>> record = hypervolume_record([[1.0, 1.0], [2.0, -1.0]], reference_point=0.0)
    >>> record.hypervolume, record.points, record.clipped
    (1.0, 2, 1)
    """

    hypervolume: float
    reference_point: list[float]
    points: int
    """How many there were."""
    non_dominated: int
    """How many of them no other one dominates."""
    clipped: int
    """How many lie below the reference point in some objective; clipped to it, they enclose nothing."""
    warnings: list[str] = field(default_factory=list)


def hypervolume_record(points: Any, *, reference_point: Any) -> HypervolumeRecord:
    """The hypervolume of `points`, its reference point and the counts; warnings are issued and kept.

    Args:
        points: `(P, N)`. The order, duplicates and dominated points make no difference to the value.
        reference_point: a number for all objectives, or `(N,)`.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite, in the points or the reference point.

    Warns:
        HoEWarning: no point is above the reference point in every objective; the value is 0.

    >>> from peft_hoe.metrics import hypervolume_record
    >>> hypervolume_record([[1.0, 2.0], [2.0, 1.0]], reference_point=[0.0, 0.0]).hypervolume
    3.0
    """
    front = as_points(points)
    reference = as_reference_point(reference_point, front.shape[1])
    inside = (front > reference).all(axis=1)
    notes = [] if inside.any() else [_nothing_inside(front, reference)]
    for note in notes:
        warnings.warn(note, HoEWarning, stacklevel=2)
    return HypervolumeRecord(
        hypervolume=_volume(front[inside], reference),
        reference_point=reference.tolist(),
        points=len(front),
        non_dominated=int(_mask(front).sum()),
        clipped=int((front < reference).any(axis=1).sum()),
        warnings=notes,
    )


def _nothing_inside(front: FloatArray, reference: FloatArray) -> str:
    return (
        f"the hypervolume is 0: no point is above the reference point {reference.tolist()} in every objective; the best of "
        f"each objective are {front.max(axis=0).tolist()}. Check that rewards and reference point are on the same scale"
    )


def _volume(inside: FloatArray, reference: FloatArray) -> float:
    """Of points that are above the reference point in every objective."""
    if not len(inside):
        return 0.0
    if len(reference) == 1:  # moocore 0.1.7 ends the process here
        return float(inside.max() - reference[0])
    return float(moocore.hypervolume(inside, ref=reference, maximise=True))


def hypervolume(points: Any, *, reference_point: Any) -> float:
    """The volume of {z : reference_point ≤ z ≤ a for some point a}; see `hypervolume_record`.

    Args:
        points: `(P, N)`.
        reference_point: a number for all objectives, or `(N,)`.

    Raises:
        MetricError: empty, wrong shape, NaN or infinite, in the points or the reference point.

    Warns:
        HoEWarning: no point is above the reference point in every objective; the value is 0.

    >>> from peft_hoe.metrics import hypervolume
    >>> hypervolume([[1.0, 2.0], [2.0, 1.0]], reference_point=0.0)
    3.0
    """
    return hypervolume_record(points, reference_point=reference_point).hypervolume


def relative_hypervolume(points: Any, reference_front: Any, *, reference_point: Any) -> float:
    """HV(points) / HV(reference front), both from the same reference point; larger is better.

    moocore's `RelativeHypervolume` is 1 minus this.

    Args:
        points: `(P, N)`.
        reference_front: `(Q, N)`, what the value 1 stands for.
        reference_point: a number for all objectives, or `(N,)`.

    Raises:
        MetricError: as `hypervolume`, or the hypervolume of the reference front is 0.

    Warns:
        HoEWarning: no point is above the reference point in every objective; the value is 0.

    >>> from peft_hoe.metrics import relative_hypervolume
    >>> relative_hypervolume([[1.0, 1.0]], [[1.0, 2.0]], reference_point=0.0)
    0.5
    """
    front = as_points(points)
    other = as_points(reference_front, "reference_front", objectives=front.shape[1])
    reference = as_reference_point(reference_point, front.shape[1])
    whole = _volume(other[(other > reference).all(axis=1)], reference)
    if whole == 0:
        raise MetricError(
            f"the reference front has hypervolume 0 at the reference point {reference.tolist()}, so nothing can be "
            f"relative to it; the best of each of its objectives are {np.asarray(other.max(axis=0)).tolist()}",
            argument="reference_point", value=reference.tolist(), allowed="below some point of the reference front",
        )  # fmt: skip
    return hypervolume(front, reference_point=reference) / whole
