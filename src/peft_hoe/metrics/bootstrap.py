"""How sure a comparison of fronts is: a hierarchical bootstrap over seeds of training and prompts.

Each replicate draws seeds of training with replacement, for each method on its own, since its runs are its own. Then it draws
prompts with replacement, once: all seeds, preferences and methods answer the same prompts, so what makes a prompt easy for one
makes it easy for the other, and cancels in their difference. A replicate's point is the mean over its seeds of the mean over
its prompts. "A dominates B" is worth saying only if it holds in at least 95 % of the replicates.

Shapes: S seeds, K preferences, P prompts, N objectives, R replicates. S and K may differ between methods.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import HoEWarning, MetricError, check_choice
from ..preference import FloatArray
from .intervals import KINDS, Interval
from .validation import as_numbers

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Replicates:
    """Mean points of each method, in the data and in the replicates.

    >>> from peft_hoe.metrics import bootstrap
    >>> better, worse = [[[[1.0], [3.0]]]], [[[[0.0], [2.0]]]]  # one seed, one preference, two prompts, one objective
    >>> drawn = bootstrap({"better": better, "worse": worse}, replicates=100)
    >>> drawn.share(lambda a, b: bool(a[0, 0] > b[0, 0]))  # the same prompts for both: always
    1.0
    """

    estimates: dict[str, FloatArray]
    """`(K, N)` for each method."""
    points: dict[str, FloatArray]
    """`(R, K, N)` for each method; NaN in a replicate that has no scale."""
    prompts: IntArray
    """The prompts that were drawn, `(R, P)`, for all methods."""
    seeds: dict[str, IntArray]
    """The seeds that were drawn, `(R, S)` for each method."""

    def interval(
        self,
        statistic: Callable[..., Any],
        *methods: str,
        level: float = 0.95,
        kind: str = "percentile",
        bounds: tuple[Any, Any] = (-np.inf, np.inf),
    ) -> Interval:
        """The bootstrap interval of a statistic.

        Args:
            statistic: takes the mean points `(K, N)` of each of `methods`; returns a number or an array of fixed shape.
            methods: default all, in their order.
            level: share of the replicates inside.
            kind: "percentile" for means and for comparisons, "basic" for what is largest or best of one method's points; see
                `Interval`.
            bounds: what the statistic lies between, numbers or arrays of its shape; the ends of the interval do, too.

        Raises:
            MetricError: an unknown method or kind, or a level that is not between 0 and 1.

        Warns:
            HoEWarning: the statistic warned, or was NaN in some replicates; once, with how often.
        """
        if not 0 < level < 1:
            raise MetricError(
                f"level is {level}; it must be between 0 and 1, such as 0.95",
                argument="level", value=level, allowed="between 0 and 1",
            )  # fmt: skip
        check_choice("kind", kind, list(KINDS), MetricError)
        names = self._methods(methods)
        notes: list[str] = []
        estimate = np.asarray(statistic(*(self.estimates[name] for name in names)), dtype=np.float64)
        nothing = np.full_like(estimate, np.nan)
        values = np.asarray(self._evaluate(statistic, names, notes, nothing), dtype=np.float64)
        undefined = np.isnan(values).sum(axis=0)
        if undefined.any():
            notes.append(f"the statistic is NaN in up to {undefined.max()} of {len(values)} replicates; left out")
        low, high = KINDS[kind](estimate, values, level)
        low, high = (np.clip(end, *bounds) for end in (low, high))
        for note in notes:
            warnings.warn(note, HoEWarning, stacklevel=2)
        return Interval(estimate, low, high, level, np.asarray(undefined), notes)

    def share(self, statement: Callable[..., Any], *methods: str) -> float:
        """The share of the replicates in which a statement holds.

        Args:
            statement: takes the mean points `(K, N)` of each of `methods`; returns one bool.
            methods: default all, in their order.

        Raises:
            MetricError: an unknown method, or an answer that is not one bool.

        Warns:
            HoEWarning: the statement warned, or some replicates have no points to ask about, where it counts as false; once,
                with how often.
        """
        notes: list[str] = []
        names = self._methods(methods)
        answers = self._evaluate(statement, names, notes, False)
        without = sum(any(np.isnan(front).any() for front in fronts) for fronts in self._fronts(names))
        if without:
            notes.append(f"{without} of {len(answers)} replicates have no scale; the statement counts as false there")
        for answer in answers:
            if not isinstance(answer, (bool, np.bool_)):
                raise MetricError(
                    f"the statement returned {answer!r}; it must return True or False",
                    argument="statement", value=answer, allowed=(True, False),
                )  # fmt: skip
        for note in notes:
            warnings.warn(note, HoEWarning, stacklevel=2)
        return float(np.mean(answers))

    def _methods(self, methods: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in methods if name not in self.points]
        if unknown:
            raise MetricError(
                f"there is no method {unknown[0]!r}; the methods are {list(self.points)}",
                argument="methods", value=unknown[0], allowed=list(self.points),
            )  # fmt: skip
        return methods or tuple(self.points)

    def _fronts(self, names: tuple[str, ...]) -> Iterator[tuple[FloatArray, ...]]:
        """The points of the methods, replicate by replicate."""
        return zip(*(self.points[name] for name in names), strict=True)

    def _evaluate(
        self, function: Callable[..., Any], names: tuple[str, ...], notes: list[str], undefined: Any
    ) -> list[Any]:
        """One answer for each replicate, `undefined` where a point is none; thousands of equal warnings become one note."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", HoEWarning)
            answers = [
                undefined if any(np.isnan(front).any() for front in fronts) else function(*fronts)
                for fronts in self._fronts(names)
            ]
        ours = [str(item.message) for item in caught if issubclass(item.category, HoEWarning)]
        if ours:
            notes.append(f"{len(ours)} warnings in {len(answers)} replicates; the first: {ours[0]}")
        for item in caught:
            if not issubclass(item.category, HoEWarning):
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
        return answers


