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

import numpy as np
import torch

from ...generation.decoder import Decoder
from ...preference import FloatArray
from .adapters import Source, source_digest


class PerPreference(ABC):
    """One state of the weights after the other; a subclass says what a state is.

    Args:
        name: of the method.
        objectives: the N names, or None where only the rewards know them.
        decoder: how it generates.
        identity: whatever else changes the texts; plain JSON.
    """

    mixes_rows = False

    def __init__(self, name: str, objectives: Sequence[str] | None, decoder: Decoder, identity: Any) -> None:
        self.name = name
        self.objectives = None if objectives is None else tuple(objectives)
        self.decoder = decoder
        self.identity = identity

    @property
    def decoding(self) -> dict[str, Any]:
        """How it generates, as plain JSON."""
        return self.decoder.record

    def fingerprint(self) -> str:
        """Changes with the policies and the method's options."""
        return hashlib.sha256(json.dumps([self.name, self.identity], sort_keys=True, default=str).encode()).hexdigest()

    @abstractmethod
    def at(self, preference: FloatArray) -> contextlib.AbstractContextManager[Any]:
        """The model at a preference `(N,)`, while the block lasts."""

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], preferences: FloatArray) -> list[str]:
        """Complete K prompts, row k at `preferences[k]` of `(K, N)`."""
        wanted = np.asarray(preferences, dtype=np.float64)
        texts: dict[int, str] = {}
        for point in np.unique(wanted, axis=0):
            rows = np.flatnonzero((wanted == point).all(axis=1)).tolist()
            with self.at(point) as model:
                found = self.decoder.complete(model, [prompts[row] for row in rows])
            texts |= dict(zip(rows, found, strict=True))
        return [texts[row] for row in range(len(prompts))]


def sources_identity(base: Source, policies: Mapping[Any, Source], **options: Any) -> dict[str, Any]:
    """What tells a method on these models from the same one on others."""
    found = {str(key): source_digest(source) for key, source in policies.items()}
    given = {name: str(value) for name, value in options.items()}
    return {"base": source_digest(base), "policies": found, "options": given}
