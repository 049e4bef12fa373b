"""A safetensors file that is written as its tensors are made, so that no adapter is ever in memory as a whole.

The format wants a header in front that names every tensor and its place, and no gap between tensors. What an adapter will hold
is known only when its last module is made: experts without weights in a module, or of less rank than was asked for, leave no
trace. So room for the longest header is kept in front; what is left of it is filled with blanks, which the format allows.

Tensors of the file's own dtype go straight to it. The few others (lengths in float32 beside factors in bfloat16) are kept until
the end and lie right before the first of those, the narrowest first: every tensor begins at a multiple of its entries' size.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .weight_files import DTYPES

_ALIGNMENT = 8
_PIECE = 1 << 22  # bytes that are read at once
_ENTRY = 200  # characters of a header's entry beside the name of its tensor, at most
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WeightWriter:
    """Writes one safetensors file, tensor after tensor; a context manager that closes it.

    What an earlier process wrote is gone on with: `add_again` everything that it added, in its order, then `go_on`.

    Args:
        path: of the file; it is complete when `finish` has returned.
        dtype: of the tensors that go straight to the file.
        names: of all tensors that may be added.
        others: bytes of all tensors of other dtypes together, at most.

    Attributes:
        checksum: CRC-32 of all that went straight to the file.
    """

    def __init__(self, path: Path, dtype: torch.dtype, names: Sequence[str], others: int) -> None:
        self._dtype, self._known = dtype, frozenset(names)
        room = 8 + _ENTRY + sum(len(json.dumps(name)) + _ENTRY for name in names) + others
        self._start = -(-room // _ALIGNMENT) * _ALIGNMENT  # of what goes straight to the file
        path.touch()
        self._file = path.open("r+b", buffering=0)  # closing has nothing left to write, and nothing to fail at
        self._file.seek(self._start)
        self._written: dict[str, tuple[int, ...]] = {}  # name: shape, in the order of the file
        self._others: dict[str, Tensor] = {}
        self.checksum = 0

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, or keep it where it is of another dtype.

        Raises:
            ValueError: a name that was not announced, or was added before.
            OSError: the disk is full.
        """
        if name not in self._known or name in self._written or name in self._others:
            raise ValueError(f"tensor {name!r} was not announced, or is there already")
        if tensor.dtype != self._dtype:
            self._others[name] = tensor
        else:
            self._write(tensor)
            self._written[name] = tuple(tensor.shape)

    def add_again(self, shapes: dict[str, tuple[int, ...]], others: dict[str, Tensor], checksum: int) -> bool:
        """Take what the file holds already, where it does.

        Args:
            shapes: of the tensors that went straight to the file, in order.
            others: the tensors that were kept.
            checksum: what `checksum` was after them.

        Returns:
            whether the file holds just that; where it does not, nothing was taken.
        """
        left, found = sum(torch.Size(shape).numel() for shape in shapes.values()) * self._dtype.itemsize, self.checksum
        place = self._file.tell()
        while left:
            piece = self._file.read(min(left, _PIECE))
            if not piece:
                break
            found, left = zlib.crc32(piece, found), left - len(piece)
        if left or found != checksum:
            self._file.seek(place)
            return False
        self._written |= shapes
        self._others |= others
        self.checksum = found
        return True

    def go_on(self) -> None:
        """Forget whatever follows in the file."""
        self._file.truncate(self._file.tell())

    def finish(self) -> None:
        """Write the header and what was kept.

        Raises:
            ValueError: there is more than was announced.
            OSError: the disk is full.
        """
        others = dict(sorted(self._others.items(), key=lambda item: item[1].dtype.itemsize))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in [
            *((name, tensor.dtype, tuple(tensor.shape)) for name, tensor in others.items()),
            *((name, self._dtype, shape) for name, shape in self._written.items()),
        ]:
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"))
        length = self._start - 8 - sum(tensor.nbytes for tensor in others.values())
        if len(text) > length:
            raise ValueError(f"the header has {len(text)} characters, and room is for {length}")
        self._file.seek(0)
        self._write_bytes(memoryview(length.to_bytes(8, "little") + text.ljust(length).encode("ascii")))
        for tensor in others.values():
            self._write(tensor)

    def _write(self, tensor: Tensor) -> None:
        content = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self._write_bytes(content)
        self.checksum = zlib.crc32(content, self.checksum)

    def _write_bytes(self, left: memoryview) -> None:
        while len(left):
            left = left[self._file.write(left) :]  # at most two gigabytes at once
