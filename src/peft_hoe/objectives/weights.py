"""How much each objective counts in the next update: mirror descent on the smooth Tchebycheff problem (STCH-OMD).

A preference λ asks for the policy whose worst weighted gap λ_i (z*_i − R̂_i) to a reference point z* is smallest. The smooth
form of that problem is a saddle point, max over weights w of the simplex: the policy ascends Σ u_i R̂_i, and w moves towards the
objectives that lag. Paper (arXiv 2505.20925) eq. 6, 7 and 14 to 18; one rule covers eq. 17 and eq. 18:

    log w ← (1 − β) log w + α · gap,    w = softmax(log w),    u_i = w_i λ_i / Σ_j w_j λ_j

With α = β/μ its fixed point is w = softmax(gap / μ), the smooth Tchebycheff solution at temperature μ. β = 1 is eq. 17; β = 0
with a step is eq. 18, which adds gaps up for ever and so ends one-hot where they cannot be made equal. Advantages are
multiplied by u, not by w as printed: the gradient of the saddle point carries λ_i, and without it an objective of preference 0
gets a share.

Shapes: N objectives. Knows numpy only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import HoEError, HoEWarning, RewardError, check_choice
from ..preference import FloatArray, parse_preference

_WEIGHTINGS = ("saddle", "paper")
_TOLD = tuple(10**power for power in range(10))  # batches in a row without a reward that are told of


class ObjectiveWeights:
    """The weights of N objectives, updated once a batch from their mean rewards.

    Args:
        preference: λ, as N numbers, a tensor or `{objective: weight}`.
        mu: temperature μ of the fixed point: small follows the worst gap, large stays near λ.
        beta: leak β in [0, 1], the share of the old log weights that one update forgets.
        step: α; default β/μ. With a step, μ plays no part: the fixed point's temperature is β/α. `step=0` keeps w uniform,
            so that u = λ: linear scalarisation.
        reference_point: z*, one number or N, in normalised rewards; at least what can be reached.
        weighting: "saddle", or "paper" for the printed form, which returns w itself.
        objectives: the N names; default the mapping's keys, or their positions.

    Raises:
        HoEError: an option is out of range, or the weights could never move.
        PreferenceError: λ is not a point of the simplex.

    >>> from peft_hoe import ObjectiveWeights
    >>> weights = ObjectiveWeights({"helpful": 0.5, "harmless": 0.5})
    >>> u = weights.update([0.9, 0.2])  # harmless lags behind, so it counts more from now on
    >>> bool(u[1] > u[0]), round(float(u.sum()), 9)
    (True, 1.0)
    """

    def __init__(
        self,
        preference: Any,
        mu: float = 0.1,
        beta: float = 0.1,
        step: float | None = None,
        reference_point: float | Sequence[float] = 1.05,
        weighting: str = "saddle",
        *,
        objectives: Sequence[str] | None = None,
    ) -> None:
        self.objectives = _names(preference, objectives)
        self.preference = parse_preference(preference, self.objectives)  # λ
        self.step = _step(mu, beta, step)  # α
        self.mu, self.beta, self._given_step = float(mu), float(beta), step
        self.reference_point = _reference_point(reference_point, self.objectives)  # z*
        check_choice("weighting", weighting, _WEIGHTINGS)
        self.weighting = weighting
        self.updates = 0
        # Not normalised: an objective left out of an update keeps its number while the others change.
        self._log_w = np.zeros(len(self.objectives))
        self._gap = np.full(len(self.objectives), np.nan)
        self._absent = np.zeros(len(self.objectives), dtype=int)  # updates in a row without a mean

    @property
    def log_w(self) -> FloatArray:
        """Log weights, `(N,)`, up to a constant that all share."""
        return self._log_w.copy()

    @property
    def w(self) -> FloatArray:
        """Weights on the simplex, `(N,)`."""
        return _softmax(self._log_w)

    @property
    def u(self) -> FloatArray:
        """What advantages are multiplied by, `(N,)`, on the simplex; 0 where the preference is 0 (not so with "paper")."""
        if self.weighting == "paper":
            return self.w
        with np.errstate(divide="ignore"):
            return _softmax(self._log_w + np.log(self.preference))

    @property
    def gap(self) -> FloatArray:
        """λ (z* − R̂) when each objective was last seen, `(N,)`; NaN before its first update."""
        return self._gap.copy()

    @property
    def worst_gap(self) -> float:
        """The largest gap of an objective of positive preference; NaN before any of them was seen."""
        gaps = self._gap[(self.preference > 0) & ~np.isnan(self._gap)]
        return float(gaps.max()) if len(gaps) else math.nan

    def update(self, mean_rewards: Any) -> FloatArray:
        """Move the weights.

        Args:
            mean_rewards: R̂ `(N,)`, normalised, higher is better, over the batch of all ranks. An objective whose mean is NaN or
                None (no sample of it had a reward) keeps its log weight and its gap as they were.

        Returns:
            the new u, `(N,)`.

        Raises:
            RewardError: not N numbers, or an infinite one; the weights stay as they were.

        Warns:
            HoEWarning: an objective of positive preference has none, once, and again in the 10th, 100th ... batch in a row.
        """
        means = _means(mean_rewards, self.objectives)
        seen = ~np.isnan(means)
        self._absent = np.where(seen, 0, self._absent + 1)
        self._tell_absent()
        gap = self.preference * (self.reference_point - means)
        self._gap = np.where(seen, gap, self._gap)
        self._log_w = np.where(seen, (1 - self.beta) * self._log_w + self.step * gap, self._log_w)
        self.updates += 1
        return self.u

    def _tell_absent(self) -> None:
        for name, weight, count in zip(self.objectives, self.preference, self._absent.tolist(), strict=True):
            if weight > 0 and count in _TOLD:
                warnings.warn(
                    f"objective {name!r} has no reward in {f'{count} batches in a row' if count > 1 else 'a batch'}, only None "
                    "or NaN; updates go by the others. That is as it should be where it scores some of the prompts only",
                    HoEWarning,
                    stacklevel=4,
                )

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON: settings, log w, w, gap (None before the first update) and the number of updates."""
        return {
            "settings": self._settings(),
            "log_w": self._log_w.tolist(),
            "w": self.w.tolist(),
            "gap": [None if math.isnan(number) else number for number in self._gap.tolist()],
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a saved run stopped.

        Raises:
            HoEError: the state belongs to other settings; names them.
        """
        saved, mine = state["settings"], self._settings()
        different = [
            f"{name}: {saved.get(name)!r} saved, {mine[name]!r} here" for name in mine if saved.get(name) != mine[name]
        ]
        if different:
            raise HoEError(
                f"the saved objective weights do not continue these ({'; '.join(different)}); "
                "use the saved settings, or start without the checkpoint",
                argument="settings", value=saved, allowed=mine,
            )  # fmt: skip
        self._log_w = np.asarray(state["log_w"], dtype=np.float64)
        self._gap = np.asarray([math.nan if number is None else number for number in state["gap"]], dtype=np.float64)
        self.updates = int(state["updates"])

    def _settings(self) -> dict[str, Any]:
        return {
            "objectives": list(self.objectives),
            "preference": self.preference.tolist(),
            "mu": self.mu,
            "beta": self.beta,
            "step": self._given_step,
            "reference_point": self.reference_point.tolist(),
            "weighting": self.weighting,
        }


def _names(preference: Any, objectives: Sequence[str] | None) -> tuple[str, ...]:
    if objectives is not None:
        return tuple(objectives)
    if isinstance(preference, Mapping):
        return tuple(preference)
    return tuple(str(i) for i in range(len(preference) if hasattr(preference, "__len__") else 0))


def _step(mu: float, beta: float, step: float | None) -> float:
    if not 0 <= beta <= 1:
        raise HoEError(f"beta is {beta}; it must be in [0, 1]", argument="beta", value=beta, allowed="0 to 1")
    if step is not None:
        if not 0 <= step < math.inf:
            raise HoEError(
                f"step is {step}; it must be finite and at least 0", argument="step", value=step, allowed="at least 0"
            )
        return float(step)
    if not 0 < mu < math.inf:
        raise HoEError(
            f"mu is {mu} and the step is beta / mu; give a mu above 0, or a step of your own with step=",
            argument="mu",
            value=mu,
            allowed="above 0",
        )
    if beta == 0:
        raise HoEError(
            "beta is 0 and there is no step, so the weights would never move; give step= (eq. 18 of the paper), "
            "or step=0 for linear scalarisation",
            argument="beta",
            value=beta,
        )
    return beta / mu


def _reference_point(value: Any, objectives: Sequence[str]) -> FloatArray:
    point = np.asarray(value, dtype=np.float64)
    if point.shape not in ((), (len(objectives),)) or not np.isfinite(point).all():
        raise HoEError(
            f"reference_point is {value!r}; give one finite number, or one for each of the {len(objectives)} objectives",
            argument="reference_point",
            value=value,
        )
    return np.broadcast_to(point, (len(objectives),)).copy()


def _means(value: Any, objectives: Sequence[str]) -> FloatArray:
    numbers = value.tolist() if hasattr(value, "tolist") else value
    try:
        means = np.asarray([math.nan if number is None else float(number) for number in numbers], dtype=np.float64)
    except (TypeError, ValueError):
        means = np.empty(0)
    if means.shape != (len(objectives),) or np.isinf(means).any():
        raise RewardError(
            f"the mean rewards are {value!r}; expected {len(objectives)} finite numbers (or NaN) for {list(objectives)}",
            argument="rewards",
            value=value,
        )
    return means


def _softmax(logits: FloatArray) -> FloatArray:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())
