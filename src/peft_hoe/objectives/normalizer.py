"""Rewards on a common scale: 0 is the worst, 1 the best that the single-objective experts reach.

Rewards of different scale swamp each other in a sum, and a smooth Tchebycheff gap means nothing without a scale. The payoff
table P_ij is the mean reward j of the policy steered to objective i alone; ideal_j = max_i P_ij, nadir_j = min_i P_ij, and
R̂ = (R − nadir) / (ideal − nadir). It is measured once, on held-out prompts, and frozen. A table belongs to its decoding:
sampled training and greedy evaluation have one each.

A table is itself measured on some prompts only. Where experts hardly differ in an objective, the spread ideal − nadir is
chance, and what is divided by it is noise blown up; a spread within four standard errors is told. It is the difference of the
best and the worst of N experts: on 64 prompts chance goes beyond three with two experts in 1 of 270 rewards and with five in
1 of 33, but beyond four with five in 1 of 740.

Shapes: N objectives, P prompts, T texts for each, rows are points.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import HoEWarning, RewardError
from ..preference import FloatArray

_ERRORS = 4.0  # standard errors of a spread within which it may be chance


class RewardNormalizer:
    """Maps rewards to where they lie between nadir and ideal of a payoff table.

    Args:
        payoff: `(N, N)`, row i the mean rewards of the policy steered to objective i.
        objectives: the N names.
        decoding: how the table's texts were written, as a Decoding's `record` or a method's own; plain JSON.
        measurement: what else the numbers depend on, such as the number of prompts and the seed; plain JSON.
        samples: `(N, P, N)`, the mean rewards of each prompt that the table was measured on; None for a table of mere numbers.

    Raises:
        RewardError: not N x N finite numbers, or an objective that is constant over the experts.

    >>> from peft_hoe import RewardNormalizer
    >>> normalizer = RewardNormalizer([[4.0, 1.0], [2.0, 3.0]], ["helpful", "harmless"])
    >>> normalizer.normalize([[3.0, 2.0], [4.0, 3.0]]).tolist()
    [[0.5, 0.5], [1.0, 1.0]]
    """

    def __init__(
        self,
        payoff: Any,
        objectives: Sequence[str],
        decoding: Mapping[str, Any] | None = None,
        measurement: Mapping[str, Any] | None = None,
        samples: Any = None,
    ) -> None:
        self.objectives = tuple(objectives)
        self.payoff: FloatArray = np.array(payoff, dtype=np.float64)
        self.decoding = dict(decoding or {})
        self.measurement = dict(measurement or {})
        self.samples: FloatArray | None = None if samples is None else np.array(samples, dtype=np.float64)
        n = len(self.objectives)
        if self.payoff.shape != (n, n) or not np.isfinite(self.payoff).all():
            raise RewardError(
                f"the payoff table is {np.asarray(payoff).tolist()}; it must hold {n} x {n} finite numbers, one row "
                f"and one column for each of {list(self.objectives)}",
                argument="payoff",
                value=self.payoff.tolist(),
                allowed=(n, n),
            )
        spread = self.ideal - self.nadir
        for i in np.flatnonzero(spread <= 1e-9 * np.abs(self.payoff).max(axis=0)):
            raise RewardError(
                f"objective {self.objectives[i]!r} is constant: every expert's mean reward is {self.ideal[i]:.6g}, so it "
                "cannot be normalised. Check its reward and the prompts, or leave the objective out",
                argument="payoff",
                value=self.objectives[i],
            )

    @classmethod
    def measured(
        cls,
        rewards: Any,
        objectives: Sequence[str],
        decoding: Mapping[str, Any] | None = None,
        measurement: Mapping[str, Any] | None = None,
    ) -> RewardNormalizer:
        """The table that rewards make, with the standard errors of its spreads in `measurement`.

        Args:
            rewards: `(N, P, T, N)`: objective that the policy is steered to, prompt, text, objective that is rewarded; NaN
                where there is no reward.
            objectives: as for the class.
            decoding: likewise.
            measurement: likewise.

        Raises:
            RewardError: an objective is constant over the experts, or has no reward.

        Warns:
            HoEWarning: in an objective the best and the worst expert are within four standard errors of each other.
        """
        raw = np.asarray(rewards, dtype=np.float64)
        found = cls(mean_over(raw, (1, 2)), objectives, decoding, samples=mean_over(raw, (2,)))
        errors = found._spread_errors(mean_over(raw, (2,)))
        found.measurement = {**(measurement or {}), "spread_errors": [None if math.isnan(e) else e for e in errors]}
        found.tell_uncertain(stacklevel=4)
        return found

    def uncertain(self) -> list[str]:
        """A sentence for each objective whose spread is within four standard errors, where these are known."""
        known = self.measurement.get("spread_errors")
        if known is None:
            return []
        on = "" if self.samples is None else f" on these {self.samples.shape[1]} prompts"
        return [
            f"the experts hardly differ in objective {name!r}: their mean rewards spread by {spread:.3g} ± {error:.2g}, "
            f"which is {spread / error:.1f} standard errors{on} and may be chance, so normalised rewards may be "
            "noise. Measure on more prompts (payoff_prompts of a trainer), or check the reward and whether its policy learnt it"
            for name, spread, error in zip(self.objectives, (self.ideal - self.nadir).tolist(), known, strict=True)
            if error is not None and spread < _ERRORS * error
        ]

    def tell_uncertain(self, stacklevel: int = 3) -> None:
        """Warn of each objective whose spread may be chance, wherever the table is used.

        Args:
            stacklevel: of the warnings; by default they name the caller's caller.
        """
        for sentence in self.uncertain():
            warnings.warn(sentence, HoEWarning, stacklevel=stacklevel)

    def _spread_errors(self, means: FloatArray) -> list[float]:
        """Of ideal − nadir, `(N,)`, from means by prompt `(N, P, N)`: both experts answer the same prompts."""
        worst, best = self._extremes(means)
        return [_standard_error(row) for row in best - worst]

    def _extremes(self, means: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What the worst and the best expert of each objective earn in it on each prompt, `(N, P)`, of means `(N, P, N)`."""
        places = np.arange(len(self.objectives))
        return means[self.payoff.argmin(0), :, places], means[self.payoff.argmax(0), :, places]

    def drawn(self, prompts: Any) -> FloatArray:
        """The payoff tables `(R, N, N)` of drawn prompts `(R, D)`; NaN where nothing that was drawn has a reward.

        Raises:
            RewardError: the table was given as numbers, so that there are no prompts to draw.
        """
        if self.samples is None:
            raise RewardError("this payoff table was given as numbers; it has no prompts to draw", argument="payoff")
        n, count = len(self.objectives), self.samples.shape[1]
        rows = np.moveaxis(self.samples, 1, 0).reshape(count, n * n)
        times = np.stack([np.bincount(draw, minlength=count) for draw in np.asarray(prompts)]).astype(np.float64)
        known = times @ (~np.isnan(rows)).astype(np.float64)
        total = times @ np.where(np.isnan(rows), 0.0, rows)
        means = np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0)
        return np.asarray(means.reshape(-1, n, n))

    def errors(self, normalized: Any) -> FloatArray:
        """Standard errors `(N,)` of normalised mean rewards `(N,)`, as far as the table's own prompts cause them.

        R̂ = (R − nadir) / s moves with nadir and ideal by −((1 − R̂) d nadir + R̂ d ideal) / s, s the spread. So the error is
        that of the mean reward of a mixture of both experts, 1 − R̂ of the worst and R̂ of the best, in units of s. NaN where the
        table was given as numbers, or an objective has rewards on one prompt only.
        """
        share = np.asarray(normalized, dtype=np.float64)
        if self.samples is None:
            return np.full(len(self.objectives), math.nan)
        worst, best = self._extremes(self.samples)
        moved = (1 - share)[:, None] * worst + share[:, None] * best  # (N, P)
        return np.asarray([_standard_error(row) for row in moved]) / (self.ideal - self.nadir)

    @property
    def ideal(self) -> FloatArray:
        """The best mean reward of any expert, `(N,)`."""
        return np.asarray(self.payoff.max(axis=0))

    @property
    def nadir(self) -> FloatArray:
        """The worst mean reward of any expert, `(N,)`."""
        return np.asarray(self.payoff.min(axis=0))

    def check_objectives(self, objectives: Sequence[str]) -> None:
        """See that the table is for these objectives, in this order.

        Raises:
            RewardError: it is for others.
        """
        if self.objectives != tuple(objectives):
            raise RewardError(
                f"the normalizer is for {list(self.objectives)}, but the objectives are {list(objectives)}",
                argument="normalizer",
                value=list(self.objectives),
                allowed=list(objectives),
            )

    def normalize(self, rewards: Any) -> FloatArray:
        """(R − nadir) / (ideal − nadir) of `rewards` `(..., N)`, float64; NaN stays NaN, and nothing is clipped."""
        raw = np.asarray(rewards, dtype=np.float64)
        if raw.shape[-1:] != (len(self.objectives),):
            raise RewardError(
                f"rewards of shape {raw.shape} do not end in the {len(self.objectives)} objectives",
                argument="rewards",
                value=raw.shape,
                allowed=len(self.objectives),
            )
        return np.asarray((raw - self.nadir) / (self.ideal - self.nadir))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "objectives": list(self.objectives),
            "payoff": self.payoff.tolist(),
            "decoding": self.decoding,
            "measurement": self.measurement,
            "samples": None if self.samples is None else _plain(self.samples.tolist()),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RewardNormalizer:
        """What `state_dict` came from."""
        return cls(state["payoff"], state["objectives"], state["decoding"], state["measurement"], state.get("samples"))


def _standard_error(values: FloatArray) -> float:
    """Of the mean of what is not NaN; NaN of one number or none."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan


def _plain(values: Any) -> Any:
    """Nested lists of numbers with None in place of NaN, which JSON does not know."""
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return None if math.isnan(values) else values


def mean_over(table: FloatArray, axes: tuple[int, ...]) -> FloatArray:
    """The mean of what is not NaN, NaN where all is, without a warning."""
    known = ~np.isnan(table)
    count = known.sum(axis=axes)
    total = np.where(known, table, 0.0).sum(axis=axes)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))
