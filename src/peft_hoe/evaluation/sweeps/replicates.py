"""The bootstrap of sweeps on the scale of a payoff table that is itself measured, see `objectives.drawn_scale`.

Shapes: K preferences, P prompts, N objectives, R replicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...objectives.drawn_scale import DrawnScale
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
    scale = DrawnScale.of(normalizer, raw.prompts, own_prompts=own_corners, seed=seed)
    return replace(
        raw,
        estimates={name: normalizer.normalize(points) for name, points in raw.estimates.items()},
        points={name: scale.normalize(points) for name, points in raw.points.items()},
    )
