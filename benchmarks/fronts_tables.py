"""Tables of `fronts.py`: each method's front, and HoE against each other method.

Every number has the interval of one bootstrap over prompts (shared by all methods), seeds of training and the payoff table's
prompts. Ratios and differences are taken within a replicate.

Shapes: K preferences, N objectives, R replicates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from front_differences import rows_at
from peft_hoe import HoEWarning, metrics
from peft_hoe.evaluation import REFERENCE_POINT, Sweep
from peft_hoe.evaluation.sweeps.replicates import scaled_replicates

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
        own_prompts: whether the payoff table was measured on the sweeps' own prompts.
    """

    def __init__(
        self,
        sweeps: Mapping[str, Sweep],
        stored: Mapping[str, int],
        times: Mapping[str, float],
        own_prompts: bool = False,
    ) -> None:
        self.sweeps, self.stored, self.times = sweeps, stored, times
        first = sweeps["hoe"]
        self.table = first.normalizer
        values = {name: sweep.values for name, sweep in sweeps.items()}
        for name, sweep in sweeps.items():  # between the one-hot preferences, and where MORLHF has policies
            values[f"{name}, interior"] = values[name][:, sweep.preferences.max(axis=1) < 1]
        if "morlhf" in sweeps:
            own = sweeps["morlhf"].preferences
            for name in sweeps:
                if name.startswith("hoe"):
                    values[f"{name}, own"] = values[name][:, rows_at(sweeps[name], own)]
        self.drawn = scaled_replicates(values, self.table, own_corners=own_prompts, replicates=REPLICATES, seed=0)
        self.points = {name: self._with_estimate(name) for name in values}
        self.volumes = {
            name: _of_each(hypervolume, fronts) for name, fronts in self.points.items() if "interior" not in name
        }
        self.igd_plus = self._igd_plus()
        self.rows = {name: self._row(name) for name in sweeps}
        routed = ("hoe_trained", "hoe_merged_trained")
        pairs = [
            (a, b)
            for a in ("hoe", "hoe_pairs", *routed)
            for b in sweeps
            if b not in (a, *routed) and not b.startswith("hoe_same")  # of other policies
        ]
        pairs += [routed, ("hoe_same", "morlhf"), ("hoe_same_merged_trained", "morlhf")]
        self.pairs = {(a, b): self._pair(a, b) for a, b in pairs if {a, b} <= set(sweeps)}

    def _with_estimate(self, name: str) -> FloatArray:
        """Mean points `(1 + R, K, N)`: of everything that was measured, then of the replicates."""
        return np.concatenate([self.drawn.estimates[name][None], self.drawn.points[name]])

    def _igd_plus(self) -> dict[str, FloatArray]:
        """IGD+ `(1 + R,)` of each method to the front of all of them."""
        found: dict[str, list[float]] = {name: [] for name in self.sweeps}
        for fronts in zip(*(self.points[name] for name in self.sweeps), strict=True):
            union = np.concatenate(fronts)
            known = not np.isnan(union).any()
            union = union[metrics.non_dominated_mask(union)] if known else union
            for name, front in zip(self.sweeps, fronts, strict=True):
                found[name].append(metrics.igd_plus(front, union) if known else np.nan)
        return {name: np.asarray(values) for name, values in found.items()}

    def _row(self, name: str) -> dict[str, Any]:
        wanted = self.sweeps[name].preferences
        regret = _of_each(lambda front: metrics.control_regret(front, wanted), self.points[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HoEWarning)  # constant rewards of a method that knows no preference
            ranks = metrics.spearman(self.points[name][0].round(9), wanted)  # rounding errors have no order
        return {
            "seeds": len(self.sweeps[name].rewards),
            "preferences": len(wanted),
            "hypervolume": _interval(self.volumes[name]),
            "igd_plus": _interval(self.igd_plus[name]),
            "control_regret": _interval(regret),
            "spearman": [None if np.isnan(x) else float(x) for x in ranks],
            "points": self.points[name][0].tolist(),
            "stored": self.stored[name],
            "relative_time": self.times[name] / self.times["one LoRA"] if name in self.times else None,
        }

    def _pair(self, a: str, b: str) -> dict[str, Any]:
        left, right = (f"{a}, own", b) if b == "morlhf" else (a, b)
        mine, other = self.volumes[left], self.volumes[right]
        inner = [name if ", own" in name else f"{name}, interior" for name in (left, right)]
        one, two = (self.points[name] for name in inner)
        forward, back = _of_each(metrics.coverage, one, two), _of_each(metrics.coverage, two, one)
        return {
            "ratio": _interval(np.divide(mine, other, out=np.full_like(mine, np.nan), where=other > 0)),
            "difference": _interval(mine - other),
            "coverage": _interval(forward),
            "coverage_back": _interval(back),
            "share_coverage_at_least_0.9": float((forward[1:] >= 0.9).mean()),
            "share_coverage_back_at_most_0.1": float((back[1:] <= 0.1).mean()),
        }

    @property
    def payoff_prompts(self) -> int:
        """The payoff table's prompts that are drawn in each replicate; 0 for a table of given numbers, or none."""
        return 0 if self.table is None or self.table.samples is None else self.table.samples.shape[1]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        first = self.sweeps["hoe"]
        return {
            "objectives": list(first.objectives),
            "payoff": None if self.table is None else self.table.payoff.tolist(), "payoff_prompts": self.payoff_prompts,
            "reference_point": REFERENCE_POINT, "texts": first.rewards.shape[3], "prompts": len(first.prompts),
            "methods": self.rows, "pairs": {f"{a} / {b}": row for (a, b), row in self.pairs.items()},
        }  # fmt: skip

    def tables(self) -> str:
        """Two tables as markdown, and what their intervals hold."""
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
        drawn = f"its {self.payoff_prompts} prompts are drawn in every replicate"
        scale = f"The payoff table: {drawn if self.payoff_prompts else 'taken as exact, it has no prompts to draw'}."
        return "\n\n".join([*parts, markdown(header, rows), scale])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _of_each(statistic: Callable[..., float], *fronts: FloatArray) -> FloatArray:
    """A statistic `(1 + R,)` of fronts `(1 + R, K, N)`; NaN in a replicate without a scale."""
    found = [
        np.nan if any(np.isnan(front).any() for front in each) else statistic(*each)
        for each in zip(*fronts, strict=True)
    ]
    return np.asarray(found, dtype=np.float64)


def _interval(values: FloatArray) -> list[float]:
    """Estimate, low and high from values `(1 + R,)`, and how many replicates have no value and are left out, if any."""
    estimate, (low, high) = float(values[0]), np.nanpercentile(values[1:], [2.5, 97.5])
    undefined = int(np.isnan(values[1:]).sum())
    return [estimate, min(float(low), estimate), max(float(high), estimate), *([undefined] if undefined else [])]


def _shown(numbers: Sequence[float]) -> str:
    estimate, low, high, *undefined = numbers
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]" + "".join(f" (undefined in {count})" for count in undefined)
