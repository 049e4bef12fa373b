"""Task vectors: what training changed, tau = policy - base, float32, one module at a time.

Shapes: a module's task vector is (d_out, d_in) however its weight is stored; K policies.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError
from .architecture import LinearModule
from .lora_policy import LoraPolicy
from .model_weights import ModelWeights


def task_vectors(
    base: ModelWeights | None, policies: Mapping[str, ModelWeights | LoraPolicy], target: LinearModule
) -> dict[str, Tensor]:
    """Task vectors of all policies in one module; the base's weight is read once.

    Returns:
        `{policy: (d_out, d_in)}` float32.

    Raises:
        CheckpointError: NaN or infinity; the message names the tensor.
    """
    start = base.read(target.weight) if base is not None else None
    deltas = {}
    for name, policy in policies.items():
        if isinstance(policy, LoraPolicy):
            factors = policy.factors(target.name)
            deltas[name] = factors[0] @ factors[1] if factors else torch.zeros(target.d_out, target.d_in)
            continue
        if start is None:
            raise CheckpointError(f"{policy.label} is a full set of weights, which needs the base's weights")
        delta = (policy.read(target.weight) - start).float()
        if not bool(delta.isfinite().all()):
            raise CheckpointError(
                f"{policy.label}: the difference from the base in tensor {target.weight!r} holds NaN or infinity; the "
                "checkpoint is damaged, or its training diverged"
            )
        deltas[name] = delta.T if target.transposed else delta
    return deltas


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

    def add(self, deltas: Mapping[str, Tensor]) -> None:
        """Count one module's task vectors."""
        for name, delta in deltas.items():
            norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
            self.squared[name] = self.squared.get(name, 0.0) + norm**2
        for pair in itertools.combinations(deltas, 2):
            # Compared only as long as they are the same
            self._equal[pair] = self._equal.get(pair, True) and torch.equal(deltas[pair[0]], deltas[pair[1]])
            product = deltas[pair[0]] * deltas[pair[1]]
            self._dots[pair] = self._dots.get(pair, 0.0) + float(product.sum(dtype=torch.float64))
            self._same[pair] = self._same.get(pair, 0) + int((product > 0).sum())
            self._both[pair] = self._both.get(pair, 0) + int((product != 0).sum())

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
