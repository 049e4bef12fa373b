"""What of a policy's change no expert can hold, because it lies outside the weights in scope."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .architecture import LINEAR, Architecture
from .checkpoints import FLOATING
from .model_weights import ModelWeights
from .pieces import row_ranges


@dataclass
class ChangeOutOfScope:
    """A policy's change in norms, biases, embeddings and whatever else is not a linear layer in scope.

    Attributes:
        squared: `{kind: squared norm of the change}`, kinds as `Architecture.kind` names them.
        notes: what could not be compared, and why.
    """

    squared: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class ComparisonOutOfScope:
    """Squared norms of a policy's change per kind of tensor out of scope, read in pieces.

    Missing, extra and resized tensors are allowed here, since experts do not hold them; each is noted.

    Args:
        base: its weights.
        policy: a policy's.
        architecture: of the base.
    """

    def __init__(self, base: ModelWeights, policy: ModelWeights, architecture: Architecture) -> None:
        self._base, self._policy, self._architecture = base, policy, architecture
        elsewhere = set(architecture.names.tied)  # counted with the weight that they share
        found = sorted(set(base.located) | set(policy.located))
        self._names = [name for name in found if architecture.kind(name) != LINEAR and name not in elsewhere]
        self._both = [name for name in self._names if name in base.located and name in policy.located]
        self._compared: dict[str, tuple[float, list[str]]] = {}  # squared change, notes

    def compare_what_is_here(self) -> None:
        """Compare what was not compared yet and can be read without fetching a file."""
        for name in self._both:
            if name not in self._compared and self._base.here(name) and self._policy.here(name):
                self._compare(name)

    def finish(self) -> ChangeOutOfScope:
        """Compare the rest, one file after the other; the result does not depend on what was compared before."""
        left = [name for name in self._both if name not in self._compared]
        for name in sorted(left, key=lambda name: (self._base.shard(name) or "", self._policy.shard(name) or "")):
            self._compare(name)
        change = ChangeOutOfScope()
        for name in self._names:
            if name not in self._compared:
                base, policy = self._base, self._policy
                absent, present = (policy, base) if name not in policy.located else (base, policy)
                change.notes.append(
                    f"{name} {present.shape(name)} is in {present.label} but not in {absent.label}; ignored"
                )
                continue
            squared, notes = self._compared[name]
            kind = self._architecture.kind(name)
            change.squared[kind] = change.squared.get(kind, 0.0) + squared
            change.notes += notes
        return change

    def _compare(self, name: str) -> None:
        notes: list[str] = []
        self._compared[name] = (squared_change(self._base, self._policy, name, notes), notes)


def squared_change(base: ModelWeights, policy: ModelWeights, name: str, notes: list[str] | None = None) -> float:
    """The squared norm of a parameter's change, read in pieces; what cannot be compared is 0, and noted.

    Args:
        base: the base's weights.
        policy: the policy's.
        name: of the parameter.
        notes: are added to.
    """
    notes = [] if notes is None else notes
    before, after = base.shape(name), policy.shape(name)
    if before[1:] != after[1:] or len(before) != len(after):
        notes.append(f"{name} has shape {before} in the base but {after} in {policy.label}; ignored")
        return 0.0
    if before != after:
        notes.append(f"{name} has {before[0]} rows in the base but {after[0]} in {policy.label}; shared rows compared")
    if not {base.stored_dtype(name), policy.stored_dtype(name)} <= set(FLOATING):
        return 0.0  # position ids and masks
    total = 0.0
    for start, stop in row_ranges(min(before, after)):
        total += _squared_distance(base.rows(name, start, stop), policy.rows(name, start, stop))
    if not math.isfinite(total):
        notes.append(f"the change of {name} is not finite; ignored")
        return 0.0
    return total


def _squared_distance(before: Tensor, after: Tensor) -> float:
    """The squared distance of two pieces of a weight, most often the same in both."""
    if before.dtype == after.dtype and torch.equal(before, after):
        return 0.0
    wide = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    change = after.to(wide).sub(before.to(wide)).reshape(-1)
    return float(torch.dot(change, change))
