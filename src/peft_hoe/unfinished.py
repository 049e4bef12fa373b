"""Directories that are being filled: who fills which, what killed processes left, and the last step, putting files in place.

A directory belongs to the process that holds its lock, which ends with the process however that ends. One without an owner was
left by a kill: it is gone on with by the same work, and removed by any other for the same output.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is known of other processes, so nothing of theirs is touched
    fcntl = None  # type: ignore[assignment]

from .errors import CheckpointError, HoEError
from .files import ADAPTER_CONFIG

PREFIX = ".peft_hoe-"
_LOCK, _FILES, _STATE, _ASIDE, _MOVING = "lock", "files", "state", "replaced", "moving.json"


class InterruptedWork(HoEError):
    """Work that was stopped from outside, and goes on when it is started again."""


# After these an unfinished directory is kept for the same work to go on
RESUMABLE = (KeyboardInterrupt, SystemExit, MemoryError, InterruptedWork)


class Unfinished:
    """A directory that is being filled by this process, until `close`.

    Args:
        folder: where it lies.
        output: name of what will be written, beside which it is found again.
        key: says what work it is; None where the work cannot be gone on with.

    Attributes:
        files: the directory of what will be put in place.
        state: the directory of what the work must know to go on, which never reaches the output.

    Raises:
        CheckpointError: another process is at the same work.
        OSError: the place cannot be written to.
    """

    def __init__(self, folder: Path, output: str, key: str | None = None) -> None:
        mine = f"{PREFIX}{_digest(output)}-"
        name = None if key is None else mine + _digest(key)
        _remove_strays(folder, mine, keep=name)
        self._path = Path(tempfile.mkdtemp(prefix=mine, dir=folder)) if name is None else folder / name
        self._path.mkdir(mode=0o700, exist_ok=True)
        lock = _lock(self._path)
        if lock is None:
            raise CheckpointError(
                f"another process is building the same adapter, in {str(self._path)!r}; wait for it, or give another path",
                path=self._path,
            )
        self._lock = lock
        self.files, self.state = self._path / _FILES, self._path / _STATE
        self.files.mkdir(exist_ok=True)
        self.state.mkdir(exist_ok=True)

    def close(self, *, keep: bool = False) -> None:
        """Remove it, unless it is to be kept for the same work to go on; and let it go."""
        if not keep:
            shutil.rmtree(self._path, ignore_errors=True)
        self._lock.close()

    def rename(self, output: Path) -> None:
        """Let the files appear as a new directory, in one step."""
        self.files.rename(output)

    def move_in(self, output: Path) -> None:
        """Put every file in its place in an existing directory, or leave all places as they were.

        The configuration goes first and comes last: whoever looks in between, even after a kill, finds no adapter rather
        than one whose files do not belong together.
        """
        names = sorted((file.name for file in self.files.iterdir()), key=lambda name: name != ADAPTER_CONFIG)
        aside = self._path / _ASIDE
        aside.mkdir(exist_ok=True)
        (self._path / _MOVING).write_text(json.dumps(names), encoding="utf-8")
        try:
            for name in names:
                if os.path.lexists(output / name):
                    (output / name).rename(aside / name)
            for name in reversed(names):
                (self.files / name).rename(output / name)
            (self._path / _MOVING).unlink()
        except BaseException:
            _move_back(self._path, output)
            raise


def undo_interrupted_moves(output: Path) -> None:
    """Give an existing directory back the files that a process was replacing when it was killed."""
    for path in _strays(output, PREFIX):
        lock = _lock(path)
        if lock is not None:
            _move_back(path, output)
            lock.close()


def _move_back(path: Path, output: Path) -> None:
    """Undo what `move_in` has done so far; does nothing where that is nothing."""
    with suppress(OSError, ValueError):
        names = json.loads((path / _MOVING).read_text(encoding="utf-8"))
        for name in names:  # the new configuration goes first
            if not os.path.lexists(path / _FILES / name) and os.path.lexists(output / name):
                (output / name).rename(path / _FILES / name)
        for name in reversed(names):
            if os.path.lexists(path / _ASIDE / name):
                (path / _ASIDE / name).rename(output / name)
        (path / _MOVING).unlink()


def _strays(folder: Path, prefix: str) -> Iterator[Path]:
    with suppress(OSError):
        yield from [entry for entry in folder.iterdir() if entry.name.startswith(prefix) and entry.is_dir()]


def _remove_strays(folder: Path, prefix: str, keep: str | None) -> None:
    """Remove what killed processes left of other work for the same output."""
    for path in _strays(folder, prefix):
        if path.name == keep or fcntl is None:
            continue
        lock = _lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            lock.close()


def _lock(path: Path) -> IO[bytes] | None:
    """The lock of a directory, held until it is closed; None where another process has it, or the directory is gone."""
    with suppress(FileNotFoundError):
        file = (path / _LOCK).open("ab")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path / _LOCK)):  # and not one that was just removed
                return file
        except OSError:
            pass  # held by another; or a file system without locks, where nobody knows
        file.close()
    return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
