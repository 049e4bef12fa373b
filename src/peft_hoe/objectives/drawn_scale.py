"""The scale of a payoff table in the replicates of a bootstrap: the table is itself measured, so its prompts are drawn, too.

Where single-objective experts hardly differ, ideal − nadir is a small number with an error of its own, and everything that is
divided by it has that error: it enters every interval here.

Shapes: R replicates, P prompts, N objectives; K points in each replicate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..preference import FloatArray
from .normalizer import RewardNormalizer


@dataclass(frozen=True)
class DrawnScale:
    """The payoff table in each replicate.

    Attributes:
        payoffs: `(R, N, N)`, experts by objectives.
    """

    payoffs: FloatArray

    @property
    def nadir(self) -> FloatArray:
        """`(R, N)`."""
        return np.asarray(self.payoffs.min(axis=1))

    @property
    def ideal(self) -> FloatArray:
        """`(R, N)`."""
        return np.asarray(self.payoffs.max(axis=1))

    @classmethod
    def of(cls, normalizer: RewardNormalizer, prompts: Any, *, own_prompts: bool, seed: int) -> DrawnScale:
        """The scale that the drawn prompts of the table give.

        Args:
            normalizer: the table. One that was not measured here, but given as numbers, has no prompts to draw, and is taken
                as exact.
            prompts: what was drawn of the prompts that are measured on the scale, `(R, P)`.
            own_prompts: whether the table is of these prompts; it is then drawn with them, else on its own.
            seed: of drawing on its own.
        """
        count = len(prompts)
        if normalizer.samples is None:
            return cls(np.tile(normalizer.payoff, (count, 1, 1)))
        size = normalizer.samples.shape[1]
        if not own_prompts or prompts.shape[1] != size:
            # A stream of its own: the draws of what is measured stay as they are without a table.
            prompts = np.random.default_rng([seed, 1]).integers(size, size=(count, size))
        return cls(normalizer.drawn(prompts))

    def normalize(self, points: FloatArray) -> FloatArray:
        """`(R, K, N)` on the scale of each replicate; NaN in an objective whose experts do not differ there."""
        spread = np.where(self.ideal > self.nadir, self.ideal - self.nadir, np.nan)
        return np.asarray((points - self.nadir[:, None]) / spread[:, None])
