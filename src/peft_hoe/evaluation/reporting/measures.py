"""Metrics of a sweep, with their uncertainty.

Points are means over prompts and runs, on the payoff table's scale; intervals are those of the hierarchical bootstrap of
`peft_hoe.metrics`, in which the table's own prompts are drawn, too.

Shapes: K preferences, N objectives.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ... import metrics
from ...errors import HoEError, HoEWarning, PreferenceError
from ...metrics import HypervolumeRecord, Interval, Replicates
from ...preference import FloatArray
from ...triangulation import triangulate
from ..sweeps.result import REFERENCE_POINT, SweepResult

POSITIVE = (0.0, np.inf)  # what areas and lengths lie between


@dataclass(frozen=True)
class SweepMetrics:
    """Metrics of one sweep.

    Attributes:
        name: the method's.
        values: each metric with its interval.
        front: the hypervolume with its reference point, and how many points there are, non-dominated and clipped.
        payoff_source: what the scale is; None for raw rewards.
        level: of the intervals.
        replicates: number of bootstrap replicates.
        runs: S, runs of training.
    """

    name: str
    values: dict[str, Interval]
    front: HypervolumeRecord
    payoff_source: str | None
    level: float
    replicates: int
    runs: int

    def table(self) -> str:
        """The metrics as text."""
        lines = [f"{name:<28}{shown(interval)}" for name, interval in self.values.items()]
        return "\n".join([*lines, self.note()])

    def note(self) -> str:
        """What the hypervolume depends on."""
        scale = (
            "raw rewards" if self.payoff_source is None else f"normalised by the payoff table ({self.payoff_source})"
        )
        return (
            f"reference point {compact(self.front.reference_point)}, {scale}; {self.front.points} points, "
            f"{self.front.non_dominated} not dominated, {self.front.clipped} below the reference point (clipped); "
            f"{self.level:.0%} intervals, {self.replicates} replicates, {self.runs} run{'s' * (self.runs > 1)}"
        )


def measure(sweep: SweepResult, *, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> SweepMetrics:
    """Hypervolume, utilities, control regret, spread, sparsity, gaps, and for each objective Spearman and order violations.

    Steerability and gaps need two preferences at least, and gaps two objectives; without them they are left out.

    Raises:
        HoEError: rewards without a scale and the project's reference point, which is for normalised ones.
    """
    check_scale(sweep)
    with each_warning_once():
        warn_of_scale(sweep)
        return _measure(sweep, level, replicates, seed)


def _measure(sweep: SweepResult, level: float, replicates: int, seed: int) -> SweepMetrics:
    drawn = sweep.replicates(replicates, seed)
    reference, wanted = sweep.reference_point, sweep.preferences
    values = {
        "hypervolume": drawn.interval(
            lambda a: metrics.hypervolume(a, reference_point=reference), level=level, kind="basic", bounds=POSITIVE
        )
    }
    if len(wanted) > 1:
        limits = _limits(len(sweep.objectives))
        parts = drawn.interval(lambda a: _steerability(a, wanted), level=level, kind="basic", bounds=limits)
        labels = [f"{what} {name}" for what in ("Spearman", "order violations") for name in sweep.objectives]
        labels = ["expected utility", "control regret", *labels]
        values |= {label: _part(parts, i) for i, label in enumerate(labels)}
        values |= _spacing(drawn, wanted, level)
    values["spread"] = drawn.interval(metrics.spread, level=level, kind="basic", bounds=POSITIVE)
    values["sparsity"] = drawn.interval(metrics.sparsity, level=level, kind="basic", bounds=POSITIVE)
    front = metrics.hypervolume_record(drawn.estimates[sweep.name], reference_point=reference)
    source = None if sweep.normalizer is None else sweep.payoff_source
    return SweepMetrics(sweep.name, values, front, source, level, replicates, len(sweep.rewards))


def shown(interval: Interval) -> str:
    """A number with its interval."""
    undefined = f"   (undefined in {int(interval.undefined)} replicates)" if int(interval.undefined) else ""
    return f"{float(interval.estimate):8.4f}  [{float(interval.low):.4f}, {float(interval.high):.4f}]{undefined}"


def compact(point: list[float]) -> str:
    """A reference point: one number where all are equal."""
    return f"{point[0]:g}" if len(set(point)) == 1 else "[" + ", ".join(f"{number:g}" for number in point) + "]"


def check_scale(sweep: SweepResult) -> None:
    """Refuse rewards that are not on the scale of their reference point.

    Raises:
        HoEError: rewards without a scale and the project's reference point, which is for normalised ones.
    """
    if not sweep.has_scale:
        raise HoEError(
            f"the rewards of {sweep.name!r} are not normalised, and {REFERENCE_POINT} is a reference point for normalised "
            "ones; set sweep.normalizer to a RewardNormalizer, or sweep.reference_point to a point of raw rewards that was "
            "fixed beforehand",
            argument="normalizer", allowed="a RewardNormalizer, or a reference_point of raw rewards",
        )  # fmt: skip


def warn_of_scale(sweep: SweepResult, *others: SweepResult) -> None:
    """Say where a hypervolume means little: a corner of a sweep lies below the reference point, or a spread is chance.

    Args:
        sweep: whose scale and reference point count.
        others: sweeps that are compared with it.
    """
    if sweep.normalizer is None:
        return
    for one in (sweep, *others):
        _warn_of_corners(one, sweep)
    sweep.normalizer.tell_uncertain(stacklevel=4)


def _warn_of_corners(sweep: SweepResult, scale: SweepResult) -> None:
    point = np.broadcast_to(np.asarray(scale.reference_point, dtype=float), (len(sweep.objectives),))
    points = scale.normalized(sweep.points)
    for corner, name in zip(np.eye(len(sweep.objectives)), sweep.objectives, strict=True):
        rows = np.flatnonzero(np.abs(sweep.preferences - corner).max(axis=1) < 1e-9)
        if len(rows) and (points[rows[0]] < point).any():
            warnings.warn(
                f"{sweep.name!r} steered to {name!r} alone lies at {np.round(points[rows[0]], 3).tolist()}, below the "
                f"reference point {compact(point.tolist())}, and encloses nothing; the payoff table ({scale.payoff_source}) "
                "was measured on other prompts or another model, or the experts hardly differ",
                HoEWarning,
                stacklevel=4,
            )


def _steerability(points: FloatArray, preferences: FloatArray) -> FloatArray:
    found = metrics.steerability(points, preferences)
    return np.asarray(
        [found.expected_utility, found.control_regret, *found.spearman, *found.order_violations], dtype=np.float64
    )


def _limits(n: int) -> tuple[FloatArray, FloatArray]:
    """What the parts of `_steerability` lie between."""
    return np.asarray([-np.inf, 0, *[-1] * n, *[0] * n]), np.asarray([np.inf, np.inf, *[1] * 2 * n])


def _spacing(drawn: Replicates, preferences: FloatArray, level: float) -> dict[str, Interval]:
    """What users get on average, and how evenly the dial goes through the front."""
    found = {"mean inner product": drawn.interval(lambda a: metrics.mean_inner_product(a, preferences), level=level)}
    try:
        triangulate(preferences)
    except PreferenceError:  # one objective, or preferences that span too little
        return found

    def gaps(points: FloatArray) -> FloatArray:
        """The CV, and the smallest gap over the largest, which is finite."""
        if not np.ptp(points, axis=0).any():
            return np.full(2, np.nan)
        return np.asarray([metrics.gap_variation(points, preferences), 1 / metrics.gap_ratio(points, preferences)])

    parts = drawn.interval(gaps, level=level, kind="basic", bounds=(0, np.asarray([np.inf, 1])))
    inverse = _part(parts, 1)
    with np.errstate(divide="ignore"):
        estimate, high, low = (np.float64(1) / part for part in (inverse.estimate, inverse.low, inverse.high))
    return {
        **found,
        "CV of gaps": _part(parts, 0),
        "gap ratio": Interval(estimate, low, high, level, inverse.undefined),
    }


def _part(interval: Interval, i: int) -> Interval:
    return Interval(interval.estimate[i], interval.low[i], interval.high[i], interval.level, interval.undefined[i])


@contextlib.contextmanager
def each_warning_once() -> Iterator[None]:
    """Several metrics warn of the same thing, such as a front below the reference point."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = set()
    for item in caught:
        if not issubclass(item.category, HoEWarning):
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
        elif str(item.message) not in told:
            told.add(str(item.message))
            warnings.warn(str(item.message), HoEWarning, stacklevel=5)
