"""Preference routing: a preference becomes a convex combination of experts (paper section 3.3, eq. 9 and 10).

The paper asks for "the N nearest experts, then a convex combination". That is often infeasible, and Figure 2 does not do
it. What is consistent with Figure 2 is a nested subdivision of the simplex. *Coarse*: over the LoRA experts, minimise
``sum_i w_i h_i`` subject to ``sum_i w_i p_i = preference`` and ``w`` on the simplex, with ``h_i = |p_i|^2``. Lifting points
to a paraboloid and taking the lower hull is the Delaunay triangulation, so the support is the Delaunay simplex around the
preference. *Fine*: the same program over that simplex and the routers inside it.

Experts on one sphere (the corners always are) leave several triangulations equally cheap, and a solver would pick a
different one for each preference. ``h_i`` therefore carries ``1e-6 * u(p_i)`` with ``u`` a fixed hash of the expert's
preference: generic, so the triangulation is unique and the weights are continuous in the preference; and blind to trailing
zeros, so that a new objective (which pads every preference with 0) changes nothing on the old face.

Pure geometry: numpy and scipy, no tensors. Shapes: N objectives, L experts, R routers.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog, nnls

from .errors import ExpertError
from .preference import FloatArray

TIE_BREAK = 1e-6
SUPPORT = 3e-10  # a weight below this is the solver's rounding
_ROUNDING = 1e-12
HULL = 1e-9  # a point this close to a hull lies in it
MIN_DISTANCE = 0.01
_CACHE_SIZE = 4096


@dataclass(frozen=True)
class Route:
    """Where a preference leads.

    Attributes:
        experts: `{name: weight}` over LoRA experts and routers, weights above 0, summing to 1.
        requested: the preference asked for, `(N,)`.
        effective: the preference in effect, `(N,)`; differs from `requested` only outside the experts' hull.
        distance: Euclidean distance between the two.

    >>> from peft_hoe import demo
    >>> route = demo.load_demo_adapter().route([0.75, 0.25])
    >>> {name: round(weight, 9) for name, weight in route.experts.items()}, route.distance
    ({'cheerful': 0.5, 'centroid': 0.5}, 0.0)
    """

    experts: dict[str, float]
    requested: tuple[float, ...]
    effective: tuple[float, ...]
    distance: float


def lift(points: FloatArray) -> FloatArray:
    """Heights `(K,)` of the points `(K, N)`: squared norm plus the tie break."""
    heights = (points**2).sum(axis=1)
    return heights + TIE_BREAK * np.asarray([_hash_unit(point) for point in points])


def _hash_unit(point: FloatArray) -> float:
    return point_code(point) / 2**56


def point_code(point: FloatArray) -> int:
    """A number of 56 bits that tells a preference `(N,)` from others: a hash of its weights to 1e-9, without trailing zeros."""
    digits = np.rint(np.trim_zeros(np.asarray(point), "b") * 1e9).astype("<i8")
    return int.from_bytes(hashlib.sha256(digits.tobytes()).digest()[:7], "big")


class Subdivision:
    """The triangulation of a set of points that the linear program defines, found cell by cell as preferences ask.

    The support of one solution is a face of the lower hull, so it is the support of every point inside it: a cell that is
    known costs one small product, and only a point outside all known cells costs a linear program.

    Args:
        points: `(K, N)`.
    """

    def __init__(self, points: FloatArray) -> None:
        self.points = points
        self._system = np.vstack([points.T, np.ones(len(points))])
        self._heights = lift(points)
        self._cells: dict[tuple[int, ...], FloatArray] = {}

    def weights(self, point: FloatArray) -> FloatArray | None:
        """The cheapest convex combination of the points that gives `point` `(N,)`.

        Returns:
            `(K,)` weights, at most N of them non-zero; None where `point` is outside the hull.
        """
        for support in tuple(self._cells):  # other threads may add cells
            inside = self._within(support, point)
            if inside is not None:
                return inside
        solution = linprog(
            self._heights,
            A_eq=self._system,
            b_eq=np.append(point, 1.0),
            bounds=(0, None),
            method="highs-ds",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if solution.x is None or solution.status != 0:
            return None
        support = tuple(np.flatnonzero(solution.x > SUPPORT).tolist())
        self._cells[support] = np.linalg.pinv(self._system[:, support])
        return self._spread(support, self._cells[support] @ np.append(point, 1.0))

    def _within(self, support: tuple[int, ...], point: FloatArray) -> FloatArray | None:
        target = np.append(point, 1.0)
        exact = self._cells[support] @ target
        if exact.min() < -_ROUNDING or np.abs(self._system[:, support] @ exact - target).max() > _ROUNDING:
            return None
        return self._spread(support, exact)

    def _spread(self, support: tuple[int, ...], exact: FloatArray) -> FloatArray:
        """Weights solved on the support, where they are unique, over all points: the solver's tolerance is gone."""
        weights = np.zeros(len(self.points))
        weights[list(support)] = np.where(exact > SUPPORT, exact, 0.0)
        return np.asarray(weights / weights.sum())


