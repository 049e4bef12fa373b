"""The bootstrap of sweeps on the scale of a payoff table that is itself measured: its prompts are drawn, too.

Where single-objective experts hardly differ, ideal − nadir is a small number with an error of its own, and everything that is
divided by it has that error: it enters every interval here.

Shapes: K preferences, P prompts, N objectives, R replicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...objectives.normalizer import RewardNormalizer
from ...preference import FloatArray

if TYPE_CHECKING:
    from ...metrics import Replicates


def scaled_replicates(
    values: Mapping[str, FloatArray],
    normalizer: RewardNormalizer | None,
    *,
    own_corners: bool,
    replicates: int,
    seed: int,
) -> Replicates:
    """Mean points of each method, normalised in each replicate by the table that its drawn prompts give.

    Args:
        values: raw rewards `(S, K, P, N)` by method, see `peft_hoe.metrics.bootstrap`.
        normalizer: the scale, None for raw rewards. A table that was not measured here, but given as numbers, has no prompts to
            draw, and is taken as exact.
        own_corners: whether the table is of the same prompts as `values`; it is then drawn with them, else on its own.
        replicates: R.
        seed: of the drawing.

    Raises:
        MetricError: as `bootstrap`.
    """
    from ...metrics import bootstrap

    raw = bootstrap(values, replicates=replicates, seed=seed)
    if normalizer is None:
        return raw
    nadir, ideal = _bounds(normalizer, raw, own_corners, replicates, seed)
    spread = np.where(ideal > nadir, ideal - nadir, np.nan)
    return replace(
        raw,
        estimates={name: normalizer.normalize(points) for name, points in raw.estimates.items()},
        points={name: (points - nadir[:, None]) / spread[:, None] for name, points in raw.points.items()},
    )


def _bounds(
    normalizer: RewardNormalizer, raw: Any, own_corners: bool, replicates: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Nadir and ideal in each replicate, `(R, N)`."""
    if normalizer.samples is None:
        return np.tile(normalizer.nadir, (replicates, 1)), np.tile(normalizer.ideal, (replicates, 1))
    prompts = normalizer.samples.shape[1]
    draws = raw.prompts
    if not own_corners or draws.shape[1] != prompts:
        # A stream of its own: the sweeps' draws stay as they are without a table.
        draws = np.random.default_rng([seed, 1]).integers(prompts, size=(replicates, prompts))
    tables = normalizer.drawn(draws)
    return np.asarray(tables.min(axis=1)), np.asarray(tables.max(axis=1))
