"""One attempt: something is added and measured, and taken away again unless it helps."""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import HoEWarning
from ..evaluation.front.weakness import Weakness
from ..evaluation.sweeps.replicates import scaled_replicates
from ..evaluation.sweeps.run import sweep as run_sweep
from ..evaluation.sweeps.sweep import Sweep
from ..preference import FloatArray
from ..tuner.functional import adapter_of
from ..tuner.snapshot import AdapterSnapshot
from .additions import Additions, parameters_of
from .placement import Trial


class Attempts:
    """Where one thing after the other is tried.

    Args:
        additions: what can be added.
        rows: the validation prompts.
        sure: share of the replicates in which the hypervolume must have grown.
        batch_size: completions at once, where the sweep does not say.
    """

    def __init__(self, additions: Additions, rows: list[Any], sure: float, batch_size: int) -> None:
        self.additions, self.rows, self.sure, self.batch_size = additions, rows, sure, batch_size

    def attempt(self, kind: str, weak: Weakness, before: Sweep, left: int | None) -> tuple[Trial, Sweep]:
        """Try one thing; what came of it, and the front as it is then."""
        model = self.additions.model
        adapter = adapter_of(model).name
        had, snapshot, kept = parameters_of(model, adapter), AdapterSnapshot(model), False
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the adapter's calibration was made for other", HoEWarning)
                name = self.additions.add(kind, tuple(weak.preference.values()))
            parameters = parameters_of(model, adapter) - had
            if left is not None and parameters > left:
                return Trial(kind, name, weak, parameters, volume(before), None, None, None, None, False), before
            if kind == "router":
                self.additions.train(name)
            found = self._sweep(before)
            after, low, high, share = gain(found, before)
            kept = share >= self.sure
            trial = Trial(kind, name, weak, parameters, volume(before), after, low, high, share, kept)
            return trial, found if kept else before
        finally:
            if not kept:
                snapshot.restore()

    def _sweep(self, before: Sweep) -> Sweep:
        """The same prompts at the same preferences, on the same scale."""
        run = before.runs[0]
        found = run_sweep(
            self.additions.model, self.additions.tokenizer, self.rows, self.additions.rewards, before.preferences,
            name=before.name, payoff=before.normalizer, decoding=run["decoding"], texts=before.rewards.shape[3],
            seed=run.get("seed", 0), batch_size=run.get("drawing", {}).get("batch_size", self.batch_size),
            reference_point=before.reference_point, progress=False,
        )  # fmt: skip
        found.payoff_source = before.payoff_source  # nothing that is added moves the corners
        return found


def volume(sweep: Sweep) -> float:
    """Of the mean points, on the sweep's scale."""
    from ..metrics import hypervolume

    return hypervolume(sweep.normalized(sweep.points), reference_point=sweep.reference_point)


def gain(after: Sweep, before: Sweep) -> tuple[float, float, float, float]:
    """The hypervolume afterwards, the interval of its gain, and the share of the replicates in which there is one."""
    from ..metrics.volume import ROUNDING, hypervolume

    drawn = scaled_replicates(
        {"after": after.values, "before": before.values}, before.normalizer,
        own_corners=before.payoff_source == "own corners", replicates=1000, seed=0,
    )  # fmt: skip

    def difference(first: FloatArray, second: FloatArray) -> float:
        reference = before.reference_point
        return hypervolume(first, reference_point=reference) - hypervolume(second, reference_point=reference)

    interval = drawn.interval(difference, "after", "before")
    share = drawn.share(lambda first, second: difference(first, second) > ROUNDING, "after", "before")
    return volume(after), float(interval.low), float(interval.high), share
