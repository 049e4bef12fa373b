"""A folder of LoRAs that servers share: written on demand, never more than so many bytes, never taken from who uses one.

An engine reads a LoRA's folder again whenever it has dropped it from memory, so a folder that was handed out must stay. Every
process therefore holds a shared lock (`flock`) on each LoRA that it has handed out; what is removed to make room is the least
recently used one that nobody holds. Locks end with their process, however it ends. An adapter that changes gets folders of
its own: a path means one preference of one adapter for ever.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import threading
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import HoEError
from ..files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..output_directory import complete_directory
from .export_report import size
from .lora_exporter import LoraExporter
from .preference_grid import PreferenceGrid

_BESIDE = 800  # bytes for each module, and some more, of what stands beside the weights: names, ranks, report
_LAYOUT = "1"  # changes when the same adapter would be written otherwise


class LoraCache:
    """The LoRAs of one adapter in a shared folder.

    Args:
        folder: shared with other adapters and other servers.
        exporter: writes the LoRAs; its source has a directory.
        grid: the preferences that there are.
        max_bytes: of everything in the folder.
    """

    def __init__(self, folder: Path, exporter: LoraExporter, grid: PreferenceGrid, max_bytes: int) -> None:
        self.folder, self.exporter, self.grid, self.max_bytes = folder, exporter, grid, max_bytes
        self._held: dict[str, FileLock] = {}
        self._lock = threading.Lock()

    @cached_property
    def _own(self) -> Path:
        """The folder of this adapter; its files are read whole, once."""
        return self.folder / _fingerprint(self.exporter)

    @property
    def max_rank(self) -> int:
        """The largest rank of a LoRA on the grid."""
        return max(self.exporter.rank_at(point) for point in self.grid.points)

    def path(self, preference: Any) -> Path:
        """The folder of the LoRA of a grid point, written if need be; it stays as long as this process lives.

        Raises:
            HoEError: there is no room for it.
        """
        name = self.grid.spell(preference)
        with self._lock:
            if name not in self._held:
                self._own.mkdir(parents=True, exist_ok=True)
                self._held[name] = FileLock(self._lock_of(self._own / name), fcntl.LOCK_SH)
            path = self._own / name
            if not (path / ADAPTER_CONFIG).is_file():
                self._write(path, preference)
            os.utime(path)
            return path

    def _write(self, path: Path, preference: Any) -> None:
        with FileLock(self.folder / ".writing.lock", fcntl.LOCK_EX):  # one process at a time
            if (path / ADAPTER_CONFIG).is_file():  # by another process, meanwhile
                return
            self._make_room(self.exporter.bytes(preference) + _BESIDE * (10 + len(self.exporter.source.modules)))
            with complete_directory(path) as building:
                self.exporter.write(preference, building, shown_as=path)

    def _make_room(self, wanted: int) -> None:
        there = sorted(self._all(), key=lambda path: path.stat().st_mtime)
        total = sum(_bytes(path) for path in there)
        for path in there:
            if total + wanted <= self.max_bytes:
                return
            total -= _remove_unless_held(path, self._lock_of(path))
        if total + wanted > self.max_bytes:
            raise HoEError(
                f"the cache {self.folder} holds {size(total)} that servers use, and {size(wanted)} more would be above its "
                f"limit of {size(self.max_bytes)}; raise the limit, or use a coarser grid",
                argument="max_bytes",
                value=self.max_bytes,
            )

    def _all(self) -> Iterator[Path]:
        """Every LoRA in the folder, of whatever adapter."""
        return (file.parent for file in self.folder.glob(f"*/*/{ADAPTER_CONFIG}"))

    @staticmethod
    def _lock_of(path: Path) -> Path:
        return path.parent / f".{path.name}.lock"


class FileLock:
    """A lock on a file, until `release`, or until nobody holds this object or the process any more.

    Args:
        path: made if it is not there.
        how: `fcntl.LOCK_SH` or `LOCK_EX`, perhaps with `LOCK_NB`.

    Raises:
        BlockingIOError: with `LOCK_NB`, somebody else has a lock that excludes it.
    """

    def __init__(self, path: Path, how: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.release = weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, how)
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _remove_unless_held(path: Path, lock: Path) -> int:
    """Remove a LoRA that no process holds; how many bytes that gave back."""
    try:
        with FileLock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            freed = _bytes(path)
            shutil.rmtree(path)
            return freed
    except BlockingIOError:
        return 0


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _fingerprint(exporter: LoraExporter) -> str:
    """Changes with the adapter's files and with how they are exported."""
    directory = exporter.source.directory
    if directory is None:
        raise HoEError(
            "a cache of LoRAs needs an adapter in files, not in memory; save it first",
            argument="source", value=exporter.source.label, allowed="an adapter in files",
        )  # fmt: skip
    digest = hashlib.sha256()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        with (directory / name).open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    digest.update(json.dumps([_LAYOUT, *exporter.how]).encode())
    return digest.hexdigest()[:32]
