"""Metrics of two sweeps against each other, with their uncertainty.

A comparison is on the scale and with the reference point of its first sweep, for both; each replicate draws the same
prompts for both. Differences come first, because a ratio blows up where its denominator is small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import metrics
from ...errors import HoEError
from ...metrics import Interval, Replicates
from ...preference import FloatArray
from ..sweeps.replicates import scaled_replicates
from ..sweeps.result import SweepResult
from .measures import POSITIVE, check_scale, compact, each_warning_once, shown, warn_of_scale

CONFIDENCE = 0.95  # share of the replicates in which "A dominates B" must hold to be said


@dataclass(frozen=True)
class SweepComparison:
    """Two sweeps, A and B.

    Attributes:
        names: of A and B.
        values: each metric with its interval.
        dominates: share of the replicates in which each point of B is dominated by some point of A.
        dominated: the other way round.
        reference_point: for both, in A's normalised rewards.
        clipped: how many points of A, and of B, lie below it in some objective and are clipped to it.
        level: of the intervals.
        replicates: number of bootstrap replicates.
    """

    names: tuple[str, str]
    values: dict[str, Interval]
    dominates: float
    dominated: float
    reference_point: list[float]
    clipped: tuple[int, int]
    level: float
    replicates: int

    def verdict(self) -> str:
        """One sentence on dominance."""
        a, b = self.names
        for share, first, second in ((self.dominates, a, b), (self.dominated, b, a)):
            if share >= CONFIDENCE:
                return f"{first} dominates {second} ({share:.1%} of the replicates)"
        shares = f"A over B in {self.dominates:.1%} of the replicates, B over A in {self.dominated:.1%}"
        return f"neither front dominates the other ({shares})"

    def table(self) -> str:
        """The comparison as text."""
        lines = [f"A = {self.names[0]}, B = {self.names[1]}: {self.verdict()}"]
        lines += [f"{name:<28}{shown(interval)}" for name, interval in self.values.items()]
        lines.append(self.note())
        return "\n".join(lines)

    def note(self, first: str = "A") -> str:
        """What the numbers depend on; `first` is what A is called."""
        point = compact(self.reference_point)
        below = " and ".join(f"{count} of {name}" for count, name in zip(self.clipped, self.names, strict=True))
        return (
            f"reference point {point} on {first}'s scale, below it (clipped) {below}; {self.level:.0%} intervals, "
            f"{self.replicates} replicates"
        )


def compare(
    a: SweepResult, b: SweepResult, *, level: float = 0.95, replicates: int = 1000, seed: int = 0
) -> SweepComparison:
    """Hypervolumes, coverage, ε, IGD+ and utility of A against B; prompts are drawn once for both.

    Raises:
        HoEError: they differ in objectives or prompts, or rewards without a scale.

    Warns:
        HoEWarning: a corner of `a` or `b` lies below the reference point of `a`, or the payoff table of `a` may be chance.
    """
    if a.objectives != b.objectives or a.prompts != b.prompts:
        what = "objectives" if a.objectives != b.objectives else "prompts"
        raise HoEError(
            f"{a.name!r} and {b.name!r} have different {what}; compare sweeps of the same prompts and objectives",
            argument=what, value=getattr(b, what), allowed=getattr(a, what),
        )  # fmt: skip
    check_scale(a)
    with each_warning_once():
        warn_of_scale(a, b)
        return _compare(a, b, level, replicates, seed)


def _compare(a: SweepResult, b: SweepResult, level: float, replicates: int, seed: int) -> SweepComparison:
    drawn = scaled_replicates(
        {"A": a.values, "B": b.values}, a.normalizer, own_corners=a.payoff_source == "own corners",
        replicates=replicates, seed=seed,
    )  # fmt: skip
    reference, wanted = a.reference_point, a.preferences

    def volume(points: FloatArray) -> float:
        return metrics.hypervolume(points, reference_point=reference)

    def utility(points: FloatArray) -> float:
        return metrics.expected_utility(points, wanted)

    pairs: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
        "hypervolume A - B": (lambda x, y: volume(x) - volume(y), ("A", "B")),
        "expected utility A - B": (lambda x, y: utility(x) - utility(y), ("A", "B")),
        "coverage C(A, B)": (metrics.coverage, ("A", "B")),
        "coverage C(B, A)": (metrics.coverage, ("B", "A")),
        "additive epsilon A to B": (metrics.epsilon, ("A", "B")),
        "additive epsilon B to A": (metrics.epsilon, ("B", "A")),
        "IGD+ A to union": (_igd_plus_to_union, ("A", "B")),
        "IGD+ B to union": (_igd_plus_to_union, ("B", "A")),
    }
    values = {label: drawn.interval(statistic, *names, level=level) for label, (statistic, names) in pairs.items()}
    values |= {
        f"hypervolume {name}": drawn.interval(volume, name, level=level, kind="basic", bounds=POSITIVE)
        for name in ("A", "B")
    }
    values |= _relative(drawn, volume, level)
    point = np.broadcast_to(np.asarray(reference, dtype=float), (len(a.objectives),))
    return SweepComparison(
        (a.name, b.name), values, drawn.share(metrics.front_dominates, "A", "B"),
        drawn.share(metrics.front_dominates, "B", "A"),
        point.tolist(), (_clipped(drawn.estimates["A"], point), _clipped(drawn.estimates["B"], point)), level, replicates,
    )  # fmt: skip


def _igd_plus_to_union(front: FloatArray, other: FloatArray) -> float:
    union = np.concatenate([front, other])
    return metrics.igd_plus(front, union[metrics.non_dominated_mask(union)])


def _relative(drawn: Replicates, volume: Callable[[FloatArray], float], level: float) -> dict[str, Interval]:
    """HV(A) / HV(B); NaN, and counted as undefined, in replicates where B encloses nothing."""

    def ratio(a: FloatArray, b: FloatArray) -> float:
        whole = volume(b)
        return volume(a) / whole if whole > 0 else np.nan

    return {"relative hypervolume A / B": drawn.interval(ratio, "A", "B", level=level)}


def _clipped(points: FloatArray, reference: FloatArray) -> int:
    return int((points < reference).any(axis=1).sum())
