"""Where a front is weak: what a preference loses at its own place, in rewards that can be compared between objectives.

Three measures of a swept preference λ_k with mean rewards r_k, in normalised rewards:

- *Regret*, max_j λ_k · (r_j − r_k): what the user at λ_k would gain from another place of the dial. It is 0 where λ_k is served
  best by itself. The regret is a maximum over noisy means and so too large on average; its bootstrap standard error is given.
- *Hull gap*, max over mixtures q of the other points of min_i (q − r_k)_i: by how much a mixture of policies exceeds r_k in
  every objective at once. By duality it is the least regret that r_k has for any λ, so at most the regret. This part of the
  regret no turn of the dial cures; the rest is a matter of where on the front λ_k leads.
- *Contribution*: the hypervolume that r_k alone encloses. A point that is dominated has none; among points on the front it is
  large where they are sparse.

Shapes: K preferences, N objectives, R replicates.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from ...errors import HoEError, HoEWarning
from ...preference import FloatArray, written
from ..sweeps.result import SweepResult
from .own_sweep import check_is_sweep


@dataclass(frozen=True)
class Weakness:
    """How weak a front is at one of its preferences.

    Attributes:
        preference: λ, `{objective: weight}`.
        regret: in normalised, λ-weighted reward.
        error: the standard error of the regret.
        hull: the hull gap, at most the regret.
        contribution: in hypervolume.

    >>> from peft_hoe.evaluation import Weakness
    >>> str(Weakness({"kind": 0.25, "brief": 0.75}, regret=0.04, error=0.01, hull=0.03, contribution=0.0))
    '[0.25, 0.75]: regret 0.040 ± 0.010, 0.030 of it to the hull; contributes 0.000 of hypervolume'
    """

    preference: dict[str, float]
    regret: float
    error: float
    hull: float
    contribution: float

    @property
    def beyond_error(self) -> float:
        """What of the regret exceeds its standard error, at least 0: what preferences are ranked by."""
        return max(0.0, self.regret - self.error)

    def __str__(self) -> str:
        here = f"[{written(list(self.preference.values()))}]"
        return (
            f"{here}: regret {self.regret:.3f} ± {self.error:.3f}, {self.hull:.3f} of it to the hull; contributes "
            f"{self.contribution:.3f} of hypervolume"
        )


def weaknesses(sweep: SweepResult, *, replicates: int = 1000, seed: int = 0) -> list[Weakness]:
    """The preferences of a sweep, the weakest first.

    First come those of the largest regret beyond its error; of those whose regret is within it the sparsest, which contribute
    most.

    Args:
        sweep: K preferences, at least two, on the payoff table's scale.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        HoEError: rewards without a scale, or fewer than two preferences.
        MetricError: a preference without any reward.

    Warns:
        HoEWarning: the payoff table may be chance; replicates in which it has no spread are left out of the errors.

    >>> from peft_hoe import RewardNormalizer, Sweep
    >>> from peft_hoe.evaluation import weaknesses
    >>> rows = [([1, 0], 0, "red red"), ([0, 1], 0, "glad glad"), ([0.5, 0.5], 0, "red glad sad"), ([0.75, 0.25], 0, "sad")]
    >>> count = {name: lambda p, c, name=name: [text.split().count(name) for text in c] for name in ("red", "glad")}
    >>> scale = RewardNormalizer([[2, 0], [0, 2]], ["red", "glad"])
    >>> found = weaknesses(Sweep.from_generations(rows, count, prompts=["Once"], payoff=scale))
    >>> print(found[0])  # nothing of what it should have most of, though [1, 0] has 0.75, and a mixture 0.5 of both
    [0.75, 0.25]: regret 0.750 ± 0.000, 0.500 of it to the hull; contributes 0.000 of hypervolume
    """
    from ...metrics import hypervolume

    check_is_sweep(sweep)
    if sweep.normalizer is None:
        raise HoEError(
            f"the rewards of {sweep.name!r} are not normalised, so objectives cannot be weighed against each other; sweep with "
            "payoff=, or with all corners",
            argument="sweep",
        )
    if len(sweep.preferences) < 2:
        raise HoEError(
            "the sweep has one preference; there is no front", argument="sweep", value=len(sweep.preferences)
        )
    sweep.normalizer.tell_uncertain()
    drawn = sweep.replicates(replicates, seed)
    points, others = drawn.estimates[sweep.name], drawn.points[sweep.name]
    regrets = _regrets(points[None], sweep.preferences)[0]
    errors = _regrets(_with_scale(others, sweep.name), sweep.preferences).std(axis=0)
    volume = hypervolume(points, reference_point=sweep.reference_point)
    found = [
        Weakness(
            dict(zip(sweep.objectives, preference.tolist(), strict=True)),
            float(regrets[k]),
            float(errors[k]),
            hull_gap(points, k),
            volume - hypervolume(np.delete(points, k, axis=0), reference_point=sweep.reference_point),
        )
        for k, preference in enumerate(sweep.preferences)
    ]
    return sorted(found, key=lambda weak: (-weak.beyond_error, -weak.contribution))


def _with_scale(points: FloatArray, name: str) -> FloatArray:
    """The replicates `(R', K, N)` that have numbers, and how many have none is told."""
    known = ~np.isnan(points).any(axis=(1, 2))
    if not known.all():
        warnings.warn(
            f"the payoff table of {name!r} has no spread in {int((~known).sum())} of {len(points)} replicates, which are left "
            "out of the errors; measure it on more prompts",
            HoEWarning,
            stacklevel=3,
        )
    return np.asarray(points[known])


def _regrets(points: FloatArray, preferences: FloatArray) -> FloatArray:
    """Regrets `(R, K)` of mean rewards `(R, K, N)` at preferences `(K, N)`."""
    gained = np.einsum("rjn,kn->rjk", points, preferences)
    return np.asarray(gained.max(axis=1) - np.einsum("rkn,kn->rk", points, preferences))


def hull_gap(points: FloatArray, k: int) -> float:
    """By how much a mixture of points `(K, N)` exceeds point k in every objective at once; at least 0, as k is one of them.

    >>> import numpy as np
    >>> from peft_hoe.evaluation.front.weakness import hull_gap
    >>> hull_gap(np.array([[1.0, 0.0], [0.0, 1.0], [0.25, 0.25]]), 2)
    0.25
    """
    count = len(points)
    # Weights of the mixture and t, the most that is exceeded in every objective: (r_k + t)_i - sum_j w_j r_ji <= 0.
    exceeded = np.hstack([-points.T, np.ones((points.shape[1], 1))])
    found = linprog(
        np.append(np.zeros(count), -1.0),
        A_ub=exceeded,
        b_ub=-points[k],
        A_eq=np.append(np.ones(count), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)],
    )
    return round(max(0.0, -float(found.fun or 0.0)), 12)
