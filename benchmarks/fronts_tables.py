"""Tables of `fronts.py`: each method's front, and HoE against each other method.

Every number has the interval of one bootstrap over prompts (shared by all methods) and seeds of training. Ratios and
differences are taken within a replicate.

Shapes: K preferences, N objectives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_hoe import HoEWarning, metrics
from peft_hoe.evaluation import REFERENCE_POINT, Sweep
from peft_hoe.metrics import Interval

FloatArray = NDArray[np.float64]
REPLICATES = 1000


def hypervolume(points: FloatArray) -> float:
    """From the project's reference point."""
    return metrics.hypervolume(points, reference_point=REFERENCE_POINT)


class Front:
    """All methods on one set of objectives at one decoding.

    Args:
        sweeps: by method, on one scale.
        stored: parameters by method.
        times: CPU seconds for a token by method, with "one LoRA"; may be empty.
    """

    def __init__(self, sweeps: Mapping[str, Sweep], stored: Mapping[str, int], times: Mapping[str, float]) -> None:
        self.sweeps, self.stored, self.times = sweeps, stored, times
        first = sweeps["hoe"]
        values = {name: first.normalized(sweep.values) for name, sweep in sweeps.items()}
        for name, sweep in sweeps.items():  # between the one-hot preferences, and where MORLHF has policies
            values[f"{name}, interior"] = values[name][:, sweep.preferences.max(axis=1) < 1]
        if "morlhf" in sweeps:
            own = sweeps["morlhf"].preferences
            for name in sweeps:
                if name.startswith("hoe"):
                    at = [int(np.abs(sweeps[name].preferences - point).sum(axis=1).argmin()) for point in own]
                    values[f"{name}, own"] = values[name][:, at]
        self.drawn = metrics.bootstrap(values, replicates=REPLICATES)
        self.rows = {name: self._row(name) for name in sweeps}
        pairs = [(a, b) for a in sweeps for b in sweeps if a.startswith("hoe") and b != a and b != "hoe_trained"]
        self.pairs = {(a, b): self._pair(a, b) for a, b in pairs}

    def _interval(self, statistic: Callable[..., Any], *names: str) -> Interval:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HoEWarning)  # constant rewards of a method that knows no preference
            return self.drawn.interval(statistic, *names)

    def _row(self, name: str) -> dict[str, Any]:
        wanted = self.sweeps[name].preferences

        def followed(points: FloatArray) -> FloatArray:
            found = metrics.steerability(points, wanted)
            return np.asarray([found.control_regret, *found.spearman])

        names = list(self.sweeps)

        def igd_plus(*fronts: FloatArray) -> float:
            union = np.concatenate(fronts)
            return metrics.igd_plus(fronts[names.index(name)], union[metrics.non_dominated_mask(union)])

        steer = self._interval(followed, name)
        return {
            "seeds": len(self.sweeps[name].rewards),
            "preferences": len(wanted),
            "hypervolume": _numbers(self._interval(hypervolume, name)),
            "igd_plus": _numbers(self._interval(igd_plus, *names)),
            "control_regret": [float(x[0]) for x in (steer.estimate, steer.low, steer.high)],
            "spearman": [None if np.isnan(x) else float(x) for x in steer.estimate[1:]],
            "points": self.drawn.estimates[name].tolist(),
            "stored": self.stored[name],
            "relative_time": self.times[name] / self.times["one LoRA"] if name in self.times else None,
        }

    def _pair(self, a: str, b: str) -> dict[str, Any]:
        left, right = (f"{a}, own", b) if b == "morlhf" else (a, b)
        inner = [f"{name}, interior" if f"{name}, interior" in self.drawn.points else name for name in (left, right)]

        def ratio(x: FloatArray, y: FloatArray) -> float:
            whole = hypervolume(y)
            return hypervolume(x) / whole if whole > 0 else np.nan

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HoEWarning)
            much = self.drawn.share(lambda x, y: metrics.coverage(x, y) >= 0.9, *inner)
            little = self.drawn.share(lambda x, y: metrics.coverage(y, x) <= 0.1, *inner)
        return {
            "ratio": _numbers(self._interval(ratio, left, right)),
            "difference": _numbers(self._interval(lambda x, y: hypervolume(x) - hypervolume(y), left, right)),
            "coverage": _numbers(self._interval(metrics.coverage, *inner)),
            "coverage_back": _numbers(self._interval(lambda x, y: metrics.coverage(y, x), *inner)),
            "share_coverage_at_least_0.9": much,
            "share_coverage_back_at_most_0.1": little,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        first = self.sweeps["hoe"]
        return {
            "objectives": list(first.objectives),
            "payoff": None if first.normalizer is None else first.normalizer.payoff.tolist(),
            "reference_point": REFERENCE_POINT, "texts": first.rewards.shape[3], "prompts": len(first.prompts),
            "methods": self.rows, "pairs": {f"{a} / {b}": row for (a, b), row in self.pairs.items()},
        }  # fmt: skip

    def tables(self) -> str:
        """Two tables as markdown."""
        header = [
            "method", "seeds", "hypervolume", "IGD+", "control regret", "Spearman", "stored parameters", "time, one LoRA = 1",
        ]  # fmt: skip
        rows = [
            [
                name, str(row["seeds"]), _shown(row["hypervolume"]), _shown(row["igd_plus"]), _shown(row["control_regret"]),
                " / ".join("-" if x is None else f"{x:.2f}" for x in row["spearman"]), f"{row['stored'] / 1e3:.0f} k",
                "-" if row["relative_time"] is None else f"{row['relative_time']:.2f}",
            ]
            for name, row in self.rows.items()
        ]  # fmt: skip
        parts = [markdown(header, rows)]
        header = [
            "A / B", "hypervolume A / B", "A − B", "C(A, B)", "≥ 0.9 in", "C(B, A)", "≤ 0.1 in",
        ]  # fmt: skip
        rows = [
            [
                f"{a} / {b}", _shown(row["ratio"]), _shown(row["difference"]), _shown(row["coverage"]),
                f"{row['share_coverage_at_least_0.9']:.0%}", _shown(row["coverage_back"]),
                f"{row['share_coverage_back_at_most_0.1']:.0%}",
            ]
            for (a, b), row in self.pairs.items()
        ]  # fmt: skip
        return "\n\n".join([*parts, markdown(header, rows)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _numbers(interval: Interval) -> list[float]:
    return [float(interval.estimate), float(interval.low), float(interval.high)]


def _shown(numbers: Sequence[float]) -> str:
    estimate, low, high = numbers
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"