def bootstrap(values: Mapping[str, Any], *, replicates: int = 1000, seed: int = 0) -> Replicates:
    """Replicates of the mean points of one or several methods.

    Args:
        values: for each method its rewards `(S, K, P, N)`; NaN is no reward, and left out of the mean. All methods answered
            the same P prompts, in the same order.
        replicates: R.
        seed: of the drawing. Adding a method at the end leaves the others' replicates as they were.

    Raises:
        MetricError: no method, wrong shapes, methods that differ in P or N, infinite rewards, or a point without any reward.

    >>> from peft_hoe.metrics import bootstrap
    >>> bootstrap({"hoe": [[[[1.0, 0.0], [1.0, 2.0]]]]}, replicates=10).points["hoe"].shape
    (10, 1, 2)
    """
    if not isinstance(values, Mapping) or not values:
        raise MetricError(
            f"values is {type(values).__name__}; give a mapping of one or more methods: {{'hoe': rewards}}",
            argument="values", value=values, allowed="a mapping of one or more methods",
        )  # fmt: skip
    if replicates < 1:
        raise MetricError(
            f"replicates is {replicates}; at least 1 is needed, 1000 for a 95 % interval",
            argument="replicates", value=replicates, allowed="at least 1",
        )  # fmt: skip
    tables = {str(name): _as_rewards(name, table) for name, table in values.items()}
    first, *others = tables
    for name in others:
        if tables[name].shape[2:] != tables[first].shape[2:]:
            raise MetricError(
                f"the methods must share prompts and objectives: {first!r} has (prompts, objectives) "
                f"{tables[first].shape[2:]}, {name!r} has {tables[name].shape[2:]}",
                argument=f"values[{name!r}]", value=tables[name].shape[2:], allowed=tables[first].shape[2:],
            )  # fmt: skip
    rng = np.random.default_rng(seed)
    prompts = rng.integers(tables[first].shape[2], size=(replicates, tables[first].shape[2]))
    seeds = {name: rng.integers(len(table), size=(replicates, len(table))) for name, table in tables.items()}
    every = {name: np.arange(len(table))[None] for name, table in tables.items()}
    everyone = np.arange(prompts.shape[1])[None]
    return Replicates(
        estimates={name: _mean_points(name, table, every[name], everyone)[0] for name, table in tables.items()},
        points={name: _mean_points(name, table, seeds[name], prompts) for name, table in tables.items()},
        prompts=prompts,
        seeds=seeds,
    )


