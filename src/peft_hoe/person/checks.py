"""Checks of what a `PreferenceEstimate` is given: each returns the value in its plain form, or raises a HoEError that names it.

Shapes: N objectives, T texts.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import HoEError
from ..preference import FloatArray


def names(objectives: Any) -> list[str]:
    """The N names, each once."""
    given = list(objectives) if isinstance(objectives, Iterable) and not isinstance(objectives, str) else []
    if not given or not all(isinstance(name, str) for name in given) or len(set(given)) < len(given):
        raise HoEError(
            f"objectives is {objectives!r}; give a list of names, each once", argument="objectives", value=objectives
        )
    return given


def sharpness(given: Any) -> float:
    """κ."""
    try:
        found = float(given)
    except (TypeError, ValueError):
        found = -1.0
    if not 0 < found < float("inf"):
        raise HoEError(
            f"sharpness is {given!r}; give a positive number, such as 7.3, or None to learn it",
            argument="sharpness",
            value=given,
            allowed="above 0",
        )
    return found


def choices(given: Any, most: int) -> int:
    """How many choices are taken back."""
    try:
        found = operator.index(given)
    except TypeError:
        found = -1
    if not 0 <= found <= most:
        raise HoEError(
            f"choices is {given!r}, but there are {most} choices; give a whole number",
            argument="choices",
            value=given,
            allowed=f"0 to {most}",
        )
    return found


def level(given: Any) -> float:
    """A share between 0 and 1."""
    if not isinstance(given, (int, float)) or not 0 < given < 1:
        raise HoEError(
            f"level is {given!r}; give a share between 0 and 1", argument="level", value=given, allowed="0 to 1"
        )
    return float(given)


def rewards(given: Any, objectives: Sequence[str], argument: str) -> FloatArray:
    """A finite reward for each objective and no other, `(N,)`."""
    found = _row(given, objectives)
    if found is None:
        raise HoEError(
            f"{argument} is {given!r}; give a finite reward for each of {list(objectives)}",
            argument=argument,
            value=given,
            allowed=list(objectives),
        )
    return found


def texts(given: Any, objectives: Sequence[str]) -> FloatArray:
    """Finite rewards of texts, `(T, N)`."""
    rows = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Mapping)) else []
    found = [_row(row, objectives) for row in rows]
    known = [row for row in found if row is not None]
    if not known or len(known) < len(found):
        wrong = given if not found else rows[next(k for k, row in enumerate(found) if row is None)]
        raise HoEError(
            f"texts has {wrong!r}; give finite rewards of at least two texts, a row for each, with a number for each of "
            f"{list(objectives)}",
            argument="texts",
            value=wrong,
            allowed=list(objectives),
        )
    return np.stack(known)


def _row(given: Any, objectives: Sequence[str]) -> FloatArray | None:
    """One text's rewards `(N,)`; None where they are none."""
    if isinstance(given, Mapping):
        if set(given) != set(objectives):
            return None
        given = [given[name] for name in objectives]
    try:
        found = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return found if found.shape == (len(objectives),) and np.isfinite(found).all() else None