def project_on_hull(point: FloatArray, points: FloatArray) -> FloatArray:
    """The point of the convex hull of `points` `(K, N)` nearest to `point` `(N,)`."""
    heavy = 1e4  # weight of the row that makes the weights sum to 1
    system = np.vstack([points.T, np.full(len(points), heavy)])
    rough, _ = nnls(system, np.append(point, heavy))
    support = points[rough > SUPPORT]
    # On the support the constraint is an equality: move along the affine hull, exactly.
    directions = (support[1:] - support[0]).T
    step, *_ = np.linalg.lstsq(directions, point - support[0], rcond=None)
    nearest: FloatArray = support[0] + directions @ step
    return nearest


def in_hull(point: FloatArray, points: FloatArray) -> bool:
    """Whether `point` `(N,)` lies in the convex hull of `points` `(K, N)`, to 1e-9."""
    return bool(np.linalg.norm(project_on_hull(point, points) - point) <= HULL)


def corner(preference: Sequence[float] | FloatArray) -> int | None:
    """The index of the one objective that a preference `(N,)` on the simplex serves; None where it serves several."""
    index = int(np.argmax(preference))
    return index if preference[index] > 1 - HULL else None


def check_apart(preferences: FloatArray, names: Sequence[str], kind: str) -> None:
    """Refuse preferences of one kind that are closer than 0.01.

    Raises:
        ExpertError: names the two and their distance.
    """
    for i in range(1, len(preferences)):
        distances = np.linalg.norm(preferences[:i] - preferences[i], axis=1)
        j = int(np.argmin(distances))
        if distances[j] < MIN_DISTANCE:
            raise ExpertError(
                f"the {kind}s {names[j]!r} and {names[i]!r} have preferences {preferences[j].tolist()} and "
                f"{preferences[i].tolist()}, only {distances[j]:.3g} apart; keep one, or move them at least "
                f"{MIN_DISTANCE} apart",
                argument=f"{kind}s",
                value=[names[j], names[i]],
                allowed=f"at least {MIN_DISTANCE} apart",
            )


def voting_set(preference: FloatArray, experts: FloatArray | Subdivision) -> list[int]:
    """Which LoRA experts a router at `preference` votes for, unless told otherwise.

    The Delaunay simplex that holds the preference, completed to N by distance; all experts tied at the last distance are
    in (so that the order of experts does not matter).

    Args:
        preference: `(N,)`.
        experts: `(L, N)`, or their subdivision.

    Returns:
        ascending indices into `experts`.
    """
    cells = experts if isinstance(experts, Subdivision) else Subdivision(experts)
    chosen = set(np.flatnonzero(coarse_weights(preference, cells)).tolist())
    count, n = cells.points.shape
    distances = np.linalg.norm(cells.points - preference, axis=1)
    missing = min(n, count) - len(chosen)
    if missing > 0:
        others = sorted(float(distances[i]) for i in range(count) if i not in chosen)
        chosen |= set(np.flatnonzero(distances <= others[missing - 1] + HULL).tolist())
    return sorted(chosen)


