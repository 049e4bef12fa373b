"""Rows of different preferences at once where a model can tell rows apart, else one preference after the other.

Shapes: K rows, N objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import RowsError
from ..preference import FloatArray

T = TypeVar("T")


def by_preference(
    call: Callable[[NDArray[Any], FloatArray], T],
    preferences: FloatArray,
    join: Callable[[list[T], NDArray[Any]], T],
    *,
    mixed: bool = True,
) -> tuple[T, bool]:
    """What a call gives for all rows: together, or those of one preference at a time.

    Args:
        call: from row numbers `(M,)`, and a preference for each of them `(M, N)` or one for all `(N,)`, to M results.
        preferences: `(K, N)`.
        join: from the results of several calls, and for each of the K rows its place among all of them, to K results.
        mixed: whether to try all rows at once. A layer that cannot tell rows apart, such as a mixture of experts, refuses that.

    Returns:
        K results, and whether rows of different preferences ran together.
    """
    preferences = np.asarray(preferences, dtype=np.float64)
    if mixed:
        try:
            return call(np.arange(len(preferences)), preferences), True
        except RowsError:
            pass
    different, which = np.unique(preferences, axis=0, return_inverse=True)
    rows = [np.flatnonzero(which.reshape(-1) == number) for number in range(len(different))]
    parts = [call(some, preference) for some, preference in zip(rows, different, strict=True)]
    return join(parts, np.argsort(np.concatenate(rows))), False


def joined(parts: Sequence[Sequence[Any]], places: NDArray[Any]) -> list[Any]:
    """The `join` of lists."""
    every = [item for part in parts for item in part]
    return [every[place] for place in places]
