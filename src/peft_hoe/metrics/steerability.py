"""Does more weight on an objective give more of it, and does the policy at λ serve λ?

A front can be good and still not steerable: rewards may rise and fall with λ at random. Rows with the same preference are
averaged first, so that R(π_λ) is a mean reward and rows may be single completions. Weights are compared to 9 decimals.

Shapes: P rows, K distinct preferences, N objectives.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ..errors import HoEWarning, MetricError
from ..preference import FloatArray
from .indicators import expected_utility
from .validation import as_points, as_preferences

_DECIMALS = 9  # 0.3 and 3 · 0.1 are the same weight


@dataclass(frozen=True)
class Steerability:
    """What `steerability` measures; lists have one number for each objective.

    >>> from peft_hoe.metrics import steerability
    >>> found = steerability([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]], [[0, 1], [0.5, 0.5], [1, 0]])
    >>> found.order_violations, found.control_regret
    ([0.0, 0.0], 0.0)
    """

    spearman: list[float]
    """Rank correlation of λ_i and R_i; 1 is best, NaN where one of them is constant."""
    order_violations: list[float]
    """Share of the pairs with λ_i greater where R_i is smaller; 0 is best, NaN where λ_i is constant."""
    expected_utility: float
    """Mean over λ of the best λ·R among all policies."""
    control_regret: float
    """What that is above the mean of λ·R(π_λ); 0 is best."""
    rows: int
    preferences: int
    """How many distinct ones."""
    warnings: list[str] = field(default_factory=list)


def steerability(rewards: Any, preferences: Any) -> Steerability:
    """All measures of this module; warnings are issued and kept.

    Args:
        rewards: R, `(P, N)`.
        preferences: the λ that each row was steered to, `(P, N)`.

    Raises:
        MetricError: empty, wrong shapes, fewer than two distinct preferences, NaN or infinite.
        PreferenceError: a row of `preferences` is no point of the simplex.

    Warns:
        HoEWarning: a column is constant, so that its rank correlation is undefined (NaN).

    >>> from peft_hoe.metrics import steerability
    >>> steerability([[0.0, 1.0], [1.0, 0.0]], [[0, 1], [1, 0]]).expected_utility
    1.0
    """
    mean, wanted = _by_preference(rewards, preferences)
    notes = _constant(mean, wanted)
    for note in notes:
        warnings.warn(note, HoEWarning, stacklevel=2)
    return Steerability(
        spearman=_spearman(mean, wanted).tolist(),
        order_violations=_order_violations(mean, wanted).tolist(),
        expected_utility=expected_utility(mean, wanted),
        control_regret=_control_regret(mean, wanted),
        rows=len(rewards),
        preferences=len(wanted),
        warnings=notes,
    )


def spearman(rewards: Any, preferences: Any) -> FloatArray:
    """Spearman's rank correlation of λ_i and R_i for each objective, `(N,)`; arguments and errors as `steerability`.

    >>> from peft_hoe.metrics import spearman
    >>> spearman([[0.0, 1.0], [0.2, 0.5], [1.0, 0.7]], [[0, 1], [0.5, 0.5], [1, 0]]).round(6).tolist()
    [1.0, 0.5]
    """
    return np.asarray(steerability(rewards, preferences).spearman)


def order_violations(rewards: Any, preferences: Any) -> FloatArray:
    """Share of the pairs with λ_i greater whose R_i is smaller, `(N,)`; 0 where more weight never gives less.

    Args:
        rewards: R, `(P, N)`.
        preferences: λ, `(P, N)`.

    Raises:
        MetricError: as `steerability`.
        PreferenceError: a row of `preferences` is no point of the simplex.

    Warns:
        HoEWarning: all weights of an objective are equal, so that it has no pairs (NaN).

    >>> from peft_hoe.metrics import order_violations
    >>> order_violations([[0.0, 1.0], [0.2, 0.5], [1.0, 0.7]], [[0, 1], [0.5, 0.5], [1, 0]]).round(3).tolist()
    [0.0, 0.333]
    """
    mean, wanted = _by_preference(rewards, preferences)
    for note in _constant_weights(wanted):
        warnings.warn(note, HoEWarning, stacklevel=2)
    return _order_violations(mean, wanted)


def control_regret(rewards: Any, preferences: Any) -> float:
    """EUM − mean over λ of λ·R(π_λ): what a user of λ loses because another λ would have served better; at least 0.

    Args:
        rewards: R, `(P, N)`.
        preferences: λ, `(P, N)`.

    Raises:
        MetricError: as `steerability`.
        PreferenceError: a row of `preferences` is no point of the simplex.

    >>> from peft_hoe.metrics import control_regret
    >>> control_regret([[0.0, 0.5], [1.0, 1.0]], [[0, 1], [1, 0]])  # the second policy serves [0, 1] better by 0.5
    0.25
    """
    return _control_regret(*_by_preference(rewards, preferences))


def _by_preference(rewards: Any, preferences: Any) -> tuple[FloatArray, FloatArray]:
    """Mean rewards and the distinct preferences, both `(K, N)` with K ≥ 2."""
    rows = as_points(rewards, "rewards")
    wanted = as_preferences(preferences, rows.shape[1])
    if len(rows) != len(wanted):
        raise MetricError(
            f"there are {len(rows)} rows of rewards, but {len(wanted)} preferences; give one for each row",
            argument="preferences", value=len(wanted), allowed=len(rows),
        )  # fmt: skip
    # Adding 0 makes −0 and 0 the same row.
    distinct, first, group = np.unique(wanted.round(_DECIMALS) + 0.0, axis=0, return_index=True, return_inverse=True)
    if len(distinct) < 2:
        raise MetricError(
            f"all {len(rows)} rows have the preference {distinct[0].tolist()}; steering needs at least two",
            argument="preferences", value=distinct.tolist(), allowed="at least two different ones",
        )  # fmt: skip
    group = group.ravel()  # numpy 2.0 returns a column
    # Deviations from a group's first row are summed, so that equal rows have exactly their mean, and ties stay ties.
    deviations = np.zeros((len(distinct), rows.shape[1]))
    np.add.at(deviations, group, rows - rows[first][group])
    return rows[first] + deviations / np.bincount(group)[:, None], wanted[first]


def _spearman(rewards: FloatArray, preferences: FloatArray) -> FloatArray:
    weights = preferences.round(_DECIMALS)
    return np.asarray(
        [
            np.nan if _flat(column) or _flat(weight) else float(spearmanr(weight, column).statistic)
            for column, weight in zip(rewards.T, weights.T, strict=True)
        ]
    )


def _order_violations(rewards: FloatArray, preferences: FloatArray) -> FloatArray:
    weights = preferences.round(_DECIMALS)
    greater = weights[:, None] > weights  # (K, K, N)
    pairs = greater.sum(axis=(0, 1))
    violated = (greater & (rewards[:, None] < rewards)).sum(axis=(0, 1))
    return np.divide(violated, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _control_regret(rewards: FloatArray, preferences: FloatArray) -> float:
    """max_a λ·a ≥ λ·R(π_λ), so only rounding could make it negative."""
    realised = float((preferences * rewards).sum(axis=1).mean())
    return max(expected_utility(rewards, preferences) - realised, 0.0)


def _flat(column: FloatArray) -> bool:
    return bool(column.max() == column.min())


def _constant(rewards: FloatArray, preferences: FloatArray) -> list[str]:
    return _constant_weights(preferences) + [
        f"objective {i} has the same reward {column[0]:.6g} at all preferences: its rank correlation is undefined (NaN)"
        for i, column in enumerate(rewards.T)
        if _flat(column)
    ]


def _constant_weights(preferences: FloatArray) -> list[str]:
    return [
        f"objective {i} has the same weight {column[0]:.6g} in all preferences: its rank correlation and order violations "
        "are undefined (NaN)"
        for i, column in enumerate(preferences.round(_DECIMALS).T)
        if _flat(column)
    ]
