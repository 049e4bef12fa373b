"""Settings of a build that are chosen by a score on validation data: every candidate is built, scored and reported."""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ExpertError, HoEError, HoEWarning, check_choice
from .option_groups import Merging, Pruning

METHODS = ("grid", "cma")
_EVALUATIONS = 40
_START, _WIDTH = 0.5, 0.25  # of CMA-ES, in units of each interval

Score = Callable[[Path], float]
Point = dict[str, float]


@dataclass(frozen=True)
class Search:
    """What is searched; made by `search`.

    >>> from peft_hoe.experts import Search, search
    >>> isinstance(search(lambda adapter: 0.0, [1.0, 1.5]), Search)
    True

    Attributes:
        score: of a candidate adapter's directory; the highest wins.
        space: for a grid the values of each setting, for CMA-ES its lowest and highest.
        method: "grid" or "cma".
        evaluations: how many candidates CMA-ES may build.
        seed: of CMA-ES.
    """

    score: Score
    space: Mapping[str, Sequence[float]]
    method: str
    evaluations: int
    seed: int

    @property
    def candidates(self) -> int:
        """How many are built, at most; the best is then built once more."""
        return self.evaluations if self.method == "cma" else math.prod(map(len, self.space.values()))

    def run(
        self, build: Callable[..., Any], settings: Mapping[str, Any], folder: Path
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Build and score candidates.

        Args:
            build: takes `output_dir` and settings.
            settings: of `build_adapter`, those that stay.
            folder: where candidates are built, one after the other.

        Returns:
            the settings with the best point in them, and the curve: `{"point": ..., "score": ...}` in order.

        Raises:
            ExpertError: a setting that cannot be searched, or that the merge method does not have.
            HoEError: a score that is no finite number.
        """
        check_settings(self.space, settings)
        curve: list[dict[str, Any]] = []

        def evaluate(point: Point) -> float:
            with tempfile.TemporaryDirectory(dir=folder) as place, warnings.catch_warnings():
                warnings.simplefilter("ignore", HoEWarning)  # the chosen build gives them
                output = Path(place) / "adapter"
                build(output_dir=output, **applied(point, settings))
                found = _number(self.score(output), point)
            curve.append({"point": point, "score": found})
            return found

        if self.method == "grid":
            for values in itertools.product(*self.space.values()):
                evaluate(dict(zip(self.space, map(float, values), strict=True)))
        else:
            self._cma(evaluate)
        best = max(curve, key=lambda row: row["score"])
        return applied(best["point"], settings), curve

    def _cma(self, evaluate: Callable[[Point], float]) -> None:
        """CMA-ES in the unit cube."""
        try:
            import cma  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise HoEError(
                'method="cma" needs the package cma; pip install "peft-hoe[search]"', argument="method", value="cma"
            ) from error
        options = {
            "bounds": [0, 1],
            "seed": self.seed + 1,
            "maxfevals": self.evaluations,
            "verbose": -9,
            "verb_log": 0,
        }  # fmt: skip  a seed of 0 would be the clock
        strategy = cma.CMAEvolutionStrategy([_START] * len(self.space), _WIDTH, options)
        left = self.evaluations
        while left > 0 and not strategy.stop():
            asked = strategy.ask()
            tried = asked[:left]
            scores = [-evaluate(self._point(unit)) for unit in tried]
            left -= len(tried)
            if len(tried) < len(asked):
                break
            strategy.tell(asked, scores)

    def _point(self, unit: Sequence[float]) -> Point:
        return {
            name: low + float(part) * (high - low)
            for (name, (low, high)), part in zip(self.space.items(), unit, strict=True)
        }


def search(
    score: Callable[[Any], float],
    grid: Sequence[float] | Mapping[str, Sequence[float]],
    *,
    method: str = "grid",
    evaluations: int = _EVALUATIONS,
    seed: int = 0,
) -> Search:
    """For `build_adapter(rescale=search(score, grid))`: choose settings by a score on validation data.

    Every candidate is built in a hidden folder beside the output, scored and deleted; then the best is built where it belongs.
    The report holds the curve.

    Args:
        score: takes the directory of an adapter and returns a number; higher is better. It must know nothing of test data.
        grid: numbers to multiply every expert by; or `{setting: values}`, of which all combinations are tried. Settings are
            "rescale" (the factor), "prune" (the share) and the options of the merge method, such as "density". For
            `method="cma"` the values are the lowest and the highest.
        method: "grid", or "cma" for CMA-ES (needs the `search` extra), which takes two settings or more.
        evaluations: how many candidates CMA-ES may build.
        seed: of CMA-ES.

    Raises:
        ExpertError: an empty grid, a value that is no number, or too few settings.

    >>> from peft_hoe import build_adapter, demo
    >>> from peft_hoe.experts import search
    >>> def score(adapter):  # in earnest: generate for validation prompts and measure the rewards
    ...     return adapter.joinpath("adapter_model.safetensors").stat().st_size
    >>> report = build_adapter(
    ...     demo.BASE, demo.POLICIES, "adapter", rescale=search(score, [1.0, 1.5]), progress=False
    ... )
    >>> [row["point"] for row in report.search]
    [{'rescale': 1.0}, {'rescale': 1.5}]
    """
    check_choice("method", method, METHODS, ExpertError)
    space = (
        {str(name): list(values) for name, values in grid.items()}
        if isinstance(grid, Mapping)
        else {"rescale": list(grid)}
    )
    if not space or not all(space.values()):
        raise ExpertError(f"grid is {grid!r}; give at least one value for each setting", argument="grid", value=grid)
    for name, values in space.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ExpertError(
                    f"grid has {value!r} for {name!r}; it must be a finite number", argument="grid", value=value
                )
        if method == "cma" and not (len(values) == 2 and values[0] < values[1]):
            raise ExpertError(
                f"grid has {values} for {name!r}; method='cma' takes the lowest and the highest value",
                argument="grid", value=values,
            )  # fmt: skip
    if method == "cma" and len(space) < 2:
        raise ExpertError(
            f"grid has one setting, {list(space)}; method='cma' takes two or more: use a grid",
            argument="grid", value=grid,
        )  # fmt: skip
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise ExpertError(
            f"evaluations is {evaluations!r}; it must be a whole number of at least 1",
            argument="evaluations", value=evaluations,
        )  # fmt: skip
    return Search(score, space, method, evaluations, seed)


def check_settings(space: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """See that a build with these settings has what is searched.

    Raises:
        ExpertError: names what it has.
    """
    known = ["rescale", "prune", *Merging.of(settings["merging"]).options]
    unknown = sorted(set(space) - set(known))
    if unknown:
        raise ExpertError(
            f"the grid names {unknown}; with this merge method {known} can be searched",
            argument="grid", value=unknown, allowed=known,
        )  # fmt: skip


def applied(point: Mapping[str, float], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a build with the values of a point in them."""
    found, merging = dict(settings), Merging.of(settings["merging"])
    options = {name: value for name, value in point.items() if name in merging.options}
    found["merging"] = replace(merging, options={**merging.options, **options})
    if "prune" in point:
        found["pruning"] = replace(Pruning.of(settings["pruning"]), share=point["prune"])
    if "rescale" in point:
        found["rescale"] = point["rescale"]
    return found


def _number(score: Any, point: Point) -> float:
    try:
        number = float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise HoEError(f"the score of {point} is {score!r}; it must be a finite number", argument="score", value=score)
    return number
