"""Calibration of the dial: from a sweep to a map of the simplex under which equal steps are equal steps along the front.

With two objectives the front is a curve, and a dial position is its arc length (in normalised rewards, as a share of the
whole). With more, the mesh over the sweep's preferences is laid out anew: each preference moves to the mean of its neighbours,
weighed by one over the distance of their rewards, with the corners fixed, then those on edges and faces. On a curve that is
the arc length again (Tutte 1963: with positive weights such a layout of a planar mesh never folds).

Distances of means over few prompts are too long by their noise; its variance, from the bootstrap, is taken off their squares.

Shapes: K preferences, N objectives, M simplices, E edges, R replicates.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...calibration import Calibration
from ...errors import HoEError, HoEWarning
from ...preference import FloatArray, das_dennis, written
from ...triangulation import IntArray, edges, triangulate, weights_at
from ..sweeps.result import SweepResult
from .own_sweep import check_own_sweep, routers_of

_SHORTEST = 0.05  # of the mean distance: a shorter step counts as this, so that the dial passes every preference
_CONFIDENT = 0.95  # share of the replicates in which a reward must fall to be told
_LAYOUTS = np.linspace(1.0, 0.0, 11)  # shares of the new layout that are tried until no simplex is turned over


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration found.

    Attributes:
        calibration: the map, which the adapter's configuration holds now.
        variation: CV of the gaps between neighbouring positions of the raw dial, on this sweep's mean rewards.
        calibrated: the same of the calibrated dial, as the sweep predicts it; a sweep at calibrated positions measures it.
        stretches: where more weight gives less of an objective, in words. The dial passes there as anywhere.

    >>> from peft_hoe import HoEConfig, Sweep
    >>> from peft_hoe.evaluation import calibrate
    >>> rows = [([k / 4, 1 - k / 4], 0, "red " * k * k + "glad " * (4 - k)) for k in range(5)]
    >>> count = {word: lambda p, c, word=word: [text.count(word) for text in c] for word in ("red", "glad")}
    >>> report = calibrate(HoEConfig(objectives=["red", "glad"]), Sweep.from_generations(rows, count, prompts=["Once"]))
    >>> report.calibrated < report.variation
    True
    """

    calibration: Calibration
    variation: float
    calibrated: float
    stretches: list[str]

    def table(self) -> str:
        """As text."""
        positions, preferences = self.calibration.positions, self.calibration.preferences
        order = np.lexsort(positions.T[::-1])
        lines = ["dial -> preference"]
        lines += [f"{written(positions[k])} -> {written(preferences[k])}" for k in order]
        lines += [
            f"CV of the gaps: {self.variation:.3f} raw, {self.calibrated:.3f} calibrated (predicted)",
            *self.stretches,
        ]
        return "\n".join(lines)


def calibrate(model: Any, sweep: SweepResult, *, replicates: int = 1000, seed: int = 0) -> CalibrationReport:
    """Give an adapter a dial whose equal steps are equal steps along its front, and 0.5 the middle.

    It is saved with the adapter; `set_preference(position, calibrated=True)` and `use_preference` go by it. It holds for the
    experts and trained routers that the adapter has now.

    Args:
        model: a model with a HoE adapter, or what `peft_hoe.experts.saved_adapter.open_adapter` made of its files, or its
            `HoEConfig`, which knows no weights. Files are not written: `config.save_pretrained` does that.
        sweep: of this adapter, on prompts that were kept for choices, at preferences that hold every corner.
        replicates: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        HoEError: the sweep is empty, of another adapter, lacks a corner, or has the same rewards everywhere. The adapter is as
            before then.

    Warns:
        HoEWarning: an objective gets less where its weight grows, beyond chance; or the payoff table may be chance.

    >>> from peft_hoe import demo, Decoding, sweep
    >>> from peft_hoe.evaluation import calibrate
    >>> model, tokenizer = demo.load_demo_adapter(), demo.load_tokenizer()
    >>> found = sweep(
    ...     model, tokenizer, demo.load_prompts()[:8], demo.REWARDS, [[1, 0], [0.7, 0.3], [0.3, 0.7], [0, 1]],
    ...     decoding=Decoding(24), progress=False,
    ... )
    >>> report = calibrate(model, found)
    >>> model.set_preference([0.5, 0.5], calibrated=True)
    >>> round(sum(model.preference.values()), 9)
    1.0
    """
    config = check_own_sweep(model, sweep)
    _check_routers(config, sweep)
    _check_corners(sweep)
    if sweep.normalizer is not None:
        sweep.normalizer.tell_uncertain()
    points, drawn = _scaled(sweep, replicates, seed)
    simplices = triangulate(sweep.preferences)
    pairs = edges(simplices)
    lengths = _lengths(points, drawn, pairs)
    positions = _layout(sweep.preferences, simplices, pairs, lengths)
    calibration = Calibration(positions, sweep.preferences, simplices, config.calibrates())
    stretches = _falling(sweep, points, drawn, pairs)
    for stretch in stretches:
        warnings.warn(stretch, HoEWarning, stacklevel=2)
    steps = das_dennis(len(config.objectives or ()), 10 if points.shape[1] == 2 else 6)
    raw, moved = (_at(where, sweep.preferences, simplices, points) for where in (steps, _moved(calibration, steps)))
    report = CalibrationReport(calibration, _variation(raw, steps), _variation(moved, steps), stretches)
    config.calibration = calibration.to_dict()  # last: what fails before has changed nothing
    return report


