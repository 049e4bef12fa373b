"""Intervals of a bootstrap: between percentiles of its replicates, or basic ones, which take off the bias of a maximum.

Shapes: R replicates.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..preference import FloatArray


@dataclass(frozen=True)
class Interval:
    """A statistic with its bootstrap interval; each is a number or an array of the statistic's shape.

    Percentiles of the replicates suit means, and differences of two methods, where most of a bias cancels. What is a maximum
    over noisy means, such as a hypervolume, is too large on average, and its replicates are so once more. The basic interval
    takes that off: its ends lie as far from the estimate as the percentiles do, on the other side, 2 e - high and 2 e - low
    (Davison and Hinkley 1997, eq. 5.6). Where the estimate lies outside, the nearer end is moved to it.

    >>> from peft_hoe.metrics import bootstrap
    >>> drawn = bootstrap({"hoe": [[[[1.0, 0.0], [1.0, 2.0]]]]}, replicates=100)
    >>> interval = drawn.interval(lambda points: points[0])
    >>> interval.estimate.tolist(), interval.low.tolist(), interval.high.tolist()
    ([1.0, 1.0], [1.0, 0.0], [1.0, 2.0])
    """

    estimate: FloatArray
    """Of the mean points of everything that was measured."""
    low: FloatArray
    high: FloatArray
    level: float
    undefined: NDArray[np.int64]
    """In how many replicates the statistic was NaN; they are left out."""
    warnings: list[str] = field(default_factory=list)


def basic_interval(estimate: Any, values: FloatArray, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """The ends of the basic bootstrap interval, which hold the estimate; see `Interval`.

    Args:
        estimate: any shape.
        values: of the replicates, `(R, ...)`; NaN are left out.
        level: share of the replicates inside.

    >>> import numpy as np
    >>> from peft_hoe.metrics import basic_interval
    >>> low, high = basic_interval(10.0, np.linspace(9, 15, 101), level=0.9)  # percentiles 9.3 and 14.7
    >>> round(float(low), 3), round(float(high), 3)
    (5.3, 10.7)
    """
    low, high = _percentiles(values, level)
    return np.fmin(2 * estimate - high, estimate), np.fmax(2 * estimate - low, estimate)


def percentile_interval(estimate: Any, values: FloatArray, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """The ends of the percentile interval, moved to the estimate where they do not hold it; arguments as `basic_interval`.

    >>> import numpy as np
    >>> from peft_hoe.metrics import percentile_interval
    >>> low, high = percentile_interval(9.1, np.linspace(9, 15, 101), level=0.9)
    >>> round(float(low), 3), round(float(high), 3)
    (9.1, 14.7)
    """
    low, high = _percentiles(values, level)
    return np.fmin(low, estimate), np.fmax(high, estimate)


def _percentiles(values: FloatArray, level: float) -> FloatArray:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)  # said in Interval.undefined
        found: FloatArray = np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)], axis=0)
    return found


KINDS = {"percentile": percentile_interval, "basic": basic_interval}
