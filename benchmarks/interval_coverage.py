"""Which intervals of a front hold what they should hold: percentiles, basic ones and BCa, on fronts whose truth is known.

    python benchmarks/interval_coverage.py

A prompt's rewards at 11 preferences of two objectives are the front's mean, a difficulty of the prompt that all preferences
share, and noise of its own; 120 prompts, 100 data sets. Method B has the same prompts, and a front that lies 0.05 further in.
Each data set gets 500 replicates and three 95 % intervals: percentiles, the basic interval, and BCa (Efron 1987) with an
acceleration from a jackknife over prompts; the nearer end is moved to the estimate where they do not hold it. A steep front has
corners one apart, a flat one 0.1, which is as much as the noise of a mean. About 5 minutes on one core.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from peft_hoe import metrics, preference_grid
from peft_hoe.errors import HoEWarning

FloatArray = NDArray[np.float64]
Statistic = Callable[..., float]
PROMPTS, DATA_SETS, REPLICATES = 120, 100, 500
INWARD = 0.05  # of the second method
SHARED, OWN = 0.5, 1.0  # standard deviations of one reward
DIAL = preference_grid(2)  # (K, 2)


def means(reach: float) -> FloatArray:
    """A quarter of a circle from one corner to the other, `(K, 2)`."""
    angle = np.pi / 2 * DIAL[:, 0]
    return reach * np.stack([np.sin(angle), np.cos(angle)], axis=1)


def volume(points: FloatArray) -> float:
    """From a reference point that lies well below the lowest mean."""
    return metrics.hypervolume(points, reference_point=-0.5)


STATISTICS: dict[str, tuple[Statistic, tuple[str, ...]]] = {
    "hypervolume A": (volume, ("A",)),
    "hypervolume A - B": (lambda a, b: volume(a) - volume(b), ("A", "B")),
    "hypervolume A / B": (lambda a, b: volume(a) / volume(b), ("A", "B")),
    "control regret A": (lambda a: metrics.control_regret(a, DIAL), ("A",)),
    "Spearman A": (lambda a: metrics.spearman(a, DIAL)[0], ("A",)),
}


def intervals(rewards: dict[str, FloatArray], statistic: Statistic, names: tuple[str, ...]) -> dict[str, Any]:
    """The three of one data set, each `(2,)`; rewards are `(1, K, P, 2)`."""
    drawn = metrics.bootstrap(rewards, replicates=REPLICATES, seed=0)
    estimate = float(statistic(*(drawn.estimates[name] for name in names)))
    values = np.asarray([statistic(*(drawn.points[name][r] for name in names)) for r in range(REPLICATES)])
    low, high = np.quantile(values, bca_levels(values, estimate, left_out(rewards, statistic, names)))
    return {
        "percentiles": metrics.percentile_interval(estimate, values),
        "basic": metrics.basic_interval(estimate, values),
        "BCa": (min(low, estimate), max(high, estimate)),
    }


def left_out(rewards: dict[str, FloatArray], statistic: Statistic, names: tuple[str, ...]) -> FloatArray:
    """The statistic without each of the prompts in turn, `(P,)`."""
    sums = {name: rewards[name][0].sum(axis=1) for name in names}
    return np.asarray(
        [statistic(*((sums[name] - rewards[name][0][:, p]) / (PROMPTS - 1) for name in names)) for p in range(PROMPTS)]
    )


def bca_levels(values: FloatArray, estimate: float, jackknife: FloatArray) -> FloatArray:
    """Which quantiles of the replicates are the ends of a 95 % interval."""
    below = np.clip((values < estimate).mean(), 1 / (2 * len(values)), 1 - 1 / (2 * len(values)))
    bias, away = norm.ppf(below), jackknife.mean() - jackknife
    spread = (away**2).sum() ** 1.5
    acceleration = (away**3).sum() / (6 * spread) if spread > 0 else 0.0
    ends = bias + norm.ppf([0.025, 0.975])
    return np.asarray(norm.cdf(bias + ends / (1 - acceleration * ends)))


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore", HoEWarning)  # points below the reference point
    rng = np.random.default_rng(0)
    print("| front | statistic | interval | holds the truth | mean width |\n|---|---|---|---|---|")
    for kind, reach in (("steep", 1.0), ("flat", 0.1)):
        true = {"A": means(reach), "B": means(reach) - INWARD}
        found: dict[str, list[dict[str, Any]]] = {what: [] for what in STATISTICS}
        for _ in range(DATA_SETS):
            shared = rng.normal(0, SHARED, (1, 1, PROMPTS, 2))
            rewards = {
                name: points[None, :, None] + shared + rng.normal(0, OWN, (1, len(DIAL), PROMPTS, 2))
                for name, points in true.items()
            }
            for what, (statistic, names) in STATISTICS.items():
                found[what].append(intervals(rewards, statistic, names))
        for what, (statistic, names) in STATISTICS.items():
            truth = statistic(*(true[name] for name in names))
            for name in ("percentiles", "basic", "BCa"):
                low, high = np.asarray([one[name] for one in found[what]]).T
                held = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
                print(f"| {kind} | {what} | {name} | {held.mean():.0%} | {(high - low).mean():.3f} |", flush=True)


if __name__ == "__main__":
    main()
