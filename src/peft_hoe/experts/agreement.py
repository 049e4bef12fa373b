"""How far the task vectors of two policies agree: conflict, seen before any training."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from .pieces import pieces
from .task_vectors import TaskVectors


def compare(vectors: TaskVectors) -> dict[str, Any]:
    """What `Agreement` must know of one module's task vectors, in JSON types.

    Returns:
        `norms`: `{policy: Frobenius norm}`; `pairs`: for each pair of policies in order the inner product, of how many entries
        the signs agree, of how many neither is 0, and whether all entries are the same.
    """
    rows = []
    for first, second in itertools.combinations(vectors.deltas, 2):
        one, other = vectors.deltas[first], vectors.deltas[second]
        same = vectors.norms[first] == vectors.norms[second] and torch.equal(one, other)
        rows.append([*_compare(one, other), same])
    return {"norms": dict(vectors.norms), "pairs": rows}


class Agreement:
    """Cosine and sign agreement of every pair of task vectors, over all weights in scope, streamed.

    Attributes:
        squared: `{policy: squared norm so far}`.
    """

    def __init__(self) -> None:
        self._dots: dict[tuple[str, str], float] = {}
        self._same: dict[tuple[str, str], int] = {}
        self._both: dict[tuple[str, str], int] = {}
        self._equal: dict[tuple[str, str], bool] = {}
        self.squared: dict[str, float] = {}

    def add(self, comparison: dict[str, Any]) -> None:
        """Count one module's `compare`; the sums depend on the order of modules by rounding."""
        for name, norm in comparison["norms"].items():
            self.squared[name] = self.squared.get(name, 0.0) + norm**2
        pairs = itertools.combinations(comparison["norms"], 2)
        for pair, (dot, same, both, equal) in zip(pairs, comparison["pairs"], strict=True):
            self._dots[pair] = self._dots.get(pair, 0.0) + dot
            self._same[pair] = self._same.get(pair, 0) + same
            self._both[pair] = self._both.get(pair, 0) + both
            self._equal[pair] = self._equal.get(pair, True) and equal

    def equal(self) -> list[tuple[str, str]]:
        """The pairs whose task vectors are the same in every entry."""
        return [pair for pair, equal in self._equal.items() if equal]

    def pairs(self) -> list[dict[str, object]]:
        """`[{"policies": [a, b], "cosine": c, "sign_agreement": s}]`, s over entries that both changed; 0/0 = 0."""
        rows: list[dict[str, object]] = []
        for pair, dot in self._dots.items():
            length = (self.squared[pair[0]] * self.squared[pair[1]]) ** 0.5
            both = self._both[pair]
            rows.append(
                {
                    "policies": list(pair),
                    "cosine": dot / length if length else 0.0,
                    "sign_agreement": self._same[pair] / both if both else 0.0,
                }
            )
        return rows


def _compare(first: Tensor, second: Tensor) -> tuple[float, int, int]:
    """The inner product, and of how many entries the signs agree, and of how many neither is 0."""
    dot, agreeing, both = 0.0, 0.0, 0.0
    for one, other in pieces(first, second):
        dot += float(torch.dot(one, other))
        signs = torch.sign(one) * torch.sign(other)
        agreeing += float(signs.sum())  # less those that disagree
        both += float(signs.abs().sum())
    return dot, round((both + agreeing) / 2), round(both)
