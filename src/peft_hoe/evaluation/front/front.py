"""Front: which preference reaches what.

The mean rewards of a sweep are taken to be linear between neighbouring preferences, on their Delaunay triangulation. What is
best there follows from one linear program for each of its simplices.

Shapes: K preferences of the sweep, N objectives, M simplices, R replicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import linprog

from ...errors import HoEError
from ...preference import FloatArray, parse_preference
from ...triangulation import triangulate, weights_at
from ..sweeps.replicates import scaled_replicates
from ..sweeps.result import SweepResult
from .own_sweep import check_is_sweep
from .solution import Solution, UnreachableError


class Front:
    """The mean rewards of a sweep as a function of λ.

    Args:
        sweep: N objectives, at preferences that do not all lie on a face of the simplex.
        normalized: whether rewards are on the payoff table's scale; default the raw ones, as `Sweep.table` shows them.
        level: of intervals.
        replicates: of the bootstrap over prompts and runs of training, and with `normalized` the payoff table's prompts.
        seed: of the bootstrap.

    Raises:
        HoEError: a sweep of one objective, without a reward at some preference, or without a scale to normalise by; a level
            that is not between 0 and 1.
        PreferenceError: its preferences span too little.

    >>> from peft_hoe import Sweep
    >>> from peft_hoe.evaluation import Front
    >>> rows = [([1, 0], 0, "red"), ([0, 1], 0, "glad")]
    >>> count = {"vivid": lambda p, c: ["red" in text for text in c], "happy": lambda p, c: ["glad" in text for text in c]}
    >>> Front(Sweep.from_generations(rows, count, prompts=["Once"])).at([0.25, 0.75])
    {'vivid': 0.25, 'happy': 0.75}
    """

    def __init__(
        self,
        sweep: SweepResult,
        *,
        normalized: bool = False,
        level: float = 0.95,
        replicates: int = 1000,
        seed: int = 0,
    ) -> None:
        check_is_sweep(sweep)
        if not isinstance(level, (int, float)) or not 0 < level < 1:
            raise HoEError(
                f"level is {level!r}; give a share between 0 and 1, such as 0.95", argument="level", value=level,
                allowed="between 0 and 1",
            )  # fmt: skip
        self.objectives = list(sweep.objectives)
        if len(self.objectives) < 2:
            raise HoEError(
                f"the sweep has the one objective {self.objectives}; there is nothing to choose between",
                argument="objectives", value=self.objectives, allowed="at least two",
            )  # fmt: skip
        if normalized and sweep.normalizer is None:
            raise HoEError(
                "the sweep has no payoff table to normalise by; leave normalized=True out", argument="normalized"
            )
        if not np.isfinite(sweep.points).all():
            bad = sweep.preferences[~np.isfinite(sweep.points).all(axis=1)][0].tolist()
            raise HoEError(
                f"the sweep of {sweep.name!r} has no reward at {bad} for some objective; score it again", value=bad
            )
        if normalized and sweep.normalizer is not None:
            sweep.normalizer.tell_uncertain()
        self.preferences: FloatArray = sweep.preferences
        self.level = level
        self._simplices = triangulate(self.preferences)
        self._drawn = scaled_replicates(
            {sweep.name: sweep.values}, sweep.normalizer if normalized else None,
            own_corners=sweep.payoff_source == "own corners", replicates=replicates, seed=seed,
        )  # fmt: skip
        self.rewards: FloatArray = self._drawn.estimates[sweep.name]

    def at(self, preference: Any) -> dict[str, float]:
        """Predicted mean rewards at a preference.

        Raises:
            PreferenceError: it is no point of the simplex.
            HoEError: the sweep's preferences do not surround it.
        """
        point = parse_preference(preference, self.objectives)
        weights = weights_at(point, self.preferences, self._simplices)
        if weights is None:
            raise HoEError(
                f"the sweep's preferences do not surround {point.tolist()}; sweep more of them, the corners above all",
                argument="preference",
                value=preference,
            )
        return self._named(weights @ self.rewards)

    def solve(
        self,
        *,
        maximize: str | None = None,
        at_least: Mapping[str, float] | None = None,
        target: Any = None,
    ) -> Solution:
        """The preference that gives what is asked.

        Args:
            maximize: an objective that is to be as large as possible.
            at_least: `{objective: reward}` that must be reached meanwhile.
            target: rewards that are to be reached all together, `{objective: reward}` or N numbers, in place of the two
                others: the λ that exceeds them most evenly.

        Raises:
            UnreachableError: the front does not reach it; says how far it reaches, and where.
            HoEError: unknown objectives, numbers that are not finite, or both a target and something to maximise.
        """
        bounds = self._bounds(maximize, at_least, target)
        spare, weights = max((self._best(rows, bounds, None) for rows in self._simplices), key=lambda found: found[0])
        if spare < -1e-9:
            point, reached = weights @ self.preferences, self._named(weights @ self.rewards)
            asked = {
                name: float(bound) for name, bound in zip(self.objectives, bounds, strict=True) if np.isfinite(bound)
            }
            raise UnreachableError(
                f"the front does not reach {asked} all together: nearest is {_shown(reached)} at "
                f"{_shown(self._named(point))}, {-spare:.3g} short; ask for less, or train for more",
                argument="target" if maximize is None else "at_least",
                value=asked,
                allowed=reached,
                reached=reached,
                preference=self._named(point),
            )
        if maximize is not None:
            wanted = self.objectives.index(maximize)
            _, weights = max((self._best(rows, bounds, wanted) for rows in self._simplices), key=lambda found: found[0])
        return self._solution(weights, bounds)

    def _solution(self, weights: FloatArray, bounds: FloatArray) -> Solution:
        found = self._drawn.interval(lambda points: weights @ points, level=self.level)
        intervals = {
            name: (float(a), float(b)) for name, a, b in zip(self.objectives, found.low, found.high, strict=True)
        }
        kept = self._drawn.share(lambda points: bool((weights @ points >= bounds - 1e-9).all()))
        point = self._named(weights @ self.preferences)
        return Solution(point, self._named(weights @ self.rewards), intervals, self.level, kept)

    def _best(self, rows: Any, bounds: FloatArray, wanted: int | None) -> tuple[float, FloatArray]:
        """The best of one simplex, and the weights of the K preferences there.

        That is the most of objective `wanted` with the bounds kept, minus infinity where they cannot be; or, where none is
        wanted, by how much all bounds can be exceeded at once.
        """
        corners, bounded = self.rewards[rows], np.isfinite(bounds)
        n = len(rows)
        cost = np.append(np.zeros(n), -1.0) if wanted is None else np.append(-corners[:, wanted], 0.0)
        exceeded = -np.hstack(
            [corners[:, bounded].T, np.full((int(bounded.sum()), 1), -1.0 if wanted is None else 0.0)]
        )
        found = linprog(
            cost,
            A_ub=exceeded if bounded.any() else None,
            b_ub=-bounds[bounded] if bounded.any() else None,
            A_eq=np.append(np.ones(n), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * n + [(None, None) if wanted is None and bounded.any() else (0, 0)],
        )
        weights = np.zeros(len(self.preferences))
        if found.x is None:
            return -np.inf, weights
        weights[rows] = found.x[:n] / found.x[:n].sum()
        return -float(found.fun or 0.0), weights

    def _bounds(self, maximize: str | None, at_least: Mapping[str, float] | None, target: Any) -> FloatArray:
        """What each objective must reach, `(N,)`; minus infinity where nothing is asked."""
        if (maximize is None) == (target is None) or (target is not None and at_least is not None):
            raise HoEError(
                "say either maximize=, with at_least= if something must be kept meanwhile, or target=",
                argument="maximize",
            )
        if maximize is not None and maximize not in self.objectives:
            raise HoEError(
                f"maximize is {maximize!r}; the objectives are {self.objectives}",
                argument="maximize",
                value=maximize,
                allowed=self.objectives,
            )
        what, given = ("at_least", at_least or {}) if target is None else ("target", target)
        if not isinstance(given, Mapping):
            listed = list(given) if hasattr(given, "__len__") and not isinstance(given, str) else []
            if len(listed) != len(self.objectives):
                raise HoEError(
                    f"{what} is {given!r}; give a reward for each of {self.objectives}", argument=what, value=given
                )
            given = dict(zip(self.objectives, listed, strict=True))
        unknown = [name for name in given if name not in self.objectives]
        if unknown:
            raise HoEError(
                f"{what} names {unknown}; the objectives are {self.objectives}",
                argument=what,
                value=unknown,
                allowed=self.objectives,
            )
        try:
            asked = {name: float(bound) for name, bound in given.items()}
        except (TypeError, ValueError):
            asked = {"": np.nan}
        if not np.isfinite(list(asked.values())).all() or (target is not None and not asked):
            raise HoEError(f"{what} is {given!r}; give finite rewards", argument=what, value=dict(given))
        return np.asarray([asked.get(name, -np.inf) for name in self.objectives])

    def _named(self, row: FloatArray) -> dict[str, float]:
        return {name: float(value) for name, value in zip(self.objectives, row, strict=True)}


def _shown(named: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:.3g}" for name, value in named.items()) + "}"
