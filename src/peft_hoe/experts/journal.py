"""What a build has done so far, on disk, so that a killed one goes on where it stopped.

One line of JSON for each module that is finished, and one file for the measurement before. A kill may cut the last line short,
and a failing machine may lose what lies behind it; both count as not done.
"""

from __future__ import annotations

import base64
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weight_files import DTYPES, FILE_ERRORS

_MODULES, _MEASUREMENT = "modules.jsonl", "measurement.pt"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Journal:
    """The records of one build.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self._modules, self._measurement = folder / _MODULES, folder / _MEASUREMENT

    def modules(self) -> list[dict[str, Any]]:
        """The records of finished modules, in order."""
        records: list[dict[str, Any]] = []
        if not self._modules.is_file():
            return records
        with suppress(ValueError):  # a line that was cut short, after which nothing counts
            records.extend(json.loads(line) for line in self._modules.read_bytes().splitlines())
        return records

    def keep(self, records: list[dict[str, Any]]) -> None:
        """Forget all modules but these, the first ones."""
        self._modules.write_bytes(b"".join(map(_line, records)))

    def add(self, record: dict[str, Any]) -> None:
        """Record one more module."""
        with self._modules.open("ab", buffering=0) as file:
            file.write(_line(record))

    def measurement(self) -> dict[str, Any] | None:
        """The state of the measurement that was last saved."""
        try:
            return torch.load(self._measurement, weights_only=True)  # type: ignore[no-any-return]
        except FILE_ERRORS:
            return None

    def save_measurement(self, state: dict[str, Any]) -> None:
        """Save the state of the measurement, in place of the one before, in one step."""
        fresh = self._measurement.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, self._measurement)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":")).encode() + b"\n"


def to_json(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A few small tensors as JSON types."""
    return {
        name: [_NAMES[tensor.dtype], list(tensor.shape), base64.b64encode(_bytes(tensor)).decode()]
        for name, tensor in tensors.items()
    }


def from_json(record: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that `to_json` was given."""
    return {
        name: torch.frombuffer(bytearray(base64.b64decode(content)), dtype=DTYPES[kind]).reshape(shape)
        for name, (kind, shape, content) in record.items()
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