def _as_rewards(name: Any, values: Any) -> FloatArray:
    table = as_numbers(values, f"values[{name!r}]")
    if table.ndim != 4 or table.size == 0:
        raise MetricError(
            f"values[{name!r}] has shape {table.shape}; expected (seeds, preferences, prompts, objectives), none of them 0. "
            "For one seed of training add an axis: rewards[None]",
            argument=f"values[{name!r}]", value=table.shape, allowed="(seeds, preferences, prompts, objectives)",
        )  # fmt: skip
    if np.isinf(table).any():
        raise MetricError(
            f"values[{name!r}] holds infinity; rewards must be finite, or NaN where there is none",
            argument=f"values[{name!r}]", allowed="finite numbers, or NaN",
        )  # fmt: skip
    silent = np.argwhere(np.isnan(table).all(axis=2))
    if len(silent):
        seed, preference, objective = silent[0].tolist()
        raise MetricError(
            f"values[{name!r}] has no reward at all for objective {objective} at seed {seed}, preference {preference}; "
            "leave that seed out, or score its answers",
            argument=f"values[{name!r}]", allowed="a reward for every seed, preference and objective",
        )  # fmt: skip
    return table


def _mean_points(name: str, table: FloatArray, seeds: IntArray, prompts: IntArray) -> FloatArray:
    """Mean points `(R, K, N)` of rewards `(S, K, P, N)` for the drawn seeds `(R, S)` and prompts `(R, P)`."""
    per_seed = _prompt_means(table, _counts(prompts, table.shape[2]))  # (R, S, K, N)
    known = ~np.isnan(per_seed)
    weights = _counts(seeds, table.shape[0])[:, :, None, None] * known
    total = weights.sum(axis=1)
    if not total.all():
        raise MetricError(
            f"values[{name!r}] has too few rewards: {int((total == 0).any(axis=(1, 2)).sum())} of {len(total)} replicates "
            "drew no prompt with a reward for some objective. Score more prompts",
            argument=f"values[{name!r}]", allowed="a reward for every objective in every replicate",
        )  # fmt: skip
    # Around the first seed's, so that the mean of equal numbers is that number
    first = np.where(known[:, :1], per_seed[:, :1], 0.0)
    return np.asarray(first[:, 0] + (weights * np.where(known, per_seed - first, 0.0)).sum(axis=1) / total)


def _prompt_means(table: FloatArray, counts: FloatArray) -> FloatArray:
    """Means over prompts `(R, S, K, N)`, each prompt of `(S, K, P, N)` as often as `counts` `(R, P)` says; NaN without any.

    Prompts are added in their order. BLAS adds in an order that depends on the column, and equal rewards would then get means
    that differ in the last digit, so that one "dominates" the other.
    """
    columns = np.moveaxis(table, 2, 0)  # (P, S, K, N)
    flat = columns.reshape(len(columns), -1)
    known = ~np.isnan(flat)
    total = np.zeros((len(counts), flat.shape[1]))
    for count, rewards in zip(counts.T, np.where(known, flat, 0.0), strict=True):
        total += count[:, None] * rewards
    number = counts @ known.astype(np.float64)  # of integers, exact
    means = np.divide(total, number, out=np.full_like(total, np.nan), where=number > 0)
    return np.asarray(means.reshape(len(counts), *columns.shape[1:]))


def _counts(draws: IntArray, n: int) -> FloatArray:
    """How often each of `n` was drawn, `(R, n)`, from indices `(R, D)`."""
    rows = np.arange(len(draws))[:, None] * n
    return np.bincount((draws + rows).ravel(), minlength=len(draws) * n).reshape(-1, n).astype(np.float64)
