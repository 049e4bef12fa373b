"""Files of weights, read some rows at a time into memory of our own.

A mapped file stays in the resident set once it was read, and a build reads whole policies. Here a piece is read by a system
call, and nothing of the file is kept.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS = ".safetensors"
SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = f"{SAFETENSORS_FILE}.index.json"  # where it is split
DTYPES = {  # safetensors' names
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

# What opening or reading raises where a file is damaged
FILE_ERRORS = (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError)


def open_file(path: Path) -> WeightFile:
    """A safetensors file, or a pickled one, read with `weights_only`.

    Raises:
        one of `FILE_ERRORS`: it is missing, truncated or of another format.
    """
    return SafetensorsFile(path) if path.suffix == SAFETENSORS else PickledFile(path)


class WeightFile(ABC):
    """One file of tensors by name."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor, without reading it."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the first dimension; a tensor without dimensions has one row, itself."""

    def expect(self, name: str) -> None:  # noqa: B027  most need not
        """Hear that a tensor will be read soon, so that the system may begin to."""

    remote = False  # whether it is fetched to be read

    def peek(self, name: str, start: int, stop: int) -> Tensor | None:
        """As `rows`, without fetching more than that; None where it cannot be done."""
        return self.rows(name, start, stop)

    def here(self, name: str) -> bool:
        """Whether a tensor can be read whole without fetching."""
        return True

    def bring(self) -> None:  # noqa: B027
        """Have the file on this disk."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of a safetensors file lies, in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile(WeightFile):
    """A safetensors file; its format is eight bytes of length, a header in JSON, and the tensors one after the other."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):
            pass  # the library sees that the header is sound, and the file as long as it says
        self._path = path
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        header: dict[str, Any] = json.loads(self._file.read(length))
        header.pop("__metadata__", None)
        self._places = {
            name: Place(found["dtype"], tuple(found["shape"]), *(8 + length + end for end in found["data_offsets"]))
            for name, found in header.items()
        }

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the file for itself when it reads the first tensor."""
        return {"_path": self._path, "_places": self._places}

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor.

        Raises:
            ValueError: one that is not known here.
        """
        kind = self._places[name].dtype
        if kind not in DTYPES:
            raise ValueError(f"tensor {name!r} is of type {kind!r}; known are {sorted(DTYPES)}")
        return DTYPES[kind]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows, read now."""
        shape, dtype = self.shape(name), self.dtype(name)
        piece = torch.empty((max(0, min(stop, shape[0]) - start), *shape[1:]) if shape else (), dtype=dtype)
        if piece.numel():
            width = math.prod(shape[1:]) * dtype.itemsize
            self._read(piece.view(-1).view(torch.uint8), self._places[name].begin + start * width * bool(shape))
        return piece

    def _read(self, target: Tensor, offset: int) -> None:
        """Fill `target` `(bytes,)`."""
        file = self._opened()
        file.seek(offset)
        fill(target, file)

    def expect(self, name: str) -> None:
        """Ask the system to read ahead."""
        if hasattr(os, "posix_fadvise"):
            place = self._places[name]
            with suppress(OSError):  # which the reading will tell of
                number = self._opened().fileno()
                os.posix_fadvise(number, place.begin, place.end - place.begin, os.POSIX_FADV_WILLNEED)

    def _opened(self) -> FileIO:
        if "_file" not in vars(self):
            self._file = self._path.open("rb", buffering=0)
        return self._file


def fill(target: Tensor, file: FileIO) -> None:
    """Fill `target` `(bytes,)` from an open file.

    Raises:
        OSError: the file ends before.
    """
    left = memoryview(target.numpy())  # type: ignore[arg-type]
    while len(left):
        read = file.readinto(left)  # at most two gigabytes at once
        if not read:
            raise OSError(f"the file ends {len(left)} bytes early; it was cut off while it was read")
        left = left[read:]


class PickledFile(WeightFile):
    """A file of torch.save, loaded whole."""

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor."""
        return self._tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows."""
        tensor = self._tensors[name]
        return tensor[start:stop] if tensor.ndim else tensor
