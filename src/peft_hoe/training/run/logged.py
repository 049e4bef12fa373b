"""What trainers log about objectives.

Shapes: N objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...objectives.normalizer import RewardNormalizer
from ...objectives.weights import ObjectiveWeights
from ...preference import FloatArray


def weighing_metrics(
    normalizer: RewardNormalizer, raw: FloatArray, normalized: FloatArray, weights: ObjectiveWeights
) -> dict[str, float]:
    """Mean rewards `(N,)`, raw and normalised, and what the weights of objectives made of them.

    With the error of each gap λ (z* − R̂) that comes of the payoff table's own prompts.
    """
    columns = {"reward": raw, "reward_normalized": normalized}
    columns |= {"weight": weights.w, "advantage_weight": weights.u, "gap": weights.gap}
    columns["gap_error"] = weights.preference * normalizer.errors(normalized)
    return objective_metrics(normalizer.objectives, columns)


def objective_metrics(objectives: Sequence[str], columns: dict[str, FloatArray]) -> dict[str, float]:
    """One number per column `(N,)` and objective: `{column/objective: number}`; what is unknown (NaN) is left out."""
    return {
        f"{column}/{name}": float(value)
        for column, values in columns.items()
        for name, value in zip(objectives, values, strict=True)
        if not np.isnan(value)
    }
