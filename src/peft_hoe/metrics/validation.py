"""Checks that come before any computation: shapes first, then values.

moocore leaves out rows with NaN without a word, returns 0.0 for an empty front, and its version 0.1.7 ends the process
where there is one objective. None of that may reach a user.

Shapes: P points, N objectives, K preferences. Rows are points; the last axis is objectives; larger is better.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from ..errors import MetricError
from ..preference import FloatArray, parse_preference

# The reference point of this project, for rewards normalised by the payoff table: 0 is the nadir, 1 the ideal.
REFERENCE_POINT = -0.1

# moocore counts objectives in a byte, and its hypervolume takes no more than these.
MAX_OBJECTIVES = 31


def as_numbers(values: Any, name: str) -> FloatArray:
    """A float64 copy of an array, a tensor (any device, any precision) or nested sequences; None and masked become NaN.

    Args:
        values: what a user passed.
        name: what to call it in errors.

    Raises:
        MetricError: rows of different length, or something that is not a number.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    if isinstance(values, np.ma.MaskedArray):  # asarray would show what the mask hides
        values = np.ma.filled(values.astype(np.float64), np.nan)
    try:
        raw = np.asarray(values)
        if raw.dtype.kind not in "biufO":
            raise TypeError(f"it holds {raw.dtype}")
        return np.array(raw, dtype=np.float64, order="C")
    except (TypeError, ValueError, RuntimeError) as error:
        raise MetricError(
            f"{name} must be rows of numbers, all of the same length; {_why(values, error)}",
            argument=name, allowed="rows of numbers, all of the same length",
        ) from None  # fmt: skip


def _why(values: Any, error: Exception) -> str:
    with contextlib.suppress(TypeError):
        lengths = sorted({len(row) for row in values})
        if len(lengths) > 1:
            return f"its rows have {', '.join(map(str, lengths))} numbers"
    return str(error)


def as_points(values: Any, name: str = "points", *, objectives: int | None = None) -> FloatArray:
    """A front: `(P, N)` finite numbers with P ≥ 1 and 1 ≤ N ≤ 31, as a new float64 array.

    Args:
        values: `(P, N)`.
        name: what to call it in errors.
        objectives: N, where something else has fixed it.

    Raises:
        MetricError: empty, not two-dimensional, another N, NaN or infinite.
    """
    points = as_numbers(values, name)
    if points.size == 0:
        raise MetricError(
            f"{name} is empty (shape {points.shape}); give at least one point",
            argument=name, value=points.shape, allowed="at least one point",
        )  # fmt: skip
    if points.ndim != 2:
        hint = " (wrap a single point in a list)" if points.ndim == 1 else ""
        raise MetricError(
            f"{name} has shape {points.shape}; expected (points, objectives){hint}",
            argument=name, value=points.shape, allowed="(points, objectives)",
        )  # fmt: skip
    if points.shape[1] > MAX_OBJECTIVES:
        raise MetricError(
            f"{name} has {points.shape[1]} objectives; at most {MAX_OBJECTIVES} can be measured",
            argument=name, value=points.shape[1], allowed=f"at most {MAX_OBJECTIVES}",
        )  # fmt: skip
    if objectives is not None and points.shape[1] != objectives:
        raise MetricError(
            f"{name} has {points.shape[1]} objectives, but what it belongs to has {objectives}",
            argument=name, value=points.shape[1], allowed=objectives,
        )  # fmt: skip
    _refuse(
        np.isnan(points), name, "NaN (no reward)", "leave these rows out, or average over the prompts that have one"
    )
    _refuse(np.isinf(points), name, "infinity", "every number must be finite")
    return points


def _refuse(bad: Any, name: str, what: str, remedy: str) -> None:
    rows = np.flatnonzero(bad.any(axis=1))
    if len(rows):
        shown = ", ".join(map(str, rows[:5])) + (" ..." if len(rows) > 5 else "")
        raise MetricError(
            f"{name} holds {what} in {len(rows)} of {len(bad)} rows (row {shown}); {remedy}",
            argument=name, allowed="finite numbers",
        )  # fmt: skip


def as_point(values: Any, name: str, *, objectives: int | None = None) -> FloatArray:
    """One point `(N,)`.

    Raises:
        MetricError: empty, not one-dimensional, another N, NaN or infinite.
    """
    point = as_numbers(values, name)
    if point.ndim != 1:
        raise MetricError(
            f"{name} has shape {point.shape}; expected one point (objectives,)",
            argument=name, value=point.shape, allowed="(objectives,)",
        )  # fmt: skip
    return np.asarray(as_points(point[None], name, objectives=objectives)[0])


def check_reference_point(value: Any) -> FloatArray:
    """A reference point as it was given, `()` or `(N,)`, before N is known.

    Raises:
        MetricError: missing, neither a number nor a row of numbers, NaN or infinite.
    """
    if value is None:
        raise MetricError(
            "reference_point is missing: give one number for all objectives or one for each, fixed before anything is "
            f"measured. For rewards normalised by the payoff table use peft_hoe.metrics.REFERENCE_POINT = {REFERENCE_POINT}",
            argument="reference_point", allowed="one number for all objectives or one for each",
        )  # fmt: skip
    point = as_numbers(value, "reference_point")
    if point.ndim > 1 or point.size == 0:
        raise MetricError(
            f"reference_point has shape {point.shape}; give one number for all objectives or one for each",
            argument="reference_point", value=point.shape, allowed="one number for all objectives or one for each",
        )  # fmt: skip
    if not np.isfinite(point).all():
        raise MetricError(
            f"reference_point is {point.tolist()}; every number must be finite",
            argument="reference_point", value=point.tolist(), allowed="finite numbers",
        )  # fmt: skip
    return point


def as_reference_point(value: Any, objectives: int) -> FloatArray:
    """A reference point `(N,)` from a number for all objectives or N numbers.

    Raises:
        MetricError: missing, of another length, NaN or infinite.
    """
    point = check_reference_point(value)
    if point.size not in (1, objectives):
        raise MetricError(
            f"reference_point has {point.size} numbers, but there are {objectives} objectives; give one number for all of "
            f"them or {objectives} numbers",
            argument="reference_point", value=point.size, allowed=(1, objectives),
        )  # fmt: skip
    return np.array(np.broadcast_to(point, (objectives,)))


def as_preferences(values: Any, objectives: int, name: str = "preferences") -> FloatArray:
    """Preferences `(K, N)`, each scaled to sum to 1 exactly.

    Raises:
        MetricError: empty, not two-dimensional or another N.
        PreferenceError: negative, or a sum further than 2.5 % from 1.
    """
    rows = as_points(values, name, objectives=objectives)
    return parse_preference(rows, [f"objective {i}" for i in range(objectives)], rows=True)
