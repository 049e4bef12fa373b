"""Task vectors: what training changed, tau = policy - base, float32, one module at a time.

Shapes: a module's task vector is (d_out, d_in) however its weight is stored; K policies.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .architecture import LINEAR, Architecture, LinearModule
from .checkpoints import FLOATING, Checkpoint, read_json
from .lora_policy import LoraPolicy

_CHUNK = 1 << 24  # entries of a tensor out of scope that are read at once


class Weights:
    """A full set of weights: the base's or a fine-tune's.

    Args:
        directory: a checkpoint.
        label: how errors call it.
        architecture: of the base.
        allow_pickle: as in `Checkpoint`.

    Raises:
        CheckpointError: a weight in scope is missing or has another shape; the message shows both shapes.
    """

    def __init__(self, directory: Path, label: str, architecture: Architecture, *, allow_pickle: bool = False) -> None:
        self.label = label
        self.checkpoint = Checkpoint(directory, label, allow_pickle=allow_pickle)
        self.located = architecture.names.locate(self.checkpoint.names)
        config = directory / "config.json"
        own_type = read_json(config).get("model_type") if config.is_file() else architecture.model_type
        self._check_fit(architecture, own_type)
        self.dtype = self.checkpoint.dtype(self.located[architecture.targets[0].weight])

    def _check_fit(self, architecture: Architecture, own_type: str | None) -> None:
        kinds = "" if own_type == architecture.model_type else f" (its config says {own_type!r})"
        for target in architecture.targets:
            expected = (
                f"{target.weight!r} of shape {target.shape} of the base's architecture {architecture.model_type!r}"
            )
            if target.weight not in self.located:
                raise CheckpointError(
                    f"{self.label} has no tensor for {expected}{kinds}; its tensors are such as "
                    f"{self._example()}. Pass a checkpoint of the base's architecture, or exclude the module"
                )
            name = self.located[target.weight]
            shape, dtype = self.checkpoint.shape(name), self.checkpoint.dtype(name)
            if shape != target.shape:
                raise CheckpointError(
                    f"{self.label}: tensor {name!r} has shape {shape}, but {expected} was expected{kinds}; policies "
                    "must be fine-tunes of the base"
                )
            if dtype not in FLOATING:
                raise CheckpointError(
                    f"{self.label}: tensor {name!r} is stored as {dtype}, which means nothing without its quantiser; "
                    "pass the weights in float32, bfloat16 or float16"
                )
        if kinds:
            raise CheckpointError(
                f"{self.label} is a {own_type!r}, but the base is a {architecture.model_type!r}; policies must be "
                "fine-tunes of the base"
            )

    def _example(self) -> str:
        return ", ".join(f"{name!r} {self.checkpoint.shape(name)}" for name in self.checkpoint.names[:2]) or "none"

    def read(self, parameter: str) -> Tensor:
        """One parameter, in float32 or float64."""
        tensor = self.checkpoint.tensor(self.located[parameter])
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def task_vectors(
    base: Weights | None, policies: Mapping[str, Weights | LoraPolicy], target: LinearModule
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


@dataclass
class Outside:
    """What of a policy's change lies outside the weights in scope.

    Attributes:
        squared: `{kind: squared norm}`.
        notes: what could not be compared, and why.
    """

    squared: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def outside_scope(base: Weights, policy: Weights, architecture: Architecture) -> Outside:
    """Squared norms of the change per kind of tensor out of scope, read in pieces.

    Missing, extra and resized tensors are allowed here, since experts do not hold them; each is noted.
    """
    found = Outside()
    skipped = set(architecture.names.tied)  # counted with the weight that they share
    for name in sorted(set(base.located) | set(policy.located)):
        kind = architecture.kind(name)
        if kind == LINEAR or name in skipped:
            continue
        if name not in policy.located or name not in base.located:
            absent, present = (policy, base) if name not in policy.located else (base, policy)
            shape = present.checkpoint.shape(present.located[name])
            found.notes.append(f"{name} {shape} is in {present.label} but not in {absent.label}; ignored")
            continue
        squared = _squared_change(base, policy, name, found.notes)
        found.squared[kind] = found.squared.get(kind, 0.0) + squared
    return found


def _squared_change(base: Weights, policy: Weights, name: str, notes: list[str]) -> float:
    shapes = [weights.checkpoint.shape(weights.located[name]) for weights in (base, policy)]
    if shapes[0][1:] != shapes[1][1:] or len(shapes[0]) != len(shapes[1]):
        notes.append(f"{name} has shape {shapes[0]} in the base but {shapes[1]} in {policy.label}; ignored")
        return 0.0
    if shapes[0] != shapes[1]:
        notes.append(
            f"{name} has {shapes[0][0]} rows in the base but {shapes[1][0]} in {policy.label}; shared rows compared"
        )
    total = 0.0
    for start, stop in _pieces(shapes):
        rows = [weights.checkpoint.rows(weights.located[name], start, stop) for weights in (base, policy)]
        if not all(piece.dtype in FLOATING for piece in rows):
            return 0.0  # position ids and masks
        total += float((rows[1].double() - rows[0].double()).square().sum())
    if not torch.isfinite(torch.tensor(total)):
        notes.append(f"the change of {name} is not finite; ignored")
        return 0.0
    return total


def _pieces(shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    if not shapes[0]:
        yield 0, 1
        return
    count = min(shape[0] for shape in shapes)
    width = max(1, int(torch.Size(shapes[0][1:]).numel()))
    step = max(1, _CHUNK // width)
    yield from ((start, min(start + step, count)) for start in range(0, count, step))


class Agreement:
    """Cosine and sign agreement of every pair of task vectors, over all weights in scope, streamed."""

    def __init__(self) -> None:
        self._dots: dict[tuple[str, str], float] = {}
        self._same: dict[tuple[str, str], int] = {}
        self._both: dict[tuple[str, str], int] = {}
        self.squared: dict[str, float] = {}

    def add(self, deltas: Mapping[str, Tensor]) -> None:
        """One module's task vectors."""
        for name, delta in deltas.items():
            norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
            self.squared[name] = self.squared.get(name, 0.0) + norm**2
        for pair in itertools.combinations(deltas, 2):
            product = deltas[pair[0]] * deltas[pair[1]]
            self._dots[pair] = self._dots.get(pair, 0.0) + float(product.sum(dtype=torch.float64))
            self._same[pair] = self._same.get(pair, 0) + int((product > 0).sum())
            self._both[pair] = self._both.get(pair, 0) + int((product != 0).sum())

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