def _check_routers(config: Any, sweep: SweepResult) -> None:
    said = routers_of(sweep)
    if said != "keep" and any(spec.trained for spec in config.routers or []):
        raise HoEError(
            f"the sweep was made with routers={said!r}, but the adapter has trained routers, which vote where the dial "
            "leads; sweep with routers='keep'",
            argument="sweep",
        )


def _check_corners(sweep: SweepResult) -> None:
    lacking = [
        name for name, best in zip(sweep.objectives, sweep.preferences.max(axis=0), strict=True) if best < 1 - 1e-9
    ]
    if lacking:
        raise HoEError(
            f"the sweep lacks the preferences of {lacking} alone, where the dial begins and ends; sweep them too",
            argument="sweep",
            value=lacking,
        )


def _scaled(sweep: SweepResult, replicates: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """Mean points `(K, N)` and those of the replicates `(R, K, N)`, in rewards that can be compared between objectives."""
    from ...metrics import bootstrap

    drawn = bootstrap({"sweep": sweep.normalized(sweep.values)}, replicates=replicates, seed=seed)
    points, others = drawn.estimates["sweep"], drawn.points["sweep"]
    if sweep.normalizer is None:
        scale = np.ptp(points, axis=0)
        scale[scale == 0] = 1.0
        points, others = points / scale, others / scale
    return points, others


def _lengths(points: FloatArray, drawn: FloatArray, pairs: IntArray) -> FloatArray:
    """Distances in rewards of neighbouring preferences `(E,)`, the noise taken off."""
    steps = points[pairs[:, 0]] - points[pairs[:, 1]]
    noise = (drawn[:, pairs[:, 0]] - drawn[:, pairs[:, 1]]).var(axis=0).sum(axis=1)
    lengths: FloatArray = np.sqrt(np.maximum((steps**2).sum(axis=1) - noise, 0.0))
    floor = _SHORTEST * max(float(np.linalg.norm(steps, axis=1).mean()), 1e-12)
    return np.maximum(lengths, floor)


def _layout(preferences: FloatArray, simplices: IntArray, pairs: IntArray, lengths: FloatArray) -> FloatArray:
    """Positions `(K, N)` of the preferences on the dial."""
    n = preferences.shape[1]
    support = preferences > 1e-9
    positions = preferences.copy()
    for size in range(2, n + 1):
        for face in itertools.combinations(range(n), size):
            _relax(positions, support, list(face), pairs, 1.0 / lengths)
    before = np.sign(np.linalg.det(preferences[simplices]))
    for share in _LAYOUTS:
        found: FloatArray = share * positions + (1 - share) * preferences
        if (np.sign(np.linalg.det(found[simplices])) == before).all():
            break
    return found


def _relax(positions: FloatArray, support: Any, face: list[int], pairs: IntArray, springs: FloatArray) -> None:
    """Move the preferences inside a face to where springs between neighbours rest, those on its border held fast."""
    n = support.shape[1]
    others = [i for i in range(n) if i not in face]
    on_face = ~support[:, others].any(axis=1)
    inside = np.flatnonzero(on_face & support[:, face].all(axis=1))
    if not len(inside):
        return
    place = {int(k): row for row, k in enumerate(inside)}
    matrix, pull = np.zeros((len(inside), len(inside))), np.zeros((len(inside), n))
    for (a, b), spring in zip(pairs.tolist(), springs, strict=True):
        if not (on_face[a] and on_face[b]):
            continue
        for mine, other in ((a, b), (b, a)):
            if mine not in place:
                continue
            matrix[place[mine], place[mine]] += spring
            if other in place:
                matrix[place[mine], place[other]] -= spring
            else:
                pull[place[mine]] += spring * positions[other]
    positions[inside] = np.linalg.solve(matrix, pull)


def _falling(sweep: SweepResult, points: FloatArray, drawn: FloatArray, pairs: IntArray) -> list[str]:
    """Steps between neighbours that give an objective more weight and less reward, beyond chance."""
    found = []
    for i, name in enumerate(sweep.objectives):
        more = sweep.preferences[pairs[:, 1], i] > sweep.preferences[pairs[:, 0], i]
        low, high = np.where(more, pairs[:, 0], pairs[:, 1]), np.where(more, pairs[:, 1], pairs[:, 0])
        grows = sweep.preferences[high, i] > sweep.preferences[low, i] + 1e-9
        falls = (drawn[:, high, i] < drawn[:, low, i]).mean(axis=0) >= _CONFIDENT
        found += [
            f"{name} falls by {points[a, i] - points[b, i]:.3g} from [{written(sweep.preferences[a])}] to "
            f"[{written(sweep.preferences[b])}], though its weight grows; the dial leaves that as it is"
            for a, b in zip(low[grows & falls].tolist(), high[grows & falls].tolist(), strict=True)
        ]
    return found


def _moved(calibration: Calibration, steps: FloatArray) -> FloatArray:
    return np.stack([calibration.preference(step) for step in steps])


def _at(where: FloatArray, preferences: FloatArray, simplices: IntArray, points: FloatArray) -> FloatArray:
    """Rewards between the sweep's preferences, `(K', N)`."""
    weights: Sequence[Any] = [weights_at(point, preferences, simplices) for point in where]
    return np.stack([row @ points for row in weights])


def _variation(points: FloatArray, steps: FloatArray) -> float:
    from ...metrics import gap_variation

    return gap_variation(points, steps)
