"""Methods whose weights depend on the preference, so that all rows of a forward must share one.

Shapes: K rows, N objectives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...generation.by_preference import by_preference, joined
from ...generation.completer import Completer
from ...preference import FloatArray
from ..methods.fingerprints import Source, source_digest


class PerPreference(ABC):
    """One state of the weights after the other; a subclass says what a state is.

    Args:
        name: of the method.
        objectives: the N names, or None where only the rewards know them.
        completer: how it generates.
        identity: whatever else changes the texts; plain JSON.
    """

    mixes_rows = False

    def __init__(self, name: str, objectives: Sequence[str] | None, completer: Completer, identity: Any) -> None:
        self.name = name
        self.objectives = None if objectives is None else tuple(objectives)
        self.completer = completer
        self.identity = identity

    @property
    def decoding(self) -> dict[str, Any]:
        """How it generates, as plain JSON."""
        return self.completer.decoding.record

    def fingerprint(self) -> str:
        """Changes with the policies and the method's options."""
        return hashlib.sha256(json.dumps([self.name, self.identity], sort_keys=True, default=str).encode()).hexdigest()

    @abstractmethod
    def at(self, preference: FloatArray) -> contextlib.AbstractContextManager[Any]:
        """The model at a preference `(N,)`, while the block lasts."""

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`."""

        def complete(rows: Any, preference: FloatArray) -> list[str]:
            with self.at(preference) as model:
                return self.completer.complete(model, [prompts[row] for row in rows])

        return by_preference(complete, preferences, joined, mixed=False)[0]


def sources_identity(base: Source, policies: Mapping[Any, Source], **options: Any) -> dict[str, Any]:
    """What tells a method on these models from the same one on others."""
    found = {str(key): source_digest(source) for key, source in policies.items()}
    given = {name: str(value) for name, value in options.items()}
    return {"base": source_digest(base), "policies": found, "options": given}
