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
from scipy.optimize import linprog, nnls

from .errors import ExpertError
from .preference import FloatArray

TIE_BREAK = 1e-6
SUPPORT = 1e-10  # a weight below this is the solver's rounding
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
    digits = np.rint(np.trim_zeros(np.asarray(point), "b") * 1e9).astype("<i8")
    return int.from_bytes(hashlib.sha256(digits.tobytes()).digest()[:7], "big") / 2**56


def convex_weights(point: FloatArray, points: FloatArray) -> FloatArray | None:
    """The cheapest convex combination of `points` `(K, N)` that gives `point` `(N,)`.

    Returns:
        `(K,)` weights, at most N of them non-zero; None where `point` is outside the hull.
    """
    solution = linprog(
        lift(points),
        A_eq=np.vstack([points.T, np.ones(len(points))]),
        b_eq=np.append(point, 1.0),
        bounds=(0, None),
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if solution.x is None or solution.status != 0:
        return None
    return _polish(point, points, np.asarray(solution.x))


def _polish(point: FloatArray, points: FloatArray, weights: FloatArray) -> FloatArray:
    """Solve again on the support, where the weights are unique: the solver's tolerance becomes rounding."""
    support = np.flatnonzero(weights > SUPPORT)
    system = np.vstack([points[support].T, np.ones(len(support))])
    exact, *_ = np.linalg.lstsq(system, np.append(point, 1.0), rcond=None)
    polished = np.zeros(len(points))
    polished[support] = np.clip(exact, 0.0, None)
    polished[polished < SUPPORT] = 0.0
    return np.asarray(polished / polished.sum())


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


def check_apart(preferences: FloatArray, names: Sequence[str], kind: str) -> None:
    """Refuse preferences of one kind that are closer than 0.01.

    Raises:
        ExpertError: names the two and their distance.
    """
    for i in range(len(preferences)):
        for j in range(i):
            distance = float(np.linalg.norm(preferences[i] - preferences[j]))
            if distance < MIN_DISTANCE:
                raise ExpertError(
                    f"the {kind}s {names[j]!r} and {names[i]!r} have preferences {preferences[j].tolist()} and "
                    f"{preferences[i].tolist()}, only {distance:.3g} apart; keep one, or move them at least "
                    f"{MIN_DISTANCE} apart"
                )


def voting_set(preference: FloatArray, experts: FloatArray) -> list[int]:
    """Which LoRA experts a router at `preference` votes for, unless told otherwise.

    The Delaunay simplex that holds the preference, completed to N by distance; all experts tied at the last distance are
    in (so that the order of experts does not matter).

    Args:
        preference: `(N,)`.
        experts: `(L, N)`.

    Returns:
        ascending indices into `experts`.
    """
    carrier = coarse_weights(preference, experts)
    chosen = set(np.flatnonzero(carrier).tolist())
    n = experts.shape[1]
    distances = np.linalg.norm(experts - preference, axis=1)
    missing = min(n, len(experts)) - len(chosen)
    if missing > 0:
        others = sorted(float(distances[i]) for i in range(len(experts)) if i not in chosen)
        chosen |= set(np.flatnonzero(distances <= others[missing - 1] + HULL).tolist())
    return sorted(chosen)


def coarse_weights(preference: FloatArray, experts: FloatArray) -> FloatArray:
    """Weights `(L,)` of the Delaunay simplex of `experts` `(L, N)` around the preference, projected on their hull."""
    weights = convex_weights(preference, experts)
    if weights is None:
        weights = convex_weights(project_on_hull(preference, experts), experts)
    if weights is None:  # the projection is in the hull by construction; take its nearest corner rather than fail
        weights = np.eye(len(experts))[int(np.argmin(np.linalg.norm(experts - preference, axis=1)))]
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
        self._cache: OrderedDict[bytes, tuple[FloatArray, FloatArray]] = OrderedDict()

    def weights(self, preference: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Weights `(L + R,)` over experts and routers for a preference `(N,)`, and the preference in effect `(N,)`."""
        key = preference.tobytes()
        if key in self._cache:
            return self._cache[key]
        result = self._solve(preference)
        self._cache[key] = result
        while len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        return result

    def _solve(self, preference: FloatArray) -> tuple[FloatArray, FloatArray]:
        coarse = coarse_weights(preference, self.experts)
        effective = coarse @ self.experts
        if np.linalg.norm(effective - preference) <= HULL:
            effective = preference
        support = np.flatnonzero(coarse)
        corners = self.experts[support]
        inside = np.asarray([r for r, point in enumerate(self.routers) if in_hull(point, corners)], dtype=int)
        weights = np.zeros(len(self.experts) + len(self.routers))
        weights[support] = coarse[support]
        if len(inside):
            # A router at the preference of a LoRA expert takes its place.
            kept = [i for i in support if not _has_twin(self.experts[i], self.routers[inside])]
            members = np.concatenate([np.asarray(kept, dtype=int), inside + len(self.experts)])
            fine = convex_weights(coarse @ self.experts, np.vstack([self.experts, self.routers])[members])
            if fine is not None:  # always: the members span the same hull as the corners
                weights[:] = 0.0
                weights[members] = fine
        return weights, effective

    def route(self, preference: FloatArray) -> Route:
        """The named route of a preference `(N,)`."""
        weights, effective = self.weights(preference)
        chosen = {self.names[i]: float(weights[i]) for i in np.flatnonzero(weights)}
        return Route(
            experts=chosen,
            requested=tuple(preference.tolist()),
            effective=tuple(effective.tolist()),
            distance=float(np.linalg.norm(effective - preference)),
        )


def _has_twin(point: FloatArray, others: FloatArray) -> bool:
    return bool((np.linalg.norm(others - point, axis=1) <= HULL).any())