def coarse_weights(preference: FloatArray, experts: FloatArray | Subdivision) -> FloatArray:
    """Weights `(L,)` of the Delaunay simplex of `experts` `(L, N)` around the preference, projected on their hull."""
    cells = experts if isinstance(experts, Subdivision) else Subdivision(experts)
    weights = cells.weights(preference)
    if weights is None:
        weights = cells.weights(project_on_hull(preference, cells.points))
    if weights is None:  # the projection missed the hull by rounding: its nearest point is what is left
        nearest = np.argmin(np.linalg.norm(cells.points - preference, axis=1))
        weights = np.eye(len(cells.points))[int(nearest)]
    return weights


class PreferenceRouter:
    """The nested subdivision of one set of experts and routers; routes are cached by preference.

    Args:
        experts: `(L, N)` preferences of the LoRA experts.
        routers: `(R, N)` preferences of the routers; R may be 0.
        names: L + R names, experts first.
    """

    def __init__(self, experts: FloatArray, routers: FloatArray, names: Sequence[str]) -> None:
        self.experts = experts
        self.routers = routers.reshape(-1, experts.shape[1])
        self.names = tuple(names)
        self._coarse = Subdivision(experts)
        self._fine: dict[tuple[int, ...], tuple[NDArray[np.intp], Subdivision] | None] = {}
        self._cache: OrderedDict[bytes, tuple[FloatArray, FloatArray]] = OrderedDict()

    def weights(self, preference: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Weights `(L + R,)` over experts and routers for a preference `(N,)`, and the preference in effect `(N,)`."""
        key = preference.tobytes()
        known = self._cache.get(key)
        if known is not None:
            return known
        result = self._solve(preference)
        self._cache[key] = result
        while len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        return result

    def coarse(self, preference: FloatArray) -> tuple[FloatArray, FloatArray]:
        """As `weights`, by the LoRA experts alone."""
        coarse = coarse_weights(preference, self._coarse)
        effective = coarse @ self.experts
        if np.linalg.norm(effective - preference) <= HULL:
            effective = preference
        return np.append(coarse, np.zeros(len(self.routers))), effective

    def _solve(self, preference: FloatArray) -> tuple[FloatArray, FloatArray]:
        weights, effective = self.coarse(preference)
        coarse = weights[: len(self.experts)]
        inner = self._inner(tuple(np.flatnonzero(coarse).tolist()))
        fine = None if inner is None else inner[1].weights(coarse @ self.experts)
        if inner is not None and fine is not None:
            weights[:] = 0.0
            weights[inner[0]] = fine
        return weights, effective

    def _inner(self, support: tuple[int, ...]) -> tuple[NDArray[np.intp], Subdivision] | None:
        """Members and subdivision of one Delaunay simplex; None where no router lies in it."""
        if support not in self._fine:
            corners = self.experts[list(support)]
            inside = [r for r, point in enumerate(self.routers) if in_hull(point, corners)]
            # A router at the preference of a LoRA expert takes its place.
            kept = [i for i in support if not _has_twin(self.experts[i], self.routers[inside])]
            members = np.asarray([*kept, *(len(self.experts) + r for r in inside)], dtype=np.intp)
            points = np.vstack([self.experts, self.routers])[members]
            self._fine[support] = (members, Subdivision(points)) if inside else None
        return self._fine[support]

    def route(self, preference: FloatArray, *, coarse: bool = False) -> Route:
        """The named route of a preference `(N,)`, by the LoRA experts alone if `coarse`."""
        weights, effective = self.coarse(preference) if coarse else self.weights(preference)
        chosen = {self.names[i]: float(weights[i]) for i in np.flatnonzero(weights)}
        return Route(
            experts=chosen,
            requested=tuple(preference.tolist()),
            effective=tuple(effective.tolist()),
            distance=float(np.linalg.norm(effective - preference)),
        )


def _has_twin(point: FloatArray, others: FloatArray) -> bool:
    return bool((np.linalg.norm(others - point, axis=1) <= HULL).any())
