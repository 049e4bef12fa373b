"""What of a policy's change no expert can hold, because it lies outside the weights in scope."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .architecture import LINEAR, Architecture
from .checkpoints import FLOATING
from .model_weights import ModelWeights

_CHUNK = 1 << 24  # entries of a tensor out of scope that are read at once


@dataclass
class ChangeOutOfScope:
    """A policy's change in norms, biases, embeddings and whatever else is not a linear layer in scope.

    Attributes:
        squared: `{kind: squared norm of the change}`, kinds as `Architecture.kind` names them.
        notes: what could not be compared, and why.
    """

    squared: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def change_out_of_scope(base: ModelWeights, policy: ModelWeights, architecture: Architecture) -> ChangeOutOfScope:
    """Squared norms of the change per kind of tensor out of scope, read in pieces.

    Missing, extra and resized tensors are allowed here, since experts do not hold them; each is noted.
    """
    change = ChangeOutOfScope()
    counted_elsewhere = set(architecture.names.tied)  # with the weight that they share
    for name in sorted(set(base.located) | set(policy.located)):
        kind = architecture.kind(name)
        if kind == LINEAR or name in counted_elsewhere:
            continue
        if name not in policy.located or name not in base.located:
            absent, present = (policy, base) if name not in policy.located else (base, policy)
            change.notes.append(
                f"{name} {present.shape(name)} is in {present.label} but not in {absent.label}; ignored"
            )
            continue
        squared = _squared_change(base, policy, name, change.notes)
        change.squared[kind] = change.squared.get(kind, 0.0) + squared
    return change


def _squared_change(base: ModelWeights, policy: ModelWeights, name: str, notes: list[str]) -> float:
    shapes = [weights.shape(name) for weights in (base, policy)]
    if shapes[0][1:] != shapes[1][1:] or len(shapes[0]) != len(shapes[1]):
        notes.append(f"{name} has shape {shapes[0]} in the base but {shapes[1]} in {policy.label}; ignored")
        return 0.0
    if shapes[0] != shapes[1]:
        notes.append(
            f"{name} has {shapes[0][0]} rows in the base but {shapes[1][0]} in {policy.label}; shared rows compared"
        )
    total = 0.0
    for start, stop in _pieces(shapes):
        rows = [weights.rows(name, start, stop) for weights in (base, policy)]
        if not all(piece.dtype in FLOATING for piece in rows):
            return 0.0  # position ids and masks
        total += float((rows[1].double() - rows[0].double()).square().sum())
    if not torch.isfinite(torch.tensor(total)):
        notes.append(f"the change of {name} is not finite; ignored")
        return 0.0
    return total


def _pieces(shapes: list[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of pieces of the rows that both tensors have."""
    if not shapes[0]:
        yield 0, 1
        return
    count = min(shape[0] for shape in shapes)
    width = max(1, int(torch.Size(shapes[0][1:]).numel()))
    step = max(1, _CHUNK // width)
    yield from ((start, min(start + step, count)) for start in range(0, count, step))
