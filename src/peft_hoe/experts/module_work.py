"""The work on one module that may be done in any process: its task vectors are measured, its experts made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import HoEConfig
from .agreement import compare
from .build_inputs import BuildInputs
from .module_builder import ModuleBuilder
from .module_tensors import ModuleResult, module_tensors
from .options import BuildOptions
from .pruning import ThresholdSearch
from .task_vectors import TaskVectorReader, TaskVectors

Searches = dict[str, ThresholdSearch]


class ModuleWork:
    """Measures and makes modules, in any order.

    Args:
        inputs: base and policies.
        options: the settings.
        config: names, preferences and ranks of the experts.
        measured: whether all task vectors are measured before the first expert is made.
    """

    def __init__(self, inputs: BuildInputs, options: BuildOptions, config: HoEConfig, measured: bool) -> None:
        self._inputs, self._options, self._config, self._measured = inputs, options, config, measured
        self._reader = TaskVectorReader(inputs.base, inputs.policies, options.device)
        self._builder: ModuleBuilder | None = None

    def count(self, indices: Sequence[int], searches: Searches) -> tuple[list[dict[str, Any]], Searches]:
        """The comparisons of some modules, and their entries counted in `searches`."""
        comparisons = []
        for index in indices:
            vectors = self._read(index)
            comparisons.append(compare(vectors))
            for name, search in searches.items():
                search.count(vectors.deltas[name])
        return comparisons, searches

    def count_inside(self, indices: Sequence[int], searches: Searches) -> tuple[list[dict[str, Any]], Searches]:
        """The second look of searches that need one."""
        for index in indices:
            for name, delta in self._read(index, list(searches)).deltas.items():
                searches[name].count_inside(delta)
        return [], searches

    def make(self, index: int, thresholds: dict[str, float]) -> ModuleResult:
        """The experts of one module; `thresholds` are the same in every call."""
        if self._builder is None:
            self._builder = ModuleBuilder(self._inputs, self._options, self._config, thresholds)
        builder, target = self._builder, self._inputs.architecture.targets[index]
        vectors = self._read(index, builder.needed if self._measured else None)
        comparison = None if self._measured or target.apart else compare(vectors)
        factors, rows = builder.build(target, vectors)
        ranks = [factor.rank for factor in factors]
        tensors = {}
        if any(ranks):
            tensors = module_tensors(
                target,
                [(factor.b, factor.a) for factor in factors],
                self._options.dtype or self._inputs.dtype,
                lengths=self._config.interpolation == "norm",
            )
        return ModuleResult(ranks, tensors, rows, builder.take_dropped(), comparison)

    def _read(self, index: int, names: list[str] | None = None) -> TaskVectors:
        targets = self._inputs.architecture.targets
        if index + 1 < len(targets):
            self._reader.expect(targets[index + 1])
        return self._reader.read(targets[index], names)
