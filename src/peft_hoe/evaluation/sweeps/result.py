"""A sweep's data and numbers: rewards by preference and prompt, with everything that they depend on.

Shapes: S runs of training, K preferences, P prompts, T texts for each prompt, N objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import HoEError
from ...objectives.normalizer import RewardNormalizer, mean_over
from ...preference import FloatArray
from .batches import Texts
from .replicates import scaled_replicates
from .scoring import own_corners

if TYPE_CHECKING:
    from typing_extensions import Self

    from ...metrics import Interval, Replicates

# In rewards normalised by the payoff table; `peft_hoe.metrics.REFERENCE_POINT`, which needs moocore to be imported.
REFERENCE_POINT = -0.1


@dataclass(eq=False)
class SweepResult:
    """Rewards of one method at K preferences on P prompts.

    Attributes:
        name: the method's.
        objectives: the N names.
        preferences: `(K, N)`.
        prompts: P texts or lists of chat messages.
        rewards: `(S, K, P, T, N)`, raw; NaN where there is none.
        completions: for each run the texts `(K, P, T)`, None where there is none.
        normalizer: the payoff table's scale, or None.
        payoff_source: where that comes from: "given", "payoff prompts" or "own corners".
        reference_point: of hypervolumes, in normalised rewards (raw ones without a normaliser): one number, or N.
        runs: for each run the method's fingerprint, decoding and settings, how texts were drawn, the seed, and versions.
    """

    name: str
    objectives: tuple[str, ...]
    preferences: FloatArray
    prompts: list[Any]
    rewards: FloatArray
    completions: list[Texts]
    normalizer: RewardNormalizer | None
    payoff_source: str
    reference_point: Any = REFERENCE_POINT
    runs: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reference_point = np.asarray(self.reference_point, dtype=np.float64).tolist()
        shape = (len(self.completions), len(self.preferences), len(self.prompts))
        if self.rewards.ndim != 5 or self.rewards.shape[:3] != shape or self.rewards.shape[4] != len(self.objectives):
            raise HoEError(
                f"rewards have shape {self.rewards.shape}; expected (runs, preferences, prompts, texts, objectives) with "
                f"{shape} and {len(self.objectives)} objectives",
                argument="rewards", value=self.rewards.shape, allowed="(runs, preferences, prompts, texts, objectives)",
            )  # fmt: skip
        if self.normalizer is not None and self.normalizer.objectives != tuple(self.objectives):
            raise HoEError(
                f"the normaliser is for {list(self.normalizer.objectives)}, the sweep for {list(self.objectives)}",
                argument="normalizer", value=list(self.normalizer.objectives), allowed=list(self.objectives),
            )  # fmt: skip

    # -- numbers ---

    @property
    def has_scale(self) -> bool:
        """Whether hypervolumes can be measured: rewards are normalised, or the reference point is one of raw rewards."""
        return self.normalizer is not None or self.reference_point != REFERENCE_POINT

    @property
    def values(self) -> FloatArray:
        """Raw rewards `(S, K, P, N)`: of each prompt the mean over its texts, NaN where there is none."""
        return mean_over(self.rewards, (3,))

    @property
    def points(self) -> FloatArray:
        """Mean raw rewards `(K, N)`: over prompts, then runs."""
        return mean_over(mean_over(self.values, (2,)), (0,))

    def normalized(self, rewards: FloatArray) -> FloatArray:
        """Rewards `(..., N)` on the scale of the payoff table; as they are where there is none."""
        return rewards if self.normalizer is None else self.normalizer.normalize(rewards)

    def replicates(self, replicates: int = 1000, seed: int = 0) -> Replicates:
        """Bootstrap of the normalised mean points over runs of training, prompts and the payoff table's prompts."""
        return scaled_replicates(
            {self.name: self.values}, self.normalizer, own_corners=self.payoff_source == "own corners",
            replicates=replicates, seed=seed,
        )  # fmt: skip

    def intervals(self, *, level: float = 0.95, replicates: int = 1000, seed: int = 0) -> Interval:
        """Mean raw rewards with intervals, arrays `(K, N)`."""
        from ...metrics import bootstrap

        drawn = bootstrap({self.name: self.values}, replicates=replicates, seed=seed)
        return drawn.interval(lambda points: points, level=level)

    def front(self) -> FrontPoints:
        """The points that no other one of the sweep dominates."""
        from ...metrics import non_dominated_mask

        mask = non_dominated_mask(self.points)
        points = self.points[mask]
        return FrontPoints(np.flatnonzero(mask), self.preferences[mask], points, self.normalized(points))

    @classmethod
    def stack(cls, sweeps: Sequence[Self]) -> Self:
        """Sweeps of the same method after several runs of training, as one: intervals then hold the runs' spread too.

        Where all have the scale of their own corners, the stack has that of its mean corners.

        Raises:
            HoEError: there are none, or they differ in objectives, preferences, prompts, texts or scale.
        """
        if not sweeps:
            raise HoEError(
                "there are no sweeps to stack; give at least one",
                argument="sweeps", value=sweeps, allowed="at least one",
            )  # fmt: skip
        first = sweeps[0]
        for other in sweeps[1:]:
            _check_same(first, other)
        rewards = np.concatenate([sweep.rewards for sweep in sweeps])
        normalizer = first.normalizer
        if first.payoff_source == "own corners" and normalizer is not None:
            normalizer = own_corners(
                rewards, first.preferences, first.objectives, normalizer.decoding, normalizer.measurement
            )
        return replace(
            first,
            rewards=rewards,
            completions=[texts for sweep in sweeps for texts in sweep.completions],
            normalizer=normalizer,
            runs=[run for sweep in sweeps for run in sweep.runs],
        )


@dataclass(frozen=True, eq=False)
class FrontPoints:
    """Points that nothing dominates, F of them.

    Attributes:
        indices: their rows in the sweep, `(F,)`.
        preferences: `(F, N)`.
        rewards: mean raw rewards `(F, N)`.
        normalized: on the payoff table's scale, `(F, N)`.
    """

    indices: Any
    preferences: FloatArray
    rewards: FloatArray
    normalized: FloatArray


def _check_same(first: SweepResult, other: SweepResult) -> None:
    for what in ("objectives", "prompts", "payoff_source", "reference_point"):
        if getattr(first, what) != getattr(other, what):
            raise HoEError(
                f"the sweeps of {first.name!r} and {other.name!r} differ in {what}; they cannot be stacked",
                argument=what, value=getattr(other, what), allowed=getattr(first, what),
            )  # fmt: skip
    if first.rewards.shape[1:] != other.rewards.shape[1:] or not np.allclose(first.preferences, other.preferences):
        raise HoEError(
            f"the sweeps of {first.name!r} and {other.name!r} differ in preferences or number of texts",
            argument="texts" if first.rewards.shape[3] != other.rewards.shape[3] else "preferences",
        )
    scales = [None if sweep.normalizer is None else sweep.normalizer.payoff.tolist() for sweep in (first, other)]
    if first.payoff_source != "own corners" and scales[0] != scales[1]:
        raise HoEError(
            f"the sweeps have different payoff tables, {scales[0]} and {scales[1]}; sweep with one payoff=",
            argument="payoff", value=scales[1], allowed=scales[0],
        )  # fmt: skip


def installed_versions() -> Mapping[str, str]:
    """Of what a sweep's numbers depend on."""
    wanted = {"peft-hoe", "torch", "transformers", "peft", "numpy", "moocore"}
    return {name: metadata.version(name) for name in sorted(wanted) if find_spec(name.replace("-", "_"))}
